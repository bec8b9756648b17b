"""`StartFrom`: what a new run begins with: a preset, an earlier run, another trainer's config."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nicegui import events, ui

from onewan.arithmetic.durations import format_duration
from onewan.documents import shortened
from onewan.importing import Imported
from onewan.presets.drafts import Draft
from onewan.presets.recipes import PURPOSES
from onewan.presets.run_files import CARDS_GB
from onewan.presets.starter import METHODS
from onewan.serving.new_runs import NewRuns
from onewan.variants import VARIANTS
from onewan.web.elements import attempt, box, button, card, dialog, tell, text

_MOST_BYTES = 3_000_000
_MOST_KEYS = 500
_VARIANTS = {name: variant.title for name, variant in VARIANTS.items()}


class StartFrom:
    """The choices, each of which makes a draft and opens it."""

    def __init__(self, new_runs: NewRuns, drafts: Sequence[Draft], runs: Sequence[str]) -> None:
        self._new_runs = new_runs
        if drafts:
            with card("Drafts"):
                for draft in drafts:
                    self._draft(draft)
        with box("ow-choices"):
            for title, build in (
                ("From a preset", self._preset),
                ("From an earlier run", partial(self._earlier, runs)),
                ("From a OneTrainer config", self._onetrainer),
                ("The demo", self._demo),
            ):
                with card(title, "ow-fields"):
                    build()

    def _draft(self, draft: Draft) -> None:
        with box("ow-row") as row:
            ui.link(shortened(draft.name or "without a name"), f"/new?draft={draft.id}")
            text("div", f"changed {format_duration(draft.changed)} ago", "ow-muted ow-grow")

            def delete() -> None:
                self._new_runs.drafts.delete(draft.id)
                row.delete()

            button("Delete", delete, about=f"draft {draft.id}", small=True)

    def _preset(self) -> None:
        purposes = {None: "Nothing in particular", **{p: p.capitalize() for p in PURPOSES}}
        cards = {None: "No limit", **{gb * 10**9: f"{gb} GB" for gb in CARDS_GB}}
        clips = str(self._new_runs.roots.data[0] / "clips")
        fields = {
            "name": ui.input("Name of the run", value="my_lora"),
            "variant": ui.select(_VARIANTS, label="Model", value="t2v-a14b"),
            "purpose": ui.select(purposes, label="What is learned", value="character"),
            "method": ui.select(list(METHODS), label="Method", value="lora"),
            "vram": ui.select(cards, label="Memory of the card", value=24 * 10**9),
            "clips": ui.input("Folder of clips", value=clips),
            "models": ui.input("Folder of ComfyUI's models (if there is one)"),
        }

        async def start() -> None:
            values = {name: field.value for name, field in fields.items()}
            _open(await asyncio.to_thread(self._new_runs.from_preset, **values))

        _start_button("Continue", start)

    def _earlier(self, names: Sequence[str]) -> None:
        if not names:
            text("div", "There are no runs yet.", "ow-muted")
            return
        run = ui.select(list(names), label="Run", value=names[0])

        async def again() -> None:
            _open(await asyncio.to_thread(self._new_runs.from_run, run.value))

        async def go_on() -> None:
            name = run.value
            _open(await asyncio.to_thread(self._new_runs.continuing, name), name)

        _start_button("New run with its settings", again)
        _start_button("Continue it with other settings", go_on)

    def _demo(self) -> None:
        about = (
            "A tiny model with random weights and five drawn clips, which is trained in a minute "
            "without a GPU: to see what this page does."
        )
        text("div", about)

        async def prepare() -> None:
            tell("The demo is being prepared; this takes some seconds.")
            _open(await self._new_runs.from_demo())

        _start_button("Prepare the demo", prepare)

    def _onetrainer(self) -> None:
        variants = {None: "As its base model says", **_VARIANTS}
        variant = ui.select(variants, label="Model", value=None)
        config = ui.input("Config on this machine")

        async def read_path() -> None:
            path = (config.value or "").strip()
            imported = await attempt(lambda: self._new_runs.read_config(path, variant.value))
            self._account(imported, Path(path).name)

        async def read_upload(event: events.UploadEventArguments) -> None:
            data = await event.file.read()
            imported = await attempt(lambda: self._new_runs.read_uploaded(data, variant.value))
            self._account(imported, event.file.name)

        _start_button("Read it", read_path)
        upload = ui.upload(
            on_upload=read_upload,
            on_rejected=lambda: tell("A config is a JSON file of 3 MB at most.", error=True),
            max_file_size=_MOST_BYTES,
            auto_upload=True,
        )
        upload.props('accept=".json"').classes("hidden")  # its own button has no name
        choose = ui.button("Or choose a file of this computer").props("outline")
        choose.on("click", js_handler=f"() => getElement({upload.id}).pickFiles()")

    def _account(self, imported: Imported | None, name: str) -> None:
        """Show what became of each key of a config that could be read, before it is used."""
        if imported is None:
            return

        async def use() -> None:
            _open(await asyncio.to_thread(self._new_runs.from_config, imported, name))

        with dialog(f"{shortened(name)}: {len(imported.entries)} keys") as made:
            text("div", imported.summary)
            for notice in imported.notices:
                text("div", f"Check: {notice}", "ow-warn")
            for outcome in ("unknown", "not applicable", "carried", "defaulted"):
                found = [entry for entry in imported.entries if entry.outcome == outcome]
                if found:
                    with ui.expansion(f"{outcome.capitalize()} ({len(found)})").classes("ow-wide"):
                        for entry in found[:_MOST_KEYS]:
                            value = shortened(str(entry.value))
                            text("div", f"{shortened(entry.key)} = {value}: {entry.note}")
            with box("ow-row"):
                _start_button("Use it", use)
                button("Cancel", made.close)
        made.open()


def _open(draft: str, resumed: str = "") -> None:
    """Open a draft, which continues the run `resumed` if one is given."""
    ui.navigate.to(f"/new?draft={draft}" + (f"&resume={quote(resumed)}" if resumed else ""))


def _start_button(label: str, do: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """A button that is pressed once: it can't be used until `do` has ended."""

    async def pressed() -> None:
        made.disable()
        try:
            await do()
        finally:
            made.enable()

    made = button(label, pressed, "filled")
