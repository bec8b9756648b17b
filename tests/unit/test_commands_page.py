"""docs/commands.md: what `--json` prints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from onewan.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["init --list", "plan", "runs"])
def test_json_is_one_object_with_the_documented_fields(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = re.findall(rf"^\| `{command}` \| (.*) \|$", PAGE, re.MULTILINE)
    names = set(re.findall(r"`(\w+)`", row))
    more = {"plan": [str(ROOT / "configs" / "ti2v-5b" / "lora_24gb.yaml")], "runs": [str(tmp_path)]}
    assert main([*command.split(), *more.get(command, []), "--json"]) in (0, 1)
    data = json.loads(capsys.readouterr().out)
    assert set(data) <= names
    assert names <= keys_in(data)


def keys_in(value: Any) -> set[str]:
    """The names of all fields in `value`."""
    if isinstance(value, dict):
        return set(value) | {name for item in value.values() for name in keys_in(item)}
    return {name for item in value for name in keys_in(item)} if isinstance(value, list) else set()
