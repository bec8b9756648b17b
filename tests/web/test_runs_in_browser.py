"""The screen Runs in Chromium: how it looks, whether everyone can use it, and with many runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_runs import MadeRun, write_run
from support.axe import accessibility_faults
from support.browser import Browser, browse
from support.page import served
from support.trainers import eventually

from onewan.runs.layout import RunLayout
from onewan.runs.queue import Queue

pytestmark = pytest.mark.long

HOSTILE = "<img src=x onerror=alert(1)>"
LONG = "a_name_without_any_place_to_break_it_" * 5


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with browse(tmp_path / "profile") as browser:
        yield browser


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Runs in all states, with a queue that is paused and an entry that failed."""
    folder = tmp_path / "runs"
    for name, end in [("mira", "finished"), ("fox", "stopped"), ("dog", "failed"), ("cat", "")]:
        write_run(folder / name, MadeRun(steps=40, end=end, sample_steps=(20, 40)))
    for name in (HOSTILE, LONG):
        write_run(folder / name, MadeRun(steps=4))
    (folder / "broken").mkdir()
    (folder / "broken" / "events.jsonl").write_bytes(b"\xff{\n")
    queue = Queue(folder)
    failed = queue.add(folder / "mira", ["--resume=auto"])
    process = queue.start(failed.id).process  # there is no such model
    assert process is not None
    eventually(lambda: process.is_alive is False, 120)
    queue.settle()
    for name in ("fox", "dog", LONG):
        queue.add(folder / name, ["--resume=auto"])
    queue.pause("auto", True)
    return folder


def test_everyone_can_use_the_screen(
    runs: Path, browser: Browser, pytestconfig: pytest.Config
) -> None:
    with served(runs) as page:
        for window in ("desktop", "phone"):
            for dark in (False, True):
                tab = browser.tab(window, dark=dark)
                tab.open(page.address)
                tab.wait("main h3", "mira")
                tab.wait("pre", "there is no such file or folder")
                tab.wait("main", HOSTILE)
                tab.value("document.querySelector('.ow-picture img').scrollIntoView()")
                tab.until("[...document.images].some((each) => each.naturalWidth > 0)")
                assert not tab.overflows()
                assert accessibility_faults(tab, pytestconfig) == []
                tab.click("button", "Delete: cat")
                tab.wait(".q-dialog h2", "Delete cat?")
                assert accessibility_faults(tab, pytestconfig) == []
                tab.press("Escape")
                tab.wait_until_gone(".q-dialog")
                assert tab.layout_shift() < 0.1
                assert tab.console == [] and tab.foreign_requests() == []


def test_a_run_is_found_deleted_and_its_queue_reordered_in_two_tabs(
    runs: Path, browser: Browser
) -> None:
    with served(runs) as page:
        # Chromium draws only the newest tab; a dialog never appears in the others.
        two, one = browser.tab("phone"), browser.tab()
        for tab in (two, one):
            tab.open(page.address)
            tab.wait("main h3", "cat")
        one.fill("input", "silent")
        one.wait("main", "1 of 7 runs")
        one.click("button", "Delete: cat")
        one.wait(".q-dialog", "This can't be undone")
        one.click(".q-dialog button", "Delete")
        two.wait_until_gone("main h3", "cat")
        assert not (runs / "cat").exists()
        one.click("button", "Up: dog")
        for tab in (one, two):
            tab.until("document.querySelectorAll('.ow-entry strong')[1].textContent === 'dog'")


def test_500_runs_open_in_two_seconds(tmp_path: Path, browser: Browser) -> None:
    runs = tmp_path / "runs"
    first = write_run(runs / "run-000", MadeRun(steps=200))
    for number in range(1, 500):
        layout = RunLayout(runs / f"run-{number:03}")
        shutil.copytree(first.root, layout.root)
        os.utime(layout.events, (number, number))
    with served(runs) as page:
        tab = browser.tab()
        tab.open(page.address)
        tab.wait("main", "500 runs")
        tab.until("!document.querySelector('main').innerText.includes('more are being read')", 120)
        tab.open(page.address)
        opened = "performance.getEntriesByType('navigation')[0].domComplete"
        tab.wait("main h3", "run-000")
        assert tab.value("performance.now()") < 2000, tab.value(opened)
        tab.fill("input", "run-42")
        tab.wait("main", "10 of 500 runs", 2)
