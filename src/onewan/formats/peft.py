"""PEFT's conventions for adapters, converted to `ModuleAdapter`'s, and its patterns by module.

PEFT differs from LyCORIS in three points: the scale applies to every kind, rsLoRA divides alpha by
sqrt(rank), and OFT rotates inputs. Its settings give one value for all modules and exceptions by
regular expression (``rank_pattern``, ``alpha_pattern``). Tested against PEFT's own merged weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import sqrt
from typing import Any, TypeVar

import torch
from torch import Tensor

from onewan.errors import CheckpointError
from onewan.formats.adapter import ModuleAdapter
from onewan.formats.adapter_parts import AdapterKind, block_size, kind_of

_Value = TypeVar("_Value", bound=float)

_MOST_NEUMANN_TERMS = 1000
"""PEFT's default is 5; each term is a product of matrices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftSettings:
    """PEFT's settings for one module. The defaults hold for weights without settings."""

    alpha: float | None = None
    """None is the rank."""
    rank: int | None = None
    """``r``, which the scale of a LoKr divides by even if neither factor has that rank."""
    rank_stabilized: bool = False
    """rsLoRA (arXiv 2312.03732): the scale is alpha / sqrt(rank)."""
    neumann_terms: int | None = 5
    """OFT: terms of the Neumann series for Cayley's transform; None is the exact transform."""

    @staticmethod
    def of_module(module: str, kind: AdapterKind, settings: Mapping[str, Any]) -> PeftSettings:
        """From ``to_dict()`` of ``LoraConfig``, ``LoHaConfig``, ``LoKrConfig`` or ``OFTConfig``, or
        from the content of ``adapter_config.json``; empty if there are none. KeyError, TypeError or
        ValueError for invalid settings, CheckpointError for constrained OFT."""
        if kind == "oft":
            if settings.get("coft"):
                raise CheckpointError(
                    "the adapter is constrained OFT (coft), which onewan does not read; merge it "
                    "with PEFT"
                )
            exact = not settings.get("use_cayley_neumann", True)
            terms = int(settings.get("num_cayley_neumann_terms", 5))
            if not exact and terms > _MOST_NEUMANN_TERMS:
                raise ValueError(f"num_cayley_neumann_terms is {terms}")
            return PeftSettings(neumann_terms=None if exact else terms)
        if not settings:
            return PeftSettings()
        default = settings["lora_alpha"] if "lora_alpha" in settings else settings["alpha"]
        rank = _for_module(settings.get("rank_pattern"), module, settings.get("r"))
        if rank is not None and int(rank) < 1:
            raise ValueError(f"the rank of {module} is {rank}")
        return PeftSettings(
            alpha=float(_for_module(settings.get("alpha_pattern"), module, default)),
            rank=None if rank is None else int(rank),
            rank_stabilized=bool(settings.get("use_rslora")),
        )


def _for_module(patterns: Any, module: str, default: Any) -> Any:
    """The value that PEFT uses for `module`: that of the first expression that matches its end."""
    for expression, value in dict(patterns or {}).items():
        if _pattern(expression).match(module):
            return value
    return default


@lru_cache(maxsize=4096)
def _pattern(expression: str) -> re.Pattern[str]:
    """PEFT's own expression (``get_pattern_key``): a pattern matches from any dot on. ValueError
    for one that is malformed, or so complex that matching could take hours."""
    # A name of a layer, or parts of it. Nested repetitions take exponential time, and each further
    # one in a row multiplies it by the length of the name.
    repeated = re.findall(r"[*+{]", expression)
    if len(expression) > 1000 or len(repeated) > 3 or re.search(r"[*+}]\)*[*+{]", expression):
        raise ValueError(f"the pattern {expression[:60]!r} is not one for names of layers")
    try:
        return re.compile(rf"(.*\.)?({expression})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"the pattern {expression[:60]!r} is malformed ({error})") from None


def default_and_patterns(values: Mapping[str, _Value]) -> tuple[_Value, dict[str, _Value]]:
    """`values` by module as PEFT's default and patterns: the most common value, and the others by a
    regular expression that matches only that module, not those with the same ending."""
    default = Counter(values.values()).most_common(1)[0][0]
    patterns = {"^" + re.escape(m): value for m, value in values.items() if value != default}
    return default, patterns


def as_peft_alpha(alpha: float) -> int:
    """`alpha` as an int if it is a whole number: PEFT declares an int, and only divides it."""
    return int(alpha) if float(alpha).is_integer() else alpha  # pyright: ignore[reportReturnType]


def from_peft(tensors: Mapping[str, Tensor], settings: PeftSettings) -> ModuleAdapter:
    """The adapter on a layer, from PEFT's `tensors` of that layer by our names (``lora_A``,
    ``oft_R``, ...). ValueError or TypeError where the settings do not fit the tensors."""
    adapter = ModuleAdapter(kind=kind_of(tensors), tensors=dict(tensors))
    if adapter.kind == "oft":
        rotation = rotation_of(tensors["oft_R"].float(), settings.neumann_terms)
        return replace(adapter, tensors={"rotation": rotation})
    rank, alpha = adapter.rank, settings.alpha
    if alpha is None:
        return adapter
    if rank is not None:
        return replace(adapter, alpha=alpha * (sqrt(rank) if settings.rank_stabilized else 1.0))
    if adapter.kind == "lokr":
        if settings.rank is None:
            raise ValueError("r is missing, which the scale of a LoKr is divided by")
        # LyCORIS does not scale two full factors, PEFT does: put the scale into one of them.
        return _with_scaled_part(adapter, "lokr_w1", alpha / settings.rank)
    return adapter


def _with_scaled_part(adapter: ModuleAdapter, part: str, scale: float) -> ModuleAdapter:
    """`adapter` with one tensor multiplied by `scale`; bit-exact if that is 1."""
    if scale == 1.0:
        return adapter
    tensor = adapter.tensors[part]
    scaled = (tensor.float() * scale).to(tensor.dtype)
    return replace(adapter, tensors={**adapter.tensors, part: scaled})


def rotation_of(triangles: Tensor, neumann_terms: int | None) -> Tensor:
    """PEFT's rotation R [n, size, size] from the values above the diagonal of its generator Q,
    `triangles` [n, size (size - 1) / 2]; n is 1 where all blocks share one (``block_share``).

    R = (1 - Q)(1 + Q)^-1 with Q^T = -Q, Cayley's transform. By default PEFT takes the first terms
    of the Neumann series of the inverse, so that R is only nearly orthogonal.
    """
    size = block_size(triangles.shape[1])
    assert size is not None
    rows, columns = torch.triu_indices(size, size, 1)
    q = torch.zeros(len(triangles), size, size)
    q[:, rows, columns] = triangles
    q = q - q.transpose(1, 2)
    identity = torch.eye(size).expand_as(q)
    if neumann_terms is None:
        return torch.linalg.solve(identity + q, identity - q, left=False)
    if neumann_terms < 2:
        return identity.clone()
    total, power = identity + 2 * q, q
    if neumann_terms == 2:
        return total
    # 1 + 2q + 2q^2 + ... + q^last, as PEFT sums it: the last term has the factor 1, and three
    # terms give the same four as four terms do.
    last = max(3, neumann_terms - 1)
    for exponent in range(2, last + 1):
        power = power @ q
        total = total + (power if exponent == last else 2 * power)
    return total
