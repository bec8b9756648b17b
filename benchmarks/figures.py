"""`Figure`: what one benchmark measured, in the one shape that all of them write as JSON.

A figure is a list of values. Each has the case that it was measured for, a unit, every repeat, and
where there is one the number that arithmetic says beside it. The machine, the versions and the
command are in the file too, so that it can be read, and repeated, without anything else:

    figure = measured_here(name="memory", title="...", measured="...", values=values)
    write_figure(figure, Path("memory.json"))

`tables` and `plots` show a figure, and `report.py` makes one page of all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeAlias

import psutil
from pydantic import TypeAdapter, ValidationError

FORMAT = 1
"""Of the JSON files. It changes when a reader of older ones would misread a newer one."""
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("onewan", "torch", "diffusers", "transformers", "peft", "av", "numpy")
"""Whose versions a figure depends on."""

CaseValue: TypeAlias = str | int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """One number: `measure` of `case`, measured once or several times."""

    case: Mapping[str, CaseValue]
    """What distinguishes it from the figure's other values, such as ``{"size": "81x480x832"}``."""
    measure: str
    """Such as "device peak"."""
    unit: str = ""
    """Such as "GB" (10^9 bytes) or "s"; empty for a ratio."""
    repeats: tuple[float, ...] = ()
    """Every measurement, in its order; one for a count. Empty if there is none."""
    expected: float | None = None
    """The same by arithmetic, which `Figure.arithmetic` names."""
    baseline: str = ""
    """What `ratio` compares with, such as "bare loop"."""
    ratio: float | None = None
    """The value relative to the baseline's, of the same run."""
    limit: float | None = None
    """What the value should keep."""
    at_least: bool = False
    """Whether `limit` is the least value, not the largest."""
    reason: str = ""
    """Why there is no number, such as "did not fit"."""

    def __post_init__(self) -> None:
        if bool(self.repeats) == bool(self.reason):
            raise ValueError(f"{self.measure} of {self.case}: needs either repeats or a reason")

    @property
    def median(self) -> float:
        return statistics.median(self.repeats)

    @property
    def keeps_limit(self) -> bool:
        """True without a limit, and without a number."""
        if self.limit is None or not self.repeats:
            return True
        return self.median >= self.limit if self.at_least else self.median <= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """How `plots` draws the values of one measure."""

    measure: str
    kind: Literal["bars", "lines"] = "bars"
    x: str = ""
    """For lines, the key of the cases whose numbers are the horizontal axis."""
    series: str = ""
    """The key of the cases whose values have a color each; empty for one color."""
    title: str = ""
    """Empty for the figure's title."""
    only: Mapping[str, CaseValue] = field(default_factory=dict)
    """What the cases that are drawn have in common; empty for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostAndDevice:
    """The machine that a figure was measured on."""

    cpu: str
    cores: int
    """That this process may use."""
    ram: int
    """Bytes of host memory."""
    system: str
    device: str
    """Its maker's name; "CPU" without an accelerator."""
    device_type: str
    """As PyTorch names it. `sim` is the simulated accelerator: its times say nothing."""
    device_memory: int | None = None
    """Bytes; None on the CPU."""
    load_before: float | None = None
    """Processes that computed or waited to, on average over the minute before the benchmark; other
    work on the machine made its times longer where this is near the number of cores."""
    load_after: float | None = None

    @property
    def title(self) -> str:
        """The device, or the CPU if that has computed."""
        if self.device_type == "sim":
            return f"simulated accelerator on {self.cores} cores of {self.cpu}"
        return f"{self.cores} cores of {self.cpu}" if self.device_type == "cpu" else self.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What one benchmark measured."""

    name: str
    """Of its file, without the suffix."""
    title: str
    measured: str
    """What was done and counted, in a sentence or two."""
    values: tuple[Value, ...]
    charts: tuple[Chart, ...]
    machine: HostAndDevice
    versions: dict[str, str]
    date: str
    """UTC, ISO 8601."""
    command: str
    """That repeats it."""
    seconds: float
    """That the benchmark took."""
    arithmetic: str = ""
    """What `Value.expected` is, such as "plan"; empty if no value has one."""
    across: str = ""
    """The key of the cases whose values are the table's columns; empty for a column for each
    measure."""
    format: int = FORMAT

    def missed(self) -> list[Value]:
        """The values that do not keep their limits."""
        return [value for value in self.values if not value.keeps_limit]


def measured_here(
    *,
    name: str,
    title: str,
    measured: str,
    values: Sequence[Value],
    charts: Sequence[Chart] = (),
    arithmetic: str = "",
    across: str = "",
    device: str = "cpu",
) -> Figure:
    """A figure of the values that this process has measured on `device`."""
    return Figure(
        name=name,
        title=title,
        measured=measured,
        values=tuple(values),
        charts=tuple(charts),
        machine=this_machine(device),
        versions=versions(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command_line(sys.argv),
        seconds=round(time.time() - psutil.Process().create_time(), 1),
        arithmetic=arithmetic,
        across=across,
    )


def on_its_device(figure: Figure, label: str | None = None) -> Figure:
    """`figure` with the name of its device in its own name and title, and with `label`: beside
    those of other devices, and of other commands."""
    parts = [figure.machine.device, *([label] if label else [])]
    slug = "_".join(re.sub("[^a-z0-9]+", "_", part.lower()).strip("_") for part in parts)
    title = f"{figure.title} on {figure.machine.title}" + (f", {label}" if label else "")
    return replace(figure, name=f"{figure.name}_on_{slug}", title=title)


# ------------------------------------------------------------------------------------------- files


_FIGURES = TypeAdapter[Figure](Figure)


def write_figure(figure: Figure, path: Path) -> None:
    """Write `figure` as JSON, with the least, the median and the largest repeat of each value."""
    content = asdict(figure)
    content["machine"]["title"] = figure.machine.title
    content["values"] = [_written(value) for value in figure.values]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _written(value: Value) -> dict[str, Any]:
    """Without what is not set, and with six digits of each number."""
    unset = (None, "", False)
    content = {
        key: part
        for key, part in asdict(value).items()
        if not any(part is one for one in unset)  # 0 is not
    }
    if value.repeats:
        content |= {"min": min(value.repeats), "median": value.median, "max": max(value.repeats)}
        content["repeats"] = [_rounded(number) for number in value.repeats]
    for key in ("min", "median", "max", "expected", "ratio"):
        if key in content:
            content[key] = _rounded(content[key])
    return content


def _rounded(number: float) -> float:
    return float(f"{number:.6g}")


def read_figure(path: Path) -> Figure:
    """ValueError, which names the file, if it is no figure of this format."""
    try:
        figure = _FIGURES.validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        problem = f"{place}: {first['msg']}" if place else first["msg"]
        raise ValueError(f"{path}: is no figure of a benchmark ({problem})") from error
    if figure.format != FORMAT:
        raise ValueError(f"{path}: has format {figure.format}, and this version reads {FORMAT}")
    return figure


def read_figures(folder: Path) -> dict[str, Figure]:
    """Those of all JSON files in `folder`, by name."""
    figures = [read_figure(path) for path in sorted(folder.glob("*.json"))]
    return {figure.name: figure for figure in figures}


# ----------------------------------------------------------------------------------- command lines


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has, which `save` reads."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figure here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it here, as SVG")


def save(figure: Figure, options: argparse.Namespace) -> None:
    """Write `figure` where the options of the command line say."""
    if options.json:
        write_figure(figure, options.json)
    if options.plot:
        from plots import draw  # matplotlib is needed for pictures only

        options.plot.parent.mkdir(parents=True, exist_ok=True)
        options.plot.write_text("\n".join(draw(figure)), encoding="utf-8")


def print_values(figure: Figure, key: str) -> None:
    """A line for each value of `figure`, by its case's `key`."""
    for value in figure.values:
        expected = "" if value.expected is None else f" (by arithmetic {value.expected:.3g})"
        ratio = "" if value.ratio is None else f", {value.ratio:.2f} of {value.baseline}"
        print(
            f"{key} {value.case[key]}: {value.measure} {value.median:.3g} "
            f"{value.unit}{expected}{ratio}"
        )


