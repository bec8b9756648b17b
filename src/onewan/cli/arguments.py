"""How commands and the arguments that several of them share are declared."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from onewan.variants import VARIANTS

VARIANT_NAMES = tuple(VARIANTS)

STANDARD_OUTPUT = "-"
"""Stands for the standard output where a file to write is named."""

SHELLS = ("bash", "zsh", "fish", "powershell")
"""Those that `onewan completion` writes a script for."""

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


def lora_with_weight(text: str) -> tuple[Path, float]:
    """(path, weight) of ``LORA[:WEIGHT]``; the weight is 1 if none is given."""
    path, colon, number = text.rpartition(":")
    # The last colon may belong to the path: to a Windows drive, a folder or the file's own name.
    drive = len(path) == 1 and path.isalpha()  # C:\style.safetensors
    if not colon or drive or "/" in number or "\\" in number or Path(text).exists():
        return Path(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text}: the weight {number!r} is not a number; write LORA:0.8, for example"
        ) from None
    if not math.isfinite(weight):
        raise argparse.ArgumentTypeError(f"{text}: the weight is not finite; give a number")
    return Path(path), weight
