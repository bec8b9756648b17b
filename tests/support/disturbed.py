"""Runs of several processes to which something happens, and what is expected of them then."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from onewan.config.schema import ResolvedRun
from onewan.runs.layout import RunLayout
from onewan.train.saved_state import read_optimizer
from onewan.train.steps import Steps
from support.equal_runs import Trainer, assert_equal_files
from support.rank_processes import Processes, Torchrun, count, wait_for
from support.runs import layout_of

ENDS_WITHIN = 30.0
"""Seconds after a failure."""
HOST = socket.gethostname()
CONTINUES = "--resume continues from the newest saved state"


def killed_line(killed: int, other: int) -> str:
    """What the process `other` says when the process `killed` was."""
    return (
        f"onewan: rank {killed} on {HOST} was killed (by kill -9, or by the system, as when a "
        f"machine has no memory left), so rank {other} on {HOST} ends; {CONTINUES}"
    )


@dataclass(frozen=True)
class Disturbed:
    """A run to which something happens."""

    trainer: Trainer
    config: ResolvedRun
    command: list[str]
    """The arguments that train it."""
    extra: tuple[str, ...]

    @classmethod
    def of(cls, trainer: Trainer, *extra: str) -> Disturbed:
        overrides = [*trainer.settings, *extra, f"output.dir={trainer.folder / 'disturbed'}"]
        config = trainer.run_file(trainer.variant, *overrides)
        return cls(trainer, config, ["train", str(trainer.folder / "run.yaml"), *overrides], extra)

    @property
    def layout(self) -> RunLayout:
        return layout_of(self.config)

    @property
    def continued(self) -> list[str]:
        """The arguments that continue it, or start it."""
        return [*self.command, "--resume=auto"]

    def start(
        self,
        processes: int = 2,
        before: Callable[[int], object] | None = None,
        resume: bool = False,
    ) -> Processes:
        command = self.continued if resume else self.command
        return Processes(self.trainer.folder, processes, command, before=before)

    def finish(self) -> None:
        """Continue it to its end, which is that of a run to which nothing happens."""
        with self.start(resume=True) as processes:
            assert [processes.status(rank, 120) for rank in (0, 1)] == [0, 0]
        self.assert_as_undisturbed()

    def assert_as_undisturbed(self) -> None:
        undisturbed = self.trainer.train("undisturbed", 1, *self.extra)
        assert_equal_files(undisturbed, self.config)

    def wait_for(self, kind: str, before: int, started: Processes | Torchrun) -> None:
        """Wait for another event of a kind than the first `before`."""

        def is_there() -> bool:
            assert started.is_running, f"no event {kind}"
            return count(self.layout, kind) > before

        wait_for(is_there, 60, kind)


def assert_states_whole(layout: RunLayout) -> None:
    """Each saved state can be read; only a temporary folder may be half written."""
    for step in layout.saved_steps():
        files = sorted(layout.state(step).glob("*_optimizer.pt"))
        assert [read_optimizer(file).weights is not None for file in files] == [True, True]


def slow_steps(rank: int) -> None:
    """So that a test can meet a step."""
    del rank
    train = Steps._train

    def slowly(*given: object) -> object:
        time.sleep(0.1)
        return train(*given)  # pyright: ignore[reportArgumentType]

    Steps._train = slowly  # pyright: ignore[reportAttributeAccessIssue]
