"""What a preview with distilled LoRAs costs, compared with a full sample.

Samples the same video of a small T2V-A14B with a trained LoRA on both experts: in 25 steps with
guidance, as runs do by default, and in 4 steps with a distilled LoRA over each expert
(`sample.distilled`). Both take turns in one process, in random order, so that changes in the
machine's speed affect both alike. Prints the medians and their ratio, of the denoising alone and
of the whole sample with the VAE, which decodes either for the same time. By the passes through a
transformer the ratio is 4 / 50 = 0.08. The distilled LoRAs have about the share of the work that
those of rank 64 have in A14B.

    python benchmarks/sampling.py [--repeats 5] [--width 512] [--json FILE]
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from figures import Chart, Figure, Value, add_output_options, as_case, measured_here, save
from measuring import clock, clock_name

from onewan.adapters.adapter_config import adapter_config_for
from onewan.adapters.lora import adapter_parameters, attach_adapter
from onewan.adapters.overlay import Overlay
from onewan.config.method import LoraMethod
from onewan.demo.tiny_model import write_tiny_model
from onewan.devices import resolve_device
from onewan.dtypes import torch_dtype
from onewan.formats.adapter import ModuleAdapter
from onewan.formats.lora import WanShape
from onewan.model.load import WanModelLoader
from onewan.model.wan import WanModel
from onewan.sample.generate import SampleRequest, WanModelSampler
from onewan.variants import ExpertName

KINDS = ("full", "distilled")
RANK, WIDTH = 64, 5120
"""Of published distilled LoRAs, and of A14B."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Seconds of each sample, by kind, in the order in which they were made."""

    passes: dict[str, int]
    """Passes through a transformer of one sample."""
    denoising: dict[str, list[float]]
    whole: dict[str, list[float]]
    """With decoding the video."""

    def ratio(self, seconds: dict[str, list[float]]) -> float:
        """Of the medians: distilled over full."""
        full, distilled = (statistics.median(seconds[kind]) for kind in KINDS)
        return distilled / full


def with_trained_lora(model: WanModel) -> None:
    """Put a LoRA on both experts of `model` that changes it, as one that was trained."""
    for number, expert in enumerate(model.variant.experts):
        transformer = model.expert(expert)
        config = adapter_config_for(LoraMethod(rank=16), transformer, None)
        attach_adapter(transformer, config, number, expert.name)
        generator = torch.Generator().manual_seed(number)
        for parameter in adapter_parameters(transformer).values():
            parameter.data.normal_(0, 0.02, generator=generator)


def distilled_loras(model: WanModel, rank: int) -> dict[ExpertName, Overlay]:
    """A LoRA on all linear layers of the blocks of both experts, as the published ones."""
    overlays: dict[ExpertName, Overlay] = {}
    for number, expert in enumerate(model.variant.experts):
        transformer = model.expert(expert)
        generator = torch.Generator().manual_seed(100 + number)
        modules = {
            name: ModuleAdapter(
                kind="lora",
                tensors={
                    "lora_A": 0.02 * torch.randn(rank, inputs, generator=generator),
                    "lora_B": 0.02 * torch.randn(outputs, rank, generator=generator),
                },
            )
            for name, (outputs, inputs) in WanShape.of_config(transformer.config).linears().items()
        }
        overlays[expert.name] = Overlay(transformer, modules, expert.name, dtype=model.dtype)
    return overlays


def measure(model: WanModel, request: SampleRequest, repeats: int, device: str) -> Result:
    """Make a sample of each kind `repeats` times, after one of each as a warm-up."""
    width = WanShape.of_config(model.expert(model.variant.experts[0]).config).width
    overlays = distilled_loras(model, max(1, RANK * width // WIDTH))
    sampler = WanModelSampler(model, device=device, distilled=overlays)
    requests = {"full": request, "distilled": request.in_few_steps(4, 1.0, 5.0)}
    text = {prompt: model.encode_prompt(prompt).detach() for prompt in ("a", "")}
    denoising: dict[str, list[float]] = {kind: [] for kind in KINDS}
    whole: dict[str, list[float]] = {kind: [] for kind in KINDS}
    order, on = random.Random(0), torch.device(device)
    for number in range(repeats + 1):
        for kind in order.sample(KINDS, len(KINDS)):
            steps: list[float] = []
            begin = clock(on)
            sampler.sample(
                requests[kind],
                text=text.__getitem__,
                on_step=lambda _done, _total, steps=steps: steps.append(clock(on)),
            )
            end = clock(on)
            if number:
                denoising[kind].append(steps[-1] - begin)
                whole[kind].append(end - begin)
    passes = {
        kind: one.steps * (2 if max(one.guidance) > 1 else 1) for kind, one in requests.items()
    }
    return Result(passes=passes, denoising=denoising, whole=whole)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed samples of each kind")
    parser.add_argument("--width", type=int, default=512, help="channels of the transformer")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--side", type=int, default=128, help="side of the video, pixels")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=25, help="of a full sample")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = write_tiny_model(
            Path(name) / "model", "t2v-a14b", width=options.width, layers=options.layers
        )
        model = WanModelLoader().load(folder, "t2v-a14b", torch_dtype(options.dtype))
        with_trained_lora(model)
        request = SampleRequest(
            prompt="a",
            negative_prompt="",
            image=None,
            width=options.side,
            height=options.side,
            frames=options.frames,
            steps=options.steps,
            guidance=(4.0, 3.0),
            shift=12.0,
            seed=0,
            fps=16.0,
        )
        device = str(resolve_device(options.device))
        result = measure(model, request, options.repeats, device)
    ratios = {"denoising": result.ratio(result.denoising), "whole": result.ratio(result.whole)}
    passes = result.passes["distilled"] / result.passes["full"]
    print(f"passes: {result.passes['distilled']} instead of {result.passes['full']}: {passes:.3f}")
    for part, seconds in (("denoising", result.denoising), ("whole", result.whole)):
        full, few = (statistics.median(seconds[kind]) for kind in KINDS)
        print(f"{part}: {few:.2f} s instead of {full:.2f} s: {ratios[part]:.3f}")
    save(figure_of(result, torch.device(device), options.steps), options)


def figure_of(result: Result, device: torch.device, steps: int) -> Figure:
    """Seconds of both kinds, and those of the distilled one by the passes."""
    values: list[Value] = []
    few, all_passes = (result.passes[kind] for kind in ("distilled", "full"))
    for part, seconds in (("denoising", result.denoising), ("whole sample", result.whole)):
        full = statistics.median(seconds["full"])
        for kind, name in (
            ("full", f"{steps} steps with guidance"),
            ("distilled", "4 steps with a distilled LoRA"),
        ):
            own = kind == "distilled"
            values.append(
                Value(
                    case=as_case(part=part, sampled_in=name),
                    measure="duration",
                    unit="s",
                    repeats=tuple(seconds[kind]),
                    expected=full * few / all_passes if own and part == "denoising" else None,
                    baseline=f"{steps} steps" if own else "",
                    ratio=statistics.median(seconds[kind]) / full if own else None,
                )
            )
    return measured_here(
        name="sampling",
        title="Previews with distilled LoRAs beside full samples",
        measured=(
            "The same video of a small T2V-A14B with a trained LoRA, sampled both ways in turns. "
            f"Seconds are {clock_name(device)}. The arithmetic is the number of passes through a "
            f"transformer, {few} instead of {all_passes}; the VAE decodes either for the same time."
        ),
        values=values,
        charts=[Chart(measure="duration", series="sampled in")],
        arithmetic="by passes",
        device=str(device),
    )


if __name__ == "__main__":
    main()
