"""The screen Data in Chromium: players, captions, and data sets of thousands of clips."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onewan.media import write_video
from tests.support.axe import accessibility_faults
from tests.support.browser import Tab, browse
from tests.support.page import served

pytestmark = pytest.mark.long

ODD = "a <b>fox</b>\u2028& <script>alert(1)</script>"
PANELS = ("Findings", "Duplicates", "Buckets", "Contact sheet")
SECONDS = 5
"""In which thousands of clips are shown, on a machine that runs other tests too; alone it takes
less than one."""
FRAMES = """
  new Promise((done) => {
    const times = [];
    let last = performance.now();
    const next = (now) => {
      times.push(now - last);
      last = now;
      scrollBy({ top: 60, behavior: "instant" });
      if (times.length < 90) requestAnimationFrame(next);
      else done(times.sort((a, b) => a - b));
    };
    requestAnimationFrame(next);
  })
"""
"""Milliseconds between the frames of a scroll, ascending."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run file on clips, of which one has a mask, one is there twice and one is broken."""
    clips = tmp_path / "clips"
    clips.mkdir()
    drawn = np.random.default_rng(1).integers(0, 255, (1, 96, 160, 3), np.uint8)
    for name, steps in (("fox", 6), ("ball", 2)):
        frames = np.concatenate([np.roll(drawn, steps * k, axis=2) for k in range(33)])
        write_video(clips / f"{name}.mp4", frames, 16)
    # Not encoded twice: of the same frames, x264 rarely makes other bytes (1 of 1,500 times).
    shutil.copyfile(clips / "ball.mp4", clips / "twin.mp4")
    for name in ("fox", "ball", "twin"):
        (clips / f"{name}.txt").write_text(f"a {name} jumps", encoding="utf-8")
    mask = Image.new("L", (160, 96))
    mask.paste(255, (0, 0, 80, 96))
    mask.save(clips / "fox.mask.png")
    (clips / "broken.mp4").write_bytes(b"no video")
    (clips / "broken.txt").write_text("a broken one", encoding="utf-8")
    (tmp_path / "run.yaml").write_text(
        "model: {variant: t2v-a14b, path: Wan-AI/Wan2.2-T2V-A14B-Diffusers}\n"
        "wan_config: {max_frames: 33}\n"
        f"video_data: {{sources: [clips], resolution: 96x96, masks: true, "
        f"cache_dir: {tmp_path / 'cache'}}}\n",
        encoding="utf-8",
    )
    return tmp_path


def check(tab: Tab, config: pytest.Config, where: str) -> None:
    # Quasar's bar, which has no name, is there for a moment after each request.
    tab.until(
        "[...document.querySelectorAll('.q-loading-bar')].every((b) => b.style.opacity !== '1')"
    )
    assert not accessibility_faults(tab, config), where
    assert not tab.overflows(), where


@pytest.mark.parametrize(("window", "dark"), [("desktop", False), ("phone", True)])
def test_clips_are_looked_at_and_captions_changed(
    folder: Path, tmp_path: Path, pytestconfig: pytest.Config, window: str, dark: bool
) -> None:
    with served(folder / "runs", "--data", str(folder)) as page, browse(tmp_path / "p") as browser:
        tab = browser.tab(window, dark=dark)
        tab.open(f"{page.root}/data?file={folder / 'run.yaml'}")
        tab.wait("main", "Examine all frames again", seconds=60)
        tab.until("[...document.querySelectorAll('img.ow-poster')].every((i) => i.naturalWidth)")
        check(tab, pytestconfig, "Clips")
        for name in PANELS:
            tab.click(".q-tab", name)
            if name == "Contact sheet":
                tab.click("button", "Draw the contact sheet")
                tab.until("document.querySelector('.ow-sheet')?.naturalWidth > 0")
            tab.wait(".ow-panels", {"Duplicates": "the same content"}.get(name, ""))
            check(tab, pytestconfig, name)
        tab.click(".q-tab", "Clips")
        tab.fill("textarea[aria-label='Caption of fox.mp4']", ODD)
        tab.press("ctrl+Enter")
        tab.wait(".ow-clip-state", "Saved")
        assert (folder / "clips" / "fox.txt").read_text(encoding="utf-8") == ODD
        tab.click("button", "Undo")
        tab.until("document.querySelector(\"textarea[aria-label='Caption of fox.mp4']\").value"
                  " === 'a fox jumps'")  # fmt: skip
        assert (folder / "clips" / "fox.txt").read_text(encoding="utf-8") == "a fox jumps"
        tab.click("button", "Open fox.mp4")
        videos = "[...document.querySelectorAll('video')]"
        tab.until(f"{videos}.length === 3 && {videos}.every((v) => v.readyState >= 3)")
        tab.until(f"{videos}.every((v) => v.currentTime > 0.3 && !v.paused)")
        apart = (
            f"Math.max(...{videos}.map((v) => Math.abs(v.currentTime - {videos}[0].currentTime)))"
        )
        tab.value(f"{videos}[0].pause()")
        tab.until(f"{videos}.every((v) => v.paused) && {apart} < 0.07")
        tab.value(f"{videos}[0].currentTime = 1")
        tab.until(f"{videos}.every((v) => v.currentTime === 1 && !v.seeking)")
        lengths = tab.value(f"{videos}.map((v) => v.duration)")
        assert lengths == pytest.approx([33 / 16] * 3, abs=0.01)
        check(tab, pytestconfig, "a clip")
        for arrow, name in (("Right", "twin"), ("Left", "fox"), ("Left", "ball"), ("Right", "fox")):
            tab.press(f"Arrow{arrow}")
            tab.wait(".ow-player h2", f"{name}.mp4")
        tab.press("Escape")
        tab.wait_until_gone("video")
        assert not tab.console
        assert not tab.foreign_requests()
        assert tab.layout_shift() < 0.1


