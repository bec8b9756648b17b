"""Builds the module of a component on the meta device, and checks every key and shape against it.

Loading and converting both start with this, so that a file with missing or unexpected keys is
refused before any weight is read, and never becomes a random initialization.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from onewan.errors import CheckpointError
from onewan.formats.untrusted import first_line
from onewan.formats.weights import ComponentFile
from onewan.model.transformer import WanTransformer

_WITH_CODE = ("attn_implementation", "quantization_config", "auto_map")
"""Settings of transformers that select code, which a model's file must not do."""


def module_on_meta(weights: ComponentFile) -> nn.Module:
    """The diffusers or transformers module for `weights`: parameters on the meta device, buffers
    (rope tables) real. CheckpointError lists missing and unexpected keys and wrong shapes."""
    try:
        # Buffers are computed and stored in no file: on the meta device they would be lost.
        with init_empty_weights(include_buffers=False):
            module = _build(weights)
    except Exception as error:  # the libraries check no setting before they use it
        raise CheckpointError(
            f"{weights.path}: no module can be built from its configuration "
            f"({first_line(error)}); correct it or download it again"
        ) from error
    _check_keys_and_shapes(weights, module)
    return module


def transformer_on_meta(config: Mapping[str, Any]) -> WanTransformer:
    """A transformer with diffusers' configuration `config` and no weights. `reference_channels` in
    it are those of Wan2.2-Fun-Control's reference image."""
    settings = dict(config)
    reference_channels = settings.pop("reference_channels", None)  # not one of diffusers'
    with init_empty_weights(include_buffers=False):
        module = WanTransformer.from_config(settings)
        assert isinstance(module, WanTransformer)
        if reference_channels is not None:
            module.add_ref_conv(reference_channels)
    return module


def is_tied(name: str) -> bool:
    """Whether a parameter is the second name of the text encoder's tied embedding."""
    return name == "encoder.embed_tokens.weight"


def _build(weights: ComponentFile) -> nn.Module:
    config: dict[str, Any] = dict(weights.config)
    if weights.kind == "transformer":
        module = transformer_on_meta(config)
    elif weights.kind == "vae":
        module = AutoencoderKLWan.from_config(config)
    else:
        # Implementations of attention can be names of repositories whose code would be downloaded.
        plain = {n: v for n, v in config.items() if n[:1] != "_" and n not in _WITH_CODE}
        module = UMT5EncoderModel(UMT5Config(**plain))
    assert isinstance(module, nn.Module)
    return module


def _check_keys_and_shapes(weights: ComponentFile, module: nn.Module) -> None:
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters() if not is_tied(n)}
    found = {n: entry.info.shape for n, entry in weights.entries.items()}
    wrong = [
        f"{name} is {list(found[name])}, expected {list(shapes[name])}"
        for name in sorted(shapes.keys() & found.keys())
        if shapes[name] != found[name]
    ]
    problems = [
        _listed("missing keys", shapes.keys() - found.keys(), ", "),
        _listed("unexpected keys", {*(found.keys() - shapes.keys()), *weights.unexpected}, ", "),
        _listed("wrong shapes", wrong, "; "),
    ]
    if any(problems):
        kind = weights.kind.replace("_", " ")
        raise CheckpointError(
            f"{weights.path}: is not a complete {kind} of Wan 2.2; "
            f"{'; '.join(p for p in problems if p)}"
        )


def _listed(what: str, names: Collection[str], separator: str) -> str:
    if not names:
        return ""
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} {what} ({separator.join(sorted(names)[:3])}{more})"
