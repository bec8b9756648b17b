"""The options of the commands report and compare."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from onewan.arithmetic.byte_sizes import parse_bytes
from onewan.cli.arguments import Commands, add_command

if TYPE_CHECKING:
    from onewan.report.videos import VideoChoice


def add_report(commands: Commands) -> None:
    parser = add_command(
        commands,
        "report",
        "write a page about a run: losses, samples, speed, memory, clips and settings",
        "The page is one\nHTML file that needs no network. `onewan train` writes it when a run "
        "ends; this command also\nwrites that of a run that is running or was killed.\n\n"
        "  onewan report runs/dog",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of the run")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="the page (default: report.html in that folder)"
    )
    _add_videos(parser)

    def run(options: argparse.Namespace) -> int:
        from onewan.cli.report import report

        return report(options.run, options.out, _choice(options))

    parser.set_defaults(command=run)


def add_compare(commands: Commands) -> None:
    parser = add_command(
        commands,
        "compare",
        "write a page that shows runs side by side: results, settings, curves and samples",
        "The page\nis one HTML file that needs no network.\n\n"
        "  onewan compare runs/dog runs/dog-2 --out dogs.html",
    )
    parser.add_argument(
        "runs", metavar="RUN", type=Path, nargs="+", help="the folders of two runs or more"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        default=Path("comparison.html"),
        help="the page (default: %(default)s)",
    )
    _add_videos(parser)

    def run(options: argparse.Namespace) -> int:
        if len(options.runs) < 2:
            parser.error("name two runs or more; `onewan report RUN` is about one")

        from onewan.cli.report import compare

        return compare(options.runs, options.out, _choice(options))

    parser.set_defaults(command=run)


def _add_videos(parser: argparse.ArgumentParser) -> None:
    def amount(value: str) -> int | None:
        if value == "all":
            return None
        try:
            return parse_bytes(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{error}, or all") from None

    videos = parser.add_mutually_exclusive_group()
    videos.add_argument(
        "--embed",
        metavar="AMOUNT",
        type=amount,
        default=20_000_000,
        help="how much video the page itself holds, such as 100MB, or all (default: 20MB); it has "
        "links to the other files",
    )
    videos.add_argument(
        "--link", action="store_true", help="hold no video: the page has links to the files"
    )


def _choice(options: argparse.Namespace) -> VideoChoice:
    # Here, so that `onewan --help` does not wait for what videos are read with.
    from onewan.report.videos import VideoChoice

    return VideoChoice(most_bytes=0 if options.link else options.embed)
