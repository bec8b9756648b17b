"""What the commands do; imported when one runs, since it brings torch with it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import diffusers
import transformers

from onewan.cli.progress import Progress
from onewan.config.load import load_run
from onewan.demo import run_demo
from onewan.errors import ConfigError
from onewan.sample.generate import requests_from
from onewan.train.setup import WanModelSetup
from onewan.train.trainer import WanTrainer
from onewan.variants import VariantName

# Their own bars and notices about loading would run into ours.
for _logging in (diffusers.utils.logging, transformers.utils.logging):
    _logging.set_verbosity_error()
    _logging.disable_progress_bar()


def demo(folder: Path, variant: VariantName) -> int:
    progress = Progress()
    try:
        run_demo(folder, variant, progress.listen, progress.line)
    finally:
        progress.close()
    return 0


def cache(run: Path, overrides: Sequence[str], strict: bool, verify: bool) -> int:
    config = load_run(run, overrides)
    if not config.video_data.cache:
        raise ConfigError(
            str(run), ["video_data.cache: is false, so there is nothing to do; set it to true"]
        )
    progress = Progress()
    try:
        data = WanModelSetup(config).dataset(
            requests_from(config),
            lambda what, done, total: progress.listen(
                {"event": "encoding", "what": what, "done": done, "total": total}
            ),
            verify=verify,
        )
    finally:
        progress.close()
    for line in data.report.lines():
        progress.line(line)
    progress.line(f"cache {config.video_data.cache_dir}: {data.encoded} entries encoded now")
    if strict and data.report.problems:
        count = len(data.report.problems)
        print(f"onewan: {count} files can't be used, and --strict was asked for", file=sys.stderr)
        return 1
    return 0


def train(run: Path, overrides: Sequence[str], resume: bool, allow_change: bool) -> int:
    config = load_run(run, overrides)
    progress = Progress()
    trainer = WanTrainer(
        config,
        run_file=run.read_text(encoding="utf-8-sig") if run.is_file() else None,
        listen=progress.listen,
        resume=resume,
        allow_change=allow_change,
    )
    try:
        trainer.fit()
    finally:
        progress.close()
    return 0
