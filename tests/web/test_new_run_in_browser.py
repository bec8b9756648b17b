"""The screen New run in Chromium: from the demo to a run that trains, and whether everyone can."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.axe import accessibility_faults
from support.browser import Browser, Tab, browse
from support.page import served
from support.trainers import eventually

from onewan.config.edits import RunText
from onewan.presets.drafts import Drafts
from onewan.presets.starter import StarterRequest, starter
from onewan.runs.layout import RunLayout
from onewan.runs.status import is_run, read_state

pytestmark = pytest.mark.long

TEXT = "document.querySelector('.cm-content').innerText"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with browse(tmp_path / "profile") as browser:
        yield browser


def the_draft(runs: Path) -> str:
    (draft,) = Drafts(runs / ".drafts").all()
    return draft.text


def is_clean(tab: Tab, config: pytest.Config) -> bool:
    """Whether nothing is wrong with a page for anyone."""
    assert accessibility_faults(tab, config) == []
    assert not tab.overflows() and tab.layout_shift() < 0.1
    assert tab.console == [] and tab.foreign_requests() == []
    return True


def test_the_demo_is_prepared_changed_planned_and_started(tmp_path: Path, browser: Browser) -> None:
    runs = tmp_path / "runs"
    with served(runs, cwd=tmp_path) as page:
        tab = browser.tab()
        tab.open(f"{page.root}/new")
        tab.click("button", "Prepare the demo")
        tab.wait("h2", "Run file", 120)
        tab.wait("dd", "200 (high 100, low 100)", 60)
        tab.wait("main", "It fits.")
        # By keys, while the plan is made again and again: nothing typed is lost.
        tab.value("document.querySelector('section[aria-label=Train] input').focus()")
        tab.press("ctrl+a")
        for key in "20":
            tab.press(key)
        tab.until(f"{TEXT}.includes('steps: 20')")
        eventually(lambda: "steps: 20\n" in the_draft(runs))
        tab.wait("dd", "20 (high 10, low 10)", 60)
        assert "# high, for random weights; real: 1e-4" in the_draft(runs)

        tab.click("button", "Start now")
        tab.wait("h1", "Runs", 120)
        layout = RunLayout(runs / "demo")
        eventually(lambda: is_run(layout.root) and read_state(layout)[0] == "finished", 180)
        assert Drafts(runs / ".drafts").all() == []
        assert "# high, for random weights" in layout.run_file.read_text(encoding="utf-8")
        assert tab.console == [] and tab.foreign_requests() == []

        tab.open(f"{page.root}/new")
        tab.click("button", "Continue it with other settings")
        tab.wait("button", "Continue demo")
        tab.value("document.querySelector('section[aria-label=Train] input').focus()")
        tab.press("ctrl+a")
        tab.type("40")
        tab.wait("dd", "40 (high 20, low 20)", 60)
        tab.click("button", "Continue demo")
        tab.wait("h1", "Runs", 120)
        eventually(lambda: 40 in layout.saved_steps(), 180)


def test_everyone_can_use_the_screen(
    tmp_path: Path, browser: Browser, pytestconfig: pytest.Config
) -> None:
    runs = tmp_path / "runs"
    run = RunText(starter(StarterRequest(variant="t2v-a14b", purpose="character", name="dog")))
    for path, value in (
        (("output", "dir"), str(runs)),
        (("memory",), {"vram": "9GB", "ram": "64GB"}),
        (("video_data", "cache_dir"), str(tmp_path / "cache")),
        (("video_data", "sources", 0, "path"), str(tmp_path / "<b>clips</b>")),
    ):
        run.set(path, value)
    draft = Drafts(runs / ".drafts").add(run.text)
    with served(runs, cwd=tmp_path) as page:
        for window in ("desktop", "phone"):
            for dark in (False, True):
                tab = browser.tab(window, dark=dark)
                tab.open(f"{page.root}/new")
                tab.wait("a", "dog")
                assert is_clean(tab, pytestconfig)
                tab.open(f"{page.root}/new?draft={draft}")
                tab.wait("main", "It does not fit.", 60)
                tab.wait("button", "Do this")
                assert is_clean(tab, pytestconfig)
                tab.click(".q-toggle", "All settings")
                tab.click(".q-expansion-item .q-item", "More settings")
                tab.wait("input[aria-label='Tokenizer']")
                assert accessibility_faults(tab, pytestconfig) == []
                tab.value("document.querySelector('.cm-content').focus()")
                tab.press("ctrl+a")
                tab.type("model: [\n")
                tab.wait("main", "line 2")
                assert tab.value("document.querySelector('.ow-form').inert") is True
                assert accessibility_faults(tab, pytestconfig) == []
                eventually(lambda: the_draft(runs) == "model: [\n")
                tab.open(f"{page.root}/new?draft={draft}")
                tab.until(f"{TEXT}.includes('model: [')")
                Drafts(runs / ".drafts").write(draft, run.text)


def test_a_config_of_this_computer_is_uploaded_within_limits(
    tmp_path: Path, browser: Browser
) -> None:
    config = {
        "__version": 11,
        "model_type": "WAN_2_2",
        "training_method": "LORA",
        "base_model_name": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "concepts": [],
        "samples": [],
    }
    file, large = tmp_path / "fox.json", tmp_path / "large.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    large.write_text(" " * 3_500_000, encoding="utf-8")
    with served(tmp_path / "runs", cwd=tmp_path) as page:
        tab = browser.tab()
        tab.open(f"{page.root}/new")
        tab.wait("h2", "From a OneTrainer config")
        tab.choose_file("input[type=file]", large)
        tab.wait(".q-notification", "3 MB at most")
        tab.choose_file("input[type=file]", file)
        tab.wait(".q-dialog h2", "fox.json: ")
        tab.click("button", "Use it")
        tab.wait("h2", "Run file")
        tab.until(f"{TEXT}.includes('Made by onewan from the OneTrainer config fox.json')")
        assert tab.console == []
