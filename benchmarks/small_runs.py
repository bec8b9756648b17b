"""Runs of transformers with the variants' architecture, tiny or of full size, whose steps are
measured as the trainer executes them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from gpu_model import DTYPE, write_clip, write_model
from measuring import Size, parse_size

from onewan.arithmetic.flops import TransformerSize
from onewan.config.load import load_run
from onewan.config.schema import ResolvedRun
from onewan.devices import resolve_device
from onewan.memory.plan import Bucket, BucketPlan, find_machine, make_plan, read_stored_model
from onewan.train.run import Run
from onewan.train.setup import WanModelSetup
from onewan.train.step import train_step
from onewan.variants import VARIANTS, VariantName

RUN_FILE = """
model: {{path: model, variant: {variant}, experts: {experts}, dtype: {dtype}, device: "{device}"}}
wan_config: {{max_frames: {frames}}}
video_data: {{sources: [{{path: {clips}, repeats: {repeats}}}], resolution: {resolution},
  min_resolution: [32, 32], max_resolution: [1280, 1280]}}
method: {{kind: lora, rank: 32}}
train: {{steps: 1000000, batch_size: {batch_size}, switch_expert_every: 1}}
validation: {{clips: 0}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallRuns:
    """A model in a folder, and runs that train it."""

    folder: Path
    variant: VariantName
    size: Size
    """Of a clip."""
    layers: int
    device: torch.device

    def config(
        self,
        *overrides: str,
        batch_size: int = 1,
        both_experts: bool = False,
        clips: str = "clips/one",
        resolution: str | None = None,
        repeats: int = 1,
    ) -> ResolvedRun:
        """A run that trains one expert, or both in turn."""
        frames, height, width = self.size
        facts = VARIANTS[self.variant]
        both = both_experts or len(facts.experts) == 1
        file = self.folder / "run.yaml"
        file.write_text(
            RUN_FILE.format(
                variant=self.variant,
                experts="both" if both else facts.experts[0].name,
                dtype="float32" if self.device.type == "cpu" else "bfloat16",
                device=self.device,
                frames=frames,
                clips=clips,
                repeats=repeats,
                resolution=resolution or f"{width}x{height}",
                batch_size=batch_size,
            ),
            encoding="utf-8",
        )
        return load_run(file, list(overrides))

    def plan(self, config: ResolvedRun) -> BucketPlan:
        """What `onewan plan` says of training on clips of `size`."""
        frames, height, width = self.size
        bucket = Bucket(frames=frames, width=width, height=height)
        stored = read_stored_model(config)
        return make_plan(config, [bucket], find_machine(), stored, advice=False).worst


def build(config: ResolvedRun) -> Run:
    """The run, ready for its first step; its clips are encoded if they are not yet."""
    return WanModelSetup(config).build()


def step_of(run: Run) -> Callable[[], None]:
    """A step of the run, as the trainer executes it, without events."""
    steps = run.loader.steps(0, run.config.train.steps, run.schedule.expert_at)

    def step() -> None:
        train_step(run, next(steps))

    return step


def add_scale_options(
    parser: argparse.ArgumentParser,
    *,
    width: int = 256,
    layers: int = 4,
    size: Size = (17, 128, 128),
) -> None:
    """Options of what is trained and where: by default something tiny on the CPU."""
    add = parser.add_argument
    add("--device", default="cpu", help="cpu (default), cuda, auto, ...")
    add("--variant", choices=sorted(VARIANTS), default="t2v-a14b")
    add("--size", type=parse_size, default=size, help="frames x height x width of a clip")
    add("--width", type=int, default=width, help=f"channels, a multiple of 128 ({width})")
    add("--blocks", type=int, default=layers, help=f"blocks of the transformer ({layers})")
    add("--true-size", action="store_true", help="the variant's own width and blocks")


def write_runs(
    options: argparse.Namespace, folder: Path, device: torch.device | None = None
) -> SmallRuns:
    """The model and one clip of the options of `add_scale_options`, in `folder`."""
    facts = VARIANTS[options.variant]
    full = TransformerSize.of_variant(facts)
    width, layers = options.width, options.blocks
    if options.true_size:
        width, layers = full.width, full.layers
    scale = replace(
        full,
        width=width,
        feed_forward=full.feed_forward * width // full.width,
        layers=layers,
        text_width=64,  # that of the tiny text encoder
    )
    device = device or resolve_device(options.device)
    write_model(folder / "model", options.variant, scale, device)
    write_clip(folder / "clips" / "one", options.size)
    return SmallRuns(
        folder=folder, variant=options.variant, size=options.size, layers=layers, device=device
    )


def scale_in_words(runs: SmallRuns, options: argparse.Namespace) -> str:
    """What is trained, for a figure's text."""
    size = "x".join(map(str, runs.size))
    what = (
        "at its full size"
        if options.true_size
        else f"with {runs.layers} blocks of {options.width} channels"
    )
    dtype = "float32" if runs.device.type == "cpu" else str(DTYPE).removeprefix("torch.")
    return f"a LoRA of rank 32 on {VARIANTS[runs.variant].title} {what}, {dtype}, {size}"
