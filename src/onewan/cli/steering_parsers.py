"""The options of the commands that steer a running trainer: stop, save, export,
sample-now and set."""

from __future__ import annotations

import argparse
from pathlib import Path

from onewan.cli.arguments import Commands, add_command


def add_requests(commands: Commands) -> None:
    _add_request(commands, "stop", "stop a running trainer after it has saved its state")
    _add_request(
        commands, "save", "let a running trainer save its state and export the weights now"
    )
    _add_request(commands, "export", "let a running trainer export the weights now")
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


def _add_request(commands: Commands, name: str, summary: str) -> None:
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
            return send_request(options.run, "sample-now")
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
