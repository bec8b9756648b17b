"""`Page`: what the screens work with."""

from __future__ import annotations

from collections.abc import Callable

from nicegui import Client, Event

from onewan.runs.actions import Action
from onewan.serving.commands import Commands
from onewan.serving.roots import Roots
from onewan.serving.watching import Watch
from onewan.web.elements import asked, attempt, tell


class Page:
    """What the screens work with."""

    def __init__(self, *, roots: Roots, commands: Commands) -> None:
        self.roots, self.commands = roots, commands
        self.jobs_changed = Event[[]]()
        """`watch.jobs.now` is another one."""
        self.machine_changed = Event[[]]()
        self.watch = Watch(
            roots.runs,
            jobs_changed=self.jobs_changed.emit,
            machine_changed=self.machine_changed.emit,
            is_seen=lambda: bool(Client.instances),
        )
        """All runs, their queue and the machine."""

    async def do(self, action: Callable[[], str | None]) -> bool:
        """Run `action`, which blocks, and tell the user the line that it returns, or what is wrong;
        returns whether it succeeded. What it has changed is looked at without delay."""
        line = await attempt(lambda: action() or "")
        self.watch.wake()
        if line:
            tell(line)
        return line is not None

    async def act(self, action: Action) -> None:
        """Do what a button offers, after the question that it may have."""
        question = action.question
        if question is None or await asked(action.title, question(), action.label):
            await self.do(action.do)
