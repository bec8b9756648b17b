"""The screen New run: form, text and plan show the same run file, and nothing typed is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from nicegui import ui
from nicegui.elements.mixins.value_element import ValueElement
from nicegui.testing.user import User
from nicegui.testing.user_interaction import UserInteraction

from onewan.config.edits import RunText
from onewan.config.inputs import Input, run_inputs
from onewan.config.load import dump_run, run_of_text
from onewan.documents import parse_yaml
from onewan.presets.drafts import Drafts
from onewan.presets.starter import StarterRequest, starter
from onewan.runs.queue import Queue
from tests.support.page import with_user

SECONDS = 20
OFF = ("ema", "distilled", "wandb", "augment", "weighting", "condition_shares")
"""Sections that a run has only where they are given."""


async def until(condition: Callable[[], Any]) -> Any:
    """Wait for `condition`, and return what it returned."""
    for _ in range(SECONDS * 20):
        if found := condition():
            return found
        await asyncio.sleep(0.05)
    raise AssertionError("it did not become true")


def run_text(folder: Path, **changes: str) -> str:
    """A run file of a project in `folder`."""
    text = starter(StarterRequest(variant="t2v-a14b", purpose="character", name="dog"))
    text = text.replace("path: clips", f"path: {folder / 'clips'}")
    text = text.replace("  name: dog", f"  dir: {folder / 'runs'}\n  name: dog")
    text = text.replace("video_data:\n", f"video_data:\n  cache_dir: {folder / 'cache'}\n")
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


def shown_inputs(run: RunText, fields: list[Input]) -> Iterator[Input]:
    """The inputs that a form of `run` has."""
    for field in fields:
        yield field
        for index in range(len(run.value(field.path) or ()) if field.kind == "list" else 0):
            yield from shown_inputs(run, field.items(index))
        kind = run.kind(field.path, field.union) if field.union is not None else ""
        yield from shown_inputs(run, field.inner(kind))


class Screen:
    """What a user sees of the screen."""

    def __init__(self, user: User) -> None:
        self.user = user

    @property
    def text(self) -> ui.codemirror:
        return next(iter(self.user.find(ui.codemirror).elements))

    @property
    def data(self) -> Any:
        return parse_yaml(self.text.value)

    def field(self, label: str, nth: int = 0) -> ValueElement[Any]:
        found = [
            element
            for element in self.user.current_layout.descendants()
            if isinstance(element, ValueElement) and element.props.get("label") == label
        ]
        return sorted(found, key=lambda element: element.id)[nth]

    def error(self, label: str) -> str:
        return str(self.field(label).props.get("error-message") or "")

    def shows(self, words: str) -> bool:
        return any(
            words in str(getattr(element, "text", ""))
            for element in self.user.current_layout.descendants()
            if element.visible
        )

    def labelled(self, label: str) -> Any:
        """The element with this label for screen readers; None if there is none."""
        elements = self.user.current_layout.descendants()
        return next((e for e in elements if e.props.get("aria-label") == label), None)


def with_draft(
    folder: Path, text: str, act: Callable[[Screen], Awaitable[None]], query: str = ""
) -> None:
    """Run `act` on the screen with a draft."""
    draft = Drafts(folder / "runs" / ".drafts").add(text)

    async def opened(user: User) -> None:
        await user.open(f"/new?draft={draft}{query}")
        await act(Screen(user))

    with_user(folder / "runs", opened)


def open_all(screen: Screen) -> None:
    """Show all sections, and open all parts of them."""
    next(iter(screen.user.find(ui.switch).elements)).set_value(True)
    while closed := [e for e in screen.user.find(ui.expansion).elements if not e.value]:
        for expansion in closed:
            expansion.open()


async def click(screen: Screen, label: str) -> None:
    """Press the button with this label for screen readers."""
    UserInteraction(screen.user, {screen.labelled(label)}, label).click()
    await asyncio.sleep(0.05)


def test_a_preset_becomes_a_draft_that_a_reload_keeps(tmp_path: Path) -> None:
    async def act(user: User) -> None:
        await user.open("/new")
        screen = Screen(user)
        screen.field("Name of the run").set_value("fox")
        screen.field("What is learned").set_value("style")
        screen.field("Memory of the card").set_value(None)
        user.find("Continue").click()
        await user.should_see("Run file", retries=100)
        assert screen.data["output"] == {"dir": str(tmp_path / "runs"), "name": "fox"}
        assert screen.data["video_data"]["sources"][0]["path"] == str(tmp_path / "clips")
        assert screen.data["train"]["steps"] == 4000
        (draft,) = Drafts(tmp_path / "runs" / ".drafts").all()
        screen.field("Rank").set_value("8")
        assert "rank: 8  # a higher rank" in screen.text.value
        await until(lambda: "rank: 8" in Drafts(tmp_path / "runs" / ".drafts").all()[0].text)
        await user.open(f"/new?draft={draft.id}")
        assert screen.field("Rank").value == "8"
        await user.open("/new")
        await user.should_see("fox")

    with_user(tmp_path / "runs", act)


def test_form_and_text_change_each_other(tmp_path: Path) -> None:
    async def act(screen: Screen) -> None:
        before = screen.text.value
        screen.field("Steps").set_value("77")
        assert screen.text.value == before.replace("steps: 3000", "steps: 77")
        screen.field("Method: kind").set_value("oft")
        assert screen.data["method"] == {"kind": "oft"}
        assert screen.field("Block size").props["placeholder"] == "32"
        screen.field("Method: kind").set_value("lora")
        assert screen.data["method"]["rank"] == 16 and screen.field("Rank").value == "16"

        screen.text.set_value(screen.text.value.replace("rank: 16", "rank: 4  # few"))
        await until(lambda: screen.field("Rank").value == "4")
        screen.text.set_value(screen.text.value + "nonsense: 1\n")
        await until(lambda: screen.shows("nonsense: unknown field"))

    with_draft(tmp_path, run_text(tmp_path), act)


def test_a_malformed_text_is_kept_and_says_its_line(tmp_path: Path) -> None:
    async def act(screen: Screen) -> None:
        before = screen.text.value
        broken = before + "train: 1\n"
        screen.text.set_value(broken)
        await until(lambda: screen.shows("Correct it to use the form again"))
        line = len(broken.splitlines())
        assert screen.shows(f"line {line}, column 1: 'train' is given twice; keep one")
        screen.field("Rank").set_value("5")  # at the same moment, from a keyboard
        assert screen.text.value == broken and screen.field("Rank").value == "16"
        await until(lambda: Drafts(tmp_path / "runs" / ".drafts").all()[0].text == broken)
        screen.text.set_value(before.replace("rank: 16", "rank: 6"))
        screen.field("Steps").set_value("9")  # before the text was read
        assert screen.data["method"]["rank"] == 6 and screen.data["train"]["steps"] == 9

    with_draft(tmp_path, run_text(tmp_path), act)


def test_all_problems_are_said_at_their_fields(tmp_path: Path) -> None:
    async def act(screen: Screen) -> None:
        screen.field("Steps").set_value("many")
        screen.field("Rank").set_value("0")
        await until(lambda: screen.error("Steps") and screen.error("Rank"))
        assert screen.error("Steps").startswith("Must be a whole number, got 'many'")
        assert screen.shows("The plan is made when these 2 problems are solved")
        screen.field("Steps").set_value("10")
        screen.field("Rank").set_value("2")
        await until(lambda: not screen.error("Steps"))
        screen.field("Path", 1).set_value("/elsewhere/clips")
        await until(lambda: "onewan serve --data" in str(screen.field("Path", 1).props))

    with_draft(tmp_path, run_text(tmp_path), act)


@pytest.mark.parametrize("by", ["a run", "a run that waits"])
def test_a_name_that_is_taken_has_a_free_one_offered(tmp_path: Path, by: str) -> None:
    if by == "a run":
        (tmp_path / "runs" / "dog").mkdir(parents=True)
    else:
        (tmp_path / "runs").mkdir()
        (tmp_path / "dog.yaml").write_text(run_text(tmp_path), encoding="utf-8")
        Queue(tmp_path / "runs").pause("auto", True)
        Queue(tmp_path / "runs").add(tmp_path / "dog.yaml")

    async def act(screen: Screen) -> None:
        await until(lambda: screen.error("Name"))
        screen.user.find("Call it dog-2").click()
        await until(lambda: screen.field("Name").value == "dog-2")
        assert screen.data["output"]["name"] == "dog-2"
        await until(lambda: not screen.error("Name"))

    with_draft(tmp_path, run_text(tmp_path), act)


def test_items_and_sections_are_added_and_removed(tmp_path: Path) -> None:
    async def act(screen: Screen) -> None:
        def sources() -> list[Any]:
            return screen.data["video_data"]["sources"]

        screen.user.find("Add a source").click()
        await until(lambda: len(sources()) == 2)
        screen.field("Path", 2).set_value("more")
        assert sources()[1] == {"path": "more"}
        await click(screen, "Move source 2 up")
        assert [source["path"] for source in sources()] == ["more", str(tmp_path / "clips")]
        assert screen.field("Path", 1).value == "more"
        await click(screen, "Remove source 1")
        assert [source["path"] for source in sources()] == [str(tmp_path / "clips")]
        open_all(screen)
        screen.text.set_value(
            screen.text.value.replace("train:\n", "train:\n  ema: {decay: 0.5}\n")
        )
        average = screen.labelled("EMA: on")
        await until(lambda: average.value)
        open_all(screen)
        assert screen.field("Decay").value == "0.5"
        average.set_value(False)
        assert "ema" not in screen.data["train"]
        average.set_value(True)
        assert screen.data["train"]["ema"] == {"decay": 0.5}

    with_draft(tmp_path, run_text(tmp_path), act)


def test_every_setting_of_a_run_is_on_the_screen(tmp_path: Path) -> None:
    """All of the schema has an input in `test_config_inputs.py`; here it has its widget too."""
    text = run_text(tmp_path)

    async def act(screen: Screen) -> None:
        open_all(screen)
        values = [
            element
            for element in screen.user.current_layout.descendants()
            if isinstance(element, ValueElement)
        ]
        labels = Counter(str(e.props.get("label") or getattr(e, "text", "")) for e in values)
        wanted = Counter(
            field.label
            for field in shown_inputs(RunText(text), run_inputs())
            if field.kind not in ("section", "union", "list") and not in_switched_off(field)
        )
        assert not wanted - labels
        assert sum(wanted.values()) > 150
        assert screen.text.value == text

    with_draft(tmp_path, text, act)


def in_switched_off(field: Input) -> bool:
    """Whether it is within a section that is off by default, or in the options of a source."""
    return any(part in field.path for part in OFF)


def test_the_plan_says_what_fits_and_its_advice_is_taken(tmp_path: Path) -> None:
    text = run_text(tmp_path) + "\nmemory:\n  vram: 9GB\n  ram: 64GB\n"

    async def act(screen: Screen) -> None:
        await until(lambda: screen.shows("It does not fit."))
        assert screen.shows("more than the") and screen.shows("3,000 (high 1,500, low 1,500)")
        advice = list(screen.user.find("Do this").elements)
        assert advice
        await click(screen, sorted(e.props["aria-label"] for e in advice)[0])
        await until(lambda: screen.shows("It fits."))

    with_draft(tmp_path, text, act)


def test_an_earlier_run_gives_its_settings(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "dog"
    folder.mkdir(parents=True)
    text = run_text(tmp_path).replace("steps: 3000", "steps: 55  # short")
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    (folder / "resolved.yaml").write_text(dump_run(run_of_text(text, folder / "run.yaml")))

    async def act(user: User) -> None:
        await user.open("/new")
        user.find("New run with its settings").click()
        await user.should_see("Run file", retries=100)
        screen = Screen(user)
        assert "steps: 55  # short" in screen.text.value
        assert screen.data["output"]["name"] == "dog-2"
        await user.open("/new")
        user.find("Continue it with other settings").click()
        await user.should_see("Continue dog", retries=100)
        assert screen.data["output"]["name"] == "dog" and not screen.error("Name")

    with_user(tmp_path / "runs", act)


def test_a_onetrainer_config_is_imported_with_its_account(tmp_path: Path) -> None:
    config = {
        "__version": 11,
        "model_type": "WAN_2_2",
        "training_method": "LORA",
        "base_model_name": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "lora_rank": 24,
        "concepts": [],
        "samples": [],
        "no_such_key": "<b>x</b>",
    }
    (tmp_path / "fox.json").write_text(json.dumps(config), encoding="utf-8")

    async def act(user: User) -> None:
        await user.open("/new")
        screen = Screen(user)
        screen.field("Config on this machine").set_value("/etc/passwd")
        user.find("Read it").click()
        await until(lambda: any("onewan serve --data" in m for m in user.notify.messages))
        outside = tmp_path.parent / f"{tmp_path.name}_outside.json"
        outside.write_text("[]", encoding="utf-8")
        named = {**config, "concept_file_name": str(outside)}
        del named["concepts"]
        (tmp_path / "named.json").write_text(json.dumps(named), encoding="utf-8")
        screen.field("Config on this machine").set_value(str(tmp_path / "named.json"))
        user.find("Read it").click()
        await until(lambda: any(f"{outside}: is outside" in m for m in user.notify.messages))
        screen.field("Config on this machine").set_value(str(tmp_path / "fox.json"))
        user.find("Read it").click()
        await user.should_see("Unknown (1)", retries=100)
        assert screen.shows("no_such_key = <b>x</b>: ")
        user.find("Use it").click()
        await user.should_see("Run file", retries=100)
        assert screen.data["method"]["rank"] == 24 and screen.data["output"]["name"] == "fox"

    with_user(tmp_path / "runs", act)


@pytest.mark.parametrize("draft", ["0123456789abcdef", "../../x", "%00"])
def test_an_unknown_draft_leads_to_the_choices(tmp_path: Path, draft: str) -> None:
    async def act(user: User) -> None:
        await user.open(f"/new?draft={draft}")
        await user.should_see("From a preset")

    with_user(tmp_path / "runs", act)


def test_a_run_that_is_not_there_is_not_continued(tmp_path: Path) -> None:
    draft = Drafts(tmp_path / "runs" / ".drafts").add(run_text(tmp_path))

    async def act(user: User) -> None:
        await user.open(f"/new?draft={draft}&resume=../x")
        await user.should_see("From a preset")
        assert any("there is no such run" in message for message in user.notify.messages)

    with_user(tmp_path / "runs", act)


def test_a_draft_that_another_tab_changed_is_not_written_over(tmp_path: Path) -> None:
    kept = Drafts(tmp_path / "runs" / ".drafts")

    async def act(screen: Screen) -> None:
        (draft,) = kept.all()
        kept.write(draft.id, "# from another tab\n")
        screen.field("Rank").set_value("5")
        await until(lambda: screen.shows("Not kept: this draft was changed or deleted"))
        assert kept.read(draft.id) == "# from another tab\n"
        assert screen.data["method"]["rank"] == 5

    with_draft(tmp_path, run_text(tmp_path), act)


def test_a_plan_that_is_outdated_is_stopped(tmp_path: Path) -> None:
    def planning() -> int:
        count = 0
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has ended since
                count += "plan" in process.cmdline()
        return count

    async def act(screen: Screen) -> None:
        screen.field("Steps").set_value("100")
        await until(planning)
        screen.field("Steps").set_value("200")
        await until(lambda: screen.shows("200 (high 100, low 100)"))
        assert not screen.shows("100 (high 50, low 50)") and planning() == 0
        screen.field("Steps").set_value("300")
        await until(planning)
        screen.field("Steps").set_value("none")
        await until(lambda: screen.error("Steps"))
        await until(lambda: planning() == 0)
        assert not screen.shows("300 (high 150, low 150)")

    with_draft(tmp_path, run_text(tmp_path), act)
