"""From the settings of a source to its items: which module reads it, and what can't be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from onewan.config.clips import is_url
from onewan.data.clip import ClipSource, SourceKind
from onewan.data.companions import NOUNS, Role
from onewan.data.report import ClipProblem
from onewan.data.sources.archives import archives_of, read_archives
from onewan.data.sources.concepts import read_concepts
from onewan.data.sources.contents import SourceContents
from onewan.data.sources.copies import Copies
from onewan.data.sources.folder import read_folder
from onewan.data.sources.hugging_face import TABLE_NAMES, read_hugging_face, tables_of
from onewan.data.sources.names import pairing_key
from onewan.data.sources.nemo_curator import is_curated, read_curated
from onewan.data.sources.place import Listing, LocalPlace, Place, clip_name
from onewan.data.sources.remote import RemotePlace, protocol_problem, shown_url
from onewan.data.sources.rows import TABLE_SUFFIXES
from onewan.data.sources.table import TableReader
from onewan.errors import DataError
from onewan.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, extension
from onewan.runs.layout import displayed

_BY_SUFFIX: dict[str, SourceKind] = {
    "json": "concepts",
    "tar": "webdataset",
    **dict.fromkeys(TABLE_SUFFIXES, "table"),
}


@dataclass(frozen=True, slots=True)
class SourceReader:
    """Reads sources. `copies` is needed for archives and for what is on other machines."""

    video_formats: Sequence[str]
    use_masks: bool
    copies: Copies | None = None
    takes_condition_image: bool = True
    """Whether the model that is trained has a use for condition images."""
    takes_control: bool = True
    """Whether it has one for control videos."""

    def read(self, source: ClipSource) -> SourceContents:
        """The items of `source`, in an order that depends on names alone, and what is wrong.

        The files of the items are on this machine then. DataError if the source as a whole can't be
        read.
        """
        if source.use_masks is not None:
            self = replace(self, use_masks=source.use_masks)
        place = self._place(source.path)
        contents = self._contents(source, place)
        self._leave_out_unused(contents, source)
        if isinstance(place, RemotePlace):
            self._bring(contents, place)
        return contents

    def _leave_out_unused(self, contents: SourceContents, source: ClipSource) -> None:
        """Take the files that the model has no use for out of the items, and say so."""
        unused: list[Role] = []
        if not self.takes_condition_image:
            unused.append("condition")
            is_random = [item.condition or source.condition for item in contents.items]
            if random := is_random.count("random_frame"):
                contents.note(
                    f"condition: random_frame has no effect on {random} of {len(is_random)} clips "
                    f"of {label_of(source.path, short=True)}, since the model that is trained "
                    "takes no condition image"
                )
        if not self.takes_control:
            unused.append("control")
        for role in unused:
            field = {"condition": "condition_images", "control": "controls"}[role]
            number = sum(bool(getattr(item, field)) for item in contents.items)
            if number:
                what = f"{NOUNS[role]} is" if number == 1 else f"{NOUNS[role]}s are"
                contents.note(
                    f"{number} {what} not used, since the model that is trained takes none: "
                    f"{label_of(source.path, short=True)}"
                )
            contents.items = [replace(item, **{field: ()}) for item in contents.items]

    def _place(self, path: Path | str) -> Place:
        if isinstance(path, Path):
            return LocalPlace(path)
        return self._needed_copies().remote.place(path)

    def _needed_copies(self) -> Copies:
        if self.copies is None:
            raise ValueError("a source of archives or of another machine needs a folder for copies")
        return self.copies

    def _contents(self, source: ClipSource, place: Place) -> SourceContents:
        kind = kind_of(source)
        if kind == "concepts":
            if not isinstance(place, LocalPlace):
                raise DataError(f"{place.label}: OneTrainer's concepts are read from a local file")
            return read_concepts(place.path, self.video_formats, use_masks=self.use_masks)
        if kind == "webdataset":
            return read_archives(
                place, self._needed_copies(), self.video_formats, use_masks=self.use_masks
            )
        if kind == "table":
            contents = SourceContents()
            reader = TableReader(place, self.video_formats, self.use_masks, contents)
            for table in place.files():
                reader.read(table)
            return contents
        listing = place.listing(recursive=source.recursive)
        contents = self._folder_contents(source, kind, place, listing)
        if not contents.items and not contents.problems:
            reason = "has no video or image to train on"
            if any(extension(path) == "tar" for path in listing.paths):
                reason += "; kind: webdataset reads its tar archives"
            contents.problems.append(ClipProblem(path=listing.folder, reason=reason))
        return contents

    def _folder_contents(
        self, source: ClipSource, kind: SourceKind, place: Place, listing: Listing
    ) -> SourceContents:
        """A folder of one of the kinds; `auto` is found out."""
        is_auto = kind == "auto" and not _has_captioned_clip(listing)
        if kind == "nemo_curator" or (is_auto and is_curated(listing)):
            return _chosen(read_curated(place, listing, self.video_formats), source, listing)
        tables = tables_of(listing)
        if kind == "hugging_face" and not tables:
            reason = f"`kind: hugging_face` needs one of {', '.join(TABLE_NAMES)}; there is none"
            problem = ClipProblem(path=listing.folder, reason=reason)
            return SourceContents(problems=[*listing.problems, problem])
        if kind == "hugging_face" or (is_auto and tables):
            contents = read_hugging_face(
                place, listing, self.video_formats, use_masks=self.use_masks
            )
            return _chosen(contents, source, listing)
        contents = read_folder(
            listing,
            place.label,
            self.video_formats,
            patterns=source.patterns,
            use_masks=self.use_masks,
        )
        if tables and kind == "auto":
            contents.note(
                f"{tables[0].name} in {place.label} is not used, since its clips have captions in "
                "NAME.txt; kind: hugging_face takes those of the table"
            )
        return contents

    def _bring(self, contents: SourceContents, place: RemotePlace) -> None:
        """Copy the files of all items; those that can't be copied become problems."""
        wanted = [
            path for item in contents.items for path in (item.path, *item.texts, *item.companions)
        ]
        failed = place.fetch(wanted)
        contents.problems += [ClipProblem(path=path, reason=why) for path, why in failed.items()]
        contents.items = [
            item
            for item in contents.items
            if not failed.keys() & {item.path, *item.texts, *item.companions}
        ]


