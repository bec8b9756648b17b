"""How fast the page of a long run opens and scrolls, and what fifty viewers of a run cost.

    python benchmarks/web_page.py [--steps 100000] [--samples 2000] [--viewers 50] [--json FILE]

Each part starts `onewan serve` as a process of its own.

- "open in": from the beginning of the navigation until the curves are drawn, by the browser's
  clock; "at first" with a server that has just been started and has read nothing of the run yet,
  "again" with one that has.
- "frames over 50 ms": of some seconds in which the grid of samples, and then the whole page, are
  scrolled by a fixed distance with each frame; beside them the number of frames.
- "server": processor time of the server, as a share of one core, while a real trainer of the
  demonstration's tiny model writes steps and viewers look at it. A viewer is a connection as a
  browser makes it: it opens the page and its web socket, then asks every two seconds for what the
  page's script asks for.
- "step": what a step of the trainer takes, with and without viewers, in turns. The trainer has one
  core for itself, server and viewers share the other, as on a machine with a free core. Processor
  time is beside it, since other work on the machine makes steps longer.

Needs `chromium` on the path, except with --only viewers.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlencode

import httpx
import psutil
from figures import ROOT, Value, add_output_options, as_case, measured_here, save
from made_runs import MadeRun, write_run
from websockets.asyncio.client import connect
from websockets.typing import Origin

sys.path.append(str(ROOT / "tests"))

from support.browser import Tab, browse
from support.page import Served, served

from onewan.runs.event_file import EventTail

OPEN_SECONDS = 2.0
FRAME_MS = 50
LARGEST_SHARE = 0.25
"""Of a core, for the server."""
LARGEST_CHANGE = 0.01
"""Of the time of a step."""
REPEATS = 3
POLL_SECONDS = 2.0
"""Between two questions of the page's script."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--viewers", type=int, default=50)
    parser.add_argument("--turns", type=int, default=8, help="with viewers, and as many without")
    parser.add_argument("--turn-seconds", type=float, default=15.0)
    parser.add_argument("--only", choices=("browser", "viewers"))
    add_output_options(parser)
    options = parser.parse_args()
    values = list[Value]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.only != "viewers":
            values += opened_and_scrolled(folder, options.steps, options.samples)
        if options.only != "browser":
            values += viewed(folder, options.viewers, options.turns, options.turn_seconds)
    figure = measured_here(
        name="web_page",
        title="The page of a run",
        measured=(
            f"A run of {options.steps:,} steps with {options.samples:,} sample videos in Chromium "
            f"without a window; {options.viewers} viewers of a run that is trained."
        ),
        values=values,
    )
    for value in values:
        print(
            " ".join(map(str, value.case.values())),
            value.measure,
            f"{value.median:.4g}",
            value.unit,
        )
    save(figure, options)


# ------------------------------------------------------------------------------- opening, scrolling

_OPENED = """
new Promise((done) => {
  const look = () => {
    const isDrawn = document.querySelector("#run.ready") &&
      document.querySelector("#plot-loss .line")?.getAttribute("d");
    if (isDrawn) requestAnimationFrame(() => setTimeout(() => done(performance.now()), 0));
    else setTimeout(look, 5);
  };
  look();
})
"""
_SCROLLED = """
new Promise((done) => {
  const view = %s, frames = [];
  let last = performance.now(), most = 0;
  const end = last + %d;
  const step = (now) => {
    frames.push(now - last);
    last = now;
    const before = view.scrollTop;
    view.scrollTop += %d;
    if (view.scrollTop === before) view.scrollTop = 0;
    most = Math.max(most, document.querySelectorAll(".grid .cell").length);
    if (now < end) requestAnimationFrame(step);
    else done({ frames, most, videos: document.querySelectorAll("video[src]").length });
  };
  requestAnimationFrame(step);
})
"""


def opened_and_scrolled(folder: Path, steps: int, samples: int) -> Iterator[Value]:
    """What a person who opens a long run waits for."""
    runs = folder / "runs"
    made = MadeRun(
        steps=steps,
        validate_every=500,
        sample_steps=sampled_steps(steps, samples),
        distinct_samples=4,
    )
    write_run(runs / "long", made)
    for window in ("desktop", "phone"):
        times: dict[str, list[float]] = {"at first": [], "again": []}
        for _ in range(REPEATS):
            with served(runs) as page, browse(folder / "profile") as browser:
                wait_for(page)
                for when in times:
                    tab = browser.tab(window)
                    tab.open(f"{page.root}/run/long")
                    times[when].append(tab.value(_OPENED) / 1000)
                    if when == "again" and len(times[when]) == REPEATS:
                        yield from scrolled(tab, window)
        for when, measured in times.items():
            yield Value(
                case=as_case(window=window, opened=when),
                measure="open in",
                unit="s",
                repeats=tuple(measured),
                limit=OPEN_SECONDS,
            )


