"""Counts what training, validation and sampling do on the simulated accelerator.

For `unit/test_waits.py`; `case` needs the fixture `sim`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import simulated_gpu
import torch
from torch import Tensor

from onewan.config.load import load_run
from onewan.demo.clips import write_clips
from onewan.demo.tiny_model import write_tiny_model
from onewan.sample.generate import WanModelSampler
from onewan.train.run import Run
from onewan.train.setup import WanModelSetup
from onewan.train.step import train_step
from onewan.train.validation import ExpertLosses, measure

DEVICE = "sim"
SIM: Any = torch.get_device_module(DEVICE)
EXPERTS = ("high", "high", "low", "low", "high", "high")
RUN = """
model: {{path: {model}, variant: t2v-a14b, dtype: float32, device: {device}}}
wan_config: {{max_frames: 5}}
video_data: {{sources: [{{path: {clips}}}], resolution: 4096}}
{method}
train:
  steps: 8
  switch_expert_every: 2
  batch_size: 2
  accumulation: 2
  ema: {{decay: 0.9, offload: {offload}}}
validation: {{timesteps: 3}}
sample: {{prompts: [a red square], width: 64, height: 64, frames: 5, steps: 2}}
output: {{dir: {folder}, name: {name}}}
"""
CASES = {
    "lora": ("method: {kind: lora, rank: 32}", True),
    "embeddings": ("method: {kind: embedding}\nembeddings: [{placeholder: a}]", True),
    "fine-tuning": ("method: {kind: fine_tune}", False),
    "schedule-free": (
        "method: {kind: lora, rank: 32}\noptimizer: {name: adamw_schedule_free}",
        False,
    ),
}


def build(folder: Path, case: str, device: str) -> Run:
    method, offload = CASES[case]
    text = RUN.format(
        model=(folder / "model").as_posix(),
        clips=(folder / "clips").as_posix(),
        folder=folder.as_posix(),
        name=f"{case}-{device}",
        device=device,
        method=method,
        offload=str(offload).lower(),
    )
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return WanModelSetup(load_run(file)).build()


class Counted:
    """Waits and bytes of calls, by name; each list has an entry per call."""

    def __init__(self) -> None:
        self.found: dict[str, list[dict[str, Any]]] = {}

    def __call__(self, name: str, call: Callable[[], Any]) -> Any:
        simulated_gpu.reset_counters()
        SIM.reset_peak_memory_stats()
        with simulated_gpu.trace(where=True) as trace:
            result = call()
        bytes_of = {kind: size for kind, (_, size) in simulated_gpu.counters().items()}
        self.found.setdefault(name, []).append(
            {
                "waits": sum(trace.waits().values()),
                "places": [place for place, _ in trace.waits().most_common(3)],
                "to host": sum(n for kind, n in bytes_of.items() if kind.startswith("from_dev")),
                "peak": SIM.max_memory_allocated(),
            }
        )
        return result


def weights_of(run: Run) -> dict[str, list[Tensor]]:
    """Trained weights, averages and optimizer states, in host memory."""
    found: dict[str, list[Tensor]] = {}
    for trainable in run.state.trainables:
        assert trainable.ema is not None
        state: list[Tensor] = []
        for entry in trainable.optimizer.state_dict().values():
            state += [value for value in entry["state"].values() if isinstance(value, Tensor)]
        weights = list(trainable.weights.read().values())
        found[trainable.name] = [*weights, *trainable.ema.state_dict().values(), *state]
    return found


def saved(run: Run, folder: Path) -> dict[str, bytes]:
    """The files of weights and averages in a state that is saved while the low expert is brought,
    which moves what the last step has trained off the device."""
    run.bring_expert("low")
    folder.mkdir()
    run.state.save(folder, config={}, dataset="", overrides=())
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def losses(run: Run, name: str) -> list[float | None]:
    found = ExpertLosses.of([measure(run, name, with_base=False, between=lambda: None)])  # pyright: ignore
    return [found.trained, found.ema]


def train(run: Run, count: Callable[[str, Callable[[], Any]], Any]) -> list[Any]:
    """Steps of both experts, then a validation; returns all losses."""
    results: list[Any] = []
    for number, expert in enumerate(EXPERTS):
        count("bring", lambda expert=expert: run.bring_expert(expert))
        step = run.loader.step(number, expert, number // 2)
        results.append(count("step", lambda step=step: train_step(run, step)).loss)
        run.state.step += 1
    results.append(count("validation", lambda: losses(run, "high")))
    return results


def uncounted(name: str, call: Callable[[], Any]) -> Any:
    del name
    return call()


def are_equal(some: dict[str, list[Tensor]], others: dict[str, list[Tensor]]) -> bool:
    return some.keys() == others.keys() and all(
        torch.equal(a, b) for name in some for a, b in zip(some[name], others[name], strict=True)
    )


def sample(run: Run) -> int:
    """Make the run's video; returns the largest number of bytes on the device between two denoising
    steps. The peak is the VAE's, which is not much smaller in a tiny model."""
    resident: list[int] = []
    WanModelSampler(run.model, residency=run.residency).sample(
        run.samples[0],
        text=None if run.config.embeddings else run.dataset.source.text,
        on_step=lambda *_: resident.append(SIM.memory_allocated()),
    )
    return max(resident)


