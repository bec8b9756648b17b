"""The page from start to finish in Chromium, as someone uses it who is new to it: the demonstration
is set up, watched, steered and exported; and page and trainer are killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import Browser, Tab, browse
from support.page import served
from support.trainers import eventually

from onewan.demo import prepare_demo
from onewan.files import IS_WINDOWS
from onewan.runs.layout import RunLayout
from onewan.runs.processes import marked, trainer_of
from onewan.runs.queue import Queue
from onewan.runs.status import read_status

pytestmark = [pytest.mark.long, pytest.mark.skipif(IS_WINDOWS, reason="SIGKILL")]

PROMPT = "a blue circle <b>rests</b> & waits"
ENDLESS = ["train.steps=100000", "train.save_every=20", "sample.every=0", "validation.clips=0"]
POINTS = "(document.querySelector('#plot-loss .line')?.getAttribute('d')?.length ?? 0)"
STEPS = (
    "Number.parseInt((document.querySelector('#run-tiles .value')?.textContent ?? '0')"
    ".replaceAll(',', ''))"
)
"""The step that the Run screen shows."""
CAN = "((name) => !!document.querySelector(`[aria-label='${name}: run']:not([disabled])`))"
"""Whether the button of this name can be pressed."""
VIDEOS = "[...document.querySelectorAll('#samples .grid video')]"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with browse(tmp_path / "profile") as browser:
        yield browser


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    """A folder of runs, whose trainers end with the test."""
    folder = tmp_path / "runs"
    folder.mkdir()
    queue = Queue(folder)
    yield folder
    for entry in queue.entries():
        for process in marked(entry.id):
            process.kill()


def events_of(layout: RunLayout, kind: str) -> list[dict[str, Any]]:
    lines = layout.events.read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def step_of(layout: RunLayout) -> int:
    return read_status(layout.root).step if layout.events.exists() else 0


def check(tab: Tab) -> None:
    assert not tab.console and not tab.foreign_requests() and not tab.overflows()


def test_the_demonstration_from_start_to_finish(
    runs: Path, browser: Browser, tmp_path: Path
) -> None:
    downloads = tmp_path / "downloads"
    browser.save_downloads_to(downloads)
    layout, clips = RunLayout(runs / "demo"), tmp_path / "demo" / "clips"
    with served(runs, "--data", str(tmp_path)) as page:
        tab = browser.tab()
        tab.open(page.address)
        tab.click("nav a", "New run")
        tab.click("button", "Prepare the demo")
        tab.wait("section[aria-label=Plan]", "It fits.", 120)
        tab.wait("section[aria-label=Plan]", "One step")
        tab.fill("input[aria-label='Steps']", "100000")
        tab.press("Tab")
        tab.wait(".cm-content", "steps: 100000")
        tab.wait("section[aria-label=Plan]", "100,000", 60)
        check(tab)
        tab.click("button", "Start now")
        tab.click("h3 a", "demo", 120)
        tab.wait("#run-state", "running", 60)

        # The curves grow while one looks at them.
        tab.until(f"{STEPS} > 0 && {POINTS} > 0", 120)
        first, points = tab.value(STEPS), tab.value(POINTS)
        tab.until(f"{STEPS} > {first} + 5 && {POINTS} > {points}", 60)

        tab.click("button", "Sample now: demo")
        tab.fill("textarea[aria-label='Prompt']", PROMPT)
        tab.click("button", "Make the video")
        tab.wait("#samples h3", PROMPT, 120)

        tab.click("button", "Stop: demo")
        tab.wait("#run-state", "stopped", 60)
        stopped = layout.saved_steps()[-1]
        assert tab.value(STEPS) == stopped == step_of(layout)
        check(tab)

        # Its video, with those of the other steps, plays.
        tab.click("#samples button", "Play together")
        tab.until(f"{VIDEOS}.some((v) => v.ariaLabel.includes({json.dumps(PROMPT)}))")
        playing = f"{VIDEOS}.filter((v) => !v.paused)"
        tab.until(f"{playing}.length > 0 && {playing}.every((v) => v.currentTime > 0.2)")
        tab.click("#samples button", "Pause")

        tab.click("button", "Continue: demo")
        end = stopped + 10
        tab.fill("input[aria-label='Continue to step']", str(end))
        tab.click(".q-dialog button", "Continue")
        tab.wait("#run-state", "finished", 180)
        assert step_of(layout) == end
        trained = [event["step"] for event in events_of(layout, "step")]
        assert trained == list(range(1, end + 1))
        before, after = events_of(layout, "data")
        assert before["encoded"] > 5 and after["encoded"] == 0

        tab.click("button", "Export: demo")
        tab.wait(".q-dialog a", ".safetensors")
        tab.click(".q-dialog button", "Export")
        tab.wait(".q-dialog [role=status]", f"{end:06}", 120)
        tab.click(".q-dialog a", f"{end:06}_high_noise_comfyui.safetensors")
        (weights,) = layout.weights_dir.glob(f"*{end:06}_high_noise_comfyui.safetensors")
        eventually(lambda: (downloads / weights.name).exists())
        assert (downloads / weights.name).read_bytes() == weights.read_bytes()
        check(tab)

        # A caption is edited: the next run encodes that one, and no other and no clip.
        tab.open(f"{page.root}/data?file={tmp_path / 'demo' / 'run.yaml'}")
        tab.fill("textarea[aria-label='Caption of red_square.mp4']", "a red square glides")
        tab.press("ctrl+Enter")
        tab.wait(".ow-clip-state", "Saved")
        assert (clips / "red_square.txt").read_text("utf-8").strip() == "a red square glides"
        check(tab)
        tab.open(f"{page.root}/new")
        tab.click("button", "New run with its settings")
        tab.fill("input[aria-label='Steps']", "2")
        tab.press("Tab")
        tab.wait(".cm-content", "steps: 2")
        tab.click("button", "Start now")
        tab.click("h3 a", "demo-2", 120)
        tab.wait("#run-state", "finished", 180)
        (ready,) = events_of(RunLayout(runs / "demo-2"), "data")
        assert ready["encoded"] == 1
        check(tab)

        # On a phone.
        tab = browser.tab("phone")
        for address in ("/", "/run/demo", "/new", "/data", "/files", "/help"):
            tab.open(page.root + address)
            tab.wait("main button")
            check(tab)
        tab.open(f"{page.root}/run/demo")
        tab.click("button", "Continue: demo")
        tab.wait(".q-dialog h2", "Continue demo")
        check(tab)


def test_page_and_trainer_are_killed(runs: Path, browser: Browser, tmp_path: Path) -> None:
    queue, layout = Queue(runs), RunLayout(runs / "run")
    run_file = prepare_demo(tmp_path, "ti2v-5b", lambda _line: None)
    queue.add(run_file, overrides=ENDLESS)
    tab = browser.tab()
    with served(runs) as page:
        port = page.root.rpartition(":")[2]
        eventually(lambda: bool(layout.saved_steps()), 180)
        tab.open(f"{page.root}/run/run")
        tab.until(f"{STEPS} > 0")
        tab.value("window.isBeforeTheRestart = true")
        page.process.kill()
        page.process.wait()
        killed = step_of(layout)
    tab.wait("#run-told", "does not answer")
    eventually(lambda: step_of(layout) > killed + 3)

    with served(runs, "--port", port) as page:
        # The new server does not know the tab, which loads the page again when it notices that.
        tab.until("!window.isBeforeTheRestart", 60)
        tab.until(f"{STEPS} > {killed}", 60)
        tab.wait_until_gone("#run-told")
        tab.wait("#run-state", "running")
        tab.until(f"{CAN}('Stop')", 30)
        trainer = trainer_of(layout)
        assert trainer is not None
        os.kill(trainer.number, signal.SIGKILL)
        at = time.monotonic()
        tab.wait("#run-state", "killed", 5)
        tab.wait("#run-problem", "It can continue from the saved state of step", 5)
        tab.until(f"{CAN}('Continue') && !{CAN}('Stop')", 5)
        assert time.monotonic() - at < 5
        saved, last = layout.saved_steps()[-1], step_of(layout)
        tab.click("button", "Continue: run")
        tab.wait(".q-dialog", f"{saved:,}")
        tab.click(".q-dialog button", "Continue")
        tab.wait("#run-state", "running", 120)
        tab.until(f"{STEPS} > {last}", 180)
        (resumed,) = events_of(layout, "resumed")
        assert resumed["step"] == saved
        tab.click("button", "Stop: run")
        tab.wait("#run-state", "stopped", 60)
        assert not tab.overflows() and not tab.foreign_requests()
