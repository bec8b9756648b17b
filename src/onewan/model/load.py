"""`WanModelLoader`: a diffusers layout (folder or hub repository) -> `WanModel`.

What it takes care of, since each went wrong somewhere else: safetensors only; the float32 islands
stay float32 (``.to(bfloat16)`` would destroy them, the rope tables included); a missing or surplus
weight is an error and not a random initialisation; the parts must belong to one another and to the
variant that was asked for. It never runs code from a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, UMT5EncoderModel

from onewan.errors import CheckpointError
from onewan.model.precision import keep_float32_islands
from onewan.model.wan import WanModel
from onewan.variants import NUM_TRAIN_TIMESTEPS, Variant, VariantName, variant_of

Component = Literal["transformer", "transformer_2", "vae", "text_encoder", "tokenizer", "scheduler"]

_LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError)
# What diffusers, transformers, tokenizers and safetensors raise for a file that is wrong.


class WanModelLoader:
    """Loads Wan 2.2 models; holds no state."""

    def load(
        self,
        source: str | Path,
        variant: VariantName | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        components: Collection[Component] | None = None,
    ) -> WanModel:
        """The model at `source`, a folder or a hub repository in the diffusers layout.

        `variant` is checked against the weights if given. `components` limits what is loaded (None:
        everything there is). The transformers get `dtype` but for their float32 islands, the text
        encoder gets `dtype`, and the VAE is always float32, as in the official code. `device` is
        where they all go. CheckpointError names the file and what is wrong with it.
        """
        folder = local_folder(source, components)
        facts = self._identify(folder, variant)
        wanted = set(components if components is not None else _parts_of(facts))
        model = WanModel(variant=facts, source=str(source), dtype=dtype)
        if "tokenizer" in wanted:
            model.tokenizer = _tokenizer(folder / "tokenizer")
        if "text_encoder" in wanted:
            model.text_encoder = _weights(UMT5EncoderModel, folder / "text_encoder", dtype)
        if "vae" in wanted:
            model.vae = _weights(AutoencoderKLWan, folder / "vae", torch.float32)
        for name in ("transformer", "transformer_2"):
            if name in wanted:
                transformer = _weights(WanTransformer3DModel, folder / name, dtype)
                keep_float32_islands(transformer)
                setattr(model, name, transformer)
        if "scheduler" in wanted:
            model.noise_scheduler = official_scheduler(facts)
        for module in (model.text_encoder, model.vae, model.transformer, model.transformer_2):
            if module is not None:
                _settle(module, device)
        return model

    def _identify(self, folder: Path, asked: VariantName | None) -> Variant:
        """The variant of the model in `folder`, after checking that its parts fit together."""
        config_file = folder / "transformer" / "config.json"
        config = _read_json(config_file)
        variant = variant_of(config, str(config_file))
        if asked is not None and variant.name != asked:
            raise CheckpointError(
                f"{folder}: is {variant.name} (in_channels {config.get('in_channels')}), and the "
                f"run asks for {asked}; set model.variant to {variant.name} or give another model"
            )
        if len(variant.experts) == 2:
            self._check_second_expert(folder, variant)
        if (folder / "vae").is_dir():
            _check_vae(folder / "vae" / "config.json", variant)
        if (folder / "text_encoder").is_dir():
            width = _read_json(folder / "text_encoder" / "config.json").get("d_model")
            if width != config.get("text_dim"):
                raise CheckpointError(
                    f"{folder}: the text encoder's d_model is {width}, and the transformer's "
                    f"text_dim {config.get('text_dim')}; they do not belong together"
                )
        return variant

    @staticmethod
    def _check_second_expert(folder: Path, variant: Variant) -> None:
        second = folder / "transformer_2" / "config.json"
        if not second.is_file():
            raise CheckpointError(
                f"{folder}: has no transformer_2, the low-noise expert of {variant.name}; with one "
                "transformer of these channels it is a Wan 2.1 model, or the download is incomplete"
            )
        other = variant_of(_read_json(second), str(second))
        if other is not variant:
            raise CheckpointError(
                f"{folder}: transformer is {variant.name}, and transformer_2 is {other.name}"
            )
        index = folder / "model_index.json"
        ratio = _read_json(index).get("boundary_ratio") if index.is_file() else None
        if ratio is not None and ratio != variant.boundary:
            raise CheckpointError(
                f"{index}: boundary_ratio is {ratio}, and {variant.name} has {variant.boundary}"
            )


def official_scheduler(variant: Variant, shift: float | None = None) -> UniPCMultistepScheduler:
    """UniPC as the official code samples with, at the variant's official shift unless one is given.

    The scheduler files on the hub say shift 3.0 for A14B; the official code uses 12 and 5.
    """
    return UniPCMultistepScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=variant.flow_shift if shift is None else shift,
    )


def local_folder(source: str | Path, components: Collection[Component] | None = None) -> Path:
    """The folder of `source`, downloading what is needed of a hub repository first."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "transformer").is_dir():
            raise CheckpointError(
                f"{folder}: has no folder 'transformer', so it is not in the diffusers layout; "
                "give the folder that holds model_index.json"
            )
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder}: is a file; give a folder in the diffusers layout")
    # The configurations of all parts are small and needed to identify the model.
    patterns = ["*.json", *(f"{c}/*" for c in components or ()), *(["*"] if not components else ())]
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{source}: is neither a folder nor a repository that could be downloaded ({reason})"
        ) from error


