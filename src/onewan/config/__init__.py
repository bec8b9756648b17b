"""The run file: what it may hold (`schema`), and how it is read and written (`load`)."""

from onewan.config.load import (
    changed_fields,
    dump_run,
    json_schema,
    leaves,
    load_run,
    starter,
)
from onewan.config.schema import RunConfig

__all__ = [
    "RunConfig",
    "changed_fields",
    "dump_run",
    "json_schema",
    "leaves",
    "load_run",
    "starter",
]