def counted(folder: Path, name: str) -> tuple[dict[str, Any], list[Any], dict[str, list[Tensor]]]:
    """A run on the device: (observations, losses, final weights)."""
    gc.collect()  # what other tests have left on the device
    count, before = Counted(), SIM.memory_allocated()
    run = build(folder, name, DEVICE)
    results = train(run, count)
    weights = weights_of(run)
    while_training = SIM.memory_allocated()
    denoising = count("sampling", lambda: sample(run))
    for expert in ("low", "high"):  # what is trained of the idle one comes back with it
        run.bring_expert(expert)
    found = {
        **count.found,
        "bytes while training": while_training - before,
        "bytes while denoising": denoising - before,
        "sampling changes nothing": are_equal(weights, weights_of(run)),
        "bytes are back": SIM.memory_allocated() == while_training,
    }
    return found, results, weights


def case(folder: Path, name: str) -> dict[str, Any]:
    """What a run of `CASES` does, and whether its numbers are the CPU's."""
    write_clips(folder / "clips")
    write_tiny_model(folder / "model", "t2v-a14b", width=64, layers=2)
    on_cpu = build(folder, name, "cpu")
    expected, weights = train(on_cpu, uncounted), weights_of(on_cpu)
    found, results, device_weights = counted(folder, name)
    gc.collect()
    with ExitStack() as checks:
        checks.enter_context(simulated_gpu.late_copies())
        report = checks.enter_context(simulated_gpu.sanitizer())
        late = build(folder, name, DEVICE)
        late_results = train(late, uncounted)
        late_saved = saved(late, folder / "saved late")
        late_weights = weights_of(late)
    expert = on_cpu.state.experts["high"]
    return {
        **found,
        "validation clips": len(on_cpu.validation_batches()),
        "losses are the cpu's": results == expected,
        "weights are the cpu's": are_equal(device_weights, weights),
        "late copies change nothing": late_results == expected and are_equal(late_weights, weights),
        "saved behind a change of expert": late_saved == saved(on_cpu, folder / "saved on the cpu"),
        "reports": list(report)[:3],
        "trained": {
            t.name: sum(w.nbytes for w in t.weights.read().values())
            for t in on_cpu.state.trainables
        },
        "states": {n: sum(t.nbytes for t in tensors) for n, tensors in weights.items()},
        "expert": sum(
            tensor.nbytes
            for tensor in (*expert.transformer.parameters(), *expert.transformer.buffers())
        ),
    }
