"""The run file.

`schema`, `method`, `objective` and `optimizer` declare its fields; `load` reads and writes it;
`rules`, `method_rules` and `unused` check what spans fields; `resolve` fills in defaults;
`messages` words errors, with the names that other trainers use from `foreign_terms`; `fields` lists
the fields and exports the schema for editors. `inputs` says how each field is entered in a form,
and `edits` changes the text of a run file field by field.
"""

from onewan.config.fields import json_schema, leaves
from onewan.config.load import changed_fields, dump_run, load_run
from onewan.config.schema import RunConfig

__all__ = ["RunConfig", "changed_fields", "dump_run", "json_schema", "leaves", "load_run"]
