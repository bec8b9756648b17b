"""The environment of onewan: Python, packages, torch, devices, driver, system, memory and disk.

Uses nothing but Python and psutil, and imports torch in another process: a broken installation may
end the process that imports it. Texts contain no names of users or machines and no home folders, so
that they can be pasted into a report.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.doctor.finding import Finding, without_names
from onewan.doctor.packages import (
    OPTIONAL,
    Requirements,
    installation_lines,
    installed_version,
    read_requirements,
    satisfies,
)
from onewan.doctor.torch_facts import Torch, ask_torch

_LITTLE_DISK = 20 * 10**9
"""Bytes; the smallest model takes about that."""
_HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Environment variables that hide cards from torch."""
_VARIABLES = (
    *_HIDING,
    "ONEAPI_DEVICE_SELECTOR",
    "ZE_AFFINITY_MASK",
    "ONEWAN_DEVICE",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ENABLE_MPS_FALLBACK",
    "HSA_OVERRIDE_GFX_VERSION",
    "OMP_NUM_THREADS",
    "HF_HUB_OFFLINE",
)
"""Environment variables that change what a run does, without secrets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The machine and what is installed on it."""

    onewan: str
    python: str
    system: str
    processor: str
    memory: int
    """Bytes of host memory; 0 where it could not be found out."""
    disk_free: int
    """Bytes, of the disk of the current folder."""
    torch: Torch
    cards: tuple[str, ...]
    """NVIDIA cards as their driver names them."""
    driver: str
    """Version of the NVIDIA driver; empty if there is none."""
    packages: Mapping[str, str]
    """Versions of the required packages; empty for a missing one."""
    optional: Mapping[str, str]
    """Those of packages that only some runs need."""
    extras: Mapping[str, str]
    """The extra of onewan that installs an optional package, by package."""
    ffmpeg: str = ""
    """Versions of the libraries of FFmpeg in PyAV, which read and write videos."""
    variables: Mapping[str, str]
    """Environment variables that change what a run does, of those that are set."""
    broken: str = ""
    """Why run files can't be read although all required packages are installed; such a package
    needs another one that is missing or broken."""
    findings: tuple[Finding, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """Everything but the findings as plain data."""
        data = asdict(self)
        del data["findings"]
        return data

    def lines(self) -> Iterator[str]:
        """The environment as lines of text."""
        torch = self.torch
        yield f"onewan     {self.onewan}, Python {self.python}"
        yield f"system     {self.system}"
        yield f"torch      {f'{torch.version} ({torch.build})' if torch.version else 'not usable'}"
        yield from _listed("device", [d.line() for d in torch.devices] or ["none but the CPU"])
        backends = [f"{name} ({why})" if why else name for name, why in torch.attention.items()]
        yield from _wrapped("attention", backends)
        if self.driver:
            yield f"driver     NVIDIA {self.driver}: {'; '.join(self.cards)}"
        memory = f", {format_bytes(self.memory)} of memory" if self.memory else ""
        yield f"host       {self.processor}{memory}"
        yield f"disk       {format_bytes(self.disk_free)} free here"
        yield from _wrapped("variables", [f"{n}={value}" for n, value in self.variables.items()])
        versions = [f"{name} {version or 'MISSING'}" for name, version in self.packages.items()]
        yield from _wrapped("packages", versions)
        yield from _wrapped("FFmpeg", [self.ffmpeg] if self.ffmpeg else [])
        yield from _wrapped("optional", [f"{n} {v}" for n, v in self.optional.items() if v])
        missing = [name for name, version in self.optional.items() if not version]
        yield from _listed("not there", [*installation_lines(missing, self.extras)])


def environment_ahead() -> Callable[[], Environment]:
    """Begins to look at the environment of this process; what it returns waits for the result.

    Importing torch takes seconds, in another process, so that other work can be done meanwhile.
    Raises nothing: what can't be found out is a finding.
    """
    # These threads wait for other processes and import nothing, as this one does meanwhile: modules
    # that import each other in two threads can't go on.
    pool = ThreadPoolExecutor(2)
    asked_torch, asked_driver = pool.submit(ask_torch), pool.submit(_driver)
    pool.shutdown(wait=False)

    @cache
    def environment() -> Environment:
        needed = read_requirements()
        driver, cards = asked_driver.result()
        found = Environment(
            onewan=installed_version("onewan") or "not installed",
            python=f"{platform.python_version()} ({platform.python_implementation()})",
            system=_system(),
            processor=_processor(),
            memory=_host_memory(),
            disk_free=_disk_free(),
            packages={name: installed_version(name) for name in needed.required if name != "torch"},
            # Those of an extra that is new, should `OPTIONAL` lack them.
            optional={
                name: installed_version(name) for name in dict.fromkeys((*OPTIONAL, *needed.extras))
            },
            extras=needed.extras,
            ffmpeg=_ffmpeg(),
            broken=_import_error(),
            variables={
                name: without_names(os.environ[name]) for name in _VARIABLES if name in os.environ
            },
            cards=cards,
            driver=driver,
            torch=asked_torch.result(),
        )
        return replace(found, findings=tuple(_findings(found, needed)))

    return environment


def _problem(kind: str, text: str) -> Finding:
    return Finding(severity="problem", kind=kind, text=without_names(text))


def _note(kind: str, text: str) -> Finding:
    return Finding(severity="note", kind=kind, text=without_names(text))


def _findings(found: Environment, needed: Requirements) -> Iterator[Finding]:
    torch = found.torch
    if not torch.version:
        yield _problem(
            "torch",
            f"torch can't be imported ({torch.error}); install it again as on pytorch.org",
        )
    elif torch.error:
        yield _problem(
            "torch",
            f"torch can be imported, but trying to compute ends with an error ({torch.error}); "
            "update the driver, or install torch again as on pytorch.org",
        )
    for name, wanted in needed.required.items():
        version = torch.version or "" if name == "torch" else found.packages[name]
        if not version and name != "torch":
            yield _problem("package", f"the package {name} is missing; install onewan again")
        elif version and not satisfies(version, wanted):
            yield _problem(
                "package",
                f"{name} is {version}, and onewan needs {wanted}; install onewan again, or "
                f'`pip install "{name}{wanted}"`',
            )
    if found.broken and all(found.packages.values()):
        yield _problem(
            "package",
            f"a package that onewan needs can't be imported ({found.broken}); install onewan again "
            "in a new environment, or `pip check` to see what is missing",
        )
    if torch.version:
        yield from _about_devices(found)
    if 0 < found.disk_free < _LITTLE_DISK:
        yield _note("disk", f"only {format_bytes(found.disk_free)} are free on the disk here")


def _about_devices(found: Environment) -> Iterator[Finding]:
    torch = found.torch
    hiding = [f"{name}={found.variables[name]}" for name in _HIDING if name in found.variables]
    if found.cards and not torch.devices and hiding:
        yield _note("device", f"{' and '.join(hiding)} hides {found.cards[0]} from torch")
    elif found.cards and not torch.devices:
        yield _problem(
            "device",
            f"torch can't use the card {found.cards[0]}: this is its build for "
            f"{torch.build}; install the build for CUDA as on pytorch.org"
            if torch.build == "CPU only"
            else f"torch ({torch.build}) can't use the card {found.cards[0]} with driver "
            f"{found.driver}; update the driver, or install torch for an older CUDA",
        )
    elif not torch.devices:
        yield _note(
            "device",
            "torch finds no graphics card, so a run would train on the CPU, which takes weeks",
        )
    for device in torch.devices:
        if device.emulates_bfloat16:
            yield _note(
                "device",
                f"{device.title} computes bfloat16 without units for it, several times slower "
                "than cards from Ampere (RTX 30) on",
            )


def _driver() -> tuple[str, tuple[str, ...]]:
    """(version of the NVIDIA driver, its cards); empty without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "", ()
    query = [program, "--query-gpu=driver_version,name,memory.total,memory.used"]
    try:
        done = subprocess.run(
            [*query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "", ()
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    rows = [row for row in rows if len(row) == 4]
    cards = tuple(f"{name}, {total} ({used} in use)" for _, name, total, used in rows)
    return (rows[0][0] if rows else ""), cards


def _system() -> str:
    """The operating system, with its version, and the machine's architecture."""
    name = f"{platform.system()} {platform.release()}"
    if platform.system() == "Linux":
        with contextlib.suppress(OSError, KeyError):  # not every distribution has the file
            name = f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {name}"
        if "microsoft" in platform.release().lower():
            name = f"{name} (WSL)"
    elif version := platform.mac_ver()[0]:
        name = f"macOS {version}"
    elif platform.system() == "Windows":
        name = f"{name}, version {platform.version()}"
    return f"{name}, {platform.machine()}"


def _processor() -> str:
    """The CPU's name, where the system tells it, and its cores."""
    name = platform.processor()
    with contextlib.suppress(OSError):  # Linux alone has the file
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        named = re.search(r"^model name\s*: *(.+)", text, re.MULTILINE)
        name = named[1] if named else name
    cores = f"{os.cpu_count() or 1} CPU cores"
    return f"{name}, {cores}" if name else cores


def _ffmpeg() -> str:
    try:
        import av
    except (ImportError, OSError):  # which is reported as a missing package, or ends the run
        return ""
    versions = {name: av.library_versions.get(name, ()) for name in ("libavformat", "libavcodec")}
    return ", ".join(f"{name} {'.'.join(map(str, found))}" for name, found in versions.items())


def _import_error() -> str:
    """Why what reads run files can't be imported; empty if it can."""
    try:
        importlib.import_module("onewan.config.load")
    except ImportError as error:
        return str(error)
    return ""


def _host_memory() -> int:
    try:
        from onewan.memory.plan.machine import host_memory
    except ImportError:  # which is reported
        return 0
    return host_memory()


def _disk_free() -> int:
    try:
        return shutil.disk_usage(Path.cwd()).free
    except OSError:
        return 0


def _listed(label: str, lines: list[str]) -> Iterator[str]:
    """`lines` with the label in front of the first one."""
    for line in lines:
        yield f"{label:<11}{line}"
        label = ""


def _wrapped(label: str, words: list[str], width: int = 88) -> Iterator[str]:
    """`words` in lines with the label in front of the first one; no line if there are none."""
    line = ""
    for word in words:
        if line and len(line) + len(word) + 2 > width:
            yield f"{label:<11}{line},"
            label, line = "", ""
        line += f", {word}" if line else word
    if line:
        yield f"{label:<11}{line}"
