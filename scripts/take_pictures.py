"""Take the pictures of what onewan itself writes, for the documentation: make pictures.

Usage: python scripts/take_pictures.py FOLDER

Runs the demonstration and a second, shorter run in a temporary folder, and shows their pages in
Chromium without a window. Pictures have few colors, so that they are small.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

PAGES = {
    "doctor": ("doctor.html", 1200, 1000),
    "report": ("demo/runs/run/report.html", 1200, 1250),
    "compare": ("compare.html", 1200, 1000),
}
"""By the name of the picture: the page, and the size of the window in CSS pixels."""
SHEET = "contact_sheet"
COLORS = 128
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
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "work"
        folder.mkdir()
        for command in COMMANDS:
            status = subprocess.run(
                [sys.executable, "-m", "onewan", *command.split()], cwd=folder, check=False
            ).returncode
            if status and not command.startswith("doctor"):  # which notes what the machine lacks
                return status
        for name, (page, width, height) in PAGES.items():
            shot = Path(temporary) / f"{name}.png"
            take(browser, folder / page, shot, (width, height))
            picture = Image.open(shot).convert("RGB").quantize(COLORS)
            picture.save(out / f"{name}.png", optimize=True)
        (sheet,) = (folder / "demo" / "cache").glob("contact_sheet_run.jpg")
        picture = Image.open(sheet)
        picture.thumbnail((900, 900))
        picture.save(out / f"{SHEET}.jpg", quality=80)
    for name in [*(f"{name}.png" for name in PAGES), f"{SHEET}.jpg"]:
        print(out / name)
    return 0


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


if __name__ == "__main__":
    raise SystemExit(main())
