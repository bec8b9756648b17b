"""The command line: `onewan COMMAND`. The only package that prints.

Heavy imports happen inside the commands, so that ``onewan --help`` answers at once. Exit status: 0
done, 1 the user's input or data is at fault (one message on stderr, no traceback), 2 wrong usage,
130 stopped by the user with the state saved.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from onewan.errors import Interrupted, OnewanError
from onewan.variants import VARIANTS

_VARIANTS = tuple(VARIANTS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = parse(arguments)
    # A run file is UTF-8, and so is what is said about it, also on a Windows console.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    # diffusers and transformers read these when they are imported. Their warnings are meant for the
    # programmer (an optional package is missing, say), and ours for the user come on top.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return options.command(options)
    except OnewanError as error:
        print(f"onewan: {error}", file=sys.stderr)
        return 1
    except (Interrupted, KeyboardInterrupt):
        print("onewan: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone (`onewan schema | head`); keep Python from complaining.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of one call; leaves with status 2 and the usage if they are wrong."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse stops collecting KEY=VALUE at the first option behind the run file, and hands back
    # those that come later (`train run.yaml --resume train.steps=300`).
    if rest and "overrides" in options and not any(word.startswith("-") for word in rest):
        options.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="onewan",
        description="Trains the Wan 2.2 video models.",
        epilog="New here? `onewan demo --dir demo` shows everything on a tiny model, in minutes.",
    )
    version = importlib.metadata.version("onewan")
    parser.add_argument("--version", action="version", version=f"onewan {version}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_init(commands)
    _add_schema(commands)
    _add_cache(commands)
    _add_train(commands)
    _add_sample(commands)
    return parser


_Commands = argparse._SubParsersAction  # pyright: ignore[reportPrivateUsage]


def _add(commands: _Commands, name: str, summary: str, more: str = "") -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {more}".strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_run_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN.yaml", type=Path, help="a run file, or the folder of an earlier run"
    )
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="change a setting for this time, such as train.steps=500 or optimizer.lr=2e-4",
    )


def _add_demo(commands: _Commands) -> None:
    parser = _add(
        commands,
        "demo",
        "show everything on a tiny model: make clips, train a LoRA, sample a video",
        "Needs no GPU and no\ndownload; takes a minute or two.",
    )
    parser.add_argument("--dir", type=Path, default=Path("demo"), help="where to (default: demo)")
    parser.add_argument("--variant", choices=_VARIANTS, default="t2v-a14b", help="which model")

    def run(options: argparse.Namespace) -> int:
        from onewan.cli.commands import demo

        return demo(options.dir, options.variant)

    parser.set_defaults(command=run)


def _add_init(commands: _Commands) -> None:
    parser = _add(
        commands,
        "init",
        "print a short commented run file to start from",
        "\n\n  onewan init --variant t2v-a14b > run.yaml",
    )
    parser.add_argument("--variant", choices=_VARIANTS, required=True, help="which model to train")

    def run(options: argparse.Namespace) -> int:
        from onewan.config.starter import starter

        print(starter(options.variant), end="")
        return 0

    parser.set_defaults(command=run)


def _add_schema(commands: _Commands) -> None:
    parser = _add(
        commands,
        "schema",
        "print the JSON schema of the run file, for editors that complete and check",
        "\n\n  onewan schema > onewan.schema.json",
    )

    def run(_options: argparse.Namespace) -> int:
        import json

        from onewan.config.starter import json_schema

        print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
        return 0

    parser.set_defaults(command=run)


def _add_cache(commands: _Commands) -> None:
    parser = _add(
        commands,
        "cache",
        "check the clips and encode them once, before training",
        "Reports every file that\ncan't be used. `onewan train` does it too where it was not done.",
    )
    _add_run_file(parser)
    parser.add_argument(
        "--strict", action="store_true", help="exit with status 1 if any file can't be used"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read all entries and encode damaged ones again"
    )

    def run(options: argparse.Namespace) -> int:
        from onewan.cli.commands import cache

        return cache(options.run, options.overrides, options.strict, options.verify)

    parser.set_defaults(command=run)


def _add_train(commands: _Commands) -> None:
    parser = _add(
        commands,
        "train",
        "train what a run file says",
        "Ctrl-C saves the state and stops; --resume goes on\nfrom there with the same numbers as "
        "if it had never stopped.",
    )
    _add_run_file(parser)
    parser.add_argument("--resume", action="store_true", help="go on where the run was cut off")
    parser.add_argument(
        "--allow-change",
        action="store_true",
        help="with --resume: go on although settings or clips have changed",
    )

    def run(options: argparse.Namespace) -> int:
        from onewan.cli.commands import train

        return train(options.run, options.overrides, options.resume, options.allow_change)

    parser.set_defaults(command=run)


def _add_sample(commands: _Commands) -> None:
    parser = _add(commands, "sample", "make a video with a model, with or without trained LoRAs")
    parser.add_argument("model", metavar="MODEL", help="a model's folder, or its name on the hub")
    parser.add_argument("--prompt", required=True, help="what to show")
    parser.add_argument("--out", type=Path, required=True, help="FILE.mp4 or FILE.webm")
    parser.add_argument("--image", type=Path, help="the first frame (I2V-A14B, TI2V-5B)")
    parser.add_argument(
        "--lora",
        metavar="FILE",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        help="LoRA files, one for each expert",
    )
    parser.add_argument("--negative-prompt", help="what to avoid (default: the official one)")
    parser.add_argument("--frames", type=int, help="4n+1 (default: the model's own number)")
    parser.add_argument("--width", type=int, help="pixels (default: the model's own)")
    parser.add_argument("--height", type=int, help="pixels (default: the model's own)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's own)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--fps", type=float, help="of the file (default: the model's own)")
    parser.add_argument(
        "--guidance", type=float, nargs="+", metavar="G", help="one number, or HIGH LOW"
    )
    parser.add_argument("--shift", type=float, help="of the noise schedule (default: official)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")

    def run(options: argparse.Namespace) -> int:
        from onewan.cli.commands import sample

        return sample(options)

    parser.set_defaults(command=run)
