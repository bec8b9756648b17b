"""New runs of the page: drafts that are made from what there is, checked, and put into the queue.

A run of the page is in its folder of runs, and names no file outside the folders of the page.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from onewan import importing
from onewan.config.continuing import overrides_for
from onewan.config.edits import Checked, RunText
from onewan.config.load import load_run
from onewan.config.schema import COMPONENTS, ResolvedRun
from onewan.documents import KeyPath, decode_text, is_tuple, key_path, leaf_values, text_problem
from onewan.errors import OnewanError
from onewan.files import read_input, replacing
from onewan.importing import Imported
from onewan.presets.drafts import Drafts
from onewan.presets.earlier import run_file_of, with_absolute_paths
from onewan.presets.made import make
from onewan.presets.recipes import PurposeName
from onewan.presets.starter import MethodKind, StarterRequest
from onewan.runs.queue import Queue
from onewan.serving.commands import Commands
from onewan.serving.roots import Roots
from onewan.variants import VariantName

_MOST_BYTES = 256 * 1024
"""Of the demo's run file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainCommand:
    """What ``onewan train`` is called with."""

    run: Path
    """A run file, or with the option ``--resume`` a run's folder."""
    options: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


class NewRuns:
    """Makes drafts and opens them. Its methods block, but for those that say `async`.

    Each method that makes a draft returns its id, and raises OnewanError or OSError if it can't.
    """

    def __init__(self, roots: Roots, queue: Queue, commands: Commands) -> None:
        self.roots, self.queue, self.commands = roots, queue, commands
        self.drafts = Drafts(roots.runs / ".drafts")

    def from_preset(
        self,
        *,
        variant: VariantName,
        method: MethodKind = "lora",
        purpose: PurposeName | None = None,
        name: str | None = "",
        clips: str | None = "",
        models: str | None = "",
        vram: int | None = None,
    ) -> str:
        """A run on the folder `clips` with values that fit `vram` bytes, and with the files of the
        model that are in ComfyUI's folder `models`. The texts are as they were typed."""
        name, clips, models = ((typed or "").strip() for typed in (name, clips, models))
        name = name or "my_lora"
        made = make(
            StarterRequest(variant=variant, method=method, purpose=purpose, name=name),
            Path.cwd(),
            models=self.roots.inside(models) if models else None,
            vram=vram,
        )
        run = RunText(made.text)
        if clips:
            _check_text("Folder of clips", clips)
            run.set(("video_data", "sources", 0, "path"), clips)
        return self._add(run, name)

    def from_run(self, name: str) -> str:
        """A new run with the settings of the run `name`."""
        return self._add(RunText(run_file_of(self.roots.run(name))), name)

    def continuing(self, name: str) -> str:
        """The run `name` itself, to be continued with other settings."""
        run = RunText(run_file_of(self.roots.run(name)))
        return self._add(run, name, is_new=False)

    async def from_demo(self) -> str:
        """The demo, whose files are made in the first folder of data."""
        folder = self.roots.data[0] / "demo"
        command = self.commands.start(
            "Prepare the demo", ["demo", "--prepare", "--dir", str(folder)]
        )
        if await command.wait():
            raise OnewanError("\n".join(command.output) or "the demo could not be prepared")

        def made() -> str:
            file = folder / "run.yaml"
            text = with_absolute_paths(decode_text(read_input(file, _MOST_BYTES)), file)
            return self._add(RunText(text), "demo")

        return await asyncio.to_thread(made)

    def read_config(self, path: str, variant: VariantName | None) -> Imported:
        """The run that a OneTrainer config means, of which only files in the folders of the page
        are read."""
        file = self.roots.inside(path)
        return importing.import_config(file, variant=variant, may_read=self.roots.inside)

    def read_uploaded(self, config: bytes, variant: VariantName | None) -> Imported:
        """As `read_config`, for a config that has no file here: its relative paths are those of the
        current folder."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "config.json"
            file.write_bytes(config)
            return importing.import_config(
                file, variant=variant, root=Path.cwd(), may_read=self.roots.inside
            )

    def from_config(self, imported: Imported, name: str) -> str:
        """The run of a config whose file is called `name`."""
        return self._add(RunText(importing.run_file_text(imported, name)), Path(name).stem)

    def open(self, draft: str, resumed: str) -> NewRun:
        """A draft, which continues the run `resumed` unless that is empty. OnewanError if there is
        no such draft or run."""
        text = self.drafts.read(draft)
        if text is None:
            raise OnewanError("This draft was started or deleted; choose what to begin with.")
        return NewRun(self, draft, text, self.roots.run(resumed) if resumed else None)

    def free_name(self, name: str) -> str:
        """`name`, or the first of NAME-2, NAME-3, ... that neither a run has nor one that waits."""
        waiting = {entry.run for entry in self.queue.entries()}
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        return next(
            each
            for each in itertools.chain([name], numbered)
            if each not in waiting and not (self.roots.runs / each).exists()
        )

    def _add(self, run: RunText, name: str, *, is_new: bool = True) -> str:
        """Keep the draft of a run in the page's folder of runs."""
        _check_text("Name of the run", name)
        run.set(("output", "dir"), str(self.roots.runs))
        run.set(("output", "name"), self.free_name(name) if is_new else name)
        cache = ("video_data", "cache_dir")
        try:
            self.roots.inside(run.value(cache) or "cache")
        except OnewanError:
            run.set(cache, str(self.roots.data[0] / "cache"))
        return self.drafts.add(run.text)


