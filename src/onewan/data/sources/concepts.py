"""OneTrainer's ``concepts.json``: a list of folders, each with settings of its own.

Read as OneTrainer reads it. What only OneTrainer does with a concept, such as augmentation, is a
note. `onewan import-config` turns a whole configuration into a run file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from onewan.data.captions import read_caption_file
from onewan.data.report import ClipProblem
from onewan.data.sources.contents import SourceContents
from onewan.data.sources.folder import read_folder
from onewan.data.sources.item import SourceItem
from onewan.data.sources.place import LocalPlace, first_few
from onewan.documents import decode_text, format_value
from onewan.errors import DataError
from onewan.files import read_input

_MAX_BYTES = 16 << 20
_TYPES = ("STANDARD", "VALIDATION", "PRIOR_PREDICTION")
_HARMLESS = "enable_crop_jitter"
"""On by default, and changes little."""


def read_concepts(file: Path, video_formats: Sequence[str], *, use_masks: bool) -> SourceContents:
    """The clips of all concepts that are enabled."""
    contents = SourceContents()
    try:
        data = json.loads(decode_text(read_input(file, _MAX_BYTES)))
    except OSError as error:
        contents.problems.append(ClipProblem(path=file, reason=f"can't be read ({error.strerror})"))
        return contents
    except (ValueError, RecursionError) as error:
        reason = f"is no valid JSON ({error})"
        contents.problems.append(ClipProblem(path=file, reason=reason))
        return contents
    concepts = cast("list[object]", data) if isinstance(data, list) else []
    if not concepts or not all(isinstance(concept, dict) for concept in concepts):
        reason = "is no list of OneTrainer's concepts; a table of clips is csv, jsonl or parquet"
        contents.problems.append(ClipProblem(path=file, reason=reason))
        return contents
    for number, concept in enumerate(cast("list[dict[str, Any]]", concepts)):
        reader = _ConceptReader(file, f"concept {number}", concept, video_formats, use_masks)
        if concept.get("enabled", True) is not False:
            contents.add(reader.read())
    return contents


@dataclass(frozen=True, slots=True)
class _ConceptReader:
    file: Path
    label: str
    concept: dict[str, Any]
    video_formats: Sequence[str]
    use_masks: bool

    def read(self) -> SourceContents:
        """The clips of the concept, or all that is wrong with it."""
        wrong = list[str]()
        folder = self._folder(wrong)
        # Until version 2 of concepts.
        was_validation = self.concept.get("validation_concept") is True
        kind = self.concept.get("type", "VALIDATION" if was_validation else "STANDARD")
        if kind not in _TYPES:
            wrong.append(f"type must be one of {', '.join(_TYPES)}, got {format_value(kind)}")
        weight = self._number("loss_weight", wrong)
        # Until version 1 of concepts it was called repeats.
        is_old = "repeats" in self.concept and "balancing" not in self.concept
        balancing = self._number("repeats" if is_old else "balancing", wrong)
        if wrong or folder is None:
            problems = [ClipProblem(path=self.file, reason=f"{self.label}: {w}") for w in wrong]
            return SourceContents(problems=problems)
        recursive = bool(self.concept.get("include_subdirectories", False))
        place = LocalPlace(folder)
        contents = read_folder(
            place.listing(recursive=recursive),
            place.label,
            self.video_formats,
            use_masks=self.use_masks,
        )
        if not contents.items and not contents.problems:
            reason = f"{self.label}: {place.label} has no video or image to train on"
            contents.problems.append(ClipProblem(path=self.file, reason=reason))
        repeats = self._repeats(balancing, len(contents.items), contents)
        contents.items = [
            replace(
                item,
                repeats=repeats,
                weight=weight,
                is_prior=kind == "PRIOR_PREDICTION",
                split="validation" if kind == "VALIDATION" else None,
                origin=f"{self.file.name}, {self.label}",
            )
            for item in contents.items
        ]
        self._add_captions(contents)
        self._note_the_rest(contents)
        return contents

    def _folder(self, wrong: list[str]) -> Path | None:
        """The concept's folder."""
        path = self.concept.get("path")
        if not isinstance(path, str) or not path or "\0" in path:
            wrong.append(f"path must be that of a folder, got {format_value(path)}")
            return None
        found = next(filter(Path.is_dir, self._places(path)), None)
        if found is None:
            above = f"from {self.file.parent} or above"
            wrong.append(f"path {format_value(path)} is not a folder, {above}")
        return found

    def _places(self, path: str) -> Iterator[Path]:
        """What `path` may stand for: OneTrainer's paths are relative to its own folder, which the
        file is in or below, and may have been written on Windows."""
        for base in self.file.parents[:2]:
            for text in (path, path.replace("\\", "/")):
                yield base / text

    def _number(self, key: str, wrong: list[str]) -> float:
        value = self.concept.get(key, 1.0)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e9:
            return float(value)
        wrong.append(f"{key} must be a number above 0, got {format_value(value)}")
        return 1.0

    def _repeats(self, balancing: float, clips: int, contents: SourceContents) -> int:
        exact = balancing
        if self.concept.get("balancing_strategy", "REPEATS") == "SAMPLES":
            # The concept's clips per epoch, instead of repeats of each.
            exact = balancing / clips if clips else 1.0
        repeats = max(1, round(exact))
        if repeats != exact:
            contents.note(
                f"{self.label} of {self.file.name} repeats each clip {exact:g} times; whole "
                f"numbers are possible, so {repeats} is used"
            )
        return repeats

    def _add_captions(self, contents: SourceContents) -> None:
        """The captions of a concept that does not take them from NAME.txt."""
        text = _object(self.concept.get("text"))
        source = text.get("prompt_source", "sample")
        if source == "filename":
            contents.items = [
                replace(item, captions=(item.path.stem,), texts=()) for item in contents.items
            ]
        elif source == "concept":
            path = str(text.get("prompt_path", ""))
            file = next(filter(Path.is_file, self._places(path)), None)
            if file is None:
                reason = f"{self.label}: prompt_path {format_value(path)} is not a file"
                contents.problems.append(ClipProblem(path=self.file, reason=reason))
                contents.items = list[SourceItem]()
                return
            try:
                lines = read_caption_file(file, [file]).lines or ("",)
            except DataError as error:
                contents.problems.append(ClipProblem.from_error(file, error))
                contents.items = list[SourceItem]()
                return
            contents.items = [replace(item, captions=lines, texts=()) for item in contents.items]
        elif source != "sample":
            contents.note(
                f"{self.label} of {self.file.name}: prompt_source is {format_value(source)}; "
                "captions are read from NAME.txt"
            )

    def _note_the_rest(self, contents: SourceContents) -> None:
        switches = {**_object(self.concept.get("image")), **_object(self.concept.get("text"))}
        on = [
            name
            for name, value in switches.items()
            if value is True
            and name != _HARMLESS
            # The second form is that of tag_dropout_enable and caps_randomize_enable.
            and (name.startswith("enable_") or name.endswith("_enable"))
        ]
        if on:
            are = "is" if len(on) == 1 else "are"
            contents.note(
                f"{self.label} of {self.file.name}: {first_few(on, 5)} {are} on, which onewan does "
                "not do"
            )


def _object(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}
