"""One run, trained by one process and by several, and how their results are compared."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from onewan.config.load import load_run
from onewan.config.schema import ResolvedRun
from onewan.data.loader import StepBatches
from onewan.devices import HOST
from onewan.errors import TrainingError
from onewan.parallel.ranks import join
from onewan.runs.event_file import read_events
from onewan.train import steps
from onewan.train.run import Run
from onewan.train.setup import WanModelSetup
from onewan.train.step import StepMetrics, whole_gradients
from onewan.train.trainable_files import saved_averages, saved_optimizer, saved_weights
from onewan.train.trainer import WanTrainer
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
    "settings": ("step", "name", "old", "new"),
}
"""Fields of events that do not depend on time or on the place of the run's folder."""


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Trains runs of one variant with the same settings, each in a folder of its own."""

    run_file: RunFile
    folder: Path
    variant: str
    settings: Sequence[str]

    def train(
        self,
        name: str,
        processes: int = 1,
        *extra: str,
        resume: bool = False,
        stop_after: int | None = None,
        change_after: tuple[int, dict[str, Any]] | None = None,
    ) -> ResolvedRun:
        """Train the run `name` in so many processes, with `extra` settings; its run file."""
        overrides = [*self.settings, *extra, f"output.dir={(self.folder / name).as_posix()}"]
        config = self.run_file(self.variant, *overrides)
        path = self.folder / "run.yaml"
        arguments = (path, overrides, resume, stop_after, change_after)
        if processes == 1:
            train(*arguments)
        else:
            together(processes, train, *arguments)
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


def vectors(config: ResolvedRun) -> dict[str, torch.Tensor]:
    """All numbers of each part of states and of each exported file, one after another, as float64.
    It makes no difference whether a state has shards or whole tensors."""
    layout, found = layout_of(config), dict[str, Any]()
    for step in layout.saved_steps():
        state = layout.state(step)
        for file in state.glob("*_optimizer.pt"):
            name = file.name.removesuffix("_optimizer.pt")
            found[f"{step}/{name}"] = saved_weights(state, name, None)
            found[f"{step}/{name}_ema"] = saved_averages(state, name, None, required=False) or {}
            found[f"{step}/{name}_optimizer"] = saved_optimizer(state, name, None).weights
    found |= {path.name: load_file(path) for path in layout.weights_dir.rglob("*.safetensors")}
    return {
        name: torch.cat([t.flatten().double() for _, t in sorted(leaves(content, ""), key=_first)])
        for name, content in found.items()
        if content
    }


def _first(pair: tuple[str, torch.Tensor]) -> str:
    return pair[0]


def assert_close(one: ResolvedRun, other: ResolvedRun, tolerance: float) -> None:
    """What each event tells, and each file as a whole, is the same within `tolerance`, relative.

    Not each tensor: Adam gives steps of full size to weights whose gradients are rounding error.
    """
    for kind in RESULTS:
        (first, second) = events(one, kind), events(other, kind)
        assert len(first) == len(second)
        for pair in zip(first, second, strict=True):
            for mine, theirs in zip(*pair, strict=True):
                # What is added for kept predictions is near zero at first, and rounding error then.
                alike = mine == theirs or mine == pytest.approx(theirs, rel=tolerance, abs=1e-8)
                assert alike, (kind, *pair)
    first, second = vectors(one), vectors(other)
    assert first.keys() == second.keys() and first
    distances = {name: distance(first[name], second[name]) for name in first}
    too_far = {name: far for name, far in distances.items() if not far <= tolerance}
    assert not too_far, too_far


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


def first_gradients(
    run_yaml: Path,
    overrides: Sequence[str],
    also: Callable[[Run, StepBatches], dict[str, torch.Tensor]] | None = None,
) -> dict[str, torch.Tensor]:
    """The gradients of the first step of a run, summed over its processes, its loss, and what
    `also` finds after the backward pass."""
    config = load_run(run_yaml, list(overrides))
    with join(HOST, 60.0) as ranks:
        run = WanModelSetup(config, ranks=ranks).build()
        expert = run.schedule.expert_at(0)
        step = run.loader.step(0, *expert, run.part)
        trainables = run.state.trainables_of(expert[0])
        losses = whole_gradients(run, step, run.bring_expert(expert[0]), trainables)
        own = sum(map(float, [*losses.losses, *losses.preservation]))
        # Those that share the tokens of clips have the same loss.
        every = ranks.gathered(own)
        found = {"loss": torch.tensor(sum(every[:: run.division.sequence]))}
        if also is not None:
            found |= also(run, step)
        for trainable in trainables:
            for name, parameter in trainable.weights.parameters.items():
                gradient: Any = parameter.grad
                if trainable.sharding is not None and name in trainable.sharding.shapes:
                    shape = trainable.sharding.shapes[name]
                    gradient = trainable.sharding.group.sharded(gradient, shape).full_tensor()
                if gradient is not None:
                    found[f"{trainable.name}:{name}"] = gradient
        return found


def first_gradients_in_small_messages(
    run_yaml: Path, overrides: Sequence[str], *more: Any
) -> dict[str, torch.Tensor]:
    """The same in one of several processes. Many of their messages leave during the backward pass,
    in which those of so small a model are not large enough for one otherwise."""
    from onewan.parallel import bucket_sums

    bucket_sums.SUM_NUMBERS = 2000
    return first_gradients(run_yaml, overrides, *more)


def failure_with_a_damaged_clip(run_yaml: Path, overrides: Sequence[str], *ranks: int) -> str:
    """Train with a clip that is not finite on some of the processes; how this one's run ends."""
    plain = steps.train_step

    def damaged(run: Run, step: StepBatches) -> StepMetrics:
        if step.number == 1 and run.ranks.rank in ranks:
            step.batches[0].latents[0, 0, 0, 0, 0] = float("nan")
        return plain(run, step)

    steps.train_step = damaged
    try:
        WanTrainer(load_run(run_yaml, list(overrides))).fit()
    except TrainingError as error:
        return str(error)
    return "no error"
