"""`StoredModel`: sizes of a run's model and how its weights are stored, by the files' headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import cast

from onewan.config.schema import ResolvedRun
from onewan.dtypes import BYTES_PER_ELEMENT
from onewan.errors import CheckpointError
from onewan.formats.backends import TensorInfo
from onewan.formats.container import open_tensors
from onewan.formats.lora import layout_of
from onewan.formats.model_folder import (
    ComponentDescription,
    ComponentName,
    describe_component,
    find_components,
)
from onewan.formats.weights import ComponentFile, StoredWeight
from onewan.memory.plan.shapes import (
    TEXT_ENCODER_WEIGHTS,
    TEXT_HEADS,
    TransformerShape,
    VaeShape,
)
from onewan.memory.plan.storage import Storage, matrix_bytes
from onewan.variants import TEXT_WIDTH, Expert, ExpertName

COMPUTED_TYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number by `model.dtype`."""
FP8_TEXT_ENCODER = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
"""The text encoder in fp8, as ComfyUI's users have it."""
_FP8_TEXT_ENCODER_BYTES = 6_735_906_897

DECODED_ON_DEVICE = frozenset(
    (*("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"), *(f"Q{bits}_K" for bits in range(2, 7)))
)
"""GGUF types that stay packed. Others are expanded while loading, since no decoder for them runs on
a device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTransformer:
    """One expert, as it is in memory while it is trained."""

    shape: TransformerShape
    block_bytes: int
    """Bytes of the weights of one block (of the largest, if a file stores them differently)."""
    outer_bytes: int
    """Bytes of the weights outside the blocks, which always stay on the device."""
    expands: bool
    """Whether its matrices are expanded to the precision of the matrix products before each use."""
    storage: str
    """How its matrices are stored, for the user."""

    @property
    def all_bytes(self) -> int:
        return self.shape.layers * self.block_bytes + self.outer_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredModel:
    """The networks of a run, in the form in which they are in memory."""

    experts: Mapping[ExpertName, StoredTransformer]
    """All experts of the variant."""
    vae: VaeShape
    text_encoder: int
    """Bytes of the text encoder's weights."""
    text_width: int = TEXT_WIDTH
    text_heads: int = TEXT_HEADS
    """Attention heads of the text encoder."""
    distilled: Mapping[ExpertName, int] = field(default_factory=dict[ExpertName, int])
    """Bytes of the LoRAs of `sample.distilled`."""
    notes: tuple[str, ...] = ()
    """What was assumed, for the user."""


def read_stored_model(config: ResolvedRun) -> StoredModel:
    """The model of `config`, by the headers of its files where they are on this machine.

    Where a file is not here (the plan says so) or can't be read (which loading reports), sizes are
    the variant's, and weights are in `model.dtype`, or in fp8 if the file's name says that.
    """
    variant = config.model.facts()
    described = _descriptions(config)
    experts: dict[ExpertName, StoredTransformer] = {}
    missing: dict[str, list[str]] = {}
    for expert in variant.experts:
        found = described.get(expert.component)
        experts[expert.name] = _transformer(config, expert, found)
        if found is None or found.file is None:
            which = f"{expert.name} expert" if len(variant.experts) > 1 else "transformer"
            source = config.model.source_of(expert.component)
            how = "fp8, by the file's name" if _is_named_fp8(source) else config.model.dtype
            missing.setdefault(how, []).append(which)
    vae, text = described.get("vae"), described.get("text_encoder")
    found = assumed_model(config)
    return StoredModel(
        experts=experts,
        vae=found.vae if vae is None or vae.file is None else found.vae.scaled(_count(vae.file)),
        text_encoder=found.text_encoder
        if text is None or text.file is None
        else _text_encoder_bytes(text.file, config.model.dtype),
        text_width=TEXT_WIDTH if text is None else int(text.config["d_model"]),
        text_heads=TEXT_HEADS if text is None else int(text.config["num_heads"]),
        distilled=found.distilled,
        notes=tuple(
            f"the files of the {' and the '.join(which)} are not on this machine, so "
            f"{'their sizes are those' if len(which) > 1 else 'its size is that'} of "
            f"{variant.title}, with weights in {how}"
            for how, which in missing.items()
        ),
    )


