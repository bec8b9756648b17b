"""Laying the add-on into a OneTrainer checkout, and taking it out again.

Files only: none of the checkout's own is changed, so `git pull` goes on working, and what was laid
in is known by a manifest with the digest of each file. The manifest is written before the first
file and once more after the last, so that an installation that was cut off can be finished or taken
out.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path, PurePosixPath
from typing import Any

from onewan.errors import OnewanError
from onewan.files import replacing
from onewan.onetrainer.contract import Checked, check

MANIFEST = "onewan-addon.json"
"""Name of the manifest, in the checkout's root."""


class InstallError(OnewanError):
    """The add-on can't be laid into this folder, or taken out of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What is in a checkout of the add-on."""

    installed: bool
    complete: bool = False
    version: str | None = None
    changed: tuple[str, ...] = ()
    """Files that are not as they were laid in."""
    missing: tuple[str, ...] = ()
    current: bool = False
    """Whether the files are those of this version of onewan."""
    checked: Checked | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was done."""

    written: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    """Files that were changed by someone else and left alone."""


@dataclass(slots=True)
class _Manifest:
    version: str
    complete: bool
    files: dict[str, str]
    """sha256 by path, with forward slashes."""
    folders: list[str] = field(default_factory=list)
    """Those that the installation made."""


def overlay() -> dict[str, bytes]:
    """The files of the add-on, by their paths in a checkout, with forward slashes."""
    with as_file(files("onewan.onetrainer").joinpath("overlay")) as folder:
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts
        }


def install(root: Path, *, force: bool = False, laid: Mapping[str, bytes] | None = None) -> Outcome:
    """Lay the add-on into the checkout `root`; again, or over another version, it is brought up to
    date.

    InstallError, before anything is written, for a checkout that lacks something, and for files in
    the way; with `force` files that were laid in and changed since are laid in anew.
    """
    root = _checkout(root)
    if problems := check(root).problems:
        raise InstallError(
            "\n".join([f"{root}: this OneTrainer is not supported:", *(f"  {p}" for p in problems)])
        )
    wanted = dict(overlay() if laid is None else laid)
    before = _read(root)
    known = {} if before is None else before.files
    in_the_way = [
        name
        for name in wanted
        if (root / name).exists()
        and name not in known
        and _digest(root / name) != _sha(wanted[name])
    ]
    if in_the_way:
        raise InstallError(
            f"{root}: has files of other origin where the add-on's would lie: "
            f"{', '.join(in_the_way)}; move them away"
        )
    kept = [
        name
        for name in wanted
        if (root / name).exists()
        and name in known
        and _digest(root / name) not in (known[name], _sha(wanted[name]))
        and not force
    ]
    folders = [] if before is None else before.folders
    manifest = _Manifest(
        version=version("onewan"),
        complete=False,
        files={**known, **{name: _sha(data) for name, data in wanted.items()}},
        folders=sorted({*folders, *_new_folders(root, wanted)}),
    )
    written = [n for n in wanted if n not in kept and _digest(root / n) != _sha(wanted[n])]
    stale = [n for n in known if n not in wanted]
    if (
        not (written or stale)
        and before is not None
        and before.complete
        and before.version == manifest.version
    ):
        return Outcome(kept=tuple(kept))
    try:
        _write(root, manifest)
        for name in written:
            with replacing(root / name) as path:
                path.write_bytes(wanted[name])
        removed = [name for name in stale if _remove(root, name, known[name])]
        manifest.files = {name: manifest.files[name] for name in wanted}
        manifest.complete = True
        _write(root, manifest)
    except OSError as error:
        raise InstallError(_unwritable(root, error)) from error
    return Outcome(tuple(written), tuple(removed), tuple(kept))


def uninstall(root: Path, *, force: bool = False) -> Outcome:
    """Take out what was laid in: files that are as they were (with `force` all), folders that were
    made for them, and what Python compiled of them."""
    root = _checkout(root)
    manifest = _read(root)
    if manifest is None:
        raise InstallError(f"{root}: the add-on is not installed there ({MANIFEST} is missing)")
    kept: list[str] = []
    removed: list[str] = []
    try:
        for name, digest in manifest.files.items():
            if not (root / name).exists():
                continue
            if _remove(root, name, None if force else digest):
                removed.append(name)
            else:
                kept.append(name)
        for folder in sorted(manifest.folders, reverse=True):
            _remove_folder(root / folder)
        (root / MANIFEST).unlink()
    except OSError as error:
        raise InstallError(_unwritable(root, error)) from error
    return Outcome(removed=tuple(removed), kept=tuple(kept))


def status(root: Path) -> Status:
    """What is there, and whether it still fits the checkout, as after a `git pull`."""
    root = _checkout(root)
    checked = check(root)
    manifest = _read(root)
    if manifest is None:
        return Status(installed=False, checked=checked)
    present = {n: _digest(root / n) for n in manifest.files}
    wanted = {name: _sha(data) for name, data in overlay().items()}
    return Status(
        installed=True,
        complete=manifest.complete,
        version=manifest.version,
        changed=tuple(n for n, d in present.items() if d is not None and d != manifest.files[n]),
        missing=tuple(n for n, d in present.items() if d is None),
        current=manifest.files == wanted,
        checked=checked,
    )


def python_in(root: Path) -> Path | None:
    """The interpreter of the environment in a checkout, if it has one."""
    for name in ("venv", ".venv"):
        for inside in ("bin/python", "Scripts/python.exe"):
            if (root / name / inside).exists():
                return root / name / inside
    return None


def has_onewan(root: Path) -> bool | None:
    """Whether the checkout's own environment has onewan; None if there is no environment."""
    python = python_in(root)
    if python is None:
        return None
    packages = [
        *python.parents[1].glob("lib*/python*/site-packages"),
        python.parents[1] / "Lib" / "site-packages",
    ]
    return any(next(iter(p.glob("onewan-*")), None) or (p / "onewan").is_dir() for p in packages)


