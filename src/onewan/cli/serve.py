"""The command serve."""

from __future__ import annotations

import argparse
from pathlib import Path

from onewan.cli.arguments import Commands, add_command
from onewan.cli.output import say
from onewan.errors import OnewanError


def add_serve(commands: Commands) -> None:
    parser = add_command(
        commands,
        "serve",
        "open a page in the browser to set up, watch and steer runs",
        "It needs the extra\n\"web\" (pip install 'onewan[web]'). Runs go on when it ends, and "
        "those started in a terminal\nare on it too.\n\n  onewan serve runs --data clips",
    )
    _add_options(parser)

    def run(options: argparse.Namespace) -> int:
        try:
            from onewan.serving.server import ServeOptions, serve
            from onewan.web.application import application
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("onewan"):
                raise
            raise OnewanError(
                f"onewan serve needs the package {error.name}; install it with: "
                "pip install 'onewan[web]'"
            ) from None

        serve(
            ServeOptions(
                runs=options.runs,
                data=tuple(options.data),
                host=options.host,
                port=options.port,
                names=tuple(options.names),
                token=options.token or options.new_token,
                new_token=options.new_token,
            ),
            application,
            say,
        )
        return 0

    parser.set_defaults(command=run)


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "runs",
        metavar="RUNS_DIR",
        nargs="?",
        type=Path,
        default=Path("runs"),
        help="the folder of runs (default: runs)",
    )
    add(
        "--data",
        metavar="FOLDER",
        type=Path,
        action="append",
        default=[],
        help="a folder of clips or models that the page may read, and whose captions it may edit; "
        "can be repeated (default: the current folder)",
    )
    add(
        "--host",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="where to listen; others than this machine need the token of the link that is printed "
        "(default: %(default)s, for this machine alone)",
    )
    add(
        "--port",
        type=_port,
        help="port (default: 8320, or a free one if that is in use)",
    )
    add(
        "--name",
        dest="names",
        metavar="HOST",
        action="append",
        default=[],
        help="another name by which browsers reach this machine, such as that of a proxy; can be "
        "repeated",
    )
    add("--token", action="store_true", help="ask for a token on this machine too")
    add("--new-token", action="store_true", help="make a new token; the old one is void")


def _port(text: str) -> int:
    if text.isdecimal() and int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text}: is no port; give a number from 0 to 65535")