class NewRun:
    """A draft that is being written."""

    def __init__(self, runs: NewRuns, draft: str, text: str, resumed: Path | None) -> None:
        self._runs, self._draft, self._kept = runs, draft, text
        self.run = RunText(text)
        self.resumed = resumed
        """The folder of the run that is continued."""
        self.file = Path.cwd() / "run.yaml"
        """Where the run file would be: relative paths are those of this folder."""

    def keep(self) -> bool:
        """Keep the text as it is now; False if the draft was changed or deleted elsewhere."""
        now = self.run.text
        is_kept = self._runs.drafts.replace(self._draft, self._kept, now)
        if is_kept:
            self._kept = now
        return is_kept

    def delete(self) -> None:
        """Delete the draft."""
        self._runs.drafts.delete(self._draft)

    def other_name(self) -> str:
        """A name that is free; empty if the run's own is."""
        name = str(self.run.value(("output", "name")) or self.file.stem)
        free = name if self.resumed else self._runs.free_name(name)
        return "" if free == name else free

    def checked(self) -> Checked:
        """What the run file says, or what is wrong with it, also for a run of the page."""
        checked = self.run.checked(self.file)
        if checked.config is None:
            return checked
        wrong = dict(_paths_outside(checked.config, self._runs.roots))
        output, runs = checked.config.output, self._runs.roots.runs
        if output.dir.resolve() != runs:
            wrong["output", "dir"] = (
                f"Is {output.dir}, and only runs in {runs} are shown on this page; change it to "
                "that"
            )
        if self.resumed is None and self._runs.free_name(output.name) != output.name:
            wrong["output", "name"] = f"There is a run called {output.name} already"
        return Checked(None if wrong else checked.config, wrong, [])

    def command(self, config: ResolvedRun) -> TrainCommand:
        """What starts the run of `config`, as it was checked; writes the run file."""
        if self.resumed is not None:
            overrides = overrides_for(load_run(self.resumed), config)
            return TrainCommand(run=self.resumed, options=("--resume",), overrides=tuple(overrides))
        # With the draft's id, so that it is not the file of a run that waits.
        name = f"{config.output.name}_{self._draft}.yaml"
        file = self._runs.roots.runs / ".run_files" / name
        with replacing(file) as temporary:
            text = with_absolute_paths(self.run.text, self.file)
            temporary.write_text(text, encoding="utf-8", newline="\n")
        return TrainCommand(run=file)

    async def rehearse(self, command: TrainCommand) -> list[str]:
        """Why the run would fail, by its clips and its model, which are looked at."""
        words = [*command.options, str(command.run), *command.overrides]
        rehearsal = await self._runs.commands.json_of(
            ["train", *words, "--dry-run", "--json"], status=(0, 1)
        )
        problems: list[str] = rehearsal["problems"]
        return problems

    def enqueue(self, command: TrainCommand, *, first: bool) -> str:
        """Put the run into the queue, or start it as soon as its device is free, and delete the
        draft; returns what happens, for the user."""
        queue = self._runs.queue
        entry = queue.add(command.run, command.options, command.overrides)
        if first:
            queue.start_first(entry.id)
        self.delete()
        if first:
            return f"{entry.run}: starts as soon as its device is free"
        return f"{entry.run}: was added to the queue"


def _check_text(what: str, text: str) -> None:
    """OnewanError if no run file can have `text`."""
    if problem := text_problem(text):
        raise OnewanError(f"{what}: {problem}")


def _paths_outside(config: ResolvedRun, roots: Roots) -> Iterator[tuple[KeyPath, str]]:
    """A message for each path of the run that is in none of the page's folders."""
    for name, value in leaf_values(config.model_dump()):
        path = key_path(name)
        is_model = path[0] == "model" and path[1] in ("path", *COMPONENTS)
        for each in value if is_tuple(value) else (value,):
            if isinstance(each, Path) or (is_model and os.path.isabs(str(each))):
                try:
                    roots.inside(str(each))
                except OnewanError as error:
                    yield path, error.message
