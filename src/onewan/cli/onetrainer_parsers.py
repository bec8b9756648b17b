"""The options of the commands around OneTrainer: onetrainer, import-config."""

from __future__ import annotations

import argparse
from pathlib import Path

from onewan.cli.arguments import VARIANT_NAMES, Commands, add_command

_ONETRAINER_DETAILS = """Adds new files to the checkout and changes none of its own.

  check      whether this OneTrainer has everything the add-on needs, and no Wan 2.2 itself
  install    install the add-on, or update it
  status     what is installed, and whether it still works, for example after a git pull; has
             OneTrainer's interpreter import what the add-on imports
  uninstall  remove the files that were installed
  export     write the weights in a backup of a Wan 2.2 run, one file for each expert

check and status exit with 1 if they find a problem, uninstall if it kept a file that was changed.
OneTrainer's own environment needs onewan too: its python -m pip install onewan

  onewan onetrainer install ~/OneTrainer
  onewan onetrainer export ~/OneTrainer/workspace/run/backup/2026-... fox.safetensors"""


def add_onetrainer(commands: Commands) -> None:
    parser = add_command(
        commands,
        "onetrainer",
        "add Wan 2.2 to a OneTrainer checkout",
        _ONETRAINER_DETAILS,
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
        "--force",
        action="store_true",
        help="also overwrite or remove installed files that were changed since",
    )

    def run(options: argparse.Namespace) -> int:
        # argparse has no optional positional argument for one choice only, hence the checks below.
        if options.action == "export":
            from onewan.cli.onetrainer import export

            return export(options.path, options.destination, options.to, force=options.force)
        if options.destination is not None or options.to is not None:
            parser.error(f"{options.action} takes one path, a OneTrainer checkout, and no --to")
        from onewan.cli.onetrainer import run as run_action

        return run_action(options.action, options.path, force=options.force)

    parser.set_defaults(command=run)


def add_import_config(commands: Commands) -> None:
    parser = add_command(
        commands,
        "import-config",
        "turn a OneTrainer config into a run file",
        """Writes the run file to stdout
(or --output), and a report on every key to stderr: which were imported, and which were not and
why. `onewan train CONFIG.json` imports it in the same way.

  onewan import-config ~/OneTrainer/workspace/config.json > run.yaml""",
    )
    parser.add_argument("config", metavar="CONFIG.json", type=Path)
    parser.add_argument(
        "--variant",
        choices=VARIANT_NAMES,
        help="which Wan 2.2 model, if it can't be inferred from the base model",
    )
    parser.add_argument(
        "--root",
        metavar="PATH",
        type=Path,
        help="OneTrainer's folder, which relative paths start from",
    )
    parser.add_argument("--output", "-o", metavar="RUN.yaml", type=Path)
    parser.add_argument(
        "--account",
        choices=("short", "full", "json"),
        default="short",
        help="which keys to report: those in the config (short), all (full), all as JSON (json)",
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
