"""The commands that the documentation shows: those in fenced blocks, and those within sentences."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "configs/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]

NOT_RUN = {
    "git": "needs the network",
    "docker": "needs a container engine; the files have tests of their own",
    "nix": "needs Nix; the flake has tests of its own",
    "cd": "belongs to the lines around it",
    "export": "belongs to the lines around it",
    ".": "activates an environment",
    "venv/bin/python": "is OneTrainer's own interpreter",
    "OneTrainer/venv/bin/python": "is OneTrainer's own interpreter",
    "ssh": "needs another machine",
    "uv": "needs the network",
    "pipx": "needs the network",
    "sudo": "changes the system",
    "nix-shell": "needs Nix",
    "direnv": "needs Nix",
    "source": "activates an environment",
    "tensorboard": "is a server",
    "pre-commit": "needs the network",
    "sbatch": "needs Slurm; the file has tests of its own",
    "sky": "needs SkyPilot; the file has tests of its own",
    "kubectl": "needs a cluster; the file has tests of its own",
    "RUN=run.yaml": "starts docker, which needs a container engine; the file has tests of its own",
}
"""Programs of commands that the tests do not run, and why."""
CHECKED = ("onewan", "make", "pip", "python", "torchrun")
"""Programs of commands that they run, or of which they check what the command names."""

_BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^ *```", re.S | re.M)
_INLINE = re.compile(r"`(onewan [^`]+)`")
LANGUAGES = ("bash", "console", "sh")
"""Languages of blocks whose lines are commands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command line as a page shows it."""

    page: str
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        """The words of the line, without its comment and without a redirection."""
        return shlex.split(self.text.partition(" > ")[0], comments=True)

    @property
    def output(self) -> str | None:
        """The file that the line redirects its output to."""
        words = shlex.split(self.text.partition(" > ")[2], comments=True)
        return words[0] if words else None

    @property
    def program(self) -> str:
        return self.words[0]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def blocks(page: Path) -> Iterator[tuple[int, str, str]]:
    """The number of the first line, the language and the text of each fenced block."""
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        indent = len(match["indent"])
        body = "\n".join(line[indent:] for line in match["body"].splitlines())
        yield text.count("\n", 0, match.start()) + 2, match["language"], body


def block_commands(page: Path) -> Iterator[Command]:
    """The commands in the page's blocks, continued lines as one; of a block of the language
    `console`, the lines after a `$`."""
    for first, language, body in blocks(page):
        if language not in LANGUAGES:
            continue
        lines = body.replace("\\\n", "\0").split("\n")
        number = first
        for line in lines:
            text = line.replace("\0", " ").strip()
            shown = text.removeprefix("$ ")
            is_command = text != shown if language == "console" else bool(text)
            if is_command and not text.startswith("#"):
                yield Command(page=page.name, line=number, text=shown)
            number += 1 + line.count("\0")


def inline_commands(page: Path) -> Iterator[Command]:
    """The commands `onewan ...` within the page's sentences."""
    text = _BLOCK.sub(lambda m: "\n" * m[0].count("\n"), page.read_text(encoding="utf-8"))
    for match in _INLINE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Command(page=page.name, line=line, text=" ".join(match[1].split()))
