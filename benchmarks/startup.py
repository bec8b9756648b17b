"""How long commands take to start: `onewan train` to its first step, and those that load no model.

Each is a process of its own on the demonstration's tiny model, whose clips are cached. Beside
training stands the shortest program that does a step with diffusers and PEFT, with one of the two
transformers: it imports the same packages, which take most of the time. What training spends it on
is measured in a further process (`startup_stages.py`). The order within a turn is random, so that
changes in the machine's speed affect all alike. CPU time is user and system time of all threads,
until the event of the first step is in ``events.jsonl``, or else until the process ends (Linux and
macOS).

    python benchmarks/startup.py [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from figures import Chart, Figure, Value, add_output_options, as_case, measured_here, save

from onewan.demo import write_demo
from onewan.runs.event_file import last_event
from onewan.runs.events import StepDone

LIMIT = 1.15
"""Of training's CPU time up to the first step, relative to the bare loop's. Training also reads the
run file and the clips, loads two experts, and measures the loss of the base model first."""
TRAIN, BARE = "onewan train, to the first step", "bare loop, one step"
BARE_LOOP = """
import sys
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from peft import LoraConfig

transformer = WanTransformer3DModel.from_pretrained(sys.argv[1], subfolder="transformer")
transformer.requires_grad_(False)
linears = r"blocks\\.\\d+\\.(attn[12]\\.(to_[qkv]|to_out\\.0)|ffn\\.net\\.(0\\.proj|2))"
transformer.add_adapter(LoraConfig(r=32, lora_alpha=32, target_modules=linears))
transformer.train()
parameters = [p for p in transformer.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=1e-4)
config = transformer.config
latents = torch.randn(2, config["in_channels"], 5, 10, 14)
noise, text = torch.randn_like(latents), torch.randn(2, 512, config["text_dim"])
t = torch.rand(2, 1, 1, 1, 1)
prediction = transformer((1 - t) * latents + t * noise, 1000 * t.flatten(), text)[0]
F.mse_loss(prediction, noise - latents).backward()
optimizer.step()
"""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of each start."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


def children_cpu() -> float:
    """CPU seconds of all child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def measure(times: Times, start: Callable[[], float]) -> None:
    """Add what `start`, which returns seconds of the wall clock, takes."""
    cpu = children_cpu()
    times.wall.append(start())
    times.cpu.append(children_cpu() - cpu)


def until_it_ends(command: Sequence[str], status: int = 0) -> float:
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    seconds = time.perf_counter() - begin
    if done.returncode != status:
        raise RuntimeError(f"{command}: exit status {done.returncode}: {done.stderr[-2000:]}")
    return seconds


def until_the_first_step(run_file: Path) -> float:
    """Train in a new run folder, and end the process once the first step is done."""
    name = f"run-{random.randrange(10**9)}"
    events = run_file.parent / "runs" / name / "events.jsonl"
    command = onewan("train", str(run_file), f"output.name={name}")
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while (last_event(events) or {}).get("event") != StepDone.kind:
            if process.poll() is not None:
                raise RuntimeError(f"{command}: ended before its first step")
            time.sleep(0.02)
        return time.perf_counter() - begin
    finally:
        process.kill()
        process.wait()


def onewan(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "onewan", *arguments]


def stages(run_file: Path) -> Mapping[str, float]:
    """CPU seconds of what a start does, in its order."""
    script = Path(__file__).with_name("startup_stages.py")
    command = [sys.executable, str(script), str(run_file)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(folder: Path, repeats: int) -> tuple[dict[str, Times], dict[str, list[float]]]:
    """Times of each command, and CPU seconds of each stage of training."""
    run_file = write_demo(folder, "t2v-a14b", print)
    wrong = folder / "wrong.yaml"
    wrong.write_text(run_file.read_text(encoding="utf-8") + "training: {}\n", encoding="utf-8")
    until_it_ends(onewan("cache", str(run_file)))
    model, run = str(folder / "model"), str(run_file)
    starts: dict[str, Callable[[], float]] = {
        "onewan --version": partial(until_it_ends, onewan("--version")),
        "onewan train, refusing a run file": partial(until_it_ends, onewan("train", str(wrong)), 1),
        "onewan plan": partial(until_it_ends, onewan("plan", run)),
        "onewan inspect, of a model": partial(until_it_ends, onewan("inspect", model)),
        "onewan doctor": partial(until_it_ends, onewan("doctor", run)),
        TRAIN: partial(until_the_first_step, run_file),
        BARE: partial(until_it_ends, [sys.executable, "-c", BARE_LOOP, model]),
    }
    times = {name: Times() for name in starts}
    of_stages: dict[str, list[float]] = {}
    order = random.Random(0)
    for _ in range(repeats):
        for name in order.sample(sorted(starts), len(starts)):
            measure(times[name], starts[name])
            print(f"{name}: {times[name].cpu[-1]:.2f} s of CPU, {times[name].wall[-1]:.2f} s")
        for stage, seconds in stages(run_file).items():
            of_stages.setdefault(stage, []).append(seconds)
    return times, of_stages


def figure_of(times: Mapping[str, Times], of_stages: Mapping[str, Sequence[float]]) -> Figure:
    """A row for each command, and one for each stage of training."""
    bare = times[BARE].cpu
    # Of pairs of the same turn: the machine's speed changes less within it.
    ratio = statistics.median(a / b for a, b in zip(times[TRAIN].cpu, bare, strict=True))
    values: list[Value] = []
    for name, taken in times.items():
        case = as_case(start=name)
        values += [
            Value(case=case, measure="CPU time", unit="s", repeats=tuple(taken.cpu)),
            Value(case=case, measure="wall-clock time", unit="s", repeats=tuple(taken.wall)),
        ]
    values.append(
        Value(
            case=as_case(start=TRAIN),
            measure="CPU time / bare loop's",
            repeats=(ratio,),
            limit=LIMIT,
        )
    )
    for stage, seconds in of_stages.items():
        case = as_case(start=f"train: {stage}")
        values.append(Value(case=case, measure="CPU time", unit="s", repeats=tuple(seconds)))
    return measured_here(
        name="startup",
        title="From the command to the first step",
        measured=(
            "The demonstration's tiny model with cached clips, a process for each start. Training "
            "ends with the first step's event; before it, the loss of the base model is measured. "
            "The bare loop imports diffusers and PEFT, loads one of the two transformers, and does "
            "a step. The stages of training were measured in further processes."
        ),
        values=values,
        charts=[Chart(measure="CPU time")],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="starts of each command (5)")
    add_output_options(parser)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        figure = figure_of(*measured(Path(folder), options.repeats))
    save(figure, options)
    for value in figure.values:
        print(f"{value.case['start']}: {value.measure} {value.median:.2f} {value.unit}")
    return 1 if figure.missed() else 0


if __name__ == "__main__":
    sys.exit(main())
