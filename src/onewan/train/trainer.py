"""`WanTrainer`: the one loop.

It knows steps, turns and when to save; what is trained, on which data and by which objective is
built by `WanModelSetup` and arrives as values. All that happens is told as events, to the run's
folder and to whoever listens; nothing here prints.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from onewan.adapters.lora import adapter_weights
from onewan.checkpoint.export import WanModelSaver
from onewan.checkpoint.store import StateStore
from onewan.config.load import changed_fields, dump_run
from onewan.config.migrate import migrate
from onewan.config.schema import RunConfig
from onewan.data.loader import Step
from onewan.errors import CheckpointError, Interrupted
from onewan.files import replacing
from onewan.formats.lora import LoraFormat, WanShape
from onewan.runs.control import Request, StopSignals, clear, pending
from onewan.runs.events import EventLog
from onewan.runs.layout import RunLayout
from onewan.sample.generate import WanModelSampler
from onewan.train.setup import DTYPES, Run, WanModelSetup, run_folder
from onewan.train.state import read_facts, versions
from onewan.train.step import StepMetrics, grid_loss, train_step
from onewan.variants import ExpertName

log = logging.getLogger(__name__)

Listener = Callable[[Mapping[str, Any]], None]


def _ignore(event: Mapping[str, Any]) -> None:
    del event


# Settings that change what a run writes, or where, but not a number that it computes.
_FREE_TO_CHANGE = (
    "sample",
    "output",
    "logging",
    "memory",
    "model.device",
    "video_data.sources",
    "video_data.cache",
    "video_data.cache_dir",
    "train.save_every",
    "train.keep_states",
    "train.grid_every",
)


class WanTrainer:
    """Trains one run: a fresh one, or with `resume` one that was cut off."""

    def __init__(
        self,
        config: RunConfig,
        *,
        run_file: str | None = None,
        listen: Listener = _ignore,
        resume: bool = False,
        allow_change: bool = False,
    ) -> None:
        """`config` is resolved (`load_run`). `run_file` is its text as given, kept in the run's
        folder. `listen` is told each event as it happens. `allow_change` lets a resumed run go on
        with settings or data that differ; it is then no longer the run that an uncut one would be.
        """
        self._config = config
        self._run_file = run_file
        self._listen = listen
        self._resume = resume
        self._allow_change = allow_change
        self._layout = RunLayout(run_folder(config))
        self._store = StateStore(self._layout, config.train.keep_states)
        self._signals = StopSignals()
        self._events: EventLog | None = None
        self._board: Any = None
        self._saved_step = 0
        self._levels: dict[str, list[float]] = {}

    def fit(self) -> None:
        """Train to the last step, or until the user asks to stop (Interrupted, after saving).

        OnewanError for everything that the user can mend; the last saved state stays in any case.
        """
        if self._layout.saved_steps() and not self._resume:
            raise CheckpointError(
                f"{self._layout.root}: already holds a run; go on with --resume, or choose another "
                "name (output.name=...)"
            )
        self._layout.create()
        if not self._layout.saved_steps():
            self._write_run_files()
        with ExitStack() as session:
            self._events = session.enter_context(EventLog(self._layout.events))
            session.callback(_log_to(self._layout))
            session.enter_context(self._signals)
            clear(self._layout, "stop")
            try:
                self._run()
            except Interrupted:
                self._tell("stopped", step=self._saved_step)
                raise
            except BaseException as error:
                log.error("the run failed", exc_info=error)
                self._tell("failed", error=str(error) or type(error).__name__)
                raise
            finally:
                if self._board is not None:
                    self._board.close()

    def _run(self) -> None:
        config = self._config
        self._tell("started", run=str(self._layout.root), steps=config.train.steps)
        run = WanModelSetup(config).build(self._encoding)
        self._tell(
            "data",
            clips=len(run.dataset.clips),
            encoded=run.dataset.encoded,
            report=run.dataset.report.lines(),
        )
        for warning in run.warnings:
            self._warn(warning)
        self._restore(run)
        if config.logging.tensorboard:
            self._board = _tensorboard(self._layout, run.state.step)
        self._before_first_step(run)
        for step in run.loader.steps(run.state.step, config.train.steps, run.schedule.turn):
            begin = time.perf_counter()
            metrics = train_step(run, step)
            run.state.step += 1
            self._after_step(run, step, metrics, time.perf_counter() - begin)
            self._stop_if_asked(run)
        self._tell("finished", step=run.state.step, run=str(self._layout.root))

    def _before_first_step(self, run: Run) -> None:
        self._stop_if_asked(run)
        if run.state.step == 0:
            if not run.state.first_grid:
                run.state.first_grid = self._measure_grid(run)
            if self._config.sample.at_start:
                self._sample(run)
            return
        # The run may have been cut off between saving this step and what comes after it.
        if self._save_due(run) and not all(p.exists() for _, _, p in self._weight_files(run)):
            self._export(run)
        if run.state.step == self._config.train.steps:
            self._measure_grid(run)
        if self._sample_due(run):
            self._sample(run)

    def _after_step(self, run: Run, step: Step, metrics: StepMetrics, seconds: float) -> None:
        done = run.state.step
        self._levels.setdefault(step.expert, []).extend(metrics.t)
        self._tell(
            "step",
            step=done,
            expert=step.expert,
            loss=metrics.loss,
            grad_norm=metrics.grad_norm,
            lr=metrics.lr,
            t=metrics.t,
            seconds=seconds,
        )
        if self._save_due(run) or self._asked("save"):
            self._save(run)
            self._export(run)
        every = self._config.train.grid_every
        if done == self._config.train.steps or (every and done % every == 0):
            self._measure_grid(run)
        if self._sample_due(run) or self._asked("sample"):
            self._sample(run)

    def _save_due(self, run: Run) -> bool:
        done = run.state.step
        return done == self._config.train.steps or done % self._config.train.save_every == 0

    def _sample_due(self, run: Run) -> bool:
        every, done = self._config.sample.every, run.state.step
        due = done == self._config.train.steps or bool(every and done % every == 0)
        return bool(run.samples) and due

    def _asked(self, request: Request) -> bool:
        if not pending(self._layout, request):
            return False
        clear(self._layout, request)
        return True

    def _measure_grid(self, run: Run) -> dict[str, float]:
        """Each expert's loss on the fixed grid; nothing if the run file turned it off."""
        if not self._config.train.grid_clips:
            return {}
        losses: dict[str, float] = {}
        for name in run.state.experts:
            losses[name] = grid_loss(run, name, partial(self._stop_if_asked, run))
            first = run.state.first_grid.get(name, losses[name])
            self._tell("grid", step=run.state.step, expert=name, loss=losses[name], first=first)
        return losses

    def _restore(self, run: Run) -> None:
        found = self._store.newest() if self._resume else None
        if found is None:
            return
        for damage in found.damaged:
            self._warn(f"passed over a damaged state: {damage}")
        facts = read_facts(found.folder)
        self._check_changes(run, facts)
        self._write_run_files()
        run.state.load(found.folder)
        self._saved_step = found.step
        self._tell("resumed", step=found.step, state=str(found.folder))
        if facts["versions"] != versions():
            self._warn(
                f"the state was saved with {facts['versions']}, and this is {versions()}; "
                "the same bits are not promised across versions"
            )

    def _check_changes(self, run: Run, facts: dict[str, Any]) -> None:
        """Refuse to go on with what would not be the same run, unless the user allows it."""
        then = RunConfig.model_validate(migrate(facts["config"]))
        steps_matter = self._config.train.schedule != "constant"
        changes = [
            f"{name}: was {old!r}, is {new!r}"
            for name, old, new in changed_fields(then, self._config)
            if not name.startswith(_FREE_TO_CHANGE) and (steps_matter or name != "train.steps")
        ]
        if facts["dataset"] != run.dataset.digest:
            changes.append("the data set: clips, captions or spans differ from those of the run")
        if not changes:
            return
        listed = "\n  ".join(changes)
        if not self._allow_change:
            raise CheckpointError(
                f"{self._layout.root}: resuming with changes would not be the same run; undo them, "
                f"start another run, or allow them with --allow-change\n  {listed}"
            )
        self._warn(f"resuming with changes, as allowed:\n  {listed}")

    def _save(self, run: Run) -> None:
        if run.state.step == self._saved_step:
            return
        facts = {
            "config": self._config.model_dump(mode="json"),
            "dataset": run.dataset.digest,
        }
        folder = self._store.save(run.state.step, lambda f: run.state.save(f, facts))
        self._saved_step = run.state.step
        self._tell("saved", step=run.state.step, state=str(folder))
        self._record_levels(run)

    def _weight_files(self, run: Run) -> list[tuple[ExpertName, LoraFormat, Path]]:
        """The files that the weights of this step go to: one for each expert and format."""
        formats, step = self._config.output.formats, run.state.step
        return [
            (name, fmt, self._layout.weights(step, trained.expert.file_suffix, named))
            for name, trained in run.state.experts.items()
            for fmt in formats
            for named in [fmt if len(formats) > 1 else None]
        ]

    def _export(self, run: Run) -> None:
        """Write each trained expert's adapter in each format that the run file names."""
        for name, fmt, path in self._weight_files(run):
            transformer = run.state.experts[name].transformer
            notices = WanModelSaver().save_lora(
                adapter_weights(transformer),
                path,
                format=fmt,
                dtype=DTYPES[self._config.output.dtype],
                peft_config=run.lora.peft_config().to_dict(),
                facts=self._facts(run, name),
                date=datetime.now(timezone.utc),
                title=f"{self._config.output.name} ({run.model.variant.title} LoRA)",
                resolution=max(clip.size for clip in run.dataset.clips),
                shape=WanShape.of_config(transformer.config),
            )
            for notice in notices:
                self._warn(f"{path.name}: {notice}")
            self._tell("exported", step=run.state.step, expert=name, file=str(path))

    def _facts(self, run: Run, name: ExpertName) -> dict[str, str | int | float]:
        """What a user may later want to know of an exported file."""
        trained = run.state.experts[name]
        return {
            "variant": run.model.variant.name,
            "expert": name,
            "base_model": _shareable(self._config.model.source_of(trained.expert.component)),
            "run": str(self._config.output.name),
            "steps": run.state.step,
            "expert_steps": run.schedule.steps_before(run.state.step, name),
            "clips": len(run.dataset.clips),
            "dataset_digest": run.dataset.digest,
            "seed": self._config.train.seed,
            "lr": self._config.optimizer.lr,
        }

    def _sample(self, run: Run) -> None:
        """Make the sample videos of this step that are not there yet.

        Whatever goes wrong in it, training goes on.
        """
        folder = self._layout.samples(run.state.step)
        sampler = WanModelSampler(run.model, run.device)
        for number, request in enumerate(run.samples):
            path = folder / f"{number}.{self._config.sample.format}"
            if path.exists():
                continue
            try:
                sampler.sample_to(
                    path,
                    request,
                    text=run.dataset.source.text,
                    on_step=partial(self._sampling, run, number),
                )
            except Interrupted:
                raise
            except Exception as error:  # hours of training must not end here
                log.exception("sampling failed")
                self._warn(f"sampling {request.prompt!r} failed: {error}")
                continue
            self._tell("sampled", step=run.state.step, file=str(path), prompt=request.prompt)

    def _sampling(self, run: Run, number: int, done: int, total: int) -> None:
        self._listen({"event": "sampling", "number": number, "done": done, "total": total})
        self._stop_if_asked(run)

    def _encoding(self, what: str, done: int, total: int) -> None:
        self._tell("encoding", what=what, done=done, total=total)
        if self._signals.requested or pending(self._layout, "stop"):
            raise Interrupted

    def _stop_if_asked(self, run: Run) -> None:
        if self._signals.requested or self._asked("stop"):
            self._save(run)
            raise Interrupted

    def _warn(self, text: str) -> None:
        log.warning(text)
        self._tell("warning", text=text)

    def _tell(self, event: str, **fields: Any) -> None:
        """Write an event into the run's folder, draw it into the curves, tell the listener."""
        assert self._events is not None
        self._events.write(event, **fields)
        self._listen({"event": event, **fields})
        if self._board is None:
            return
        expert, step = fields.get("expert"), fields.get("step")
        if event == "step":
            for name in ("loss", "grad_norm", "lr"):
                self._board.add_scalar(f"{name}/{expert}", fields[name], step)
        elif event == "grid":
            self._board.add_scalar(f"grid_loss/{expert}", fields["loss"], step)

    def _record_levels(self, run: Run) -> None:
        """A histogram of the noise levels that each expert trained on since the last one."""
        for name, levels in self._levels.items():
            if self._board is not None and levels:
                self._board.add_histogram(f"t/{name}", torch.tensor(levels), run.state.step)
        self._levels.clear()

    def _write_run_files(self) -> None:
        texts = {self._layout.resolved: dump_run(self._config)}
        if self._run_file is not None:
            texts[self._layout.run_file] = self._run_file
        elif not self._layout.run_file.exists():
            texts[self._layout.run_file] = texts[self._layout.resolved]
        for path, text in texts.items():
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")


def _shareable(model: str) -> str:
    """The name of a base model for files that are passed on: of a local folder, its name alone."""
    return Path(model).name if Path(model).exists() else model


def _tensorboard(layout: RunLayout, step: int) -> Any:
    # Imported here: it costs a second, and a run may do without.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(layout.tensorboard), purge_step=step + 1 if step else None)


def _log_to(layout: RunLayout) -> Callable[[], None]:
    """Append onewan's log to the run's log.txt until the returned function is called."""
    handler = logging.FileHandler(layout.log, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("onewan")
    logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)

    def close() -> None:
        logger.removeHandler(handler)
        handler.close()

    return close
