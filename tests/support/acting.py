"""What a user of the page sees and does, as NiceGUI's `User`; each waits until it is possible."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from nicegui import ui
from nicegui.testing.user import User
from nicegui.testing.user_interaction import UserInteraction


def seen(user: User) -> list[str]:
    """All texts on the screen, in their order."""
    with user:
        found = [*ui.context.client.elements.values()]
    texts = [getattr(element, "text", "") for element in found if element.visible]
    return [text for text in texts if text]


async def until(true: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not become true"
        await asyncio.sleep(0.05)


async def see(user: User, *texts: str, seconds: float = 10) -> None:
    """Wait until each of `texts` is on the screen, as a part of an element's text."""
    for text in texts:
        await until(lambda text=text: any(text in one for one in seen(user)), seconds)


async def see_no(user: User, text: str) -> None:
    await until(lambda: not any(text in one for one in seen(user)))


async def press(user: User, label: str) -> None:
    """Press the button with this text, or with this name for screen readers, once it is there."""

    def found() -> list[ui.button]:
        with user:
            elements = list(ui.context.client.elements.values())
        every = [element for element in elements if isinstance(element, ui.button)]
        return [one for one in every if label in (one.props.get("aria-label"), one.text)]

    await until(lambda: bool(found()))
    UserInteraction(user, {found()[-1]}, None).click()


async def until_told(user: User, text: str) -> None:
    await until(lambda: any(text in message for message in user.notify.messages))
