"""What is this file? Told from headers alone, without torch, in the time it takes to read them.

`inspect` never refuses a file for being the wrong one: another model's file and rubbish get a
report that says so. Nothing is loaded, so a file can be whole and its numbers nonsense.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from onewan.checkpoint.compatibility import (
    ProgramSupport,
    programs_for_adapter,
    programs_for_weights,
)
from onewan.errors import CheckpointError
from onewan.formats.container import TensorFile, open_tensors
from onewan.formats.embedding import looks_like_embedding
from onewan.formats.key_maps import transformer_names
from onewan.formats.lora import AdapterLayout, WanShape, layout_of
from onewan.formats.model_folder import (
    KIND_OF,
    ComponentDescription,
    ComponentName,
    describe_component,
    expert_of,
    find_components,
    infer_variant,
    missing_components,
    model_problems,
)
from onewan.formats.weights import (
    ComponentFile,
    detect_expert,
    foreign_model,
    looks_like_adapter,
    open_component,
)
from onewan.variants import VARIANTS, ExpertName, Variant

_CONTAINERS = {"safetensors": "safetensors", "gguf": "GGUF", "pickle": "PyTorch pickle"}
_TITLES = {"transformer": "transformer", "vae": "VAE", "text_encoder": "text encoder (UMT5-XXL)"}
_KINDS = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT"}
_LONG = 100


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a file or folder is."""

    path: Path
    kind: str
    """``model``, ``transformer``, ``vae``, ``text_encoder``, ``adapter``, ``embedding``, ``other``
    (of another model) or ``unreadable``."""
    what: str
    """The same in words."""
    variant: str | None = None
    expert: ExpertName | None = None
    expert_source: str | None = None
    """``header``, ``keys``, ``folder`` or ``name``: how far it can be trusted."""
    container: str | None = None
    files: Mapping[str, int] = field(default_factory=dict[str, int])
    """Bytes by file name."""
    names: str | None = None
    """Whose names the tensors have: ``official``, ``diffusers`` or ``transformers``; a spelling of
    an adapter."""
    prefix: str = ""
    quantization: str | None = None
    dtypes: Mapping[str, int] = field(default_factory=dict[str, int])
    """Parameters by type."""
    parameters: int = 0
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    adapter: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Of an adapter: kinds, ranks, alphas, modules, blocks, trainer."""
    readers: tuple[ProgramSupport, ...] = ()
    problems: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    components: tuple[Inspection, ...] = ()
    """Of a whole model."""

    def as_json(self) -> dict[str, Any]:
        """The report as plain data; `inspect --json` prints it."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "what": self.what,
            "variant": self.variant,
            "expert": self.expert,
            "expert_source": self.expert_source,
            "container": self.container,
            "files": dict(self.files),
            "bytes": sum(self.files.values()),
            "names": self.names,
            "prefix": self.prefix,
            "quantization": self.quantization,
            "dtypes": dict(self.dtypes),
            "parameters": self.parameters,
            "config": dict(self.config),
            "adapter": dict(self.adapter),
            "programs": {r.program: {"reads": r.reads, "note": r.why} for r in self.readers},
            "problems": list(self.problems),
            "metadata": dict(self.metadata),
            "components": [component.as_json() for component in self.components],
        }

    def lines(self) -> Iterator[str]:
        """The report for people, line by line."""
        yield f"{self.path}: {self.what}"
        for label, text in self._rows():
            yield f"  {label:<12} {text}"
        for component in self.components:
            yield ""
            yield from component.lines()

    def _rows(self) -> Iterator[tuple[str, str]]:
        if self.files:
            size = _size(sum(self.files.values()))
            count = f", {len(self.files)} files" if len(self.files) > 1 else ""
            yield "file", f"{_CONTAINERS.get(self.container or '', self.container)}, {size}{count}"
        if self.names:
            prefix = f" under {self.prefix}" if self.prefix and self.kind != "adapter" else ""
            yield "names", f"{self.names}{prefix}"
        if self.parameters:
            types = ", ".join(f"{_count(n)} {dtype}" for dtype, n in self.dtypes.items())
            stored = "" if self.quantization in (None, "none") else f"; {self.quantization}"
            yield "parameters", f"{_count(self.parameters)} ({types}{stored})"
        if self.config:
            yield "built as", _architecture(self.kind, self.config)
        for label, value in self.adapter.items():
            if value not in (None, [], {}):
                yield label, _short(value)
        reading = [r.program + (f" ({r.why})" if r.why else "") for r in self.readers if r.reads]
        if self.readers:
            yield (
                "read by",
                "; ".join([*reading, "onewan"] if not self.problems else reading or ["none"]),
            )
        for reader in self.readers:
            if not reader.reads:
                yield "not by", f"{reader.program}: {reader.why}"
        for problem in self.problems:
            yield "problem", problem
        for name, value in sorted(self.metadata.items()):
            yield "header", f"{name} = {_short(value)}"


