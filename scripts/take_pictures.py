"""Take the pictures of what onewan itself writes, for the documentation: make pictures.

Usage: python scripts/take_pictures.py FOLDER

Runs the demonstration and a second, shorter run in a temporary folder, and shows their pages and
the screens of `onewan serve` in Chromium without a window. Pictures have few colors, so that they
are small.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.browser import Tab, browse
from support.page import served

PAGES = {
    "doctor": ("doctor.html", 1200, 1000),
    "report": ("demo/runs/run/report.html", 1200, 1250),
    "compare": ("compare.html", 1200, 1000),
}
"""By the name of the picture: the page, and the size of the window in CSS pixels."""


@dataclass(frozen=True, kw_only=True)
class Screen:
    """A picture of a screen of the page."""

    address: str
    shown: tuple[str, str]
    """CSS selector and text of what is there when the screen is complete."""
    click: tuple[str, str] | None = None
    """What is clicked first."""
    window: str = "desktop"
    dark: bool = False


SCREENS = {
    "page_run": Screen(address="run/run", shown=("figure.plot path", "")),
    "page_new": Screen(
        address="new",
        click=("button", "New run with its settings"),
        shown=("h2", "Plan"),
    ),
    "page_data": Screen(address="data?run=run", shown=("main img", "")),
    "page_file": Screen(
        address="files?search=000200+high+comfyui",
        click=("a.ow-files-name", ""),
        shown=("h2", "Convert"),
    ),
    "page_phone": Screen(address="", shown=("main a", "run-2"), window="phone"),
    "page_dark": Screen(address="run/run", shown=("figure.plot path", ""), dark=True),
}
UNFINISHED = ("The plan is being made", "Looking at all frames")
"""Texts of screens whose commands have not ended."""
SHEET = "contact_sheet"
COLORS = 128
WIDTH = 1000
"""Pixels of a picture at most."""
COMMANDS = (
    "demo --dir demo",
    "doctor demo/run.yaml --html doctor.html",
    "train demo/runs/run --again train.steps=60 optimizer.lr=2e-3",
    "compare demo/runs/run demo/runs/run-2 --out compare.html",
)


def main() -> int:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if len(sys.argv) != 2 or browser is None:
        print("give the folder for the pictures; Chromium must be on the path", file=sys.stderr)
        return 2
    out = Path(sys.argv[1]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, plain_folder() as folder:
        for command in COMMANDS:
            status = subprocess.run(
                [sys.executable, "-m", "onewan", *command.split()], cwd=folder, check=False
            ).returncode
            if status and not command.startswith("doctor"):  # which notes what the machine lacks
                return status
        for name, (page, width, height) in PAGES.items():
            shot = Path(temporary) / f"{name}.png"
            take(browser, folder / page, shot, (width, height))
            save(shot, out)
        take_screens(folder / "demo", Path(temporary), out)
        (sheet,) = (folder / "demo" / "cache").glob("contact_sheet_run.jpg")
        picture = Image.open(sheet)
        picture.thumbnail((900, 900))
        picture.save(out / f"{SHEET}.jpg", quality=80)
    for name in [*(f"{name}.png" for name in (*PAGES, *SCREENS)), f"{SHEET}.jpg"]:
        print(out / name)
    return 0


@contextmanager
def plain_folder() -> Iterator[Path]:
    """A folder that is removed afterwards, with a name that may be seen in pictures."""
    folder = Path(tempfile.gettempdir()) / "onewan"
    folder.mkdir()  # fails if it exists: it would not be this script's to delete
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def take(browser: str, page: Path, shot: Path, size: tuple[int, int]) -> None:
    """A picture of the beginning of `page`, light, with the videos at their first frames."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    subprocess.run(
        [
            browser,
            *options,
            f"--user-data-dir={shot.parent / 'profile'}",
            f"--window-size={size[0]},{size[1]}",
            "--virtual-time-budget=10000",
            f"--screenshot={shot}",
            page.as_uri(),
        ],
        env={**os.environ, "LANG": "en_US.UTF-8"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )


def take_screens(demo: Path, temporary: Path, out: Path) -> None:
    """Pictures of the page that serves the runs of the demonstration."""
    with served(demo / "runs", "--data", str(demo)) as page, browse(temporary / "tabs") as browser:
        for name, screen in SCREENS.items():
            tab = browser.tab(screen.window, dark=screen.dark)
            tab.open(f"{page.address}{screen.address}")
            if screen.click is not None:
                tab.click(*screen.click)
            tab.wait(*screen.shown, seconds=60)
            settle(tab)
            shot = temporary / f"{name}.png"
            tab.picture(shot)
            save(shot, out)


def settle(tab: Tab) -> None:
    """Wait until pictures have loaded, commands have ended and what fades in is there."""
    tab.until("[...document.images].every((image) => image.complete)")
    for text in UNFINISHED:
        tab.wait_until_gone("main", text, seconds=120)
    tab.value("new Promise((done) => setTimeout(done, 1500))")


def save(shot: Path, out: Path) -> None:
    """A picture with few colors, at most `WIDTH` wide."""
    picture = Image.open(shot).convert("RGB")
    picture.thumbnail((WIDTH, 10_000))
    picture.quantize(COLORS, Image.Quantize.MAXCOVERAGE).save(out / shot.name, optimize=True)


if __name__ == "__main__":
    raise SystemExit(main())
