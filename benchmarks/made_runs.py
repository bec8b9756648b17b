"""Run folders with made-up numbers, of any length, for benchmarks and tests of what reads them.

Nothing is trained: losses fall and scatter as those of real runs do, and all events have the fields
of `onewan.runs.events`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from onewan.media import write_video
from onewan.runs import events
from onewan.runs.layout import RunLayout

BEGIN = datetime(2026, 11, 1, 8, 0, tzinfo=timezone.utc)
PROMPTS = ("a red fox runs through deep snow", "a lighthouse in a storm at night")


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeRun:
    """What a made-up run is like."""

    steps: int = 400
    experts: tuple[str, ...] = ("high", "low")
    lr: float = 1e-4
    rank: int = 32
    sample_steps: Sequence[int] = ()
    """Steps after which a video of each prompt is sampled."""
    distinct_samples: int | None = None
    """After how many of them the files are copies of earlier ones, which takes less time."""
    prompts: Sequence[str] = PROMPTS
    validate_every: int = 100
    """0 validates never."""
    on_device: bool = True
    """Whether steps have the peak of device memory, and the run a plan."""
    end: str = "finished"
    """Kind of the last event; empty for a run that was killed."""
    seed: int = 0


class EventLines:
    """Events as lines of the file, each with its time."""

    def __init__(self) -> None:
        self.now = BEGIN
        self.lines: list[str] = []

    def add(self, event: events.Event, seconds: float = 0.0) -> None:
        """Append `event`, `seconds` after the one before."""
        self.now += timedelta(seconds=seconds)
        time = self.now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line: dict[str, Any] = {"event": event.kind, "time": time, **event.fields()}
        self.lines.append(json.dumps(line, default=str))

    def write(self, path: Path) -> None:
        path.write_text("".join(f"{line}\n" for line in self.lines), encoding="ascii")


def write_run(folder: Path, made: MadeRun) -> RunLayout:
    """Write the folder of a run, without states and weights."""
    layout = RunLayout(folder)
    layout.create()
    text = run_text(made)
    layout.run_file.write_text(text, encoding="utf-8")
    layout.resolved.write_text(text, encoding="utf-8")
    lines = EventLines()
    begin_events(lines, layout, made)
    step_events(lines, layout, made, range(made.steps + 1))
    if made.end == "finished":
        lines.add(events.Finished(step=made.steps, run=folder))
    elif made.end == "failed":
        lines.add(events.Failed(error="train.steps: the loss is not finite\n  lower optimizer.lr"))
    elif made.end == "stopped":
        lines.add(events.Stopped(step=made.steps))
    lines.write(layout.events)
    clips = [
        {"line": "counts", "clips": 3, "listed": 3, "held_out": 0, "left_out": 1},
        *(
            {"line": "clip", "name": f"{n}.mp4", "path": f"/clips/{n}.mp4", "kind": "video"}
            | {"start": 0.0, "end": 5.0, "fps": 16.0, "frames": 81, "width": 832, "height": 480}
            | {"captions": [f"clip number {n}"], "held_out": False}
            for n in range(3)
        ),
        {"line": "left out", "path": "/clips/bad.mp4", "reason": "is empty (0 bytes)"},
    ]
    layout.clips.write_text("".join(f"{json.dumps(c)}\n" for c in clips), encoding="utf-8")
    return layout


def run_text(made: MadeRun) -> str:
    """A resolved run file, with the settings that a page shows."""
    prompts = "".join(f"  - prompt: {json.dumps(prompt)}\n" for prompt in made.prompts)
    variant = "ti2v-5b" if made.experts == ("single",) else "t2v-a14b"
    return (
        f"model:\n  path: /models/wan\n  variant: {variant}\n"
        f"method:\n  kind: lora\n  rank: {made.rank}\n"
        f"optimizer:\n  name: adamw\n  lr: {made.lr}\n"
        f"train:\n  steps: {made.steps}\n  seed: {made.seed}\n"
        f"sample:\n  prompts:\n{prompts}"
    )


def begin_events(lines: EventLines, layout: RunLayout, made: MadeRun) -> None:
    """What a process reports before its first step."""
    lines.add(events.Started(run=layout.root, steps=made.steps, pid=4711, hostname="trainer"))
    lines.add(
        events.Environment(
            system="Linux 6.8, x86_64",
            device="NVIDIA RTX 4090" if made.on_device else "cpu",
            device_memory=24 * 10**9 if made.on_device else None,
            packages={"python": "3.12.3", "onewan": "0.1.0", "torch": "2.13.0"},
        ),
        2,
    )
    lines.add(
        events.DataReady(clips=3, encoded=3, report=["3 clips (3 videos)"], steps=made.steps), 60
    )
    if made.on_device:
        lines.add(
            events.MemoryPlanned(
                device_peak=int(21.4e9),
                device_memory=int(24e9),
                host_peak=int(48e9),
                phase="training",
                plan={},
            )
        )
    each = made.steps // len(made.experts)
    lines.add(
        events.Overview(
            steps=dict.fromkeys(made.experts, each),
            clips=3,
            expert_clips=dict.fromkeys(made.experts, 3),
            seen=dict.fromkeys(made.experts, each / 3),
            parameters=dict.fromkeys(made.experts, 76_000_000),
            disk={},
            step_seconds=4.2 if made.on_device else None,
            run_seconds=4.2 * made.steps if made.on_device else None,
            weights=layout.weights_dir,
            samples=layout.samples_dir,
        )
    )
    lines.add(events.Warned(text="clip 2.mp4: colors without tags, read as BT.601"))


def step_events(lines: EventLines, layout: RunLayout, made: MadeRun, steps: Iterable[int]) -> None:
    """Steps with their validations and samples; 0 has these only."""
    random = Random(made.seed)
    for step in steps:
        if step > 0:
            expert = made.experts[(step // 10) % len(made.experts)]
            lines.add(one_step(random, made, step, expert), 4.2)
        if made.validate_every and step % made.validate_every == 0:
            for name in made.experts:
                loss = (
                    0.09 + 0.03 * math.exp(-3 * step / max(1, made.steps)) + random.gauss(0, 5e-4)
                )
                lines.add(
                    events.Validated(
                        step=step, expert=name, loss=loss, ema=None, base=0.13, held_out=True
                    ),
                    20,
                )
        if step in made.sample_steps:
            place = made.sample_steps.index(step)
            for number, prompt in enumerate(made.prompts):
                path = layout.samples(step) / f"{number}.mp4"
                if made.distinct_samples is None or place < made.distinct_samples:
                    write_sample(path, step / max(1, made.steps), number)
                else:
                    earlier = made.sample_steps[place % made.distinct_samples]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(layout.samples(earlier) / path.name, path)
                lines.add(events.Sampled(step=step, file=path, prompt=prompt), 90)


def one_step(random: Random, made: MadeRun, step: int, expert: str) -> events.StepDone:
    """The event of one step, whose loss depends on its timestep."""
    low, high = {"high": (0.875, 1.0), "low": (0.0, 0.875)}.get(expert, (0.0, 1.0))
    t = low + (high - low) * random.betavariate(2, 1.2)
    loss = (0.05 + 0.1 * (1 - t) + 0.06 * math.exp(-4 * step / made.steps)) * random.uniform(
        0.6, 1.5
    )
    if step % 997 == 0:
        loss *= 20  # a spike, which no plot may lose
    seconds = 4.0 + abs(random.gauss(0, 0.3))
    return events.StepDone(
        step=step,
        expert=expert,
        loss=loss,
        grad_norm=0.2 * math.exp(random.gauss(0, 0.6)),
        lr=made.lr * min(1.0, step / 20) * (1 - 0.9 * step / made.steps),
        t=[t],
        seconds=seconds,
        memory_allocated=int(15e9) if made.on_device else None,
        memory_peak=int(20.9e9) if made.on_device else None,
        step_memory_peak=int(20.5e9 + 3e8 * random.random()) if made.on_device else None,
        tokens_per_second=32760 / seconds,
        tflops=180 / seconds if made.on_device else None,
    )


def write_sample(path: Path, progress: float, number: int) -> None:
    """A small video in which a square moves, clearer with more `progress` (0 to 1)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(number)
    frames = np.full((17, 64, 96, 3), 40, np.float64)
    for index, frame in enumerate(frames):
        left = 4 + 4 * index if number % 2 == 0 else 72 - 4 * index
        frame[20:44, left : left + 20] = (230, 120, 40) if number % 2 == 0 else (60, 140, 230)
    noise = random.normal(0, 90, frames.shape) * (1 - progress)
    write_video(path, np.clip(frames + noise, 0, 255).astype(np.uint8), 16)
