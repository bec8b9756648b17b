"""Selects layers and weights of a diffusers transformer by the run file's groups and patterns.

Adapters go on linear layers (`select_linears`), fine-tuning takes weights (`select_weights`). A
pattern has the syntax of `fnmatch` and matches a whole name or its end after a dot: ``attn1.to_q``
is that layer in all blocks, ``blocks.[0-9].*`` is everything in the first ten.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches

from diffusers import WanTransformer3DModel
from torch import nn

from onewan.arithmetic.layer_names import (
    BLOCK,
    block_of,
    grouped_linears,
    grouped_weights,
    matching,
)
from onewan.errors import ConfigError


def select_linears(
    transformer: WanTransformer3DModel,
    modules: Sequence[str],
    layers: Sequence[int] | None,
    field: str = "method.modules",
) -> tuple[str, ...]:
    """Names of the linear layers that the groups and patterns `modules` select, in the model's
    order.

    With `layers`, indices of blocks, only those in these blocks. ConfigError, which names `field`,
    for groups and patterns that select nothing and for blocks that do not exist.
    """
    names = _within(_linears(transformer), transformer, layers)
    return _selected(names, modules, grouped_linears(names), field, layers)


def select_weights(
    transformer: WanTransformer3DModel,
    modules: Sequence[str],
    layers: Sequence[int] | None,
    field: str = "method.modules",
) -> tuple[str, ...]:
    """Names of the weights that `modules` select, in the model's order; otherwise as
    `select_linears`. A group of linear layers stands for their weights and biases.
    """
    names = _within([n for n, _ in transformer.named_parameters()], transformer, layers)
    groups = grouped_weights(names, set(_linears(transformer)))
    return _selected(names, modules, groups, field, layers)


def select_layers(layers: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """Indices of the blocks to train; None is all. ConfigError for a block that does not exist."""
    if layers is None:
        return tuple(range(num_layers))
    if outside := [n for n in layers if n >= num_layers]:
        raise ConfigError(
            "run file",
            [
                f"wan_config.transformer_layers_to_train: has no block {n}; "
                f"the model's blocks are 0 to {num_layers - 1}"
                for n in outside
            ],
        )
    return tuple(sorted(set(layers)))


def _linears(transformer: WanTransformer3DModel) -> list[str]:
    return [n for n, m in transformer.named_modules() if isinstance(m, nn.Linear)]


def _within(
    names: list[str], transformer: WanTransformer3DModel, layers: Sequence[int] | None
) -> list[str]:
    """Those of `names` in the blocks `layers`; all for None."""
    if layers is None:
        return names
    # Names outside the blocks have no index, and are left out.
    blocks = set(select_layers(layers, len(transformer.blocks)))
    return [n for n in names if block_of(n) in blocks]


def _selected(
    names: list[str],
    modules: Sequence[str],
    groups: dict[str, list[str]],
    field: str,
    layers: Sequence[int] | None,
) -> tuple[str, ...]:
    chosen: set[str] = set()
    problems: list[str] = []  # all of them, so that the user corrects the file once
    for entry in modules:
        found = groups.get(entry)
        if found is None:
            found = matching(names, entry)
        if not found:
            problems.append(_selects_nothing(entry, names, groups, field, layers))
        chosen.update(found)
    if problems:
        raise ConfigError("run file", problems)
    return tuple(n for n in names if n in chosen)


def _selects_nothing(
    entry: str,
    names: list[str],
    groups: dict[str, list[str]],
    field: str,
    layers: Sequence[int] | None,
) -> str:
    """The message for a group or pattern that selects nothing, with similar names."""
    where = "" if layers is None else " in the blocks of wan_config.transformer_layers_to_train"
    return f"{field}: {entry!r} selects nothing{where}; {similar_names(entry, names, groups)}"


def similar_names(entry: str, names: Collection[str], groups: Collection[str] = ()) -> str:
    """A hint for `entry`, which matches none of `names` (layers or weights of a transformer) and is
    none of `groups`: the most similar one, and what there is."""
    # Without the numbers of blocks, which would repeat each name once for each block.
    plain = list(dict.fromkeys(BLOCK.sub("", name) for name in names))
    near = get_close_matches(entry.strip("*."), [*groups, *plain, *names], n=1, cutoff=0.5)
    in_blocks = list(dict.fromkeys(BLOCK.sub("", n) for n in names if BLOCK.match(n)))
    shown = in_blocks or plain
    parts = [
        f"did you mean {near[0]}?" if near else "",
        f"{'The' if near else 'the'} groups are {', '.join(groups)};" if groups else "",
        f"{'each block has' if in_blocks else 'the model has'} {', '.join(shown[:12])}",
        ", ..." if len(shown) > 12 else "",
    ]
    return " ".join(part for part in parts[:3] if part) + parts[3]