def assumed_model(config: ResolvedRun) -> StoredModel:
    """The model of the variant's size with weights in `model.dtype`, or in fp8 where the name of a
    file says so."""
    variant = config.model.facts()
    text = TEXT_ENCODER_WEIGHTS * COMPUTED_TYPES[config.model.dtype]
    return StoredModel(
        experts={expert.name: _transformer(config, expert, None) for expert in variant.experts},
        vae=VaeShape.of_variant(variant),
        text_encoder=_FP8_TEXT_ENCODER_BYTES if _is_named_fp8(config.model.text_encoder) else text,
        distilled=_distilled_bytes(config),
    )


def with_changes(stored: StoredModel, config: ResolvedRun) -> StoredModel:
    """`stored`, which was read for another config, with the storage that `config` asks for."""
    dtype, weights = config.model.dtype, config.memory.weights
    experts = {
        name: with_weights(expert, weights, dtype) for name, expert in stored.experts.items()
    }
    text = stored.text_encoder
    if _is_named_fp8(config.model.text_encoder):
        text = min(text, _FP8_TEXT_ENCODER_BYTES)
    return replace(stored, experts=experts, text_encoder=text)


def with_weights(stored: StoredTransformer, weights: str, dtype: str) -> StoredTransformer:
    """`stored` with the matrices of its blocks as `memory.weights` says."""
    if weights == "as_stored":
        return stored
    plain: Storage = "float32" if dtype == "float32" else "bfloat16"
    storage: Storage = plain if weights == "bf16" else cast("Storage", weights)
    matrices = sum(matrix_bytes(storage, s) for s in stored.shape.block_linears().values())
    return replace(
        stored,
        block_bytes=round(matrices) + _vector_bytes(stored.shape, dtype),
        expands=storage != plain,
        storage=dtype if weights == "bf16" else weights,
    )


def _descriptions(config: ResolvedRun) -> dict[ComponentName, ComponentDescription]:
    """The components whose files are on this machine and can be read."""
    given = config.model.sources()
    paths: dict[ComponentName, Path] = {}
    described: dict[ComponentName, ComponentDescription] = {}
    try:
        if "path" in given and Path(given["path"]).is_dir():
            paths |= find_components(Path(given["path"]))
    except (CheckpointError, OSError):
        pass  # of a model that can't be used, loading says why
    components: tuple[ComponentName, ...] = ("transformer", "transformer_2", "vae", "text_encoder")
    for name in components:
        path = Path(given[name]) if name in given else paths.get(name)
        if path is None or not path.exists():
            continue
        try:
            found = find_components(path) if path.is_dir() else {}
            described[name] = describe_component(found.get(name, path))
        except (CheckpointError, OSError):
            continue  # as above
    return described


def _distilled_bytes(config: ResolvedRun) -> dict[ExpertName, int]:
    """Bytes of each LoRA of `sample.distilled` in memory, by its header: tensors of blocks are in
    the type of the matrix products, the others are float32."""
    distilled, sizes = config.sample.distilled, dict[ExpertName, int]()
    for name, path in {} if distilled is None else distilled.files().items():
        try:
            tensors = open_tensors(path).tensors
            layout = layout_of(tensors, {}, name)
        except (CheckpointError, OSError):
            continue  # which loading reports
        sizes[name] = sum(
            tensors[key].elements
            * (COMPUTED_TYPES[config.model.dtype] if module.startswith("blocks.") else 4)
            for module, keys in ({} if layout is None else layout.modules).items()
            for part, key in keys.items()
            if part != "alpha"
        )
    return sizes


def _is_named_fp8(source: str | None) -> bool:
    """Whether a file's name says that its weights are in fp8, as those of ComfyUI's files do."""
    return source is not None and "fp8" in Path(source).name.lower()