def command_line(arguments: Sequence[str]) -> str:
    """The command that repeats a benchmark, without the options for its output and without the
    folders of this machine."""
    shown: list[str] = []
    rest = iter(arguments[1:])
    for argument in rest:
        if argument in ("--json", "--plot"):
            next(rest, None)
        elif not argument.startswith(("--json=", "--plot=")):
            path = Path(argument)
            shown.append(path.name if path.is_absolute() else argument)
    script = Path(arguments[0]).name
    return shlex.join(["python", f"benchmarks/{script}", *shown])


# ------------------------------------------------------------------------------------- the machine


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


_LOAD_BEFORE = _load()


def this_machine(device: str = "cpu") -> HostAndDevice:
    """This machine with the `device` that the benchmark computes on."""
    name, memory = "CPU", None
    kind = device.partition(":")[0]
    if kind != "cpu":
        import torch

        from onewan.devices import device_name, total_and_free_memory

        name = device_name(torch.device(device))
        memory, _ = total_and_free_memory(torch.device(device))
    return HostAndDevice(
        cpu=cpu_name(),
        cores=available_cores(),
        ram=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.machine()}",
        device=name,
        device_type=kind,
        device_memory=memory,
        load_before=_LOAD_BEFORE,
        load_after=_load(),
    )


def available_cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """As its maker calls it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of Python and of the packages that a figure depends on."""
    found = {"python": platform.python_version()}
    found |= {package: _version(package) for package in PACKAGES}
    if "torch" in sys.modules:
        # With the build, such as +cpu or +cu130.
        found["torch"] = str(sys.modules["torch"].__version__)
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def as_case(**values: Any) -> dict[str, CaseValue]:
    """A case, whose keys are column titles: underscores are spaces."""
    return {key.replace("_", " "): value for key, value in values.items()}
