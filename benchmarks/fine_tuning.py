"""Full fine-tuning by streamed blocks at the true sizes of the variants, counted by live bytes.

`count_fine_tuning` lets an expert without values go through what a run does from the loaded
transformer on: `attach_expert` makes its weights trainable and gives them the run's optimizer, its
blocks go to host memory, and a training step brings them to the device one at a time and updates
each in the backward pass (`onewan.memory.trained_blocks`). The tensors are fake, so nothing is
computed, and every tensor that a step allocates is counted (`live_bytes`).

    python benchmarks/fine_tuning.py t2v-a14b 81x480x832 [--blocks 4] [--top 20]

Counted are all tensors on the device: the weights outside the blocks with their optimizer state,
the ring of weights and the buffers of optimizer state, gradients, activations, what the optimizer
allocates in an update, and the workspaces of `live_bytes.WORKSPACES`. Not counted are what other
kernels allocate inside themselves, fragmentation, and the order of streams: a copy takes no time
here, where on a device the memory of what is being copied is in use a little longer.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bitsandbytes
import torch
import torch.nn.functional as F
from live_bytes import LiveBytes, Storage, fake_device
from measuring import parse_size
from true_size import build_transformer, latent_shape, print_counts, step_inputs

from onewan.config.load import load_run
from onewan.config.schema import ResolvedRun
from onewan.memory.residency import DeviceResidency
from onewan.model.attention_backends import attention_backend
from onewan.model.forward import predict_velocity
from onewan.model.wan import WanModel
from onewan.train.memory import RunMemory
from onewan.train.trainable_setup import attach_expert
from onewan.variants import VARIANTS, VariantName

STEPS = 2
"""In the first one the optimizer creates its state, and in the second one the state comes through
buffers, which then stay. Its forward pass is counted in a third step, beside these."""

RUN_FILE = """
model: {{path: model, variant: {variant}, experts: {experts}, dtype: bfloat16}}
wan_config: {{max_frames: {frames}}}
video_data: {{sources: [{{path: clips}}]}}
method: {{kind: fine_tune, fused_step: true}}
train: {{max_grad_norm: null}}
optimizer: {{name: adamw_8bit}}
memory:
  resident_blocks: 0
  offload_inputs: {offload_inputs}
  keep_attention: "{keep_attention}"
  feed_forward_chunks: {chunks}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuningCounts:
    """Bytes of device memory in a training step, and bytes that it copies."""

    tokens: int
    buffers: int
    """The buffers for weights and optimizer state of streamed blocks."""
    peaks: dict[str, int]
    """The peak of each part: ``forward``, ``backward`` and ``update``, everything included. Blocks
    are updated in the backward pass."""
    to_device: int
    to_host: int
    at_peak: list[Storage]
    """What is alive at the highest peak, largest first."""


def run_config(
    variant: VariantName,
    frames: int,
    *,
    offload_inputs: bool = True,
    keep_attention: str = "host",
    chunks: int = 1,
) -> ResolvedRun:
    """A run that fine-tunes an expert of `variant` with all blocks streamed."""
    text = RUN_FILE.format(
        variant=variant,
        experts="both" if len(VARIANTS[variant].experts) == 1 else "low",
        frames=frames,
        offload_inputs=str(offload_inputs).lower(),
        keep_attention=keep_attention,
        chunks=chunks,
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(text, encoding="utf-8")
        return load_run(file)


def count_fine_tuning(
    config: ResolvedRun, size: tuple[int, int, int], blocks: int | None = None
) -> FineTuningCounts:
    """The training steps of one expert on one clip of `size` (frames, height, width), with the
    settings of `config`. `blocks`: that number of blocks instead of the variant's."""
    facts = config.model.facts()
    shape = latent_shape(facts, size)
    with _tables_without_values(), fake_device() as device, LiveBytes() as live:
        live.mark("build")
        transformer = build_transformer(facts, torch.device("cpu"), torch.bfloat16, blocks)
        (expert,) = facts.selected(config.model.experts)
        model = WanModel(variant=facts, source="", dtype=torch.bfloat16)
        setattr(model, expert.component, transformer)
        memory = RunMemory(config, device, None, dropout=False, notices={})
        residency = DeviceResidency(device)
        trained = attach_expert(config, model, expert, None, residency, memory)
        assert trained.trainable is not None
        memory.use_attention(attention_backend("flash"))  # fake tensors need a backend by name
        residency.bring(transformer)
        transformer.train()
        before = copied = memory.copied
        for number in range(STEPS + 1):
            last = number == STEPS
            live.mark("forward" if last else "before")
            before, copied = copied, memory.copied
            step = trained.trainable.optimizer.begin_step(number, 1.0)
            inputs = step_inputs(facts, shape, device, clean=True)
            prediction = predict_velocity(transformer, **inputs, dtype=torch.bfloat16)
            if last:
                break
            live.mark("backward" if number == STEPS - 1 else "before")
            F.mse_loss(prediction, torch.randn(shape, device=device)).backward()
            del prediction
            live.mark("update" if number == STEPS - 1 else "before")
            step.clip_grad_norm(None)
            step.apply()
        stream = memory.stream
        assert stream is not None
        peaks = live.peaks(device.type)
    del peaks["build"], peaks["before"]
    return FineTuningCounts(
        tokens=shape[2] * shape[3] * shape[4] // 4,
        buffers=stream.device_bytes,
        peaks=peaks,
        to_device=copied.to_device - before.to_device,
        to_host=copied.to_host - before.to_host,
        at_peak=live.at_peak(device.type, max(peaks, key=lambda part: peaks[part])),
    )


@contextmanager
def _tables_without_values() -> Iterator[None]:
    """bitsandbytes computes the 256 levels of its 8-bit state on the host, which needs values."""
    original: Any = bitsandbytes.create_dynamic_map
    bitsandbytes.create_dynamic_map = lambda signed: torch.empty(256)  # noqa: ARG005
    try:
        yield
    finally:
        bitsandbytes.create_dynamic_map = original


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("variant", choices=sorted(VARIANTS))
    parser.add_argument("size", type=parse_size, help="frames x height x width, as 81x480x832")
    parser.add_argument("--blocks", type=int, help="number of blocks, if not all")
    parser.add_argument("--keep-attention", choices=("no", "device", "host"), default="host")
    parser.add_argument("--chunks", type=int, default=1, help="of the feed-forward layer")
    parser.add_argument("--top", type=int, default=20, help="tensors of the peak to list")
    options = parser.parse_args()
    config = run_config(
        options.variant,
        options.size[0],
        keep_attention=options.keep_attention,
        chunks=options.chunks,
    )
    counts = count_fine_tuning(config, options.size, options.blocks)
    figures = {f"peak of {part}": peak for part, peak in counts.peaks.items()}
    figures |= {
        "buffers": counts.buffers,
        "to the device": counts.to_device,
        "to the host": counts.to_host,
    }
    title = f"{options.variant}, {counts.tokens} tokens, full fine-tuning"
    print_counts(title, figures, counts.at_peak, options.top)
    return 0


if __name__ == "__main__":
    sys.exit(main())