def _transformer(
    config: ResolvedRun, expert: Expert, described: ComponentDescription | None
) -> StoredTransformer:
    dtype, weights = config.model.dtype, config.memory.weights
    file = None if described is None else described.file
    if described is None or file is None:
        shape = TransformerShape.of_variant(config.model.facts())
        sizes = {"": sum(_plain(dtype, s) for s in shape.block_linears().values())}
        names = {dtype}
        if weights == "as_stored" and _is_named_fp8(config.model.source_of(expert.component)):
            weights = "fp8"
    else:
        shape = TransformerShape.of_config(described.config)
        sizes, names = _block_sizes(file, dtype)
    stored = StoredTransformer(
        shape=shape,
        block_bytes=round(max(sizes.values())) + _vector_bytes(shape, dtype),
        outer_bytes=_outer_bytes(shape, dtype),
        expands=bool(names - {dtype}),
        storage=", ".join(sorted(names)),
    )
    return with_weights(stored, weights, dtype)


def _block_sizes(file: ComponentFile, dtype: str) -> tuple[dict[str, float], set[str]]:
    """(bytes of the matrices of each block as they are loaded, how they are stored)."""
    sizes, names = dict[str, float](), set[str]()
    for name, entry in file.entries.items():
        if name.startswith("blocks.") and len(entry.info.shape) == 2:
            block = name.split(".")[1]
            sizes[block] = sizes.get(block, 0) + _loaded_bytes(entry, dtype)
            names.add(entry.info.dtype if _stays_packed(entry) else dtype)
    return sizes, names


def _text_encoder_bytes(file: ComponentFile, dtype: str) -> int:
    """Bytes of the text encoder in memory. Its blocks stay packed, its table does not."""
    matrices = {n: e for n, e in file.entries.items() if n.startswith("encoder.block.")}
    others = _count(file) - sum(entry.info.elements for entry in matrices.values())
    packed = sum(
        _loaded_bytes(e, dtype) if len(e.info.shape) == 2 else e.info.elements * 4
        for e in matrices.values()
    )
    return round(packed) + others * COMPUTED_TYPES[dtype]


def _stays_packed(entry: StoredWeight) -> bool:
    """Whether a matrix of a block is in memory as the file stores it, not in `model.dtype`."""
    return entry.packing == "fp8" or entry.info.dtype in DECODED_ON_DEVICE


def _loaded_bytes(entry: StoredWeight, dtype: str) -> float:
    """Bytes of a matrix of a block in memory."""
    return _stored_bytes(entry.info) if _stays_packed(entry) else _plain(dtype, entry.info.shape)


def _plain(dtype: str, shape: tuple[int, ...]) -> float:
    return matrix_bytes("float32" if dtype == "float32" else "bfloat16", (shape[0], shape[1]))


def _stored_bytes(info: TensorInfo) -> float:
    if not info.is_quantized:
        return info.elements * BYTES_PER_ELEMENT[info.dtype]
    block, size = _gguf_sizes()[info.dtype]
    return info.elements / block * size


@cache
def _gguf_sizes() -> dict[str, tuple[int, int]]:
    from gguf.constants import GGML_QUANT_SIZES

    return {kind.name: sizes for kind, sizes in GGML_QUANT_SIZES.items()}


def _vector_bytes(shape: TransformerShape, dtype: str) -> int:
    """Bytes of the other weights of a block: the norms in front of its layers and the modulation
    are float32, the rest has `dtype`."""
    in_float32 = 8 * shape.width
    return 4 * in_float32 + COMPUTED_TYPES[dtype] * (shape.block_vector_weights - in_float32)


def _outer_bytes(shape: TransformerShape, dtype: str) -> int:
    """The time embedding and the modulation of the head are float32, the rest has `dtype`."""
    time = shape.width * (shape.time_frequencies + shape.width + 2) + 2 * shape.width
    return 4 * time + COMPUTED_TYPES[dtype] * (shape.outer_weights - time)


def _count(file: ComponentFile) -> int:
    return sum(entry.info.elements for entry in file.entries.values())
