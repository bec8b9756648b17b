"""Answers for addresses that have nothing, and after errors, of which they show nothing."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from onewan.serving.access import DEFECT

_NOT_FOUND = """<!doctype html><html lang="en"><title>Not found - onewan</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<body style="font-family: system-ui, sans-serif; margin: 40px"><h1>There is nothing here</h1>
<p>The run, file or page of this address does not exist, or not any more.</p>
<p><a href="/">Go to the list of runs</a></p></html>"""


async def not_found(request: Request, error: Exception) -> Response:
    """The answer for an address that has nothing."""
    del request, error
    return HTMLResponse(_NOT_FOUND, 404)


async def defect(request: Request, error: Exception) -> Response:
    """The answer after an error that is a defect of onewan."""
    # NiceGUI's own answer has the error's text; `Access` logs the error, which is raised again.
    del request, error
    return PlainTextResponse(DEFECT, 500)
