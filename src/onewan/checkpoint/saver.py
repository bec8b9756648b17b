"""Writes adapters, embeddings and models for other programs, and converts adapter files.

`onewan.formats` knows keys and tensors; this module adds the header: ModelSpec's fields, facts
about the run as ``onewan.<name>``, and entries of a former header. One file holds one expert. Both
experts' files have the prefix ``transformer.`` in diffusers' format, since diffusers silently
ignores any other (``load_into_transformer_2=True`` selects the expert). Training states are written
by `onewan.checkpoint.store`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import torch

from onewan.checkpoint.convert import WriteResult, save_model
from onewan.checkpoint.layouts import FORMAT_VERSION
from onewan.checkpoint.target_formats import ModelFormat
from onewan.errors import CheckpointError
from onewan.formats.adapter import ModuleAdapter
from onewan.formats.embedding import INPUT, OUTPUT
from onewan.formats.lora import KeyFormat, LoraFormat, WanShape
from onewan.formats.lora_files import PEFT_SETTINGS, read_adapter
from onewan.formats.lora_writing import BaseWeights, FormattedAdapter, stored, to_format
from onewan.formats.modelspec import HASH, model_spec
from onewan.formats.weights import expert_in_name
from onewan.formats.write import write_safetensors
from onewan.model.embedding import WanModelEmbedding
from onewan.model.wan import WanModel
from onewan.variants import Expert, ExpertName, Variant

_PER_FILE_ENTRIES = ("format", HASH, PEFT_SETTINGS, "onewan.rank", "onewan.alpha")
"""Entries of a header that are valid for one file only, and are computed again for another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterHeader:
    """The entries of an adapter file's header that do not follow from its tensors."""

    facts: Mapping[str, str | int | float] = field(default_factory=dict)
    """About the run, written as ``onewan.<name>``: ``variant``, ``steps``, ...; `expert_of` reads
    ``expert``."""
    title: str | None = None
    """ModelSpec's title."""
    resolution: tuple[int, int] | None = None
    """Width and height in pixels, for ModelSpec."""
    date: datetime | None = None
    """None is now."""
    kept: Mapping[str, str] = field(default_factory=dict)
    """Entries of a former header to keep; all other fields take precedence."""

    def metadata(self, modules: Mapping[str, ModuleAdapter], format: KeyFormat) -> dict[str, str]:
        """The header's entries for an adapter of `modules` in `format`."""
        dropped = (*_PER_FILE_ENTRIES, *(["ss_network_alpha"] if format == "no_alpha" else []))
        kept = {name: value for name, value in self.kept.items() if name not in dropped}
        date = self.date or datetime.now(timezone.utc)
        title = self.title or self.kept.get("modelspec.title")
        # safetensors allows only strings in a header.
        facts = {f"onewan.{name}": str(value) for name, value in self.facts.items()}
        spec = model_spec("wan_2_2-lora", date, title, self.resolution)
        return kept | spec | facts | _about(modules, format)


class WanModelSaver:
    """Writes adapters, embeddings and models to files for other programs; has no state."""

    def save_adapter(
        self,
        modules: Mapping[str, ModuleAdapter],
        destination: Path,
        format: KeyFormat,
        header: AdapterHeader,
        *,
        dtype: torch.dtype | None = None,
        base: BaseWeights | None = None,
        shape: WanShape | None = None,
    ) -> list[str]:
        """Write the adapter of one expert, by module, to `destination` (.safetensors).

        Tensors are stored as `dtype` or, for None, as they are; alpha as float32. Kinds that a
        program can only read as weight differences need the `base` model's weights. kohya's
        complete files need the transformer's `shape`, unless it is an official one.

        Returns notices for the user. CheckpointError if a weight does not fit `dtype`, the format
        can't hold this kind of adapter, or the file can't be written or reads back different; an
        existing file at `destination` is then unchanged.
        """
        formatted = to_format(modules, format, dtype=dtype, base=base, shape=shape)
        return _write(formatted, destination, header.metadata(modules, format))

    def save(
        self,
        model: WanModel,
        destination: Path,
        format: ModelFormat = "diffusers",
        dtype: torch.dtype | None = None,
        *,
        force: bool = False,
    ) -> WriteResult:
        """Write the full weights of what `model` has loaded, adapters merged in (`save_model`)."""
        return save_model(model, destination, format, dtype, force=force)

    def save_embedding(
        self,
        embedding: WanModelEmbedding,
        destination: Path,
        *,
        dtype: torch.dtype | None = None,
        facts: Mapping[str, str | int | float] = MappingProxyType({}),
        date: datetime | None = None,
        title: str | None = None,
    ) -> Path:
        """Write the vectors of `embedding` to `destination` (.safetensors), for onewan's
        node in ComfyUI and `WanModelEmbedding.from_file`: as `dtype`, or for None bit-exact in
        their own type.

        The header gets ModelSpec's fields and `facts` about the run as ``onewan.<name>``; `title`
        is the placeholder and `date` now unless given. CheckpointError if a value is too large for
        `dtype`.
        """
        name = OUTPUT if embedding.is_output_embedding else INPUT
        vectors = stored(f"{embedding.placeholder}: {name}", embedding.vectors, dtype)
        date = date or datetime.now(timezone.utc)
        metadata = model_spec("wan_2_2-embedding", date, title or embedding.placeholder)
        # `known` comes last, so that `facts` can't replace entries that the loader reads.
        known = {"format_version": FORMAT_VERSION, "version": version("onewan")}
        known |= {"placeholder": embedding.placeholder, "uuid": embedding.uuid}
        if embedding.initial_text is not None:
            known["initial_text"] = embedding.initial_text
        metadata |= {f"onewan.{key}": str(value) for key, value in {**facts, **known}.items()}
        write_safetensors(Path(destination), {name: vectors}, metadata)
        return Path(destination)