def inspect(path: Path) -> Inspection:
    """What `path` is: a file, a folder with one component, or a folder with a whole model."""
    path = Path(path)
    try:
        paths = find_components(path)
        if paths and set(paths.values()) != {path}:
            return _model(path, paths)
        return _one(path)
    except CheckpointError as error:
        text = str(error).removeprefix(f"{path}: ")
        return Inspection(path=path, kind="unreadable", what=text)


def _model(folder: Path, paths: Mapping[ComponentName, Path]) -> Inspection:
    """A whole model; of the tokenizer only its absence is reported."""
    components: dict[ComponentName, Inspection] = {}
    described: dict[ComponentName, ComponentDescription] = {}
    for name in KIND_OF.keys() & paths.keys():
        path = paths[name]
        report = inspect(path) if path != folder else _one(folder)
        with contextlib.suppress(CheckpointError):  # its own report says what is wrong
            described[name] = describe_component(path)
        variant = VARIANTS.get(report.variant or "")  # type: ignore[call-overload]
        if report.kind == "transformer" and variant is not None and len(variant.experts) == 2:
            report = _as_expert(report, variant, name)
        components[name] = report
    reports = [components[name] for name in KIND_OF if name in components]
    variant = infer_variant(described)
    problems = [
        f"{r.path.name}: {problem}"
        for r in reports
        for problem in (r.problems if r.kind != "unreadable" else (r.what,))
    ]
    problems += model_problems(str(folder), described)
    if variant is not None:
        encoder = described.get("text_encoder")
        carried = encoder is not None and encoder.file is not None and encoder.file.tokenizer
        found = {*paths, "tokenizer"} if carried else {*paths}
        problems += [f"has no {name}" for name in missing_components(found, variant)]
    path = paths.get("transformer") or next(iter(paths.values()))
    layout = "diffusers layout"
    if path == folder or path.name in ("high_noise_model", "low_noise_model"):
        layout = "official layout"
    elif path.is_file():
        layout = "single files"
    return Inspection(
        path=folder,
        kind="model",
        what=f"{variant.title if variant else 'a Wan model'}, {layout}",
        variant=variant.name if variant else None,
        problems=tuple(problems),
        components=tuple(reports),
    )


def _as_expert(report: Inspection, variant: Variant, component: ComponentName) -> Inspection:
    """The report of an expert whose folder says which it is."""
    expert = next(e.name for e in variant.experts if e.component == component)
    what = f"transformer of {variant.title}, for the {expert}-noise expert"
    return replace(report, expert=expert, expert_source="folder", what=what)


