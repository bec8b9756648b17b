"""`dry_run`: everything that a run does before it loads weights, without writing a file.

It calls the checks of a real start (`WanModelSetup`) one after the other and collects what they
refuse, where a start ends with the first. What only encoding shows, such as damaged videos, it
can't tell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onewan.arithmetic.byte_sizes import parse_bytes
from onewan.checkpoint.store import DamagedStateError
from onewan.config.schema import ResolvedRun
from onewan.data.clip import Clip
from onewan.data.dataset import survey
from onewan.data.report import DatasetReport
from onewan.devices import is_host, resolve_device
from onewan.errors import ConfigError, OnewanError
from onewan.locks import holder_is_alive
from onewan.memory.plan import (
    Plan,
    check_plan,
    find_machine,
    full_disks,
    make_plan,
    read_stored_model,
    trained_counts,
)
from onewan.model.sources import is_here
from onewan.runs.events import DataReady, Event, MemoryPlanned, Overview, Resumed, Started
from onewan.runs.layout import RunLayout
from onewan.train.chunks import saved_chunks
from onewan.train.memory import bucket_of, planned
from onewan.train.overview import expected_overview
from onewan.train.resume import Resume, changes_since, check_start, with_recorded_changes
from onewan.train.run import run_folder
from onewan.train.saved_state import read_facts
from onewan.train.setup import WanModelSetup


@dataclass(kw_only=True)
class DryRun:
    """What a run would do, and everything that keeps it from starting."""

    folder: Path
    """The run's."""
    steps: int | None
    """None: not known, since they follow from epochs of clips that can't be used."""
    resumes_after: int | None = None
    """Step of the state that it would continue from."""
    clips: DatasetReport | None = None
    plan: Plan | None = None
    """None on the CPU, and where it can't be made."""
    overview: Overview | None = None
    notes: list[str] = field(default_factory=list[str])
    problems: list[str] = field(default_factory=list[str])

    def events(self) -> Iterator[Event]:
        """The events with which a real start would report the same."""
        yield Started(run=self.folder, steps=self.steps)
        if self.clips is not None:
            lines = self.clips.lines()
            count = 0 if self.overview is None else self.overview.clips
            yield DataReady(clips=count, encoded=0, report=lines, steps=self.steps or 0)
        if self.plan is not None:
            yield planned(self.plan)
        if self.resumes_after is not None:
            state = RunLayout(self.folder).state(self.resumes_after)
            yield Resumed(step=self.resumes_after, state=state)
        if self.overview is not None:
            yield self.overview

    def as_data(self) -> dict[str, Any]:
        """The dry run as JSON data, which ``onewan train --dry-run --json`` prints."""
        overview = self.overview
        memory: MemoryPlanned | None = None if self.plan is None else planned(self.plan)
        return {
            "run": str(self.folder),
            "steps": self.steps,
            "resumes_after": self.resumes_after,
            "experts": {}
            if overview is None
            else {
                name: {
                    "steps": steps,
                    "clips": overview.expert_clips[name],
                    "seen": overview.seen[name],
                }
                for name, steps in overview.steps.items()
            },
            "clips": None if overview is None else overview.clips,
            "report": [] if self.clips is None else self.clips.lines(),
            "parameters": {} if overview is None else dict(overview.parameters),
            "disk": {} if overview is None else dict(overview.disk),
            "device_peak": None if memory is None else memory.device_peak,
            "device_memory": None if memory is None else memory.device_memory,
            "host_peak": None if memory is None else memory.host_peak,
            "step_seconds": None if overview is None else overview.step_seconds,
            "run_seconds": None if overview is None else overview.run_seconds,
            "notes": self.notes,
            "problems": self.problems,
        }


