"""The commands `onewan convert` and `onewan merge`, imported only when one of them runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import torch

from onewan.checkpoint.atomic_write import ProgressCallback, writing_to
from onewan.checkpoint.convert import WriteResult, convert_model
from onewan.checkpoint.merge import base_weights, merge
from onewan.checkpoint.model_files import holds_adapter
from onewan.checkpoint.saver import convert_adapter
from onewan.checkpoint.target_formats import LORA_FORMATS, MODEL_FORMATS, ModelFormat
from onewan.cli.output import say
from onewan.cli.progress import Progress
from onewan.dtypes import torch_dtype
from onewan.errors import CheckpointError
from onewan.formats.lora import LoraFormat
from onewan.formats.lora_files import experts_in
from onewan.variants import ExpertName


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
    """``onewan convert``; returns the exit status. Whether SRC is a model or an adapter is detected
    from its content."""
    weight_dtype = None if dtype is None else torch_dtype(dtype)
    if holds_adapter(source):
        return _convert_adapter(
            source, destination, to, dtype=weight_dtype, force=force, base=base, expert=expert
        )
    if to not in MODEL_FORMATS:
        raise CheckpointError(
            f"{source}: holds the weights of a model, but --to {to} is for LoRAs; for models use "
            f"--to {', '.join(MODEL_FORMATS)}"
        )
    for option, value in (("--base", base), ("--expert", expert)):
        if value is not None:
            raise CheckpointError(
                f"{option}: is for LoRAs, but {source} holds the weights of a model; remove it"
            )
    format = cast(ModelFormat, to)
    return _run_with_progress(
        lambda on_progress: convert_model(
            source, destination, format, dtype=weight_dtype, force=force, on_progress=on_progress
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
    """``onewan merge``; returns the exit status."""
    weight_dtype = None if dtype is None else torch_dtype(dtype)
    return _run_with_progress(
        lambda on_progress: merge(
            base,
            loras,
            destination,
            dtype=weight_dtype,
            force=force,
            check_file_names=check_file_names,
            on_progress=on_progress,
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
    if to not in LORA_FORMATS:
        raise CheckpointError(
            f"{source}: holds a LoRA, but --to {to} is for models; for LoRAs use "
            f"--to {', '.join(LORA_FORMATS)}"
        )
    if destination.suffix != ".safetensors":
        raise CheckpointError(
            f"{destination}: the output is a .safetensors file; give a name that ends in "
            ".safetensors"
        )
    targets: dict[ExpertName | None, Path] = {expert: destination}
    if expert is None and len(experts := experts_in(source)) > 1:
        # A file for other programs is that of one expert, and its name says which.
        stem = destination.stem
        targets = {e: destination.with_name(f"{stem}_{e}_noise.safetensors") for e in experts}
    notices: list[str] = []
    with ExitStack() as stack:
        for target in targets.values():
            writing = writing_to(target, [source], folder=False, force=force)
            notices += stack.enter_context(writing)
        for each, target in targets.items():
            weights = None if base is None else base_weights(base, source, each)
            notices += convert_adapter(
                source, target, cast(LoraFormat, to), dtype=dtype, base=weights, expert=each
            )
    _print_result(WriteResult(files=tuple(targets.values()), notices=tuple(dict.fromkeys(notices))))
    return 0


def _run_with_progress(run: Callable[[ProgressCallback], WriteResult]) -> int:
    """Run with a progress bar, then print the notices and the files that were written."""
    with Progress() as progress:
        written = run(progress.advance_bytes)
    _print_result(written)
    return 0


def _print_result(written: WriteResult) -> None:
    for notice in written.notices:
        say(f"note: {notice}")
    for file in written.files:
        say(f"{file}: {file.stat().st_size / 1e6:,.1f} MB")