def test_who_edits_a_caption_that_someone_else_has_changed_is_asked(
    folder: Path, tmp_path: Path
) -> None:
    caption = folder / "clips" / "fox.txt"
    field = "textarea[aria-label='Caption of fox.mp4']"
    # Two browsers, since Chromium draws only one tab of a window.
    with (
        served(folder / "runs", "--data", str(folder)) as page,
        browse(tmp_path / "first") as first,
        browse(tmp_path / "second") as second,
    ):
        one, two = first.tab(), second.tab()
        for tab in (one, two):
            tab.open(f"{page.root}/data?file={folder / 'run.yaml'}")
        two.fill(field, "a fox sleeps")
        one.fill(field, "a fox swims")
        one.press("ctrl+Enter")
        one.wait(".ow-clip-state", "Saved")
        two.press("ctrl+Enter")
        two.wait(".q-dialog h2", "This caption was changed meanwhile")
        two.wait(".q-dialog dd", "a fox swims")
        assert caption.read_text(encoding="utf-8") == "a fox swims"
        two.click(".q-dialog button", "Write yours")
        two.wait_until_gone(".q-dialog")
        two.wait(".ow-clip-state", "Saved")
        assert caption.read_text(encoding="utf-8") == "a fox sleeps"
        assert not one.console and not two.console


def test_thousands_of_clips_are_smooth(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (5, 64, 96, 3), np.uint8)
    write_video(tmp_path / "clip.mp4", noise, 16)
    for number in range(5000):
        os.link(tmp_path / "clip.mp4", clips / f"{number:05d}.mp4")
        (clips / f"{number:05d}.txt").write_text(f"clip {number} jumps", encoding="utf-8")
    with served(tmp_path / "runs", "--data", str(clips)) as page, browse(tmp_path / "p") as browser:
        tab = browser.tab()
        address = f"{page.root}/data?folder={clips}&frames=5&size=64x64"
        tab.open(address)
        tab.wait("main", "5000 clips kept", seconds=90)
        tab.until("[...document.querySelectorAll('img.ow-poster')].some((i) => i.naturalWidth)")
        times = tab.value(FRAMES)
        assert times[len(times) // 2] < 50, times
        start = time.monotonic()
        tab.click("button[aria-label='Next page'], .q-pagination button", "139")
        tab.wait("main", "04999.mp4")
        assert time.monotonic() - start < SECONDS
        start = time.monotonic()
        tab.fill("input[aria-label='Search names and captions']", "clip 4321 j")
        tab.wait("main", "1 of 5000")
        assert time.monotonic() - start < SECONDS
        assert tab.value("document.querySelectorAll('main *').length") < 1500
        start = time.monotonic()
        tab.open(address)
        tab.until("document.querySelectorAll('article').length === 36")
        tab.wait("main", "5000 clips kept")
        assert time.monotonic() - start < SECONDS
        assert not tab.console
