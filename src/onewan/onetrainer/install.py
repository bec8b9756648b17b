"""Installing the add-on in a OneTrainer checkout, and uninstalling it.

Files are only added: none of the checkout's own is changed, so `git pull` still works. A manifest
has the digest of each installed file. It is written before the first file and again after the last,
so that an interrupted installation can be completed or removed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import subprocess
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path, PurePosixPath
from typing import Any

from onewan.errors import OnewanError
from onewan.files import remove_abandoned, replacing
from onewan.onetrainer.contract import CheckResult, check

MANIFEST = "onewan-addon.json"
"""Name of the manifest, in the checkout's root."""


class InstallError(OnewanError):
    """The add-on can't be installed in this folder, or removed from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The state of the add-on in a checkout."""

    installed: bool
    complete: bool = False
    version: str | None = None
    changed: tuple[str, ...] = ()
    """Files that differ from the installed ones."""
    missing: tuple[str, ...] = ()
    current: bool = False
    """Whether the files are those of this version of onewan."""
    taken: tuple[str, ...] = ()
    """The add-on's paths at which OneTrainer, or someone else, has other files."""
    checked: CheckResult | None = None


@dataclass(frozen=True, slots=True)
class InstallOutcome:
    """What an installation or its removal did."""

    written: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    """Files that were changed by someone else, and therefore kept."""
    taken: tuple[str, ...] = ()
    """Files that are OneTrainer's own by now, and therefore kept, with `force` too."""


@dataclass(slots=True)
class _Manifest:
    version: str
    complete: bool
    files: dict[str, str]
    """sha256 by path, with forward slashes."""
    folders: list[str] = field(default_factory=list)
    """Folders that the installation created."""
    replaced: dict[str, list[str]] = field(default_factory=dict)
    """While not complete: digests of earlier versions of the files, which may still be there."""

    def changed(self, present: Mapping[str, str | None]) -> tuple[str, ...]:
        """Those files of `present`, digests by name, that are not as onewan installed them."""
        return tuple(
            name
            for name, digest in present.items()
            if digest not in (None, self.files.get(name), *self.replaced.get(name, ()))
        )


def overlay() -> dict[str, bytes]:
    """The add-on's files, by their path in a checkout, with forward slashes."""
    with as_file(files("onewan.onetrainer").joinpath("overlay")) as folder:
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts
        }


def install(
    root: Path, *, force: bool = False, contents: Mapping[str, bytes] | None = None
) -> InstallOutcome:
    """Install the add-on in the checkout `root`, or update an installation to this version.

    `contents` replaces the files of this version. With `force`, installed files that were changed
    since are overwritten. InstallError, before anything is written, for a checkout without a name
    that the add-on needs or with Wan 2.2 of its own, and for other files in the places of the
    add-on's.
    """
    root = _checkout(root)
    if problems := check(root).problems:
        raise InstallError(
            "\n".join([f"{root}: this OneTrainer is not supported:", *(f"  {p}" for p in problems)])
        )
    wanted = dict(overlay() if contents is None else contents)
    before = _read(root) or _Manifest(version="", complete=False, files={})
    shas = {name: _sha(data) for name, data in wanted.items()}
    there = {name: _digest(root / name) for name in {**before.files, **wanted}}
    _refuse_what_is_in_the_way(root, shas, there, before)
    changed = before.changed({n: d for n, d in there.items() if d != shas.get(n)})
    kept = () if force else changed
    written = tuple(n for n in wanted if n not in kept and there[n] != shas[n])
    stale = tuple(n for n in before.files if n not in wanted and n not in kept)
    # A changed file that is no longer part of the add-on becomes the user's own.
    dropped = {n for n in before.files if n not in wanted}
    now = version("onewan")
    if before.complete and before.version == now and not (written or dropped):
        return InstallOutcome(kept=kept)
    parents = {str(f) for name in wanted for f in PurePosixPath(name).parents if f.name}
    # Written before any file, so that an interrupted installation is recognized.
    manifest = _Manifest(
        version=now,
        complete=False,
        files={**before.files, **shas},
        folders=sorted({*before.folders, *(f for f in parents if not (root / f).exists())}),
        replaced={
            name: sorted({*before.replaced.get(name, ()), sha})
            for name, sha in before.files.items()
            if sha != shas.get(name, sha) or name in before.replaced
        },
    )
    with _writing(root):
        _write(root, manifest)
        for name in written:
            _replace(root / name, wanted[name])
        for name in stale:
            _remove(root, name)
        manifest.files, manifest.replaced, manifest.complete = shas, {}, True
        _write(root, manifest)
    return InstallOutcome(written, tuple(n for n in stale if there[n] is not None), kept)


