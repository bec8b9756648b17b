"""The command line: `onewan COMMAND`. The only package that prints.

Heavy imports happen inside the commands, so that ``onewan --help`` answers at once. Exit status: 0
done, 1 the user's input or data is at fault (one message on stderr, no traceback), 2 wrong usage,
130 stopped by the user with the state saved.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from onewan.dtypes import WeightDtype
from onewan.errors import CheckpointError, Interrupted, OnewanError
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
    _add_inspect(commands)
    _add_convert(commands)
    _add_merge(commands)
    _add_onetrainer(commands)
    _add_import_config(commands)
    _quiet_imports()
    return parser


def _quiet_imports() -> None:
    """PEFT imports these where they are installed, and they tell of kernels that are not used."""
    for package in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(package).setLevel(logging.ERROR)


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
        from onewan.config.template import starter

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

        from onewan.config.template import json_schema

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
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on where the run was cut off")
    start.add_argument(
        "--again",
        action="store_true",
        help="with a run's folder: make the run again from its resolved settings, as a new run "
        "beside it",
    )
    parser.add_argument(
        "--allow-change",
        action="store_true",
        help="with --resume: go on although settings or clips have changed",
    )

    def run(options: argparse.Namespace) -> int:
        from onewan.cli.commands import train

        return train(
            options.run,
            options.overrides,
            resume=options.resume,
            again=options.again,
            allow_change=options.allow_change,
        )

    parser.set_defaults(command=run)


def _add_sample(commands: _Commands) -> None:
    parser = _add(
        commands,
        "sample",
        "make a video with a model, with or without trained LoRAs and embeddings",
    )
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
    parser.add_argument(
        "--embedding",
        metavar="FILE",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        help="files of trained embeddings, whose placeholders the prompt may contain",
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
    parser.add_argument(
        "--boundary", type=float, help="noise level between the experts (default: the model's own)"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")

    def run(options: argparse.Namespace) -> int:
        from onewan.cli.commands import sample

        return sample(options)

    parser.set_defaults(command=run)


def _add_inspect(commands: _Commands) -> None:
    parser = _add(
        commands,
        "inspect",
        "say what a file of weights is, and which programs read it",
        "Reads\nheaders alone, so it takes a moment whatever the size. Works on models in every "
        "layout,\nLoRAs of every trainer, and anything else, of which it says so.",
    )
    parser.add_argument("path", metavar="PATH", type=Path, help="a file or a folder")
    parser.add_argument("--json", action="store_true", help="print one JSON document")

    def run(options: argparse.Namespace) -> int:
        import json

        from onewan.checkpoint.inspect import inspect

        report = inspect(options.path)
        if options.json:
            print(json.dumps(report.as_json(), indent=2, ensure_ascii=False))
        elif report.kind == "unreadable":
            raise CheckpointError(f"{report.path}: {report.what}")
        else:
            print("\n".join(report.lines()))
        return 1 if report.kind == "unreadable" else 0

    parser.set_defaults(command=run)


def _add_output(parser: argparse.ArgumentParser, dtype_help: str) -> None:
    parser.add_argument("--dtype", choices=get_args(WeightDtype), help=dtype_help)
    parser.add_argument("--force", action="store_true", help="replace what is at DST")


def _add_convert(commands: _Commands) -> None:
    parser = _add(
        commands,
        "convert",
        "write a model or a LoRA in the form that another program wants",
        """SRC is a model's folder
(diffusers, official, or single files), one of its components in any form (safetensors,
shards, .pth, GGUF, fp8), or a LoRA of any trainer. SRC stays as it is.

--to, for models:
  diffusers   a folder that WanPipeline.from_pretrained loads
  official    as in the Wan-AI repositories: high_noise_model/, Wan2.1_VAE.pth, ...
  single      .safetensors with official names, as ComfyUI reads them
  fp8_scaled  the same with the large layers in 8 bits: half of bfloat16
--to, for LoRAs:
  comfyui     also read by diffusers, musubi-tuner and DiffSynth-Studio
  diffusers   keys as diffusers itself writes them
  kohya       as musubi-tuner and kohya's programs write them

  onewan convert wan2.2_t2v_high_noise_14B_fp16.safetensors high/ --to diffusers
  onewan convert Wan2.2-T2V-A14B wan22_fp8 --to fp8_scaled
  onewan convert style.safetensors style_kohya.safetensors --to kohya""",
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="a file or a folder")
    parser.add_argument(
        "destination",
        metavar="DST",
        type=Path,
        help="a folder for a whole model; for a component a folder (diffusers, official "
        "transformer), .pth (official VAE or text encoder) or .safetensors",
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=("diffusers", "official", "single", "fp8_scaled", "comfyui", "kohya"),
        help="see above",
    )
    _add_output(
        parser,
        "type of the weights (default: each keeps its own, and quantised ones become bfloat16); "
        "with fp8_scaled that of what is not fp8",
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        type=Path,
        help="the model a LoRA was trained on; DoRA and OFT need it on the way to ComfyUI",
    )
    parser.add_argument(
        "--expert", choices=("high", "low"), help="whose LoRA to take if SRC holds both"
    )

    def run(options: argparse.Namespace) -> int:
        from onewan.cli.convert import convert

        return convert(
            options.source,
            options.destination,
            options.to,
            dtype=options.dtype,
            force=options.force,
            base=options.base,
            expert=options.expert,
        )

    parser.set_defaults(command=run)


def _lora(text: str) -> tuple[Path, float]:
    """(path, weight) of ``LORA[:WEIGHT]``; the weight is 1 if none is given."""
    path, colon, number = text.rpartition(":")
    drive = len(path) == 1 and path.isalpha()  # C:\style.safetensors
    if not colon or drive or "/" in number or "\\" in number or Path(text).exists():
        return Path(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text}: {number!r} is no weight; give a number"
        ) from None
    if not math.isfinite(weight):
        raise argparse.ArgumentTypeError(f"{text}: the weight is not finite; give a number")
    return Path(path), weight


def _add_merge(commands: _Commands) -> None:
    parser = _add(
        commands,
        "merge",
        "write a model with LoRAs merged into its weights",
        """DST gets the layout of BASE.

  onewan merge wan2.2_t2v_low_noise_14B_fp16.safetensors style_low.safetensors:0.8 \\
      merged_low.safetensors
  onewan merge Wan2.2-T2V-A14B style_high_noise.safetensors style_low_noise.safetensors merged

