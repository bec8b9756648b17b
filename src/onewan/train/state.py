"""`TrainState`: everything that changes while a run trains, and how it is saved and loaded.

That is the trained weights, their optimizers and averages, and a few values. Everything else is a
function of the step and the run file: the order of the data, the noise, which expert a step trains,
the learning rate. A state is saved between two optimizer steps, so it never contains partly
accumulated gradients. It can be loaded on other devices and with another number of processes.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from onewan.checkpoint.store import DamagedStateError
from onewan.errors import CheckpointError
from onewan.train.ema import Ema
from onewan.train.optimizers.trainable_optimizer import TrainableOptimizer
from onewan.train.saved_state import (
    FACTS_FILE,
    BestStep,
    SavedAttention,
    SavedOptimizer,
    StateFacts,
    write_facts,
)
from onewan.train.sharding import Sharding
from onewan.train.trainable_files import (
    saved_averages,
    saved_optimizer,
    saved_weights,
    write_trainable,
)
from onewan.train.trainables import ExpertMethod
from onewan.variants import Expert, ExpertName

if TYPE_CHECKING:  # a run of one process imports nothing of torch.distributed
    from onewan.memory.sharded_blocks import ShardedTransformer

_PACKAGES = ("onewan", "torch", "diffusers", "transformers", "peft")

TrainableName = ExpertName | Literal["embeddings"]
WeightSet = Literal["trained", "ema"]
"""Which weights to validate or export: the trained ones, or their moving average. The trained ones
of a schedule-free optimizer are its own average."""


class TrainableWeights(Protocol):
    """Reads and writes the weights of a trainable."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The trained parameters, by name; of sharded weights this process's rows."""
        ...

    def read(self) -> dict[str, Tensor]:
        """Copies of all tensors that training changes, by name, on the CPU."""
        ...

    def present(self) -> Mapping[str, Tensor]:
        """As `read`, but large tensors are not copied; to be used before the next step."""
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
    sharding: Sharding | None = None
    """None if this process has all weights as a whole."""
    settle: Callable[[], None] = lambda: None
    """Returns when host memory has the values of what has left the device, before they are read or
    written there (`DeviceResidency.settle`)."""

    def using(self, weight_set: WeightSet) -> AbstractContextManager[None]:
        """A context in which the model computes with `weight_set`.

        Afterwards the trained weights are restored, bit-exact.
        """
        self.settle()
        if weight_set == "ema":
            assert self.ema is not None
            return self.ema.applied()
        return self.optimizer.evaluating()

    def to(self, device: torch.device) -> None:
        """Move optimizer state and averages, but not the weights; values do not change."""
        self.optimizer.to(device)
        if self.ema is not None:
            self.ema.to(device)

    @property
    def files(self) -> list[str]:
        """Names of the files that `save` always writes; those with weights may be sharded."""
        return [f"{self.name}_optimizer.pt"]

    @property
    def count(self) -> int:
        """The number of all trained values."""
        own = {name: tensor.shape for name, tensor in self.weights.present().items()}
        whole = own if self.sharding is None else {**own, **self.sharding.shapes}
        return sum(whole[name].numel() for name in own)

    @property
    def replicated(self) -> list[nn.Parameter]:
        """The parameters of which each process of a group has all values."""
        if self.sharding is None:
            return self.optimizer.trained_parameters
        own = self.weights.parameters.items()
        return [p for name, p in own if name not in self.sharding.shapes]

    def save(self, folder: Path) -> None:
        """Write weights, optimizer and average into `folder` (`onewan.train.trainable_files`).
        OSError if a file can't be written."""
        self.settle()
        write_trainable(
            folder,
            self.name,
            self.weights.present(),
            None if self.ema is None else self.ema.state_dict(),
            SavedOptimizer(optimizer=self.optimizer_name, weights=self.optimizer.state_dict()),
            self.sharding,
        )

    def load(self, folder: Path, *, allow_change: bool) -> Iterator[str]:
        """Continue from what `save` wrote. DamagedStateError if a file can't be read, or is not of
        this run.

        With `allow_change` an optimizer or average that does not fit is reset, and a message about
        each is yielded; weights that do not fit are a CheckpointError.
        """
        self.settle()
        # The weights are loaded first: resetting an average copies them, and an optimizer may too.
        tensors = saved_weights(folder, self.name, self.sharding)
        with _unfit(damaged=not allow_change):
            self.weights.write(tensors, str(folder / f"{self.name}.safetensors"))
        if self.ema is not None:
            yield from self._load_average(self.ema, folder, allow_change)
        optimizer = folder / f"{self.name}_optimizer.pt"
        saved = saved_optimizer(folder, self.name, self.sharding)
        try:
            if saved.optimizer != self.optimizer_name:
                raise ValueError(
                    f"is of optimizer {saved.optimizer}, and this run's is {self.optimizer_name}"
                )
            self.optimizer.load_state_dict(saved.weights)
        except ValueError as error:
            # A reset changes the results, so the user has to permit it.
            if not allow_change:
                raise DamagedStateError(f"{optimizer}: {error}") from error
            yield f"{self.name}: the optimizer is reset ({optimizer}: {error})"

    def values(self) -> dict[str, Any]:
        """Everything that `save` writes, in host memory: for another process of the run."""
        self.settle()
        values = {"weights": self.weights.read(), "optimizer": self.optimizer.state_dict()}
        if self.ema is not None:
            values["ema"] = self.ema.state_dict()
        return values

    def use(self, values: Mapping[str, Any], source: str) -> None:
        """Continue from the `values` of the process `source`, which has trained these weights."""
        self.settle()
        self.weights.write(values["weights"], source)
        if self.ema is not None:
            self.ema.load_state_dict(values["ema"])
        self.optimizer.load_state_dict(values["optimizer"])

    def _load_average(self, ema: Ema, folder: Path, allow_change: bool) -> Iterator[str]:
        averages = saved_averages(folder, self.name, self.sharding, required=not allow_change)
        if averages is None:
            yield f"{self.name}: the state has no moving average; it starts at the weights"
            ema.reset()
            return
        try:
            ema.load_state_dict(averages)
        except ValueError as error:
            file = folder / f"{self.name}_ema.safetensors"
            if not allow_change:
                raise DamagedStateError(f"{file}: {error}") from error
            yield f"{self.name}: the moving average starts at the weights ({file}: {error})"
            ema.reset()


