"""Time and memory that the report of a long run takes to make, and the time until it is open.

    python benchmarks/report_page.py [--steps 100000] [--json FILE]

Writes the folder of a made-up run of two experts, with a validation every 500 steps, makes its
report and its comparison with a second run in processes of their own, and opens both pages in
Chromium without a window:

- "processor time": that of the whole command, which other work on the machine does not make longer,
  and the peak of its resident memory;
- "open in": from the beginning of the navigation until the plots are drawn and all of the page is
  laid out, by the browser's own clock;
- "shown in": a screenshot of the page, less one of an empty page, which adds painting.

Needs `chromium` on the path, except with --no-browser.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from figures import Value, add_output_options, as_case, measured_here, save
from made_runs import MadeRun, write_run

LIMIT_SECONDS = 2.0
"""In which a page should be open."""
REPEATS = 3
WINDOWS = {"desktop": "1440,900", "phone": "500,900"}
_CLOCK = "document.body.offsetHeight;document.body.dataset.opened=performance.now();"
"""Reading a height makes the browser lay the page out."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--no-browser", action="store_true", help="measure the commands only")
    parser.add_argument("--write", nargs=2, metavar=("FOLDER", "SEED"), help=argparse.SUPPRESS)
    add_output_options(parser)
    options = parser.parse_args()
    if options.write:
        folder, seed = options.write
        made_up = MadeRun(steps=options.steps, validate_every=500, seed=int(seed))
        write_run(Path(folder), made_up)
        return
    with tempfile.TemporaryDirectory() as name:
        values = list(measured(Path(name), options.steps, browser=not options.no_browser))
    figure = measured_here(
        name="report_page",
        title=f"Report and comparison of runs of {options.steps:,} steps",
        measured=(
            "The commands in processes of their own, with a validation every 500 steps and no "
            "samples; the pages opened in Chromium without a window."
        ),
        values=values,
    )
    save(figure, options)


def measured(folder: Path, steps: int, *, browser: bool) -> Iterator[Value]:
    """What the report and the comparison take."""
    runs = [folder / "runs" / name for name in ("one", "two")]
    for seed, run in enumerate(runs):
        # In another process, since the peak of this one would count as that of its children.
        write = [sys.executable, __file__, "--steps", str(steps), "--write", str(run), str(seed)]
        subprocess.run(write, check=True)
    for kind, given in (("report", runs[:1]), ("compare", runs)):
        page, case = folder / f"{kind}.html", as_case(page=kind)
        arguments = [kind, *map(str, given), "--out", str(page)]
        times, peak = made(arguments)
        yield Value(case=case, measure="processor time", unit="s", repeats=tuple(times))
        yield Value(case=case, measure="peak of memory", unit="MB", repeats=(peak,))
        yield Value(case=case, measure="size", unit="MB", repeats=(page.stat().st_size / 1e6,))
        for window in WINDOWS if browser else ():
            yield from opened(page, kind, window, folder / "profile")


def made(arguments: list[str]) -> tuple[list[float], float]:
    """(seconds of each of several calls of the command, peak of resident memory in MB)."""
    times, peak = list[float](), 0.0
    for _ in range(REPEATS):
        command = [sys.executable, "-m", "onewan", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{' '.join(command)}: status {process.returncode}")
        times.append(used.ru_utime + used.ru_stime)
        peak = max(peak, used.ru_maxrss / 1000)
    return times, peak


def opened(page: Path, kind: str, window: str, profile: Path) -> Iterator[Value]:
    """How long the browser takes until the page is laid out, and until it is painted."""
    text = page.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(_CLOCK.encode("ascii")).digest()).decode("ascii")
    # The page allows no script but its own.
    text = text.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    timed, empty = page.with_name("timed.html"), page.with_name("empty.html")
    timed.write_text(text.replace("</html>", f"<script>{_CLOCK}</script></html>"), "utf-8")
    empty.write_text("<!doctype html><title>empty</title>", encoding="utf-8")
    laid_out, painted = list[float](), list[float]()
    for _ in range(REPEATS):
        dom, _ = browsed(timed, window, profile, "--dump-dom")
        found = re.search(r'data-opened="([0-9.]+)"', dom)
        assert found is not None, "the script of the page has failed"
        laid_out.append(float(found[1]) / 1000)
        shot = f"--screenshot={page.with_suffix('.png')}"
        with_page, without = (browsed(each, window, profile, shot)[1] for each in (timed, empty))
        painted.append(max(0.0, with_page - without))
    case = as_case(page=kind, window=window)
    limit = LIMIT_SECONDS
    yield Value(case=case, measure="open in", unit="s", repeats=tuple(laid_out), limit=limit)
    yield Value(case=case, measure="shown in", unit="s", repeats=tuple(painted), limit=limit)


def browsed(page: Path, window: str, profile: Path, *options: str) -> tuple[str, float]:
    """(output, seconds) of the browser on `page`."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        sys.exit("needs the browser chromium on the path, or --no-browser")
    begin = time.perf_counter()
    done = subprocess.run(
        [
            program,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--window-size={WINDOWS[window]}",
            f"--user-data-dir={profile}",
            *options,
            page.as_uri(),
        ],
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    return done.stdout, time.perf_counter() - begin


if __name__ == "__main__":
    main()
