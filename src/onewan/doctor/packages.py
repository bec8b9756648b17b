"""The packages that onewan needs or can use: which are installed, and what gives a missing one."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

OPTIONAL: Mapping[str, str] = {
    "flash-attn": "memory.attention: flash_attn, on CUDA and ROCm",
    "flash-attn-3": "memory.attention: flash_attn_3, on NVIDIA's Hopper cards",
    "xformers": "memory.attention: xformers, on CUDA and ROCm",
    "triton": "memory.compile on a card",
    "bitsandbytes": "optimizer.name: adamw_8bit",
    "torchao": "optimizer.name: adamw_low_bit and adamw_cpu_offload",
    "prodigyopt": "optimizer.name: prodigy",
    "lion-pytorch": "optimizer.name: lion",
    "schedulefree": "optimizer.name: adamw_schedule_free",
    "prodigy-plus-schedule-free": "optimizer.name: prodigy_plus_schedule_free",
    "came-pytorch": "optimizer.name: came",
    "adam-mini": "optimizer.name: adam_mini",
    "pytorch-optimizer": "optimizer.name: custom, with more than a hundred optimizers",
    "scenedetect": "better changes of scene for wan_config.avoid_cuts and the strategy keyframe",
    "pillow-heif": "photos in heic and heif",
    "pyarrow": "tables of clips in parquet",
    "aiohttp": "sources of clips at https:// addresses",
    "wandb": "a record of each run at Weights & Biases",
    "nicegui": "the page of onewan serve",
    "uvicorn": "the page of onewan serve",
    "websockets": "the page of onewan serve",
    "markdown-it-py": "the documentation on the page of onewan serve",
}
"""What each package gives that only some runs need: those of the extras, and others that are used
where they are installed."""

_OTHER_INSTALLATIONS = {
    "flash-attn-3": "built from the folder hopper of https://github.com/Dao-AILab/flash-attention",
    "triton": "with torch for a card on Linux, or pip install triton-windows",
}
_NOT_FOR_USERS = ("all", "dev", "docs")
"""Extras that repeat the others, or that are for work on onewan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What the installed package says that it needs."""

    required: Mapping[str, str] = field(default_factory=dict[str, str])
    """Versions such as ">=2.6" by package."""
    extras: Mapping[str, str] = field(default_factory=dict[str, str])
    """The extra that installs an optional package, by package."""


def read_requirements() -> Requirements:
    """The requirements in the metadata of the installed onewan; none if it is not installed."""
    try:
        lines = importlib.metadata.requires("onewan") or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    required, extras = dict[str, str](), dict[str, str]()
    for line in lines:
        requirement, _, marker = line.partition(";")
        found = re.match(r"([\w.-]+)(?:\[[^\]]*\])?\s*(.*)", requirement.strip())
        assert found is not None
        name, extra = found[1], re.search(r"extra == ['\"]([^'\"]+)['\"]", marker)
        if extra is None:
            required[name] = found[2]
        elif name != "onewan" and extra[1] not in _NOT_FOR_USERS:
            extras.setdefault(name, extra[1])
    return Requirements(required=required, extras=extras)


def installed_version(name: str) -> str:
    """The version of an installed package; empty if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version is one of those that are wanted, such as ">=2.6"."""
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # a dependency of most packages, whose absence is reported
        return True
    return SpecifierSet(wanted).contains(version, prereleases=True)


def installation_lines(missing: list[str], extras: Mapping[str, str]) -> Iterator[str]:
    """Lines about packages that are not there: for each way to install some of them, how that is
    done, and below it what each would give."""
    ways: dict[str, list[str]] = {}
    for name in missing:
        extra = extras.get(name)
        way = _OTHER_INSTALLATIONS.get(name, f"with pip install {name}")
        ways.setdefault(f'with pip install "onewan[{extra}]"' if extra else way, []).append(name)
    width = max(map(len, missing), default=0)
    for way, names in ways.items():
        yield f"{way}:"
        for name in names:
            yield f"  {name:<{width}}  {OPTIONAL.get(name, 'an extra')}"