def _one(path: Path) -> Inspection:
    file = open_tensors(path)
    common: dict[str, Any] = {
        "path": path,
        "container": file.container,
        "files": {part.name: part.stat().st_size for part in file.files},
        "metadata": {n: v for n, v in file.metadata.items() if n != "format"},
        "dtypes": _dtypes(file),
        "parameters": sum(i.elements for i in file.tensors.values()),
    }
    if looks_like_adapter(file):
        found = layout_of(file.tensors, file.metadata)
        if found is not None and found.modules:
            return _adapter(path, file, found, common)
        architecture = found.other_architecture if found else None
        what = f"a LoRA of {architecture or 'another model'}"
        return Inspection(kind="other", what=f"{what}, not of Wan 2.2", **common)
    if looks_like_embedding(file):
        tokens = max((i.shape[0] for i in file.tensors.values() if len(i.shape) == 2), default=1)
        reader = ProgramSupport("ComfyUI", "umt5xxl" in file.tensors, "embedding:NAME in a prompt")
        return Inspection(
            kind="embedding", what=f"embedding of {tokens} tokens", readers=(reader,), **common
        )
    try:
        weights = open_component(file)
    except CheckpointError as error:
        what = foreign_model(file)
        said = str(error).removeprefix(f"{path}: ")
        return Inspection(kind="other", what=f"{what}, not Wan 2.2" if what else said, **common)
    return _weights(weights, common)


def _weights(weights: ComponentFile, common: Mapping[str, Any]) -> Inspection:
    counted = [e.info for e in weights.entries.values()]
    dtypes: Counter[str] = Counter()
    for info in counted:
        dtypes[info.dtype] += info.elements
    expert, source = expert_of(weights)
    what = _TITLES[weights.kind]
    if weights.kind == "vae":
        version = "2.1" if weights.variant is None else "2.2"
        what = f"Wan {version} VAE, of {'the A14B models' if version == '2.1' else 'TI2V-5B'}"
    elif weights.variant is not None:
        what = f"{what} of {weights.variant.title}"
        if expert in ("high", "low"):
            what += f", for the {expert}-noise expert (by its {source})"
        elif len(weights.variant.experts) == 2:
            what += " (high or low expert: neither its header nor its name says)"
    problems = list(_incomplete(weights))
    return Inspection(
        kind=weights.kind,
        what=what,
        variant=weights.variant.name if weights.variant else None,
        expert=expert,
        expert_source=source,
        names=weights.key_format,
        prefix=weights.prefix,
        quantization=weights.quantization,
        config=weights.config,
        readers=() if problems else programs_for_weights(weights),
        problems=tuple(problems),
        **{**common, "dtypes": dict(dtypes.most_common()), "parameters": sum(dtypes.values())},
    )


def _incomplete(weights: ComponentFile) -> Iterator[str]:
    """What is missing or too many, as far as names tell (shapes are checked when it is loaded)."""
    if weights.kind == "transformer":
        absent = sorted(transformer_names(weights.config["num_layers"]) - weights.entries.keys())
        if absent:
            yield f"has {len(absent)} missing keys, such as {', '.join(absent[:3])}"
    if weights.unexpected:
        names = ", ".join(sorted(weights.unexpected)[:3])
        yield f"has {len(weights.unexpected)} unexpected keys, such as {names}"


def _adapter(
    path: Path, file: TensorFile, found: AdapterLayout, common: Mapping[str, Any]
) -> Inspection:
    variant, shape = _trained_on(file, found)
    expert, source = _expert(path, variant, file.metadata)
    if len(found.experts) == 1:
        expert, source = found.experts[0], "keys"
    kinds = Counter(_KINDS.get(kind, "difference") for kind in found.kinds.values())
    title = " and ".join(kinds) or "adapter"
    of = variant.title if variant else _by_width(shape)
    what = f"{title} for {of}"
    if len(found.experts) == 2:
        what += ", both experts in one file"
    elif expert is not None and expert != "single":
        what += f", for the {expert}-noise expert (by its {source})"
    blocks = sorted({int(m.split(".")[1]) for m in found.modules if m.startswith("blocks.")})
    problems = list(found.module_errors)
    if found.unknown:
        of_what = f" of {found.other_architecture}" if found.other_architecture else ""
        names = ", ".join(found.unknown[:3])
        problems.append(
            f"has {len(found.unknown)} keys{of_what} that do not belong, such as {names}"
        )
    return Inspection(
        kind="adapter",
        what=what,
        variant=variant.name if variant else None,
        expert=expert,
        expert_source=source,
        names=found.key_format,
        prefix=found.prefix,
        adapter={
            "kinds": dict(kinds),
            "rank": _range(found.ranks.values()),
            "alpha": _alphas(file, found),
            "modules": len(found.modules),
            "blocks": _range(blocks),
            "trainer": found.trainer,
        },
        readers=() if problems else programs_for_adapter(found, shape),
        problems=tuple(problems),
        **common,
    )


