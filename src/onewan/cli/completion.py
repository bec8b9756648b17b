"""The command completion: a script with which a shell completes commands, options and settings.

shtab writes it from the parser. It is a text of its own, so that completing starts no Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onewan.cli.output import write
from onewan.config import json_schema
from onewan.config.changes import CHANGEABLE

_BASH = """
# Names of runs, and folders.
_onewan_runs() {{
  compgen -W "$(ls runs 2>/dev/null)" -- "$1"
  compgen -d -- "$1"
}}
# Fields that may change while a run trains.
_onewan_changes() {{
  compgen -S = -W "{changes}" -- "$1"
}}
# Fields of the run file, and further files.
_onewan_settings() {{
  compgen -S = -W "{settings}" -- "$1"
  compgen -f -- "$1"
}}
"""

_BASH_END = """
# No space after the name of a field, which its value follows.
_onewan() {
  _shtab_onewan "$@"
  if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]]; then compopt -o nospace; fi
}
complete -o bashdefault -F _onewan onewan
"""


def show_completion(shell: str, parser: argparse.ArgumentParser) -> int:
    """Print the script of `shell` for the commands of `parser`."""
    import shtab

    for command in _commands(parser):
        for action in command._actions:
            _complete(action, shtab)
    preamble = (
        _BASH.format(settings=" ".join(settings()), changes=" ".join(CHANGEABLE))
        if shell == "bash"
        else ""
    )
    script = shtab.complete(parser, shell, preamble=preamble)
    write(script + _BASH_END if shell == "bash" else script)
    return 0


def _commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """`parser` and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in dict.fromkeys(action.choices.values()):
                yield from _commands(command)


def _complete(action: argparse.Action, shtab: Any) -> None:
    """Say how the values of `action` are completed."""
    if action.choices is not None:
        return
    files: dict[str, str] = shtab.FILE
    if action.dest == "changes":
        vars(action)["complete"] = {**files, "bash": "_onewan_changes"}
    elif action.metavar == "KEY=VALUE":
        vars(action)["complete"] = {**files, "bash": "_onewan_settings"}
    elif action.metavar == "RUN":
        vars(action)["complete"] = {**shtab.DIRECTORY, "bash": "_onewan_runs"}
    elif action.metavar in ("DIR", "FOLDER"):
        vars(action)["complete"] = shtab.DIRECTORY
    elif action.type is Path or action.metavar == "FILE":
        vars(action)["complete"] = files


def settings() -> list[str]:
    """Dotted names of the run file's fields that have one place, such as ``train.steps``."""
    schema = json_schema()
    definitions: dict[str, Any] = schema.get("$defs", {})
    found: dict[str, None] = {}

    def collect(node: dict[str, Any], path: tuple[str, ...]) -> None:
        for branch in (node, *node.get("anyOf", ()), *node.get("oneOf", ())):
            reference = str(branch.get("$ref", "")).rpartition("/")[2]
            section = definitions.get(reference, branch)
            for name, value in section.get("properties", {}).items():
                collect(value, (*path, name))
            if section is not branch and not section.get("properties"):
                collect(section, path)
        if len(path) > 1:
            found[".".join(path)] = None

    collect(schema, ())
    return sorted(found)
