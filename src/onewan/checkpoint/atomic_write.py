"""Atomic publication of output files: all of them or none, by one process at a time; refuses to
overwrite without force."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from onewan.checkpoint.layouts import OutputFile
from onewan.errors import CheckpointError
from onewan.files import remove_abandoned, replace, sync, temporary_beside
from onewan.formats.untrusted import first_line
from onewan.locks import locked

ProgressCallback = Callable[[int, int], None]
"""Called with (bytes written, total bytes)."""

# Names in a model's folder, of any layout. --force deletes a folder only if it holds nothing else.
_MODEL_ENTRIES = (
    *("transformer", "transformer_2", "vae", "text_encoder", "tokenizer", "scheduler"),
    *("google", "high_noise_model", "low_noise_model", "assets", "examples", ".cache"),
    *("config.json", "model_index.json", "configuration.json", "README.md", ".gitattributes"),
    *("LICENSE", "LICENSE.txt"),
)
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".pth", ".gguf")


@contextmanager
def writing_to(
    destination: Path, sources: Sequence[Path], *, folder: bool, force: bool
) -> Iterator[list[str]]:
    """Keeps other processes from writing to `destination`, a folder (`folder`) or a file, while the
    block writes it; yields notices about what interrupted processes left there.

    CheckpointError if it must not be written: it is or contains a source, or exists without
    `force`, or is not of the right type, or has files that no model has. OnewanError if another
    process is writing to it.
    """
    if destination.name in ("", ".."):
        raise CheckpointError(f"{destination}: has no name of its own; give the path of a new one")
    lock = destination.with_name(f".lock-{destination.name}")
    with ExitStack() as session:
        try:
            session.enter_context(
                locked(lock, destination, "wait until it ends, or give another destination")
            )
            # Before the free space is checked: what an interrupted conversion left can be 57 GB.
            notices = remove_abandoned(destination.parent, destination.name)
        except OSError as error:
            raise _not_writable(destination, error) from error
        _check_destination(destination, sources, folder, force)
        yield notices


def _not_writable(destination: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{destination}: can't be written ({first_line(error)}); check the folder and the free "
        "space"
    )


def _check_destination(
    destination: Path, sources: Sequence[Path], folder: bool, force: bool
) -> None:
    for source in sources:
        target, origin = destination.resolve(), source.resolve()
        # A parent of the source counts too, since it would be replaced as a whole.
        if target == origin or target in origin.parents:
            raise CheckpointError(
                f"{destination}: {'is' if target == origin else 'contains'} the source itself; "
                "give another destination"
            )
    if not os.path.lexists(destination):
        return
    if destination.is_dir() != folder:
        found, needed = ("file", "folder") if folder else ("folder", "file")
        raise CheckpointError(
            f"{destination}: is a {found}, but the output is a {needed}; give another destination"
        )
    entries = sorted(p.name for p in destination.iterdir()) if folder else []
    if folder and not entries:
        return
    if not force:
        state = f"contains {_first_names(entries)}" if folder else "exists already"
        raise CheckpointError(
            f"{destination}: {state}; add --force to replace it, or give another destination"
        )
    # --force deletes the whole folder, which could be a home directory given by mistake.
    if foreign := [
        n for n in entries if n not in _MODEL_ENTRIES and not n.endswith(_WEIGHT_SUFFIXES)
    ]:
        raise CheckpointError(
            f"{destination}: contains {_first_names(foreign)}, which is not part of a model and "
            "would be deleted by --force; give another destination"
        )


def _first_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def publish(
    destination: Path,
    outputs: Sequence[OutputFile],
    verify: Callable[[Path], None],
    on_progress: ProgressCallback,
) -> list[Path]:
    """Write `outputs` under a temporary name beside `destination`, then rename; returns the paths.
    Called within `writing_to`.

    `verify` is called with the complete temporary file or folder before it is renamed. If anything
    fails or is interrupted, `destination` stays as it was and the temporary files are deleted.
    CheckpointError if the disk is full or can't be written.
    """
    total = sum(output.bytes for output in outputs)
    _check_space(destination, total)
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if count:
            on_progress(done, total)

    try:
        with temporary_beside(destination) as staging:
            if any(output.path for output in outputs):
                staging.mkdir()
            for output in outputs:
                path = staging / output.path if output.path else staging
                path.parent.mkdir(parents=True, exist_ok=True)
                output.write(path, on_bytes)
            verify(staging)
            # The writers sync their files. The entries in the folders must be on the disk too
            # before the rename, else a power cut can leave a renamed folder without its files.
            for folder in [staging, *staging.rglob("*")] if staging.is_dir() else []:
                sync(folder)
            replace(staging, destination)
    except OSError as error:
        raise _not_writable(destination, error) from error
    return [destination / o.path if o.path else destination for o in outputs]


def _check_space(destination: Path, needed: int) -> None:
    existing = next(p for p in destination.absolute().parents if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(
            f"{destination}: needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on that "
            "disk; make room or give a destination on another one"
        )
