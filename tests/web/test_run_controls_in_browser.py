"""The buttons of the screen Run and their dialogs in Chromium: whether everyone can use them."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_runs import MadeRun, write_run
from support.axe import accessibility_faults
from support.browser import browse
from support.interrupted import locking
from support.page import served
from support.trainers import begin

from onewan.config.load import dump_run, load_run, with_change

pytestmark = pytest.mark.long

STOP = '[aria-label="Stop: fox"]:not([disabled])'
DIALOGS = ("Sample now", "Change settings", "Export", "Force stop")


def test_everyone_can_use_the_dialogs(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    runs = tmp_path / "runs"
    layout = write_run(runs / "fox", MadeRun(steps=40, on_device=False, end=""))
    layout.state(40).mkdir()
    layout.weights(40, "_high_noise").write_bytes(b"x" * 2000)
    changed = with_change(load_run(layout.root), 0, {"train.save_every": 70})
    layout.resolved.write_text(dump_run(changed), encoding="utf-8")
    with served(runs) as page, browse(tmp_path / "profile") as browser:
        with locking(layout.lock):
            begin(layout)
            for window in ("desktop", "phone"):
                for dark in (False, True):
                    tab = browser.tab(window, dark=dark)
                    tab.open(page.root + "/run/fox")
                    tab.until(f"!!document.querySelector('{STOP}')")
                    for name in DIALOGS:
                        tab.click("button", name)
                        tab.wait(".q-dialog h2")
                        assert accessibility_faults(tab, pytestconfig) == []
                        assert not tab.overflows()
                        tab.press("Escape")
                        tab.wait_until_gone(".q-dialog")
                    assert tab.layout_shift() < 0.1
                    assert tab.console == [] and tab.foreign_requests() == []
        tab = browser.tab()
        tab.open(page.root + "/run/fox")
        tab.wait("#run-state", "killed")
        tab.click("button", "Continue")
        tab.wait(".q-dialog", "It resumes from the state of step 40")
        assert accessibility_faults(tab, pytestconfig) == []
