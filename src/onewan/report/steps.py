"""`StepTable`: the numbers of all steps of a run, in columns that take 100 bytes a step."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

import numpy as np

from onewan.pages.plots import Values

COLUMNS = (
    "loss",
    "preservation_loss",
    "grad_norm",
    "lr",
    "embeddings_lr",
    "seconds",
    "step_memory_peak",
    "tokens_per_second",
    "tflops",
    "mfu",
)
"""The fields of step events that are kept."""


class StepTable:
    """Steps in ascending order; one that is added again replaces itself and all later ones."""

    def __init__(self) -> None:
        self.experts: list[str] = []
        """Names of the experts, in the order of their first steps."""
        self._indexes = dict[str, int]()
        self.replaced = 0
        """Steps that were computed again after a restart, or dropped by it."""
        self._steps = array("q")
        self._expert = array("b")
        self._values = array("d")
        """Those of each step after each other, as `COLUMNS` has them: one call takes all in."""
        self._timesteps = array("d")
        self._timestep_ends = array("q")
        """For each step the number of timesteps up to and including its own."""

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def last(self) -> int:
        """The last step; 0 if there is none."""
        return self._steps[-1] if self._steps else 0

    def add(self, event: Mapping[str, Any]) -> bool:
        """Take in a step event; returns False, and does nothing, for one that lacks its fields."""
        step, expert = event.get("step"), event.get("expert")
        if type(step) is not int or type(expert) is not str or step < 1:
            return False
        index = self._indexes.get(expert)
        if index is None:
            if len(self.experts) == 100:  # no run has so many: the file is damaged
                return False
            index = self._indexes[expert] = len(self.experts)
            self.experts.append(expert)
        if self._steps and step <= self._steps[-1]:
            self.drop_after(step - 1)
        self._steps.append(step)
        self._expert.append(index)
        self._values.extend(
            [value if type(value) is float else number(value) for value in map(event.get, COLUMNS)]
        )
        timesteps = event.get("t")
        if type(timesteps) is list:
            for value in timesteps:
                self._timesteps.append(value if type(value) is float else number(value))
        self._timestep_ends.append(len(self._timesteps))
        return True

    def drop_after(self, step: int) -> None:
        """Forget the steps after `step`."""
        kept = bisect_right(self._steps, step)
        self.replaced += len(self._steps) - kept
        for column in (self._steps, self._expert, self._timestep_ends):
            del column[kept:]
        del self._values[kept * len(COLUMNS) :]
        del self._timesteps[self._timestep_ends[-1] if kept else 0 :]

    def of(self, expert: str) -> Values:
        """The numbers of the steps of `expert`."""
        return self._of(self._steps, expert).astype(np.float64)

    def column(self, name: str, expert: str | None = None) -> Values:
        """The values of one of `COLUMNS`, of the steps of `expert` or of all; NaN where there is
        none."""
        if not self._steps:
            return np.empty(0)
        rows = np.frombuffer(self._values, np.float64).reshape(-1, len(COLUMNS))
        values = rows[:, COLUMNS.index(name)]
        return values.copy() if expert is None else values[self._is(expert)]

    def timesteps(self, expert: str) -> tuple[Values, Values, Values]:
        """(timesteps, losses, steps) of all clips of the steps of `expert`. The loss of a clip is
        the mean one of its step."""
        if not self._steps:
            return np.empty(0), np.empty(0), np.empty(0)
        ends = np.frombuffer(self._timestep_ends, np.int64)
        counts = np.diff(ends, prepend=0)
        chosen = np.repeat(self._is(expert), counts)
        timesteps = np.frombuffer(self._timesteps, np.float64) if self._timesteps else np.empty(0)
        steps = np.frombuffer(self._steps, np.int64).astype(np.float64)
        losses = self.column("loss")
        return (
            timesteps[chosen],
            np.repeat(losses, counts)[chosen],
            np.repeat(steps, counts)[chosen],
        )

    def _is(self, expert: str) -> np.ndarray:
        index = self.experts.index(expert) if expert in self.experts else -1
        return np.frombuffer(self._expert, np.int8) == index if self._steps else np.empty(0, bool)

    def _of(self, column: array[int], expert: str) -> np.ndarray:
        return np.frombuffer(column, np.int64)[self._is(expert)] if self._steps else np.empty(0)


def number(value: object) -> float:
    """`value` if it is a number, else NaN."""
    if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    return float(value)
