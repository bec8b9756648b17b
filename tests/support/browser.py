"""Opens a page in Chromium without a window, runs a script in it, and tells what happened.

Speaks the DevTools protocol with the browser through a pipe: time is real, a window may be as
narrow as a phone's, every request and every message of the console is seen, and scripts run in a
page whose own policy forbids all but its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

WINDOWS = {"desktop": (1440, 900), "phone": (390, 844)}
"""Sizes in CSS pixels."""
_SECONDS = 60.0
"""After which a page is given up."""

_SCRIPT = """
(async () => {
  const noted = {};
  const note = (name, value) => { noted[name] = value; };
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  const until = async (condition) => { while (!condition()) await pause(20); };
  %s
  note("overflow", document.documentElement.scrollWidth > innerWidth);
  return JSON.stringify({ noted, dom: document.documentElement.outerHTML });
})()
"""


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


@dataclass(kw_only=True)
class _Connection:
    """The pipe to the browser."""

    process: subprocess.Popen[bytes]
    commands: int
    answers: int
    requests: list[str] = field(default_factory=list[str])
    console: list[str] = field(default_factory=list[str])
    _buffer: bytes = b""
    _number: int = 0

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The result of a command; events that come before it are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._keep(answer)

    def wait_for(self, method: str) -> None:
        """Wait for an event."""
        while (event := self._next()).get("method") != method:
            self._keep(event)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self.answers, 1 << 20)
            assert data, f"the browser has ended with status {self.process.wait()}"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _keep(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.console.append(str(details.get("exception", details).get("description", details)))
        elif method == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(each.get("value")) for each in parameters["args"]))
        elif method == "Log.entryAdded":
            self.console.append(parameters["entry"]["text"])


def open_page(page: Path, profile: Path, window: str, script: str = "") -> Opened:
    """Open the file `page` in a window of `WINDOWS` and run `script`, the body of an async function
    with `note(name, value)` and `until(condition)`. Skips the test where there is no browser."""
    width, height = WINDOWS[window]
    with _browser(profile) as browser:
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            browser.call(f"{domain}.enable", session)
        browser.call(
            "Emulation.setDeviceMetricsOverride",
            session,
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=window == "phone",
        )
        browser.call("Page.navigate", session, url=page.as_uri())
        browser.wait_for("Page.loadEventFired")
        result = browser.call(
            "Runtime.evaluate",
            session,
            expression=_SCRIPT % script,
            awaitPromise=True,
            returnByValue=True,
            timeout=1000 * _SECONDS,
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
    found = json.loads(result["result"]["value"])
    own = (page.as_uri(), "about:")
    requests = [url for url in browser.requests if not url.startswith((*own, "data:"))]
    return Opened(
        noted=found["noted"], dom=found["dom"], requests=requests, console=browser.console
    )


@contextlib.contextmanager
def _browser(profile: Path) -> Iterator[_Connection]:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None or os.name != "posix":
        pytest.skip("needs the browser chromium on the path, and pipes")
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
    connection = _Connection(process=process, commands=commands, answers=answers)
    try:
        yield connection
        with contextlib.suppress(OSError, AssertionError):
            connection.call("Browser.close")
        process.wait(timeout=20)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(commands)
        os.close(answers)
