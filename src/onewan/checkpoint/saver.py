"""What was trained, out to files for other programs, and other trainers' adapters into them.

`onewan.formats` knows the spellings; here a file gets its header: ModelSpec's fields, the facts of
the run as ``onewan.<name>``, and what its former header said. One file holds one expert; diffusers
finds the low-noise expert's under the same prefix ``transformer.`` (``load_into_transformer_2=
True``) and ignores any other without a word. Never holds a training state
(`onewan.checkpoint.store` does), never touches a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from onewan.checkpoint.convert import Written, save_model
from onewan.checkpoint.layouts import FORMAT_VERSION, ModelFormat
from onewan.errors import CheckpointError
from onewan.formats.adapter import ModuleAdapter
from onewan.formats.embedding import INPUT, OUTPUT
from onewan.formats.lora import LoraFormat, WanShape
from onewan.formats.lora_files import (
    PEFT_SETTINGS,
    BaseWeights,
    peft_adapter,
    read_adapter,
    stored,
    to_format,
)
from onewan.formats.modelspec import HASH, model_spec
from onewan.formats.weights import expert_in_name
from onewan.formats.write import write_safetensors
from onewan.model.embedding import WanModelEmbedding
from onewan.model.wan import WanModel
from onewan.variants import Expert, ExpertName, Variant


class WanModelSaver:
    """Writes what was trained to files for other programs; holds no state."""

    def save_lora(  # noqa: PLR0913  (facts about one file, each named at the call)
        self,
        weights: Mapping[str, Tensor],
        destination: Path,
        *,
        format: LoraFormat,
        dtype: torch.dtype,
        peft_config: Mapping[str, Any],
        facts: Mapping[str, str | int | float],
        date: datetime,
        title: str | None = None,
        resolution: tuple[int, int] | None = None,
        shape: WanShape | None = None,
        base: BaseWeights | None = None,
    ) -> list[str]:
        """Write the adapter of one expert to `destination` (.safetensors).

        `weights` have PEFT's names without the adapter's: ``blocks.0.attn1.to_q.lora_A.weight``
        [rank, in] and ``.lora_B.weight`` [out, rank]. They are stored as `dtype`, alpha as float32.
        `peft_config` (``LoraConfig.to_dict()``, or that of PEFT's other kinds) says what they mean.
        Kinds that a program can only read as differences need `base`, and a complete file for
        kohya's programs the transformer's `shape`, unless it is an official one.

        The header gets ModelSpec's fields (`title`, `date`, `resolution` as (width, height), ...)
        and `facts` about the run as ``onewan.<name>``, among which `expert_of` looks for `expert`.

        Returns what the user should know of the file. CheckpointError if a weight does not fit
        `dtype`, the format can't hold this kind of adapter, or the file can't be written or differs
        from what it should hold; nothing is left under `destination` then but what was there.
        """
        modules = peft_adapter(weights, peft_config)
        spelled = to_format(modules, format, dtype=dtype, base=base, shape=shape)
        metadata = model_spec("wan_2_2-lora", date, title, resolution)
        metadata |= {f"onewan.{name}": str(value) for name, value in facts.items()}
        metadata |= _about(modules, format) | spelled.metadata
        write_safetensors(Path(destination), spelled.tensors, metadata)
        return spelled.notices

    def save(
        self,
        model: WanModel,
        destination: Path,
        format: ModelFormat = "diffusers",
        dtype: torch.dtype | None = None,
        *,
        force: bool = False,
    ) -> Written:
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
        """Write the vectors of `embedding` to `destination` (.safetensors), from where
        `WanModelEmbedding.from_file` has them back: as `dtype`, or as they are, to the bit.

        The header gets ModelSpec's fields and `facts` about the run as ``onewan.<name>``; `title`
        is the placeholder and `date` now unless given. CheckpointError if a number is too large for
        `dtype`.
        """
        name = OUTPUT if embedding.is_output_embedding else INPUT
        vectors = stored(f"{embedding.placeholder}: {name}", embedding.vectors, dtype)
        date = date or datetime.now(timezone.utc)
        metadata = model_spec("wan_2_2-embedding", date, title or embedding.placeholder)
        known = {"format_version": FORMAT_VERSION, "version": version("onewan")}
        known |= {"placeholder": embedding.placeholder, "uuid": embedding.uuid}
        if embedding.initial_text is not None:
            known["initial_text"] = embedding.initial_text
        metadata |= {f"onewan.{key}": str(value) for key, value in {**facts, **known}.items()}
        write_safetensors(Path(destination), {name: vectors}, metadata)
        return Path(destination)

    def save_embeddings(
        self,
        embeddings: Iterable[WanModelEmbedding],
        folder: Path,
        *,
        dtype: torch.dtype | None = None,
        facts: Mapping[str, str | int | float] = MappingProxyType({}),
        date: datetime | None = None,
    ) -> list[Path]:
        """Write each to its own file under its name in `folder`, as `save_embedding` does: ComfyUI
        takes one from a file. ValueError if two have the same name."""
        chosen = list(embeddings)
        files = {embedding.name: embedding for embedding in chosen}
        if len(files) < len(chosen):
            raise ValueError(f"the names {[e.name for e in chosen]} are not all different")
        return [
            self.save_embedding(
                embedding, folder / f"{name}.safetensors", dtype=dtype, facts=facts, date=date
            )
            for name, embedding in files.items()
        ]


def convert_adapter(
    source: Path,
    destination: Path,
    to: LoraFormat,
    *,
    dtype: torch.dtype | None = None,
    base: BaseWeights | None = None,
    expert: ExpertName | None = None,
) -> list[str]:
    """Write the adapter in `source`, of any trainer, to `destination` in the spelling of `to`.

    Tensors keep their precision unless `dtype` asks for another. `base` gives the base model's
    weights for kinds that `to` holds only as differences; `expert` picks one of two in one file.
    What the header said is kept, with ModelSpec's date and hash made anew.

    Returns what the user should know of the file. CheckpointError as `read_adapter` and
    `WanModelSaver.save_lora` raise it.
    """
    adapter = read_adapter(source, expert)
    try:
        spelled = to_format(adapter.modules, to, dtype=dtype, base=base)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    kept = {
        name: value
        for name, value in adapter.metadata.items()
        if name not in ("format", HASH, PEFT_SETTINGS, "onewan.rank", "onewan.alpha")
    }
    title = adapter.metadata.get("modelspec.title")
    metadata = kept | model_spec("wan_2_2-lora", datetime.now(timezone.utc), title)
    if adapter.expert is not None:
        metadata["onewan.expert"] = adapter.expert
    metadata |= _about(adapter.modules, to) | spelled.metadata
    write_safetensors(Path(destination), spelled.tensors, metadata)
    return spelled.notices


def _about(modules: Mapping[str, ModuleAdapter], format: LoraFormat) -> dict[str, str]:
    """What the header says of the file itself."""
    about = {
        "format_version": str(FORMAT_VERSION),
        "version": version("onewan"),
        "format": format,
        "kind": " ".join(sorted({adapter.kind for adapter in modules.values()})),
    }
    ranks = {adapter.rank for adapter in modules.values()}
    alphas = {adapter.alpha for adapter in modules.values()}
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

    Told by `named`, what the keys in the file say, or by ``onewan.expert``, else by the file's
    name: ``..._high_noise``, ``...-HighNoise``, or ``high`` as a word of its own; the same for low.
    A variant with one expert needs none of it.
    """
    said = named or metadata.get("onewan.expert")
    for expert in variant.experts:
        if said == expert.name:
            return expert
    names = " and ".join(e.name for e in variant.experts)
    if said is not None:
        raise CheckpointError(
            f"{path}: was made for the {said} expert, and {variant.name} has {names}; "
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
