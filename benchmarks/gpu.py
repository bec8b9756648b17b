"""Training steps at true size on the device that is there, beside a bare loop and the FLOP count.

Writes a model whose transformers have the full size of the variant and random weights (nothing is
downloaded; text encoder and VAE are tiny, since the cache contains their results), and trains on
one clip of each size, for each of

- one expert, and both with a change of the expert in every step;
- all blocks resident, and all of them streamed with block inputs and attention outputs on the host;
- a LoRA of rank 32, and full fine-tuning with the update inside the backward pass;

as the trainer executes a step, and with the simplest loop of diffusers and PEFT on one resident
expert. Prints for each the seconds per step, tokens per second, model FLOPs utilisation (FLOPs
without recomputation, divided by the time and the measured rate of an 8192 x 8192 matrix product),
the seconds that the step's FLOPs would take at that rate, and the peak of device memory beside the
plan's. What does not fit is reported as that.

    python benchmarks/gpu.py [--variant ti2v-5b] [--size 81x480x832 ...] [--json FILE]
    python benchmarks/gpu.py --small --device cpu          # tries the benchmark, in a minute

`report.py --write` makes the table of docs/performance.md from the files ``gpu_on_*.json`` in
benchmarks/results: of one for each card, and for each ``--label`` that distinguishes the results of
several commands.

An A14B model needs 28.6 GB in the folder for temporary files, or in ``--work``, where it stays for
the next command; and each of its experts needs as much memory while it is loaded.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from bare_loop import Clip, bare_step
from diffusers import WanTransformer3DModel
from figures import (
    Chart,
    Figure,
    Value,
    add_output_options,
    as_case,
    measured_here,
    on_its_device,
    save,
)
from gpu_model import DTYPE, prepare_model, write_clip
from gpu_table import COLUMNS, SIZES
from measuring import in_turns, parse_size, peak_of, release
from small_runs import step_of

from onewan.arithmetic.flops import (
    FLASH_BACKWARD,
    Trained,
    TransformerSize,
    forward_flops,
    training_flops,
)
from onewan.config.load import load_run
from onewan.devices import resolve_device
from onewan.errors import OnewanError
from onewan.memory.plan import Bucket, find_machine, make_plan, read_stored_model
from onewan.train.run import Run
from onewan.train.setup import WanModelSetup
from onewan.variants import VARIANTS, VariantName

Method = Literal["lora", "full"]
Placing = Literal["resident", "streamed"]
Experts = Literal["one", "both"]

RUN_FILE = """
model: {{path: model, variant: {variant}, experts: {experts}, dtype: bfloat16, device: "{device}"}}
wan_config: {{max_frames: {frames}}}
video_data: {{sources: [{{path: clips/{size}}}], resolution: "{width}x{height}",
  min_resolution: [32, 32], max_resolution: [1280, 1280]}}
method: {method}
train: {{steps: 1000000, batch_size: 1, switch_expert_every: 1, max_grad_norm: {max_norm}}}
memory: {memory}
"""
METHODS: dict[Method, str] = {
    "lora": "{kind: lora, rank: 32}",
    "full": "{kind: fine_tune, fused_step: true}",
}
TRAINED: dict[Method, Trained] = {"lora": "adapter", "full": "weights"}
MEMORY: dict[Placing, str] = {
    "resident": '{{resident_blocks: {layers}, offload_inputs: false, keep_attention: "no"}}',
    "streamed": "{{resident_blocks: 0, offload_inputs: true, keep_attention: host}}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is measured."""

    variant: VariantName
    size: str
    loop: Literal["onewan", "bare"]
    experts: Experts
    placing: Placing
    method: Method


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The result of one case."""

    seconds: float
    """Median of a step."""
    tokens_per_second: float
    mfu: float
    seconds_of_flops: float
    """The step's FLOPs, recomputation included, at the rate of a matrix product."""
    peak_bytes: int | None
    """None where the device does not count its memory."""
    planned_bytes: int | None
    """None for the bare loop."""
    times: list[float]


def run_file(case: Case, layers: int, device: str) -> str:
    """The run file of a case."""
    frames, height, width = parse_size(case.size)
    experts = VARIANTS[case.variant].experts
    one = "both" if len(experts) == 1 else experts[0].name
    return RUN_FILE.format(
        variant=case.variant,
        experts="both" if case.experts == "both" else one,
        device=device,
        frames=frames,
        size=case.size,
        width=width,
        height=height,
        method=METHODS[case.method],
        max_norm="null" if case.method == "full" else 1.0,
        memory=MEMORY[case.placing].format(layers=layers),
    )


# ------------------------------------------------------------------------------------- measuring


