"""`TrainState`: all that changes while a run trains, and how it is saved and read back.

Adapters, optimizers and the step number are the whole of it: everything else (order of the data,
noise, turns of the experts, learning rate) is a function of the step and the run file.
"""

from __future__ import annotations

import importlib.metadata
import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onewan.adapters.lora import adapter_weights, load_adapter_weights
from onewan.errors import CheckpointError
from onewan.variants import Expert, ExpertName

_FACTS = "state.json"
_PACKAGES = ("onewan", "torch", "diffusers", "transformers", "peft")


@dataclass(kw_only=True)
class TrainedExpert:
    """An expert with an adapter, and the optimizer of that adapter."""

    expert: Expert
    transformer: WanTransformer3DModel
    parameters: list[nn.Parameter]
    """Those of the adapter. Kept, since finding them among all modules takes a while."""
    optimizer: torch.optim.Optimizer

    def to(self, device: torch.device) -> None:
        """Move weights and optimizer state; the numbers stay the same."""
        self.transformer.to(device)  # pyright: ignore[reportArgumentType]  (diffusers hides self)
        for state in self.optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    state[name] = value.to(device)


@dataclass(kw_only=True)
class TrainState:
    """The state of a run after `step` optimizer steps."""

    experts: dict[ExpertName, TrainedExpert]
    step: int = 0
    first_grid: dict[str, float] = field(default_factory=dict)
    """Each expert's loss on the fixed grid before the first step, to compare later ones with."""

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write the state into `folder`; `facts` (run file, data set) are kept beside it."""
        for name, trained in self.experts.items():
            save_file(adapter_weights(trained.transformer), folder / f"{name}.safetensors")
            torch.save(trained.optimizer.state_dict(), folder / f"{name}_optimizer.pt")
        about = {
            "step": self.step,
            "first_grid": self.first_grid,
            "versions": versions(),
            **facts,
        }
        (folder / _FACTS).write_text(json.dumps(about, indent=2), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Take over the state in `folder`. CheckpointError names what does not fit."""
        about = read_facts(folder)
        for name, trained in self.experts.items():
            weights, optimizer = folder / f"{name}.safetensors", folder / f"{name}_optimizer.pt"
            try:
                load_adapter_weights(trained.transformer, load_file(weights), str(weights))
                trained.optimizer.load_state_dict(
                    torch.load(optimizer, weights_only=True, map_location="cpu")
                )
            except (OSError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
                raise CheckpointError(
                    f"{folder}: the {name} expert's state does not fit this run ({error})"
                ) from error
        self.step = about["step"]
        self.first_grid = about["first_grid"]


def read_facts(folder: Path) -> dict[str, Any]:
    """What was noted beside a state: step, versions, run file, digest of the data set."""
    return json.loads((folder / _FACTS).read_text(encoding="utf-8"))


def versions() -> dict[str, str]:
    """Versions of the packages on which the numbers of a run depend."""
    return {package: importlib.metadata.version(package) for package in _PACKAGES}
