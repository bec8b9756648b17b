"""Older run files, brought up to date: one pure function per step of the schema.

Works on the plain mapping that the parser yields, before anything is validated, so a step knows
nothing of today's schema. Never touches a file, never changes its argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from onewan.config.schema import SCHEMA_VERSION
from onewan.errors import ConfigError

Migration = Callable[[dict[str, Any]], dict[str, Any]]

MOVED: Mapping[str, str] = {
    "train.grid_every": "validation.every",
    "train.grid_clips": "validation.clips",
}
"""Where fields went: for a file without `schema_version`, which counts as one of today's."""


def _from_1(data: dict[str, Any]) -> dict[str, Any]:
    """The measurements of the loss got a section; each density of noise levels its own fields.

    Version 1 had mean and deviation beside each density and used them for the logit-normal alone.
    """
    train = data.get("train")
    if not _is_section(train):
        return data
    moved = {
        MOVED[f"train.{name}"].removeprefix("validation."): value
        for name, value in train.items()
        if f"train.{name}" in MOVED
    }
    train = {name: value for name, value in train.items() if f"train.{name}" not in MOVED}
    timesteps = train.get("timesteps")
    if _is_section(timesteps) and timesteps.get("distribution", "uniform") == "uniform":
        train["timesteps"] = {k: v for k, v in timesteps.items() if k not in ("mean", "std")}
    given = data.get("validation")
    if moved and (given is None or _is_section(given)):
        data = {**data, "validation": {**moved, **(given or {})}}
    return {**data, "train": train}


def _is_section(node: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(node, dict)


MIGRATIONS: dict[int, Migration] = {1: _from_1}
"""From version n to n + 1, keyed by n.

To change the schema in a way that breaks older files: raise `SCHEMA_VERSION`, add here a function
from the old mapping to the new one (it returns a new mapping and may leave `schema_version` alone),
and store a run file of the old version for the test. A function that has been released is never
edited again: the files it was written for are still out there.
"""


def migrate(
    data: dict[str, Any],
    *,
    source: str = "run file",
    migrations: Mapping[int, Migration] = MIGRATIONS,
    current: int = SCHEMA_VERSION,
) -> dict[str, Any]:
    """`data` in the form of version `current`; a file without `schema_version` is in it already.

    A `schema_version` that is no version at all is left for validation to report.
    """
    version = data.get("schema_version", current)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        return data
    if version > current:
        raise ConfigError(
            source,
            [
                f"schema_version: is {version}, but this onewan knows versions up to {current}; "
                "update onewan, or write the file anew with `onewan init`"
            ],
        )
    for step in range(version, current):
        data = {**migrations[step](data), "schema_version": step + 1}
    return data
