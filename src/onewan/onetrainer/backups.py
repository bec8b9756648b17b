"""Weights out of OneTrainer's backups of Wan 2.2 runs, without OneTrainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

from onewan.checkpoint.convert import convert_model
from onewan.checkpoint.saver import WanModelSaver
from onewan.errors import CheckpointError
from onewan.model.embedding import WanModelEmbedding
from onewan.onetrainer import weight_files
from onewan.onetrainer.model_loading import META_FILE

_ADAPTERS = {"comfyui": "COMFY_LORA", "diffusers": "DIFFUSERS_LORA", "kohya": "KOHYA_LORA"}


def export_backup(
    backup: Path,
    destination: Path,
    to: str | None = None,
    *,
    force: bool = False,
    report: Callable[[str], None],
) -> list[Path]:
    """Write the trained weights to files named after `destination` (.safetensors); returns them.

    Adapters are written in the format `to` (comfyui unless given), fine-tuned experts each to a
    file of its own, and embeddings with onewan's keys. `report` gets a line for what the user
    should know of a file. CheckpointError if the folder is not a backup of a Wan 2.2 run, if a file
    exists (without `force`), and if `to` is not a format for the backup's weights.
    """
    if not (backup / META_FILE).is_file():
        raise CheckpointError(
            f"{backup}: is not a backup (it has no {META_FILE}); give a folder in "
            "workspace/.../backup"
        )
    adapter = backup / "lora" / "lora.safetensors"
    experts = [part for part in weight_files.EXPERTS if (backup / part).is_dir()]
    embeddings = sorted((backup / "embeddings").glob("*.safetensors"))
    if not (adapter.is_file() or experts or embeddings):
        raise CheckpointError(
            f"{backup}: holds no adapter, expert or embedding of Wan 2.2; give another run's backup"
        )
    written: list[Path] = []
    if adapter.is_file():
        written += _adapters(adapter, destination, to, force, report)
    elif experts:
        written += _experts(backup, experts, destination, to, force)
    for number, file in enumerate(embeddings):
        path = destination
        if written or len(embeddings) > 1:
            path = path.with_name(f"{destination.stem}_{number}.safetensors")
        _require_free(path, force)
        embedding = WanModelEmbedding.from_file(file)
        written.append(WanModelSaver().save_embedding(embedding, path))
    return written


def _adapters(
    adapter: Path, destination: Path, to: str | None, force: bool, report: Callable[[str], None]
) -> list[Path]:
    if (format := _ADAPTERS.get(to or "comfyui")) is None:
        raise CheckpointError(
            f"--to {to}: is a format for experts, and the backup holds a LoRA; choose "
            f"{', '.join(_ADAPTERS)}"
        )
    weights = load_file(adapter)
    for path in weight_files.adapter_paths(weights, destination):
        _require_free(path, force)
    return weight_files.save_adapters(
        weights, destination, format, variant=None, metadata={}, dtype=None, report=report
    )


def _experts(
    backup: Path, parts: list[str], destination: Path, to: str | None, force: bool
) -> list[Path]:
    if to not in (None, "single"):
        raise CheckpointError(
            f"--to {to}: is a format for LoRAs, and the backup holds experts; omit --to, which "
            "writes single files that `onewan convert` turns into others"
        )
    written: list[Path] = []
    for part in parts:
        expert = weight_files.EXPERTS[part] if len(parts) > 1 else None
        path = weight_files.expert_path(destination, expert)
        convert_model(backup / part, path, "single", force=force)
        written.append(path)
    return written


def _require_free(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise CheckpointError(f"{path}: exists; give another name, or --force")
