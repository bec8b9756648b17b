"""`WanTrainer`: the training loop of a run, from its first or its last saved step to the end.

`WanModelSetup` builds model, data and objective; `train_step` computes one step; `Cadence` decides
when to validate, save, export and sample. This module emits an event (`onewan.runs.log`) for
everything that happens, and never prints.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import cast

from onewan.arithmetic.byte_sizes import parse_bytes
from onewan.config.changes import in_force
from onewan.config.load import dump_run
from onewan.config.resolve import expert_schedule_of
from onewan.config.schema import ResolvedRun
from onewan.data.clip import count_clips
from onewan.data.clip_list import write_clip_list
from onewan.devices import resolve_device
from onewan.dtypes import torch_dtype
from onewan.errors import CheckpointError, DataError, Interrupted, OnewanError
from onewan.files import remove_abandoned, replacing
from onewan.locks import locked, remove_abandoned_locks
from onewan.memory.device import limit_memory, matrix_product_rate
from onewan.memory.plan import full_disks
from onewan.parallel.ranks import Alone, Ranks, join
from onewan.runs import events
from onewan.runs.control import REQUESTS, Request, StopSignals, clear, pending, take, unknown
from onewan.runs.event_file import EventFile, HeartbeatThread
from onewan.runs.layout import RunLayout
from onewan.runs.log import FileSink, Listener, ListenerSink, RunLog, TextSink, text_log
from onewan.train.attention import choose_attention
from onewan.train.cadence import Cadence, Due
from onewan.train.chunks import saved_chunks
from onewan.train.environment import environment, processes
from onewan.train.exporting import WeightExporter
from onewan.train.memory import planned
from onewan.train.overview import overview
from onewan.train.resume import Resume, check_start, with_recorded_changes
from onewan.train.run import Run, run_folder
from onewan.train.sampling import SampleMaker
from onewan.train.saving import StateSaver
from onewan.train.setup import WanModelSetup
from onewan.train.steering import Steering
from onewan.train.steps import Steps
from onewan.train.tensorboard import TensorBoardSink
from onewan.train.time_left import TimeLeft
from onewan.train.trial import try_largest_batch
from onewan.train.validator import Validator
from onewan.train.wandb_sink import WandbSink
from onewan.variants import ExpertName

log = logging.getLogger(__name__)


class WanTrainer:
    """Trains one run: a new one, or with `resume` one that was interrupted."""

    def __init__(
        self,
        config: ResolvedRun,
        *,
        run_file: str | None = None,
        listen: Listener | None = None,
        resume: Resume = False,
        allow_change: bool = False,
        overrides: Sequence[str] = (),
    ) -> None:
        """`config` is resolved (`load_run`). `run_file` is its text as written by the user, which
        is kept in the run's folder. `listen` is called with each event. `resume` continues
        the run from its newest state; with "auto", the run is started if it has none.
        `allow_change` permits resuming with other settings or data; the results then differ from
        those of an uninterrupted run. `overrides` are the settings that the command line gave,
        such as "optimizer.lr=1e-4"; they are named when a resuming process leaves one out.
        """
        if resume:
            config = with_recorded_changes(config, overrides)
        self._config = config
        """The settings that the run begins with, and their changes."""
        self._run_file = run_file
        self._resume: Resume = resume
        self._allow_change = allow_change
        self._layout = RunLayout(run_folder(config))
        self._cadence = Cadence.of(in_force(config, -1))
        self._stop_signals = StopSignals()
        self._log = RunLog()
        self._listen = listen
        self._ranks: Ranks = Alone()
        self._saver = StateSaver(config, self._layout, self._log, overrides)
        self._exporter = WeightExporter(self._layout, self._log)
        self._validator = Validator(self._log, self._exporter, self._stop_if_alone)
        self._samples = SampleMaker(self._layout, self._log, self._stop_here)
        self._steering = Steering(self._layout, self._log, self._record)
        self._memory_limit: int | None = None
        """Bytes of the device that may be used; None if it has no limit."""
        self._memory_peak: int | None = None
        """Of all steps so far."""
        self._device_rate: float | None = None
        """FLOP/s of the device in matrix products."""
        self._time = TimeLeft(self._cadence, expert_schedule_of(config))

    def fit(self) -> None:
        """Train to the last step, or until the user requests a stop (Interrupted, after saving).

        OnewanError for everything that the user can fix; states saved before are kept in any case.
        """
        device = resolve_device(self._config.model.device)
        timeout = 60 * self._config.parallel.timeout_minutes
        with join(device, timeout, tell=self._failed) as self._ranks, ExitStack() as session:
            chunks = self._begin_session(session) if self._ranks.is_first else None
            # The first process has the run's lock before others read its folder.
            chunks = self._ranks.from_first(chunks)
            setup = WanModelSetup(self._config, chunks, self._ranks)
            setup.check()  # a run that can't be started leaves no folder behind
            if self._ranks.is_first:
                self._open_folder(session)
            self._ranks.from_first(None)  # the folder is there
            if not self._ranks.is_first:
                own_log = self._layout.rank_log(self._ranks.rank)
                own_log.parent.mkdir(exist_ok=True)
                session.enter_context(text_log(own_log))
                session.callback(self._log.close)
            self._log.add(TextSink())
            session.enter_context(self._stop_signals)
            try:
                self._run(setup)
            except Interrupted:
                self._log.emit(events.Stopped(step=self._saver.saved_step))
                raise
            except KeyboardInterrupt:
                self._failed(f"stopped without saving a state; {self._saver.kept}")
                raise
            except BaseException as error:
                # What the user can fix has said so; anything else needs the place in the code.
                if not isinstance(error, OnewanError):
                    log.error("the run failed", exc_info=error)
                self._failed(str(error) or type(error).__name__)
                raise

    def _failed(self, error: str) -> None:
        self._log.emit(events.Failed(error=error))

    def _begin_session(self, session: ExitStack) -> Mapping[str, int] | None:
        """Take the run's lock until the end of `session`; what is known of a run that is resumed
        (`onewan.train.chunks`)."""
        root = self._layout.root
        remedy = (
            f"wait until it ends, stop it with: onewan stop {root}, or choose another name "
            "(output.name=...)"
        )
        if self._listen is not None:
            self._log.add(ListenerSink(self._listen))
        session.enter_context(locked(self._layout.lock, root, remedy))
        check_start(self._layout, self._resume)
        return saved_chunks(self._layout) if self._resume else None

    def _open_folder(self, session: ExitStack) -> None:
        """Make the run's folder, and record in it until the end of `session`."""
        self._layout.create()
        if not self._layout.saved_steps():
            self._write_run_files()
        session.enter_context(text_log(self._layout.log))
        session.callback(self._log.close)
        file = EventFile(self._layout.events)
        self._log.add(FileSink(file, str(self._layout.events)))
        session.enter_context(HeartbeatThread(file))
        # Requests that an earlier process did not handle are not meant for this one.
        for request in REQUESTS:
            clear(self._layout, request)
        self._steering.drop_earlier(max(self._layout.saved_steps(), default=0))

    def _run(self, setup: WanModelSetup) -> None:
        config = self._config
        steps = None if config.train.epochs else config.train.steps
        self._log.emit(events.Started(run=self._layout.root, steps=steps))
        if self._ranks.is_first:
            remove_abandoned_locks(self._layout.weights_dir)
            for notice in remove_abandoned(self._layout.written_folders()):
                self._log.note(notice)
        device = resolve_device(config.model.device)
        self._log.emit(environment(device))
        vram = config.memory.vram
        self._memory_limit = limit_memory(device, None if vram is None else parse_bytes(vram))
        run = setup.build(self._on_encoding)
        # Ends the copies, and frees pinned memory for other runs of this process.
        with closing(run.memory):
            self._begin(run)
            self._train(run)
        self._log.emit(events.Finished(step=run.state.step, run=self._layout.root))

    def _begin(self, run: Run) -> None:
        """Report what was set up, restore the saved state, and try the largest batch."""
        self._device_rate = matrix_product_rate(run.device, torch_dtype(run.config.model.dtype))
        self._report_data(run)
        plan = run.memory.plan
        self._time = TimeLeft(self._cadence, run.schedule, None if plan is None else plan.run_time)
        if plan is not None:
            self._log.emit(planned(plan))
        if self._resume:
            self._restore(run)
        self._steering.begin(run)
        self._follow_settings(run)
        config = run.config
        if run.state.step < config.train.steps:
            found = overview(run, self._layout)
            for line in full_disks(config, found.disk):
                self._log.warn(line)
            self._log.emit(found)
        self._log.emit(choose_attention(run))
        if (measured := try_largest_batch(run)) is not None:
            self._log.emit(measured)
        if not self._ranks.is_first:
            return
        if config.logging.tensorboard:
            self._log.add(TensorBoardSink(self._layout.tensorboard, run.state.step))
        if config.logging.wandb is not None:
            self._log.add(WandbSink(config, self._layout, self._log.note))

    def _report_data(self, run: Run) -> None:
        config, epochs = run.config, self._config.train.epochs
        self._log.emit(
            events.DataReady(
                clips=count_clips(run.dataset.clips),
                encoded=run.dataset.encoded,
                report=run.dataset.report.lines(repeat=False),
                steps=config.train.steps,
            )
        )
        self._list_clips(run)
        if epochs is not None:  # their number of steps is known only now
            self._log.note(run.steps_of_epochs(epochs))
            self._config, self._cadence = run.recorded, Cadence.of(config)
            if self._ranks.is_first and not self._layout.saved_steps():
                self._write_run_files()
        if self._ranks.count > 1:
            self._log.note(str(run.division))
            self._log.emit(processes(run))
        for warning in run.warnings:
            self._log.warn(warning)

    def _list_clips(self, run: Run) -> None:
        digests = self._ranks.gathered(run.dataset.digest)
        if len(set(digests)) > 1:
            raise DataError(
                "the machines of this run have different clips; all need the same files at the "
                "same paths (see onewan doctor on each)"
            )
        try:
            if self._ranks.is_first:
                write_clip_list(self._layout.clips, run.dataset.report)
        except OSError as error:  # of a full disk, saving a state says so too
            self._log.warn(f"{self._layout.clips}: can't be written ({error.strerror})")

    def _train(self, run: Run) -> None:
        """Train to the last step."""
        steps = Steps(
            run,
            self._is_due_at,
            lambda: self._stop_signals.requested,
            memory_limit=self._memory_limit,
            device_rate=self._device_rate,
        )
        try:
            self._catch_up(run)
            self._saver.start_clock()
            ready = time.perf_counter()
            for done, signalled in steps:
                seconds = (time.perf_counter() - ready) / len(done)
                for step in done:
                    self._report(step, seconds)
                self._after_steps(run, signalled)
                ready = time.perf_counter()
        except DataError:
            if self._ranks.count == 1:  # others may have trained steps that this one has not
                self._saver.save(run)
            raise
        except Interrupted:
            # Saved here and not where the request was noticed: during validation and sampling the
            # model may contain other weights (averages, the base model's) than the trained ones.
            run.bring_together()
            self._saver.save(run, last=True)
            raise
        if self._exporter.failure:
            raise CheckpointError(
                f"{self._exporter.failure}; training is complete and its state is saved. Make room "
                "or repair the disk, then export the weights with --resume"
            )
        if self._ranks.is_first:
            for best in self._exporter.best(run):
                self._log.emit(best)

    def _is_due_at(self, step: int) -> bool:
        """Whether something is due, or a setting changes, after so many steps."""
        changes = any(change.step == step for change in self._config.changes)
        return changes or self._cadence.at(step).anything

    # ---------------------------------------------------------------------- before and after a step

    def _catch_up(self, run: Run) -> None:
        """Before the first step, do what is due at the present step and is not yet done.

        A run can be in four situations: nothing was saved yet (a new run, or one that ended before
        its first step); it was stopped during a validation, which saves the state; it was killed
        after saving and before all weights were exported; it ended before all videos were complete.
        One rule covers them, since state, files and videos show which actions are complete.
        """
        self._stop_if_requested()
        due = self._cadence.at(run.state.step)
        if due.validate and run.state.validated != run.state.step:
            self._validate(run)
        if due.export and not self._ranks.from_first(self._exporter.is_complete(run)):
            self._exporter.export(run)
        self._sample_due(run, due)

    def _report(self, step: events.StepDone, seconds: float) -> None:
        """Tell of a step, which has taken `seconds` with loading its clips."""
        if step.step_memory_peak is not None:
            self._memory_peak = max(step.step_memory_peak, self._memory_peak or 0)
        self._time.stepped(cast("ExpertName", step.expert), seconds)
        left = self._time.after(step.step)
        self._log.emit(replace(step, memory_peak=self._memory_peak, seconds_left=left))

    def _after_steps(self, run: Run, signalled: bool) -> None:
        """Do what is due at the present step, and stop if that is wanted. The first process finds
        both out, and tells all at once."""
        recorded, due, stops, requested = None, None, signalled, iter(())
        if self._ranks.is_first:
            self._restore_folder()
            if self._steering.advance(run):
                recorded = run.recorded
                self._follow_settings(run)
            requested = self._steering.samples(run)
            due = self._due(run)
            # Also a signal of this moment: others hear of it now as well.
            stops = signalled or self._stop_signals.requested or self._take("stop")
        request = next(requested, None)
        told = recorded, due, stops, request is not None
        recorded, due, stops, is_requested = self._ranks.from_first(told)
        if recorded is not None and not self._ranks.is_first:
            self._config = run.recorded = recorded
            self._steering.begin(run)
            self._follow_settings(run)
        if due is not None and (due.anything or is_requested):
            self._do(run, due)
            while self._ranks.from_first(request is not None):
                self._samples.make_requested(run, request)
                request = next(requested, None)
            if not stops:  # it may have taken long
                self._stop_if_requested()
        if stops:
            raise Interrupted

    def _do(self, run: Run, due: Due) -> None:
        run.bring_together()
        # Validation precedes saving, so that the state includes its result, and so that the files
        # of the best weights that a state knows are complete.
        best = due.validate and self._validate(run)
        if due.save or best:
            with self._time.doing("save"):
                self._saver.save(run, last=run.state.step == self._config.train.steps)
        if due.export:
            with self._time.doing("export"):
                self._exporter.export(run)
        self._sample_due(run, due)

    def _due(self, run: Run) -> Due:
        """What is due after this step, by the settings and by requests."""
        for name in unknown(self._layout):
            self._log.warn_once(
                f"{self._layout.control_dir / name}: is no request, so nothing is done; the names "
                f"of requests are {', '.join(REQUESTS)}"
            )
        sample_requested = self._take("sample")
        if sample_requested and not run.samples:
            self._log.warn("sample videos were requested, but sample.prompts is empty")
        return self._cadence.after(
            run.state.step,
            seconds_since_save=self._saver.seconds_since_save,
            save_requested=self._take("save") or self._saver.retry_is_due,
            sample_requested=sample_requested,
            export_requested=self._take("export"),
        )

    def _follow_settings(self, run: Run) -> None:
        """Do what is due, and how much is kept, by the settings of the present step."""
        self._cadence = self._time.cadence = Cadence.of(run.config)
        self._saver.keep(run.config.train)

    def _stop_if_requested(self) -> None:
        """To be called by all processes: they stop together, after the same step."""
        wanted = self._stop_signals.requested or (self._ranks.is_first and self._take("stop"))
        if any(self._ranks.gathered(wanted)):
            raise Interrupted

    def _stop_if_alone(self) -> None:
        """The same in the middle of work that other processes wait for: only without any."""
        if self._ranks.count == 1:
            self._stop_if_requested()

    def _stop_here(self) -> None:
        """The same in the middle of work after which this process tells the others."""
        self._stop_if_alone()
        if self._stop_signals.requested or pending(self._layout, "stop"):
            raise Interrupted

    def _take(self, name: Request) -> bool:
        try:
            return take(self._layout, name)
        except OSError as error:
            # It would be found again after every step.
            self._log.warn_once(f"a request can't be removed, so it is not followed ({error})")
            return False

    def _validate(self, run: Run) -> bool:
        """Returns whether the state is to be kept as the best one. Clips that can't be read are
        reported, and training continues."""
        try:
            with self._time.doing("validation"):
                return self._validator.validate(run)
        except (DataError, OSError) as error:
            if self._ranks.count > 1:  # others have measured their part, and wait for this one
                raise
            self._log.warn(f"validation failed ({error}); training continues")
            return False

    # ---------------------------------------------------------------------------- the run's folder

    def _restore(self, run: Run) -> None:
        if self._saver.restore(run, allow_change=self._allow_change):
            self._samples.keep_existing = True
            # The run folder then has the settings that the run continues with.
            if self._ranks.is_first:
                self._write_run_files()
            if run.state.step >= (steps := self._config.train.steps):
                self._log.note(
                    f"nothing is left to train: all {steps} steps are done; a larger train.steps "
                    f"continues, such as train.steps={2 * steps}"
                )
        else:
            self._log.note(f"{self._layout.states_dir}: has no saved state; starting at step 0")

    def _restore_folder(self) -> None:
        """Make the run's folder again if it was deleted or renamed while the run goes on."""
        if self._layout.resolved.is_file():
            return
        try:
            self._layout.create()
            self._write_run_files()
        except OSError:
            return  # saving a state fails for the same reason, and reports it
        self._log.warn(
            f"{self._layout.root}: was deleted or renamed while the run used it; it was made again "
            "and gets everything from now on"
        )

    def _record(self, config: ResolvedRun) -> None:
        """Have `config` as the run's settings, in its folder too; OSError if that can't be."""
        before, self._config = self._config, config
        try:
            self._write_run_files()
        except OSError:
            self._config = before
            raise

    def _write_run_files(self) -> None:
        texts = {self._layout.resolved: dump_run(self._config)}
        if self._run_file is not None:
            texts[self._layout.run_file] = self._run_file
        elif not self._layout.run_file.exists():
            texts[self._layout.run_file] = texts[self._layout.resolved]
        for path, text in texts.items():
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")

    # ------------------------------------------------------------------------------------- samples

    def _sample_due(self, run: Run, due: Due) -> None:
        if due.sample:
            with self._time.doing("sample"):
                self._samples.make(run, run.samples)
        if due.full_sample:
            with self._time.doing("full_sample"):
                self._samples.make(run, run.full_samples)

    def _on_encoding(self, what: str, done: int, total: int) -> None:
        self._log.emit(events.Encoding(what=what, done=done, total=total))
        self._stop_here()