def matrix_product_rate(device: torch.device, side: int) -> float:
    """FLOP/s of a bfloat16 matrix product on the device, the median of ten."""
    a, b = (torch.randn(side, side, device=device, dtype=DTYPE) for _ in range(2))
    times = in_turns({"product": lambda: torch.matmul(a, b)}, 10, device)["product"]
    return 2 * side**3 / statistics.median(times)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The device, and the folder with the model and the clips of one variant."""

    folder: Path
    transformer: TransformerSize
    device: torch.device
    rate: float
    """FLOP/s of a matrix product."""
    steps: int

    def measure(self, case: Case) -> Measured:
        """OutOfMemoryError or OnewanError for what does not fit."""
        file = self.folder / "run.yaml"
        file.write_text(run_file(case, self.transformer.layers, str(self.device)), encoding="utf-8")
        planned = None
        if case.loop == "onewan":
            config = load_run(file)
            frames, height, width = parse_size(case.size)
            bucket = Bucket(frames=frames, width=width, height=height)
            plan = make_plan(
                config, [bucket], find_machine(), read_stored_model(config), advice=False
            )
            planned = plan.worst.training.device_bytes
        run = WanModelSetup(load_run(file)).build()
        clip = self._clip(run, case)
        step = step_of(run) if case.loop == "onewan" else self._bare(case, clip)
        del run
        release(self.device)
        times: list[float] = []
        peak = peak_of(lambda: times.extend(self._timed(step)), self.device)
        seconds = statistics.median(times)
        forward = forward_flops(self.transformer, clip.tokens)
        trained = TRAINED[case.method]
        all_flops = training_flops(
            forward, trained, attention_backward=FLASH_BACKWARD, recomputations=1
        )
        return Measured(
            seconds=seconds,
            tokens_per_second=clip.tokens / seconds,
            mfu=training_flops(forward, trained) / seconds / self.rate,
            seconds_of_flops=all_flops / self.rate,
            peak_bytes=peak,
            planned_bytes=planned,
            times=times,
        )

    def _timed(self, step: Callable[[], None]) -> list[float]:
        return in_turns({"step": step}, self.steps, self.device)["step"]

    def _clip(self, run: Run, case: Case) -> Clip:
        (batch,) = run.loader.validation_batches(run.dataset.clips, 1)
        batch = batch.to(run.device)
        assert batch.text is not None, "no embedding is trained, so the cache contains the text"
        return Clip(
            latents=batch.latents,
            text=batch.text,
            condition=batch.condition,
            timestep_per_token=VARIANTS[case.variant].has_clean_first_frame,
        )

    def _bare(self, case: Case, clip: Clip) -> Callable[[], None]:
        folder = self.folder / "model" / VARIANTS[case.variant].experts[0].component
        transformer: Any = WanTransformer3DModel.from_pretrained(folder, torch_dtype=DTYPE)
        transformer.to(device=self.device)
        return bare_step(
            transformer, clip, DTYPE, method=case.method, checkpointing=True, max_norm=1.0
        )


def cases(variant: VariantName, size: str, options: argparse.Namespace) -> Iterator[Case]:
    """The cases of one variant and size; the bare loop first."""
    for method in options.method if "bare" in options.loop else ():
        yield Case(
            variant=variant, size=size, loop="bare", experts="one", placing="resident",
            method=method,
        )  # fmt: skip
    for method, placing, experts in itertools.product(
        options.method if "onewan" in options.loop else (), options.placing, options.experts
    ):
        if experts == "both" and len(VARIANTS[variant].experts) == 1:
            continue
        yield Case(
            variant=variant, size=size, loop="onewan", experts=experts, placing=placing,
            method=method,
        )  # fmt: skip


def measured_or_reason(bench: Bench, case: Case) -> Measured | str:
    """The result, or why there is none."""
    try:
        return bench.measure(case)
    except torch.OutOfMemoryError as error:
        return f"out of memory: {str(error).splitlines()[0]}"
    except OnewanError as error:
        return str(error).splitlines()[0]
    finally:
        release(bench.device)


def show(case: Case, result: Measured | str) -> str:
    """One line about a case."""
    name = f"{case.loop}, {case.experts}, {case.placing}, {case.method}"
    if isinstance(result, str):
        return f"  {name:32} {result}"
    peak = "-" if result.peak_bytes is None else f"{result.peak_bytes / 1e9:.1f}"
    plan = "-" if result.planned_bytes is None else f"{result.planned_bytes / 1e9:.1f}"
    return (
        f"  {name:32} {result.seconds:8.3f} s/step (its FLOPs: {result.seconds_of_flops:.3f})  "
        f"{result.tokens_per_second:8.0f} tokens/s  MFU {result.mfu:.2f}  peak {peak} GB, "
        f"plan {plan}"
    )


# --------------------------------------------------------------------------------------- program


TITLES = {case: title for title, case in COLUMNS}


def figure_of(
    results: Sequence[tuple[Case, Measured | str]],
    device: torch.device,
    rate: float,
    label: str | None = None,
) -> Figure:
    """Seconds per step beside those of the operations, and peaks beside the plan's."""
    values: list[Value] = []
    bare = {
        (case.variant, case.size, case.method): result.seconds
        for case, result in results
        if case.loop == "bare" and isinstance(result, Measured)
    }
    for case, result in results:
        beside = bare.get((case.variant, case.size, case.method))
        what = as_case(
            variant=case.variant,
            size=case.size,
            settings=TITLES[case.loop, case.experts, case.placing, case.method],
        )
        if isinstance(result, str):
            values.append(Value(case=what, measure="duration of a step", unit="s", reason=result))
            continue
        values += [
            Value(
                case=what,
                measure="duration of a step",
                unit="s",
                repeats=tuple(result.times),
                expected=result.seconds_of_flops,
                baseline="bare loop",
                ratio=result.seconds / beside if beside and case.loop != "bare" else None,
            ),
            Value(
                case=what,
                measure="tokens per second",
                unit="1/s",
                repeats=(result.tokens_per_second,),
            ),
            Value(case=what, measure="MFU", unit="", repeats=(result.mfu,)),
        ]
        if result.peak_bytes is not None:
            values.append(
                Value(
                    case=what,
                    measure="device peak",
                    unit="GB",
                    repeats=(result.peak_bytes / 1e9,),
                    expected=None if result.planned_bytes is None else result.planned_bytes / 1e9,
                )
            )
    peaks = any(value.measure == "device peak" for value in values)
    figure = measured_here(
        name="gpu",
        title="Training steps at true size",
        measured=MEASURED.format(rate=rate / 1e12),
        values=values,
        charts=[
            Chart(measure="duration of a step", series="settings"),
            *([Chart(measure="device peak", series="settings")] if peaks else []),
        ],
        arithmetic="by arithmetic",
        device=str(device),
    )
    return on_its_device(figure, label)


