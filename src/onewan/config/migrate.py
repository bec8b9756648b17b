"""Older run files, brought up to date: one pure function per step of the schema.

Works on the plain mapping that the parser yields, before anything is validated, so a step knows
nothing of today's schema. Never touches a file, never changes its argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from onewan.config.schema import SCHEMA_VERSION
from onewan.errors import ConfigError

Migration = Callable[[dict[str, Any]], dict[str, Any]]

MIGRATIONS: dict[int, Migration] = {}
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
