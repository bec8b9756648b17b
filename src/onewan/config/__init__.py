"""The run file: what it may hold (`schema`, `rules`), how it is read and written (`load`,
`migrate`), what is said about a bad one (`wording`), and what to start from (`starter`)."""

from onewan.config.load import changed_fields, dump_run, load_run
from onewan.config.schema import RunConfig
from onewan.config.schema_paths import leaves
from onewan.config.template import json_schema, starter

__all__ = [
    "RunConfig",
    "changed_fields",
    "dump_run",
    "json_schema",
    "leaves",
    "load_run",
    "starter",
]
