"""Sample videos in a page: as data up to a number of bytes, or as links to the files.

A page with links shows its videos where the run folder is; one with data wherever it is sent.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.errors import DataError
from onewan.media import Fit, probe, read_frames
from onewan.pages.document import data_uri, text
from onewan.report.record import SampleVideo

_POSTER_WIDTH = 320
_MOST_POSTERS = 240
"""Of a page; reading one takes up to 50 ms."""
_JPEG_QUALITY = 80
_TYPES = {".mp4": "video/mp4", ".webm": "video/webm"}


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoChoice:
    """Which videos are in the page itself."""

    most_bytes: int | None = 20_000_000
    """Of all videos together: so many that the page can be attached to a message. None is all of
    them, 0 none."""


class PageVideos:
    """The videos of one page, which is written into `folder`."""

    def __init__(self, choice: VideoChoice, folder: Path, wanted: Iterable[SampleVideo]) -> None:
        """`wanted` are those of the page, the most important ones first."""
        self._folder = folder.absolute()
        self._most = choice.most_bytes
        self._embedded = set[Path]()
        self.bytes = 0
        """Of the videos in the page."""
        self.linked = 0
        """Videos that the page has links to."""
        self._posters = 0
        for video in wanted:
            size = _size(video.path)
            if size is None:
                continue
            if choice.most_bytes is None or self.bytes + size <= choice.most_bytes:
                self._embedded.add(video.path)
                self.bytes += size
            else:
                self.linked += 1

    @property
    def note(self) -> str:
        """How the page has its videos."""
        inside, linked = len(self._embedded), self.linked
        if not inside and not linked:
            return ""
        if not linked:
            return f"All videos are in this page ({format_bytes(self.bytes)})."
        where = "so they play where this page and the run folder are in their places"
        if not inside:
            return f"The videos are links to the files in the run folder, {where}."
        return (
            f"{inside} videos are in this page ({format_bytes(self.bytes)}); the other {linked} "
            f"are links to the files in the run folder, {where}. With --embed the page has more."
        )

    def html(self, video: SampleVideo, caption: str, label: str) -> Iterator[str]:
        """One video with its `caption`; `label` names it for who can't see it."""
        yield '<figure class="cell">'
        if (size := _size(video.path)) is None:
            yield '<p class="gone">This file is no longer there.</p>'
        else:
            source = self._address(video.path)
            poster, width, height = self._poster(video.path)
            sizes = f'width="{width}" height="{height}"' if width else ""
            yield (
                f'<div class="player"><video {sizes} muted playsinline controls preload="none" '
                f'aria-label="{text(label)}"{poster} src="{source}" data-bytes="{size}"></video>'
                '<p class="gone">This video can\'t be played here.</p></div>'
            )
        yield f"<figcaption>{text(caption)}</figcaption></figure>"

    def _address(self, path: Path) -> str:
        if path in self._embedded:
            return data_uri(_TYPES.get(path.suffix, "video/mp4"), path.read_bytes())
        try:
            parts = Path(os.path.relpath(path.absolute(), self._folder)).parts
        except ValueError:  # on another drive of Windows
            return path.absolute().as_uri()
        return "/".join(quote(part) for part in parts)

    def _poster(self, path: Path) -> tuple[str, int, int]:
        """(the attribute with the first frame, width and height of the video)."""
        if self._posters >= _MOST_POSTERS:
            return "", 0, 0
        self._posters += 1
        try:
            info = probe(path)
            width, height = info.shown_size
            small = min(_POSTER_WIDTH, width)
            fit = Fit(small, max(1, round(height * small / width)))
            (frame,) = read_frames(path, [info.start], fit, threads=1)
        except (DataError, OSError):  # one that is damaged has no picture, and says so when played
            return "", 0, 0
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=_JPEG_QUALITY)
        return f' poster="{data_uri("image/jpeg", file.getvalue())}"', width, height


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def first_and_last_first(videos: Sequence[SampleVideo]) -> list[SampleVideo]:
    """`videos` by their importance: those of the last step, of the first one, then backwards."""
    steps = sorted({video.step for video in videos}, reverse=True)
    order = dict.fromkeys([*steps[:1], *steps[-1:], *steps])
    return [video for step in order for video in videos if video.step == step]


def some_steps(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of the ascending `steps` at equal distances, the first and the last one among
    them."""
    if len(steps) <= most:
        return list(steps)
    last = len(steps) - 1
    return [steps[round(index * last / (most - 1))] for index in range(most)]