def uninstall(root: Path, *, force: bool = False) -> InstallOutcome:
    """Remove the installed files that are unchanged (with `force`, all), the folders that were
    created for them, and their compiled Python files.

    The manifest is removed last. If a changed file is kept, it stays and lists the kept files. A
    file that is OneTrainer's own by now, since its repository has it, is never removed.
    """
    root = _checkout(root)
    manifest = _read(root) or _by_contents(root)
    if manifest is None:
        raise InstallError(f"{root}: the add-on is not installed ({MANIFEST} does not exist)")
    there = {name: _digest(root / name) for name in manifest.files}
    taken = _tracked(root, manifest.files)
    kept = () if force else tuple(n for n in manifest.changed(there) if n not in taken)
    with _writing(root):
        for name in manifest.files:
            remove_abandoned((root / name).parent, (root / name).name)
            if name not in (*kept, *taken):
                _remove(root, name)
        for folder in sorted(manifest.folders, reverse=True):
            _remove_folder(root / folder)
        if kept:
            manifest.complete = False
            manifest.files = {name: manifest.files[name] for name in kept}
            manifest.folders = [f for f in manifest.folders if (root / f).is_dir()]
            _write(root, manifest)
        else:
            remove_abandoned(root, MANIFEST)
            (root / MANIFEST).unlink(missing_ok=True)
    removed = (n for n, d in there.items() if d is not None and n not in (*kept, *taken))
    return InstallOutcome(removed=tuple(removed), kept=kept, taken=taken)


def status(root: Path) -> Status:
    """What is installed, and whether the checkout still has every name that the add-on needs."""
    root = _checkout(root)
    checked = check(root)
    manifest = _read(root)
    wanted = {name: _sha(data) for name, data in overlay().items()}
    if manifest is None:
        taken = _others(root, wanted, {n: _digest(root / n) for n in wanted}, ())
        return Status(installed=False, checked=checked, taken=taken)
    present = {n: _digest(root / n) for n in manifest.files}
    there = {**present, **{n: _digest(root / n) for n in wanted}}
    return Status(
        installed=True,
        complete=manifest.complete,
        version=manifest.version,
        changed=manifest.changed(present),
        missing=tuple(n for n, d in present.items() if d is None),
        current=manifest.files == wanted,
        checked=checked,
        taken=_others(root, wanted, there, manifest.files),
    )


