"""`TimeLeft`: how long a run still takes, by what its steps and other work have taken so far."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from statistics import fmean, median
from typing import Literal

from onewan.arithmetic.expert_schedule import ExpertSchedule
from onewan.memory.plan import RunTime
from onewan.train.cadence import Cadence
from onewan.variants import ExpertName

Work = Literal["validation", "save", "export", "sample", "full_sample"]
"""What a run does besides its steps."""

_STEPS = 21
"""Steps of each expert whose median counts: the first ones of a process are slower, and so are
those after a change of the expert."""


class TimeLeft:
    """Estimates from measured times: of the steps of each expert on its own, and of validation,
    checkpoints, exports and sample videos, each as often as it will still be due."""

    def __init__(
        self,
        cadence: Cadence,
        schedule: ExpertSchedule,
        predicted: RunTime | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`predicted` times of the plan stand for work that was not done yet, in proportion to
        the measured steps; without them it counts from its first time on."""
        self.cadence = cadence
        """May change between two steps."""
        self._schedule = schedule
        self._predicted = predicted
        self._clock = clock
        self._steps: dict[ExpertName, deque[float]] = {}
        self._work: dict[Work, float] = {}

    def stepped(self, expert: ExpertName, seconds: float) -> None:
        """A step of `expert` has taken `seconds`, with loading its clips."""
        self._steps.setdefault(expert, deque(maxlen=_STEPS)).append(seconds)

    @contextmanager
    def doing(self, work: Work) -> Generator[None]:
        """Measures the block; one that raises does not count, and the newest time does."""
        begin = self._clock()
        yield
        self._work[work] = self._clock() - begin

    def after(self, step: int) -> float | None:
        """Seconds until the end of the run once `step` steps are done, but not yet the work that is
        due after them; None before the first measured step."""
        if not self._steps:
            return None
        steps = self.cadence.steps
        typical = {name: median(times) for name, times in self._steps.items()}
        other = fmean(typical.values())  # of an expert that had no step yet
        total = sum(
            typical.get(name, other)
            * (self._schedule.steps_before(steps, name) - self._schedule.steps_before(step, name))
            for name in self._schedule.experts
        )
        due = self.cadence.still_due(step)
        counts: dict[Work, int] = {
            "validation": due.validations,
            "export": due.saves,
            "sample": due.samples,
            "full_sample": due.full_samples,
        }
        total += sum(count * self._seconds_of(work, other) for work, count in counts.items())
        saves: float = due.saves
        if self.cadence.save_minutes:
            saves = max(saves, total / (60 * self.cadence.save_minutes))
        return total + saves * self._seconds_of("save", other)

    def _seconds_of(self, work: Work, step: float) -> float:
        """What `work` takes each time; `step` is the time of a step."""
        if work in self._work:
            return self._work[work]
        plan = self._predicted
        if plan is None or not plan.step:
            return 0.0
        videos = self.cadence.videos
        predicted: dict[Work, float] = {
            "validation": plan.validation,
            "sample": videos * plan.sample,
            "full_sample": videos * plan.full_sample,
        }
        return predicted.get(work, 0.0) * step / plan.step
