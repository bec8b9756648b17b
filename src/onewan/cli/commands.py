"""The commands demo, cache and train; imported only when one of them runs.

Importing torch, diffusers and transformers takes seconds, so each command first reads its run file
and reports mistakes in it without that wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onewan.cli.heavy_imports import heavy_imports
from onewan.cli.importing import run_file_of
from onewan.cli.output import complain, say, write_json
from onewan.cli.progress import Progress
from onewan.config.load import load_run
from onewan.documents import decode_text
from onewan.errors import ConfigError
from onewan.report.page import reporting
from onewan.runs.events import Note
from onewan.runs.layout import displayed
from onewan.variants import VariantName

if TYPE_CHECKING:
    from onewan.train.dry_run import DryRun
    from onewan.train.resume import Resume


def demo(folder: Path, variant: VariantName, *, prepare: bool) -> int:
    with heavy_imports():
        from onewan.demo import prepare_demo, run_demo

    if prepare:
        prepare_demo(folder, variant, say)
        return 0
    with Progress() as progress:
        run_demo(folder, variant, progress.listen, progress.line)
    return 0


def cache(run: Path, overrides: Sequence[str], *, strict: bool, verify: bool, as_json: bool) -> int:
    config = load_run(run_file_of(run), overrides)
    if not config.video_data.cache:
        raise ConfigError(
            str(run), ["video_data.cache: is false, so nothing is cached; set it to true"]
        )
    with heavy_imports():
        from onewan.devices import resolve_device
        from onewan.parallel.ranks import join
        from onewan.train.run import sample_requests
        from onewan.train.setup import WanModelSetup

    timeout, device = 60 * config.parallel.timeout_minutes, resolve_device(config.model.device)
    with join(device, timeout) as ranks, Progress() as progress:

        def advance(what: str, done: int, total: int) -> None:
            if ranks.is_first and not as_json:
                progress.advance(what, done, total, unit="item")

        # The prompts of sample videos are encoded too: training then needs no text encoder.
        samples = sample_requests(config)
        data = WanModelSetup(config, ranks=ranks).dataset(samples, advance, verify=verify)
    problems = data.report.problems
    if not ranks.is_first:  # which says everything
        return 1 if strict and problems else 0
    if as_json:
        write_json(
            {
                "cache": str(config.video_data.cache_dir),
                "clips": len(data.clips),
                "validation_clips": len(data.validation_clips),
                "encoded": data.encoded,
                "problems": [str(problem) for problem in problems],
                "report": data.report.lines(),
            }
        )
        return 1 if strict and problems else 0
    # After the display is closed: unusable files are listed below its bar, not between updates.
    for line in data.report.lines():
        progress.line(line)
    folder = displayed(config.video_data.cache_dir)
    progress.line(f"cache {folder}: {data.encoded} entries encoded now")
    if strict and problems:
        complain(f"onewan: {len(problems)} files can't be used (an error with --strict)")
        return 1
    return 0


def train(
    run: Path,
    overrides: Sequence[str],
    *,
    resume: Resume,
    again: bool,
    allow_change: bool,
    rehearse: bool,
    as_json: bool,
) -> int:
    if again and not run.is_dir():
        raise ConfigError(
            str(run), ["is not a folder; --again takes the folder of a run, such as runs/NAME"]
        )
    run = run_file_of(run)
    config = load_run(run, overrides)
    with heavy_imports():
        from onewan.train.run import with_unused_name
        from onewan.train.trainer import WanTrainer

    # The first run stays as it is, so that the two can be compared.
    if again:
        config = with_unused_name(config)
    if rehearse:
        from onewan.train.dry_run import dry_run

        found = dry_run(config, resume=resume, overrides=overrides)
        return _show_dry_run(run, found, as_json=as_json)
    with Progress() as progress, reporting(progress.listen, progress.line) as listen:
        WanTrainer(
            config,
            # Python writes line breaks as the system has them, and would double those of Windows.
            run_file=decode_text(run.read_bytes()).replace("\r\n", "\n") if run.is_file() else None,
            listen=listen,
            resume=resume,
            allow_change=allow_change,
            overrides=overrides,
        ).fit()
    return 0


def _show_dry_run(run: Path, found: DryRun, *, as_json: bool) -> int:
    """Print what the run would do; returns 1 if it can't be started."""
    if as_json:
        write_json(found.as_data())
        return 1 if found.problems else 0
    with Progress() as progress:
        for event in (*found.events(), *(Note(text=note) for note in found.notes)):
            progress.listen(event)
    if found.problems:
        raise ConfigError(str(run), found.problems)
    say("dry run: nothing was loaded or written, and no problem was found")
    return 0
