"""How well batches of videos of many shapes use the device: fill, waste, memory, speed.

A folder of clips with the shapes and lengths of phones, cameras and films is planned as a run plans
it: each clip gets a size of about the run's area and a number of frames, and a batch has clips of
one shape. For each batch size this says

- how many places of the batches are taken, since the last batch of a shape may be smaller;
- what share of the tokens would be padding, if batches took clips in any order and padded them to
  their largest member, as they come and in order of their number of tokens; batches of one shape
  have none;
- the device's peak for each sample of the largest batch, beside the plan's;
- the samples per second of an epoch, with the transformer's steps as the trainer executes them.

    python benchmarks/batching.py [--batch 1 2 4 8] [--clips FOLDER] [--json FILE]
    python benchmarks/batching.py --device cuda --true-size --resolution 480p --clips FOLDER
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from figures import Chart, Figure, Value, add_output_options, measured_here, print_values, save
from measuring import clock, clock_name, peak_of, release, simulated_device
from small_runs import SmallRuns, add_scale_options, build, scale_in_words, step_of, write_runs

from onewan.data.clip import Clip
from onewan.devices import device_memory
from onewan.media.write import write_video

BATCHES = (1, 2, 4, 8)
SHAPES = (
    ((16, 9), 12), ((9, 16), 8), ((4, 3), 5), ((1, 1), 4), ((239, 100), 3),
)  # fmt: skip
"""Aspect ratios, and how many of 32 clips have each."""
SECONDS = (1.1, 1.5, 2.1, 3.2)
"""Durations, in turn."""
SEED = 0


def write_clips(folder: Path, longest_side: int = 160) -> None:
    """Videos of `SHAPES` and `SECONDS`, whose pictures don't matter."""
    folder.mkdir(parents=True)
    number = 0
    for (across, up), count in SHAPES:
        scale = longest_side / max(across, up)
        width, height = (round(side * scale / 2) * 2 for side in (across, up))
        for _ in range(count):
            frames = np.zeros(
                (round(SECONDS[number % len(SECONDS)] * 16), height, width, 3), np.uint8
            )
            frames[..., number % 3] = 5 * number
            write_video(folder / f"{number:02}.mp4", frames, 16)
            (folder / f"{number:02}.txt").write_text("a color", encoding="utf-8")
            number += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Waste:
    """Shares of what a device computes that are of no clip."""

    empty: float
    """Of the places of batches of one shape, if all had the full size. Nothing is computed for
    them: the last batch of a shape is smaller."""
    padded: float
    """Of the tokens, if clips were batched in any order and padded to the largest."""
    padded_in_order: float
    """The same, with clips in order of their number of tokens."""


