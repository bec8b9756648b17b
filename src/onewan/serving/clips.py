"""The data sets that the screen Data shows, and what its tabs share."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints

from onewan.config.load import dump_run, load_run, run_of_settings
from onewan.config.schema import ResolvedRun
from onewan.data.caption_edits import CaptionEdits
from onewan.data.caption_places import CaptionStore, Elsewhere, Place, Written
from onewan.data.clip_views import ClipViews, View
from onewan.data.spans import Strategy
from onewan.doctor.clip_set import ClipSet, Entry, clip_set, draw_contact_sheet
from onewan.errors import DataError, OnewanError
from onewan.files import replacing
from onewan.serving.commands import Commands
from onewan.serving.roots import Roots
from onewan.variants import VARIANTS, VariantName

_MOST_SETS = 8
"""Data sets that are kept in memory."""
_MOST_TABS = 200
"""Tabs of browsers whose edits can be taken back."""
_EXAMINED_AT_ONCE = 40
"""So few clips are examined without being asked to."""


_Text = Annotated[str, StringConstraints(strip_whitespace=True, max_length=4096)]


class ClipQuery(BaseModel, frozen=True):
    """What the address of the screen names: a run, a run file, or a folder with settings."""

    run: _Text = ""
    file: _Text = ""
    folder: _Text = ""
    variant: VariantName = "t2v-a14b"
    frames: Annotated[int | None, Field(ge=1, le=100_000)] = None
    size: _Text = ""
    fps: Annotated[float | None, Field(gt=0, le=1000)] = None
    strategy: Strategy | Literal[""] = ""
    masks: bool = False

    @property
    def kind(self) -> Literal["run", "file", "folder"] | None:
        """What it names; None if it names nothing."""
        return "run" if self.run else "file" if self.file else "folder" if self.folder else None

    @property
    def key(self) -> str:
        """A short name of it, for addresses and files."""
        return hashlib.blake2b(repr(self).encode(errors="surrogatepass"), digest_size=8).hexdigest()

    def config(self, roots: Roots, own: Path) -> tuple[Path, ResolvedRun]:
        """The run file and what is in it. What is found out about files is kept in `own` unless
        the run's cache is in the page's folders. OnewanError."""
        if self.folder:
            path = own / f"{Path(self.folder).name or 'clips'}.yaml"
            config = run_of_settings(self._settings(roots.inside(self.folder)), self.folder)
        else:
            path = roots.run(self.run) if self.run else roots.inside(self.file)
            config = load_run(path)
        for source in (*config.video_data.sources, *config.validation.sources):
            if isinstance(source.path, Path):
                roots.inside(source.path)
        try:
            roots.inside(config.video_data.cache_dir)
        except OnewanError:
            video_data = config.video_data.model_copy(update={"cache_dir": own / "cache"})
            config = config.model_copy(update={"video_data": video_data})
            path = own / "run.yaml"
        if self.folder or path == own / "run.yaml":
            with replacing(path) as temporary:
                temporary.write_text(dump_run(config), encoding="utf-8")
        return path, config

    def _settings(self, folder: Path) -> dict[str, Any]:
        video_data = {
            "sources": [str(folder)],
            "masks": self.masks,
            "resolution": self.size or None,
            "target_fps": self.fps,
        }
        wan_config = {"max_frames": self.frames, "frame_sample_strategy": self.strategy or None}
        return {
            "model": {"variant": self.variant, "path": VARIANTS[self.variant].repository},
            "video_data": {name: value for name, value in video_data.items() if value is not None},
            "wan_config": {name: value for name, value in wan_config.items() if value is not None},
        }


@dataclass(kw_only=True)
class OpenSet:
    """A data set that is shown."""

    key: str
    """Of its query."""
    run_file: Path
    clips: ClipSet
    sheets: tuple[Path, ...] = ()
    """The pages of its contact sheet, once that was drawn."""
    progress: str | None = None
    """How far `onewan doctor` is; None if it does not run."""
    task: asyncio.Task[None] | None = None
    """In which it is waited for."""
    failed: str | None = None
    """Why it could not look at the clips."""

    def address(self, entry: Entry, view: View) -> str:
        """Where a view of a clip is, see `onewan.serving.clip_routes`."""
        return f"/clips/{self.key}/{entry.number}/{view}"

    @property
    def sheet_addresses(self) -> list[str]:
        """Where the pages of the contact sheet are; others once they are drawn anew."""
        return [
            f"/clips/{self.key}/sheet/{number}?{page.stat().st_mtime_ns}"
            for number, page in enumerate(self.sheets)
        ]

    def stop(self) -> None:
        """Stop `onewan doctor`."""
        if self.task is not None:
            self.task.cancel()


@dataclass
class ClipSets:
    """The data sets that the page shows, with one store of captions for all of its tabs."""

    roots: Roots
    commands: Commands
    store: CaptionStore = field(default_factory=CaptionStore)
    _sets: OrderedDict[str, OpenSet] = field(default_factory=OrderedDict[str, OpenSet])
    _edits: OrderedDict[str, CaptionEdits] = field(default_factory=OrderedDict[str, CaptionEdits])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def folder(self) -> Path:
        """Where the page keeps what it makes of clips."""
        return self.roots.runs / ".page" / "clips"

    @cached_property
    def views(self) -> ClipViews:
        """The videos and pictures of clips."""
        return ClipViews(self.folder / "views")

    def edits(self, tab: str) -> CaptionEdits:
        """The edits of a tab of a browser, which it can take back."""
        edits = self._edits.setdefault(tab, CaptionEdits(self.store))
        self._edits.move_to_end(tab)
        while len(self._edits) > _MOST_TABS:
            self._edits.popitem(last=False)
        return edits

    def view(self, key: str, number: int, view: View) -> Path | None:
        """The file of a view of a clip; None if no data set with it is open. OnewanError if it
        can't be made, or a file of the clip is outside of the page's folders."""
        found = self._sets.get(key)
        if found is None or number >= len(found.clips.entries):
            return None
        clip = found.clips.entries[number].clip
        if clip is None:
            return None
        for path in clip.files:
            self.roots.inside(path)
        return self.views.file(clip, view, found.clips.config.model.facts())

    def sheets(self, key: str) -> tuple[Path, ...]:
        """The pages of the contact sheet of a data set, if it was drawn."""
        found = self._sets.get(key)
        return () if found is None else found.sheets

    def draw_sheet(self, found: OpenSet) -> None:
        """Draw the contact sheet of a data set, of the clips in the page's folders. OnewanError."""
        kept = found.clips.kept
        inside = [e for e in kept if all(map(self._is_inside, e.clip.files if e.clip else ()))]
        sheet = draw_contact_sheet(self.folder / found.key, found.clips.config, inside)
        found.sheets = sheet

    def examine(self, found: OpenSet) -> None:
        """Let `onewan doctor` look at all frames of a data set, in a process of its own."""
        if found.progress is None:
            found.progress, found.failed = "Looking at all frames...", None
            found.task = asyncio.create_task(self._examine(found))

    async def _examine(self, found: OpenSet) -> None:
        def told(line: str) -> None:
            found.progress = line.capitalize()

        try:
            arguments = ["doctor", str(found.run_file), "--json"]
            document = await self.commands.json_of(arguments, status=(0, 1), told=told)
            # Anew, since files may have changed, and changes of scene are known only now.
            clips = await asyncio.to_thread(self.clips, found.clips.config)
            clips.examined(document)
            found.clips = clips
        except OnewanError as error:
            found.failed = str(error)
        finally:
            found.progress = None

    async def open(self, query: ClipQuery, *, again: bool = False) -> OpenSet:
        """The data set of `query`, which is examined at once if it is small; `again` looks at all
        files anew. OnewanError."""
        found = await asyncio.to_thread(self._open, query, again)
        clips = found.clips
        if clips.examination is None and 0 < len(clips.kept) <= _EXAMINED_AT_ONCE:
            self.examine(found)
        return found

    def _open(self, query: ClipQuery, again: bool) -> OpenSet:
        if not again and (found := self._sets.get(query.key)):
            return found
        with self._lock:
            found = self._sets.get(query.key)  # opened meanwhile
            if found is None or again:
                run_file, config = query.config(self.roots, self.folder / query.key)
                found = OpenSet(key=query.key, run_file=run_file, clips=self.clips(config))
                self._sets[query.key] = found
            self._sets.move_to_end(query.key)
            while len(self._sets) > _MOST_SETS:
                self._sets.popitem(last=False)
            return found

    def clips(self, config: ResolvedRun) -> ClipSet:
        """The clips of `config` as they are now. OnewanError."""
        clips = clip_set(config)
        places = dict.fromkeys(entry.place for entry in clips.entries)
        clips.captions = self.read(p for p in places if not isinstance(p, Elsewhere))
        return clips

    def read(self, places: Iterable[Place]) -> dict[Place, Written]:
        """What the places say that can be read and are in the page's folders."""
        inside = [place for place in places if self._is_inside(place.path)]
        try:
            return self.store.read_all(inside)
        except DataError:
            found = dict[Place, Written]()
            for place in inside:
                try:
                    found[place] = self.store.read(place)
                except DataError:  # noqa: PERF203  (the others can be read; it is said when edited)
                    continue
            return found

    def edit(self, edits: CaptionEdits, place: Place, text: str, seen: Written) -> Written:
        """Write the caption that a tab has seen, unless it is another one by now. OnewanError."""
        self.roots.inside(place.path)
        return edits.edit(place, text, seen)

    def _is_inside(self, path: Path) -> bool:
        try:
            self.roots.inside(path)
        except OnewanError:
            return False
        return True
