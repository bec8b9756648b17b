"""`application`: the page as a web application, with all screens and routes."""

from __future__ import annotations

from fastapi import FastAPI
from nicegui import app, ui
from starlette.types import ASGIApp

from onewan.serving import answers, media
from onewan.serving.commands import Commands
from onewan.serving.roots import Roots
from onewan.web import frame
from onewan.web.page import Page
from onewan.web.screens import data, files, help, new_run, run, runs

_SCREENS = (runs, run, new_run, data, files, help)


def application(roots: Roots, commands: Commands) -> ASGIApp:
    """The page; whoever serves it decides who may use it."""
    add_screens(Page(roots=roots, commands=commands))
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    ui.run_with(
        outer,
        title="onewan",
        language="en-US",
        dark=None,
        tailwind=False,
        gzip_middleware_factory=None,  # `onewan.serving` leaves media alone
        show_welcome_message=False,
        cache_control_directives="private, max-age=86400",
    )
    return outer


def add_screens(page: Page) -> None:
    """Register all screens and routes of the page with NiceGUI's application."""
    app.add_exception_handler(404, answers.not_found)
    app.add_exception_handler(Exception, answers.defect)
    frame.add()
    app.include_router(media.router(page.roots))
    for screen in _SCREENS:
        screen.add(page)
