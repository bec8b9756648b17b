"""The options of the commands that steer a running trainer: stop, save, export,
sample-now and set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal, get_args

from onewan.cli.arguments import Commands, add_command
from onewan.dtypes import WeightDtype

FORMATS = ("comfyui", "no_alpha", "diffusers", "kohya")
"""Of exported weights: those of `output.formats` (a test compares them)."""


def add_requests(commands: Commands) -> None:
    _add_request(commands, "stop", "stop a running trainer after it has saved its state")
    _add_request(
        commands, "save", "let a running trainer save its state and export the weights now"
    )
    _add_export(commands)
    _add_sample_now(commands)
    _add_set(commands)


def add_run(parser: argparse.ArgumentParser) -> None:
    """The argument ``RUN``."""
    parser.add_argument(
        "run",
        metavar="RUN",
        type=Path,
        help="the folder of the run, or its name if it is in runs",
    )


def _add_request(commands: Commands, name: Literal["stop", "save"], summary: str) -> None:
    parser = add_command(commands, name, summary, "Takes effect after\nthe current step.")
    add_run(parser)
    if name == "stop":
        parser.add_argument(
            "--force",
            action="store_true",
            help="end the trainer and all its processes at once, without saving, also if it does "
            "not react any more",
        )

    def run(options: argparse.Namespace) -> int:
        from onewan.cli.requests import force_stop, send_request

        if name == "stop" and options.force:
            return force_stop(options.run)
        return send_request(options.run, name)

    parser.set_defaults(command=run)


def _add_export(commands: Commands) -> None:
    parser = add_command(
        commands,
        "export",
        "export the weights of a running trainer now, or those of a saved state",
        "A running\ntrainer exports its weights after the current step, if no option is given. "
        "Otherwise a\nsaved state is exported without training, into the run's folder weights/; "
        "its newest one,\nor that of --step. States have all precision, so that any format can be "
        "made of them.\n\n"
        "  onewan export mira --step 1500 --format kohya",
    )
    add_run(parser)
    parser.add_argument(
        "--step", type=int, metavar="N", help="the state of this step (default: the newest)"
    )
    parser.add_argument(
        "--format",
        action="append",
        default=[],
        choices=FORMATS,
        help="key format, as output.formats in the run file (default: the run's); several times "
        "for several",
    )
    parser.add_argument(
        "--dtype",
        choices=(*get_args(WeightDtype), "own"),
        help="data type of the tensors; own: that of the trained weights (default: the run's)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write there (default: weights/ of the run)"
    )
    parser.add_argument("--force", action="store_true", help="replace files that exist")

    def run(options: argparse.Namespace) -> int:
        from onewan.cli.requests import is_running, send_request

        given = options.format or options.dtype or options.out or options.force
        if options.step is None and not given and is_running(options.run):
            return send_request(options.run, "export")

        from onewan.cli.exporting import export

        return export(
            options.run,
            step=options.step,
            formats=options.format,
            dtype=options.dtype,
            out=options.out,
            force=options.force,
        )

    parser.set_defaults(command=run)


def _add_sample_now(commands: Commands) -> None:
    parser = add_command(
        commands,
        "sample-now",
        "let a running trainer generate its sample videos now, or one of another prompt",
        "Takes effect after\nthe current step. With --prompt the video is made once, beside those "
        "of sample.prompts;\nwhat is not given is as in the run's sample section.\n\n"
        '  onewan sample-now mira --prompt "a fox in snow" --seed 7',
    )
    add_run(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="what the video shows")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what the video must not show")
    for option, text in (
        ("--seed", "seed of the noise"),
        ("--width", "pixels"),
        ("--height", "pixels"),
        ("--frames", "number of frames, 4n+1"),
        ("--steps", "denoising steps"),
    ):
        parser.add_argument(option, type=int, help=text)
    for option, text in (
        ("--image", "the first frame (not for T2V-A14B)"),
        ("--last-image", "the last frame (not for T2V-A14B)"),
        ("--control", "the control video (Fun-Control)"),
        ("--reference", "the reference image (Fun-Control)"),
    ):
        parser.add_argument(option, type=Path, metavar="FILE", help=text)

    def run(options: argparse.Namespace) -> int:
        from onewan.cli.requests import order_sample, send_request

        given = {k: v for k, v in vars(options).items() if k not in ("run", "command")}
        wanted = {name: value for name, value in given.items() if value is not None}
        if not wanted:
            return send_request(options.run, "sample")
        if "prompt" not in wanted:
            parser.error("what is given belongs to a video of a prompt; add --prompt")
        return order_sample(options.run, wanted)

    parser.set_defaults(command=run)


def _add_set(commands: Commands) -> None:
    parser = add_command(
        commands,
        "set",
        "change settings of a running trainer, such as the learning rate",
        "Takes effect after\nthe current step. The run records the change and its step, so that it "
        "stays exactly\nreproducible; the manual lists the settings that can change "
        "(docs/run-folder.md).\n\n"
        "  onewan set mira optimizer.lr=5e-5",
    )
    add_run(parser)
    parser.add_argument(
        "changes",
        metavar="KEY=VALUE",
        nargs="+",
        help="a setting and its new value, such as train.save_every=100",
    )

    def run(options: argparse.Namespace) -> int:
        from onewan.cli.requests import order_settings

        return order_settings(options.run, options.changes)

    parser.set_defaults(command=run)
