"""`command_card`: a command that the page runs, as people see it: how far it is, what it prints,
how to stop it, and its line for a terminal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from nicegui import background_tasks, ui

from onewan.errors import OnewanError
from onewan.serving.commands import Command
from onewan.web.elements import copy_button, tell, text

_SECONDS = 0.3
"""Between two changes of a card."""
_LINES = 40
"""Of the output that are shown."""


def command_card(command: Command, done: Callable[[], None] | None = None) -> None:
    """A card that follows `command` until it ends; `done` is called then, in the card, if it
    succeeded."""
    with ui.element("section").classes("ow-card ow-command") as card:
        card.props["aria-label"] = command.title
        text("h3", command.title)
        bar = ui.linear_progress(0, show_value=False, size="8px")
        bar.props["aria-label"] = f"Progress: {command.title}"
        state = ui.label().props('role="status"')
        output = ui.label().classes("ow-mono")
        with ui.row().classes("ow-row"):
            stop = ui.button("Stop", icon="stop").props("outline no-caps")
            copy_button(command.line, "Copy the command line")
        ui.label(command.line).classes("ow-mono ow-muted")
        results = ui.element("div")

    async def end() -> None:
        stop.disable()
        try:
            await command.stop()
        except OnewanError as error:
            tell(str(error), error=True)

    def show() -> None:
        progress, running = command.progress, command.result is None
        bar.value = progress.done / progress.total if progress and progress.total else 0
        bar.set_visibility(running)
        bar.props["indeterminate"] = progress is None
        state.text = _state(command)
        state.classes(replace="ow-bad" if command.result and not command.stopped else "")
        output.text = "\n".join(list(command.output)[-_LINES:])
        stop.set_visibility(running)

    async def follow() -> None:
        while not card.is_deleted:
            show()
            if command.result is not None:
                with results:
                    if command.result == 0 and done is not None:
                        done()
                return
            await command.news()
            await asyncio.sleep(_SECONDS)

    stop.on_click(end)
    background_tasks.create(follow(), name=f"show {command.line}")


def _state(command: Command) -> str:
    if command.result is None:
        if command.stopped:
            return "Stopping ..."
        return "Starting ..." if command.progress is None else command.progress.text
    if command.stopped:
        return "Stopped; what was not complete is removed."
    if command.result == 0:
        return "Done."
    return f"It ended with an error (exit status {command.result})."
