"""Typed reading and writing of the files of a training state.

A state may come from another machine, another version or a damaged disk: whatever is wrong with a
file is a DamagedStateError that names the file and the field, before anything of it is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors.torch import load_file
from torch import Tensor

from onewan.checkpoint.store import DamagedStateError
from onewan.errors import CheckpointError, Interrupted, RankError
from onewan.files import read_input
from onewan.formats.backends import first_line
from onewan.formats.write import write_safetensors
from onewan.variants import ExpertName

FACTS_FILE = "state.json"
_MAX_FACTS_BYTES = 16 << 20
_MAX_STEP = 10**12

_Step = Annotated[int, Field(ge=0, le=_MAX_STEP)]
_Loss = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class BestStep(_Strict):
    """The validation with the lowest loss."""

    step: _Step
    loss: _Loss


class SavedAttention(_Strict):
    """The attention backend of a run, which its results depend on in the last bits."""

    backend: str
    """A name of `memory.attention`, other than auto."""
    device: str
    """The type of the device that it was chosen for, such as "cuda"."""


class StateFacts(_Strict):
    """Everything in a state except tensors: ``state.json``."""

    step: _Step
    base_loss: dict[ExpertName, _Loss]
    """The base model's validation loss by expert."""
    validated: _Step | None
    """The step of the last validation."""
    best: BestStep | None
    best_weights: dict[str, BestStep] = Field(default_factory=dict)
    """The lowest validation loss of each exported set of weights; empty in states of before it was
    recorded."""
    versions: dict[str, str]
    """Versions of the packages that the results depend on."""
    config: dict[str, Any]
    """The resolved run file."""
    dataset: str
    """Digest of the data set."""
    initial: dict[ExpertName, str] | None = None
    """Digest of the adapter of `method.init_from`, by expert; None in states of before it was
    recorded."""
    attention: SavedAttention | None = None
    """None in states of before it was recorded, when PyTorch's own choice was used."""
    feed_forward_chunks: dict[str, Annotated[int, Field(ge=1)]] | None = None
    """Number of chunks of the feed-forward layers by the size of clips (frames, height and width,
    "81x480x832"), which results depend on in the last bits. None in states of before it was
    recorded."""
    caption_draws: Literal["by sample"] | None = None
    """What keys the draws of captions within a step: the sample's index in the global batch. None
    in states of before it was recorded, when it was the micro-batch and the index in it."""
    overrides: list[str] | None = None
    """Dotted names of the fields that were given on the command line; None in states of before they
    were recorded."""

    @model_validator(mode="after")
    def _in_order(self) -> StateFacts:
        for name, step in (
            ("validated", self.validated),
            ("best.step", self.best.step if self.best else None),
            *((f"best_weights.{name}.step", b.step) for name, b in self.best_weights.items()),
        ):
            if step is not None and step > self.step:
                raise ValueError(f"{name} is {step}, which is after step {self.step}")
        return self


def write_facts(folder: Path, facts: StateFacts) -> None:
    """OSError if it can't be written. Not atomic: `checkpoint.store` renames the folder when all
    files are complete."""
    (folder / FACTS_FILE).write_text(facts.model_dump_json(indent=2), encoding="utf-8")


def read_facts(folder: Path) -> StateFacts:
    """The facts of the state in `folder`, whose name is the number of its step."""
    file = folder / FACTS_FILE
    with reading(file):
        content = read_input(file, _MAX_FACTS_BYTES)
    try:
        facts = StateFacts.model_validate_json(content)
    except ValidationError as error:
        problems = [
            ": ".join((*(".".join(map(str, each["loc"])),) * bool(each["loc"]), each["msg"]))
            for each in error.errors(include_url=False, include_input=False)
        ]
        more = f" and {len(problems) - 3} more problems" if len(problems) > 3 else ""
        raise DamagedStateError(f"{file}: {'; '.join(problems[:3])}{more}") from error
    if facts.step != int(folder.name):
        raise DamagedStateError(f"{file}: step: is {facts.step} in the folder of {folder.name}")
    return facts


def write_weights(file: Path, weights: Mapping[str, Tensor]) -> None:
    """OSError if it can't be written. Tensors on a device are copied to the CPU one at a time."""
    try:
        write_safetensors(file, weights, {})
    except CheckpointError as error:
        raise OSError(str(error)) from error


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file; all values are finite."""
    with reading(file):
        weights = load_file(file)
    check_finite_weights(file, weights)
    return weights


def check_finite_weights(source: Path, weights: Mapping[str, Tensor]) -> None:
    """DamagedStateError, which names `source`, if a value of the weights is not finite."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise DamagedStateError(f"{source}: {name} has NaN or infinite values")


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedOptimizer:
    """The file of an optimizer's state."""

    optimizer: str
    """`optimizer.name` of the run file."""
    weights: Mapping[Any, Any]
    """By the names of the weights. What is in it is checked by the optimizer, which knows it."""


def write_optimizer(file: Path, saved: SavedOptimizer) -> None:
    """OSError if it can't be written."""
    try:
        torch.save({"optimizer": saved.optimizer, "weights": saved.weights}, file)
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(
            f"{file}: can't be written; is the disk full? ({first_line(error)})"
        ) from error


def read_optimizer(file: Path) -> SavedOptimizer:
    """What `write_optimizer` has written, with its tensors on the CPU."""
    with reading(file), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged files, about the protocol that they name
        # weights_only: a state may come from elsewhere, and a pickle can run code.
        content = torch.load(file, weights_only=True, map_location="cpu")
    if not isinstance(content, dict):
        raise DamagedStateError(f"{file}: is not the state of an optimizer")
    name, weights = (cast("dict[str, Any]", content).get(key) for key in ("optimizer", "weights"))
    if not isinstance(name, str) or not isinstance(weights, dict):
        what = "optimizer: is not a name" if not isinstance(name, str) else "weights: is no mapping"
        raise DamagedStateError(f"{file}: {what}")
    return SavedOptimizer(optimizer=name, weights=cast("dict[Any, Any]", weights))


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn whatever reading `file` raises into a DamagedStateError that names it, but not that
    another process has failed which reads it too."""
    try:
        yield
    except (DamagedStateError, Interrupted, RankError):
        raise
    except FileNotFoundError as error:
        raise DamagedStateError(f"{file}: is missing") from error
    except OSError as error:
        raise DamagedStateError(f"{file}: can't be read ({error.strerror or error})") from error
    # A few flipped bits make torch.load raise nearly any type of exception.
    except Exception as error:
        raise DamagedStateError(f"{file}: can't be read ({first_line(error)})") from error
