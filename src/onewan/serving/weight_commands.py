"""The commands ``onewan convert`` and ``onewan merge`` as forms hold them: what can be chosen, how
the output is called, and the arguments that follow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from onewan.checkpoint.inspection import Inspection
from onewan.checkpoint.target_formats import LORA_FORMATS, MODEL_FORMATS
from onewan.dtypes import WeightDtype
from onewan.errors import OnewanError
from onewan.serving.commands import command_line
from onewan.serving.files import Entry, find_files, inspection
from onewan.serving.roots import Roots

CONVERTED = ("model", "transformer", "vae", "text_encoder", "adapter")
"""Kinds of weights that are converted."""
MERGED = ("model", "transformer", "adapter")
"""Kinds of weights that are merged."""
_UNCHANGED = "unchanged"
DTYPES = (_UNCHANGED, *get_args(WeightDtype))
"""What the weights of an output can be stored as."""
_MOST_CHOICES = 300
"""Files that are looked through for models and adapters."""


@dataclass(kw_only=True)
class WeightCommand(ABC):
    """A command that makes weights of `source`."""

    roots: Roots
    source: Path
    name: str
    """Of the output: a new name beside the source, or a whole path."""
    dtype: str = _UNCHANGED

    @abstractmethod
    def _arguments(self, output: Path) -> list[str]:
        """Without the type of the weights. OnewanError if something is missing."""

    def arguments(self) -> list[str]:
        """The arguments of onewan. OnewanError if something is missing or outside the roots."""
        options = [] if self.dtype == _UNCHANGED else ["--dtype", self.dtype]
        return [*self._arguments(self.output()), *options]

    def output(self) -> Path:
        """Where the output goes. OnewanError if it is outside the roots, or has no name."""
        if not self.name.strip():
            raise OnewanError("Give a name.")
        return self.roots.inside(self.source.parent / Path(self.name.strip()).expanduser())

    def problem(self) -> str | None:
        """What is wrong with the name of the output."""
        try:
            self.output()
        except OnewanError as error:
            return error.message
        return None

    def is_occupied(self) -> bool:
        """Whether something is where the output goes, which is replaced only with ``--force``."""
        output = self.output()
        return output.is_file() or (output.is_dir() and any(output.iterdir()))

    def line(self) -> str:
        """The command as it is typed in a terminal, or what is missing; nothing if `problem` says
        what is wrong."""
        try:
            return "" if self.problem() else command_line(self.arguments())
        except OnewanError as error:
            return error.message


@dataclass(kw_only=True)
class Conversion(WeightCommand):
    """``onewan convert``."""

    kind: str
    """Of the source, see `Inspection.kind`."""
    to: str
    """Name of the format."""
    base: str = ""
    """The model that an adapter was trained on, where it is needed."""

    @classmethod
    def of(cls, roots: Roots, source: Path, found: Inspection) -> Conversion:
        """The conversion to the first format that `source`, in which `found` was, does not have."""
        to = next(name for name in _formats(found.kind) if name != found.key_format)
        made = cls(roots=roots, source=source, name="", kind=found.kind, to=to)
        made.name = made.usual_name
        return made

    @property
    def formats(self) -> dict[str, str]:
        """What can be converted to, each with what it is for."""
        return {name: f"{name}: {what}" for name, what in _formats(self.kind).items()}

    @property
    def usual_name(self) -> str:
        """A name for the output: that of a folder where the format is one."""
        stem = self.source.stem if self.source.is_file() else self.source.name
        suffix = ".safetensors"
        if self.kind == "model" or (self.to == "diffusers" and self.kind != "adapter"):
            suffix = ""
        elif self.to == "official":
            suffix = "" if self.kind == "transformer" else ".pth"
        return f"{stem}_{self.to}{suffix}"

    def _arguments(self, output: Path) -> list[str]:
        base = self.base.strip()
        options = ["--base", str(self.roots.inside(base))] if base else []
        return ["convert", str(self.source), str(output), "--to", self.to, *options]


@dataclass
class WeightedAdapter:
    """An adapter to merge, which may still have to be chosen."""

    path: str | None
    weight: float | None = 1.0


@dataclass(kw_only=True)
class Merge(WeightCommand):
    """``onewan merge``."""

    models: dict[str, str]
    """Models and transformers to choose from: their shown names by path."""
    adapters: dict[str, str]
    """Adapters to choose from."""
    model: str | None
    chosen: list[WeightedAdapter] = field(default_factory=list[WeightedAdapter])

    @classmethod
    def of(cls, roots: Roots, entry: Entry, found: Inspection) -> Merge:
        """The merge of an adapter into a model, of which `entry` is one or the other."""
        path = str(entry.path)
        suffix = entry.path.suffix if entry.path.is_file() else ""
        is_adapter = found.kind == "adapter"
        return cls(
            roots=roots,
            source=entry.path,
            name=f"{entry.path.name.removesuffix(suffix)}_merged{suffix}",
            models={} if is_adapter else {path: entry.shown},
            adapters={path: entry.shown} if is_adapter else {},
            model=None if is_adapter else path,
        )

    def choose(self, path: str | None) -> WeightedAdapter:
        """One more adapter to merge, or a place for one."""
        self.chosen.append(WeightedAdapter(path))
        return self.chosen[-1]

    def find_choices(self) -> None:
        """Look for models and adapters to choose from."""
        weights = [each for each in find_files(self.roots).entries if each.kind == "weights"]
        for each in weights[:_MOST_CHOICES]:
            kind = inspection(each).kind
            if kind in ("model", "transformer"):
                self.models[str(each.path)] = each.shown
            elif kind == "adapter":
                self.adapters[str(each.path)] = each.shown

    def _arguments(self, output: Path) -> list[str]:
        if not self.model:
            raise OnewanError("Choose a model to merge into.")
        adapters = [f"{each.path}:{each.weight or 0:g}" for each in self.chosen if each.path]
        if not adapters:
            raise OnewanError("Choose an adapter to merge.")
        return ["merge", self.model, *adapters, str(output)]


def _formats(kind: str) -> Mapping[str, str]:
    return LORA_FORMATS if kind == "adapter" else MODEL_FORMATS
