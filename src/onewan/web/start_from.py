"""`StartFrom`: what a new run begins with: a preset, an earlier run, another trainer's config."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nicegui import events, ui

from onewan import importing
from onewan.arithmetic.durations import format_duration
from onewan.config.edits import RunText
from onewan.documents import decode_text, shortened
from onewan.errors import OnewanError
from onewan.importing import Imported
from onewan.presets.drafts import Draft, Drafts
from onewan.presets.earlier import run_file_of, with_absolute_paths
from onewan.presets.made import make
from onewan.presets.recipes import PURPOSES
from onewan.presets.run_files import CARDS_GB
from onewan.presets.starter import METHODS, StarterRequest
from onewan.runs.layout import unused
from onewan.runs.status import find_runs
from onewan.variants import VARIANTS
from onewan.web.elements import tell, text

if TYPE_CHECKING:
    from onewan.web.page import Page

_MOST_BYTES = 3_000_000
_MOST_KEYS = 500
_ANY = ""


@dataclass(frozen=True)
class Known:
    """What there is to begin with."""

    drafts: list[tuple[Draft, str]]
    """Drafts with the names of their runs."""
    runs: list[str]


def known_starts(runs: Path, drafts: Drafts) -> Known:
    """The drafts and the runs that there are; reads files."""
    named = [
        (draft, str(RunText(draft.text).value(("output", "name")) or "without a name"))
        for draft in drafts.all()
    ]
    return Known(named, [folder.name for folder in find_runs(runs)])


class StartFrom:
    """The choices, each of which makes a draft and opens it."""

    def __init__(self, page: Page, drafts: Drafts) -> None:
        self._page, self._drafts = page, drafts

    def build(self, known: Known) -> None:
        """Make the elements, in the present element."""
        if known.drafts:
            self._kept(known.drafts)
        with ui.element("div").classes("ow-choices"):
            for title, build in (
                ("From a preset", self._preset),
                ("From an earlier run", partial(self._earlier, known.runs)),
                ("From a OneTrainer config", self._onetrainer),
                ("The demo", self._demo),
            ):
                with ui.element("section").classes("ow-card ow-fields"):
                    text("h2", title)
                    build()

    def _kept(self, drafts: list[tuple[Draft, str]]) -> None:
        with ui.element("section").classes("ow-card"):
            text("h2", "Drafts")
            for draft, name in drafts:
                with ui.element("div").classes("ow-row") as row:
                    ui.link(shortened(name), f"/new?draft={draft.id}")
                    ago = f"changed {format_duration(draft.changed)} ago"
                    ui.label(ago).classes("ow-muted ow-grow")
                    delete = ui.button("Delete", on_click=partial(self._delete, draft, row))
                    delete.props(f'flat dense no-caps aria-label="Delete draft {draft.id}"')

    def _delete(self, draft: Draft, row: ui.element) -> None:
        self._drafts.delete(draft.id)
        row.delete()

    # ---------------------------------------------------------------------------------- presets

    def _preset(self) -> None:
        name = _input("Name of the run", "my_lora")
        variants = {key: facts.title for key, facts in VARIANTS.items()}
        variant = _select("Model", variants, "t2v-a14b")
        purposes = {_ANY: "Nothing in particular", **{p: p.capitalize() for p in PURPOSES}}
        purpose = _select("What is learned", purposes, "character")
        method = _select("Method", {m: m for m in METHODS}, "lora")
        cards = {0: "No limit", **{gb: f"{gb} GB" for gb in CARDS_GB}}
        card = _select("Memory of the card", cards, 24)
        clips = _input("Folder of clips", str(self._page.roots.data[0] / "clips"))
        models = _input("Folder of ComfyUI's models (if there is one)", "")

        def made() -> str:
            request = StarterRequest(
                variant=variant.value,
                method=method.value,
                purpose=purpose.value or None,
                name=name() or "my_lora",
            )
            found = make(
                request,
                Path.cwd(),
                models=self._page.roots.inside(models()) if models() else None,
                vram=card.value * 10**9 or None,
            )
            settings = RunText(found.text)
            if clips():
                settings.set(("video_data", "sources", 0, "path"), clips())
            return settings.text

        self._button("Continue", lambda: self._open(made, name() or "my_lora"))

    def _demo(self) -> None:
        ui.label(
            "A tiny model with random weights and five drawn clips, which is trained in a minute "
            "without a GPU: to see what this page does."
        )
        folder = self._page.roots.data[0] / "demo"

        async def prepared() -> None:
            command = self._page.commands.start(
                "Prepare the demo", ["demo", "--prepare", "--dir", str(folder)]
            )
            tell("The demo is being prepared; this takes some seconds.")
            if await command.wait():
                raise OnewanError("\n".join(command.output) or "the demo could not be prepared")
            file = folder / "run.yaml"
            await self._open(
                lambda: with_absolute_paths(decode_text(file.read_bytes()), file), "demo"
            )

        self._button("Prepare the demo", prepared)

    # ------------------------------------------------------------------------- runs and configs

    def _earlier(self, names: list[str]) -> None:
        if not names:
            ui.label("There are no runs yet.").classes("ow-muted")
            return
        chosen = _select("Run", {name: name for name in names}, names[0])

        async def again() -> None:
            folder = self._page.roots.run(chosen.value)
            await self._open(lambda: run_file_of(folder), folder.name)

        async def continued() -> None:
            folder = self._page.roots.run(chosen.value)
            await self._open(lambda: run_file_of(folder), None, resumed=folder.name)

        self._button("New run with its settings", again)
        self._button("Continue it with other settings", continued)

    def _onetrainer(self) -> None:
        variants = {_ANY: "As its base model says", **{v: f.title for v, f in VARIANTS.items()}}
        variant = _select("Model", variants, _ANY)
        path = _input("Config on this machine", "")

        async def read(file: Path, name: str, root: Path | None) -> None:
            imported = await asyncio.to_thread(
                lambda: importing.import_config(
                    file,
                    variant=variant.value or None,
                    root=root,
                    may_read=self._page.roots.inside,
                )
            )
            self._account(imported, name)

        async def from_path() -> None:
            file = self._page.roots.inside(path())
            await read(file, file.name, None)

        async def uploaded(event: events.UploadEventArguments) -> None:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "config.json"
                file.write_bytes(await event.file.read())
                await _told(lambda: read(file, event.file.name, Path.cwd()))

        self._button("Read it", from_path)
        upload = ui.upload(
            on_upload=uploaded,
            on_rejected=lambda: tell("A config is a JSON file of 3 MB at most.", error=True),
            max_file_size=_MOST_BYTES,
            auto_upload=True,
        )
        upload.props('accept=".json"').classes("hidden")  # its own button has no name
        choose = ui.button("Or choose a file of this computer").props("outline no-caps")
        choose.on("click", js_handler=f"() => getElement({upload.id}).pickFiles()")

    def _account(self, imported: Imported, name: str) -> None:
        """Show what became of each key, before the run file is opened."""
        counts = Counter(entry.outcome for entry in imported.entries)
        with ui.dialog(value=True).props('aria-label="Imported config"') as dialog, ui.card():
            text("h2", f"{shortened(name)}: {len(imported.entries)} keys")
            ui.label(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
            for notice in imported.notices:
                ui.label(f"Check: {notice}").classes("ow-warn")
            for outcome in ("unknown", "not applicable", "carried", "defaulted"):
                found = [entry for entry in imported.entries if entry.outcome == outcome]
                if not found:
                    continue
                with ui.expansion(f"{outcome.capitalize()} ({len(found)})").classes("ow-wide"):
                    for entry in found[:_MOST_KEYS]:
                        value = shortened(str(entry.value))
                        ui.label(f"{shortened(entry.key)} = {value}: {entry.note}")
            with ui.element("div").classes("ow-row"):
                self._button(
                    "Use it",
                    lambda: self._open(
                        lambda: importing.run_file_text(imported, name), Path(name).stem
                    ),
                )
                ui.button("Cancel", on_click=dialog.close).props("flat no-caps")

    # ------------------------------------------------------------------------------------ drafts

    async def _open(
        self, made: Callable[[], str], name: str | None, *, resumed: str | None = None
    ) -> None:
        """Keep what `made` returns as a draft of the run called `name`, and open it."""

        def kept() -> str:
            settings = RunText(made())
            settings.set(("output", "dir"), str(self._page.runs))
            wished = name or resumed or "run"
            free = unused(self._page.runs / wished).name if resumed is None else wished
            settings.set(("output", "name"), free)
            cache = settings.value(("video_data", "cache_dir")) or "cache"
            try:
                self._page.roots.inside(cache)
            except OnewanError:
                settings.set(("video_data", "cache_dir"), str(self._page.roots.data[0] / "cache"))
            return self._drafts.add(settings.text)

        draft = await asyncio.to_thread(kept)
        ui.navigate.to(f"/new?draft={draft}" + (f"&resume={resumed}" if resumed else ""))

    def _button(self, label: str, do: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async def pressed() -> None:
            button.disable()
            await _told(do)
            button.enable()

        button = ui.button(label, on_click=pressed).props("no-caps")


async def _told(do: Callable[[], Awaitable[None]]) -> None:
    """Await `do`; what is wrong is told."""
    try:
        await do()
    except (OnewanError, OSError, ValueError) as error:
        tell(str(error), error=True)


def _input(label: str, value: str) -> Callable[[], str]:
    """Makes an input; returns what gives its text."""
    element = ui.input(label, value=value).props("outlined dense stack-label").classes("ow-wide")
    return lambda: (element.value or "").strip()


def _select(label: str, options: dict[Any, str], value: object) -> ui.select:
    element = ui.select(options, label=label, value=value)
    return element.props("outlined dense stack-label").classes("ow-wide")
