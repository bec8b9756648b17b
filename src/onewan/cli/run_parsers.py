"""The options of the commands doctor, cache, plan, train and runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from onewan.arithmetic.byte_sizes import parse_bytes
from onewan.cli.arguments import Commands, add_command, add_run_file


def add_memory_option(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    """An option for an amount of memory; its value is in bytes."""

    def amount(value: str) -> int:
        try:
            return parse_bytes(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    parser.add_argument(name, type=amount, metavar="AMOUNT", help=text)


def _count(value: str) -> int:
    """The number of an option, at least 1."""
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"is {value!r}, and should be a number from 1 on")
    return int(value)


def add_doctor(commands: Commands) -> None:
    parser = add_command(
        commands,
        "doctor",
        "check this machine, and the clips and captions of a run, before anything is trained",
        "With a run file, every clip is decoded as it will be trained: what is taken of each\n"
        "file, what can't be used and why, captions, duplicates, black and frozen clips, disk and\n"
        "memory. No model is loaded. The exit status is 1 if there is a problem, 0 if there are\n"
        "only notes.\n\n"
        "  onewan doctor dog.yaml --html dog.html",
    )
    parser.add_argument(
        "run",
        metavar="RUN.yaml",
        nargs="?",
        type=Path,
        help="a run file; without one, only the machine is checked",
    )
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="override a setting, such as video_data.resolution=720p",
    )
    parser.add_argument("--json", action="store_true", help="print the diagnosis as JSON")
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write a page that shows and plays the clips as they will be trained",
    )
    parser.add_argument(
        "--fix",
        action="store_true",
        help="offer to write captions in another encoding as UTF-8, with a backup of each",
    )
    parser.add_argument("--yes", action="store_true", help="with --fix: do not ask")

    def run(options: argparse.Namespace) -> int:
        if options.run is None and (options.html or options.fix):
            parser.error("--html and --fix are about clips: name a run file")
        if options.yes and not options.fix:
            parser.error("--yes belongs to --fix")

        from onewan.cli.doctor import doctor

        return doctor(
            options.run,
            options.overrides,
            as_json=options.json,
            html=options.html,
            fix=options.fix,
            yes=options.yes,
        )

    parser.set_defaults(command=run)


def add_cache(commands: Commands) -> None:
    parser = add_command(
        commands,
        "cache",
        "check the clips and encode them once, before training",
        "Reports every file that\ncan't be used. `onewan train` encodes whatever is still missing. "
        "Several processes,\nalso those that torchrun starts, share the work.",
    )
    add_run_file(parser)
    parser.add_argument(
        "--strict", action="store_true", help="exit with status 1 if any file can't be used"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read all cache entries and re-encode damaged ones"
    )
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    parser.add_argument(
        "--stats", action="store_true", help="show what the cache holds, and encode nothing"
    )
    parser.add_argument(
        "--prune",
        action="store_true",
        help="delete what the run file, and others that are named after it, do not need",
    )
    parser.add_argument("--yes", action="store_true", help="with --prune: do not ask")

    def run(options: argparse.Namespace) -> int:
        if options.yes and not options.prune:
            parser.error("--yes belongs to --prune")
        if options.stats or options.prune:
            others = options.strict or options.verify or options.json
            if others or (options.stats and options.prune):
                parser.error("--stats and --prune are given alone")
            # What is no PATH=VALUE is a further run file.
            more = [Path(text) for text in options.overrides if "=" not in text]
            overrides = [text for text in options.overrides if "=" in text]
            runs = [options.run, *more]
            from onewan.cli.cache_use import prune_cache, show_stats

            if options.stats:
                return show_stats(runs, overrides)
            return prune_cache(runs, overrides, yes=options.yes)

        from onewan.cli.commands import cache

        return cache(
            options.run,
            options.overrides,
            strict=options.strict,
            verify=options.verify,
            as_json=options.json,
        )

    parser.set_defaults(command=run)


def _add_start(parser: argparse.ArgumentParser) -> None:
    """Whether a run is started, continued or repeated."""
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        action="store_const",
        const=True,
        default=False,
        help="continue from the last saved state of the run",
    )
    # An option of its own: with an optional value, `--resume run.yaml` would take the run file.
    start.add_argument(
        "--resume=auto",
        action="store_const",
        const="auto",
        dest="resume",
        help="continue like --resume, or start the run if it has no saved state yet: one command "
        "for machines that may be taken away at any time",
    )
    start.add_argument(
        "--again",
        action="store_true",
        help="with the folder of a run: repeat it from the start with the same settings, as a new "
        "run beside it",
    )
    parser.add_argument(
        "--allow-change",
        action="store_true",
        help="when resuming: continue although settings or clips have changed",
    )


def add_train(commands: Commands) -> None:
    parser = add_command(
        commands,
        "train",
        "train with the settings of a run file",
        "Ctrl-C saves the state and stops; --resume continues\nfrom there, with the same results "
        "as an uninterrupted run. The folder of a run, runs/NAME,\nkeeps the settings that were "
        "given on the command line.",
    )
    add_run_file(parser)
    _add_start(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything but the weights, and print what the run would do: steps, clips of "
        "each expert, memory, time and disk; nothing is downloaded or written",
    )
    parser.add_argument("--json", action="store_true", help="with --dry-run: print it as JSON")

    def run(options: argparse.Namespace) -> int:
        if options.resume and "auto" in (str(options.run), *options.overrides):
            parser.error("write --resume=auto, with an equals sign")
        if options.json and not options.dry_run:
            parser.error("--json belongs to --dry-run")

        from onewan.cli.commands import train

        return train(
            options.run,
            options.overrides,
            resume=options.resume,
            again=options.again,
            allow_change=options.allow_change,
            rehearse=options.dry_run,
            as_json=options.json,
        )

    parser.set_defaults(command=run)


def add_plan(commands: Commands) -> None:
    parser = add_command(
        commands,
        "plan",
        "print the memory and time that a run needs, and the settings that fit",
        "Reads the run file\nand the headers of clips and weights, and loads nothing. The exit "
        "status is 1 if the run\ndoes not fit.",
    )
    add_run_file(parser)
    add_memory_option(
        parser, "--vram", "device memory, such as 24GB (default: that of this machine)"
    )
    add_memory_option(parser, "--ram", "host memory, such as 64GB (default: that of this machine)")
    parser.add_argument(
        "--gpus",
        type=_count,
        default=1,
        metavar="N",
        help="what N processes give that torchrun starts on one machine, each with such a device",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")

    def run(options: argparse.Namespace) -> int:
        from onewan.cli.plan import plan

        return plan(
            options.run,
            options.overrides,
            vram=options.vram,
            ram=options.ram,
            gpus=options.gpus,
            as_json=options.json,
        )

    parser.set_defaults(command=run)


def add_runs(commands: Commands) -> None:
    parser = add_command(
        commands,
        "runs",
        "list the runs of a folder: what they train, and where they stand",
        "The run\nthat was active last comes first.",
    )
    parser.add_argument(
        "folder",
        metavar="DIR",
        nargs="?",
        type=Path,
        default=Path("runs"),
        help="a folder of runs (default: runs)",
    )
    parser.add_argument("--json", action="store_true", help="print the runs as JSON")

    def run(options: argparse.Namespace) -> int:
        from onewan.cli.runs import list_runs

        return list_runs(options.folder, as_json=options.json)

    parser.set_defaults(command=run)
