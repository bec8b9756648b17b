"""The options of the command caption; imports nothing heavy."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

from onewan.captioning.prompts import TEMPLATE_NAMES
from onewan.cli.arguments import Commands, add_command

_SERVER = "http://127.0.0.1:8000/v1"
"""That of vLLM on this machine."""
_KEY_VARIABLE = "ONEWAN_CAPTION_KEY"

_DETAILS = """SOURCE is a folder
of clips, a table of them, or a run file, whose clips are then shown as that run trains them.
The server is one with OpenAI's chat interface, such as vLLM, llama.cpp, LM Studio or Ollama,
by default on this machine; frames are sent to it and nowhere else. Clips that have a caption
are left as they are, and no file is ever replaced, so a call that was interrupted is repeated
to do the rest. The exit status is 1 if a clip got no caption.

  onewan caption clips --model Qwen/Qwen3-VL-8B-Instruct
  onewan caption mira.yaml --server http://127.0.0.1:11434/v1 --model qwen3-vl:8b \\
      --template character --review"""


def add_caption(commands: Commands) -> None:
    parser = add_command(
        commands, "caption", "let a vision model on a server write the captions of clips", _DETAILS
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="a folder of clips, a table, or a run file"
    )
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="override a setting of the run file, such as model.variant=ti2v-5b",
    )
    _add_server(parser)
    _add_request(parser)
    parser.add_argument(
        "--review",
        action="store_true",
        help="write NAME.caption.txt, which training does not read, also for clips with captions",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list what would be sent, and send nothing"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")

    def run(options: argparse.Namespace) -> int:
        key = _key(parser, options.key_variable)

        from onewan.cli.caption import caption

        return caption(options, key)

    parser.set_defaults(command=run)


def _key(parser: argparse.ArgumentParser, variable: str | None) -> str:
    """The key of the server, from the environment; empty if there is none. It is never printed."""
    name = variable or _KEY_VARIABLE
    key = os.environ.get(name, "").strip()
    if variable and not key:
        parser.error(f"--key-variable: there is no environment variable {variable} with a key")
    if not key.isascii() or not key.isprintable():
        parser.error(f"the environment variable {name} has characters that no key has")
    return key


def _add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--server",
        metavar="URL",
        default=_SERVER,
        help="address of the interface (default: %(default)s)",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="which model (default: the only one that the server lists)"
    )
    parser.add_argument(
        "--key-variable",
        metavar="VARIABLE",
        help="the environment variable with the key of the server, if it needs one "
        f"(default: {_KEY_VARIABLE})",
    )
    parser.add_argument(
        "--parallel",
        type=_number(int, 1, 256),
        default=4,
        metavar="N",
        help="requests at the same time (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=_number(float, 0.1, 86_400),
        default=300.0,
        metavar="SECONDS",
        help="longest time for an answer (default: 300)",
    )
    parser.add_argument(
        "--retries",
        type=_number(int, 0, 100),
        default=4,
        metavar="N",
        help="how often a request is repeated after a time-out, a broken connection or an error of "
        "the server that may pass (default: %(default)s)",
    )


def _add_request(parser: argparse.ArgumentParser) -> None:
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--template",
        choices=TEMPLATE_NAMES,
        default="general",
        help="what is to be learned from the clips (default: %(default)s)",
    )
    text.add_argument(
        "--prompt",
        metavar="TEXT",
        help="ask this instead; {material} and {trigger_word} are filled in",
    )
    text.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="ask what this text file says"
    )
    parser.add_argument(
        "--trigger-word",
        metavar="WORD",
        default="",
        help="a word that each caption contains (default: that of the clip's source in the run "
        "file)",
    )
    parser.add_argument(
        "--frames",
        type=_number(int, 1, 256),
        default=8,
        metavar="N",
        help="frames of each video, at equal distances (default: %(default)s)",
    )
    parser.add_argument(
        "--frame-size",
        type=_number(int, 64, 2048),
        default=640,
        metavar="PIXELS",
        help="longest side of a frame (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        type=_number(int, 16, 1_000_000),
        default=1024,
        metavar="N",
        help="longest answer, with the model's thinking (default: %(default)s)",
    )


def _number(kind: type[int] | type[float], least: float, most: float) -> Callable[[str], float]:
    """A type of argument: a number from `least` to `most`."""

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(
                f"must be a {whole}number from {least:g} to {most:g}, got {text!r}"
            )
        return value

    return number
