"""Overhead of a training step of onewan, compared with a bare PyTorch loop.

Both train the same LoRA with PEFT and AdamW on the same diffusers transformer architecture and the
same batch, in one process, one step of each at a time. The bare loop only adds noise and calls
forward, backward and step. onewan's step is that of a run: it reads the batch from the cache in the
background, draws t and noise from derived seeds, clips the gradient norm, checks that it is finite,
and writes the event. The order within each pair of steps is random, so that changes in the
machine's speed affect both loops equally. Prints the medians and their ratio: of T2V-A14B, which is
to stay within 1.03 (otherwise the exit status is 1), and of smaller clips and of TI2V-5B, where a
step is so short that what onewan does around the model counts for more.

    python benchmarks/train_step.py [--steps 41] [--width 512] [--only-main] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bare_loop import Clip, bare_step
from diffusers import WanTransformer3DModel

from onewan.config.load import load_run
from onewan.demo.clips import write_clips
from onewan.demo.tiny_model import write_tiny_model
from onewan.dtypes import torch_dtype
from onewan.runs.event_file import EventFile
from onewan.runs.events import StepDone
from onewan.train.run import Run
from onewan.train.setup import WanModelSetup
from onewan.train.step import train_step
from onewan.variants import VARIANTS, VariantName

LIMIT = 1.03
RUN_FILE = """
model: {{path: model, variant: {variant}, experts: {experts}, dtype: {dtype}, device: {device}}}
wan_config: {{max_frames: 17}}
video_data: {{sources: [{{path: clips}}], resolution: "{side}x{side}"}}
method: {{kind: lora, rank: 32}}
train: {{steps: 1000000, batch_size: 1}}
memory: {{gradient_checkpointing: false}}
"""


def onewan_loop(run: Run, file: EventFile) -> Callable[[], None]:
    """A step of a run, as the trainer executes it."""
    steps = run.loader.steps(0, run.config.train.steps, run.schedule.expert_at)

    def step() -> None:
        begin = time.perf_counter()
        chosen = next(steps)
        metrics = train_step(run, chosen)
        file.write(
            StepDone(
                step=chosen.number,
                expert=chosen.expert,
                loss=metrics.loss,
                grad_norm=metrics.grad_norm,
                lr=metrics.lr,
                t=metrics.t,
                seconds=time.perf_counter() - begin,
            )
        )

    return step


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What both loops train."""

    variant: VariantName
    width: int
    """Channels of the transformer."""
    layers: int
    side: int
    """Of the video, pixels."""
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Seconds of the steps of both loops."""

    case: Case
    tokens: int
    seconds: dict[str, list[float]]

    @property
    def medians(self) -> dict[str, float]:
        return {loop: statistics.median(values) for loop, values in self.seconds.items()}

    @property
    def ratio(self) -> float:
        """Of the medians: onewan's over the bare loop's."""
        return self.medians["onewan"] / self.medians["bare"]

    @property
    def ratio_of_neighbors(self) -> float:
        """The median ratio of steps that ran one after the other."""
        pairs = zip(self.seconds["onewan"], self.seconds["bare"], strict=True)
        return statistics.median(ours / bare for ours, bare in pairs)


def compare(case: Case, steps: int, device: str) -> Result:
    """Train with both loops, one step of each at a time."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in write_clips(folder / "clips")[1:]:
            file.unlink()  # one clip, so that each step of both loops trains on the same batch
        write_tiny_model(folder / "model", case.variant, width=case.width, layers=case.layers)
        (folder / "run.yaml").write_text(
            RUN_FILE.format(
                variant=case.variant,
                experts="both" if len(VARIANTS[case.variant].experts) == 1 else "high",
                dtype=case.dtype,
                device=device,
                side=case.side,
            ),
            encoding="utf-8",
        )
        run = WanModelSetup(load_run(folder / "run.yaml")).build()
        assert len(run.dataset.clips) == 1
        batch = run.loader.validation_batches(run.dataset.clips, 1)[0].to(run.device)
        assert batch.text is not None, "no embedding is trained, so the cache contains the text"
        # As onewan: the clip has one timestep for all tokens where no first frame is kept.
        clip = Clip(latents=batch.latents, text=batch.text, condition=batch.condition)
        dtype = torch_dtype(case.dtype)
        bare_model: Any = WanTransformer3DModel.from_pretrained(
            folder / "model" / "transformer", torch_dtype=dtype
        )
        bare_model.to(device=run.device)
        with EventFile(folder / "events.jsonl") as events:
            loops = {
                "bare": bare_step(bare_model, clip, dtype),
                "onewan": onewan_loop(run, events),
            }
            seconds = measure(loops, steps, run.device)
    return Result(case=case, tokens=clip.tokens, seconds=seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=41, help="timed steps of each loop")
    parser.add_argument("--width", type=int, default=512, help="channels of the transformer")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--side", type=int, default=128, help="side of the video, pixels")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only-main", action="store_true", help="only the case with the limit")
    # One thread: with two, which wait for each other, the ratio varied by 0.04 on a shared machine.
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    main_case = Case(
        variant="t2v-a14b",
        width=options.width,
        layers=options.layers,
        side=options.side,
        dtype=options.dtype,
    )
    others = [
        replace(main_case, side=options.side // 2),
        replace(main_case, variant="ti2v-5b"),
        replace(main_case, variant="ti2v-5b", side=options.side * 2),
    ]
    results: list[Result] = []
    for case in [main_case] if options.only_main else [main_case, *others]:
        results.append(compare(case, options.steps, options.device))
        show(results[-1])
    if options.json:
        content = {
            "ratio": results[0].ratio,
            "results": [{**asdict(r), "ratio": r.ratio} for r in results],
            "threads": options.threads,
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        }
        options.json.write_text(json.dumps(content, indent=2), encoding="utf-8")
    print(f"limit for the first one: {LIMIT}")
    return int(results[0].ratio > LIMIT)


def show(result: Result) -> None:
    """Print what was measured."""
    case, medians = result.case, result.medians
    print(
        f"{case.variant}, width {case.width}, {case.layers} blocks, {result.tokens} tokens, "
        f"{case.dtype}: bare loop {medians['bare']:.3f} s/step, onewan {medians['onewan']:.3f}; "
        f"ratio of medians {result.ratio:.3f}, of neighboring steps "
        f"{result.ratio_of_neighbors:.3f}",
        flush=True,
    )


def measure(
    loops: dict[str, Callable[[], None]], steps: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each timed step of each loop, after two steps of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    order = random.Random(0)
    for number in range(steps + 2):
        for name in order.sample(sorted(loops), len(loops)):
            begin = time.perf_counter()
            loops[name]()
            if device.type != "cpu":
                torch.get_device_module(device).synchronize(device)
            if number >= 2:
                times[name].append(time.perf_counter() - begin)
    return times


if __name__ == "__main__":
    sys.exit(main())
