"""A training step at true size on an accelerator, compared with a bare loop and the FLOP count.

Writes a model whose transformers have the full size of the variant and random weights (nothing is
downloaded; text encoder and VAE are tiny, since the cache contains their results), and trains a
LoRA of rank 32 with gradient checkpointing on one clip of each size:

- with onewan, as the trainer executes a step;
- with the simplest loop of diffusers and PEFT that trains the same LoRA.

Prints for each the seconds per step, tokens per second, model FLOPs utilization (FLOPs without
recomputation, divided by the time and the measured rate of an 8192 x 8192 matrix product) and the
peak of device memory. With ``--both`` it also measures how long a change of the expert takes.

    python benchmarks/gpu.py [--variant t2v-a14b ti2v-5b] [--size 81x480x832 ...] [--json FILE]

Each A14B expert needs 28.6 GB in the folder for temporary files (``--work``), and as much memory
while it is loaded. ``--blocks`` and ``--width`` make it smaller, for trying the benchmark.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from onewan.config.load import load_run
from onewan.demo.tiny_model import write_tiny_model
from onewan.media.write import write_video
from onewan.model.precision import compute_context
from onewan.train.run import Run
from onewan.train.setup import WanModelSetup, resolve_device
from onewan.train.step import train_step
from onewan.variants import VARIANTS, Variant, VariantName

HEAD_DIM = 128
SHARD_BYTES = 4 << 30
TEXT_TOKENS = 512
DTYPE = torch.bfloat16
RUN_FILE = """
model: {{path: model, variant: {variant}, experts: {experts}, dtype: bfloat16, device: {device}}}
wan_config: {{max_frames: {frames}}}
video_data: {{sources: [{{path: clips/{size}}}], resolution: "{width}x{height}",
  min_resolution: [32, 32], max_resolution: [1280, 1280]}}
method: {{kind: lora, rank: 32}}
train: {{steps: 1000000, batch_size: 1, switch_expert_every: 1}}
"""


@dataclass(frozen=True)
class Architecture:
    """The sizes of a transformer that determine its FLOPs."""

    width: int
    ffn: int
    blocks: int

    def forward_flops(self, tokens: int) -> tuple[float, float]:
        """FLOPs of a forward pass for one clip: those of matrix products with weights, and those
        of attention (self-attention and cross-attention to 512 text tokens)."""
        linear = 2 * tokens * (6 * self.width**2 + 2 * self.width * self.ffn)
        linear += 4 * TEXT_TOKENS * self.width**2
        attention = 4 * tokens * self.width * (tokens + TEXT_TOKENS)
        return self.blocks * linear, self.blocks * attention

    def lora_step_flops(self, tokens: int) -> float:
        """FLOPs of a step without recomputation: the backward pass needs no gradient of the frozen
        weights, and flash attention's backward pass costs 2.5 forward passes."""
        linear, attention = self.forward_flops(tokens)
        return 2 * linear + 3.5 * attention


