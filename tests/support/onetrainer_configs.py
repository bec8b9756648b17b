"""OneTrainer's own defaults, as `scripts/take_onetrainer_defaults.py` recorded them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_FILE = Path(__file__).parents[1] / "onetrainer" / "onetrainer_defaults.json"

DEFAULTS: dict[str, dict[str, Any]] = json.loads(_FILE.read_text(encoding="utf-8"))
"""All keys with their defaults, of ``train``, ``concept``, ``sample`` and ``embedding``."""


def with_defaults(kind: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over the defaults of `kind`, nested mappings too."""
    return _merged(DEFAULTS[kind], changes)


def train_config(**changes: Any) -> SimpleNamespace:
    """A stand-in for OneTrainer's `TrainConfig`, with components as attributes."""
    return _namespace(with_defaults("train", changes))


def _merged(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**defaults}
    for key, value in given.items():
        held = merged.get(key)
        nested = isinstance(held, dict) and isinstance(value, dict)
        merged[key] = _merged(held, value) if nested else value
    return merged


def _namespace(config: Mapping[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(
        **{k: _namespace(v) if isinstance(v, dict) else v for k, v in config.items()}
    )
