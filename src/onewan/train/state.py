"""`TrainState`: everything that changes while a run trains, and how it is saved and loaded.

That is the trained weights, their optimizers and averages, and a few values. Everything else is a
function of the step and the run file: the order of the data, the noise, which expert a step trains,
the learning rate. A state is saved between two optimizer steps, so it never contains partly
accumulated gradients. It can be loaded on other devices and with another number of processes.
"""

from __future__ import annotations

import importlib.metadata
import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from onewan.errors import CheckpointError
from onewan.train.ema import Ema
from onewan.train.optimizers.trainable_optimizer import TrainableOptimizer
from onewan.train.trainables import ExpertMethod
from onewan.variants import Expert, ExpertName

_FACTS_FILE = "state.json"
_PACKAGES = ("onewan", "torch", "diffusers", "transformers", "peft")

TrainableName = ExpertName | Literal["embeddings"]
WeightSet = Literal["trained", "ema"]
"""Which weights to validate or export: the trained ones, or their moving average. The trained ones
of a schedule-free optimizer are its own average."""


class TrainableWeights(Protocol):
    """Reads and writes the weights of a trainable."""

    def read(self) -> dict[str, Tensor]:
        """Copies of all tensors that training changes, by name, on the CPU."""
        ...

    def write(self, weights: Mapping[str, Tensor], source: str) -> None:
        """The reverse of `read`, bit-exact. CheckpointError, which names the file as `source`, for
        missing or unexpected keys and for other shapes or dtypes."""
        ...


@dataclass(kw_only=True)
class Trainable:
    """Weights that are trained together by one optimizer: those of an expert, or the embeddings."""

    name: TrainableName
    weights: TrainableWeights
    optimizer: TrainableOptimizer
    optimizer_name: str
    """`optimizer.name` of the run file; a state of another optimizer is recognized by it."""
    lr: float
    """The full learning rate of most of the weights; LoRA+ and embeddings have others."""
    ema: Ema | None = None

    def using(self, weight_set: WeightSet) -> AbstractContextManager[None]:
        """A context in which the model computes with `weight_set`.

        Afterwards the trained weights are restored, bit-exact.
        """
        if weight_set == "ema":
            assert self.ema is not None
            return self.ema.applied()
        return self.optimizer.evaluating()

    def to(self, device: torch.device) -> None:
        """Move optimizer state and averages, but not the weights; values do not change."""
        self.optimizer.to(device)
        if self.ema is not None:
            self.ema.to(device)

    def save(self, folder: Path) -> None:
        """Write weights, optimizer and average into `folder`, a file for each."""
        save_file(self.weights.read(), folder / f"{self.name}.safetensors")
        saved = {"optimizer": self.optimizer_name, "weights": self.optimizer.state_dict()}
        torch.save(saved, folder / f"{self.name}_optimizer.pt")
        if self.ema is not None:
            torch.save(self.ema.state_dict(), folder / f"{self.name}_ema.pt")

    def load(self, folder: Path, *, allow_change: bool) -> Iterator[str]:
        """Continue from what `save` wrote; CheckpointError if it does not fit this run.

        With `allow_change` an optimizer or average that does not fit is reset, and a message about
        each is yielded.
        """
        weights, ema = folder / f"{self.name}.safetensors", folder / f"{self.name}_ema.pt"
        # The weights are loaded first: resetting an average copies them, and an optimizer may too.
        try:
            self.weights.write(load_file(weights), str(weights))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{weights}: can't be read ({error})") from error
        if self.ema is not None:
            if ema.is_file() or not allow_change:
                with _load_errors(ema):
                    self.ema.load_state_dict(_read(ema))
            else:
                yield f"{self.name}: the state has no moving average; it starts at the weights"
                self.ema.reset()
        optimizer = folder / f"{self.name}_optimizer.pt"
        try:
            with _load_errors(optimizer):
                saved = _read(optimizer)
                if saved["optimizer"] != self.optimizer_name:
                    raise ValueError(
                        f"the state is of optimizer {saved['optimizer']}, and this run's is "
                        f"{self.optimizer_name}"
                    )
                self.optimizer.load_state_dict(saved["weights"])
        except CheckpointError as error:
            # A reset changes the results, so the user has to permit it.
            if not allow_change:
                raise
            yield f"{self.name}: the optimizer is reset ({error})"


@dataclass(kw_only=True)
class TrainedExpert:
    """An expert that the run trains."""

    expert: Expert
    transformer: WanTransformer3DModel
    method: ExpertMethod | None = None
    trainable: Trainable | None = None
    """Both are None if only embeddings are trained: their gradients pass through the expert."""

    def base(self) -> AbstractContextManager[None]:
        """A context in which the transformer computes as the base model does."""
        return nullcontext() if self.method is None else self.method.base()


@dataclass(kw_only=True)
class TrainState:
    """The state of a run after `step` optimizer steps."""

    experts: dict[ExpertName, TrainedExpert]
    embeddings: Trainable | None = None
    step: int = 0
    base_loss: dict[str, float] = field(default_factory=dict)
    """The base model's validation loss by expert, to compare later losses with."""
    validated: int | None = None
    """The step of the last validation."""
    best: dict[str, float] | None = None
    """``step`` and ``loss`` of the validation with the lowest loss."""

    @property
    def best_step(self) -> int | None:
        return None if self.best is None else int(self.best["step"])

    @property
    def trainables(self) -> list[Trainable]:
        """The experts' trainables, then that of the embeddings."""
        found = [*(trained.trainable for trained in self.experts.values()), self.embeddings]
        return [trainable for trainable in found if trainable is not None]

    def trainables_of(self, name: ExpertName) -> list[Trainable]:
        """The trainables that a step of expert `name` updates."""
        found = (self.experts[name].trainable, self.embeddings)
        return [trainable for trainable in found if trainable is not None]

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write the state into `folder`, and `facts` (run file, data set) into its JSON file."""
        for trainable in self.trainables:
            trainable.save(folder)
        content = {
            "step": self.step,
            "base_loss": self.base_loss,
            "validated": self.validated,
            "best": self.best,
            "versions": versions(),
            **facts,
        }
        # This write alone is not atomic: `checkpoint.store` renames the folder when all files are
        # complete.
        (folder / _FACTS_FILE).write_text(json.dumps(content, indent=2), encoding="utf-8")

    def load(self, folder: Path, *, allow_change: bool = False) -> list[str]:
        """Continue from the state in `folder`; CheckpointError if it does not fit this run.

        With `allow_change` an optimizer or average that does not fit is reset; returns a message
        about each.
        """
        content = read_facts(folder)
        resets = [
            line
            for trainable in self.trainables
            for line in trainable.load(folder, allow_change=allow_change)
        ]
        self.step = content["step"]
        self.base_loss = content["base_loss"]
        self.validated = content["validated"]
        self.best = content["best"]
        return resets


@contextmanager
def _load_errors(file: Path) -> Iterator[None]:
    """Turn what loading a state's `file` raises into a CheckpointError that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{file}: does not fit what this run trains ({error})") from error


def _read(file: Path) -> Any:
    # weights_only: a state may come from elsewhere, and a pickle can run code.
    return torch.load(file, weights_only=True, map_location="cpu")


def read_facts(folder: Path) -> dict[str, Any]:
    """A state's JSON file: step, losses, package versions, run file, digest of the data set."""
    return json.loads((folder / _FACTS_FILE).read_text(encoding="utf-8"))


def versions() -> dict[str, str]:
    """Versions of the packages that the results of a run depend on."""
    return {package: importlib.metadata.version(package) for package in _PACKAGES}
