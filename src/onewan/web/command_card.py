"""`command_card`: a command that the page runs, as people see it: how far it is, what it prints,
how to stop it, its line for a terminal, and what it has written."""

from __future__ import annotations

import asyncio

from nicegui import background_tasks, ui

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.serving.commands import Command
from onewan.serving.roots import Roots
from onewan.web.elements import box, button, card, copy_button, styled, text

_SECONDS = 0.3
"""Between two changes of a card."""
_LINES = 40
"""Of the output that are shown."""


def command_card(roots: Roots, command: Command) -> None:
    """A card that follows `command` until it ends."""

    async def end() -> None:
        stop.disable()
        await command.stop()

    with card(command.title, "ow-command", "h3") as made:
        bar = ui.linear_progress(0, show_value=False, size="8px")
        styled(bar, aria_label=f"Progress: {command.title}")
        state = text("div", role="status")
        output = text("div", classes="ow-mono")
        with box("ow-row"):
            stop = button("Stop", end, "outline", icon="stop")
            copy_button(command.line, "Copy the command line")
        text("div", command.line, "ow-mono ow-muted")

    def show() -> None:
        progress, running = command.progress, command.result is None
        bar.value = progress.done / progress.total if progress and progress.total else 0
        bar.props["indeterminate"] = progress is None
        state.text = command.state
        state.classes(replace="ow-bad" if command.result and not command.stopped else "")
        output.text = "\n".join(list(command.output)[-_LINES:])
        for each in (bar, stop):
            each.set_visibility(running)

    async def follow() -> None:
        while command.result is None and not made.is_deleted:
            show()
            await command.news()
            await asyncio.sleep(_SECONDS)
        if not made.is_deleted:
            show()
            with made:
                _written(roots, command)

    background_tasks.create(follow(), name=f"show {command.line}")


def _written(roots: Roots, command: Command) -> None:
    """Links to what a command has written."""
    for file in command.written():
        address = roots.address(file)
        with box("ow-row"):
            ui.link(file.name, address.replace("/media/", "/files/", 1))
            if file.is_file():
                text("span", format_bytes(file.stat().st_size), "ow-muted")
                ui.link("Download", f"{address}?save=1")
