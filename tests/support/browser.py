"""Opens pages in Chromium without a window, uses them as a person would, and tells what happened.

Speaks the DevTools protocol with the browser through a pipe: time is real, a window may be as
narrow as a phone's, every request and every message of the console is seen, and scripts run in a
page whose own policy forbids all but its own.

`open_page` opens a file and runs one script in it. A page on a server is used step by step::

    with browse(tmp_path / "profile") as browser:
        tab = browser.tab("phone", dark=True)
        tab.open(link)                      # one that holds a token, too
        tab.fill("input[aria-label='Search']", "fox")
        tab.click("button", "Inspect")
        tab.wait("main", "4 tensors")
        assert not tab.console and not tab.foreign_requests() and not tab.overflows()
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

WINDOWS = {"desktop": (1440, 900), "phone": (390, 844)}
"""Sizes in CSS pixels."""
_SECONDS = 60.0
"""After which a page, or an answer of the browser, is given up."""

_SCRIPT = """
(async () => {
  const noted = {};
  const note = (name, value) => { noted[name] = value; };
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  const until = async (condition) => { while (!condition()) await pause(20); };
  %s
  note("overflow", %s);
  return JSON.stringify({ noted, dom: document.documentElement.outerHTML });
})()
"""

# Not the inner width of the window: on a phone it grows with what is too wide.
_OVERFLOWS = "document.documentElement.scrollWidth > document.documentElement.clientWidth"

_FIRST = """
  window.__shift = 0;
  new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.__shift += entry.value;
  }).observe({ type: "layout-shift", buffered: true });
"""
"""Runs before a page's own scripts: sums how far things moved without a click or a key."""

_FIND = """
  (selector, text) => {
    const shown = (element) => element.checkVisibility({ visibilityProperty: true });
    const texts = (element) =>
      [element.innerText, element.getAttribute("aria-label"), element.value, element.title];
    const says = (element) => text === ""
      || texts(element).some((each) => typeof each === "string" && each.includes(text));
    const found = [...document.querySelectorAll(selector)].filter(shown).filter(says);
    const holds = (element) => found.some((other) => other !== element && element.contains(other));
    return found.find((element) => !holds(element));
  }
"""

_KEYS = {
    "Enter": 13,
    "Tab": 9,
    "Escape": 27,
    "Backspace": 8,
    "Delete": 46,
    " ": 32,
    "Home": 36,
    "End": 35,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
}
_MODIFIERS = {"alt": 1, "ctrl": 2, "meta": 4, "shift": 8}


@dataclass(kw_only=True)
class Opened:
    """What a page was when its script had ended."""

    noted: dict[str, Any]
    """What the script noted; "overflow" always: whether the page is wider than the window."""
    dom: str
    requests: list[str]
    """Addresses that the page asked for, without itself and data."""
    console: list[str]
    """Messages and errors, those of the page's own policy too."""


def open_page(page: Path, profile: Path, window: str, script: str = "") -> Opened:
    """Open the file `page` in a window of `WINDOWS` and run `script`, the body of an async function
    with `note(name, value)` and `until(condition)`. Skips the test where there is no browser."""
    with browse(profile) as browser:
        tab = browser.tab(window)
        tab.open(page.as_uri())
        found = json.loads(tab.value(_SCRIPT % (script, _OVERFLOWS)))
        requests, console = tab.requests, tab.console
    own = (page.as_uri(), "about:", "data:")
    return Opened(
        noted=found["noted"],
        dom=found["dom"],
        requests=[url for url in requests if not url.startswith(own)],
        console=console,
    )