def waste(clips: Sequence[Clip], batch: int) -> Waste:
    """Of one epoch."""
    shapes = Counter((clip.frames, clip.size) for clip in clips)
    places = sum(-(-count // batch) * batch for count in shapes.values())
    in_any_order = list(clips)
    random.Random(SEED).shuffle(in_any_order)
    in_order = sorted(clips, key=lambda clip: (volume(clip), clip.name))
    return Waste(
        empty=1 - len(clips) / places,
        padded=padding(in_any_order, batch),
        padded_in_order=padding(in_order, batch),
    )


def volume(clip: Clip) -> int:
    """Tokens but for a factor: pixels of latent frames."""
    return ((clip.frames - 1) // 4 + 1) * clip.size[0] * clip.size[1]


def padding(clips: Sequence[Clip], batch: int) -> float:
    """The share of tokens that are padding, where each batch has the frames, the width and the
    height of the largest of its clips."""
    used = padded = 0
    for first in range(0, len(clips), batch):
        group = clips[first : first + batch]
        frames = max((clip.frames - 1) // 4 + 1 for clip in group)
        width, height = (max(clip.size[side] for clip in group) for side in (0, 1))
        padded += frames * width * height * len(group)
        used += sum(map(volume, group))
    return 1 - used / padded


def measured(
    runs: SmallRuns, counted: SmallRuns, batch: int, clips: str, resolution: str
) -> list[Value]:
    """One batch size: `runs` are timed, and `counted` say what memory they take."""
    case = {"batch size": batch}
    run = build(runs.config(batch_size=batch, clips=clips, resolution=resolution))
    (experts,) = {len(run.state.experts)}
    epoch = sum(run.loader.batches_per_epoch.values())
    step = step_of(run)
    step()
    rates: list[float] = []
    for _ in range(2):
        begin = clock(runs.device)
        for _ in range(epoch):
            step()
        rates.append(experts * len(run.dataset.clips) / (clock(runs.device) - begin))
    found = waste(run.dataset.clips, batch)
    values = [
        Value(case=case, measure="samples per second", unit="1/s", repeats=tuple(rates)),
        Value(case=case, measure="batches per epoch", repeats=(epoch,)),
        Value(case=case, measure="places taken", repeats=(1 - found.empty,)),
        Value(case=case, measure="padding", repeats=(0.0,)),
        Value(case=case, measure="padding, clips in any order", repeats=(found.padded,)),
        Value(case=case, measure="padding, clips in order", repeats=(found.padded_in_order,)),
    ]
    del run, step
    release(counted.device)
    before = device_memory(counted.device)[0] or 0
    flash = "memory.attention=flash"
    run = build(counted.config(flash, batch_size=batch, clips=clips, resolution=resolution))
    step = step_of(run)
    step()
    peak = peak_of(lambda: [step() for _ in range(epoch)], counted.device)
    if peak is not None and run.memory.plan is not None:
        planned = max(bucket.training.device_bytes for bucket in run.memory.plan.buckets)
        values.append(
            Value(
                case=case,
                measure="device peak / batch size",
                unit="MB",
                repeats=((peak - before) / batch / 1e6,),
                expected=planned / batch / 1e6,
            )
        )
    return values


def with_ratios(values: Sequence[Value]) -> list[Value]:
    """Samples per second relative to those of the smallest batch."""
    rates = [value for value in values if value.measure == "samples per second"]
    one = rates[0]
    name = f"batch size {one.case['batch size']}"
    return [
        Value(
            case=value.case, measure=value.measure, unit=value.unit, repeats=value.repeats,
            expected=one.median, baseline=name, ratio=value.median / one.median,
        )
        if value in rates
        else value
        for value in values
    ]  # fmt: skip


def figure_of(values: Sequence[Value], runs: SmallRuns, what: str, clips: int) -> Figure:
    return measured_here(
        name="batching",
        title="Batches of videos of many shapes",
        measured=(
            f"{clips} clips of five aspect ratios and four durations, or those that the command "
            f"names, in batches of one shape; {what} at most. Seconds are "
            f"{clock_name(runs.device)} of epochs. Padding is what batches of clips of several "
            "shapes would need, each padded to its largest clip; onewan's have none. Beside the "
            "samples per second stands the rate of the smallest batch, and beside the peak of a "
            "step the plan's."
        ),
        values=values,
        charts=[
            Chart(
                measure="samples per second", title="Samples per second of an epoch of many shapes"
            ),
            Chart(measure="places taken", title="Share of the places of batches that are taken"),
            Chart(
                measure="padding, clips in any order",
                title="Tokens that would be padding without buckets, clips in any order (here: 0)",
            ),
            Chart(
                measure="device peak / batch size",
                title="Peak of device memory for each sample of a batch",
            ),
        ],
        arithmetic="by arithmetic",
        device=str(runs.device),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES), help="batch sizes")
    parser.add_argument("--clips", type=Path, help="clips of your own (default: drawn ones)")
    parser.add_argument("--resolution", default="64", help="of the clips, as in a run file (64)")
    add_scale_options(parser, width=128, layers=2, size=(33, 64, 64))
    add_output_options(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sim = simulated_device() if options.device == "cpu" else None
    values: list[Value] = []
    with tempfile.TemporaryDirectory() as folder:
        runs = write_runs(options, Path(folder))
        counted = runs
        if sim is not None:
            counted = replace(runs, device=sim)
        many: Path = options.clips or runs.folder / "clips" / "many"
        if not options.clips:
            write_clips(many)
        for batch in sorted(options.batch):
            clips = many.resolve().as_posix()
            values += measured(runs, counted, batch, clips, options.resolution)
        values = with_ratios(values)
        count = sum(1 for file in many.iterdir() if file.suffix != ".txt")
        figure = figure_of(values, runs, scale_in_words(runs, options), count)
    print_values(figure, "batch size")
    save(figure, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
