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
from functools import partial
from typing import Any

import torch

from onewan.checkpoint.store import StateStore
from onewan.config.load import changed_fields, dump_run
from onewan.config.schema import ResolvedRun
from onewan.data.loader import StepBatches
from onewan.errors import CheckpointError, Interrupted
from onewan.files import remove, remove_abandoned, replacing
from onewan.runs.control import Request, StopSignals, clear, pending
from onewan.runs.events import EventLog
from onewan.runs.layout import RunLayout
from onewan.sample.generate import WanModelSampler
from onewan.train.export import ExportedFile, exported_files
from onewan.train.run import Run, run_folder
from onewan.train.setup import WanModelSetup
from onewan.train.state import WeightSet, read_facts, versions
from onewan.train.step import StepMetrics, train_step
from onewan.train.validation import validation_loss

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
    "train.save_every_minutes",
    "train.keep",
    "validation",
)


class WanTrainer:
    """Trains one run: a fresh one, or with `resume` one that was cut off."""

    def __init__(
        self,
        config: ResolvedRun,
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
        self._store = StateStore(self._layout, config.train.keep_last, config.train.keep_every)
        self._signals = StopSignals()
        self._events: EventLog | None = None
        self._board: Any = None
        self._saved_step = 0
        self._saved_at = time.monotonic()
        self._levels: dict[str, list[float]] = {}
        self._noticed: set[str] = set()

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
        remove_abandoned(self._layout.weights_dir)
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
        try:
            self._before_first_step(run)
            for step in run.loader.steps(run.state.step, config.train.steps, run.schedule.turn):
                begin = time.perf_counter()
                metrics = train_step(run, step)
                run.state.step += 1
                self._after_step(run, step, metrics, time.perf_counter() - begin)
                self._stop_if_asked()
        except Interrupted:
            # Here and not where it was noticed: validation and samples may have had other weights
            # (averages, the base model's) in place of those that train.
            self._save(run)
            raise
        self._tell("finished", step=run.state.step, run=str(self._layout.root))

    def _before_first_step(self, run: Run) -> None:
        self._stop_if_asked()
        if run.state.step == 0:
            if run.state.validated is None:
                self._validate(run)
            if self._config.sample.at_start:
                self._sample(run)
            return
        # The run may have been cut off between saving this step and what comes after it.
        unmeasured = self._validation_due(run) and run.state.validated != run.state.step
        best = unmeasured and self._validate(run)
        missing = not all(file.path.exists() for file in self._files(run))
        if missing and (best or self._save_due(run)):
            self._export(run)
        if self._sample_due(run):
            self._sample(run)

    def _after_step(
        self, run: Run, step: StepBatches, metrics: StepMetrics, seconds: float
    ) -> None:
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
        best = self._validation_due(run) and self._validate(run)
        asked = self._asked("save")
        if best or asked or self._save_due(run):
            self._save(run)
            self._export(run)
        elif self._minutes_are_over():
            self._save(run)
        if self._sample_due(run) or self._asked("sample"):
            self._sample(run)

    def _save_due(self, run: Run) -> bool:
        done = run.state.step
        return done == self._config.train.steps or done % self._config.train.save_every == 0

    def _minutes_are_over(self) -> bool:
        minutes = self._config.train.save_every_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def _validation_due(self, run: Run) -> bool:
        every, done = self._config.validation.every, run.state.step
        return done == self._config.train.steps or bool(every and done % every == 0)

    def _sample_due(self, run: Run) -> bool:
        every, done = self._config.sample.every, run.state.step
        due = done == self._config.train.steps or bool(every and done % every == 0)
        return bool(run.samples) and due

    def _asked(self, request: Request) -> bool:
        if not pending(self._layout, request):
            return False
        clear(self._layout, request)
        return True

    def _validate(self, run: Run) -> bool:
        """Each expert's loss on the fixed clips, of all kinds of weights that it has; whether it is
        the best so far, and its state to be kept for that."""
        state, step = run.state, run.state.step
        if not self._config.validation.clips:
            return False
        measured: list[float] = []
        for name, trained in state.experts.items():
            measure = partial(validation_loss, run, name, between=self._stop_if_asked)
            losses = {kind: measure(kind) for kind in self._kinds(run)}
            if name not in state.base_loss and step == 0:
                as_base = trained.method is None or trained.method.starts_as_base
                state.base_loss[name] = losses["trained"] if as_base else measure(None)
            measured.append(losses["trained"])
            self._tell(
                "validation",
                step=step,
                expert=name,
                loss=losses["trained"],
                ema=losses.get("ema"),
                base=state.base_loss.get(name),
                held_out=bool(run.dataset.validation_clips),
            )
        state.validated = step
        loss = sum(measured) / len(measured)
        if step == 0 or not self._config.train.keep_best:
            return False
        if state.best is not None and loss >= state.best["loss"]:
            return False
        state.best = {"step": step, "loss": loss}
        self._tell("best", step=step, loss=loss)
        return True

    @staticmethod
    def _kinds(run: Run) -> tuple[WeightSet, ...]:
        averaged = any(trainable.ema is not None for trainable in run.state.trainables)
        return ("trained", "ema") if averaged else ("trained",)

    def _restore(self, run: Run) -> None:
        found = self._store.newest() if self._resume else None
        if found is None:
            return
        for damage in found.damaged:
            self._warn(f"passed over a damaged state: {damage}")
        facts = read_facts(found.folder)
        comparable = self._check_changes(run, facts)
        for line in run.state.load(found.folder, allow_change=self._allow_change):
            self._warn(line)
        self._write_run_files()
        if not comparable:
            run.state.base_loss, run.state.best = {}, None
            self._warn(
                "validation losses are measured anew and can't be compared with earlier ones"
            )
        self._saved_step = found.step
        self._tell("resumed", step=found.step, state=str(found.folder))
        if facts["versions"] != versions():
            self._warn(
                f"the state was saved with {facts['versions']}, and this is {versions()}; "
                "the same bits are not promised across versions"
            )

    def _check_changes(self, run: Run, facts: dict[str, Any]) -> bool:
        """List what changed since the state was saved, and refuse what would not be the same run,
        unless the user allows it. Returns whether validation losses still mean the same."""
        then = ResolvedRun.model_validate(facts["config"])
        fields = changed_fields(then, self._config)
        steps_matter = (
            self._config.train.schedule.kind != "constant" or self._config.train.cooldown_steps
        )
        exact: list[str] = []
        others: list[str] = []
        for name, old, new in fields:
            free = name.startswith(_FREE_TO_CHANGE) or (name == "train.steps" and not steps_matter)
            (exact if free else others).append(f"{name}: was {old!r}, is {new!r}")
        if facts["dataset"] != run.dataset.digest:
            others.append("the data set: clips, captions or spans differ from those of the run")
        if others and not self._allow_change:
            listed = "\n  ".join(others)
            raise CheckpointError(
                f"{self._layout.root}: resuming with changes would not be the same run; undo them, "
                f"start another run, or allow them with --allow-change\n  {listed}"
            )
        if others:
            self._warn("resuming with changes, as allowed:\n  " + "\n  ".join(others))
        if exact:
            self._note(
                "resuming with changes that leave the numbers alone:\n  " + "\n  ".join(exact)
            )
        measured_by = ("validation.clips", "validation.timesteps")
        measured_alike = not any(name in measured_by for name, *_ in fields)
        return measured_alike and not others

    def _save(self, run: Run) -> None:
        if run.state.step == self._saved_step:
            return
        facts = {
            "config": self._config.model_dump(mode="json"),
            "dataset": run.dataset.digest,
        }
        folder = self._store.save(
            run.state.step, lambda f: run.state.save(f, facts), run.state.best_step
        )
        self._saved_step, self._saved_at = run.state.step, time.monotonic()
        self._tell("saved", step=run.state.step, state=str(folder))
        self._record_levels(run)

    def _files(self, run: Run) -> list[ExportedFile]:
        return list(exported_files(run, self._layout))

    def _export(self, run: Run) -> None:
        """Write what training made, in each format that the run file names."""
        for file in self._files(run):
            for notice in file.write():
                if notice not in self._noticed:  # it is the same for the files of later steps
                    self._noticed.add(notice)
                    self._warn(f"{file.path.name}: {notice}")
            self._tell("exported", step=run.state.step, expert=file.trainable, file=str(file.path))
        exported = self._layout.exported()
        for step in list(exported)[: -(self._config.output.keep_last or len(exported))]:
            if step != run.state.best_step:
                for path in exported[step]:
                    remove(path)

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
                with ExitStack() as weights:
                    for trainable in run.state.trainables:
                        weights.enter_context(trainable.using("trained"))
                    sampler.sample_to(
                        path,
                        request,
                        # Placeholders' embeddings change as they train, so nothing is kept of them.
                        text=None if self._config.embeddings else run.dataset.source.text,
                        on_step=partial(self._sampling, number),
                    )
            except Interrupted:
                raise
            except Exception as error:  # hours of training must not end here
                log.exception("sampling failed")
                self._warn(f"sampling {request.prompt!r} failed: {error}")
                continue
            self._tell("sampled", step=run.state.step, file=str(path), prompt=request.prompt)

    def _sampling(self, number: int, done: int, total: int) -> None:
        self._listen({"event": "sampling", "number": number, "done": done, "total": total})
        self._stop_if_asked()

    def _encoding(self, what: str, done: int, total: int) -> None:
        self._tell("encoding", what=what, done=done, total=total)
        if self._signals.requested or pending(self._layout, "stop"):
            raise Interrupted

    def _stop_if_asked(self) -> None:
        if self._signals.requested or self._asked("stop"):
            raise Interrupted

    def _note(self, text: str) -> None:
        log.info(text)
        self._tell("note", text=text)

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
        elif event == "validation":
            for name in ("loss", "ema", "base"):
                if fields[name] is not None:
                    self._board.add_scalar(f"validation_{name}/{expert}", fields[name], step)

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
