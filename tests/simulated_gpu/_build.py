"""Compiles the C++ sources, once for all processes, and loads the result."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from unittest import SkipTest, mock

from filelock import FileLock
from torch.utils import cpp_extension

NAME = "onewan_simulated_gpu"
SOURCES = Path(__file__).parent / "csrc"


def build() -> ModuleType:
    """The compiled module.

    Raises `unittest.SkipTest` where tests use a real device, and where there is no C++ compiler
    (with CI=true `RuntimeError`); PyTorch's error with the compiler's messages if the sources can't
    be compiled.
    """
    device = os.environ.get("ONEWAN_TEST_DEVICE") or "sim"
    if device != "sim":  # PyTorch would take the simulated one for the machine's own
        raise SkipTest(f"ONEWAN_TEST_DEVICE={device}: the simulated accelerator is not loaded")
    compiler = "cl" if sys.platform == "win32" else cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        reason = f"the simulated accelerator needs a C++ compiler, and {compiler} is not here"
        raise (RuntimeError if os.environ.get("CI") == "true" else SkipTest)(reason)
    folder = Path(
        os.environ.get("SIMULATED_GPU_BUILD") or cpp_extension._get_build_directory(NAME, False)
    )
    folder.mkdir(parents=True, exist_ok=True)
    # The package ninja is found where a virtual environment has not been activated, too.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    # PyTorch's own lock is a file that a killed process leaves behind, for which others would wait
    # forever. This one ends with its process, so a file of the other kind that is found is stale.
    with FileLock(folder / "build.lock"), mock.patch.dict(os.environ, {"PATH": path}):
        (folder / "lock").unlink(missing_ok=True)
        return cpp_extension.load(
            name=NAME,
            sources=[str(path) for path in sorted(SOURCES.glob("*.cpp"))],
            extra_cflags=[] if sys.platform == "win32" else ["-O1", "-g0", "-w", "-DNDEBUG"],
            build_directory=str(folder),
            verbose=bool(os.environ.get("SIMULATED_GPU_VERBOSE")),
        )
