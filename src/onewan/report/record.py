"""`RunRecord`: everything that a page says about a run, read from its folder.

What is missing or damaged is left out, and `RunRecord.gaps` says so; only a folder that is none of
a run is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onewan import documents
from onewan.config.load import RESOLVED_LIMITS, RESOLVED_NAME
from onewan.documents import get_path
from onewan.report.history import History, read_history
from onewan.runs.layout import STEP_NAME, RunLayout
from onewan.runs.status import RunState, find_run, state_after

MOST_CLIPS = 300
"""Clips of a run that a page lists; of more, so many at equal distances."""
_VIDEOS = (".mp4", ".webm")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleVideo:
    """A sample video, which may have been deleted since."""

    step: int
    number: str
    """Its place among the prompts, with "-distilled": "0", "1-distilled"; or "requested-1"."""
    prompt: str
    path: Path
    seed: int | None = None
    """Seed of its noise; None if it is not known."""
    is_distilled: bool
    is_requested: bool = False
    """Whether its prompt was given while the run trained."""


@dataclass(kw_only=True)
class ClipList:
    """What a run was trained on."""

    counts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    clips: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])
    """At most `MOST_CLIPS`."""
    left_out: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])
    """Files that can't be used, at most `MOST_CLIPS`."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run as its folder tells it."""

    layout: RunLayout
    state: RunState
    reason: str
    """Why it stands so, where the state alone does not say it."""
    history: History
    settings: Mapping[str, Any]
    """The resolved run file as plain data; empty if it can't be read."""
    resolved_text: str
    run_text: str
    samples: Sequence[SampleVideo]
    """By step, then by prompt."""
    clips: ClipList
    gaps: Sequence[str]
    """Lines about what can't be read."""

    @property
    def name(self) -> str:
        return self.layout.name

    def setting(self, dotted: str) -> Any:
        """The value of a field of the run file; None if it has none."""
        return get_path(self.settings, tuple(dotted.split(".")))


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What is read of a run's folder besides its events and samples."""

    run_text: str
    resolved_text: str
    settings: Mapping[str, Any]
    clips: ClipList
    gaps: Sequence[str]

    @classmethod
    def read(cls, layout: RunLayout) -> RunFiles:
        """The files as they are now; `gaps` says which of them can't be read."""
        gaps = list[str]()
        resolved_text, run_text = _text(layout.resolved, gaps), _text(layout.run_file, gaps)
        settings: Any = None
        try:
            settings = documents.parse_yaml(resolved_text, RESOLVED_LIMITS)
        except ValueError as error:
            gaps.append(f"{RESOLVED_NAME}: can't be read ({error})")
        return cls(
            run_text=run_text,
            resolved_text=resolved_text,
            settings=settings if isinstance(settings, dict) else {},
            clips=_clip_list(layout, gaps),
            gaps=gaps,
        )


def read_record(run: Path) -> RunRecord:
    """The record of a run, by its folder or its name in ``runs``. OnewanError, which names the runs
    that there are, if there is no such run."""
    layout = RunLayout(find_run(run))
    files, history = RunFiles.read(layout), read_history(layout.events)
    samples = found_samples(layout, history, files.settings)
    return record_of(layout, files, history, samples)


def record_of(
    layout: RunLayout, files: RunFiles, history: History, samples: Sequence[SampleVideo]
) -> RunRecord:
    """The record of the run at `layout` from what was read of it."""
    state, reason = state_after(layout, history.latest.get("started", {}), history.last_event)
    if history.processes:
        history.processes[-1].how = state
    gaps = list(files.gaps)
    if history.damaged_count:
        at = ", ".join(map(str, history.damaged))
        more = ", ..." if history.damaged_count > len(history.damaged) else ""
        where = f" (line {at}{more})" if at else ""
        many = history.damaged_count > 1
        gaps.append(
            f"events.jsonl: {history.damaged_count} line{'s' * many} {'are' if many else 'is'} "
            f"damaged and left out{where}; a crash or a full disk may have cut "
            f"{'them' if many else 'it'} off"
        )
    if not layout.events.is_file():
        gaps.append("events.jsonl: is not there, so nothing is known of the run's steps")
    return RunRecord(
        layout=layout,
        state=state,
        reason=reason,
        history=history,
        settings=files.settings,
        resolved_text=files.resolved_text,
        run_text=files.run_text,
        samples=samples,
        clips=files.clips,
        gaps=gaps,
    )


