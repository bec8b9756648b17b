"""Weights out, in the spellings that other programs read, and LoRA files back in.

========== ==================================================== ==================================
format     a LoRA's keys                                        where alpha is
========== ==================================================== ==================================
comfyui    ``diffusion_model.<official>.lora_A.weight``         ``diffusion_model.<official>.alpha``
diffusers  ``transformer.<diffusers>.lora_A.weight``            in the header, as PEFT's settings
========== ==================================================== ==================================

ComfyUI, musubi-tuner, DiffSynth-Studio and diffusers all read the first; diffusers alone reads the
second. One file holds one expert; diffusers finds the low-noise expert's under the same prefix
``transformer.`` (``load_into_transformer_2=True``) and ignores any other without a word.

Hides names, headers and how a file becomes whole: it appears under its name only after it was
written, flushed to the disk, read back and found equal, to the bit. Never holds a training state
(`onewan.checkpoint.store` does), never touches a model, never unpickles.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from importlib.resources import files
from math import sqrt
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from onewan.errors import CheckpointError
from onewan.files import replacing, sync
from onewan.formats.names import to_diffusers, to_official
from onewan.variants import Expert, ExpertName, Variant

LoraFormat = Literal["comfyui", "diffusers"]

FORMAT_VERSION = 1
"""Version of the ``onewan.*`` part of the header."""

_PREFIX: Mapping[LoraFormat, str] = {"comfyui": "diffusion_model.", "diffusers": "transformer."}

_PART = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_down.weight": "A",
    "lora_up.weight": "B",
    "alpha": "alpha",
}
"""Endings of keys by what they hold."""

_PEFT_SETTINGS = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "use_dora",
    "lora_bias",
)
"""What diffusers itself derives from a file without a header (``utils/peft_utils.py``). The rest of
PEFT's settings stays out: an older PEFT refuses keys it does not know (each release adds some), and
``lora_dropout`` would drop inputs at inference, since diffusers leaves the new layers in training
mode."""

_HASH = "modelspec.hash_sha256"
_HASH_PLACEHOLDER = "0x" + "0" * 64


class WanModelSaver:
    """Writes what was trained to files for other programs; holds no state."""

    def save_lora(  # noqa: PLR0913  (facts about one file, each named at the call)
        self,
        weights: Mapping[str, Tensor],
        destination: Path,
        *,
        format: LoraFormat,
        dtype: torch.dtype,
        rank: int,
        alpha: float,
        peft_config: Mapping[str, Any],
        facts: Mapping[str, str | int | float],
        date: datetime,
        title: str | None = None,
        resolution: tuple[int, int] | None = None,
    ) -> Path:
        """Write the LoRA of one expert to `destination` (.safetensors) and return that path.

        `weights` have PEFT's names without the adapter's: ``blocks.0.attn1.to_q.lora_A.weight``
        [rank, in] and ``.lora_B.weight`` [out, rank]. They are stored as `dtype`, alpha as float32.
        `peft_config` (``LoraConfig.to_dict()``) is what diffusers rebuilds the adapter from.

        The header gets ModelSpec's fields (`title`, `date`, `resolution` as (width, height), ...)
        and `facts` about the run as ``onewan.<name>``, among which `expert_of` looks for `expert`.

        CheckpointError if a weight does not fit `dtype`, or the file can't be written or differs
        from what it should hold; nothing is left under `destination` then but what was there.
        """
        tensors: dict[str, Tensor] = {}
        for name, weight in weights.items():
            module, part = _split(name)
            if weight.shape[0 if part == "lora_A.weight" else 1] != rank:
                raise ValueError(f"{name}: is {tuple(weight.shape)}, which is not of rank {rank}")
            spelled = to_official(module) if format == "comfyui" else module
            tensors[f"{_PREFIX[format]}{spelled}.{part}"] = _stored(name, weight, dtype)
            if format == "comfyui":
                tensors[f"{_PREFIX[format]}{spelled}.alpha"] = torch.tensor(float(alpha))
        metadata = _model_spec("wan_2_2-lora", date, title, resolution)
        known = {"format_version": FORMAT_VERSION, "version": version("onewan")}
        known |= {"format": format, "rank": rank, "alpha": alpha}
        metadata |= {f"onewan.{name}": str(value) for name, value in {**facts, **known}.items()}
        if format == "diffusers":
            metadata[LORA_ADAPTER_METADATA_KEY] = _adapter_metadata(peft_config, rank, alpha)
        _write(tensors, metadata, Path(destination))
        return Path(destination)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFile:
    """A LoRA as a file holds it, under one set of names whatever its format."""

    path: Path
    format: LoraFormat
    weights: dict[str, Tensor]
    """``blocks.0.attn1.to_q.lora_A.weight`` [rank, in] and ``.lora_B.weight`` [out, rank], on the
    CPU, in the precision of the file."""
    ranks: dict[str, int]
    """By module (``blocks.0.attn1.to_q``)."""
    alphas: dict[str, float]
    """By module; the weights count alpha/rank times."""
    metadata: dict[str, str]
    """The header as it is."""


def read_lora(path: Path) -> LoraFile:
    """The LoRA in `path`, in either of our formats; in the first also as lora_down and lora_up.

    Where a file does not say alpha, it is the rank, as in ComfyUI and diffusers. CheckpointError
    names what is wrong: not a safetensors file, truncated, another model's LoRA, a kind of adapter
    that is not a plain LoRA, half a pair, matrices that do not multiply.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    format: LoraFormat | None = next(
        (f for f, prefix in _PREFIX.items() if any(key.startswith(prefix) for key in tensors)), None
    )
    parts: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        place = None if format is None else _place(key, format)
        if place is None:
            unknown.append(key)
        else:
            module, part = place
            parts.setdefault(module, {})[part] = tensor
    if format is None or unknown:
        raise CheckpointError(
            f"{path}: {len(unknown)} of {len(tensors)} keys are not of a Wan 2.2 LoRA, such as "
            f"{', '.join(sorted(unknown)[:3]) or 'none at all'}; give one with keys "
            "diffusion_model.blocks.N.self_attn.q.lora_A.weight (ComfyUI) or "
            "transformer.blocks.N.attn1.to_q.lora_A.weight (diffusers)"
        )
    if wrong := [f"{m} {fault}" for m, p in parts.items() if (fault := _fault(p))]:
        raise CheckpointError(
            f"{path}: {len(wrong)} of {len(parts)} modules are damaged: {'; '.join(wrong[:3])}"
        )
    ranks = {module: part["A"].shape[0] for module, part in parts.items()}
    return LoraFile(
        path=path,
        format=format,
        weights={
            f"{module}.lora_{side}.weight": part[side]
            for module, part in parts.items()
            for side in ("A", "B")
        },
        ranks=ranks,
        alphas=_header_alphas(path, metadata, ranks)
        if format == "diffusers"
        else {m: float(p["alpha"]) if "alpha" in p else float(ranks[m]) for m, p in parts.items()},
        metadata=metadata,
    )


