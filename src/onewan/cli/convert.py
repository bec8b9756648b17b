"""The commands `onewan convert` and `onewan merge`, imported only when one of them runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast, get_args

import torch

from onewan.checkpoint.atomic_write import ProgressCallback, check_destination
from onewan.checkpoint.convert import WriteResult, convert_model
from onewan.checkpoint.layouts import ModelFormat
from onewan.checkpoint.merge import base_weights, merge
from onewan.checkpoint.model_files import holds_adapter
from onewan.checkpoint.saver import convert_adapter
from onewan.cli.progress import Progress
from onewan.dtypes import torch_dtype
from onewan.errors import CheckpointError
from onewan.formats.lora import LoraFormat
from onewan.variants import ExpertName

_MODELS: tuple[ModelFormat, ...] = get_args(ModelFormat)
_ADAPTERS: tuple[LoraFormat, ...] = get_args(LoraFormat)


def convert(
    source: Path,
    destination: Path,
    to: str,
    *,
    dtype: str | None,
    force: bool,
    base: Path | None,
    expert: ExpertName | None,
) -> int:
    kept = None if dtype is None else torch_dtype(dtype)
    if holds_adapter(source):
        return _convert_adapter(
            source, destination, to, dtype=kept, force=force, base=base, expert=expert
        )
    if to not in _MODELS:
        raise CheckpointError(
            f"{source}: holds the weights of a model, but --to {to} is for LoRAs; for models use "
            f"--to {', '.join(_MODELS)}"
        )
    for option, value in (("--base", base), ("--expert", expert)):
        if value is not None:
            raise CheckpointError(f"{option}: is for LoRAs, and {source} holds a model; leave it")
    form = cast(ModelFormat, to)
    return _run_with_progress(
        lambda report: convert_model(
            source, destination, form, dtype=kept, force=force, report=report
        )
    )


def merge_loras(
    base: Path,
    loras: Sequence[tuple[Path, float]],
    destination: Path,
    *,
    dtype: str | None,
    force: bool,
    check_file_names: bool,
) -> int:
    kept = None if dtype is None else torch_dtype(dtype)
    return _run_with_progress(
        lambda report: merge(
            base,
            loras,
            destination,
            dtype=kept,
            force=force,
            check_file_names=check_file_names,
            report=report,
        )
    )


def _convert_adapter(
    source: Path,
    destination: Path,
    to: str,
    *,
    dtype: torch.dtype | None,
    force: bool,
    base: Path | None,
    expert: ExpertName | None,
) -> int:
    if to not in _ADAPTERS:
        raise CheckpointError(
            f"{source}: holds a LoRA, and --to {to} is for models; for LoRAs there is "
            f"--to {', '.join(_ADAPTERS)}"
        )
    if destination.suffix != ".safetensors":
        raise CheckpointError(
            f"{destination}: a file .safetensors will be written; give a name that ends so"
        )
    check_destination(destination, [source], folder=False, force=force)
    weights = None if base is None else base_weights(base, source, expert)
    notices = convert_adapter(
        source, destination, cast(LoraFormat, to), dtype=dtype, base=weights, expert=expert
    )
    _print(WriteResult(files=(destination,), notices=tuple(notices)))
    return 0


def _run_with_progress(run: Callable[[ProgressCallback], WriteResult]) -> int:
    """Run with a bar, and say what was written."""
    with Progress() as progress:
        written = run(progress.advance_bytes)
    _print(written)
    return 0


def _print(written: WriteResult) -> None:
    for notice in written.notices:
        print(f"note: {notice}")
    for file in written.files:
        print(f"{file}: {file.stat().st_size / 1e6:,.1f} MB")
