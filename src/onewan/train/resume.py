"""Whether a run may be started or resumed: what its folder has, and what changed since its state
was saved."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal, TypeAlias

from pydantic import ValidationError

from onewan.checkpoint.store import DamagedStateError
from onewan.config.changes import in_force, joined, without_changes_of
from onewan.config.continuing import lr_depends_on_steps
from onewan.config.load import changed_fields, load_run, overridden_names
from onewan.config.resolve import expert_schedule_of
from onewan.config.schema import ResolvedRun
from onewan.documents import format_value
from onewan.errors import CheckpointError, ConfigError
from onewan.runs.event_file import read_events
from onewan.runs.events import Saved
from onewan.runs.layout import RunLayout
from onewan.train.saved_state import StateFacts
from onewan.train.state import versions
from onewan.variants import ExpertName

Resume: TypeAlias = bool | Literal["auto"]
"""Whether a run is continued from its newest state. With True it must have one; with "auto" it is
started if it has none."""

_SAFE_TO_CHANGE = (
    "sample",
    "output",
    "logging",
    "memory",
    "parallel",
    "model.device",
    "video_data.sources",
    "video_data.cache",
    "video_data.cache_dir",
    "video_data.workers",
    "train.save_every",
    "train.save_every_minutes",
    "train.keep",
    "validation",
)
"""Prefixes of the fields that decide what a run writes and where, but no value that it computes.

``video_data.sources`` is among them because the data set is compared by content.
"""
_BUT_NOT = ("memory.weights", "memory.compile")
"""Fields under these prefixes that do change what is computed: the values of the weights, or the
kernels. The attention backend and the feed-forward chunks, which a run may choose by itself, are
compared as they were chosen. All other memory settings give the same bits."""
_MEASURING = (
    "model",
    "embeddings",
    "memory.weights",
    "wan_config.temporal_consistency_weight",
    "train.seed",
    "train.timesteps",
    "train.loss",
    "validation.clips",
    "validation.timesteps",
)
"""Prefixes of the fields that validation losses depend on besides the trained weights: the base
model, the noise, the timesteps and the loss. The clips are compared by the data set's content."""
_NOT_MEASURING = ("model.device", "model.check_file_names")
"""Fields under these prefixes that do not change them, except for a device's rounding."""

