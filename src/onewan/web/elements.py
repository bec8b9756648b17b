"""Small elements of which the screens are made: text, rows, cards, buttons, tables, dialogs.

Attributes are given by name, ``aria_label="Queue"`` for ``aria-label``, and are never parsed, so
that they may have names of files in them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from nicegui import ui
from nicegui.element import Element
from nicegui.elements.mixins.text_element import TextElement

from onewan.errors import OnewanError

_T = TypeVar("_T")
_E = TypeVar("_E", bound=Element)


def set_defaults() -> None:
    """How buttons and fields look where a screen says nothing else."""
    ui.button.default_props("no-caps")
    for field in (ui.input, ui.textarea, ui.number, ui.select):
        field.default_props("outlined dense stack-label")


def styled(element: _E, classes: str = "", **attributes: Any) -> _E:
    """`element` with classes and attributes."""
    element.classes(classes)
    for name, value in attributes.items():
        element.props[name.rstrip("_").replace("_", "-")] = value
    return element


def box(classes: str = "", tag: str = "div", **attributes: Any) -> Element:
    """An element for others: ``with box("ow-row"):``."""
    return styled(Element(tag), classes, **attributes)


def text(tag: str, content: object = "", classes: str = "", **attributes: Any) -> TextElement:
    """An element with a text, such as a heading: ``text("h2", "Samples")``."""
    return styled(TextElement(tag=tag, text=str(content)), classes, **attributes)


@contextmanager
def card(title: str, classes: str = "", level: str = "h2") -> Iterator[Element]:
    """A section with a frame around it and a heading, whose content is made in the block."""
    with box(f"ow-card {classes}", "section", aria_label=title) as section:
        text(level, title)
        yield section


def button(
    label: str,
    do: Callable[[], Any],
    look: Literal["filled", "outline", "flat"] = "flat",
    *,
    about: str = "",
    icon: str | None = None,
    small: bool = False,
) -> ui.button:
    """A button that calls or awaits `do`, and tells the user if it fails.

    `about` is what it is about, which screen readers say behind the label. With `icon` and
    no `label` it is round, and `about` is its name.
    """

    async def pressed() -> None:
        # The button may be replaced before the action has ended, but its tab is still there.
        with ui.context.client:
            try:
                result = do()
                if isinstance(result, Awaitable):
                    await result
            except (OnewanError, OSError) as error:
                tell(str(error), error=True)

    made = ui.button(label, icon=icon, on_click=pressed)
    made.props({"filled": "", "outline": "outline", "flat": "flat"}[look])
    if small:
        made.props("dense")
    if not label:
        made.props("round dense").tooltip(about)
    if about:
        made.props["aria-label"] = f"{label}: {about}" if label else about
    return made


def copy_button(content: str | Callable[[], str], label: str) -> None:
    """A button that copies a text, or what a function returns then, to the clipboard."""

    def copy() -> None:
        ui.clipboard.write(content if isinstance(content, str) else content())
        tell("Copied.")

    button(label, copy, icon="content_copy")


def table(
    heads: Sequence[str], rows: Iterable[Sequence[str | Callable[[], object]]], classes: str = ""
) -> None:
    """A table whose rows begin with their names. A cell that is a function makes its content."""
    with box("ow-scroll", tabindex="0"), box(f"ow-table {classes}", "table"):
        if heads:
            with box(tag="thead"), box(tag="tr"):
                for head in heads:
                    if head:
                        text("th", head, scope="col")
                    else:
                        text("td")
        with box(tag="tbody"):
            for row in rows:
                with box(tag="tr"):
                    for index, cell in enumerate(row):
                        if isinstance(cell, str):
                            text("td", cell) if index else text("th", cell, scope="row")
                        else:
                            with box(tag="td"):
                                cell()


def facts(pairs: Iterable[tuple[str, str]]) -> None:
    """A list of names with their values."""
    with box("ow-facts", "dl"):
        for name, value in pairs:
            text("dt", name)
            text("dd", value)


def view(element: Element, fill: Callable[..., object]) -> Callable[..., None]:
    """A function that shows values in `element`, as `fill` makes elements of them. While it is
    called with the same values, nothing is made anew, and so keeps the focus of the keyboard."""
    shown: list[tuple[Any, ...]] = []

    def show(*values: Any) -> None:
        if shown != [values]:
            shown[:] = [values]
            element.clear()
            with element:
                fill(*values)

    return show


@contextmanager
def dialog(title: str, classes: str = "") -> Iterator[ui.dialog]:
    """A dialog with a heading, whose elements are made in the block; it is not open yet, and
    removed when it is closed."""
    with ui.dialog() as made, ui.card().classes(f"ow-card {classes}"):
        made.props["aria-label"] = title
        text("h2", title)
        yield made
    made.on("hide", made.delete)


async def asked(title: str, question: str, yes: str, no: str = "Cancel") -> bool:
    """Whether the user says yes to what can't be undone."""
    with dialog(title) as made:
        text("p", question)
        with box("ow-row"):
            ui.button(yes, on_click=lambda: made.submit(True)).props('color="negative"')
            button(no, lambda: made.submit(False)).props("autofocus")
    answer = bool(await made)
    if not made.is_deleted:
        made.delete()
    return answer


def tell(message: str, *, error: bool = False) -> None:
    """Tell the user something in a corner; what went wrong stays until it is closed."""
    options: dict[str, Any] = {"timeout": 0, "close_button": "Close"} if error else {}
    ui.notify(
        message,
        type="negative" if error else "positive",
        position="bottom-right",
        multi_line=True,
        **options,
    )


async def attempt(action: Callable[[], _T]) -> _T | None:
    """What `action`, which blocks, returns; None if it fails, and then the user sees the error."""
    try:
        return await asyncio.to_thread(action)
    except (OnewanError, OSError) as error:
        tell(str(error), error=True)
        return None
