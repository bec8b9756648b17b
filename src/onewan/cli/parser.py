"""The options of all commands; imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from onewan.cli.arguments import SHELLS, STANDARD_OUTPUT, VARIANT_NAMES, Commands, add_command
from onewan.cli.caption_parser import add_caption
from onewan.cli.comfyui import add_comfyui_node
from onewan.cli.onetrainer_parsers import add_import_config, add_onetrainer
from onewan.cli.output import say, write, write_file
from onewan.cli.report_parsers import add_compare, add_report
from onewan.cli.run_parsers import (
    add_cache,
    add_doctor,
    add_memory_option,
    add_plan,
    add_runs,
    add_train,
)
from onewan.cli.sample_parser import add_sample
from onewan.cli.serve import add_serve
from onewan.cli.steering_parsers import add_requests
from onewan.cli.weights_parsers import add_convert, add_inspect, add_merge
from onewan.errors import one_line
from onewan.presets.recipes import PURPOSES
from onewan.presets.starter import METHODS


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of one call, with the function to run as ``command``.

    Exits with status 2 and the usage if the arguments are wrong.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse stops collecting KEY=VALUE at the first option after the run file, and returns the
    # later ones separately (`train run.yaml --resume train.steps=300`).
    if rest and "overrides" in options and not any(word.startswith("-") for word in rest):
        options.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="onewan",
        description="Trains the Wan 2.2 video models.",
        epilog="New here? `onewan demo --dir demo` runs every stage on a tiny model, in minutes.",
    )
    parser.add_argument("--version", action=_PrintVersion, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    # In the order in which a new user needs them, which is that of `onewan --help`.
    for add in (
        _add_demo,
        _add_init,
        _add_schema,
        add_caption,
        add_doctor,
        add_plan,
        add_cache,
        add_train,
        add_serve,
        add_runs,
        add_requests,
        add_report,
        add_compare,
        add_sample,
        add_inspect,
        add_convert,
        add_merge,
        add_comfyui_node,
        add_onetrainer,
        add_import_config,
        _add_completion,
    ):
        add(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))


class _PrintVersion(argparse.Action):
    """Prints the version. argparse's own action would need it in advance, and importlib.metadata is
    the slowest import of ``onewan --help``."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import importlib.metadata

        say(f"onewan {importlib.metadata.version('onewan')}")
        parser.exit()


def _add_demo(commands: Commands) -> None:
    parser = add_command(
        commands,
        "demo",
        "run every stage on a tiny model: make clips, train a LoRA, sample a video",
        "Needs no GPU and no\ndownload; takes a minute or two.",
    )
    parser.add_argument(
        "--dir", type=Path, default=Path("demo"), help="folder for all files (default: demo)"
    )
    parser.add_argument(
        "--variant",
        choices=VARIANT_NAMES,
        default="t2v-a14b",
        help="which model (default: %(default)s)",
    )
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="only make the model, the clips and the run file, and train nothing",
    )

    def run(options: argparse.Namespace) -> int:
        # Here and in the other `run` functions: `onewan --help` must not wait for torch.
        from onewan.cli.commands import demo

        return demo(options.dir, options.variant, prepare=options.prepare)

    parser.set_defaults(command=run)


def _add_init(commands: Commands) -> None:
    parser = add_command(
        commands,
        "init",
        "write a short commented run file to start from",
        "With --vram, its\nvalues are the largest that fit; with --purpose, they are a recipe for "
        "what is to be\nlearned; with --models, it names the files that are there.\n\n"
        "  onewan init dog.yaml --vram 24GB --purpose character --models ComfyUI/models",
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        help="the run file to write, such as dog.yaml; - or nothing prints it",
    )
    parser.add_argument(
        "--variant",
        choices=VARIANT_NAMES,
        help="which model to train (default: t2v-a14b)",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="what is trained, and how (default: lora)",
    )
    parser.add_argument(
        "--purpose",
        choices=PURPOSES,
        help="what is to be learned (default: nothing particular); photos: from images only",
    )
    parser.add_argument(
        "--models",
        type=Path,
        metavar="FOLDER",
        help="ComfyUI/models, whose files are used instead of a download",
    )
    add_memory_option(parser, "--vram", "device memory that the run has to fit in, such as 24GB")
    add_memory_option(parser, "--ram", "host memory, such as 64GB (default: that of this machine)")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    parser.add_argument(
        "--list",
        action="store_true",
        help="list what fits which card instead: clips, time of a step and host memory by variant, "
        "method and card; of those that --variant, --method and --vram name",
    )
    parser.add_argument("--json", action="store_true", help="with --list: print it as JSON")

    def run(options: argparse.Namespace) -> int:
        if options.json and not options.list:
            parser.error("--json belongs to --list")
        if options.list and (options.file or options.models or options.purpose or options.ram):
            parser.error("--list is given with --variant, --method, --vram and --json alone")

        from onewan.cli.init import init

        return init(options)

    parser.set_defaults(command=run)


def _add_schema(commands: Commands) -> None:
    parser = add_command(
        commands,
        "schema",
        "write the JSON schema of the run file, for editors that complete and check it",
        "\n\n  onewan schema onewan.schema.json",
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        help="the file to write or replace; - or nothing prints it",
    )

    def run(options: argparse.Namespace) -> int:
        import json

        from onewan.config import json_schema

        text = json.dumps(json_schema(), indent=2, ensure_ascii=False)
        if options.file in (None, STANDARD_OUTPUT):
            write(text)
        else:
            write_file(Path(options.file), f"{text}\n")
            say(f"{options.file}: written")
        return 0

    parser.set_defaults(command=run)


def _add_completion(commands: Commands) -> None:
    parser = add_command(
        commands,
        "completion",
        "print a script with which a shell completes commands, options and settings",
        "For bash:\n\n  onewan completion bash > ~/.local/share/bash-completion/completions/onewan",
    )
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))

    def run(options: argparse.Namespace) -> int:
        from onewan.cli.completion import show_completion

        return show_completion(options.shell, _parser())

    parser.set_defaults(command=run)
