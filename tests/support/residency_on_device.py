"""Moves modules between host memory and the accelerator, and says what it observed.

For `unit/test_residency.py`; each function needs the fixture `accelerator`.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from onewan.config.load import load_run
from onewan.demo.clips import write_clips
from onewan.demo.tiny_model import write_tiny_model
from onewan.devices import resolve_device
from onewan.memory.residency import DeviceResidency
from onewan.model.load import WanModelLoader
from onewan.sample.generate import SampleRequest, WanModelSampler
from onewan.train.setup import WanModelSetup
from onewan.train.step import train_step
from support.accelerator import DEVICE, IS_SIMULATED, MEMORY

if IS_SIMULATED:
    import simulated_gpu

KIB = 1024


def module(kib: int) -> nn.Linear:
    """A module of `kib` KiB with random values."""
    torch.manual_seed(kib)
    return nn.Linear(256, kib, bias=False)


def device_of(module: nn.Module) -> str:
    (found,) = {p.device.type for p in module.parameters()}
    return found


class Moments:
    """Optimizer state as large as its weights."""

    def __init__(self, weights: nn.Module) -> None:
        self.state = [torch.zeros_like(p) for p in weights.parameters()]

    def to(self, device: torch.device) -> None:
        self.state = [tensor.to(device) for tensor in self.state]

    def device_type(self) -> str:
        return self.state[0].device.type


def training() -> dict[str, Any]:
    MEMORY.reset_peak_memory_stats()
    start = MEMORY.memory_allocated()
    experts = [module(64), module(64)]
    ids, values = [id(e.weight) for e in experts], [e.weight.detach().clone() for e in experts]
    moments = [Moments(expert) for expert in experts]
    residency = DeviceResidency(DEVICE)
    for expert, state in zip(experts, moments, strict=True):
        residency.manage(expert, state, alternating=True)
    devices, optimizer_devices = [], []
    for expert in (experts[0], experts[1], experts[0]):
        residency.bring(expert)
        devices.append([device_of(e) for e in experts])
        optimizer_devices.append([state.device_type() for state in moments])
    transfers: list[str] = []
    if IS_SIMULATED:
        with simulated_gpu.trace() as trace:
            residency.bring(experts[0])
        transfers = [kind for kind, *_ in trace.events if "_device" in kind]
    peak = MEMORY.max_memory_allocated() - start
    for expert in experts:
        residency.release(expert)
    return {
        "peak": peak,
        "one expert": 2 * 64 * KIB,
        "devices": devices,
        "optimizer devices": optimizer_devices,
        "transfers of a second bring": len(transfers),
        "weights are the same": all(
            torch.equal(e.weight, v) for e, v in zip(experts, values, strict=True)
        ),
        "parameters are the same objects": ids == [id(e.weight) for e in experts],
    }


def sampling() -> dict[str, Any]:
    MEMORY.reset_peak_memory_stats()
    start = MEMORY.memory_allocated()
    modules = [module(64), module(48), module(16)]
    modules[1].to(DEVICE)
    before = [device_of(m) for m in modules]
    with DeviceResidency(DEVICE).taking_turns(modules) as bring:
        for chosen in (2, 0, 1, 0, 2):
            bring(modules[chosen])
            assert device_of(modules[chosen]) == DEVICE.type
    return {
        "peak": MEMORY.max_memory_allocated() - start,
        "largest module": 64 * KIB,
        "devices before": before,
        "devices after": [device_of(m) for m in modules],
    }


def out_of_memory() -> dict[str, Any]:
    """The second module has two weights, of which only the first fits."""
    modules = [module(64), nn.Sequential(module(48), module(96)), module(16)]
    modules[0].to(DEVICE)
    values = [p.detach().cpu().clone() for m in modules for p in m.parameters()]
    before = [device_of(m) for m in modules]
    simulated_gpu.set_capacity(MEMORY.memory_allocated() + 32 * KIB)
    error = ""
    try:
        with DeviceResidency(DEVICE).taking_turns(modules) as bring:
            bring(modules[1])
    except torch.OutOfMemoryError as raised:
        error = type(raised).__name__
    after = [p.detach().cpu() for m in modules for p in m.parameters()]
    return {
        "error": error,
        "devices before": before,
        "devices after": [device_of(m) for m in modules],
        "weights are the same": all(torch.equal(a, b) for a, b in zip(values, after, strict=True)),
    }


def sampler(folder: Path) -> dict[str, Any]:
    path = write_tiny_model(folder / "model", "t2v-a14b", width=64, layers=2)
    request = SampleRequest(
        prompt="a red square",
        negative_prompt="",
        image=None,
        width=64,
        height=32,
        frames=5,
        steps=4,
        guidance=(4.0, 2.0),
        shift=6.0,
        seed=11,
        fps=8.0,
    )
    on_cpu = WanModelSampler(WanModelLoader().load(path)).sample(request)
    model = WanModelLoader().load(path)
    parts: list[Any] = [model.text_encoder, model.transformer, model.transformer_2, model.vae]
    model.transformer_2.to(DEVICE)
    model.transformer.train()
    model.transformer.blocks[0].eval()
    before = [device_of(part) for part in parts]
    modes = [m.training for part in parts for m in part.modules()]
    residents: list[list[str]] = []

    def look(*_: object) -> None:
        residents.append([device_of(model.transformer), device_of(model.transformer_2)])

    video = WanModelSampler(model).sample(request, on_step=look)
    return {
        "residents": sorted(map(list, {tuple(pair) for pair in residents})),
        "devices before": before,
        "devices after": [device_of(part) for part in parts],
        "modes are the same": modes == [m.training for part in parts for m in part.modules()],
        "mean difference to the CPU": float(np.abs(video.astype(int) - on_cpu.astype(int)).mean()),
    }


RUN = """
model: {{path: {model}, variant: t2v-a14b, dtype: float32, device: {device}}}
wan_config: {{max_frames: 5}}
video_data: {{sources: [{{path: {clips}}}], resolution: 4096}}
method: {{kind: lora, rank: 4}}
train: {{steps: 4, switch_expert_every: 1, ema: {{decay: 0.9, offload: false}}}}
sample: {{prompts: [a red square], width: 64, height: 64, frames: 5}}
output: {{dir: {folder}, name: run}}
"""


def run(folder: Path) -> dict[str, Any]:
    """A run of both experts: encoding, a step of each, and the moves that `bring_expert` asks."""
    write_clips(folder / "clips")
    write_tiny_model(folder / "model", "t2v-a14b", width=64, layers=2)
    paths = {name: (folder / name).as_posix() for name in ("model", "clips")}
    file = folder / "run.yaml"
    file.write_text(
        RUN.format(**paths, device=DEVICE.type, folder=folder.as_posix()), encoding="utf-8"
    )
    built = WanModelSetup(load_run(file)).build()
    assert built.model.vae is not None
    experts = built.state.experts
    start = [device_of(e.transformer) for e in experts.values()] + [device_of(built.model.vae)]
    for number, name in enumerate(("high", "low")):
        train_step(built, built.loader.step(number, name, 0))
    moves: list[tuple[str, str]] = []
    for name, expert in experts.items():
        assert expert.trainable is not None
        plain = expert.trainable.to

        def to(device: torch.device, name: str = name, plain: Any = plain) -> None:
            moves.append((name, device.type))
            plain(device)

        expert.trainable.to = to
    asked = []
    for name in ("low", "high", "high", "low"):
        moves.clear()
        built.bring_expert(name)
        asked.append(list(moves))
    return {
        "automatic device": str(resolve_device("auto")),
        "devices before the first step": start,
        "moves": asked,
        # Those of blocks are streamed.
        "devices": [device_of(expert.transformer.patch_embedding) for expert in experts.values()],
        "adapter devices": [
            next(p for p in expert.transformer.parameters() if p.requires_grad).device.type
            for expert in experts.values()
        ],
        "optimizer devices": [optimizer_devices(expert.trainable) for expert in experts.values()],
    }


def optimizer_devices(trainable: Any) -> list[str]:
    """Devices of the optimizer's state tensors; step counters stay in host memory with torch's."""
    own = {id(parameter) for parameter in trainable.weights.parameters.values()}
    optimizers = [o for o in gc.get_objects() if isinstance(o, torch.optim.Optimizer)]
    tensors = [
        value
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        if id(parameter) in own
        for key, value in state.items()
        if key != "step"
    ]
    assert tensors
    return sorted({tensor.device.type for tensor in tensors})