With a whole model each LoRA goes to its expert, told by its header or its name.""",
    )
    parser.add_argument(
        "base", metavar="BASE", type=Path, help="a transformer, or a whole model's folder"
    )
    parser.add_argument(
        "loras",
        metavar="LORA[:WEIGHT]",
        type=_lora,
        nargs="+",
        help="a LoRA or its kin, and how much it counts (default: 1)",
    )
    parser.add_argument("destination", metavar="DST", type=Path, help="a new file or folder")
    _add_output(parser, "type of the weights (default: that of BASE)")
    parser.add_argument(
        "--any-expert",
        action="store_true",
        help="merge although headers or names say that LoRA and BASE are of different experts",
    )

    def run(options: argparse.Namespace) -> int:
        from onewan.cli.convert import merge_loras

        return merge_loras(
            options.base,
            options.loras,
            options.destination,
            dtype=options.dtype,
            force=options.force,
            check_names=not options.any_expert,
        )

    parser.set_defaults(command=run)


def _add_onetrainer(commands: _Commands) -> None:
    parser = _add(
        commands,
        "onetrainer",
        "add Wan 2.2 to a OneTrainer checkout",
        """Lays new files into the checkout and changes none of its own.

  check      whether this OneTrainer has all that the add-on needs
  install    lay the add-on in, or bring it up to date
  status     what is installed, and whether it still fits, as after a git pull
  uninstall  take out what was laid in
  export     write the weights of a backup of a Wan 2.2 run, a file for each expert

check and status exit with 1 if something is not as it should be, uninstall if a changed file was
left. OneTrainer's own environment needs onewan too: its python -m pip install onewan

  onewan onetrainer install ~/OneTrainer
  onewan onetrainer export ~/OneTrainer/workspace/run/backup/2026-... fox.safetensors""",
    )
    parser.add_argument("action", choices=("check", "install", "status", "uninstall", "export"))
    parser.add_argument("path", metavar="PATH", type=Path, help="OneTrainer's folder, or a backup")
    parser.add_argument(
        "destination", metavar="OUT", type=Path, nargs="?", help="export: the file to write"
    )
    parser.add_argument(
        "--to",
        choices=("comfyui", "diffusers", "kohya", "single"),
        help="export: the format (default: comfyui for LoRAs, single for experts)",
    )
    parser.add_argument(
        "--force", action="store_true", help="also overwrite or remove files that were changed"
    )

    def run(options: argparse.Namespace) -> int:
        if options.action == "export":
            from onewan.cli.onetrainer import export

            return export(options.path, options.destination, options.to, force=options.force)
        if options.destination is not None or options.to is not None:
            parser.error(f"{options.action} takes the one path of a checkout, and no --to")
        from onewan.cli.onetrainer import run as act

        return act(options.action, options.path, force=options.force)

    parser.set_defaults(command=run)


def _add_import_config(commands: _Commands) -> None:
    parser = _add(
        commands,
        "import-config",
        "turn a OneTrainer config into a run file",
        """Writes the run file to stdout (or --output), and an account of every key to stderr: what
was carried, and what was not and why. `onewan train CONFIG.json` does it by itself.

  onewan import-config ~/OneTrainer/workspace/config.json > run.yaml""",
    )
    parser.add_argument("config", metavar="CONFIG.json", type=Path)
    parser.add_argument(
        "--variant",
        choices=tuple(VARIANTS),
        help="which Wan 2.2 it is, where the base model does not tell",
    )
    parser.add_argument(
        "--root", metavar="PATH", type=Path, help="OneTrainer's folder, to which paths are relative"
    )
    parser.add_argument("--output", "-o", metavar="RUN.yaml", type=Path)
    parser.add_argument(
        "--account",
        choices=("short", "full", "json"),
        default="short",
        help="what to say of the keys: those that were given (short), all, or all as JSON",
    )

    def run(options: argparse.Namespace) -> int:
        from onewan.cli.importing import import_config

        return import_config(
            options.config,
            variant=options.variant,
            root=options.root,
            output=options.output,
            account=options.account,
        )

    parser.set_defaults(command=run)