_STEPS = ("train.steps", "per_expert.high.steps", "per_expert.low.steps")
"""Fields that change no result as long as the saved steps were those of the same experts."""
_BY_STEPS = (
    "the learning rate follows a schedule over all steps of the run, so the steps that are done "
    "had other rates than in a run of this many"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Differences between a saved state's run and the present one, a line for each."""

    affecting_results: list[str]
    harmless: list[str]
    losses_comparable: bool
    """Whether validation losses are measured in the same way as before."""
    names: tuple[str, ...]
    """Dotted names of the fields of the run file that differ."""
    loses_override: bool
    """Whether one of them had its value from the command line, and is not given there now."""


def check_start(layout: RunLayout, resume: Resume) -> None:
    """CheckpointError if the run in the folder may not be started or, with `resume`, continued.

    A run is not started where it would overwrite the results of an earlier one.
    """
    if layout.saved_steps():
        if not resume:
            raise CheckpointError(
                f"{layout.root}: already holds a run; continue it with --resume, repeat it as a "
                f"new one with: onewan train {layout.root} --again, or choose another name "
                "(output.name=...)"
            )
        return
    left = results_without_state(layout)
    if left is not None:
        raise CheckpointError(
            f"{layout.root}: has {left} of an earlier run, but no saved state; look whether "
            f"{layout.states_dir} was deleted or is on a disk that is not mounted. To start at "
            "step 0, move the folder away or choose another name (output.name=...)"
        )
    if resume is True:
        found = f"has no saved state in {layout.states_dir.name}/"
        if not layout.resolved.is_file():
            found = "there is no run of this name"
        others = _resumable_runs(layout.root)
        hint = f"runs beside it that can be resumed: {', '.join(others)}. " if others else ""
        raise CheckpointError(
            f"{layout.root}: {found}, so there is nothing to resume; {hint}Correct the name "
            "(output.name=...), or start a new run without --resume (--resume=auto does "
            "whichever is possible)"
        )


def with_recorded_changes(config: ResolvedRun, overrides: Sequence[str]) -> ResolvedRun:
    """`config` with the changes of settings that the run of its folder has recorded, which its run
    file does not know; without those of fields that `overrides` give."""
    layout = RunLayout(config.output.dir / config.output.name)
    try:
        recorded = load_run(layout.root).changes
    except (ConfigError, OSError):  # none, or of another version: its states then say so
        return config
    recorded = without_changes_of(recorded, overridden_names(overrides))
    return config.model_copy(update={"changes": joined(config.changes, recorded)})


def results_without_state(layout: RunLayout) -> str | None:
    """What is left of a run whose states are gone; None if it has not come so far as to save one.

    The videos of a run that was killed before it saved a state are made again with the same steps.
    """
    if exported := layout.exported():
        return f"exported weights (the newest of step {max(exported)})"
    events = list(read_events(layout.events))
    if saved := [event.get("step") for event in events if event.get("event") == Saved.kind]:
        return f"events (a state of step {saved[-1]} was saved)"
    if not events and (steps := layout.sampled_steps()):
        return f"sample videos (the newest of step {steps[-1]})"
    return None


def _resumable_runs(root: Path) -> list[str]:
    """Names of runs in the same folder that have a state: those with a similar name, or else the
    first few."""
    if not root.parent.is_dir():
        return []
    found = [path.name for path in sorted(root.parent.iterdir()) if RunLayout(path).saved_steps()]
    return difflib.get_close_matches(root.name, found) or found[:5]


def changes_since(
    facts: StateFacts,
    config: ResolvedRun,
    dataset_digest: str,
    initial_digests: Mapping[ExpertName, str],
    source: str,
    chosen_changes: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
) -> Changes:
    """Compare the run file, the data set and the adapters of `method.init_from` recorded in a
    state's `facts` with the present ones. `chosen_changes` are those of what a run
    chooses at its start where its file leaves that open (attention backend, feed-forward chunks,
    the way in which captions are drawn): a line by field, in place of a comparison of the fields.
    `overrides` are the fields that the command line gives now.

    CheckpointError, naming `source`, if this version of onewan can't read the recorded run file.
    """
    saved = _saved_config(facts, source)
    # A step is computed with the changes before it, so those of the state's own step and of later
    # ones may differ.
    saved, config = (in_force(each, facts.step - 1) for each in (saved, config))
    fields = changed_fields(saved, config)
    steps_matter = lr_depends_on_steps(config)
    before, now = expert_schedule_of(saved), expert_schedule_of(config)
    same_experts = all(before.expert_at(step) == now.expert_at(step) for step in range(facts.step))
    chosen = chosen_changes or {}
    affecting_results = list(chosen.values())
    harmless: list[str] = []
    loses_override = False
    for name, old, new in fields:
        lost = _is_among(name, facts.overrides or ()) and not _is_among(name, overrides)
        loses_override = loses_override or lost
        if name in chosen:
            continue
        safe = name.startswith(_SAFE_TO_CHANGE) and name not in _BUT_NOT
        safe = safe or (name in _STEPS and not steps_matter and same_experts)
        by = " (given on the command line)" if lost else ""
        line = f"{name}: was {_shown(old)}{by}, is {_shown(new)}"
        if name in _STEPS and steps_matter:
            line += f"; {_BY_STEPS}"
        (harmless if safe else affecting_results).append(line)
    affecting_results += _changed_files(facts, dataset_digest, initial_digests)
    names = tuple(name for name, *_ in fields)
    measured_alike = not any(
        _is_among(name, _MEASURING) and name not in _NOT_MEASURING for name in names
    )
    return Changes(
        affecting_results=affecting_results,
        harmless=harmless,
        losses_comparable=measured_alike and facts.dataset == dataset_digest,
        names=names,
        loses_override=loses_override,
    )


def _changed_files(
    facts: StateFacts, dataset_digest: str, initial_digests: Mapping[ExpertName, str]
) -> Iterator[str]:
    if facts.dataset != dataset_digest:
        yield "the data set: clips, captions, spans or timesteps differ from those of the run"
    # Alphas, and parts that are not trained, come from these files at every start.
    for name, digest in initial_digests.items():
        if facts.initial and facts.initial.get(name, digest) != digest:
            yield (
                f"method.init_from: the file for the {name} expert has other content than that of "
                "the run"
            )


def _saved_config(facts: StateFacts, source: str) -> ResolvedRun:
    try:
        return ResolvedRun.model_validate(facts.config)
    except ValidationError as error:
        names = sorted({".".join(map(str, ("config", *e["loc"]))) for e in error.errors()})
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        version = facts.versions.get("onewan", "not recorded")
        # The fields of another version are no damage: an older state has them too, and falling
        # back to one that an even older version saved would lose training time.
        kind = DamagedStateError if version == versions()["onewan"] else CheckpointError
        raise kind(
            f"{source}: has fields of the run file that this version of onewan does not read "
            f"({', '.join(names[:5])}{more}); resume with the version that saved it, which is "
            f"{version}, or start another run"
        ) from error


def _is_among(name: str, fields: Collection[str]) -> bool:
    """Whether `name` is one of `fields` or lies in one of them."""
    return any(name == field or name.startswith(f"{field}.") for field in fields)


def _shown(value: object) -> str:
    """`value` as YAML, in full: a path must not be shortened."""
    return f"'{value}'" if isinstance(value, str | PurePath) else format_value(value)
