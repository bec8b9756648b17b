"""Reads adapters from files of any trainer. `onewan.formats.lora_writing` writes them.

`onewan.formats.lora` finds the layers by the keys; here the tensors are read and checked. Files
whose values would break the model without any message are refused: weights that are NaN or
infinite, and alphas that no training gives. Keys that Wan 2.2 has no weights for, and what has no
effect, are reported as notices.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onewan.dtypes import safetensors_name
from onewan.errors import CheckpointError
from onewan.formats.adapter import ModuleAdapter
from onewan.formats.backends import TensorInfo
from onewan.formats.container import TensorFile, open_tensors
from onewan.formats.finite import all_finite
from onewan.formats.lora import AdapterLayout, layout_of
from onewan.formats.peft import PeftSettings, from_peft
from onewan.formats.untrusted import first_line, named, parse_json, read_json
from onewan.variants import ExpertName

PEFT_SETTINGS = "lora_adapter_metadata"
"""Key of the header under which diffusers keeps PEFT's settings."""

_LARGEST_SCALE = 1e6
"""Of alpha / rank. Trainers use 0.01 to 100; a damaged exponent gives anything up to 1e38."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """An adapter from a file, with diffusers' names of modules for every key format."""

    path: Path
    layout: AdapterLayout
    modules: dict[str, ModuleAdapter]
    """By diffusers' names (``blocks.0.attn1.to_q``)."""
    expert: ExpertName | None
    """The expert that the keys name, or that was requested; None if neither."""
    metadata: dict[str, str]
    """The header's metadata, unchanged."""
    notices: tuple[str, ...] = ()
    """Notices for the user, one line each: what was skipped, and what has no or a reversed effect.
    """

    def digest(self) -> str:
        """BLAKE2b-160, in hexadecimal, of everything that the adapter computes with, whatever its
        key format and header."""
        digest = hashlib.blake2b(digest_size=20)
        for module, adapter in sorted(self.modules.items()):
            factor = adapter.alpha if adapter.rank is None else adapter.scale
            digest.update(f"{module}\0{adapter.kind}\0{factor!r}\0".encode())
            for part, tensor in sorted(adapter.tensors.items()):
                digest.update(f"{part}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
                content = tensor.contiguous().reshape(-1).view(torch.uint8)
                digest.update(content.numpy().data)
        return digest.hexdigest()


def read_adapter(
    path: Path, expert: ExpertName | None = None, *, skip_unknown: bool = False
) -> AdapterFile:
    """The adapter in `path`, of any trainer; `expert` selects one where a file holds both.

    A missing alpha is the rank, as in ComfyUI and diffusers. CheckpointError for an incomplete
    file, another model's adapter, missing tensors, shapes that do not multiply, alphas without
    weights, and values that are not finite. With `skip_unknown`, keys of other models are skipped,
    with a notice, as long as some are of Wan 2.2.
    """
    return _read(open_tensors(Path(path)), Path(path), expert, skip_unknown=skip_unknown)


def experts_in(source: Path | TensorFile) -> tuple[ExpertName, ...]:
    """The experts that the keys of the adapter in `source` name: none, one or both."""
    file = source if isinstance(source, TensorFile) else open_tensors(source)
    layout = layout_of(file.tensors, file.metadata)
    return () if layout is None else layout.experts


def read_adapters(path: Path) -> list[AdapterFile]:
    """The adapters in `path`: two if it holds those of both experts. Errors as `read_adapter`."""
    file = open_tensors(Path(path))
    experts = experts_in(file)
    if len(experts) < 2:
        return [_read(file, Path(path), None)]
    return [_read(file, Path(path), expert) for expert in experts]


def parse_adapter(
    tensors: Mapping[str, Tensor], peft_settings: Mapping[str, Any] | None = None, *, source: str
) -> dict[str, ModuleAdapter]:
    """The adapter in a state dict in memory, with keys of any trainer's format, by module.

    `peft_settings` is ``to_dict()`` of PEFT's configuration, for a state dict of
    ``get_peft_model_state_dict``; without it, and without alphas among the tensors, alpha is the
    rank. The tensors are not copied. CheckpointError, which names `source`, as `read_adapter`.
    """
    infos = {
        key: TensorInfo(tuple(tensor.shape), safetensors_name(tensor.dtype))
        for key, tensor in tensors.items()
    }
    layout = _require_complete(source, infos, layout_of(infos, {}))
    _require_finite(source, layout, tensors.__getitem__)
    try:
        modules = _modules(layout, tensors.__getitem__, peft_settings or {})
    except _SettingsError as error:
        raise CheckpointError(
            f"{source}: PEFT's settings do not fit its tensors ({error}); pass the adapter's own"
        ) from error
    _require_usable_scales(source, modules)
    return modules


def _read(
    file: TensorFile, path: Path, expert: ExpertName | None, *, skip_unknown: bool = False
) -> AdapterFile:
    layout = layout_of(file.tensors, file.metadata, expert)
    unknown: tuple[str, ...] = ()
    if skip_unknown and layout is not None and layout.modules:
        layout, unknown = replace(layout, unknown=()), layout.unknown
    layout = _require_complete(file.path, file.tensors, layout)
    if len(layout.experts) > 1 and expert is None:
        raise CheckpointError(
            f"{path}: holds the LoRAs of both experts; read one at a time (--expert high, then "
            "--expert low)"
        )
    _require_finite(path, layout, file.read)
    try:
        modules = _modules(layout, file.read, _settings(file))
    except _SettingsError as error:
        raise _damaged_settings(file, error) from error
    _require_usable_scales(path, modules)
    if layout.prefix == "lora_unet_":
        # `or modules`: a file with nothing but zeros is an untrained adapter, not padding.
        modules = {m: a for m, a in modules.items() if not _is_zero_padding(a)} or modules
    in_keys = layout.experts[0] if len(layout.experts) == 1 else None
    return AdapterFile(
        path=path,
        layout=layout,
        modules=modules,
        expert=in_keys or (expert if layout.experts else None),
        metadata=dict(file.metadata),
        notices=tuple(_notices(path, file, layout, modules, unknown)),
    )


class _SettingsError(ValueError):
    """PEFT's settings are invalid, or do not fit the tensors."""


def _modules(
    layout: AdapterLayout, read: Callable[[str], Tensor], settings: Mapping[str, Any]
) -> dict[str, ModuleAdapter]:
    """The adapter whose tensors `read` returns by key, under PEFT's `settings`, if it has any."""
    modules: dict[str, ModuleAdapter] = {}
    for module, keys in layout.modules.items():
        parts = {part: read(key) for part, key in keys.items()}
        alpha = parts.pop("alpha", None)
        kind = layout.kinds[module]
        # An alpha among the tensors takes precedence over the settings. PEFT's OFT is always
        # converted, since its rotation has another form than LyCORIS'.
        if "oft_R" in parts or (alpha is None and settings):
            try:
                modules[module] = from_peft(parts, PeftSettings.of_module(module, kind, settings))
            except (ValueError, TypeError, KeyError, OverflowError) as error:
                raise _SettingsError(repr(error)) from error
        else:
            modules[module] = ModuleAdapter(
                kind=kind, tensors=parts, alpha=None if alpha is None else float(alpha)
            )
    return modules


# ------------------------------------------------------------------------------------------ checks


def _require_complete(
    source: Path | str, tensors: Mapping[str, TensorInfo], layout: AdapterLayout | None
) -> AdapterLayout:
    """`layout` if it is that of a complete adapter for Wan 2.2; otherwise CheckpointError."""
    total = len(tensors)
    remedy = (
        "give a LoRA for Wan 2.2, with keys such as diffusion_model.blocks.N.self_attn.q."
        "lora_A.weight or transformer.blocks.N.attn1.to_q.lora_A.weight"
    )
    if layout is None:
        examples = named(sorted(tensors))
        content = f"{total} tensors, none of a LoRA, such as {examples}" if total else "no tensors"
        raise CheckpointError(f"{source}: has {content}; {remedy}")
    if layout.unknown:
        owner = f", but of {layout.other_architecture}" if layout.other_architecture else ""
        raise CheckpointError(
            f"{source}: {len(layout.unknown)} of {total} keys are not of a Wan 2.2 LoRA{owner}, "
            f"such as {named(layout.unknown)}; {remedy}"
        )
    if layout.module_errors:
        raise CheckpointError(
            f"{source}: {len(layout.module_errors)} of {len(layout.modules)} modules are damaged: "
            f"{named(layout.module_errors, '; ')}; download the file again"
        )
    return layout


def _require_finite(
    source: Path | str, layout: AdapterLayout, read: Callable[[str], Tensor]
) -> None:
    """CheckpointError that names the tensors with values that are NaN or infinite."""
    # The tensors are read once more than needed, so that none of a file's pages stays in memory:
    # plain differences are as large as the model.
    keys = [key for parts in layout.modules.values() for key in parts.values()]
    if wrong := [key for key in keys if not all_finite(read(key))]:
        raise CheckpointError(
            f"{source}: {len(wrong)} of {len(keys)} tensors hold values that are NaN or infinite, "
            f"such as {named(wrong)}; its training diverged or the file is damaged, give an "
            "earlier or another file"
        )


def _require_usable_scales(source: Path | str, modules: Mapping[str, ModuleAdapter]) -> None:
    """CheckpointError for alphas that are not finite, or too large for any adapter."""
    wrong = [
        f"{module} has {adapter.alpha:g}" + (f" for rank {adapter.rank}" if adapter.rank else "")
        for module, adapter in modules.items()
        if adapter.alpha is not None
        and not (isfinite(adapter.alpha) and abs(adapter.scale) <= _LARGEST_SCALE)
    ]
    if wrong:
        raise CheckpointError(
            f"{source}: {len(wrong)} of {len(modules)} modules have an impossible alpha: "
            f"{named(wrong, '; ')}; the file is damaged, download or export it again"
        )


def _notices(
    path: Path,
    file: TensorFile,
    layout: AdapterLayout,
    modules: Mapping[str, ModuleAdapter],
    unknown: tuple[str, ...],
) -> list[str]:
    notices: list[str] = []
    if unknown:
        notices.append(
            f"{path}: {len(unknown)} of {len(file.tensors)} keys are skipped, since Wan 2.2 has no "
            f"weights for them: {named(unknown)}"
        )
    if layout.skipped:
        notices.append(
            f"{path}: {len(layout.skipped)} of {len(file.tensors)} keys are skipped, as in "
            "ComfyUI, since Wan 2.2 has no CLIP branch, and differences of modulation tables are "
            f"read by LightX2V alone: {named(layout.skipped)}"
        )
    scaled = {m: a.scale for m, a in modules.items() if a.alpha is not None and a.kind != "oft"}
    for what, chosen in (
        ("an alpha of 0, so they change nothing", [m for m, s in scaled.items() if s == 0]),
        (
            "a negative alpha, which subtracts what was trained",
            [m for m, s in scaled.items() if s < 0],
        ),
    ):
        if chosen:
            notices.append(
                f"{path}: {len(chosen)} of {len(modules)} modules have {what}: {named(chosen)}"
            )
    return notices


# ---------------------------------------------------------------------------------- PEFT's settings


def _settings(file: TensorFile) -> dict[str, Any]:
    """PEFT's settings, from the header or from the file that PEFT writes beside the weights; empty
    if there are none."""
    text = file.metadata.get(PEFT_SETTINGS)
    # PEFT's names of its two files. Another trainer's file may be in the same folder by chance, so
    # the settings are used only for weights with PEFT's own name.
    beside = file.files[0].with_name("adapter_config.json")
    try:
        if text is not None:
            settings = parse_json(text)
        elif file.files[0].stem == "adapter_model" and beside.is_file():
            settings = read_json(beside)
        else:
            return {}
        # diffusers puts the component before each name, PEFT does not.
        return {re.sub(r"^transformer(_2)?\.", "", n): value for n, value in settings.items()}
    except (ValueError, AttributeError) as error:
        raise _damaged_settings(file, error) from error


def _damaged_settings(file: TensorFile, error: Exception) -> CheckpointError:
    where = f"{PEFT_SETTINGS} in its header"
    if PEFT_SETTINGS not in file.metadata:
        where = "adapter_config.json beside it"
    return CheckpointError(
        f"{file.path}: {where} is damaged ({first_line(error)}); download the file again"
    )


def _is_zero_padding(adapter: ModuleAdapter) -> bool:
    """Whether it is padding of a complete kohya file: zeros of rank 1."""
    return (
        adapter.kind == "lora"
        and adapter.rank == 1
        and not any(bool(tensor.float().any()) for tensor in adapter.tensors.values())
    )
