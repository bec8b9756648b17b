"""`Watch`: the one loop of the page that looks at runs, queue and machine, for all who watch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

from onewan.runs.jobs import Jobs
from onewan.runs.machine import Machine

log = logging.getLogger(__name__)

_TURN_SECONDS = 1.0
"""Between two looks at the runs; a killed trainer is noticed within a few of them."""
_MACHINE_SECONDS = 3.0


class Watch:
    """Calls `Jobs.turn` until the page ends, and tells its screens what has changed."""

    def __init__(
        self,
        runs: Path,
        *,
        jobs_changed: Callable[[], object],
        machine_changed: Callable[[], object],
        is_seen: Callable[[], bool],
    ) -> None:
        """`jobs_changed` is called when `jobs.now` is another one, `machine_changed` when the
        machine was read, which is done only while `is_seen`."""
        self.machine = Machine(runs)
        self.jobs = Jobs(runs, lambda: len(self.machine.now.gpus))
        self._jobs_changed, self._machine_changed = jobs_changed, machine_changed
        self._is_seen = is_seen
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; needs a running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End the loop. Trainers continue."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def wake(self) -> None:
        """Let it look without delay, since something was changed."""
        self._woken.set()

    async def _run(self) -> None:
        read = 0.0
        # GPUs first, since the names of devices depend on them.
        with contextlib.suppress(OSError):
            await asyncio.to_thread(self.machine.read)
        while True:
            try:
                await self._look()
                if self._is_seen() and time.monotonic() - read >= _MACHINE_SECONDS:
                    read = time.monotonic()
                    await asyncio.to_thread(self.machine.read)
                    self._machine_changed()
            except Exception:  # a defect is in the log, and must not end the loop
                log.exception("looking at the runs failed")
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._woken.wait(), _TURN_SECONDS)
            self._woken.clear()

    async def _look(self) -> None:
        before = self.jobs.now
        while True:
            now = await asyncio.to_thread(self.jobs.turn)
            if now != before:
                self._jobs_changed()
            if now.complete or now.problem:
                return
            before = now
