"""What changed in a run since its state was saved, and whether it may then be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, cast

from pydantic import ValidationError

from onewan.config.load import changed_fields
from onewan.config.schema import ResolvedRun
from onewan.errors import CheckpointError

_SAFE_TO_CHANGE = (
    "sample",
    "output",
    "logging",
    "memory",
    "model.device",
    "video_data.sources",
    "video_data.cache",
    "video_data.cache_dir",
    "train.save_every",
    "train.save_every_minutes",
    "train.keep",
    "validation",
)
"""Prefixes of the fields that decide what a run writes and where, but no value that it computes.

``video_data.sources`` is among them because the data set is compared by content.
"""
_VALIDATION_FIELDS = ("validation.clips", "validation.timesteps")
"""Fields that change the clips or the timesteps of validation losses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Differences between a saved state's run and the present one, a line for each."""

    affecting_results: list[str]
    harmless: list[str]
    losses_comparable: bool
    """Whether validation losses are measured in the same way as before."""


def changes_since(facts: Mapping[str, Any], config: ResolvedRun, dataset_digest: str) -> Changes:
    """Compare the run file and the data set recorded in a state's `facts` with the present ones.

    CheckpointError if the run file was recorded by a version of onewan with other fields.
    """
    try:
        saved_config = ResolvedRun.model_validate(facts["config"])
    except ValidationError as error:
        fields = ", ".join(sorted({".".join(map(str, e["loc"])) for e in error.errors()}))
        raise CheckpointError(
            f"the saved state: its run file has fields that this version of onewan does not read "
            f"({fields}); resume with the version that saved it, or start another run"
        ) from error
    fields = changed_fields(saved_config, config)
    # With a constant learning rate and no cooldown, the results of a step do not depend on the
    # number of steps.
    steps_matter = config.train.schedule.kind != "constant" or bool(config.train.cooldown_steps)
    affecting_results: list[str] = []
    harmless: list[str] = []
    for name, old, new in fields:
        safe = name.startswith(_SAFE_TO_CHANGE) or (name == "train.steps" and not steps_matter)
        line = f"{name}: was {_shown(old)}, is {_shown(new)}"
        (harmless if safe else affecting_results).append(line)
    if facts["dataset"] != dataset_digest:
        affecting_results.append(
            "the data set: clips, captions or spans differ from those of the run"
        )
    measured_alike = not any(name in _VALIDATION_FIELDS for name, *_ in fields)
    return Changes(
        affecting_results=affecting_results,
        harmless=harmless,
        losses_comparable=measured_alike and not affecting_results,
    )


def _shown(value: object) -> str:
    """`value` without Python's names of types: a path as text, a tuple as a list."""
    if isinstance(value, PurePath):
        return repr(str(value))
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_shown(item) for item in cast('tuple[object, ...]', value))}]"
    return repr(value)
