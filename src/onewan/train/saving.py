"""`StateSaver`: saves the states of a run while it trains, and restores the newest intact one.

A disk that is full or was unmounted must not end a run of days, which a user could still save by
making room: training goes on, and saving is tried again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from onewan.checkpoint.store import StateStore
from onewan.config.load import overridden_names
from onewan.config.schema import ResolvedRun, TrainSection
from onewan.errors import CheckpointError
from onewan.parallel.ranks import first_alone
from onewan.runs import events
from onewan.runs.layout import RunLayout, displayed
from onewan.runs.log import RunLog
from onewan.train.attention import resumed_attention
from onewan.train.chunks import CHUNKS_FIELD, chunks_change
from onewan.train.resume import Changes, changes_since
from onewan.train.run import Run
from onewan.train.saved_state import FACTS_FILE, StateFacts, read_facts
from onewan.train.state import Trainable, versions

_RETRY_SECONDS = 60.0
"""After a state that could not be saved, training goes on for this time before the next try..."""
_RETRY_FACTOR = 10.0
"""...or this many times as long as the failed try took, if that is more: writing 100 GB until the
disk is full takes minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    """What a state contained besides the weights."""

    facts: StateFacts
    changes: Changes
    resets: list[str]


class StateSaver:
    """Saves and restores the states in the run's folder, and reports it in `log`."""

    def __init__(
        self, config: ResolvedRun, layout: RunLayout, log: RunLog, overrides: Sequence[str] = ()
    ) -> None:
        """`overrides` are those of the command line, such as "optimizer.lr=1e-4"."""
        self._overrides = overridden_names(overrides)
        """Fields that were given on the command line, by the run's processes so far."""
        self._layout = layout
        self._log = log
        self._store = StateStore(layout, config.train.keep_last, config.train.keep_every)
        self.saved_step = 0
        """The step of the newest state that this process has saved or loaded; 0 without one."""
        self._saved_at = time.monotonic()
        self._retry_at: float | None = None
        """When to try again; None if the last state could be saved."""

    @property
    def kept(self) -> str:
        """What a run that ends now continues from."""
        if self.saved_step == 0:
            return "no state is saved so far"
        return f"the newest saved state is that of step {self.saved_step}"

    def keep(self, train: TrainSection) -> None:
        """Keep as many states as `train` says from now on."""
        self._store.keep, self._store.keep_every = train.keep_last, train.keep_every

    @property
    def seconds_since_save(self) -> float:
        return time.monotonic() - self._saved_at

    @property
    def retry_is_due(self) -> bool:
        """Whether a state could not be saved, and it is time to try again."""
        return self._retry_at is not None and time.monotonic() >= self._retry_at

    def start_clock(self) -> None:
        """Count `seconds_since_save` from now: encoding and the first validation are not training
        time that a crash could lose."""
        self._saved_at = time.monotonic()

    def save(self, run: Run, *, last: bool = False) -> None:
        """Save the state of `run`, unless that of this step is saved, and delete old ones. All
        processes of the run call this; the first one writes, or where weights are sharded all.

        A state that can't be saved is reported, and `retry_is_due` says when to try again. If it is
        the `last` one, which there is no time for, it is a CheckpointError.
        """
        if run.state.step == self.saved_step:  # a stop right after a save, or before any step
            return
        with first_alone(run.ranks, together=run.division.is_sharded) as takes_part:
            if takes_part:
                self._save(run, last=last)
        self.saved_step = run.ranks.from_first(self.saved_step)

    def _save(self, run: Run, *, last: bool) -> None:
        step = run.state.step
        begin = time.monotonic()
        try:
            folder = self._saved(run)
        except CheckpointError as error:
            if not run.ranks.is_first:
                return
            if last:
                raise CheckpointError(f"{error}; {self.kept}") from error
            self._report_failure(f"{error}; {self.kept}", time.monotonic() - begin)
            return
        self.saved_step, self._saved_at, self._retry_at = step, time.monotonic(), None
        if not run.ranks.is_first:
            return
        self._log.emit(events.Saved(step=step, state=folder))
        for problem in self._store.rotate(step, run.state.best_step):
            self._log.warn_once(problem)

    def _saved(self, run: Run) -> Path:
        """Write the present state; its folder. CheckpointError in the first process."""
        step, ranks = run.state.step, run.ranks
        if not run.division.is_sharded:
            return self._store.save(step, partial(self._write, run, run.state.trainables))
        # What has no shards, such as adapters and embeddings, is written by one process.
        trained = [*run.trained_by(run.group), run.state.embeddings]
        is_speaker = ranks.rank == run.group.first
        own = [each for each in trained if each and (is_speaker or each.sharding is not None)]
        told = not ranks.is_first

        def write_together(folder: Path) -> None:
            nonlocal told
            told = True
            ranks.from_first(folder)
            self._write_shards(run, own, folder)

        try:
            if ranks.is_first:
                return self._store.save(step, write_together)
            if (folder := ranks.from_first(None)) is not None:
                self._write_shards(run, own, folder)
            return self._layout.state(step)
        except OSError as error:
            raise CheckpointError(str(error)) from error
        finally:
            if not told:
                ranks.from_first(None)

    def _write_shards(self, run: Run, own: Sequence[Trainable], folder: Path) -> None:
        """What this process writes of a state that all write. OSError in all if one can't."""
        failure = None
        try:
            if run.ranks.is_first:
                self._write(run, own, folder)
            else:
                for trainable in own:
                    trainable.save(folder)
        except OSError as error:
            failure = error.strerror or str(error)
        if failures := [each for each in run.ranks.gathered(failure) if each]:
            raise OSError(failures[0])

    def _write(self, run: Run, trainables: Sequence[Trainable], folder: Path) -> None:
        run.state.save(
            folder,
            config=run.recorded.model_dump(mode="json"),
            dataset=run.dataset.digest,
            overrides=self._overrides,
            trainables=trainables,
        )

    def _report_failure(self, text: str, seconds: float) -> None:
        pause = max(_RETRY_SECONDS, _RETRY_FACTOR * seconds)
        # Reported once: trying again every minute would give hundreds of lines in a night.
        if self._retry_at is None:
            self._log.warn(
                f"{text}; training continues. Make room or repair the disk: saving is tried again "
                f"about every {max(1, round(pause / 60))} min"
            )
        self._retry_at = time.monotonic() + pause

    def restore(self, run: Run, *, allow_change: bool) -> bool:
        """Load the newest intact state into `run`; returns whether there is one.

        CheckpointError if settings or data changed so that results would differ, unless
        `allow_change` permits it.
        """
        found = self._store.newest(partial(self._load, run, allow_change), run.state.files)
        if found is None:
            return False
        for damage in found.damaged:
            self._log.warn(f"skipped a damaged state: {damage}")
        changes = found.content.changes
        self._report_changes(changes)
        earlier = found.content.facts.overrides or ()
        self._overrides += [
            name for name in earlier if name not in (*self._overrides, *changes.names)
        ]
        for line in found.content.resets:
            self._log.warn(line)
        if not changes.losses_comparable:
            run.state.base_loss, run.state.best, run.state.best_weights = {}, None, {}
            self._log.warn(
                "validation losses are measured differently from now on, so they can't be compared "
                "with earlier ones"
            )
        self.saved_step = found.step
        self._log.emit(events.Resumed(step=found.step, state=found.folder))
        if (saved_with := found.content.facts.versions) != versions():
            present = versions()
            changed = ", ".join(
                f"{name} {saved_with.get(name, 'unknown')} (now {present.get(name, 'unknown')})"
                for name in dict.fromkeys([*saved_with, *present])
                if saved_with.get(name) != present.get(name)
            )
            self._log.warn(
                f"the state was saved with {changed}; bit-exact results are not promised across "
                "versions"
            )
        return True

    def _load(self, run: Run, allow_change: bool, folder: Path) -> _Loaded:
        facts = read_facts(folder)
        source = str(folder / FACTS_FILE)
        run.state.attention, attention_change = resumed_attention(run, facts.attention)
        chosen = {
            "memory.attention": attention_change,
            CHUNKS_FIELD: chunks_change(run, facts),
            "captions": _captions_change(run, facts),
        }
        changes = changes_since(
            facts,
            run.recorded,
            run.dataset.digest,
            run.state.initial_digests,
            source,
            {field: line for field, line in chosen.items() if line is not None},
            self._overrides,
        )
        if changes.affecting_results and not allow_change:
            raise CheckpointError(
                f"{self._layout.root}: resuming with changes would give other results; undo them, "
                "start another run, or allow them with --allow-change",
                [*changes.affecting_results, *self._hints(changes)],
            )
        resets = run.state.load(folder, facts, allow_change=allow_change)
        return _Loaded(facts=facts, changes=changes, resets=resets)

    def _report_changes(self, changes: Changes) -> None:
        for change in changes.affecting_results:
            self._log.warn(f"resuming with a change, as allowed: {change}")
        for change in changes.harmless:
            self._log.note(f"resuming with a change that does not affect results: {change}")
        for hint in self._hints(changes):
            self._log.note(hint)

    def _hints(self, changes: Changes) -> list[str]:
        """How to keep what the command line gave, if the present one leaves it out."""
        if not changes.loses_override:
            return []
        folder = displayed(self._layout.root)
        return [
            "the run's folder keeps what was given on the command line: "
            f"onewan train {folder} --resume; with the run file, give it again"
        ]


def _captions_change(run: Run, facts: StateFacts) -> str | None:
    """In one line, why `run` draws captions otherwise than when the state with `facts` was saved;
    None if it does not."""
    # With one micro-batch in a step, the two ways are the same.
    by_micro_batch = facts.caption_draws is None and run.config.train.accumulation > 1
    if not by_micro_batch or not run.loader.draws_captions:
        return None
    return (
        "captions: an earlier version of onewan drew them by the sample's place in its "
        "micro-batch, this one by its place in the step"
    )
