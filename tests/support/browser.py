"""Opens a page in Chromium without a window, runs a script in it, and tells what happened."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import pytest

WINDOWS = {"desktop": (1440, 900), "phone": (500, 900)}
"""Sizes in CSS pixels. Chromium without a window makes none narrower than 500; `Opened.noted` of a
script in a frame of 390 pixels has what a phone would show."""

_COMMON = """
const note = (name, value) => { document.body.dataset[name] = value; };
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
const until = async (condition) => { while (!condition()) await pause(50); };
(async () => {
  %s
  note("overflow", document.documentElement.scrollWidth > innerWidth);
  const names = performance.getEntriesByType("resource").map((entry) => entry.name);
  note("requests", names.filter((name) => !name.startsWith("data:")).join(" "));
})().catch((error) => console.error(error));
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What a page was when its script had ended."""

    noted: dict[str, str]
    """What the script noted; "requests" and "overflow" always."""
    dom: str
    console: str
    """Messages and errors, those of the page's own policy too; empty if there are none."""


def browser() -> str:
    """The browser's program; skips the test where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("needs the browser chromium on the path")
    return found


def open_page(page: Path, profile: Path, window: str, script: str = "") -> Opened:
    """Open the file `page`, with `script` (of an async function, with `note(name, text)` and `until
    (condition)`) added to it, in a window of `WINDOWS`."""
    program = browser()
    text = page.read_text(encoding="utf-8")
    added = _COMMON % script
    digest = base64.b64encode(hashlib.sha256(added.encode("utf-8")).digest()).decode("ascii")
    # A page with a policy allows no script but its own.
    allowed, count = re.subn("script-src ", f"script-src 'sha256-{digest}' ", text, count=1)
    assert count == ("Content-Security-Policy" in text)
    copy = page.with_name(f"opened-{page.name}")
    copy.write_text(allowed.replace("</html>", f"<script>{added}</script></html>"), "utf-8")
    width, height = WINDOWS[window]
    done = subprocess.run(
        [
            program,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--window-size={width},{height}",
            "--autoplay-policy=no-user-gesture-required",
            "--enable-logging=stderr",
            f"--user-data-dir={profile}",
            "--virtual-time-budget=20000",
            "--dump-dom",
            copy.as_uri(),
        ],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    dom = done.stdout
    body = dom[dom.index("<body") :].split(">")[0]
    noted = {name: unescape(value) for name, value in re.findall(r'data-(\w+)="([^"]*)"', body)}
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return Opened(noted=noted, dom=dom, console=console)