class Browser:
    """A running Chromium, which ends with `browse`."""

    def __init__(self, process: subprocess.Popen[bytes], commands: int, answers: int) -> None:
        self._process, self._commands, self._answers = process, commands, answers
        self._buffer = b""
        self._number = 0
        self._seen: dict[str, _Seen] = {}

    def tab(self, window: str = "desktop", *, dark: bool = False) -> Tab:
        """A new tab with a size of `WINDOWS`; tabs share their cookies."""
        width, height = WINDOWS[window]
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._seen[session] = _Seen()
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable", session)
        self.call("Page.addScriptToEvaluateOnNewDocument", session, source=_FIRST)
        self.call(
            "Emulation.setDeviceMetricsOverride",
            session,
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=window == "phone",
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", session, features=[scheme])
        return Tab(self, session, self._seen[session])

    def save_downloads_to(self, folder: Path) -> None:
        """Store downloads in `folder`, without a question."""
        behavior = {"behavior": "allow", "downloadPath": str(folder)}
        self.call("Browser.setDownloadBehavior", **behavior)

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the protocol; events that come before it are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + _SECONDS
        while True:
            answer = self._next(end)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._keep(answer)

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Wait until the events so far make `happened` true."""
        end = time.monotonic() + _SECONDS
        while not happened():
            self._keep(self._next(end))

    def _next(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left = max(end - time.monotonic(), 0)
            assert select.select([self._answers], [], [], left)[0], "the browser does not answer"
            data = os.read(self._answers, 1 << 20)
            assert data, f"the browser has ended with status {self._process.wait()}"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _keep(self, event: dict[str, Any]) -> None:
        seen = self._seen.get(event.get("sessionId", ""))
        if seen is None:
            return
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Page.loadEventFired":
            seen.loaded += 1
        elif method == "Network.requestWillBeSent":
            seen.requests.append(parameters["request"]["url"])
        elif method == "Network.webSocketCreated":
            seen.requests.append(parameters["url"])
        elif method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            seen.console.append(str(details.get("exception", details).get("description", details)))
        elif method == "Runtime.consoleAPICalled":
            seen.console.append(" ".join(str(each.get("value")) for each in parameters["args"]))
        elif method == "Log.entryAdded":
            entry = parameters["entry"]
            seen.console.append(f"{entry['text']} {entry.get('url', '')}".strip())


@dataclass
class _Seen:
    requests: list[str] = field(default_factory=list[str])
    console: list[str] = field(default_factory=list[str])
    loaded: int = 0
    """How often a page has loaded."""


class Tab:
    """A page that is used as a person would. What is looked for is named by a CSS selector and by a
    part of its text, its label (aria-label), its value or its title; only what is shown counts."""

    def __init__(self, browser: Browser, session: str, seen: _Seen) -> None:
        self._browser, self._session, self._seen = browser, session, seen

    def open(self, address: str) -> None:
        """Go to `address` and wait until it has loaded."""
        loaded = self._seen.loaded
        result = self._call("Page.navigate", url=address)
        assert "errorText" not in result, f"{address}: {result['errorText']}"
        if "loaderId" in result:  # it is not another place of the same page
            self._browser.wait_until(lambda: self._seen.loaded > loaded)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives, a promise its result; it has to fit JSON."""
        result = self._call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
            timeout=1000 * _SECONDS,
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, expression: str, seconds: float = 20) -> Any:
        """Wait for a JavaScript expression to be true; gives its value."""
        end = time.monotonic() + seconds
        while not (value := self.value(expression)):
            if time.monotonic() > end:
                text = self.value("document.body.innerText")
                raise AssertionError(f"after {seconds} s not yet: {expression}\n{text}")
            time.sleep(0.02)
        return value

    def wait(self, selector: str, text: str = "", seconds: float = 20) -> None:
        """Wait until something is shown."""
        self.until(f"!!{self._found(selector, text)}", seconds)

    def wait_until_gone(self, selector: str, text: str = "", seconds: float = 20) -> None:
        """Wait until nothing of that kind is shown."""
        self.until(f"!{self._found(selector, text)}", seconds)

    def has(self, selector: str, text: str = "") -> bool:
        """Whether something is shown now."""
        return self.value(f"!!{self._found(selector, text)}")

    def text(self, selector: str = "main") -> str:
        """The text that an element shows."""
        self.wait(selector)
        return self.value(f"{self._found(selector, '')}.innerText")

    def click(self, selector: str, text: str = "", seconds: float = 20) -> None:
        """Click with the mouse, once the element stands still and nothing lies over it."""
        place = self.until(
            f"""(async () => {{
              const element = {self._found(selector, text)};
              if (!element || element.disabled || element.ariaDisabled === "true") return null;
              element.scrollIntoView({{ block: "center", inline: "center", behavior: "instant" }});
              const box = () => element.getBoundingClientRect();
              const before = box();
              await new Promise((done) => setTimeout(done, 50));
              const after = box();
              if (before.x !== after.x || before.y !== after.y) return null;
              const x = after.x + after.width / 2, y = after.y + after.height / 2;
              const top = document.elementFromPoint(x, y);
              return top && (element.contains(top) || top.contains(element)) ? [x, y] : null;
            }})()""",
            seconds,
        )
        at = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, **at)

    def fill(self, selector: str, value: str, text: str = "") -> None:
        """Replace the text of a field by typing."""
        self.click(selector, text)
        self.press("ctrl+a")
        if value:
            self.type(value)
        else:
            self.press("Delete")

    def type(self, value: str) -> None:
        """Type where the cursor is."""
        self._call("Input.insertText", text=value)

    def press(self, key: str) -> None:
        """Press a key, such as "Escape", "s" or "ctrl+Enter"."""
        *modifiers, name = key.split("+") if key != "+" else [key]
        held = sum(_MODIFIERS[each] for each in modifiers)
        code = _KEYS.get(name, ord(name[0].upper()))
        event: dict[str, Any] = {"key": name, "windowsVirtualKeyCode": code, "modifiers": held}
        typed = "\r" if name == "Enter" else name if len(name) == 1 and not held & ~8 else ""
        if held == _MODIFIERS["ctrl"] and name == "a":
            event["commands"] = ["selectAll"]
        down = {"type": "keyDown", "text": typed} if typed else {"type": "rawKeyDown"}
        self._call("Input.dispatchKeyEvent", **down, **event)
        self._call("Input.dispatchKeyEvent", type="keyUp", **event)

    def choose_file(self, selector: str, file: Path) -> None:
        """Choose a file in an input, which need not be shown."""
        root = self._call("DOM.getDocument")["root"]["nodeId"]
        node = self._call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self._call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def picture(self, file: Path, *, whole: bool = False) -> None:
        """Write a PNG of the window, or of the whole page."""
        shot = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(shot["data"]))

    def overflows(self) -> bool:
        """Whether the page is wider than the window."""
        return self.value(_OVERFLOWS)

    def layout_shift(self) -> float:
        """How far things have moved by themselves since the page was opened (the measure CLS)."""
        return self.value("window.__shift")

    @property
    def console(self) -> list[str]:
        """Messages and errors so far, those of the page's own policy too."""
        self._call("Page.getLayoutMetrics")  # what came before its answer is kept
        return list(self._seen.console)

    @property
    def requests(self) -> list[str]:
        """Addresses that the page asked for so far, those of web sockets too."""
        self._call("Page.getLayoutMetrics")
        return list(self._seen.requests)

    def foreign_requests(self) -> list[str]:
        """Those requests that went to another host or port than the page's own."""
        own = self.value("location.host")
        near = ("data:", "blob:", "about:")
        return [
            url for url in self.requests if not url.startswith(near) and urlsplit(url).netloc != own
        ]

    def _found(self, selector: str, text: str) -> str:
        return f"({_FIND})({json.dumps(selector)}, {json.dumps(text)})"

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)


@contextlib.contextmanager
def browse(profile: Path) -> Iterator[Browser]:
    """A browser with its own folder `profile`. Skips the test where there is none; in CI that is a
    failure."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None or os.name != "posix":
        message = "needs the browser chromium on the path, and pipes"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(message)
    import fcntl

    commands_in, commands = os.pipe()
    answers, answers_out = os.pipe()
    # The browser reads commands from 3 and writes answers to 4, which may be in use here.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands_in, answers_out)]

    def connect() -> None:
        for number, end in zip((3, 4), ends, strict=True):
            os.dup2(end, number)

    process = subprocess.Popen(
        [
            program,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--mute-audio",
            "--autoplay-policy=no-user-gesture-required",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ],
        pass_fds=(3, 4),
        preexec_fn=connect,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in (commands_in, answers_out, *ends):
        os.close(end)
    browser = Browser(process, commands, answers)
    try:
        yield browser
        with contextlib.suppress(OSError, AssertionError):
            browser.call("Browser.close")
        process.wait(timeout=20)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(commands)
        os.close(answers)