def expert_of(path: Path, metadata: Mapping[str, str], variant: Variant) -> Expert:
    """The expert of `variant` that the weights file `path` with header `metadata` is for.

    Told by ``onewan.expert``, else by the file's name: ``..._high_noise``, ``...-HighNoise``, or
    ``high`` as a word of its own; the same for low. A variant with one expert needs neither.
    """
    said = metadata.get("onewan.expert")
    for expert in variant.experts:
        if said == expert.name:
            return expert
    names = " and ".join(e.name for e in variant.experts)
    if said is not None:
        raise CheckpointError(
            f"{path}: was made for the {said} expert, and {variant.name} has {names}; "
            "give a file of the same variant"
        )
    if len(variant.experts) == 1:
        return variant.experts[0]
    stem = Path(path).stem.lower()
    phrases = set(re.findall(r"(high|low)[-_. ]?noise", stem))
    words = phrases or {"high", "low"}.intersection(re.split(r"[^a-z]+", stem))
    if len(words) != 1:
        raise CheckpointError(
            f"{path}: neither its header nor its name says which expert it is for; {variant.name} "
            f"has {names}, so name it ..._high_noise.safetensors or ..._low_noise.safetensors"
        )
    name: ExpertName = "high" if "high" in words else "low"
    return variant.expert(name)


# ----------------------------------------------------------------------------------- names, headers


def _split(name: str) -> tuple[str, str]:
    """(module, ``lora_A.weight`` or ``lora_B.weight``) of a weight's name."""
    module, side, kind = name.rsplit(".", 2)
    part = f"{side}.{kind}"
    if part not in ("lora_A.weight", "lora_B.weight"):
        raise ValueError(f"{name}: is not the name of a LoRA's weight")
    return module, part


def _place(key: str, format: LoraFormat) -> tuple[str, str] | None:
    """(module by diffusers' name, part) of a key in a file; None if a Wan 2.2 LoRA has no such."""
    ending = next((e for e in _PART if key.endswith("." + e)), None)
    if ending is None or not key.startswith(_PREFIX[format]):
        return None
    if format == "diffusers" and ending not in ("lora_A.weight", "lora_B.weight"):
        return None
    module = key.removeprefix(_PREFIX[format]).removesuffix("." + ending)
    try:
        ours = to_diffusers(module) if format == "comfyui" else module
        to_official(ours)
    except (KeyError, ValueError):  # ValueError: a block's number with nothing behind it
        return None
    return ours, _PART[ending]