def sampled_steps(steps: int, samples: int) -> Sequence[int]:
    """The steps after which the two prompts are sampled."""
    count = samples // 2
    return tuple(steps * (number + 1) // count for number in range(count))


def wait_for(page: Served) -> None:
    """Wait until the server answers: its start is not part of the page."""
    httpx.get(f"{page.root}/", timeout=60).raise_for_status()


def scrolled(tab: Tab, window: str) -> Iterator[Value]:
    """How evenly frames come while the samples and the page are scrolled."""
    tab.value("document.getElementById('samples').scrollIntoView()")
    tab.wait(".grid .cell")
    grid = "document.querySelector('.grid')"
    for what, view, pixels in (("samples", grid, 120), ("page", "document.scrollingElement", 60)):
        found = tab.value(_SCROLLED % (view, 6000, pixels))
        frames: list[float] = found["frames"][1:]
        slow = sum(frame > FRAME_MS for frame in frames)
        case = as_case(window=window, scrolled=what)
        yield Value(case=case, measure="frames over 50 ms", repeats=(slow,), limit=0)
        yield Value(case=case, measure="frames", repeats=(len(frames),))
        yield Value(case=case, measure="longest frame", unit="ms", repeats=(max(frames),))
        yield Value(case=case, measure="samples in the page", repeats=(found["most"],))


# ---------------------------------------------------------------------------------------- viewers


class Viewer:
    """One who looks at a run, as a browser does it."""

    def __init__(self, root: str, run: str) -> None:
        self._root, self._run = root, run
        self._client = httpx.AsyncClient(base_url=root, timeout=30)
        self._tags: dict[str, str] = {}
        self._versions: dict[str, Any] = {}
        self._next = {"events": 0, "log": 0}
        self.answers = 0

    async def look(
        self,
        door: asyncio.Semaphore,
        opened: asyncio.Event,
        begin: asyncio.Event,
        end: asyncio.Event,
    ) -> None:
        """Open the page, as many at a time as `door` lets, and set `opened`; from `begin` on,
        follow the run until `end`."""
        async with door:
            page = await self._client.get(f"/run/{self._run}")
        page.raise_for_status()
        query = connection(page.text)
        address = f"{self._root.replace('http', 'ws')}/_nicegui_ws/socket.io/?{urlencode(query)}"
        async with connect(address, origin=Origin(self._root)) as socket:
            talk = asyncio.create_task(keep(socket))
            await self._poll()
            opened.set()
            await begin.wait()
            await asyncio.sleep(random.uniform(0, POLL_SECONDS))
            while not end.is_set():
                await self._poll()
                await asyncio.sleep(POLL_SECONDS)
            talk.cancel()
        await self._client.aclose()

    async def _poll(self) -> None:
        summary = await self._ask("summary")
        if summary is None:
            return
        changed = [
            name
            for name, version in summary["versions"].items()
            if self._versions.get(name) != version
        ]
        self._versions = summary["versions"]
        for name in changed:
            after = self._next.get(name)
            answer = await self._ask(name if after is None else f"{name}?after={after}")
            if after is not None and answer is not None:
                self._next[name] = answer["next"]

    async def _ask(self, path: str) -> Any:
        tag = self._tags.get(path)
        headers = {"accept-encoding": "gzip"} | ({"if-none-match": tag} if tag else {})
        answer = await self._client.get(f"/api/run/{self._run}/{path}", headers=headers)
        self.answers += 1
        if answer.status_code == 304:
            return None
        answer.raise_for_status()
        self._tags[path] = answer.headers["etag"]
        return answer.json()


def connection(page: str) -> dict[str, str]:
    """What NiceGUI's script connects with, from the page that it is in."""
    found = re.search(r"query: (\{[^}]*\})", page)
    assert found is not None, "the page has no connection in it"
    query = {
        name: json.dumps(value) if isinstance(value, bool) else str(value)
        for name, value in ast.literal_eval(found[1]).items()
    }
    tab = str(random.random())
    return {**query, "document_id": tab, "tab_id": tab, "EIO": "4", "transport": "websocket"}


async def keep(socket: Any) -> None:
    """Answer what a server of Socket.IO asks to know that the viewer is there."""
    await socket.send("40")
    async for message in socket:
        if message == "2":
            await socket.send("3")


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn has measured."""

    server: float
    """Cores that the server was busy on."""
    step: float
    """Seconds of a step at the median."""
    work: float
    """Processor time of a step at the mean, which other work on the machine changes less."""


class Measurement:
    """Measures from its beginning to `end`."""

    def __init__(self, server: psutil.Process, trainer: Trainer) -> None:
        self._server, self._trainer = server, trainer
        trainer.new_steps()
        self._time, self._used = time.monotonic(), self._times()

    def _times(self) -> tuple[float, float]:
        return sum(self._server.cpu_times()[:2]), sum(self._trainer.process.cpu_times()[:2])

    def end(self) -> Turn:
        seconds, (server, trainer) = time.monotonic() - self._time, self._times()
        steps = self._trainer.new_steps()
        return Turn(
            server=(server - self._used[0]) / seconds,
            step=median(steps),
            work=(trainer - self._used[1]) / len(steps),
        )


def viewed(folder: Path, viewers: int, turns: int, seconds: float) -> Iterator[Value]:
    """What viewers cost the server, and the trainer."""
    runs, cores = folder / "demo" / "runs", sorted(psutil.Process().cpu_affinity())
    if len(cores) < 2:
        sys.exit("needs two cores: one for the trainer, one for the page and its viewers")
    psutil.Process().cpu_affinity(cores[1:2])  # of this process and those that it starts
    alone, watched = list[Turn](), list[Turn]()
    answers = 0
    with training(folder / "demo", cores[0]) as trainer, served(runs) as page:
        wait_for(page)
        begin = partial(Measurement, psutil.Process(page.process.pid), trainer)
        for _ in range(turns):
            measurement = begin()
            time.sleep(seconds)
            alone.append(measurement.end())
            turn, answered = asyncio.run(watch(page.root, viewers, seconds, begin))
            watched.append(turn)
            answers += answered
    case, none = as_case(viewers=viewers), as_case(viewers=0)
    shares = tuple(turn.server for turn in watched)
    yield Value(case=case, measure="server", unit="cores", repeats=shares, limit=LARGEST_SHARE)
    yield Value(case=case, measure="answers a second", repeats=(answers / (turns * seconds),))
    idle = tuple(turn.server for turn in alone)
    yield Value(case=none, measure="server", unit="cores", repeats=idle)
    for measure, of in (("step", "step"), ("processor time of a step", "work")):
        without, with_viewers = (
            tuple(getattr(turn, of) for turn in these) for these in (alone, watched)
        )
        # Of turns beside each other, so that what else changes on the machine counts little.
        ratio = median(b / a for a, b in zip(without, with_viewers, strict=True))
        yield Value(case=none, measure=measure, unit="s", repeats=without)
        yield Value(
            case=case,
            measure=measure,
            unit="s",
            repeats=with_viewers,
            baseline="no viewers",
            ratio=ratio,
        )
        yield Value(
            case=case, measure=f"{measure}, change", repeats=(abs(ratio - 1),), limit=LARGEST_CHANGE
        )


async def watch(
    root: str, viewers: int, seconds: float, begin: Callable[[], Measurement]
) -> tuple[Turn, int]:
    """Measure while `viewers` look at the run, once all have it open; returns how often they were
    answered meanwhile too."""
    all_viewers = [Viewer(root, "run") for _ in range(viewers)]
    opened = [asyncio.Event() for _ in all_viewers]
    door, go, end = asyncio.Semaphore(2), asyncio.Event(), asyncio.Event()
    looking = asyncio.gather(
        *(
            viewer.look(door, event, go, end)
            for viewer, event in zip(all_viewers, opened, strict=True)
        )
    )
    all_open = asyncio.gather(*(event.wait() for event in opened))
    await asyncio.wait([looking, all_open], return_when=asyncio.FIRST_COMPLETED)
    if looking.done():
        await looking  # raises what went wrong
    before = sum(viewer.answers for viewer in all_viewers)
    go.set()
    await asyncio.sleep(POLL_SECONDS)  # until all have begun to ask
    measurement = begin()
    await asyncio.sleep(seconds)
    turn = measurement.end()
    end.set()
    await looking
    return turn, sum(viewer.answers for viewer in all_viewers) - before


class Trainer:
    """A trainer, and the steps that it has done."""

    def __init__(self, process: psutil.Process, events: Path) -> None:
        self.process = process
        self._tail = EventTail(events)

    def new_steps(self) -> list[float]:
        """Seconds of each step since the last call."""
        return [event["seconds"] for event in self._tail.read() if event["event"] == "step"]


@contextmanager
def training(folder: Path, core: int) -> Iterator[Trainer]:
    """A trainer of the demonstration's model on a core of its own, until the block ends."""
    prepare = (
        "from pathlib import Path; from onewan.demo import prepare_demo; import sys; "
        "prepare_demo(Path(sys.argv[1]), 't2v-a14b', print)"
    )
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ONEWAN_DEVICE": "cpu"}
    subprocess.run(
        [sys.executable, "-c", prepare, str(folder)], check=True, env=environment, **quiet
    )
    settings = ("train.steps=1000000", "train.save_every=1000000", "sample.prompts=[]")
    command = [sys.executable, "-m", "onewan", "train", "run.yaml", *settings, "output.name=run"]
    process = subprocess.Popen(command, cwd=folder, env=environment, **quiet)
    try:
        trainer = Trainer(psutil.Process(process.pid), folder / "runs" / "run" / "events.jsonl")
        trainer.process.cpu_affinity([core])
        seen = 0
        while seen < 20:  # those at the beginning are slower
            time.sleep(0.2)
            seen += len(trainer.new_steps())
            if process.poll() is not None:
                sys.exit(f"the trainer has ended with status {process.returncode}")
        yield trainer
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()


if __name__ == "__main__":
    main()
