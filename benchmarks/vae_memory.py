"""Memory and time of the VAE at its true size on a GPU, beside the memory plan.

Encodes and decodes random pixels with VAEs of random weights, the one of A14B models and the one of
TI2V-5B, as runs and samples do; and decodes without TF32 too. cuDNN takes what it finds free as
workspace: ``--share`` limits what it finds.

    python benchmarks/vae_memory.py --device cuda --size 33x480x832 81x480x832
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from figures import Chart, Figure, Value, add_output_options, measured_here, on_its_device, save
from measuring import Size, parse_size, peak_of, release
from torch import Tensor

from onewan.config.load import load_run
from onewan.demo.tiny_model import write_tiny_model
from onewan.devices import device_memory, limit_share, resolve_device, synchronize
from onewan.memory.plan import Bucket, read_stored_model
from onewan.model.vae import decode_video, encode_video, vae_in_use
from onewan.variants import VARIANTS, VariantName

TRUE_SIZE: dict[VariantName, dict[str, Any]] = {
    "t2v-a14b": {},  # diffusers' own defaults
    "ti2v-5b": {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": [0.0] * 48,
        "latents_std": [1.0] * 48,
    },
}
EXACT = "decoding without TF32"
RUN_FILE = """
model: {{path: model, variant: {variant}}}
video_data: {{sources: [{{path: clips}}]}}
method: {{kind: lora}}
"""


@torch.no_grad()
def decode_exactly(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """As `decode_video`, without TF32."""
    with vae_in_use(exact=True):
        return vae.decode(latents, return_dict=False)[0]


def measured(
    folder: Path, variant: VariantName, sizes: Sequence[Size], device: torch.device
) -> list[Value]:
    """Encoding and decoding with the VAE of `variant`."""
    model = folder / "model"
    shutil.rmtree(model, ignore_errors=True)
    write_tiny_model(model, variant)
    shutil.rmtree(model / "vae")
    vae: Any = AutoencoderKLWan(**TRUE_SIZE[variant])
    vae.save_pretrained(model / "vae")
    file = folder / "run.yaml"
    file.write_text(RUN_FILE.format(variant=variant), encoding="utf-8")
    stored = read_stored_model(load_run(file)).vae
    release(device)
    before = device_memory(device)[0] or 0
    there = vae.to(device=device).eval().requires_grad_(False)
    values: list[Value] = []
    for frames, height, width in sizes:
        bucket = Bucket(frames=frames, width=width, height=height)
        pixels = torch.rand(1, 3, frames, height, width, device=device) * 2 - 1
        facts = VARIANTS[variant]
        shape = (
            1,
            facts.latent_channels,
            (frames - 1) // 4 + 1,
            height // facts.spatial_compression,
            width // facts.spatial_compression,
        )
        latents = torch.randn(shape, device=device)
        planned = {
            "encoding": stored.encoding_bytes(bucket, 1),
            "decoding": stored.decoding_bytes(bucket.pixels, bucket.frames),
        }
        planned[EXACT] = planned["decoding"]
        work: dict[str, Callable[[], Any]] = {
            "encoding": lambda pixels=pixels: encode_video(there, pixels),
            "decoding": lambda latents=latents: decode_video(there, latents),
            EXACT: lambda latents=latents: decode_exactly(there, latents),
        }
        for what, call in work.items():
            case = {"VAE of": variant, "size": str(bucket), "what": what}
            begin = time.perf_counter()
            try:
                peak = peak_of(call, device)
            except torch.OutOfMemoryError:
                values.append(Value(case=case, measure="device peak", reason="did not fit"))
                continue
            finally:
                release(device)
            synchronize(device)
            taken = time.perf_counter() - begin
            if peak is not None:
                weights = 4 * stored.weights
                values.append(
                    Value(
                        case=case,
                        measure="device peak",
                        unit="GB",
                        repeats=((peak - before) / 1e9,),
                        expected=(planned[what] + weights) / 1e9,
                    )
                )
            values.append(Value(case=case, measure="duration", unit="s", repeats=(taken,)))
        del pixels, latents
    return values


def figure_of(values: Sequence[Value], device: torch.device) -> Figure:
    return on_its_device(
        measured_here(
            name="vae_memory",
            title="Memory and time of the VAE at its true size",
            measured=(
                "One video of random pixels is encoded and decoded once in float32, with random "
                "weights; the first call's choice of kernels is part of its time. cuDNN's "
                "workspaces, of which it takes less where memory is short, are not in the plan."
            ),
            values=values,
            charts=[Chart(measure="device peak", series="what")],
            arithmetic="plan",
            device=str(device),
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--device", default="auto")
    add("--variant", nargs="+", choices=sorted(TRUE_SIZE), default=sorted(TRUE_SIZE))
    add("--size", nargs="+", type=parse_size, default=[(33, 480, 832), (81, 480, 832)])
    add("--share", type=float, default=1.0, help="of the device's memory that may be used (1)")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    limit_share(device, options.share)
    values: list[Value] = []
    with tempfile.TemporaryDirectory() as folder:
        for variant in options.variant:
            found = measured(Path(folder), variant, options.size, device)
            for value in found:
                expected = "" if value.expected is None else f", plan {value.expected:.2f}"
                shown = value.reason or f"{value.median:.2f} {value.unit}{expected}"
                print(*value.case.values(), value.measure, shown, flush=True)
            values += found
            save(figure_of(values, device), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
