"""`TrainState`: all that changes while a run trains, and how it is saved and read back.

Weights that train, their optimizers and averages, and a few numbers are the whole of it. Everything
else is a function of the step and the run file: order of the data, noise, turns of the experts,
learning rate. A state is one between two optimizer steps, so no accumulation is ever under way in
it; and it knows nothing of devices or processes, whose number may differ when it is read.
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

_FACTS = "state.json"
_PACKAGES = ("onewan", "torch", "diffusers", "transformers", "peft")

TrainableName = ExpertName | Literal["embeddings"]
WeightSet = Literal["trained", "ema"]


class TrainableWeights(Protocol):
    """Where the weights of a trainable are read from and written to."""

    def read(self) -> dict[str, Tensor]:
        """All that training changed, by name, on the CPU."""
        ...

    def write(self, weights: Mapping[str, Tensor], source: str) -> None:
        """The reverse of `read`, bit for bit. `source` names the file for the CheckpointError that
        missing, surplus or misshapen weights raise."""
        ...


@dataclass(kw_only=True)
class Trainable:
    """Weights that train together under one optimizer: those of an expert, or the embeddings."""

    name: TrainableName
    weights: TrainableWeights
    optimizer: TrainableOptimizer
    optimizer_name: str
    """Its name, by which a state's is known."""
    lr: float
    """The full learning rate of most of the weights."""
    ema: Ema | None = None

    def using(self, kind: WeightSet) -> AbstractContextManager[None]:
        """The weights as they are to be used: trained (by a schedule-free optimizer, averaged), or
        the moving average. Afterwards they are, to the bit, what training goes on with."""
        if kind == "ema":
            assert self.ema is not None
            return self.ema.applied()
        return self.optimizer.evaluating()

    def to(self, device: torch.device) -> None:
        """Move what goes with the weights; the numbers stay the same."""
        self.optimizer.to(device)
        if self.ema is not None:
            self.ema.to(device)

    def save(self, folder: Path) -> None:
        save_file(self.weights.read(), folder / f"{self.name}.safetensors")
        kept = {"optimizer": self.optimizer_name, "weights": self.optimizer.state_dict()}
        torch.save(kept, folder / f"{self.name}_optimizer.pt")
        if self.ema is not None:
            torch.save(self.ema.state_dict(), folder / f"{self.name}_ema.pt")

    def load(self, folder: Path, *, allow_change: bool) -> Iterator[str]:
        """Take over what `save` wrote. Yields what had to start anew, where that is allowed."""
        weights, ema = folder / f"{self.name}.safetensors", folder / f"{self.name}_ema.pt"
        try:
            self.weights.write(load_file(weights), str(weights))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{weights}: can't be read ({error})") from error
        if self.ema is not None:
            if ema.is_file() or not allow_change:
                with self._fitting(ema):
                    self.ema.load_state_dict(_read(ema))
            else:
                yield f"{self.name}: the moving average starts from the weights as they are"
                self.ema.restart()
        optimizer = folder / f"{self.name}_optimizer.pt"
        try:
            with self._fitting(optimizer):
                kept = _read(optimizer)
                if kept["optimizer"] != self.optimizer_name:
                    raise ValueError(f"is of {kept['optimizer']} and not of {self.optimizer_name}")
                self.optimizer.load_state_dict(kept["weights"])
        except CheckpointError as error:
            if not allow_change:
                raise
            yield f"{self.name}: the optimizer starts anew ({error})"

    @contextmanager
    def _fitting(self, file: Path) -> Iterator[None]:
        """What is wrong with a state's `file`, as a CheckpointError."""
        try:
            yield
        except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{file}: does not fit what this run trains ({error})") from error


@dataclass(kw_only=True)
class TrainedExpert:
    """An expert that has steps in the run."""

    expert: Expert
    transformer: WanTransformer3DModel
    method: ExpertMethod | None = None
    trainable: Trainable | None = None
    """Both None if nothing of the expert itself trains, but embeddings through it."""

    def to(self, device: torch.device) -> None:
        self.transformer.to(device)  # pyright: ignore[reportArgumentType]  (diffusers hides self)
        if self.trainable is not None:
            self.trainable.to(device)

    def base(self) -> AbstractContextManager[None]:
        """The expert as it was before training, for as long as the block lasts."""
        return nullcontext() if self.method is None else self.method.base()


@dataclass(kw_only=True)
class TrainState:
    """The state of a run after `step` optimizer steps."""

    experts: dict[ExpertName, TrainedExpert]
    embeddings: Trainable | None = None
    step: int = 0
    base_loss: dict[str, float] = field(default_factory=dict)
    """Each expert's validation loss of the base model, to compare later ones with."""
    validated: int | None = None
    """The step of the last validation, and"""
    best: dict[str, float] | None = None
    """``step`` and ``loss`` of the one with the lowest loss."""

    @property
    def best_step(self) -> int | None:
        return None if self.best is None else int(self.best["step"])

    @property
    def trainables(self) -> list[Trainable]:
        """All that trains: the experts' trainables, then the embeddings."""
        found = [*(trained.trainable for trained in self.experts.values()), self.embeddings]
        return [trainable for trainable in found if trainable is not None]

    def trainables_of(self, name: ExpertName) -> list[Trainable]:
        """What moves in a step of expert `name`."""
        found = (self.experts[name].trainable, self.embeddings)
        return [trainable for trainable in found if trainable is not None]

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write the state into `folder`; `facts` (run file, data set) are kept beside it."""
        for trainable in self.trainables:
            trainable.save(folder)
        about = {
            "step": self.step,
            "base_loss": self.base_loss,
            "validated": self.validated,
            "best": self.best,
            "versions": versions(),
            **facts,
        }
        (folder / _FACTS).write_text(json.dumps(about, indent=2), encoding="utf-8")

    def load(self, folder: Path, *, allow_change: bool = False) -> list[str]:
        """Take over the state in `folder`. CheckpointError names what does not fit.

        With `allow_change` an optimizer or average that does not fit starts anew; returns a line
        for each that did.
        """
        about = read_facts(folder)
        anew = [
            line
            for trainable in self.trainables
            for line in trainable.load(folder, allow_change=allow_change)
        ]
        self.step = about["step"]
        self.base_loss = about["base_loss"]
        self.validated = about["validated"]
        self.best = about["best"]
        return anew


def _read(file: Path) -> Any:
    return torch.load(file, weights_only=True, map_location="cpu")


def read_facts(folder: Path) -> dict[str, Any]:
    """What was noted beside a state: step, versions, run file, digest of the data set."""
    return json.loads((folder / _FACTS).read_text(encoding="utf-8"))


def versions() -> dict[str, str]:
    """Versions of the packages on which the numbers of a run depend."""
    return {package: importlib.metadata.version(package) for package in _PACKAGES}