@contextmanager
def _unfit(*, damaged: bool) -> Iterator[None]:
    """If `damaged`, tensors that do not fit the run are damage, since the run file is the same."""
    try:
        yield
    except CheckpointError as error:
        if not damaged:
            raise
        raise DamagedStateError(str(error)) from error


@dataclass(kw_only=True)
class TrainedExpert:
    """An expert that the run trains."""

    expert: Expert
    transformer: WanTransformer3DModel
    method: ExpertMethod | None = None
    trainable: Trainable | None = None
    """Both are None if only embeddings are trained: their gradients pass through the expert."""
    initial_digest: str | None = None
    """`AdapterFile.digest` of the file of `method.init_from` that it was initialized from, if any.
    """

    sharded: ShardedTransformer | None = None
    """None if this process has the weights of all blocks."""

    def whole(self) -> AbstractContextManager[bool]:
        """A context in which the transformer has its whole weights, to be written to files; it
        yields whether that is so in this process. Where weights are sharded, all processes that
        have shards enter it, and the first of them has the weights in host memory."""
        return nullcontext(True) if self.sharded is None else self.sharded.whole()

    def base(self) -> AbstractContextManager[None]:
        """A context in which the transformer computes as the base model does."""
        return nullcontext() if self.method is None else self.method.base()