ARCHITECTURES = {
    "t2v-a14b": Architecture(5120, 13824, 40),
    "i2v-a14b": Architecture(5120, 13824, 40),
    "ti2v-5b": Architecture(3072, 14336, 30),
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One loop at one size."""

    loop: str
    seconds: float
    """Median of a step."""
    tokens_per_second: float
    mfu: float
    peak_bytes: int
    times: list[float]


# ------------------------------------------------------------------------------- model and clips


def write_model(
    folder: Path, variant: VariantName, arch: Architecture, device: torch.device
) -> None:
    """A tiny model whose transformers are replaced by random ones of the full size."""
    write_tiny_model(folder, variant)
    facts = VARIANTS[variant]
    for expert in facts.experts:
        target = folder / expert.component
        for file in target.iterdir():
            file.unlink()
        with torch.device("meta"):
            module = WanTransformer3DModel(
                num_attention_heads=arch.width // HEAD_DIM,
                attention_head_dim=HEAD_DIM,
                in_channels=facts.in_channels,
                out_channels=facts.latent_channels,
                text_dim=64,  # that of the tiny text encoder
                ffn_dim=arch.ffn,
                num_layers=arch.blocks,
            )
        module.save_config(target)
        write_shards(target, module, device)


def write_shards(target: Path, module: torch.nn.Module, device: torch.device) -> None:
    """Random bfloat16 weights for every parameter of `module`, drawn on the device."""
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        name = f"diffusion_pytorch_model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, target / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, parameter in module.named_parameters():
        value = torch.empty(parameter.shape, dtype=DTYPE, device=device)
        if parameter.dim() == 1:
            value.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            value.normal_(std=0.02)
        shard[name] = value.cpu()
        total += value.nbytes
        if sum(t.nbytes for t in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps(index), encoding="utf-8"
    )


def write_clip(folder: Path, size: tuple[int, int, int]) -> None:
    """One clip with a moving gradient."""
    frames, height, width = size
    rows, columns = np.mgrid[0:height, 0:width]
    pattern = [((rows + columns * 2 + 3 * f) % 256).astype(np.uint8) for f in range(frames)]
    folder.mkdir(parents=True)
    write_video(folder / "clip.mp4", np.repeat(np.stack(pattern)[..., None], 3, axis=3), fps=16)
    (folder / "clip.txt").write_text("a gradient moves across the picture", encoding="utf-8")


# ----------------------------------------------------------------------------------------- loops


def onewan_loop(run: Run) -> Callable[[], None]:
    """A step of a run, as the trainer executes it."""
    steps = run.loader.steps(0, run.config.train.steps, run.schedule.expert_at)

    def step() -> None:
        train_step(run, next(steps))

    return step


def bare_loop(
    folder: Path, facts: Variant, latents: Tensor, condition: Tensor | None, text: Tensor
) -> Callable[[], None]:
    """A step of the simplest loop that trains the same LoRA."""
    transformer = WanTransformer3DModel.from_pretrained(folder, torch_dtype=DTYPE)
    transformer.to(device=latents.device)  # pyright: ignore[reportCallIssue]
    transformer.requires_grad_(False)
    transformer.enable_gradient_checkpointing()
    transformer.add_adapter(
        LoraConfig(
            r=32,
            lora_alpha=32,
            target_modules=r"blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ffn\.net\.(0\.proj|2))",
        )
    )
    transformer.train()
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=True)
    tokens = latents[0, 0].numel() // 4

    def step() -> None:
        t = torch.rand(1, device=latents.device)
        noise = torch.randn_like(latents)
        x = (1 - t) * latents + t * noise
        inputs = x if condition is None else torch.cat([x, condition], dim=1)
        # TI2V-5B has a timestep for each token, as in the official code.
        timestep = (t * 1000).expand(1, tokens) if facts.has_clean_first_frame else t * 1000
        with compute_context(DTYPE, latents.device):
            prediction = transformer(inputs, timestep, text, return_dict=False)[0]
        F.mse_loss(prediction.float(), noise - latents).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# ------------------------------------------------------------------------------------- measuring


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def release(device: torch.device) -> None:
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def measure(
    loop: str, step: Callable[[], None], steps: int, device: torch.device, flops: float,
    tokens: int, rate: float,
) -> Measured:  # fmt: skip
    """The median of `steps` steps after one step of warm-up."""
    times: list[float] = []
    for number in range(steps + 1):
        if number == 1 and device.type != "cpu":
            torch.get_device_module(device).reset_peak_memory_stats(device)
        synchronize(device)
        begin = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    seconds = statistics.median(times[1:])
    peak = 0
    if device.type != "cpu":
        peak = torch.get_device_module(device).max_memory_allocated(device)
    return Measured(
        loop=loop,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        mfu=flops / seconds / rate,
        peak_bytes=peak,
        times=times,
    )


def matrix_product_rate(device: torch.device) -> float:
    """FLOP/s of a bfloat16 matrix product on the device, the median of ten."""
    side = 8192 if device.type != "cpu" else 512
    a, b = (torch.randn(side, side, device=device, dtype=DTYPE) for _ in range(2))
    times: list[float] = []
    for _ in range(13):
        synchronize(device)
        begin = time.perf_counter()
        torch.matmul(a, b)
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return 2 * side**3 / statistics.median(times[3:])


def build(
    folder: Path, variant: VariantName, experts: str, size: tuple[int, int, int], device: str
) -> Run:
    frames, height, width = size
    name = "x".join(map(str, size))
    file = folder / f"{name}-{experts}.yaml"
    file.write_text(
        RUN_FILE.format(
            variant=variant, experts=experts, device=device, frames=frames, size=name,
            width=width, height=height,
        ),
        encoding="utf-8",
    )  # fmt: skip
    return WanModelSetup(load_run(file)).build()


def compare(
    folder: Path, variant: VariantName, arch: Architecture, size: tuple[int, int, int],
    options: argparse.Namespace, rate: float,
) -> Iterator[Measured]:  # fmt: skip
    """onewan's loop and the bare loop at one size, one after the other: both would not fit."""
    device = resolve_device(options.device)
    facts = VARIANTS[variant]
    expert = facts.experts[0]
    experts = "both" if expert.name == "single" else expert.name
    run = build(folder, variant, experts, size, options.device)
    (batch,) = run.loader.validation_batches(run.dataset.clips, 1)
    batch = batch.to(run.device)
    assert batch.text is not None, "no embedding is trained, so the cache contains the text"
    inputs = (batch.latents, batch.condition, batch.text)
    tokens = batch.latents[0, 0].numel() // 4
    flops = arch.lora_step_flops(tokens)
    print(
        f"\n{variant} {'x'.join(map(str, size))}: {tokens} tokens, {flops / 1e12:.0f} TFLOP",
        flush=True,
    )
    step = onewan_loop(run)
    yield measure("onewan", step, options.steps, device, flops, tokens, rate)
    del run, step
    release(device)
    step = bare_loop(folder / "model" / expert.component, facts, *inputs)
    yield measure("bare", step, options.steps, device, flops, tokens, rate)
    del step
    release(device)


def expert_change(
    folder: Path, variant: VariantName, size: tuple[int, int, int], options: argparse.Namespace
) -> list[float]:
    """Seconds of steps that each train the other expert than the step before."""
    run = build(folder, variant, "both", size, options.device)
    step = onewan_loop(run)
    times: list[float] = []
    for _ in range(5):
        begin = time.perf_counter()
        step()
        synchronize(run.device)
        times.append(time.perf_counter() - begin)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variant", nargs="+", choices=sorted(VARIANTS), default=["t2v-a14b"])
    parser.add_argument("--size", nargs="+", default=["17x256x256", "33x480x832", "81x480x832"])
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each loop")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--both", action="store_true", help="measure the change of the expert too")
    parser.add_argument("--blocks", type=int, help="blocks of the transformer, if not all")
    parser.add_argument("--width", type=int, help="channels of the transformer, if not all")
    parser.add_argument("--work", type=Path, help="folder for the model; default: a temporary one")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    device = resolve_device(options.device)
    rate = matrix_product_rate(device)
    name = (
        torch.get_device_module(device).get_device_name(device) if device.type != "cpu" else "CPU"
    )
    print(f"{name}, torch {torch.__version__}: {rate / 1e12:.2f} TFLOP/s in a matrix product")
    cases: list[dict[str, object]] = []
    result: dict[str, object] = {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "matrix_product_flops_per_second": rate,
        "cases": cases,
    }
    for variant in options.variant:
        full = ARCHITECTURES[variant]
        width = options.width or full.width
        arch = Architecture(width, full.ffn * width // full.width, options.blocks or full.blocks)
        with tempfile.TemporaryDirectory(dir=options.work) as temporary:
            folder = Path(temporary)
            begin = time.perf_counter()
            write_model(folder / "model", variant, arch, device)
            release(device)
            print(f"{variant}: model written in {time.perf_counter() - begin:.0f} s", flush=True)
            for text in options.size:
                frames, height, breadth = map(int, text.split("x"))
                size = (frames, height, breadth)
                write_clip(folder / "clips" / text, size)
                for measured in compare(folder, variant, arch, size, options, rate):
                    print(
                        f"  {measured.loop:7} {measured.seconds:8.3f} s/step "
                        f"{measured.tokens_per_second:9.0f} tokens/s  MFU {measured.mfu:.2f}  "
                        f"peak {measured.peak_bytes / 1e9:.1f} GB",
                        flush=True,
                    )
                    cases.append({"variant": variant, "size": text, **asdict(measured)})
                if options.json:
                    options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")
            if options.both and len(VARIANTS[variant].experts) == 2:
                frames, height, breadth = map(int, options.size[0].split("x"))
                times = expert_change(folder, variant, (frames, height, breadth), options)
                print(f"  both experts, a change in each step: {[round(t, 2) for t in times]} s")
                result["expert_change_seconds"] = times
                if options.json:
                    options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
