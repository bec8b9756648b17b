"""All screens in Chromium, in both themes and at both widths: everyone can use them, nothing moves
by itself, and the keyboard alone is enough."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from made_runs import MadeRun, write_run
from support.axe import accessibility_faults
from support.browser import Browser, Tab, browse
from support.interrupted import locking
from support.page import Served, served
from support.trainers import begin

from onewan.demo.clips import write_clips
from onewan.presets.drafts import Drafts
from onewan.web.frame import SECTIONS

pytestmark = pytest.mark.long

RUN_FILE = """\
model: {{variant: t2v-a14b, path: Wan-AI/Wan2.2-T2V-A14B-Diffusers}}
wan_config: {{max_frames: 17}}
video_data: {{sources: [{{path: {data}/clips}}], resolution: 96x96, cache_dir: {data}/cache}}
output: {{dir: {data}/runs, name: {name}}}
"""
FOCUSED = """
  (() => {
    const element = document.activeElement, box = element.getBoundingClientRect();
    const at = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
    const style = getComputedStyle(element);
    return {
      name: element.ariaLabel || element.innerText || "",
      seen: !!at && (element.contains(at) || at.contains(element)),
      marked: element.matches(":focus-visible"),
    };
  })()
"""


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with browse(tmp_path / "profile") as browser:
        yield browser


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Served]:
    """A page with two runs, clips, and a draft."""
    runs = tmp_path / "runs"
    for name, end in (("dog", "stopped"), ("cat", "")):
        layout = write_run(runs / name, MadeRun(steps=40, end=end, sample_steps=(20, 40)))
        layout.state(40).mkdir()
    write_clips(tmp_path / "clips")
    for name in ("fox", "dog"):
        text = RUN_FILE.format(data=tmp_path.as_posix(), name=name)
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    with served(runs, "--data", str(tmp_path)) as page:
        yield page


def draft_of(tmp_path: Path, name: str) -> str:
    text = (tmp_path / f"{name}.yaml").read_text(encoding="utf-8")
    return f"/new?draft={Drafts(tmp_path / 'runs' / '.drafts').add(text)}"


def screens(tmp_path: Path) -> dict[str, str]:
    """What is waited for on each screen, by its address."""
    found = {address: "document.querySelector('main h1')" for _, address in SECTIONS}
    plan = "/fit[.]|There is no plan/.test(document.querySelector('[aria-label=Plan]').innerText)"
    drawn = "[...document.images].every((i) => i.naturalWidth || i.loading === 'lazy')"
    return found | {
        "/": "document.querySelectorAll('main h3 a').length === 2",
        "/run/dog": "document.querySelector('#plot-loss .line')",
        "/help": "/PyTorch|torch/.test(document.querySelector('.ow-help-report').innerText)",
        "/files": "document.querySelectorAll('.ow-files li').length > 5",
        f"/data?file={quote(str(tmp_path / 'fox.yaml'))}": "document.body.innerText.includes("
        f"'Examine all frames again') && {drawn}",
        draft_of(tmp_path, "fox"): plan,
        "/help/page": "document.querySelector('.ow-doc h2')",
    }


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("window", ["desktop", "phone"])
def test_everyone_can_use_each_screen(
    page: Served,
    browser: Browser,
    tmp_path: Path,
    pytestconfig: pytest.Config,
    window: str,
    dark: bool,
) -> None:
    faults = list[str]()
    for address, ready in screens(tmp_path).items():
        tab = browser.tab(window, dark=dark)
        tab.open(page.root + address)
        tab.until(f"!!({ready})", 90)
        if address.startswith("/run/"):
            tab.value("document.querySelector('#samples').scrollIntoView()")
            tab.until("onewanRun.samples.cells.size > 0")
        found = accessibility_faults(tab, pytestconfig) + tab.console + tab.foreign_requests()
        found += ["wider than the window"] if tab.overflows() else []
        found += [f"moves: {shift:.3f}"] if (shift := tab.layout_shift()) >= 0.05 else []
        faults += [f"{address}: {each}" for each in found]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(("window", "dark"), [("desktop", True), ("phone", False)])
def test_everyone_can_use_the_dialogs_of_a_run(
    browser: Browser, tmp_path: Path, pytestconfig: pytest.Config, window: str, dark: bool
) -> None:
    running = write_run(tmp_path / "runs" / "fox", MadeRun(steps=40, on_device=False, end=""))
    running.state(40).mkdir()
    write_run(tmp_path / "runs" / "dog", MadeRun(steps=40, end="stopped"))
    tab = browser.tab(window, dark=dark)
    with served(tmp_path / "runs") as page, locking(running.lock):
        begin(running)
        for name in ("Sample now: fox", "Change settings: fox", "Export: fox", "Continue: dog"):
            tab.open(f"{page.root}/run/{name[-3:]}")
            tab.wait("#run.ready", seconds=60)
            tab.click("button", name)
            tab.wait(".q-dialog h2", name[-3:])
            assert not accessibility_faults(tab, pytestconfig) and not tab.overflows(), name
    assert not tab.console


def focus(tab: Tab, name: str) -> None:
    """Go to what has the name with the key Tab alone."""
    passed = list[str]()
    while len(passed) < 150:
        tab.press("Tab")
        focused = tab.value(FOCUSED)
        if name in focused["name"]:
            assert focused["seen"] and focused["marked"], focused
            return
        passed.append(focused["name"])
    raise AssertionError(f"{name} is not among {passed}")


def test_the_keyboard_is_enough(page: Served, browser: Browser, tmp_path: Path) -> None:
    tab = browser.tab()
    tab.open(page.root)
    focus(tab, "Skip to content")
    tab.press("Enter")
    focus(tab, "Delete: dog")
    tab.press("Enter")
    tab.wait(".q-dialog h2", "Delete dog?")
    tab.press("Escape")
    tab.wait_until_gone(".q-dialog")

    tab.open(f"{page.root}/run/dog")
    tab.wait("#run.ready")
    focus(tab, "Continue: dog")
    tab.press("Enter")
    tab.wait(".q-dialog h2", "Continue dog")
    tab.press("Escape")
    tab.wait_until_gone(".q-dialog")

    tab.open(f"{page.root}/new")
    tab.wait("button", "Continue")
    focus(tab, "Name of the run")
    tab.press("ctrl+a")
    tab.type("owl")
    focus(tab, "Continue")
    tab.press("Enter")
    tab.until("location.search.startsWith('?draft=')")

    tab.open(page.root + draft_of(tmp_path, "dog"))
    tab.wait("main", "There is a run called dog already")
    focus(tab, "Start now")
    tab.press("Enter")
    tab.wait(".q-notification", "can't be started before its problems are solved")

    tab.open(f"{page.root}/data?file={quote(str(tmp_path / 'fox.yaml'))}")
    tab.wait("textarea")
    focus(tab, "Caption of red_square.mp4")
    tab.press("ctrl+a")
    tab.type("a square glides")
    tab.press("ctrl+Enter")
    tab.wait(".ow-clip-state", "Saved")
    assert (tmp_path / "clips" / "red_square.txt").read_text("utf-8").strip() == "a square glides"

    tab.open(f"{page.root}/files")
    tab.wait(".ow-files a")
    focus(tab, "red_square.mp4")
    tab.press("Enter")
    tab.wait("h1", "red_square.mp4")

    tab.open(f"{page.root}/help")
    tab.wait("input")
    focus(tab, "Search the documentation")
    tab.type("queue")
    tab.wait("main", " found")
