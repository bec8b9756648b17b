"""The run file.

`schema`, `method`, `objective` and `optimizer` declare its fields; `load` reads and writes it;
`rules`, `method_rules`, `train_rules` and `unused` check what spans fields; `resolve` fills in
defaults; `messages` and `schema_paths` word errors; `json_schema` exports the schema for editors.
"""

from onewan.config.json_schema import json_schema
from onewan.config.load import changed_fields, dump_run, load_run
from onewan.config.schema import RunConfig
from onewan.config.schema_paths import leaves

__all__ = [
    "RunConfig",
    "changed_fields",
    "dump_run",
    "json_schema",
    "leaves",
    "load_run",
]