# -------------------------------------------------------------------------------------------- parts


def _checkout(root: Path) -> Path:
    root = Path(root)
    if not (root / "modules" / "util" / "enum" / "ModelType.py").is_file():
        raise InstallError(
            f"{root}: is no OneTrainer checkout (there is no modules/util/enum/ModelType.py); give "
            "the folder that holds its scripts/ and modules/"
        )
    return root.resolve()


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest(path: Path) -> str | None:
    try:
        return _sha(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InstallError(f"{path}: can't be read ({error.strerror})") from error


def _new_folders(root: Path, wanted: Mapping[str, bytes]) -> Iterator[str]:
    for name in wanted:
        for parent in PurePosixPath(name).parents:
            if str(parent) != "." and not (root / parent).exists():
                yield str(parent)


def _read(root: Path) -> _Manifest | None:
    """The manifest; InstallError for one that names anything outside of the checkout."""
    path = root / MANIFEST
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        manifest = _Manifest(
            version=str(data["version"]),
            complete=bool(data["complete"]),
            files={str(k): str(v) for k, v in data["files"].items()},
            folders=[str(f) for f in data["folders"]],
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InstallError(
            f"{path}: is damaged ({type(error).__name__}: {error}); delete it, and install again"
        ) from error
    for name in (*manifest.files, *manifest.folders):
        pure = PurePosixPath(name)
        inside = (root / name).parent.resolve()
        if (
            pure.is_absolute()
            or ".." in pure.parts
            or "\\" in name
            or ":" in name
            or not inside.is_relative_to(root)
        ):
            raise InstallError(
                f"{path}: names {name!r}, which is not in the checkout; it was tampered with"
            )
    return manifest


def _write(root: Path, manifest: _Manifest) -> None:
    content = {
        "about": "The onewan add-on for Wan 2.2; `onewan onetrainer uninstall` takes it out.",
        "version": manifest.version,
        "complete": manifest.complete,
        "files": dict(sorted(manifest.files.items())),
        "folders": manifest.folders,
    }
    with replacing(root / MANIFEST) as path:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _remove(root: Path, name: str, digest: str | None) -> bool:
    """Delete a file, and what Python compiled of it; not if it has another `digest`."""
    path = root / name
    if digest is not None and _digest(path) not in (None, digest):
        return False
    path.unlink(missing_ok=True)
    if path.suffix == ".py":
        cache = path.parent / "__pycache__"
        for compiled in cache.glob(f"{path.stem}.*.pyc"):
            compiled.unlink()
        _remove_folder(cache)
    return True


def _remove_folder(folder: Path) -> None:
    """Delete a folder that is empty; others are left."""
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        os.rmdir(folder)


def _unwritable(root: Path, error: OSError) -> str:
    return f"{error.filename or root}: {error.strerror}; mend that, and run the same command again"
