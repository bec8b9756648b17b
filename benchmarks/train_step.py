"""Steps per second of onewan, beside those of a bare PyTorch loop.

Both train the same LoRA with PEFT and AdamW on the same diffusers transformer architecture and the
same batch, in one process, one step of each at a time. The bare loop only adds noise and calls
forward, backward and step. onewan's step is that of a run: it reads the batch from the cache in the
background, draws t and noise from derived seeds, clips the gradient norm, checks that it is finite,
and writes the event. The order within each pair of steps is random, so that changes in the
machine's speed affect both loops equally, and the CPU's times are those of its work, not of the
clock. Prints the medians and their ratio: of T2V-A14B, which is to stay within 1.03 (otherwise the
exit status is 1), and of smaller clips and of TI2V-5B, where a step is so short that what onewan
does around the model counts for more. Beside them stand the steps per second that the operations
of a step would allow at the rate of a matrix product of the transformer's width.

    python benchmarks/train_step.py [--steps 41] [--width 512] [--only-main] [--json FILE]

`gpu.py` does the same at true size, with streamed blocks and full fine-tuning too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bare_loop import Clip, bare_step
from diffusers import WanTransformer3DModel
from figures import Chart, Figure, Value, add_output_options, as_case, measured_here, save
from measuring import clock_name, in_turns

from onewan.arithmetic.flops import TransformerSize, forward_flops, training_flops
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
    flops: float
    """Of a step."""
    rate: float
    """FLOP/s of a matrix product as wide as the transformer's layers."""

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
            seconds = in_turns(loops, steps, run.device)
        size = TransformerSize.of_config(bare_model.config)
        rate = product_rate(size, clip.tokens, dtype, run.device)
    flops = training_flops(forward_flops(size, clip.tokens), "adapter")
    return Result(case=case, tokens=clip.tokens, seconds=seconds, flops=flops, rate=rate)


def product_rate(
    size: TransformerSize, tokens: int, dtype: torch.dtype, device: torch.device
) -> float:
    """FLOP/s of the product in the feed-forward layer, the median of ten."""
    x = torch.randn(tokens, size.width, device=device, dtype=dtype)
    weight = torch.randn(size.width, size.feed_forward, device=device, dtype=dtype)
    times = in_turns({"product": lambda: x @ weight}, 10, device)["product"]
    return 2 * tokens * size.width * size.feed_forward / statistics.median(times)


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
    add_output_options(parser)
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
    save(figure_of(results, torch.device(options.device)), options)
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


def figure_of(results: list[Result], device: torch.device) -> Figure:
    """Steps per second of both loops."""
    values: list[Value] = []
    for result in results:
        case = as_case(
            variant=result.case.variant,
            width=result.case.width,
            blocks=result.case.layers,
            tokens=result.tokens,
        )
        for loop, name in (("onewan", "onewan"), ("bare", "bare loop")):
            values.append(
                Value(
                    case=case | {"loop": name},
                    measure="steps per second",
                    unit="1/s",
                    repeats=tuple(1 / taken for taken in result.seconds[loop]),
                    expected=result.rate / result.flops,
                )
            )
        values.append(
            Value(
                case=case | {"loop": "onewan"},
                measure="duration / bare loop's",
                unit="",
                repeats=(result.ratio,),
                limit=LIMIT if result is results[0] else None,
            )
        )
    return measured_here(
        name="steps_per_second",
        title="Steps per second beside a bare loop",
        measured=(
            "A LoRA of rank 32 on small transformers with the variants' architecture, batch size "
            "1: onewan's step as a run executes it, with everything around the model, and the "
            "shortest loop of diffusers and PEFT on the same batch, in turns. Seconds are "
            f"{clock_name(device)}. The arithmetic is a step's floating-point operations at the "
            "rate of the feed-forward layer's matrix product, measured in the same process."
        ),
        values=values,
        charts=[Chart(measure="steps per second", series="loop")],
        arithmetic="operations at the rate of a matrix product",
        device=str(device),
    )


if __name__ == "__main__":
    sys.exit(main())