def _fault(parts: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the tensors of one module, in words; None if nothing is."""
    if missing := [f"lora_{side}" for side in ("A", "B") if side not in parts]:
        return f"lacks {' and '.join(missing)}"
    a, b = parts["A"], parts["B"]
    if not (a.is_floating_point() and b.is_floating_point()):
        return f"holds {a.dtype} and {b.dtype}, which are not weights"
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        return f"has lora_A {list(a.shape)} and lora_B {list(b.shape)}, not [r, in] and [out, r]"
    if "alpha" in parts and parts["alpha"].numel() != 1:
        return f"has an alpha of shape {list(parts['alpha'].shape)}, not one number"
    return None


def _adapter_metadata(peft_config: Mapping[str, Any], rank: int, alpha: float) -> str:
    """PEFT's settings as diffusers' ``save_lora_weights`` packs them into the header."""
    settings = {name: peft_config[name] for name in _PEFT_SETTINGS if name in peft_config}
    settings |= {"r": rank, "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha}
    return json.dumps(
        {f"{_PREFIX['diffusers']}{name}": value for name, value in settings.items()},
        indent=2,
        sort_keys=True,
        default=sorted,  # PEFT holds names of modules in a set
    )


def _header_alphas(
    path: Path, metadata: Mapping[str, str], ranks: Mapping[str, int]
) -> dict[str, float]:
    """Alpha by module, from the settings in a diffusers header; without them, the rank."""
    text = metadata.get(LORA_ADAPTER_METADATA_KEY)
    if text is None:
        return {module: float(rank) for module, rank in ranks.items()}
    prefix = _PREFIX["diffusers"]
    try:
        settings = {name.removeprefix(prefix): value for name, value in json.loads(text).items()}
        pattern = dict(settings.get("alpha_pattern") or {})
        alphas = {
            module: float(
                pattern.get(get_pattern_key(list(pattern), module), settings["lora_alpha"])
            )
            for module in ranks
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: {LORA_ADAPTER_METADATA_KEY} in its header is damaged ({error!r})"
        ) from error
    if settings.get("use_rslora"):  # counts alpha/sqrt(rank) times
        return {module: alpha * sqrt(ranks[module]) for module, alpha in alphas.items()}
    return alphas


def _model_spec(
    name: str, date: datetime, title: str | None, resolution: tuple[int, int] | None
) -> dict[str, str]:
    """ModelSpec 1.0.0's fields (github.com/Stability-AI/ModelSpec); `_write` adds the hash."""
    resource = files("onewan") / "resources" / "sd_model_spec" / f"{name}.json"
    spec: dict[str, str] = json.loads(resource.read_text(encoding="utf-8"))
    spec["modelspec.date"] = date.isoformat(timespec="seconds")
    if title is not None:
        spec["modelspec.title"] = title
    if resolution is not None:
        spec["modelspec.resolution"] = f"{resolution[0]}x{resolution[1]}"
    return spec


def _stored(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of `weight` as the file holds it: of its own storage, which safetensors insists on."""
    stored = weight.detach().to("cpu", dtype, copy=True).contiguous()
    if not torch.isfinite(stored).all() and torch.isfinite(weight).all():
        largest = weight.abs().max().item()
        raise CheckpointError(
            f"{name}: holds {largest:.3g}, too large for {dtype}; set output.dtype to bfloat16"
        )
    return stored


# ----------------------------------------------------------------------------------------- the file


def _write(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], destination: Path) -> None:
    """Write a safetensors file, all or nothing, with the hash of its tensors in the header."""
    try:
        with replacing(destination) as path:
            save_file(dict(tensors), path, {"format": "pt", **metadata, _HASH: _HASH_PLACEHOLDER})
            sealed = {"format": "pt", **metadata, _HASH: _seal(path)}
            sync(path)
            if wrong := _differences(path, tensors, sealed):
                raise CheckpointError(
                    f"{destination}: reads back different from what was written "
                    f"({', '.join(wrong[:3])}); the disk or its driver is at fault, use another one"
                )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{destination}: can't be written ({error}); check the folder and the free space"
        ) from error


def _seal(path: Path) -> str:
    """Put the sha256 of all tensor bytes into the header of `path`, and return it.

    ModelSpec wants ``0x`` and the hash of everything behind the header, which only the written file
    shows: the order of tensors is the library's. The library also shuffles the metadata; here it is
    sorted, so that equal weights and facts make equal files.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        sha = hashlib.sha256()
        while chunk := file.read(1 << 20):
            sha.update(chunk)
        digest = "0x" + sha.hexdigest()
        header["__metadata__"] = dict(sorted({**header["__metadata__"], _HASH: digest}.items()))
        # As long as before: the placeholder has the length of a hash.
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        file.seek(8)
        file.write(text)
    return digest


def _differences(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> list[str]:
    """In what `path` differs from exactly `tensors`, to the bit, and `metadata`."""
    found, header = _read(path)
    wrong = sorted(found.keys() ^ tensors.keys())
    wrong += [name for name in tensors if name in found and not _same(found[name], tensors[name])]
    return wrong if header == metadata else [*wrong, "the header"]


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, NaN included."""
    same_kind = a.dtype == b.dtype and a.shape == b.shape
    return same_kind and torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the header's metadata of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file; check the path") from None
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path}: is not a whole safetensors file ({reason}); copy or download it again"
        ) from error