MEASURED = (
    "Transformers of the variants' full size, unless the command says otherwise, with random "
    "bfloat16 weights; a LoRA of rank 32 or all weights are trained, with gradient checkpointing "
    "and batch size 1. The bare loop is the shortest one of diffusers and PEFT. The arithmetic is "
    "a step's floating-point operations, recomputation included, at the rate that a matrix product "
    "reached in the same process, {rate:.2f} TFLOP/s; for peaks it is the plan. MFU counts the "
    "operations without recomputation."
)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = result.add_argument
    add("--variant", nargs="+", choices=sorted(VARIANTS), default=sorted(VARIANTS))
    add("--size", nargs="+", default=list(SIZES), help="frames x height x width")
    add("--loop", nargs="+", choices=("onewan", "bare"), default=["onewan", "bare"])
    add("--method", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    add("--placing", nargs="+", choices=tuple(MEMORY), default=list(MEMORY))
    add("--experts", nargs="+", choices=("one", "both"), default=["one", "both"])
    add("--steps", type=int, default=3, help="timed steps of each case")
    add("--device", default="auto")
    add("--blocks", type=int, help="blocks of the transformer, if not all")
    add("--width", type=int, help="channels of the transformer, if not all; a multiple of 128")
    add("--small", action="store_true", help="tiny transformers and one small clip")
    add("--label", help="added to the figure's name, so that another command's stays beside it")
    add("--work", type=Path, help="folder where models are kept for the next command")
    add_output_options(result)
    return result


def transformer_size(variant: VariantName, options: argparse.Namespace) -> TransformerSize:
    """That of the variant, or with fewer blocks and channels."""
    full = TransformerSize.of_variant(VARIANTS[variant])
    width = options.width or full.width
    return replace(
        full,
        width=width,
        feed_forward=full.feed_forward * width // full.width,
        layers=options.blocks or full.layers,
        text_width=64,  # that of the tiny text encoder
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.small:
        options.width, options.blocks, options.size = 128, 3, ["5x64x64"]
    device = resolve_device(options.device)
    side = 8192 if device.type not in {"cpu", "sim"} else 256
    rate = matrix_product_rate(device, side)
    print(f"{device}, torch {torch.__version__}: {rate / 1e12:.2f} TFLOP/s")
    found: list[tuple[Case, Measured | str]] = []
    for variant in options.variant:
        size = transformer_size(variant, options)
        with nullcontext(options.work) if options.work else TemporaryDirectory() as work:
            folder = Path(work) / variant
            prepare_model(folder / "model", variant, size, device)
            release(device)
            bench = Bench(
                folder=folder, transformer=size, device=device, rate=rate, steps=options.steps
            )
            for text in options.size:
                write_clip(folder / "clips" / text, parse_size(text))
                print(f"{variant} {text}", flush=True)
                for case in cases(variant, text, options):
                    result = measured_or_reason(bench, case)
                    print(show(case, result), flush=True)
                    found.append((case, result))
                    save(figure_of(found, device, rate, options.label), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
