"""The command `onewan import-config`, and OneTrainer configs given to `train` and `cache`."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from onewan import importing
from onewan.config.load import load_run
from onewan.errors import ConfigError
from onewan.files import replacing
from onewan.importing import Imported
from onewan.variants import VariantName

_MARK = "# Made by onewan from the OneTrainer config"
_SHOWN = 60


def import_config(
    config: Path,
    *,
    variant: VariantName | None,
    root: Path | None,
    output: Path | None,
    account: str,
) -> int:
    imported = importing.import_config(config, variant=variant, root=root)
    text = _yaml(imported, config)
    if output is None:
        sys.stdout.write(text)
    else:
        with replacing(output) as path:
            path.write_text(text, encoding="utf-8")
    for line in _account(imported, account):
        print(line, file=sys.stderr)
    return 0


def run_file_of(path: Path) -> Path:
    """`path` itself, or for a OneTrainer config the run file that is made from it, beside it.

    ConfigError if another file has that name already.
    """
    if not importing.looks_like_onetrainer(path):
        return path
    imported = importing.import_config(path)
    beside = path.with_name(f"{path.stem}.onewan.yaml")
    if beside.exists() and not beside.read_text(encoding="utf-8").startswith(_MARK):
        raise ConfigError(
            str(path),
            [
                f"its run file would be {beside.name}, which exists and was not made from it; "
                "move that file away"
            ],
        )
    with replacing(beside) as made:
        made.write_text(_yaml(imported, path), encoding="utf-8")
    for line in _account(imported, "short"):
        print(line, file=sys.stderr)
    load_run(beside)  # errors name the run file, where the user can correct them
    print(f"{path} was imported as {beside}", file=sys.stderr)
    return beside


def _yaml(imported: Imported, config: Path) -> str:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.allow_unicode = True
    yaml.width = 1_000_000
    text = io.StringIO()
    yaml.dump(imported.document, text)
    notices = [f"# Check: {' '.join(notice.split())}" for notice in imported.notices]
    return "\n".join([f"{_MARK} {config.name}.", *notices, text.getvalue()])


def _account(imported: Imported, how: str) -> Iterator[str]:
    if how == "json":
        entries = [
            {"key": e.key, "value": e.value, "outcome": e.outcome, "note": e.note}
            for e in imported.entries
        ]
        yield json.dumps({"keys": entries, "notices": imported.notices}, indent=1, default=str)
        return
    for outcome in ("carried", "not applicable", "unknown", "defaulted"):
        found = [e for e in imported.entries if e.outcome == outcome]
        if how == "short" and outcome == "defaulted":
            continue
        if found:
            yield f"{outcome}:"
        for entry in found:
            yield f"  {entry.key} = {_shown(entry.value)}: {entry.note}"
    for notice in imported.notices:
        yield f"check: {notice}"
    counts = Counter(entry.outcome for entry in imported.entries)
    yield f"{len(imported.entries)} keys: " + ", ".join(f"{n} {what}" for what, n in counts.items())


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