@dataclass(kw_only=True)
class TrainState:
    """The state of a run after `step` optimizer steps."""

    experts: dict[ExpertName, TrainedExpert]
    embeddings: Trainable | None = None
    step: int = 0
    base_loss: dict[ExpertName, float] = field(default_factory=dict)
    """The base model's validation loss by expert, to compare later losses with."""
    validated: int | None = None
    """The step of the last validation."""
    best: BestStep | None = None
    """The validation with the lowest mean loss of all experts, for `train.keep_best`."""
    best_weights: dict[str, BestStep] = field(default_factory=dict)
    """The validation with the lowest loss of each exported set of weights (`train.best`)."""
    attention: SavedAttention | None = None
    """The attention backend that the run keeps; None until it is chosen (`train.attention`)."""
    feed_forward_chunks: Mapping[str, int] = field(default_factory=dict)
    """Those that the run keeps, by the size of clips (`train.chunks`)."""

    @property
    def best_step(self) -> int | None:
        return None if self.best is None else self.best.step

    @property
    def best_now(self) -> list[str]:
        """Names of the weights (`best_weights`) whose best step is the present one."""
        return [name for name, best in self.best_weights.items() if best.step == self.step]

    @property
    def trainables(self) -> list[Trainable]:
        """The experts' trainables, then that of the embeddings."""
        found = [*(trained.trainable for trained in self.experts.values()), self.embeddings]
        return [trainable for trainable in found if trainable is not None]

    def trainables_of(self, name: ExpertName) -> list[Trainable]:
        """The trainables that a step of expert `name` updates."""
        found = (self.experts[name].trainable, self.embeddings)
        return [trainable for trainable in found if trainable is not None]

    @property
    def initial_digests(self) -> dict[ExpertName, str]:
        """`TrainedExpert.initial_digest` of the experts that have one."""
        return {
            name: trained.initial_digest
            for name, trained in self.experts.items()
            if trained.initial_digest is not None
        }

    @property
    def files(self) -> list[str]:
        """Names of the files that every state of this run has."""
        return [FACTS_FILE, *(name for trainable in self.trainables for name in trainable.files)]

    def save(
        self,
        folder: Path,
        *,
        config: Mapping[str, Any],
        dataset: str,
        overrides: Sequence[str],
        trainables: Sequence[Trainable] | None = None,
    ) -> None:
        """Write the state into `folder`, with the resolved run file, the digest of the data set,
        and the fields that the command line gave; of the trainables only the given ones, where
        other processes write the others. OSError if a file can't be written."""
        for trainable in self.trainables if trainables is None else trainables:
            trainable.save(folder)
        facts = StateFacts(
            step=self.step,
            base_loss=self.base_loss,
            validated=self.validated,
            best=self.best,
            best_weights=self.best_weights,
            versions=versions(),
            config=dict(config),
            dataset=dataset,
            initial=self.initial_digests,
            attention=self.attention,
            feed_forward_chunks=dict(self.feed_forward_chunks),
            caption_draws="by sample",
            overrides=list(overrides),
        )
        write_facts(folder, facts)

    def load(self, folder: Path, facts: StateFacts, *, allow_change: bool = False) -> list[str]:
        """Continue from the state in `folder`, whose `facts` have been read. DamagedStateError if
        another file is damaged or, without `allow_change`, does not fit this run.

        With `allow_change` an optimizer or average that does not fit is reset; returns a message
        about each.
        """
        resets = [
            line
            for trainable in self.trainables
            for line in trainable.load(folder, allow_change=allow_change)
        ]
        self.step = facts.step
        self.base_loss = dict(facts.base_loss)
        self.validated = facts.validated
        self.best = facts.best
        self.best_weights = dict(facts.best_weights)
        return resets


def versions() -> dict[str, str]:
    """Versions of the packages that the results of a run depend on."""
    return {package: importlib.metadata.version(package) for package in _PACKAGES}
