"""How commands and the arguments that several of them share are declared."""

from __future__ import annotations

import argparse
from pathlib import Path

from onewan.variants import VARIANTS

VARIANT_NAMES = tuple(VARIANTS)

Commands = argparse._SubParsersAction  # pyright: ignore[reportPrivateUsage]
"""What `add_subparsers` returns; argparse has no public name for it."""


def add_command(
    commands: Commands, name: str, summary: str, details: str = ""
) -> argparse.ArgumentParser:
    """Add a command. `summary` is its line in ``onewan --help``; ``onewan NAME --help`` prints it
    as a sentence, followed by `details`, whose line breaks are kept."""
    return commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {details}".strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_run_file(parser: argparse.ArgumentParser) -> None:
    """The arguments ``RUN.yaml`` and ``KEY=VALUE ...``."""
    parser.add_argument(
        "run", metavar="RUN.yaml", type=Path, help="a run file, or the folder of an earlier run"
    )
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="override a setting, such as train.steps=500 or optimizer.lr=2e-4",
    )