def _text(path: Path, gaps: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        gaps.append(f"{path.name}: can't be read ({error.strerror})")
        return ""


def found_samples(
    layout: RunLayout, history: History, settings: Mapping[str, Any]
) -> list[SampleVideo]:
    """Videos that events tell of, and those on disk whose events were lost; by step, then by
    prompt."""
    return sorted(_samples(layout, history, settings), key=lambda each: (each.step, each.number))


def _samples(
    layout: RunLayout, history: History, settings: Mapping[str, Any]
) -> Iterator[SampleVideo]:
    prompts: Any = get_path(settings, ("sample", "prompts")) or []
    prompts = prompts if isinstance(prompts, list) else [prompts]
    told = set[tuple[int, str]]()
    for (step, name), event in history.samples.items():
        told.add((step, name))
        number, prompt = name.rpartition(".")[0], str(event.get("prompt", ""))
        planned_prompt, seed = _planned(prompts, number, settings)
        told_seed = _integer(event.get("seed"))
        if told_seed is None and prompt == planned_prompt:
            told_seed = seed  # of an older version; a prompt may have been changed since
        yield SampleVideo(
            step=step,
            number=number,
            prompt=prompt,
            path=layout.samples(step) / name,
            seed=told_seed,
            is_distilled=event.get("distilled") is True,
            is_requested=event.get("requested") is True,
        )
    for path in sorted(layout.samples_dir.glob("*/*")):
        if path.suffix not in _VIDEOS or not re.fullmatch(STEP_NAME, path.parent.name):
            continue
        step, number = int(path.parent.name), re.match(r"[0-9]+", path.stem)
        # Those of later steps are of a process whose work is done again.
        if (step, path.name) in told or number is None or step > (history.steps.last or step):
            continue
        prompt, seed = _planned(prompts, path.stem, settings)
        yield SampleVideo(
            step=step,
            number=path.stem,
            prompt=prompt,
            path=path,
            seed=seed,
            is_distilled=path.stem.endswith("-distilled"),
        )


def _planned(
    prompts: list[Any], number: str, settings: Mapping[str, Any]
) -> tuple[str, int | None]:
    """(prompt, seed) of the sample videos of this number by the run file."""
    place = re.match(r"[0-9]+", number)
    entry = prompts[int(place[0])] if place and int(place[0]) < len(prompts) else None
    if not isinstance(entry, dict):
        return "", None
    seed = entry.get("seed")
    default = get_path(settings, ("sample", "seed"))
    return str(entry.get("prompt", "")), _integer(default if seed is None else seed)


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _clip_list(layout: RunLayout, gaps: list[str]) -> ClipList:
    found, index, damaged = ClipList(), 0, 0
    try:
        with layout.clips.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                    kind = entry["line"]
                except (ValueError, KeyError, TypeError):
                    damaged += 1
                    continue
                if kind == "counts":
                    found.counts = entry
                elif kind == "clip":
                    if _is_listed(index, found.counts.get("listed")):
                        found.clips.append(entry)
                    index += 1
                elif len(found.left_out) < MOST_CLIPS:
                    found.left_out.append(entry)
    except FileNotFoundError:
        pass  # of a run that has not come so far, or of an older onewan
    except OSError as error:
        gaps.append(f"{layout.clips.name}: can't be read ({error.strerror})")
    if damaged:
        gaps.append(f"{layout.clips.name}: {damaged} damaged lines are left out")
    return found


def _is_listed(index: int, total: object) -> bool:
    """Whether the clip at `index` is among `MOST_CLIPS` of `total` at equal distances."""
    if not isinstance(total, int) or total <= MOST_CLIPS:
        return index < MOST_CLIPS
    return index * MOST_CLIPS // total != (index - 1) * MOST_CLIPS // total
