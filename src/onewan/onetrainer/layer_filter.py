"""OneTrainer's layer filter on a Wan transformer: filters that select nothing are refused.

OneTrainer reports that for adapters only, without the filter's name, and trains nothing in a full
fine-tuning. A filter of another model's preset, which stays selected when the model is changed, is
the usual case.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from onewan.adapters.select import similar_names
from onewan.arithmetic.layer_names import block_of
from onewan.documents import format_value
from onewan.errors import ConfigError
from onewan.onetrainer import settings


def check_layer_filter(config: Any, names: Collection[str]) -> None:
    """ConfigError with each part of `config.layer_filter` that matches none of `names`, the layers
    or weights of a transformer, within the blocks of `config.wan_layers`."""
    blocks = settings.layers_of(config)
    within = [name for name in names if blocks is None or block_of(name) in blocks]
    if not within:
        last = max((block_of(name) or 0 for name in names), default=0)
        raise _error([f"wan_layers: is {format_value(config.wan_layers)}; give blocks 0 to {last}"])
    # Split as OneTrainer does, regular expressions too.
    parts = [part.strip() for part in config.layer_filter.split(",")]
    problems = [
        problem
        for part in dict.fromkeys(parts)
        if part and (problem := _problem(part, config.layer_filter_regex, within))
    ]
    if problems:
        raise _error(problems)


def _problem(part: str, is_regex: bool, names: Collection[str]) -> str | None:
    try:
        pattern = re.compile(part if is_regex else re.escape(part))
    except re.error as error:
        return f"layer_filter: {format_value(part)} is no regular expression ({error})"
    if any(pattern.search(name) for name in names):
        return None
    return (
        f"layer_filter: {format_value(part)} selects nothing; {similar_names(part, names)}; choose "
        "a preset of Wan"
    )


def _error(problems: list[str]) -> ConfigError:
    return ConfigError("OneTrainer's settings for Wan 2.2", problems)
