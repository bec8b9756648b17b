"""Atomic publication of output files: all of them or none; refuses to overwrite without force."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from onewan.checkpoint.layouts import OutputFile
from onewan.errors import CheckpointError
from onewan.files import remove_abandoned, sync, temporary_beside
from onewan.formats.backends import first_line

ProgressCallback = Callable[[int, int], None]
"""Called with (bytes written, total bytes)."""

_OF_MODELS = (
    *("transformer", "transformer_2", "vae", "text_encoder", "tokenizer", "scheduler"),
    *("google", "high_noise_model", "low_noise_model", "assets", "examples", ".cache"),
    *("config.json", "model_index.json", "configuration.json", "README.md", ".gitattributes"),
    *("LICENSE", "LICENSE.txt"),
)
_OF_WEIGHTS = (".safetensors", ".safetensors.index.json", ".pth", ".gguf")


def check_destination(
    destination: Path, sources: Sequence[Path], folder: bool, force: bool
) -> None:
    """CheckpointError if `destination`, a `folder` or a file, may not be written."""
    for source in sources:
        here, there = destination.resolve(), source.resolve()
        if here == there or here in there.parents:
            raise CheckpointError(
                f"{destination}: {'is' if here == there else 'holds'} the source itself; "
                "give another destination"
            )
    if not os.path.lexists(destination):
        return
    if destination.is_dir() != folder:
        is_a, wanted = ("file", "folder") if folder else ("folder", "file")
        raise CheckpointError(
            f"{destination}: is a {is_a}, and a {wanted} will be written; give another destination"
        )
    there = sorted(p.name for p in destination.iterdir()) if folder else []
    if folder and not there:
        return
    if not force:
        holds = f"holds {_some(there)}" if folder else "is there already"
        raise CheckpointError(
            f"{destination}: {holds}; add --force to replace it, or give another destination"
        )
    # --force takes the whole folder away, and that must not be somebody's home.
    if strange := [n for n in there if n not in _OF_MODELS and not n.endswith(_OF_WEIGHTS)]:
        raise CheckpointError(
            f"{destination}: holds {_some(strange)}, which is not part of a model and would be "
            "deleted by --force; give another destination"
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def publish(
    destination: Path,
    outputs: Sequence[OutputFile],
    verify: Callable[[Path], None],
    report: ProgressCallback,
) -> list[Path]:
    """Write `outputs` to `destination` by way of a temporary neighbour; returns the files' paths.

    `verify` looks at what was written, complete, before it gets its name. If anything fails, or the
    user stops it, what was there before stays and nothing else does.
    """
    total = sum(output.bytes for output in outputs)
    remove_abandoned(destination.parent, destination.name)  # an interrupted try can be 57 GB
    _check_space(destination, total)
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if count:
            report(done, total)

    try:
        with temporary_beside(destination) as staging:
            for output in outputs:
                place = staging / output.path if output.path else staging
                place.parent.mkdir(parents=True, exist_ok=True)
                output.write(place, on_bytes)
            verify(staging)
            for folder in [staging, *staging.rglob("*")] if staging.is_dir() else []:
                sync(folder)
            _replace(staging, destination)
    except OSError as error:
        raise CheckpointError(
            f"{destination}: can't be written ({first_line(error)}); "
            "check the folder and the free space"
        ) from error
    return [destination / o.path if o.path else destination for o in outputs]


def _check_space(destination: Path, needed: int) -> None:
    there = next(p for p in destination.absolute().parents if p.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise CheckpointError(
            f"{destination}: needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on that "
            "disk; make room or give a destination on another one"
        )


def _replace(staging: Path, destination: Path) -> None:
    """Give `staging` its final name. A folder that has it now is moved aside first (no system
    replaces a folder that is not empty), and back if the renaming fails."""
    if not destination.is_dir():
        os.replace(staging, destination)
        sync(destination.parent)
        return
    with temporary_beside(destination) as old:
        os.rename(destination, old)
        try:
            os.replace(staging, destination)
        except BaseException:
            os.rename(old, destination)
            raise
        sync(destination.parent)
