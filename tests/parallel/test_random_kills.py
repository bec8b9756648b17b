"""kill -9 of a random process at random moments of a run's whole life, again and again: the others
end, the newest state is whole, and the run continues from it to the end of one that nothing
disturbed."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from support.disturbed import ENDS_WITHIN, Disturbed, assert_states_whole, killed_line
from support.equal_runs import Trainer, assert_equal_files, vectors
from support.rank_processes import Processes
from support.runs import SMALL_SAMPLE, RunFile, layout_of

from onewan.parallel import connection
from onewan.runs.event_file import read_events
from onewan.runs.layout import RunLayout

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="signals of Linux are used"),
]

KILLS = int(os.environ.get("ONEWAN_TEST_KILLS", "14"))
"""How many processes are killed, in all tests together."""
CONNECTING = 0.6
"""Seconds in which processes that were just started connect with each other, about."""
COMES_WITHIN = 10.0
"""Seconds after which a process that was killed before it came is missed; others take less, also
on a machine that runs other tests too."""
STARTING = 0.15
"""The part of all moments that are in this time."""
SETTINGS = [
    "train.steps=6",
    "train.save_every=2",
    "train.switch_expert_every=1",
    "train.keep_last=2",
    "validation={clips: 1, every: 2}",
    "wan_config.max_frames=1",
    "train.accumulation=2",
    *(f"sample.{name}={value}" for name, value in {**SMALL_SAMPLE, "every": 3}.items()),
]


def _impatient(rank: int) -> None:
    """A process that has not come is not waited for longer than the others may take to end."""
    del rank
    connection.MEETING_SECONDS = COMES_WITHIN


def _events(layout: RunLayout) -> list[str]:
    """The kinds of all events so far."""
    return [e["event"] for e in read_events(layout.events)] if layout.events.is_file() else []


def _resumed(layout: RunLayout) -> list[int]:
    """The steps from which the run was continued so far."""
    if not layout.events.is_file():
        return []
    return [e["step"] for e in read_events(layout.events) if e["event"] == "resumed"]


@dataclass
class Killing:
    """Kills one process after another of a run that is continued each time."""

    run: Disturbed
    processes: int
    draw: random.Random
    events: int
    """That a run writes which is not disturbed, about."""
    after: list[str] = field(default_factory=list[str])
    """What has happened last before each kill."""

    def once(self) -> bool:
        """Continue the run and kill one of its processes; whether it has come to its end."""
        layout = self.run.layout
        newest, before = max(layout.saved_steps(), default=None), _events(layout)
        killed = self.draw.randrange(self.processes)
        with self.run.start(self.processes, before=_impatient, resume=True) as started:
            self._wait(started, len(before))
            with contextlib.suppress(ProcessLookupError):
                started.signal(killed, signal.SIGKILL)
            last = ["connecting", *_events(layout)[len(before) :]][-1]
            others = [rank for rank in range(self.processes) if rank != killed]
            ends = [started.status(rank, ENDS_WITHIN) for rank in others]
            lines = [started.lines(rank) for rank in others]
            own = started.status(killed, ENDS_WITHIN)
        assert_states_whole(layout)
        # Neither from an older one, since the newest was damaged, nor from the beginning.
        assert _resumed(layout)[before.count("resumed") :] in ([], [newest])
        if own == 0 and not any(ends):
            return True
        self.after.append(last)
        for rank, status, said in zip(others, ends, lines, strict=True):
            if status == 0:  # the process was killed when the others had done everything
                continue
            (line,) = said
            missing = f"processes of the run have started: rank {killed} did not within"
            assert status == 1 and (line == killed_line(killed, rank) or missing in line), last
        return not any(ends)

    def _wait(self, started: Processes, before: int) -> None:
        """Until the moment that is drawn, or the end of the run."""
        if self.draw.random() < STARTING:
            time.sleep(self.draw.uniform(0, CONNECTING))
            return
        # What is behind the first half is reached by runs that were continued.
        wanted = before + self.draw.randint(1, self.events // 2)
        end = time.monotonic() + 60
        while started.is_running and len(_events(self.run.layout)) < wanted:
            assert time.monotonic() < end, "the run takes too long"
            time.sleep(0.01)
        time.sleep(self.draw.uniform(0, 0.1))


FINE_TUNED = [
    "method={kind: fine_tune, weights: kahan}",
    "model.dtype=bfloat16",
    "train.max_grad_norm=null",  # a norm over shards has other last bits
]


@pytest.mark.parametrize(
    ("method", "processes", "share", "seed"),
    [("lora", 2, 0.3, 0), ("lora", 2, 0.3, 1), ("lora", 4, 0.2, 2), ("sharded weights", 2, 0.2, 3)],
)
def test_a_run_whose_processes_are_killed_has_the_end_of_one_that_nothing_disturbed(
    run_file: RunFile, tmp_path: Path, method: str, processes: int, share: float, seed: int
) -> None:
    cache, is_sharded = tmp_path / "cache", method == "sharded weights"
    settings = [*SETTINGS, f"video_data.cache_dir={cache.as_posix()}"]
    settings += [*FINE_TUNED, "parallel.experts=together"] if is_sharded else []
    trainer = Trainer(run_file=run_file, folder=tmp_path, variant="t2v-a14b", settings=settings)
    undisturbed = trainer.train("undisturbed")
    run = Disturbed.of(trainer)
    killing = Killing(run, processes, random.Random(seed), len(_events(layout_of(undisturbed))))
    while len(killing.after) < KILLS * share:
        shutil.rmtree(cache, ignore_errors=True)  # so that clips are encoded again
        shutil.rmtree(run.layout.root, ignore_errors=True)
        while not (ended := killing.once()) and len(killing.after) < KILLS * share:
            pass
        if not ended:
            with run.start(processes, resume=True) as started:
                assert [started.status(rank, 120) for rank in range(processes)] == [0] * processes
        if not is_sharded:
            assert_equal_files(undisturbed, run.config)
            continue
        one, other = vectors(undisturbed), vectors(run.config)
        assert one.keys() == other.keys() and len(one) > 4
        assert all(torch.equal(one[name], other[name]) for name in one)
    print(f"killed {len(killing.after)} times after: {', '.join(killing.after)}")
