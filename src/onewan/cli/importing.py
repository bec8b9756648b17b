"""The command `onewan import-config`, and OneTrainer configs given to `train` and `cache`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onewan import importing
from onewan.cli.output import complain, write
from onewan.config.load import load_run
from onewan.errors import ConfigError
from onewan.files import replacing
from onewan.importing import Imported
from onewan.variants import VariantName

_SHOWN = 60
"""Characters of a key or value."""
_MOST = 500
"""Keys of one outcome; OneTrainer's own configs have fewer."""


def import_config(
    config: Path,
    *,
    variant: VariantName | None,
    root: Path | None,
    output: Path | None,
    account: str,
) -> int:
    imported = importing.import_config(config, variant=variant, root=root)
    text = importing.run_file_text(imported, config.name)
    if output is None:
        write(text)
    else:
        with replacing(output) as path:
            path.write_text(text, encoding="utf-8")
    for line in _account(imported, account):
        complain(line)
    return 0


def run_file_of(path: Path) -> Path:
    """`path` itself, or for a OneTrainer config the run file that is made from it, beside it.

    ConfigError if another file has that name already.
    """
    if not importing.looks_like_onetrainer(path):
        return path
    imported = importing.import_config(path)
    beside = path.with_name(f"{path.stem}.onewan.yaml")
    if beside.exists() and not beside.read_text(encoding="utf-8").startswith(importing.MARK):
        raise ConfigError(
            str(path),
            [
                f"its run file would be {beside.name}, which exists and was not made from it; "
                "move that file away"
            ],
        )
    with replacing(beside) as made:
        made.write_text(importing.run_file_text(imported, path.name), encoding="utf-8")
    for line in _account(imported, "short"):
        complain(line)
    load_run(beside)  # errors name the run file, where the user can correct them
    complain(f"{path} was imported as {beside}")
    return beside


def _account(imported: Imported, how: str) -> Iterator[str]:
    if how == "json":
        entries = [
            {"key": e.key, "value": e.value, "outcome": e.outcome, "note": e.note}
            for e in imported.entries
        ]
        # A line for each key: indentation would multiply the size of nested values.
        lines = [json.dumps(entry, default=str) for entry in entries]
        yield '{"keys": ['
        yield from (f" {line}{',' if line is not lines[-1] else ''}" for line in lines)
        yield f'], "notices": {json.dumps(imported.notices)}}}'
        return
    for outcome in ("carried", "not applicable", "unknown", "defaulted"):
        found = [e for e in imported.entries if e.outcome == outcome]
        if how == "short" and outcome == "defaulted":
            continue
        if found:
            yield f"{outcome}:"
        for entry in found[:_MOST]:
            yield f"  {entry.key[:_SHOWN]} = {_shown(entry.value)}: {entry.note}"
        if len(found) > _MOST:
            yield f"  and {len(found) - _MOST} more (--account json lists all)"
    for notice in imported.notices:
        yield f"check: {notice}"
    yield f"{len(imported.entries)} keys: {imported.summary}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