def _checkout(root: Path) -> Path:
    root = Path(root)
    if not (root / "modules" / "util" / "enum" / "ModelType.py").is_file():
        raise InstallError(
            f"{root}: is not a OneTrainer checkout (no modules/util/enum/ModelType.py); give "
            "the folder with its scripts/ and modules/"
        )
    return root.resolve()


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest(path: Path) -> str | None:
    """sha256 of a file, None if it does not exist. A symbolic link is never an installed file,
    whatever its target."""
    if path.is_symlink():
        return "a symbolic link"
    try:
        return _sha(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InstallError(f"{path}: can't be read ({error.strerror})") from error


def _refuse_what_is_in_the_way(
    root: Path, shas: Mapping[str, str], there: Mapping[str, str | None], before: _Manifest
) -> None:
    if outside := [n for n in shas if not (root / n).parent.resolve().is_relative_to(root)]:
        raise InstallError(
            f"{root}: symbolic links lead out of the checkout at the add-on's paths: "
            f"{', '.join(outside)}; replace the links by folders"
        )
    others = _others(root, shas, there, before.files)
    if own := _tracked(root, others):
        raise InstallError(
            f"{root}: has files of its own at the add-on's paths: {', '.join(own)}; this "
            "OneTrainer can't take the add-on: go back to the supported one, or update onewan"
        )
    if others:
        raise InstallError(
            f"{root}: has other files at the add-on's paths: {', '.join(others)}; move them away"
        )


def _others(
    root: Path,
    shas: Mapping[str, str],
    there: Mapping[str, str | None],
    installed: Collection[str],
) -> tuple[str, ...]:
    """The paths among `shas` at which there is a file that is not the add-on's."""
    own = _tracked(root, shas)
    return tuple(
        name
        for name, sha in shas.items()
        if name in own or (name not in installed and there[name] not in (None, sha))
    )


def _tracked(root: Path, names: Collection[str]) -> tuple[str, ...]:
    """Those `names` that OneTrainer's repository has; none if the checkout is not one of git."""
    if not names or not (root / ".git").exists():
        return ()
    command = ["git", "--literal-pathspecs", "-C", str(root), "ls-files", "-z", "--", *names]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ()
    return tuple(name for name in done.stdout.decode("utf-8").split("\0") if name)


def _read(root: Path) -> _Manifest | None:
    """The manifest, None if there is none; InstallError if it names a path outside the checkout."""
    path = root / MANIFEST
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        manifest = _Manifest(
            version=str(data["version"]),
            complete=bool(data["complete"]),
            files={str(k): str(v) for k, v in data["files"].items()},
            folders=[str(f) for f in data["folders"]],
            replaced={str(k): [str(d) for d in v] for k, v in data.get("replaced", {}).items()},
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InstallError(f"{path}: can't be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InstallError(
            f"{path}: is damaged ({type(error).__name__}: {error}); delete it and install again"
        ) from error
    for name in (*manifest.files, *manifest.folders):
        if not _is_inside(root, name):
            raise InstallError(
                f"{path}: names {name!r}, which is not in the checkout; delete "
                "the manifest and install again"
            )
    return manifest


def _by_contents(root: Path) -> _Manifest | None:
    """A manifest for an installation of this version that has lost its own; None if no file of it
    is there."""
    shas = {name: _sha(data) for name, data in overlay().items()}
    if not any(_digest(root / name) == sha for name, sha in shas.items()):
        return None
    folders = {str(f) for name in shas for f in PurePosixPath(name).parents if f.name}
    return _Manifest(version=version("onewan"), complete=True, files=shas, folders=sorted(folders))


def _is_inside(root: Path, name: str) -> bool:
    """Whether `name`, as a manifest has it, is a path in the checkout and not in its repository."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or pure.parts[:1] == (".git",):
        return False
    windows = "\\" in name or ":" in name
    return not windows and (root / name).parent.resolve().is_relative_to(root)


def _write(root: Path, manifest: _Manifest) -> None:
    about = "The onewan add-on for Wan 2.2; `onewan onetrainer uninstall` removes it."
    content = {"about": about, **asdict(manifest), "files": dict(sorted(manifest.files.items()))}
    if not manifest.replaced:
        del content["replaced"]
    _replace(root / MANIFEST, f"{json.dumps(content, indent=1)}\n".encode())


def _replace(file: Path, data: bytes) -> None:
    """Write a file, and remove what a killed process left of it."""
    remove_abandoned(file.parent, file.name)
    with replacing(file) as path:
        path.write_bytes(data)


def _remove(root: Path, name: str) -> None:
    """Delete a file and its compiled Python files."""
    path = root / name
    path.unlink(missing_ok=True)
    cache = path.parent / "__pycache__"
    if path.suffix == ".py" and not cache.is_symlink():
        for compiled in cache.glob(f"{glob.escape(path.stem)}.*.pyc"):
            compiled.unlink()
        _remove_folder(cache)


def _remove_folder(folder: Path) -> None:
    """Delete a folder if it is empty."""
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        os.rmdir(folder)


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    """InstallError for a file that can't be written or removed."""
    try:
        yield
    except OSError as error:
        raise InstallError(
            f"{error.filename or root}: {error.strerror}; correct this and repeat the command, "
            "which then continues"
        ) from error