def dry_run(
    config: ResolvedRun, *, resume: Resume = False, overrides: Sequence[str] = ()
) -> DryRun:
    """What `WanTrainer` would do with the same arguments.

    Reads clips as far as a start does before it decodes them, captions, and the headers of the
    model's files where they are on this machine; of a model on the hub, what its variant tells.
    Downloads and writes nothing.
    """
    if resume:
        config = with_recorded_changes(config, overrides)
    layout = RunLayout(run_folder(config))
    steps = None if config.train.epochs else config.train.steps
    found = DryRun(folder=layout.root, steps=steps)
    with _collected(found):
        _check_folder(layout, resume)
    with _collected(found):
        found.clips = survey(config)
    with _collected(found):
        chunks = saved_chunks(layout) if resume else None
        setup = WanModelSetup(config, chunks)
        with _collected(found):
            setup.check(download=False)
        _note_downloads(found, config)
        if resume:
            _check_state(found, layout, config, setup, overrides)
        with _collected(found):
            _plan(found, config, setup, layout)
    return found


@contextmanager
def _collected(found: DryRun) -> Iterator[None]:
    """Takes the problems that the block raises, each once."""
    try:
        yield
    except OnewanError as error:
        lines = [*error.details] if isinstance(error, ConfigError) else []
        lines = lines or [error.message, *(f"  {line}" for line in error.details)]
        found.problems += [line for line in lines if line not in found.problems]


def _check_folder(layout: RunLayout, resume: Resume) -> None:
    if holder_is_alive(layout.lock):
        raise OnewanError(f"{layout.root}: another process trains this run at present")
    check_start(layout, resume)


def _note_downloads(found: DryRun, config: ResolvedRun) -> None:
    for value in dict.fromkeys(config.model.sources().values()):
        if not is_here(value):
            found.notes.append(
                f"{value}: what is not on this machine yet is downloaded from the Hugging Face hub "
                "when the run starts"
            )


def _check_state(
    found: DryRun,
    layout: RunLayout,
    config: ResolvedRun,
    setup: WanModelSetup,
    overrides: Sequence[str],
) -> None:
    """What the newest state that can be read says of the settings; its clips are compared when the
    run starts, since that reads all of their content."""
    for step in reversed(layout.saved_steps()):
        folder = layout.state(step)
        try:
            facts = read_facts(folder)
        except DamagedStateError as error:
            found.notes.append(f"a damaged state would be skipped: {error.message}")
            continue
        found.resumes_after = step
        with _collected(found):
            changes = changes_since(
                facts,
                config,
                facts.dataset,
                setup.initial_digests,
                str(folder),
                overrides=[text.partition("=")[0] for text in overrides],
            )
            found.problems += [
                f"{line}; resuming with this change would give other results"
                for line in changes.affecting_results
            ]
            found.notes += [f"a change that does not affect results: {c}" for c in changes.harmless]
        return


def _plan(found: DryRun, config: ResolvedRun, setup: WanModelSetup, layout: RunLayout) -> None:
    """The plan, what is trained, and whether the disks have room for it."""
    clips: Sequence[Clip] = () if found.clips is None else found.clips.clips
    if clips:
        config, found.plan = setup.check_clips(clips)
        found.steps = config.train.steps
    if is_host(resolve_device(config.model.device)):
        found.plan = _plan_of_another_machine(found, config, clips)
    if clips:
        parameters = trained_counts(config, read_stored_model(config))
        found.overview = expected_overview(config, layout, clips, parameters, found.plan)
        found.problems += full_disks(config, found.overview.disk)


def _plan_of_another_machine(
    found: DryRun, config: ResolvedRun, clips: Sequence[Clip]
) -> Plan | None:
    """The plan for a device with `memory.vram`, where there is none here."""
    memory = config.memory
    if config.model.device == "cpu" or memory.vram is None or not clips:
        return None
    found.notes.append(
        "this machine has no accelerator: memory and time are those of a device with memory.vram "
        f"({memory.vram}); started here, the run would train on the CPU"
    )
    machine = find_machine(
        parse_bytes(memory.vram), None if memory.ram is None else parse_bytes(memory.ram)
    )
    plan = make_plan(config, Counter(map(bucket_of, clips)), machine, read_stored_model(config))
    check_plan(plan)
    return plan
