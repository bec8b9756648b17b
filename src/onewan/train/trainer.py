"""`WanTrainer`: the training loop of a run, from its first or its last saved step to the end.

`WanModelSetup` builds model, data and objective; `train_step` computes one step; `Cadence` decides
when to validate, save, export and sample. This module emits an event (`onewan.runs.log`) for
everything that happens, and never prints.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from statistics import fmean

from onewan.arithmetic.byte_sizes import parse_bytes
from onewan.config.changes import in_force
from onewan.config.load import dump_run
from onewan.config.resolve import expert_schedule_of
from onewan.config.schema import ResolvedRun
from onewan.data.clip import count_clips
from onewan.data.clip_list import write_clip_list
from onewan.data.loader import StepBatches
from onewan.devices import device_memory, reset_peak, resolve_device
from onewan.dtypes import torch_dtype
from onewan.errors import CheckpointError, DataError, Interrupted, OnewanError
from onewan.files import remove_abandoned, replacing
from onewan.locks import locked, remove_abandoned_locks
from onewan.memory.device import empty_cache_near, limit_memory, matrix_product_rate
from onewan.memory.execution import CopiedBytes
from onewan.memory.plan import full_disks
from onewan.runs import events
from onewan.runs.control import REQUESTS, Request, StopSignals, clear, pending, take, unknown
from onewan.runs.event_file import EventFile, HeartbeatThread
from onewan.runs.layout import RunLayout
from onewan.runs.log import FileSink, Listener, ListenerSink, RunLog, TextSink, text_log
from onewan.train.attention import choose_attention
from onewan.train.best import improved_weights
from onewan.train.cadence import Cadence, Due
from onewan.train.chunks import saved_chunks
from onewan.train.environment import environment
from onewan.train.exporting import WeightExporter
from onewan.train.memory import planned
from onewan.train.overview import overview
from onewan.train.resume import Resume, check_start, with_recorded_changes
from onewan.train.run import Run, run_folder
from onewan.train.sampling import SampleMaker
from onewan.train.saved_state import BestStep
from onewan.train.saving import StateSaver
from onewan.train.setup import WanModelSetup
from onewan.train.speed import step_speed
from onewan.train.steering import Steering
from onewan.train.step import StepMetrics, train_step
from onewan.train.tensorboard import TensorBoardSink
from onewan.train.time_left import TimeLeft
from onewan.train.trial import try_largest_batch
from onewan.train.validation import ExpertLosses, expert_losses
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
        self._log = RunLog(*([] if listen is None else [ListenerSink(listen)]))
        self._saver = StateSaver(config, self._layout, self._log, overrides)
        self._exporter = WeightExporter(self._layout, self._log)
        self._samples = SampleMaker(self._layout, self._log, self._stop_if_requested)
        self._steering = Steering(self._layout, self._log, self._record)
        self._memory_limit: int | None = None
        """Bytes of the device that may be used; None if it has no limit."""
        self._memory_peak: int | None = None
        """Of all steps so far."""
        self._device_rate: float | None = None
        """FLOP/s of the device in matrix products."""
        self._copied = CopiedBytes()
        self._time = TimeLeft(self._cadence, expert_schedule_of(config))

    def fit(self) -> None:
        """Train to the last step, or until the user requests a stop (Interrupted, after saving).

        OnewanError for everything that the user can fix; states saved before are kept in any case.
        """
        root = self._layout.root
        remedy = (
            f"wait until it ends, stop it with: onewan stop {root}, or choose another name "
            "(output.name=...)"
        )
        with ExitStack() as session:
            session.enter_context(locked(self._layout.lock, root, remedy))
            check_start(self._layout, self._resume)
            chunks = saved_chunks(self._layout) if self._resume else None
            setup = WanModelSetup(self._config, chunks)
            setup.check()  # a run that can't be started leaves no folder behind
            self._layout.create()
            if not self._layout.saved_steps():
                self._write_run_files()
            session.enter_context(text_log(self._layout.log))
            session.callback(self._log.close)
            file = EventFile(self._layout.events)
            self._log.add(FileSink(file, str(self._layout.events)))
            self._log.add(TextSink())
            session.enter_context(HeartbeatThread(file))
            session.enter_context(self._stop_signals)
            # Requests that an earlier process did not handle are not meant for this one.
            for request in REQUESTS:
                clear(self._layout, request)
            self._steering.drop_earlier(max(self._layout.saved_steps(), default=0))
            try:
                self._run(setup)
            except Interrupted:
                self._log.emit(events.Stopped(step=self._saver.saved_step))
                raise
            except KeyboardInterrupt:
                saved = self._saver.saved_step
                kept = (
                    f"the newest saved state is that of step {saved}" if saved else "none is saved"
                )
                self._log.emit(events.Failed(error=f"stopped without saving a state; {kept}"))
                raise
            except BaseException as error:
                # What the user can fix has said so; anything else needs the place in the code.
                if not isinstance(error, OnewanError):
                    log.error("the run failed", exc_info=error)
                self._log.emit(events.Failed(error=str(error) or type(error).__name__))
                raise

    def _run(self, setup: WanModelSetup) -> None:
        config = self._config
        steps = None if config.train.epochs else config.train.steps
        self._log.emit(events.Started(run=self._layout.root, steps=steps))
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
        config, epochs, device = run.config, self._config.train.epochs, run.device
        self._device_rate = matrix_product_rate(device, torch_dtype(config.model.dtype))
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
            if not self._layout.saved_steps():
                self._write_run_files()
        for warning in run.warnings:
            self._log.warn(warning)
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
        self._copied = run.memory.copied
        if config.logging.tensorboard:
            self._log.add(TensorBoardSink(self._layout.tensorboard, run.state.step))
        if config.logging.wandb is not None:
            self._log.add(WandbSink(config, self._layout, self._log.note))

    def _list_clips(self, run: Run) -> None:
        try:
            write_clip_list(self._layout.clips, run.dataset.report)
        except OSError as error:  # of a full disk, saving a state says so too
            self._log.warn(f"{self._layout.clips}: can't be written ({error.strerror})")

    def _train(self, run: Run) -> None:
        """Train to the last step."""
        try:
            self._catch_up(run)
            self._saver.start_clock()
            bucket, ready = None, time.perf_counter()
            for step in self._steps(run):
                if bucket != (bucket := step.batches[0].latents.shape[2:]):
                    empty_cache_near(run.device, self._memory_limit)
                reset_peak(run.device)
                begin = time.perf_counter()
                metrics = train_step(run, step)
                run.state.step += 1
                end = time.perf_counter()
                self._time.stepped(step.expert, end - ready)
                self._after_step(run, step, metrics, end - begin)
                self._stop_if_requested()
                ready = time.perf_counter()
        except Interrupted:
            # Saved here and not where the request was noticed: during validation and sampling the
            # model may contain other weights (averages, the base model's) than the trained ones.
            self._saver.save(run, last=True)
            raise
        if self._exporter.failure:
            raise CheckpointError(
                f"{self._exporter.failure}; training is complete and its state is saved. Make room "
                "or repair the disk, then export the weights with --resume"
            )
        for best in self._exporter.best(run):
            self._log.emit(best)

    def _steps(self, run: Run) -> Iterator[StepBatches]:
        """The data of the remaining steps; the state is saved if they can't be read."""
        steps = self._config.train.steps
        try:
            yield from run.loader.steps(run.state.step, steps, run.schedule.expert_at)
        except DataError:
            self._saver.save(run)
            raise

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
        if due.export and not self._exporter.is_complete(run):
            self._exporter.export(run)
        self._sample_due(run, due)

    def _after_step(
        self, run: Run, step: StepBatches, metrics: StepMetrics, seconds: float
    ) -> None:
        allocated, peak = device_memory(run.device)
        if peak is not None:
            self._memory_peak = max(peak, self._memory_peak or 0)
        speed = step_speed(run, step, seconds, self._device_rate)
        before, self._copied = self._copied, run.memory.copied
        on_device = peak is not None
        self._log.emit(
            events.StepDone(
                step=run.state.step,
                expert=step.expert,
                loss=metrics.loss,
                preservation_loss=metrics.preservation_loss,
                grad_norm=metrics.grad_norm,
                lr=metrics.lr,
                embeddings_lr=metrics.embeddings_lr,
                t=metrics.t,
                seconds=seconds,
                memory_allocated=allocated,
                memory_peak=self._memory_peak,
                step_memory_peak=peak,
                bytes_to_device=self._copied.to_device - before.to_device if on_device else None,
                bytes_to_host=self._copied.to_host - before.to_host if on_device else None,
                tokens_per_second=speed.tokens_per_second,
                tflops=speed.tflops,
                mfu=speed.mfu,
                seconds_left=self._time.after(run.state.step),
            )
        )
        self._restore_folder()
        if self._steering.advance(run):
            self._follow_settings(run)
        due = self._due(run)
        # Validation precedes saving, so that the state includes its result, and so that the files
        # of the best weights that a state knows are complete.
        best = due.validate and self._validate(run)
        if due.save or best or self._saver.retry_is_due:
            with self._time.doing("save"):
                self._saver.save(run, last=run.state.step == self._config.train.steps)
        if due.export:
            with self._time.doing("export"):
                self._exporter.export(run)
        self._sample_due(run, due)
        for request in self._steering.samples(run):
            self._samples.make_requested(run, request)

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
            save_requested=self._take("save"),
            sample_requested=sample_requested,
            export_requested=self._take("export"),
        )

    def _follow_settings(self, run: Run) -> None:
        """Do what is due, and how much is kept, by the settings of the present step."""
        self._cadence = self._time.cadence = Cadence.of(run.config)
        self._saver.keep(run.config.train)

    def _stop_if_requested(self) -> None:
        if self._stop_signals.requested or self._take("stop"):
            raise Interrupted

    def _take(self, name: Request) -> bool:
        try:
            return take(self._layout, name)
        except OSError as error:
            # It would be found again after every step.
            self._log.warn_once(f"a request can't be removed, so it is not followed ({error})")
            return False

    # ----------------------------------------------------------------------------------- validation

    def _validate(self, run: Run) -> bool:
        """Measure and report the losses of all experts; returns whether the state is to be kept as
        the best one. Clips that can't be read are reported, and training goes on."""
        try:
            with self._time.doing("validation"):
                return self._measure(run)
        except (DataError, OSError) as error:
            self._log.warn(f"validation failed ({error}); training continues")
            return False

    def _measure(self, run: Run) -> bool:
        state = run.state
        losses: dict[ExpertName, ExpertLosses] = {}
        for name in state.experts:
            measured = expert_losses(
                run,
                name,
                with_base=state.step == 0 and name not in state.base_loss,
                between=self._stop_if_requested,
            )
            if measured.base is not None and math.isfinite(measured.base):
                state.base_loss[name] = measured.base
            losses[name] = measured
            self._log.emit(
                events.Validated(
                    step=state.step,
                    expert=name,
                    loss=measured.trained,
                    ema=measured.ema,
                    base=state.base_loss.get(name),
                    held_out=bool(run.dataset.validation_clips),
                )
            )
        state.validated = state.step
        self._exporter.export_best(run, improved_weights(state, losses))
        return self._record_best(run, fmean(each.trained for each in losses.values()))

    def _record_best(self, run: Run, loss: float) -> bool:
        """Record the present step as the best one if `train.keep_best` is set and `loss` is lower
        than all earlier ones."""
        state = run.state
        # The base model at step 0 is not a result to keep.
        if state.step == 0 or not run.config.train.keep_best or not math.isfinite(loss):
            return False
        if state.best is not None and loss >= state.best.loss:
            return False
        state.best = BestStep(step=state.step, loss=loss)
        self._log.emit(events.BestSoFar(step=state.step, loss=loss))
        return True

    # ---------------------------------------------------------------------------- the run's folder

    def _restore(self, run: Run) -> None:
        if self._saver.restore(run, allow_change=self._allow_change):
            self._samples.keep_existing = True
            # The run folder then has the settings that the run continues with.
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
        if self._stop_signals.requested or pending(self._layout, "stop"):
            raise Interrupted
