"""`Validator`: measures a run's validation losses, reports them, and keeps the best weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import fmean

from onewan.runs import events
from onewan.runs.log import RunLog
from onewan.train.best import improved_weights
from onewan.train.exporting import WeightExporter
from onewan.train.run import Run
from onewan.train.saved_state import BestStep
from onewan.train.validation import ExpertLosses, MeasuredClips, measure
from onewan.variants import ExpertName


class Validator:
    """Validates a run at its present step."""

    def __init__(
        self, log: RunLog, exporter: WeightExporter, stop_if_requested: Callable[[], None]
    ) -> None:
        """`stop_if_requested` is called after each clip, and may raise Interrupted."""
        self._log, self._exporter = log, exporter
        self._stop_if_requested = stop_if_requested

    def validate(self, run: Run) -> bool:
        """Measure and report the losses of all experts, each by the processes that train it;
        returns whether the state is to be kept as the best one."""
        state = run.state
        own: dict[ExpertName, MeasuredClips] = {
            name: measure(
                run,
                name,
                with_base=state.step == 0 and name not in state.base_loss,
                between=self._stop_if_requested,
            )
            for name in run.group.experts
        }
        by_rank = run.ranks.gathered(own)
        losses: dict[ExpertName, ExpertLosses] = {
            name: ExpertLosses.of([part[name] for part in by_rank if name in part])
            for name in state.experts
        }
        self._report(run, losses)
        state.validated = state.step
        self._exporter.export_best(run, improved_weights(state, losses))
        return self._record_best(run, fmean(each.trained for each in losses.values()))

    def _report(self, run: Run, losses: Mapping[ExpertName, ExpertLosses]) -> None:
        state = run.state
        for name, measured in losses.items():
            if measured.base is not None and math.isfinite(measured.base):
                state.base_loss[name] = measured.base
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
