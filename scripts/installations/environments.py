"""Virtual environments, and commands in them as on a machine that has nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"

# Kept in a bare environment: programs on Windows need the first ones to start.
_KEPT = ("SYSTEMROOT", "TEMP", "TMP", "PATHEXT", "USERPROFILE", "OMP_NUM_THREADS")


class Environment:
    """A new virtual environment in `folder`: empty, or with `below` on top of the one that runs
    this script, whose packages it then sees, but not its editable onewan."""

    def __init__(self, folder: Path, *, below: bool = False) -> None:
        venv.create(folder, symlinks=os.name != "nt")
        self.folder = folder
        self.scripts = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.scripts / f"python{'.exe' if os.name == 'nt' else ''}"
        paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
        self.packages = Path(paths["purelib"])
        self.packages.mkdir(parents=True, exist_ok=True)
        if below:
            # Paths in a .pth file are searched last, and .pth files in them, such as that of an
            # editable onewan, are not read.
            text = f"{sysconfig.get_path('purelib')}\n"
            (self.packages / "below.pth").write_text(text, encoding="utf-8")

    def pip(self, *arguments: str) -> str:
        """What `pip install` prints with these arguments."""
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install"]
        return run([*pip, *arguments], ROOT)

    def run_bare(self, folder: Path, home: Path | None, *command: str) -> str:
        """The output of a program of this environment, with nothing else on PATH (no compiler, no
        git), no variables of the user, and HOME `home`, or unset for None."""
        bare = {name: os.environ[name] for name in _KEPT if name in os.environ}
        bare["PATH"] = str(self.scripts)
        if home is not None:
            bare |= {"HOME": str(home), "USERPROFILE": str(home)}
        program = str(self.scripts / command[0])
        return run([program, *command[1:]], folder, variables=bare)


def run(command: list[str], folder: Path, *, variables: Mapping[str, str] | None = None) -> str:
    """The output of a command; SystemExit with it if the command fails."""
    if variables is None:
        variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    print(f"$ {' '.join(command)}", flush=True)
    done = subprocess.run(
        command,
        cwd=folder,
        env=dict(variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{command[0]} ended with {done.returncode}")
    return done.stdout


def uv(*arguments: str) -> list[str]:
    """A command of uv, which the extra `dev` installs."""
    return [sys.executable, "-m", "uv", *arguments]


def tool(package: str, program: str, *arguments: str) -> list[str]:
    """A command of a program of `package` (NAME==VERSION), in an environment of uv's own, so that
    no tool's requirements meet those of onewan."""
    return uv("tool", "run", "--quiet", "--from", package, program, *arguments)


def tested_torch() -> str:
    """`torch==VERSION` of constraints.txt, for which pip may find a CPU build."""
    found = re.search(r"^torch==\S+$", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise SystemExit(f"{CONSTRAINTS} has no line torch==VERSION")
    return found[0]