def convert_adapter(
    source: Path,
    destination: Path,
    to: LoraFormat,
    *,
    dtype: torch.dtype | None = None,
    base: BaseWeights | None = None,
    expert: ExpertName | None = None,
) -> list[str]:
    """Write the adapter in `source`, of any trainer, to `destination` in the key format `to`.

    Tensors keep their precision unless `dtype` is given. `base` gives the base model's weights for
    kinds that `to` can hold only as differences; `expert` selects one of two in one file. Entries
    of the header are kept, with a new ModelSpec date and hash.

    Returns notices for the user. CheckpointError as `read_adapter` and
    `WanModelSaver.save_adapter` raise it.
    """
    adapter = read_adapter(source, expert)
    facts = {} if adapter.expert is None else {"expert": adapter.expert}
    header = AdapterHeader(kept=adapter.metadata, facts=facts)
    # `to_format` knows modules only; the file's name tells the user which of several is meant.
    try:
        formatted = to_format(adapter.modules, to, dtype=dtype, base=base)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    notices = _write(formatted, destination, header.metadata(adapter.modules, to))
    return [*adapter.notices, *notices]


def _write(
    formatted: FormattedAdapter, destination: Path, metadata: Mapping[str, str]
) -> list[str]:
    header = {**metadata, **formatted.metadata}
    write_safetensors(Path(destination), formatted.tensors, header)
    return formatted.notices


def _about(modules: Mapping[str, ModuleAdapter], format: KeyFormat) -> dict[str, str]:
    """Entries of the header that describe the file itself; `onewan inspect` shows them."""
    about = {
        "format_version": str(FORMAT_VERSION),
        "version": version("onewan"),
        "format": format,
        "kind": " ".join(sorted({adapter.kind for adapter in modules.values()})),
    }
    # One value for all modules, or none: a header can't show what differs by module.
    ranks = {adapter.rank for adapter in modules.values()}
    alphas = {adapter.alpha for adapter in modules.values() if format != "no_alpha"}
    for name, values in (("rank", ranks), ("alpha", alphas)):
        if len(values) == 1 and None not in values:
            about[name] = str(values.pop())
    return {f"onewan.{name}": value for name, value in about.items()}


def expert_of(
    path: Path,
    metadata: Mapping[str, str],
    variant: Variant,
    named: ExpertName | None = None,
) -> Expert:
    """The expert of `variant` that the weights file `path` with header `metadata` is for.

    Inferred from `named` (the expert that the keys in the file name), from ``onewan.expert`` in the
    header, or from the file's name: ``..._high_noise``, ``...-HighNoise``, or ``high`` as a word;
    the same for low. For a variant with one expert none of them is needed. CheckpointError if
    nothing names an expert, or one that the variant does not have.
    """
    requested = named or metadata.get("onewan.expert")
    for expert in variant.experts:
        if requested == expert.name:
            return expert
    names = " and ".join(e.name for e in variant.experts)
    if requested is not None:
        raise CheckpointError(
            f"{path}: was made for the {requested} expert, and {variant.name} has {names}; "
            "give a file of the same variant"
        )
    if len(variant.experts) == 1:
        return variant.experts[0]
    name = expert_in_name(Path(path))
    if name is None:
        raise CheckpointError(
            f"{path}: neither its header nor its name says which expert it is for; {variant.name} "
            f"has {names}, so name it ..._high_noise.safetensors or ..._low_noise.safetensors"
        )
    return variant.expert(name)
