"""Files that the page shows or gives away: media with ranges, pictures of videos, downloads."""

from __future__ import annotations

import asyncio
import io
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request
from PIL import Image
from starlette.responses import FileResponse, Response

from onewan.errors import OnewanError
from onewan.media import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    extension,
    probe,
    read_frames,
    read_image,
)
from onewan.serving.roots import Roots

_TYPES = {
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".mov": "video/quicktime",
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
    ".gif": "image/gif",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".avif": "image/avif",
    ".bmp": "image/bmp",
}
"""What a browser may show itself; other files are only saved."""
_SAVED = (
    *VIDEO_SUFFIXES,
    *IMAGE_SUFFIXES,
    "safetensors", "pth", "pt", "gguf", "json", "jsonl", "yaml", "yml", "txt", "csv", "html",
    "parquet",
)  # fmt: skip
"""What may be saved; a folder of data can hold files that are nobody's business."""
_POSTER_SIDE = 360
"""Pixels of a picture's longer side."""
_AT_ONCE = 2
"""Pictures that are made at the same time: decoding takes a core each."""


def router(roots: Roots) -> APIRouter:
    """The routes ``/media`` and ``/poster``."""
    routes = APIRouter()
    slots = asyncio.Semaphore(_AT_ONCE)

    @routes.get("/media/{root}/{path:path}")
    async def media(root: str, path: str, save: Annotated[bool, Query()] = False) -> Response:
        """A file; with ``save=1`` the browser asks where to save it."""
        file = await asyncio.to_thread(_file, roots, root, path)
        kind = _TYPES.get(file.suffix.lower())
        shown = kind is not None and not save
        return FileResponse(
            file,
            media_type=kind or "application/octet-stream",
            filename=file.name,
            content_disposition_type="inline" if shown else "attachment",
            headers={"cache-control": "private, no-cache"},
        )

    @routes.get("/poster/{root}/{path:path}")
    async def poster(request: Request, root: str, path: str) -> Response:
        """A small picture of a video's first frame, or of an image."""
        file = await asyncio.to_thread(_file, roots, root, path)
        facts = file.stat()
        tag = f'"{facts.st_mtime_ns:x}-{facts.st_size:x}"'
        headers = {"etag": tag, "cache-control": "private, no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        async with slots:
            try:
                picture = await asyncio.to_thread(_poster, file, facts.st_mtime_ns, facts.st_size)
            except OnewanError:
                raise HTTPException(404, "no picture can be made of this file") from None
        return Response(picture, media_type="image/jpeg", headers=headers)

    return routes


def _file(roots: Roots, root: str, path: str) -> Path:
    try:
        file = roots.at(root, path)
    except OnewanError:
        raise HTTPException(404, "there is no such file") from None
    if not file.is_file() or extension(file) not in _SAVED:
        raise HTTPException(404, "there is no such file")
    return file


@lru_cache(maxsize=2000)
def _poster(file: Path, modified: int, size: int) -> bytes:
    del modified, size  # parts of the key: another file of this name has another picture
    if extension(file) in VIDEO_SUFFIXES:
        info = probe(file)
        pixels = next(iter(read_frames(file, [info.start])))
    else:
        pixels = read_image(file)
    picture = Image.fromarray(pixels)
    picture.thumbnail((_POSTER_SIDE, _POSTER_SIDE))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=80)
    return stream.getvalue()
