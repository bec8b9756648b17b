"""Settings of small runs, and how the results of two runs are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from onewan.config.load import load_run
from onewan.config.schema import ResolvedRun
from onewan.errors import Interrupted
from onewan.runs.control import request
from onewan.runs.event_file import read_events
from onewan.runs.events import Event, StepDone
from onewan.runs.layout import RunLayout
from onewan.runs.log import Listener
from onewan.train.run import run_folder
from onewan.train.trainer import WanTrainer

RunFile = Callable[..., ResolvedRun]
"""The `run_file` fixture: `run_file("t2v-a14b", "train.steps=3", ...)` is a resolved run."""

SMALL_SAMPLE = {"prompts": "[a]", "frames": 5, "width": 64, "height": 64, "steps": 2}
PLACEHOLDER = "embeddings=[{placeholder: <shape>, initial_text: a square}]"
CLASS_WORD = ["video_data.sources.0.trigger_word=ohwx", "video_data.sources.0.class_word=shape"]
"""Settings that keep the base model's predictions for a class word."""
METHODS: Mapping[str, list[str]] = {
    "lora": ["method={kind: lora, rank: 8}", "optimizer.lr=0.01"],
    "dora": ["method={kind: dora, rank: 8}", "optimizer.lr=0.01"],
    "loha": ["method={kind: loha, rank: 4}", "optimizer.lr=0.02"],
    "lokr": ["method={kind: lokr, rank: 4}", "optimizer.lr=0.02"],
    "oft": ["method={kind: oft, block_size: 16}", "optimizer.lr=0.01"],
    "fine_tune": [
        "method={kind: fine_tune, weights: stochastic, fused_step: true}",
        "model.dtype=bfloat16",
        "train.max_grad_norm=null",
        "optimizer.lr=0.001",
    ],
    "embedding": ["method={kind: embedding}", PLACEHOLDER, "optimizer.lr=0.05"],
}


def write_run_file(
    workshop: Path, folder: Path, variant: str, *overrides: str, name: str = "run"
) -> ResolvedRun:
    """A resolved run in `folder` on the model and the clips of the `workshop` fixture."""
    side = 128 if variant == "ti2v-5b" else 64
    path = folder / f"{name}.yaml"
    path.write_text(
        f"""
model: {{path: {(workshop / variant).as_posix()}, variant: {variant}, dtype: float32}}
wan_config: {{max_frames: 9}}
video_data:
  sources: [{{path: {(workshop / "clips").as_posix()}}}]
  resolution: {side * side}
  cache_dir: {(workshop / "cache").as_posix()}
method: {{kind: lora, rank: 4, alpha: 2}}
optimizer: {{lr: 0.005}}
train: {{steps: 6, save_every: 100, switch_expert_every: 2}}
validation: {{clips: 0, share: 0}}
sample: {{every: 0, at_start: false}}
output: {{dtype: null}}
logging: {{tensorboard: false}}
""",
        encoding="utf-8",
    )
    return load_run(path, [f"output.dir={folder / 'runs'}", *overrides])


def recorder(events: list[dict[str, Any]]) -> Listener:
    """A listener that appends each event to `events`, with the names of its line in the file."""
    return lambda event: events.append({"event": event.kind, **event.fields()})


def layout_of(config: ResolvedRun) -> RunLayout:
    return RunLayout(run_folder(config))


def leaves(node: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors and numbers in nested containers, as tensors by their key paths; of a tensor of
    few bits, what it consists of."""
    if isinstance(node, torch.Tensor):
        if hasattr(node, "__tensor_flatten__"):
            for part in node.__tensor_flatten__()[0]:
                yield f"{name}:{part}", getattr(node, part)
        else:
            yield name, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{name}:{key}")
    elif isinstance(node, (list, tuple)):
        for number, value in enumerate(node):
            yield from leaves(value, f"{name}:{number}")
    elif isinstance(node, (int, float)):
        yield name, torch.tensor(node)


def outcome(config: ResolvedRun) -> tuple[dict[str, Any], list[tuple[Any, ...]]]:
    """All tensors of the last state (weights, optimizers) and of the exports; all step events."""
    layout = layout_of(config)
    state = layout.state(layout.saved_steps()[-1])
    tensors: dict[str, Any] = {}
    for path in [*state.glob("*.safetensors"), *layout.weights_dir.glob("*.safetensors")]:
        # The names of exports begin with that of the run, in which compared runs differ.
        name = path.name.removeprefix(f"{layout.name}_")
        tensors |= {f"{name}:{k}": v for k, v in load_file(path).items()}
    for path in state.glob("*.pt"):
        tensors |= dict(leaves(torch.load(path, weights_only=True), path.name))
    steps = [
        (e["step"], e["expert"], e["loss"], e["grad_norm"], e["lr"], tuple(e["t"]))
        for e in read_events(layout.events)
        if e["event"] == "step"
    ]
    return tensors, steps


def assert_the_same_six_steps(one: ResolvedRun, two: ResolvedRun) -> None:
    """The same losses, norms, weights and optimizer states, bit for bit."""
    (tensors, steps), (others, other_steps) = outcome(one), outcome(two)
    assert steps == other_steps and len(steps) == 6
    assert tensors.keys() == others.keys() and len(tensors) > 20
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []


def stopped_and_resumed(config: ResolvedRun) -> None:
    """Train, with a stop after the third step and a resume from there."""

    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            request(layout_of(config), "stop")

    with pytest.raises(Interrupted):
        WanTrainer(config, listen=stop).fit()
    WanTrainer(config, resume=True).fit()