def fingerprint(folder: Path) -> str:
    """A digest of the weights and configuration in `folder`, by which cached results are keyed.

    Files up to 64 MiB count whole. Of larger ones the size, the first MiB (safetensors header) and
    255 pieces of 64 KiB spread over the file count: another training of the same architecture
    differs in nearly every piece, and 11 GB need not be read for it.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= 64 << 20:
                digest.update(file.read())
                continue
            digest.update(file.read(1 << 20))
            for piece in range(1, 256):
                file.seek(size * piece // 256)
                digest.update(file.read(64 << 10))
    return digest.hexdigest()


def _parts_of(variant: Variant) -> set[Component]:
    """All that the variant consists of; a part that is not there fails where it is read."""
    parts: set[Component] = {"vae", "text_encoder", "tokenizer", "scheduler"}
    parts.update(e.component for e in variant.experts)
    return parts


def _settle(module: nn.Module, device: torch.device | str) -> None:
    """Frozen, in evaluation mode, on `device`."""
    module.to(device)  # the device alone: a dtype here would destroy the float32 islands
    module.requires_grad_(False)
    module.eval()


def _tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except _LOAD_ERRORS as error:
        raise CheckpointError(f"{folder}: no usable tokenizer ({_first_line(error)})") from error


def _weights(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The module of class `kind` in `folder`. Missing, surplus and misshapen weights are errors."""
    _read_json(folder / "config.json")
    # The same option, named differently in transformers and diffusers.
    option = "torch_dtype" if kind.__module__.startswith("diffusers.") else "dtype"
    try:
        module, info = kind.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **{option: dtype},
        )
    except _LOAD_ERRORS as error:
        raise CheckpointError(f"{folder}: can't be loaded ({_first_line(error)})") from error
    problems = [
        f"{len(found)} {what}: {', '.join(sorted(map(str, found))[:3])}"
        for key, what in (
            ("missing_keys", "missing weights"),
            ("unexpected_keys", "unknown weights"),
            ("mismatched_keys", "weights of the wrong shape"),
        )
        if (found := info.get(key))
    ]
    if problems:
        raise CheckpointError(f"{folder}: does not match its config.json; {'; '.join(problems)}")
    return module


def _check_vae(config_file: Path, variant: Variant) -> None:
    config = _read_json(config_file)
    channels = config.get("z_dim", 16)
    if channels != variant.latent_channels:
        raise CheckpointError(
            f"{config_file}: z_dim is {channels}, and {variant.name} needs "
            f"{variant.latent_channels}; "
            "the A14B models use the Wan 2.1 VAE (16), TI2V-5B the Wan 2.2 VAE (48)"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; the model's folder is incomplete") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is not readable JSON ({_first_line(error)})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a {type(data).__name__}, not a JSON object")
    return data


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
