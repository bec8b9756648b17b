"""What the Run screen's scripts ask for: answers of `serving.feed` below ``/api/run/NAME``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request
from starlette.responses import Response

from onewan.errors import OnewanError
from onewan.serving.feed import Answer, Feed, Feeds

_Step = Annotated[float | None, Query(ge=0, le=1e12)]
_After = Annotated[int, Query(ge=0, le=1 << 53)]


def router(feeds: Feeds) -> APIRouter:
    """The routes below ``/api/run/NAME``."""
    routes = APIRouter()

    async def answer(
        request: Request, name: str, question: Callable[[Feed], Any] | None
    ) -> Response:
        """The answer to a question, or without one the summary."""
        try:
            asked = feeds.summary(name) if question is None else feeds.ask(name, question)
            found = await asked
        except OnewanError as error:
            raise HTTPException(404, error.message) from None
        except OSError:
            raise HTTPException(503, "the run's folder can't be read now") from None
        made = found if isinstance(found, Answer) else Answer.of(found)
        tag = f'"{made.tag}"'
        headers = {"etag": tag, "cache-control": "private, no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        headers["content-encoding"] = "gzip"  # every browser takes it
        return Response(made.body, media_type="application/json", headers=headers)

    @routes.get("/api/run/{name}/summary")
    async def summary(request: Request, name: str) -> Response:
        """How the run stands; its "versions" tell which of the other answers have changed."""
        return await answer(request, name, None)

    @routes.get("/api/run/{name}/plots")
    async def plots(
        request: Request, name: str, first: _Step = None, last: _Step = None
    ) -> Response:
        """The plots; with the steps `first` and `last` those of a part of the curves."""
        if first is None or last is None:
            return await answer(request, name, Feed.plots)
        return await answer(request, name, lambda feed: feed.part(first, last))

    @routes.get("/api/run/{name}/samples")
    async def samples(request: Request, name: str) -> Response:
        """The sample videos."""
        return await answer(request, name, Feed.samples)

    @routes.get("/api/run/{name}/events")
    async def events(request: Request, name: str, after: _After = 0) -> Response:
        """Lines about events; `after` is the "next" of the answer before."""
        return await answer(request, name, lambda feed: feed.events(after))

    @routes.get("/api/run/{name}/log")
    async def log(request: Request, name: str, after: _After = 0) -> Response:
        """Lines of the log; `after` is the "next" of the answer before."""
        return await answer(request, name, lambda feed: feed.log(after))

    return routes
