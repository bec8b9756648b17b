"""`frame`: what all screens share: navigation, theme, heading, and where their content goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from nicegui import app, context, ui

from onewan.web.elements import set_defaults, text

SECTIONS = (
    ("Runs", "/"),
    ("New run", "/new"),
    ("Data", "/data"),
    ("Files", "/files"),
    ("Help", "/help"),
)
"""The screens of the navigation, and their addresses."""

THEMES = {"system": None, "light": False, "dark": True}
"""NiceGUI's values by the themes' names."""

_RESOURCES = f"/onewan/{version('onewan')}"


def add() -> None:
    """Serve the page's own styles and scripts, and set how its elements look."""
    set_defaults()
    folder = Path(str(files("onewan") / "resources"))
    # In this order: the first one that an address begins with is asked.
    app.add_static_files(f"{_RESOURCES}/pages", folder / "pages")
    app.add_static_files(_RESOURCES, folder / "web")


def resource(name: str) -> str:
    """The address of a file in ``resources/web``, or with ``pages/NAME`` in ``resources/pages``."""
    return f"{_RESOURCES}/{name}"


@contextmanager
def frame(
    title: str, section: str, *, styles: Sequence[str] = (), scripts: Sequence[str] = ()
) -> Iterator[None]:
    """The frame of a screen, whose elements are made in the block.

    `title` is the heading and the title of the browser's window; `section` is the address of its
    entry in the navigation. `styles` and `scripts` (ES modules) name files, see `resource`.
    """
    ui.page_title(f"{title} - onewan")
    for name in ("frame.css", *styles):
        ui.add_head_html(f'<link rel="stylesheet" href="{resource(name)}">')
    for name in scripts:
        ui.add_head_html(f'<script type="module" src="{resource(name)}"></script>')
    with ui.header().classes("ow-header"):
        text("span", "onewan").classes("ow-brand")
        with ui.element("nav").classes("ow-nav").props('aria-label="Screens"'):
            for name, address in SECTIONS:
                link = ui.link(name, address).classes("ow-tab")
                if address == section:
                    link.props('aria-current="page"')
        _theme_button()
    # Quasar's own element around it is a <main>.
    with ui.element("div").classes("ow-main") as main:
        ui.skip_link("Skip to content", target=main)
        text("h1", title).classes("ow-title")
        yield


def _theme_button() -> None:
    request = context.client.request
    cookie = "system" if request is None else request.cookies.get("onewan_theme", "system")
    names = list(THEMES)
    current = cookie if cookie in THEMES else "system"
    dark = ui.dark_mode(THEMES[current])

    def change() -> None:
        nonlocal current
        current = names[(names.index(current) + 1) % len(names)]
        dark.value = THEMES[current]
        button.props(f'aria-label="Theme: {current}"')
        tip.text = f"Theme: {current}"
        # For a year: the next screen is drawn in this theme at once, without a flash of another.
        ui.run_javascript(
            f'document.cookie = "onewan_theme={current};path=/;max-age=31536000;samesite=strict"'
        )

    button = ui.button(icon="contrast", on_click=change).classes("ow-theme")
    button.props(f'flat round dense aria-label="Theme: {current}"')
    with button:
        tip = ui.tooltip(f"Theme: {current}")
