"""The environment of onewan: Python, packages, torch, device, driver, memory and disk.

Uses nothing but Python and psutil, and imports torch in another process: a broken installation may
end the process that imports it. Texts contain no names of users and no home folders, so that they
can be pasted into a report.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.doctor.finding import Finding, without_names

OPTIONAL: Mapping[str, str] = {
    "flash-attn": "memory.attention: flash_attn, on CUDA and ROCm",
    "flash-attn-3": "memory.attention: flash_attn_3, on NVIDIA's Hopper cards",
    "xformers": "memory.attention: xformers, on CUDA and ROCm",
    "triton": "memory.compile on a card (on Windows the package is triton-windows)",
    "bitsandbytes": "optimizer.name: adamw_8bit",
    "prodigyopt": "optimizer.name: prodigy",
    "lion-pytorch": "optimizer.name: lion",
    "schedulefree": "optimizer.name: adamw_schedule_free",
    "prodigy-plus-schedule-free": "optimizer.name: prodigy_plus_schedule_free",
    "came-pytorch": "optimizer.name: came",
    "adam-mini": "optimizer.name: adam_mini",
    "torchao": "optimizer.name: adamw_low_bit and adamw_cpu_offload",
    "pytorch-optimizer": "optimizer.name: custom, with more than a hundred optimizers",
    "scenedetect": "better changes of scene for wan_config.avoid_cuts and the strategy keyframe",
    "pillow-heif": "photos in heic and heif",
    "pyarrow": "tables of clips in parquet",
    "aiohttp": "sources of clips at https:// addresses",
    "wandb": "a record of each run at Weights & Biases",
}
"""What each package gives that only some runs need: those of the extras, and others that are used
where they are installed."""
_TORCH_SECONDS = 90
"""After which the import of torch is given up; a first one from a network disk takes a minute."""
_LITTLE_DISK = 20 * 10**9
"""Bytes; the smallest model takes about that."""

_ASK_TORCH = """
import importlib, importlib.util, json, torch
found = {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
devices = []
for kind in ("cuda", "xpu"):
    module = getattr(torch, kind, None)
    if module is not None and module.is_available():
        for index in range(module.device_count()):
            facts = module.get_device_properties(index)
            devices.append({"name": facts.name, "memory": facts.total_memory,
                "capability": f"{getattr(facts, 'major', '')}.{getattr(facts, 'minor', '')}"})
if torch.backends.mps.is_available():
    devices.append({"name": "Apple GPU", "memory": 0, "capability": ""})
attention = {"flash": "", "math": ""}
if torch.cuda.is_available():
    if not torch.backends.cuda.is_flash_attention_available():
        attention["flash"] = "not in this build"
    attention["efficient"] = ""
    if torch.version.hip is None and torch.backends.cudnn.is_available():
        attention["cudnn"] = ""
# Packages that are compiled for one version of torch are often there, and can't be used.
for name, module in (("flash_attn", "flash_attn.flash_attn_interface"),
        ("flash_attn_3", "flash_attn_interface"), ("xformers", "xformers.ops.fmha")):
    if importlib.util.find_spec(module.partition(".")[0]) is not None:
        try:
            importlib.import_module(module)
            attention[name] = ""
        except Exception as error:
            lines = str(error).splitlines() or [type(error).__name__]
            attention[name] = f"can't be imported: {lines[0][:200]}"
print(json.dumps({**found, "devices": devices, "attention": attention}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Torch:
    """What torch says about itself when it is imported."""

    version: str | None
    """None if it can't be imported."""
    build: str = ""
    """"CUDA 12.8", "ROCm 6.4" or "CPU only"."""
    devices: tuple[str, ...] = ()
    attention: Mapping[str, str] = field(default_factory=dict[str, str])
    """Attention backends by their names in the run file, and why one can't be used; empty if it
    can, as far as can be told without a training step."""
    error: str = ""
    """Why it can't be imported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The machine and what is installed on it."""

    onewan: str
    python: str
    system: str
    processor: str
    memory: int
    """Bytes of host memory."""
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
    findings: tuple[Finding, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """Everything but the findings as plain data."""
        data = asdict(self)
        del data["findings"]
        return data

    def lines(self) -> Iterator[str]:
        """The environment as lines of text."""
        torch = self.torch
        yield f"onewan     {self.onewan}, Python {self.python}, {self.system}"
        yield f"torch      {f'{torch.version} ({torch.build})' if torch.version else 'not usable'}"
        yield f"device     {'; '.join(torch.devices) or 'none that torch can use'}"
        backends = [f"{name} ({why})" if why else name for name, why in torch.attention.items()]
        yield from _wrapped("attention", backends)
        if self.driver:
            yield f"driver     NVIDIA {self.driver}: {'; '.join(self.cards)}"
        yield f"host       {self.processor}, {format_bytes(self.memory)} of memory"
        yield f"disk       {format_bytes(self.disk_free)} free here"
        versions = [f"{name} {version or 'MISSING'}" for name, version in self.packages.items()]
        yield from _wrapped("packages", versions)
        yield from _wrapped("optional", [f"{n} {v}" for n, v in self.optional.items() if v])
        missing = [name for name, version in self.optional.items() if not version]
        width = max(map(len, missing), default=0)
        for index, name in enumerate(missing):
            label = "" if index else "not there"
            yield f"{label:<11}{name:<{width}} would give {OPTIONAL.get(name, 'an extra')}"


def environment_ahead() -> Callable[[], Environment]:
    """Begins to look at the environment of this process; what it returns waits for the result.

    Importing torch takes seconds, in another process, so that other work can be done meanwhile.
    Raises nothing: what can't be found out is a finding.
    """
    # These threads wait for other processes and import nothing, as this one does meanwhile: modules
    # that import each other in two threads can't go on.
    pool = ThreadPoolExecutor(2)
    asked_torch, asked_driver = pool.submit(_torch), pool.submit(_driver)
    pool.shutdown(wait=False)

    @cache
    def environment() -> Environment:
        required, extras = _requirements()
        driver, cards = asked_driver.result()
        found = Environment(
            onewan=_version("onewan") or "not installed",
            python=platform.python_version(),
            system=f"{platform.system()} {platform.release()} {platform.machine()}",
            processor=f"{os.cpu_count() or 1} CPU cores",
            memory=_host_memory(),
            disk_free=_disk_free(),
            packages={name: _version(name) for name in required if name != "torch"},
            # Those of an extra that is new, should `OPTIONAL` lack them.
            optional={name: _version(name) for name in dict.fromkeys((*OPTIONAL, *extras))},
            cards=cards,
            driver=driver,
            torch=asked_torch.result(),
        )
        return replace(found, findings=tuple(_findings(found, required)))

    return environment


def _findings(found: Environment, required: Mapping[str, str]) -> Iterator[Finding]:
    def problem(kind: str, text: str) -> Finding:
        return Finding(severity="problem", kind=kind, text=without_names(text))

    if not found.torch.version:
        yield problem(
            "torch",
            f"torch can't be imported ({found.torch.error}); install it again as on pytorch.org",
        )
    for name, wanted in required.items():
        version = found.torch.version or "" if name == "torch" else found.packages[name]
        if not version and name != "torch":
            yield problem("package", f"the package {name} is missing; install onewan again")
        elif version and not _satisfies(version, wanted):
            yield problem(
                "package",
                f"{name} is {version}, and onewan needs {wanted}; install onewan again, or "
                f'`pip install "{name}{wanted}"`',
            )
    if found.torch.version and found.cards and not found.torch.devices:
        yield problem(
            "device",
            f"torch can't use the card {found.cards[0]}: this is its build for "
            f"{found.torch.build}; install the build for CUDA as on pytorch.org"
            if found.torch.build == "CPU only"
            else f"torch ({found.torch.build}) can't use the card {found.cards[0]} with driver "
            f"{found.driver}; update the driver, or install torch for an older CUDA",
        )
    elif found.torch.version and not found.torch.devices:
        text = "torch finds no graphics card, so a run would train on the CPU, which takes weeks"
        yield Finding(severity="note", kind="device", text=text)
    if 0 < found.disk_free < _LITTLE_DISK:
        text = f"only {format_bytes(found.disk_free)} are free on the disk of this folder"
        yield Finding(severity="note", kind="disk", text=text)


def _torch() -> Torch:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TORCH_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Torch(version=None, error=f"its import has not ended after {_TORCH_SECONDS} s")
    except OSError as error:
        return Torch(version=None, error=f"Python can't be started: {error.strerror}")
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        died = f"the process that imports it ends with status {done.returncode}"
        return Torch(version=None, error=without_names(lines[-1][:300] if lines else died))
    # Packages that torch imports may print lines of their own.
    facts = json.loads(done.stdout.strip().splitlines()[-1])
    build = f"ROCm {facts['hip']}" if facts["hip"] else f"CUDA {facts['cuda']}"
    return Torch(
        version=facts["version"],
        build=build if facts["hip"] or facts["cuda"] else "CPU only",
        devices=tuple(map(_device, facts["devices"])),
        attention={name: without_names(why) for name, why in facts["attention"].items()},
    )


def _device(facts: Mapping[str, Any]) -> str:
    memory = f", {format_bytes(facts['memory'])}" if facts["memory"] else ""
    capability = facts["capability"].strip(".")
    return f"{facts['name']}{memory}{f', compute capability {capability}' if capability else ''}"


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


def _requirements() -> tuple[dict[str, str], list[str]]:
    """(required packages with their versions such as ">=2.6", packages of the extras but those for
    development), as the installed package says."""
    required, extras = dict[str, str](), list[str]()
    try:
        lines = importlib.metadata.requires("onewan") or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    for line in lines:
        requirement, _, marker = line.partition(";")
        found = re.match(r"([\w.-]+)(?:\[[^\]]*\])?\s*(.*)", requirement.strip())
        assert found is not None
        if "extra" not in marker:
            required[found[1]] = found[2]
        elif re.search(r"extra == ['\"]dev['\"]", marker) is None:
            extras.append(found[1])
    return required, extras


def _satisfies(version: str, wanted: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # a dependency of most packages, whose absence is reported
        return True
    return SpecifierSet(wanted).contains(version, prereleases=True)


def _version(name: str) -> str:
    """The version of an installed package; empty if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _host_memory() -> int:
    try:
        from onewan.memory.plan.machine import host_memory
    except ImportError:  # psutil is missing, which is reported
        return 0
    return host_memory()


def _disk_free() -> int:
    try:
        return shutil.disk_usage(Path.cwd()).free
    except OSError:
        return 0


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
