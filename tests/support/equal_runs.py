"""One run, trained by one process and by several, and how their results are compared."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from onewan.config.schema import ResolvedRun
from onewan.runs.event_file import read_events
from support.runs import METHODS, RunFile, layout_of, leaves
from support.torchrun import together, train

RESULTS = {
    "step": (
        "step",
        "expert",
        "loss",
        "preservation_loss",
        "grad_norm",
        "lr",
        "embeddings_lr",
        "t",
    ),
    "validation": ("step", "expert", "loss", "ema", "base", "held_out"),
    "best": ("step", "loss"),
    "saved": ("step",),
}
"""Fields of events that do not depend on time or on the place of the run's folder."""


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Trains runs of one variant with the same settings, each in a folder of its own."""

    run_file: RunFile
    folder: Path
    variant: str
    settings: Sequence[str]
    resolved: dict[str, ResolvedRun] = field(default_factory=dict)

    def train(
        self,
        name: str,
        processes: int = 1,
        *extra: str,
        resume: bool = False,
        stop_after: int | None = None,
    ) -> ResolvedRun:
        """Train the run `name` in so many processes, with `extra` settings; its run file."""
        overrides = [*self.settings, *extra, f"output.dir={(self.folder / name).as_posix()}"]
        config = self.run_file(self.variant, *overrides)
        path = self.folder / "run.yaml"
        if processes == 1:
            train(path, overrides, resume, stop_after)
        else:
            together(processes, train, path, overrides, resume, stop_after)
        return config


def events(config: ResolvedRun, kind: str) -> list[tuple[Any, ...]]:
    """The fields of `RESULTS` of each event of the kind."""
    found = [e for e in read_events(layout_of(config).events) if e["event"] == kind]
    return [
        tuple(tuple(e[name]) if isinstance(e[name], list) else e[name] for name in RESULTS[kind])
        for e in found
    ]


def notes(config: ResolvedRun) -> list[str]:
    return [e["text"] for e in read_events(layout_of(config).events) if e["event"] == "note"]


def files(config: ResolvedRun) -> dict[str, Path]:
    """All files of states and exported weights, by their paths below the run's folder."""
    layout = layout_of(config)
    found = [*layout.states_dir.rglob("*"), *layout.weights_dir.rglob("*")]
    return {
        path.relative_to(layout.root).as_posix(): path
        for path in found
        if path.is_file() and path.name != "manifest.json"
    }


def assert_equal_files(one: ResolvedRun, other: ResolvedRun) -> None:
    """States and exports have the same bytes, but for the run's folder and the time of exports."""
    first, second = files(one), files(other)
    assert first.keys() == second.keys() and any(name.startswith("weights") for name in first)
    for name, path in first.items():
        if path.name != "state.json":
            assert _undated(path) == _undated(second[name]), name
            continue
        facts, others = (json.loads(p.read_text("utf-8")) for p in (path, second[name]))
        for each in (facts, others):
            del each["config"]["output"]["dir"], each["overrides"]
        assert facts == others, name


def _undated(file: Path) -> bytes:
    """The bytes of a file, without the moment of an export."""
    return re.sub(rb'"modelspec.date":"[^"]*"', b"", file.read_bytes())


def assert_equal(one: ResolvedRun, other: ResolvedRun) -> None:
    """The same bits of everything that a run computes."""
    for kind in RESULTS:
        assert events(one, kind) == events(other, kind), kind
    assert_equal_files(one, other)


def tensors(config: ResolvedRun, suffix: str = "") -> dict[str, torch.Tensor]:
    """All tensors of states and exports, of files whose names end with `suffix`, as float64."""
    found: dict[str, torch.Tensor] = {}
    for name, path in files(config).items():
        if not name.endswith(suffix):
            continue
        if path.suffix == ".safetensors":
            found |= {f"{name}:{key}": tensor for key, tensor in load_file(path).items()}
        elif path.suffix == ".pt":
            found |= dict(leaves(torch.load(path, weights_only=True), name))
    return {name: tensor.double() for name, tensor in found.items()}


def assert_close(one: ResolvedRun, other: ResolvedRun, tolerance: float) -> None:
    """Everything that a run computes is the same within `tolerance`, relative."""
    for kind in RESULTS:
        pairs = list(zip(events(one, kind), events(other, kind), strict=True))
        assert all(_alike(a, b, tolerance) for pair in pairs for a, b in zip(*pair, strict=True))
    (first, second) = tensors(one), tensors(other)
    assert first.keys() == second.keys() and first
    far = {
        name: away for name in first if (away := distance(first[name], second[name])) > tolerance
    }
    assert not far


def _alike(one: Any, other: Any, tolerance: float) -> bool:
    return one == other or one == pytest.approx(other, rel=tolerance)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The norm of the difference, relative to that of `one`."""
    return float((one - other).norm() / one.norm().clamp(min=1e-30))


def settings_of(method: str, workshop: Path) -> list[str]:
    """A run of a method with an average, validation, best weights and states on the way."""
    source = "named clips" if method == "embedding" else "clips"
    return [
        *METHODS[method],
        f"video_data.sources=[{{path: {(workshop / source).as_posix()}}}]",
        "wan_config.max_frames=5",
        "train.switch_expert_every=1",
        "train.save_every=2",
        "train.keep_best=true",
        "train.ema={decay: 0.9}",
        "validation={clips: 2, every: 2}",
    ]
