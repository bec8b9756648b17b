"""The error that quantized weights make in a transformer's output.

    python benchmarks/quantized_error.py [MODEL]

Compares MODEL (default: the demo's tiny model) with itself after `onewan convert --to fp8_scaled`,
with the linear layers of its blocks as GGUF's Q8_0, and with each `memory.weights` that packs them
while loading, for one random input at three timesteps. Prints a JSON line for each expert: the
largest relative error of the velocity. Everything is computed in float32, so that no other rounding
is counted; the weights of MODEL are as its file has them.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import cast

import gguf
import torch
from diffusers import WanTransformer3DModel
from gguf import GGMLQuantizationType
from torch import Tensor, nn

from onewan.checkpoint.convert import convert_model
from onewan.checkpoint.model_files import read_model
from onewan.demo.tiny_model import write_tiny_model
from onewan.dtypes import WeightStorage
from onewan.model.load import WanModelLoader
from onewan.model.sources import PipelineComponent

_PACKED: tuple[WeightStorage, ...] = ("fp8", "int8", "nf4")


def velocities(transformer: WanTransformer3DModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    config = transformer.config
    latents = torch.randn(1, config["in_channels"], 3, 16, 16, generator=generator)
    text = torch.randn(1, 512, config["text_dim"], generator=generator)
    with torch.no_grad():
        outputs = [
            transformer(latents, torch.tensor([t]), text, return_dict=False)[0]
            for t in (900.0, 500.0, 100.0)
        ]
    return torch.cat(outputs).flatten(1)


def as_q8_0(transformer: WanTransformer3DModel) -> WanTransformer3DModel:
    quantized = copy.deepcopy(transformer)
    for layer in quantized.blocks.modules():
        if isinstance(layer, nn.Linear):
            blocks = gguf.quants.quantize(layer.weight.detach().numpy(), GGMLQuantizationType.Q8_0)
            values = gguf.quants.dequantize(blocks, GGMLQuantizationType.Q8_0)
            layer.weight.data = torch.from_numpy(values)
    return quantized


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL", nargs="?", type=Path)
    with tempfile.TemporaryDirectory() as folder:
        given = parser.parse_args().model or write_tiny_model(Path(folder) / "demo", "t2v-a14b")
        convert_model(given, Path(folder) / "fp8", "fp8_scaled")
        variant = read_model(given).variant
        assert variant is not None
        experts: list[PipelineComponent] = [
            cast(PipelineComponent, expert.component) for expert in variant.experts
        ]
        original = WanModelLoader().load(given, dtype=torch.float32, components=experts)
        fp8 = WanModelLoader().load(Path(folder) / "fp8", dtype=torch.float32, components=experts)
        packed = {
            storage: WanModelLoader().load(
                given, dtype=torch.float32, components=experts, weights=storage
            )
            for storage in _PACKED
        }
        for expert in variant.experts:
            transformer = getattr(original, expert.component)
            want = velocities(transformer)
            errors = {
                name: ((velocities(other) - want).norm(dim=1) / want.norm(dim=1)).max().item()
                for name, other in {
                    "fp8_scaled": getattr(fp8, expert.component),
                    "Q8_0": as_q8_0(transformer),
                    **{s: getattr(model, expert.component) for s, model in packed.items()},
                }.items()
            }
            print(json.dumps({"expert": expert.name, **errors}))


if __name__ == "__main__":
    main()
