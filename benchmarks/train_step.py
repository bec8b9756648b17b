"""Overhead of a training step of onewan, compared with a bare PyTorch loop.

Both train the same LoRA with PEFT and AdamW on the same diffusers transformer architecture and the
same batch, in one process, one step of each at a time. The bare loop only adds noise and calls
forward, backward and step. onewan's step is that of a run: it reads the batch from the cache in the
background, draws t and noise from derived seeds, clips the gradient norm, checks that it is finite,
and writes the event. The order within each pair of steps is random, so that changes in the
machine's speed affect both loops equally. Prints the medians and their ratio; exits with status 1
if the ratio is above 1.03.

    python benchmarks/train_step.py [--steps 41] [--width 512] [--json FILE]
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
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor

from onewan.config.load import load_run
from onewan.demo.clips import write_clips
from onewan.demo.tiny_model import write_tiny_model
from onewan.dtypes import torch_dtype
from onewan.model.precision import compute_context
from onewan.runs.event_file import EventFile
from onewan.runs.events import StepDone
from onewan.train.run import Run
from onewan.train.setup import WanModelSetup
from onewan.train.step import train_step

LIMIT = 1.03
RUN_FILE = """
model: {{path: model, variant: t2v-a14b, experts: high, dtype: {dtype}, device: {device}}}
wan_config: {{max_frames: 17}}
video_data: {{sources: [{{path: clips}}], resolution: "{side}x{side}"}}
method: {{kind: lora, rank: 32}}
train: {{steps: 1000000, batch_size: 1}}
memory: {{gradient_checkpointing: false}}
"""


def bare_loop(
    transformer: WanTransformer3DModel, latents: Tensor, text: Tensor, dtype: torch.dtype
) -> Callable[[], None]:
    """A step of the simplest loop that trains the same LoRA."""
    transformer.requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(
            r=32,
            lora_alpha=32,
            target_modules=r"blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ffn\.net\.(0\.proj|2))",
        )
    )
    transformer.train()
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=True)

    def step() -> None:
        t = torch.rand(1, device=latents.device)
        noise = torch.randn_like(latents)
        x = (1 - t) * latents + t * noise
        with compute_context(dtype, latents.device):
            prediction = transformer(x, t * 1000, text, return_dict=False)[0]
        F.mse_loss(prediction.float(), noise - latents).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=41, help="timed steps of each loop")
    parser.add_argument("--width", type=int, default=512, help="channels of the transformer")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--side", type=int, default=128, help="side of the video, pixels")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    # One thread: with two, which wait for each other, the ratio varied by 0.04 on a shared machine.
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in write_clips(folder / "clips")[1:]:
            file.unlink()  # one clip, so that each step of both loops trains on the same batch
        write_tiny_model(folder / "model", "t2v-a14b", width=options.width, layers=options.layers)
        (folder / "run.yaml").write_text(
            RUN_FILE.format(dtype=options.dtype, device=options.device, side=options.side)
        )
        run = WanModelSetup(load_run(folder / "run.yaml")).build()
        assert len(run.dataset.clips) == 1
        batch = run.loader.validation_batches(run.dataset.clips, 1)[0].to(run.device)
        dtype = torch_dtype(options.dtype)
        assert batch.text is not None, "no embedding is trained, so the cache contains the text"
        bare_model = WanTransformer3DModel.from_pretrained(
            folder / "model" / "transformer", torch_dtype=dtype
        )
        bare_model.to(device=run.device)  # pyright: ignore[reportCallIssue]
        with EventFile(folder / "events.jsonl") as file:
            loops = {
                "bare": bare_loop(bare_model, batch.latents, batch.text, dtype),
                "onewan": onewan_loop(run, file),
            }
            times = measure(loops, options.steps, run.device)
    medians = {loop: statistics.median(values) for loop, values in times.items()}
    ratio = medians["onewan"] / medians["bare"]
    tokens = batch.latents[0, 0].numel() // 4
    print(f"width {options.width}, {options.layers} blocks, {tokens} tokens, {options.dtype}")
    print(f"bare loop: {medians['bare']:.3f} s/step   onewan: {medians['onewan']:.3f} s/step")
    pairs = [ours / bare for ours, bare in zip(times["onewan"], times["bare"], strict=True)]
    print(f"ratio of medians: {ratio:.3f} (limit {LIMIT})")
    print(f"median ratio of neighboring steps: {statistics.median(pairs):.3f}")
    if options.json:
        result = {
            "ratio": ratio,
            "seconds": times,
            "tokens": tokens,
            "settings": {k: str(v) for k, v in vars(options).items()},
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        }
        options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")
    return int(ratio > LIMIT)


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
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number >= 2:
                times[name].append(time.perf_counter() - begin)
    return times


if __name__ == "__main__":
    sys.exit(main())
