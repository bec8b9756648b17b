"""What NeMo Curator's video pipeline writes: ``clips/UUID.mp4`` with ``metas/v0/UUID.json``.

The layout is that of ``ClipWriterStage`` (nemo_curator/stages/video/io/clip_writer.py): captions
are in the ``windows`` of a clip, one for each captioning model, with the frames that they are
about.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from onewan.data.report import ClipProblem
from onewan.data.sources.contents import SourceContents
from onewan.data.sources.folder import unusable_reason
from onewan.data.sources.item import SourceItem
from onewan.data.sources.place import Listing, Place
from onewan.documents import decode_text
from onewan.files import read_input
from onewan.media import extension

_CLIPS, _METAS = "clips", "metas"
_MAX_BYTES = 16 << 20


def is_curated(listing: Listing) -> bool:
    """Whether the files of a folder are such an output."""
    tops = {path.relative_to(listing.folder).parts[0] for path in listing.paths}
    return {_CLIPS, _METAS} <= tops and any(_metas(listing))


def read_curated(place: Place, listing: Listing, video_formats: Sequence[str]) -> SourceContents:
    """The clips that passed the filters and have captions, a window of frames for each."""
    contents = SourceContents([], list(listing.problems), list(listing.warnings))
    by_name = {path.stem: path for path in _below(listing, _CLIPS)}
    metas = list(_metas(listing))
    failed = place.fetch(metas)
    without_clip = 0
    for meta in metas:
        try:
            if meta in failed:
                raise ValueError(failed[meta])
            clip = by_name.get(meta.stem)
            if clip is None:  # filtered out by the pipeline, which writes it to another folder
                without_clip += 1
                continue
            if reason := unusable_reason(extension(clip), video_formats):
                contents.problems.append(ClipProblem(path=clip, reason=reason))
                continue
            contents.items += _items(clip, listing.folder, _read(meta), meta.name)
        except ValueError as error:
            contents.problems.append(ClipProblem(path=meta, reason=str(error)))
    if without_clip:
        contents.note(
            f"{without_clip} of {len(metas)} clips in {place.label} are left out, since they were "
            f"filtered: they are not in {_CLIPS}"
        )
    return contents


def _metas(listing: Listing) -> Iterator[Path]:
    return (path for path in _below(listing, _METAS) if extension(path) == "json")


def _below(listing: Listing, folder: str) -> Iterator[Path]:
    for path in listing.paths:
        if path.relative_to(listing.folder).parts[0] == folder:
            yield path


def _read(meta: Path) -> dict[str, Any]:
    try:
        data = json.loads(decode_text(read_input(meta, _MAX_BYTES)))
    except OSError as error:
        raise ValueError(f"can't be read ({error.strerror})") from error
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(data, dict):
        raise ValueError("is no JSON object")
    return cast("dict[str, Any]", data)


def _items(clip: Path, folder: Path, meta: dict[str, Any], origin: str) -> list[SourceItem]:
    windows = meta.get("windows")
    given = cast("list[object]", windows) if isinstance(windows, list) else []
    found = list[tuple[int, str]]()
    for window in given:
        values = cast("dict[str, object]", window) if isinstance(window, dict) else {}
        # A language model's version of a caption is the better one, and is named after it.
        names = [name for name in values if name.endswith("_caption")]
        names.sort(key=lambda name: (not name.endswith("_enhanced_caption"), name))
        captions = [str(values[name]).strip() for name in names if values[name]]
        start = values.get("start_frame")
        if captions:
            found.append((start if isinstance(start, int) else 0, captions[0]))
    if not found:
        raise ValueError("has no caption; run the pipeline with generate_captions")
    rate = meta.get("framerate")
    fps = float(rate) if isinstance(rate, (int, float)) and rate > 0 else 0.0
    if len(found) > 1 and not fps:
        raise ValueError("has several windows and no framerate, so that their times are unknown")
    items = list[SourceItem]()
    for number, (frame, caption) in enumerate(found):
        is_last = number == len(found) - 1
        start = frame / fps if frame and fps else 0.0
        name = clip.relative_to(folder).as_posix()
        items.append(
            SourceItem(
                path=clip,
                name=name if len(found) == 1 else f"{name}@{start:g}",
                captions=(" ".join(caption.split()),),
                start=start,
                # A window ends where the next one begins.
                end=None if is_last else found[number + 1][0] / fps,
                origin=origin,
            )
        )
    return items