def _chosen(contents: SourceContents, source: ClipSource, listing: Listing) -> SourceContents:
    """`contents` with the items that the patterns of the source allow."""
    items = [
        item
        for item in contents.items
        if source.patterns.allow(clip_name(item.path, listing.folder))
    ]
    if left_out := len(contents.items) - len(items):
        place, total = label_of(source.path, short=True), len(contents.items)
        contents.note(f"{left_out} of {total} clips of {place} are left out by include / exclude")
    contents.items = items
    return contents


def _has_captioned_clip(listing: Listing) -> bool:
    """Whether a video or image has a text file of its name: then the folder is an ordinary one."""
    texts = {pairing_key(p.with_suffix("")) for p in listing.paths if extension(p) == "txt"}
    return any(
        extension(path) in IMAGE_SUFFIXES | VIDEO_SUFFIXES
        and pairing_key(path.with_suffix("")) in texts
        for path in listing.paths
    )


def kind_of(source: ClipSource) -> SourceKind:
    """What `source` is by its setting or its path; "auto" is a folder of some kind."""
    path = source.path
    if source.kind != "auto" or (isinstance(path, Path) and path.is_dir()):
        return source.kind
    name = path.name if isinstance(path, Path) else PurePosixPath(shown_url(path)).name
    return _BY_SUFFIX.get(extension(Path(name)), "auto")


def label_of(path: Path | str, *, short: bool = False) -> str:
    """The path or address of a source, for messages; `short`: as a user would type it."""
    if isinstance(path, str):
        return shown_url(path)
    return str(displayed(path) if short else path)


def source_problem(source: ClipSource, key_path: str) -> str | None:
    """What is wrong with the source that the run file names at `key_path`; None if it can be read,
    or if it is on another machine, which is not asked here."""
    path, remedy = source.path, f"correct {key_path} in the run file"
    if isinstance(path, str):
        problem = protocol_problem(path) if is_url(path) else "is no address"
        return f"{problem}; {remedy}" if problem else None
    try:
        kind = kind_of(source)
        if kind == "webdataset":
            found = any(archive.is_file() for archive in archives_of(path))
            return None if found else f"stands for no file; {remedy}"
        if kind in ("table", "concepts"):
            return None if path.is_file() else f"is not a file; {remedy}"
        if path.is_dir():
            return None
        if path.is_file():
            kinds = ", ".join(sorted(_BY_SUFFIX))
            return f"is not a folder, nor a file that lists clips ({kinds}); {remedy}"
        return f"is not a folder; {remedy}"
    except ValueError as error:
        return f"{error}; {remedy}"
    except OSError as error:
        remedy = f"check the permissions of the folders above it, or {remedy}"
        return f"can't be read ({error.strerror}); {remedy}"
