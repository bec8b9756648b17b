"""The addresses of what is seen of clips: their frames as they are trained, and contact sheets."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, HTTPException, Path
from starlette.responses import FileResponse, Response

from onewan.data.clip_views import View
from onewan.errors import OnewanError
from onewan.serving.clips import ClipSets

_Key = Annotated[str, Path(pattern=r"^[0-9a-f]{16}$")]
_Number = Annotated[int, Path(ge=0, le=1_000_000_000)]
_MISSING = "there is no such clip; open the screen Data again"


def router(sets: ClipSets) -> APIRouter:
    """The routes below ``/clips``."""
    routes = APIRouter()
    # Decoding takes a core, and a page of the grid asks for all of its pictures at once; videos
    # wait for each other alone, so that the one that is looked at does not wait for them.
    pictures, videos = asyncio.Semaphore(2), asyncio.Semaphore(1)

    @routes.get("/clips/{key}/sheet/{number}")
    async def sheet(key: _Key, number: _Number) -> Response:
        """A page of the contact sheet that was drawn last."""
        pages = sets.sheets(key)
        if number >= len(pages) or not await asyncio.to_thread(pages[number].is_file):
            raise HTTPException(404, "there is no such page")
        return FileResponse(pages[number], headers={"cache-control": "private, no-cache"})

    @routes.get("/clips/{key}/{number}/{view}")
    async def clip(key: _Key, number: _Number, view: View) -> Response:
        """A video or picture of a clip."""
        try:
            async with pictures if view == "poster" else videos:
                file = await asyncio.to_thread(sets.view, key, number, view)
        except OnewanError as error:
            raise HTTPException(404, str(error)) from None
        if file is None:
            raise HTTPException(404, _MISSING)
        return FileResponse(file, headers={"cache-control": "private, no-cache"})

    return routes
