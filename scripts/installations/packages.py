"""The wheel and the source distribution: the same bytes at each build, complete, presentable."""

from __future__ import annotations

import os
import shutil
import tarfile
import zipfile
from pathlib import Path

from environments import ROOT, run, tool, uv

TWINE = "twine==7.0.0"
CHECK_WHEEL_CONTENTS = "check-wheel-contents==0.6.3"


def build(folder: Path) -> tuple[Path, Path]:
    """(the wheel, the source distribution) in `folder`. The wheel is built from the other, both
    twice, and SystemExit says what is wrong with them."""
    made = [_build_copy(folder / name, mode) for name, mode in (("one", 0o644), ("two", 0o664))]
    for first, second in zip(*made, strict=True):
        if first.read_bytes() != second.read_bytes():
            raise SystemExit(f"{first} and {second}, of the same sources, differ")
    wheel, source = (Path(shutil.copy(file, folder)) for file in made[0])
    _check_contents(wheel, source)
    run(tool(TWINE, "twine", "check", "--strict", str(wheel), str(source)), ROOT)
    run(tool(CHECK_WHEEL_CONTENTS, "check-wheel-contents", str(wheel)), ROOT)
    print(f"{wheel.name} and {source.name} are complete, and the same bytes when built again")
    return wheel, source


def _build_copy(folder: Path, mode: int) -> tuple[Path, Path]:
    """(wheel, source distribution) of a copy of the sources in `folder`, whose files have another
    time and these permissions: neither may be in what is built."""
    sources = folder / "onewan"
    for name in _tracked():
        target = sources / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
        target.chmod(mode)
        os.utime(target, (mode * 10**6, mode * 10**6))
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
    out = run(uv("build", "--out-dir", str(folder)), sources, variables=environment)
    if warnings := [line for line in out.splitlines() if "warn" in line.lower()]:
        raise SystemExit("the build warns:\n" + "\n".join(warnings))
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


def _check_contents(wheel: Path, source: Path) -> None:
    tracked = _tracked()
    with zipfile.ZipFile(wheel) as opened:
        in_wheel = set(opened.namelist())
    top = source.name.removesuffix(".tar.gz")
    with tarfile.open(source) as opened:
        in_source = {name.removeprefix(f"{top}/") for name in opened.getnames()}
    package = {name.removeprefix("src/") for name in tracked if name.startswith("src/onewan/")}
    needed = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"}
    needed |= {name for name in tracked if name.startswith(("src/", "tests/"))}
    for file, missing in ((wheel, package - in_wheel), (source, needed - in_source)):
        if missing:
            names = ", ".join(sorted(missing))
            raise SystemExit(f"{file.name}: {len(missing)} files are missing: {names}")


def _tracked() -> list[str]:
    """Files of the repository, also new ones that git does not ignore."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = run(listed, ROOT).split("\0")
    return [name for name in names if name and (ROOT / name).is_file()]
