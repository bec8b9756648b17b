"""`Steering`: settings that change while a run trains, and requested sample videos.

A change is recorded in the run's settings before it comes into force, so that a process that is
killed right after it, and is resumed from an earlier state, makes it at the same step again: the
resumed run computes what the uninterrupted one does, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from onewan.config.changes import CHANGEABLE, in_force
from onewan.config.load import with_change, with_one_sample
from onewan.config.schema import ResolvedRun
from onewan.documents import get_path
from onewan.errors import ConfigError, OnewanError
from onewan.runs import events
from onewan.runs.control import Order, drop_orders, take_orders
from onewan.runs.layout import RunLayout
from onewan.runs.log import RunLog
from onewan.sample.generate import SampleRequest
from onewan.train.preflight import check_optimizer
from onewan.train.run import Run, full_sample_requests, sample_requests
from onewan.train.trainable_setup import use_learning_rates

_RATES = ("optimizer.lr", "per_expert.high.lr", "per_expert.low.lr")


class Steering:
    """Follows the orders of one run (`onewan.runs.control.order`), and reports it in `log`."""

    def __init__(
        self, layout: RunLayout, log: RunLog, record: Callable[[ResolvedRun], None]
    ) -> None:
        """`record` writes the run's settings into its folder, and raises OSError if it can't."""
        self._layout = layout
        self._log = log
        self._record = record

    def drop_earlier(self, step: int) -> None:
        """Reject what was ordered from an earlier process of the run, which ended before."""
        for name in drop_orders(self._layout):
            self._reject(step, name, "the run's process ended before it came to it")

    def begin(self, run: Run) -> None:
        """Bring the settings of the present step into force: in a new run, or after a state was
        loaded."""
        self._enforce(run)
        self._announce(run)

    def advance(self, run: Run) -> bool:
        """To be called after each step: bring changes of this step into force, those that the run
        has recorded and those that are ordered now. Returns whether there were any."""
        recorded = self._announce(run)
        ordered = [self._follow(run, order) for order in self._take("settings")]
        if recorded or any(ordered):
            self._enforce(run)
            return True
        return False

    def samples(self, run: Run) -> Iterator[SampleRequest]:
        """The videos that were ordered since the last call, each taken when the one before it is
        made."""
        for order in self._take("sample"):
            try:
                wanted = sample_requests(with_one_sample(run.config, _mapping(order, "prompt")))
            except OnewanError as error:  # noqa: PERF203  (a few, each on its own)
                self._reject(run.state.step, "sample", _reason(error))
            else:
                yield from wanted

    def _take(self, name: Order) -> Iterator[Mapping[str, Any] | str]:
        try:
            yield from take_orders(self._layout, name)
        except OSError as error:  # it would be found again after every step
            self._log.warn_once(f"an order can't be removed, so it is not followed ({error})")

    def _follow(self, run: Run, order: Mapping[str, Any] | str) -> bool:
        """Record the settings of `order` as changed; returns whether they are."""
        step, config = run.state.step, in_force(run.recorded, run.state.step)
        try:
            wanted = _mapping(order, *CHANGEABLE)
            changed = with_change(run.recorded, step, wanted)
            new = in_force(changed, step)
            check_optimizer(new, run.device)
            if new == config:
                raise OnewanError("the settings have these values already")
            self._record(changed)
        except (OnewanError, OSError) as error:
            self._reject(step, "settings", _reason(error))
            return False
        run.recorded = changed
        self._report(step, config, new, changed.changes[-1].settings)
        return True

    def _announce(self, run: Run) -> bool:
        """Report the recorded changes of the present step; returns whether there are any."""
        step = run.state.step
        old, new = in_force(run.recorded, step - 1), in_force(run.recorded, step)
        names = [name for c in run.recorded.changes if c.step == step for name in c.settings]
        self._report(step, old, new, dict.fromkeys(names))
        return bool(names)

    def _report(
        self, step: int, old: ResolvedRun, new: ResolvedRun, names: Mapping[str, Any]
    ) -> None:
        before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
        for name in names:
            path = tuple(name.split("."))
            values = get_path(before, path), get_path(after, path)
            if values[0] != values[1]:
                self._log.emit(
                    events.SettingChanged(step=step, name=name, old=values[0], new=values[1])
                )

    def _enforce(self, run: Run) -> None:
        """Make `run` as if it had been built with the settings of its present step."""
        old, new = run.config, in_force(run.recorded, run.state.step)
        run.config = new
        use_learning_rates(new, run.state)
        for trainable in run.state.trainables:
            if trainable.ema is not None and new.train.ema is not None:
                trainable.ema.decay = new.train.ema.decay
        if new.sample != old.sample:
            run.samples, run.full_samples = sample_requests(new), full_sample_requests(new)

    def _reject(self, step: int, name: Order, reason: str) -> None:
        self._log.emit(events.Rejected(step=step, request=name, reason=reason))


def _mapping(order: Mapping[str, Any] | str, *examples: str) -> Mapping[str, Any]:
    """The content of an order. OnewanError if it has none, or is none."""
    if isinstance(order, str):
        raise OnewanError(order)
    if not order:
        raise OnewanError(f"it names no field; fields are {', '.join(examples)}")
    return order


def _reason(error: OnewanError | OSError) -> str:
    """What is wrong, in a line."""
    if isinstance(error, ConfigError):
        return "; ".join(error.problems)
    if isinstance(error, OnewanError):
        return "; ".join([error.message, *error.details])
    return f"the run's settings can't be written ({error.strerror or error}), so none is changed"