def _trained_on(file: TensorFile, found: AdapterLayout) -> tuple[Variant | None, WanShape | None]:
    """The variant that an adapter is for, and the shape of its transformer, as far as it tells.

    The header of onewan's files says; else the width does, but T2V-A14B and I2V-A14B are alike.
    """
    said = VARIANTS.get(file.metadata.get("onewan.variant", ""))  # type: ignore[call-overload]
    width = next(
        (
            file.tensors[parts["lora_A"]].shape[-1]
            for module, parts in found.modules.items()
            if "lora_A" in parts and ".attn" in module
        ),
        None,
    )
    shape = WanShape.of_width(width) if width else None
    if said is None and shape is not None and shape.num_layers == VARIANTS["ti2v-5b"].num_layers:
        said = VARIANTS["ti2v-5b"]
    return said, shape


def _by_width(shape: WanShape | None) -> str:
    return "Wan 2.2 (T2V-A14B or I2V-A14B: they are alike)" if shape else "Wan of unknown width"


def _alphas(file: TensorFile, found: AdapterLayout) -> str | None:
    keys = [parts["alpha"] for parts in found.modules.values() if "alpha" in parts]
    if keys:
        values = [float(v.reshape(-1)[0]) for v in file.arrays(keys).values() if v.size]
        return _range(values)
    text = file.metadata.get("lora_adapter_metadata")
    try:
        settings = {k.rpartition(".")[2]: v for k, v in json.loads(text or "{}").items()}
    except (ValueError, AttributeError):
        return None
    alpha = settings.get("lora_alpha")
    return None if alpha is None else str(alpha)


def _expert(
    path: Path, variant: Variant | None, metadata: Mapping[str, str]
) -> tuple[ExpertName | None, str | None]:
    if variant is not None and len(variant.experts) == 1:
        return "single", None
    return detect_expert(path, metadata) or (None, None)


# ---------------------------------------------------------------------------------------- in words


def _dtypes(file: TensorFile) -> dict[str, int]:
    counted: Counter[str] = Counter()
    for info in file.tensors.values():
        counted[info.dtype] += info.elements
    return dict(counted.most_common())


def _architecture(kind: str, config: Mapping[str, Any]) -> str:
    if kind == "transformer":
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return (
            f"{config['num_layers']} blocks, {width} wide, {config['num_attention_heads']} heads, "
            f"ffn {config['ffn_dim']}, {config['in_channels']} channels in"
        )
    if kind == "vae":
        return f"{config.get('z_dim', 16)} latent channels, base width {config.get('base_dim', 96)}"
    return (
        f"{config['num_layers']} layers, {config['d_model']} wide, {config['num_heads']} heads, "
        f"vocabulary {config['vocab_size']}"
    )


def _range(values: Any) -> str | None:
    """``4``, or ``4 to 16`` where they differ."""
    found = sorted(set(values))
    if not found:
        return None
    low, high = (f"{v:g}" for v in (found[0], found[-1]))
    return low if low == high else f"{low} to {high}"


def _count(number: int) -> str:
    for unit, name in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= unit:
            return f"{number / unit:.2f}{name}"
    return str(number)


def _size(number: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number} bytes"


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    text = " ".join(text.split())
    return text if len(text) <= _LONG else f"{text[:_LONG]}... ({len(text)} characters)"
