"""`Inspection`: what was found out about a file or folder of weights, as text and as JSON data.

`onewan.checkpoint.inspect` creates it. torch is not imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onewan.checkpoint.compatibility import ProgramSupport
from onewan.variants import ExpertName

_CONTAINER_TITLES = {"safetensors": "safetensors", "gguf": "GGUF", "pickle": "PyTorch pickle"}
_FIRST_ROWS = 5
"""Entries of a header that `Inspection.lines` shows if not all are asked for."""
_MAX_ROWS = 200
"""Entries of a header that it shows at most; ``--json`` has all of them."""
_MAX_VALUE_LENGTH = 100
"""Characters of a header's value that `Inspection.lines` shows; some hold whole workflows."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A description of a file or folder."""

    path: Path
    kind: str
    """``model``, ``transformer``, ``vae``, ``text_encoder``, ``adapter``, ``embedding``, ``other``
    (of another model) or ``unreadable``."""
    summary: str
    """The kind, variant and expert in words."""
    variant: str | None = None
    expert: ExpertName | None = None
    expert_source: str | None = None
    """``header``, ``keys``, ``folder`` or ``name``: what `expert` was inferred from."""
    container: str | None = None
    files: Mapping[str, int] = field(default_factory=dict[str, int])
    """Bytes by file name."""
    key_format: str | None = None
    """Of weights: ``official``, ``diffusers`` or ``transformers``; of an adapter: see
    `AdapterLayout.key_format`."""
    prefix: str = ""
    quantization: str | None = None
    dtypes: Mapping[str, int] = field(default_factory=dict[str, int])
    """Parameters by type."""
    parameters: int = 0
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    adapter: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Kinds, ranks, alphas, modules, blocks and trainer of an adapter."""
    programs: tuple[ProgramSupport, ...] = ()
    problems: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    components: tuple[Inspection, ...] = ()
    """The components of a whole model."""

    def as_json(self) -> dict[str, Any]:
        """All fields as JSON data, which ``onewan inspect --json`` prints."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "summary": self.summary,
            "variant": self.variant,
            "expert": self.expert,
            "expert_source": self.expert_source,
            "container": self.container,
            "files": dict(self.files),
            "bytes": sum(self.files.values()),
            "key_format": self.key_format,
            "prefix": self.prefix,
            "quantization": self.quantization,
            "dtypes": dict(self.dtypes),
            "parameters": self.parameters,
            "config": dict(self.config),
            "adapter": dict(self.adapter),
            "programs": {p.name: {"reads": p.reads, "note": p.note} for p in self.programs},
            "problems": list(self.problems),
            "metadata": dict(self.metadata),
            "components": [component.as_json() for component in self.components],
        }

    def lines(self, *, show_all: bool = False) -> Iterator[str]:
        """The description as lines of text, which ``onewan inspect`` prints; with `show_all`, not
        only the first entries of a header."""
        yield f"{self.path}: {self.summary}"
        for label, text in self.rows(_MAX_ROWS if show_all else _FIRST_ROWS):
            yield f"  {label:<12} {text}"
        for component in self.components:
            yield ""
            yield from component.lines(show_all=show_all)

    @property
    def readers(self) -> tuple[ProgramSupport, ...]:
        """onewan itself and `programs`; nothing if no program was asked for."""
        own = () if self.problems or not self.programs else (ProgramSupport("onewan", True),)
        return (*own, *self.programs)

    def facts(self) -> Iterator[tuple[str, str]]:
        """What it holds, as labels and texts."""
        if self.files:
            size = _size(sum(self.files.values()))
            count = f", {len(self.files)} files" if len(self.files) > 1 else ""
            yield (
                "file",
                f"{_CONTAINER_TITLES.get(self.container or '', self.container)}, {size}{count}",
            )
        if self.key_format:
            # `key_format` of an adapter names the prefix already.
            prefix = f" under {self.prefix}" if self.prefix and self.kind != "adapter" else ""
            yield "keys", f"{self.key_format}{prefix}"
        if self.parameters:
            types = ", ".join(f"{_count(n)} {dtype}" for dtype, n in self.dtypes.items())
            stored = "" if self.quantization in (None, "none") else f"; {self.quantization}"
            yield "parameters", f"{_count(self.parameters)} ({types}{stored})"
        if self.config:
            yield "architecture", _architecture(self.kind, self.config)
        for label, value in self.adapter.items():
            if value not in (None, [], {}):
                yield label, _short(value)

    def header(self, longest: int = _MAX_VALUE_LENGTH) -> list[tuple[str, str]]:
        """The entries of the header, with `longest` characters of a value."""
        # What the trainer wrote of the run comes first; titles, dates and hashes say less.
        entries = sorted(self.metadata.items(), key=lambda e: (e[0].startswith("modelspec."), e[0]))
        return [(_short(name), _short(value, longest)) for name, value in entries]

    def rows(self, entries_shown: int = _FIRST_ROWS) -> Iterator[tuple[str, str]]:
        """What is known besides the summary, as labels and texts; of a header `entries_shown`
        entries."""
        yield from self.facts()
        reading = [p.name + (f" ({p.note})" if p.note else "") for p in self.programs if p.reads]
        if self.programs:
            yield (
                "read by",
                "; ".join([*reading, "onewan"] if not self.problems else reading or ["none"]),
            )
        yield from (("not by", f"{p.name}: {p.note}") for p in self.programs if not p.reads)
        yield from (("problem", _short(problem, 1000)) for problem in self.problems)
        entries = self.header()
        for name, value in entries[:entries_shown]:
            yield "header", f"{name} = {value}"
        if (more := len(entries) - entries_shown) > 0:
            option = "--all" if entries_shown < _MAX_ROWS else "--json"
            yield "header", f"{more} more entries, which {option} shows"


def _architecture(kind: str, config: Mapping[str, Any]) -> str:
    if kind == "transformer":
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return (
            f"{config['num_layers']} blocks, {width} wide, {config['num_attention_heads']} heads, "
            f"FFN {config['ffn_dim']} wide, {config['in_channels']} input channels"
        )
    if kind == "vae":
        return f"{config.get('z_dim', 16)} latent channels, base width {config.get('base_dim', 96)}"
    return (
        f"{config['num_layers']} layers, {config['d_model']} wide, {config['num_heads']} heads, "
        f"vocabulary {config['vocab_size']}"
    )


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


def _short(value: object, limit: int = _MAX_VALUE_LENGTH) -> str:
    if isinstance(value, dict):  # counts by name
        value = ", ".join(f"{count} {name}" for name, count in value.items())
    text = value if isinstance(value, str) else json.dumps(value)
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
