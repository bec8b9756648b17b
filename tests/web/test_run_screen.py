"""The Run screen: its parts, as elements; and its curves, samples and live state in Chromium."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_runs import MadeRun, write_run
from nicegui import ElementFilter
from nicegui.testing.user import User
from support.axe import accessibility_faults
from support.browser import WINDOWS, Browser, Tab, browse
from support.page import Served, served, with_user

HOSTILE = 'dog <b>&amp; "cat" \'é'


def test_the_screen_has_its_parts_and_the_other_runs_to_compare_with(tmp_path: Path) -> None:
    for name in ("dog", HOSTILE):
        write_run(tmp_path / "runs" / name, MadeRun(steps=4))

    async def act(user: User) -> None:
        await user.open("/run/dog")
        for words in ("dog", "Training", "Samples", "Noise levels", "Speed and memory", "Log"):
            await user.should_see(words)
        with user:
            (view,) = [each for each in ElementFilter() if each.props.get("id") == "run"]
        assert view.props["data-run"] == "dog"
        assert json.loads(view.props["data-others"]) == [HOSTILE]

    with_user(tmp_path / "runs", act)


def test_a_run_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    async def act(user: User) -> None:
        assert (await user.http_client.get("/run/cat")).status_code == 404
        assert (await user.http_client.get("/run/%2e%2e%2fdog")).status_code == 404

    with_user(tmp_path / "runs", act)


# ---------------------------------------------------------------------------------- in a browser


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with browse(tmp_path / "profile") as browser:
        yield browser


def opened(tab: Tab, page: Served, name: str) -> None:
    tab.open(f"{page.root}/run/{name}")
    tab.until("document.querySelector('#plot-loss .line')?.getAttribute('d')")


@pytest.mark.long
@pytest.mark.parametrize("window", WINDOWS)
def test_curves_are_smoothed_zoomed_and_compared(
    tmp_path: Path, browser: Browser, window: str, request: pytest.FixtureRequest
) -> None:
    runs = tmp_path / "runs"
    for seed, name in enumerate(("dog", HOSTILE)):
        write_run(runs / name, MadeRun(steps=2000, seed=seed))
    with served(runs) as page:
        tab = browser.tab(window, dark=window == "phone")
        opened(tab, page, "dog")
        line = "document.querySelector('#plot-loss .line').getAttribute('d')"
        whole = tab.value(line)
        assert tab.value("document.querySelectorAll('#plot-loss .series').length") == 4
        tab.value(
            """(() => {
              const select = document.querySelector("#plot-loss select");
              select.value = "0";
              select.dispatchEvent(new Event("change"));
            })()"""
        )
        assert tab.value(line) != whole
        tab.click("#plot-loss button", "log")
        assert tab.value("document.querySelector('#plot-loss .log').ariaPressed") == "true"
        tab.click("#run-compare summary")
        tab.click("#run-compare label", HOSTILE)
        tab.until("document.querySelectorAll('#plot-loss .series').length === 8")
        tab.wait("#plot-loss .keys", f"{HOSTILE}: high expert")
        tab.value("document.querySelector('#plot-loss .canvas svg').focus()")
        for key in ("ArrowRight", "ArrowRight", "+"):
            tab.press(key)
        # The part has numbers of its own: each of its steps.
        tab.until("onewanRun.charts.plots.get('plot-loss').part?.series[0].lo?.length > 0")
        assert tab.has("#plot-loss button", "whole plot")
        tab.fill("#run-events input[type=search]", "warning")
        tab.wait("#run-events [role=status]", "1 line")
        assert accessibility_faults(tab, request.config) == []
        assert not tab.console and not tab.foreign_requests() and not tab.overflows()


@pytest.mark.long
@pytest.mark.parametrize("window", WINDOWS)
def test_samples_play_together_and_two_are_compared(
    tmp_path: Path, browser: Browser, window: str, request: pytest.FixtureRequest
) -> None:
    runs = tmp_path / "runs"
    for name, steps in (("dog", (0, 100, 200)), ("cat", (0, 200))):
        write_run(runs / name, MadeRun(steps=200, sample_steps=steps))
    with served(runs) as page:
        tab = browser.tab(window)
        opened(tab, page, "dog")
        assert not [url for url in tab.requests if url.endswith(".mp4")]  # none is seen yet
        tab.click("#samples button", "Play together")
        playing = "[...document.querySelectorAll('.grid video')].filter((v) => !v.paused)"
        tab.until(f"{playing}.length >= 2 && {playing}.every((v) => v.currentTime > 0.3)")
        times = tab.value(f"{playing}.map((v) => v.currentTime)")
        assert max(times) - min(times) < 0.1
        tab.click("#samples button", "Pause")
        tab.until(f"{playing}.length === 0")
        before = tab.value("document.querySelector('.grid video').currentTime")
        tab.click("#samples button", "Frame back")
        tab.until(f"document.querySelector('.grid video').currentTime < {before}")
        tab.click(".grid button", "compare a red fox runs through deep snow, step 200")
        tab.wait(".versus", "B: step 100")
        select = "document.querySelectorAll('.versus select')"
        choose = "{0}[{1}].value = '{2}'; {0}[{1}].dispatchEvent(new Event('change'))"
        tab.value(choose.format(select, 1, "cat"))
        tab.wait(".versus figcaption", "B: cat, step 200")
        tab.value(choose.format(select, 3, "split"))
        assert tab.value("getComputedStyle(document.querySelector('.side-B video')).clipPath") == (
            "inset(0px 0px 0px 50%)"
        )
        tab.click(".versus button", "Play together")
        both = "[...document.querySelectorAll('.versus video')]"
        tab.until(f"{both}.length === 2 && {both}.every((v) => !v.paused && v.currentTime > 0.2)")
        assert accessibility_faults(tab, request.config) == []
        assert not tab.console and not tab.foreign_requests() and not tab.overflows()


_TRAINER = """
import sys, time
from pathlib import Path
from onewan.locks import locked
with locked(Path(sys.argv[1]) / ".lock", Path(sys.argv[1]), ""):
    print("holds it", flush=True)
    time.sleep(60)
"""


@pytest.mark.long
def test_a_trainer_that_is_killed_is_told_within_five_seconds(
    tmp_path: Path, browser: Browser
) -> None:
    layout = write_run(tmp_path / "runs" / "dog", MadeRun(steps=40, end=""))
    trainer = subprocess.Popen(
        [sys.executable, "-c", _TRAINER, str(layout.root)], stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None and trainer.stdout.readline() == "holds it\n"
    with served(tmp_path / "runs") as page:
        tab = browser.tab()
        opened(tab, page, "dog")
        tab.wait("#run-state", "running")
        tab.until("document.getElementById('run-progress').value === 1")
        trainer.kill()
        trainer.wait()
        killed = time.monotonic()
        tab.wait("#run-state", "killed", seconds=5)
        tab.wait("#run-problem", "It has no saved state", seconds=1)
        tab.until(
            "[...document.querySelectorAll('#run-controls button')].some("
            "(each) => each.innerText === 'Continue' && !each.disabled)",
            seconds=5,
        )
        assert time.monotonic() - killed < 5
        assert not tab.console
