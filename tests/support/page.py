"""The page in tests: as NiceGUI's `User` sees it, without a browser, and as a server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from nicegui import Client, core, ui
from nicegui.testing.general import nicegui_reset_globals, prepare_simulation
from nicegui.testing.user import User

from onewan.serving.commands import Commands
from onewan.serving.roots import Roots
from onewan.web.application import add_screens
from onewan.web.page import Page


@contextlib.contextmanager
def fresh_nicegui() -> Iterator[None]:
    """NiceGUI without any page of before, and without those of the block afterwards."""
    with nicegui_reset_globals():
        try:
            yield
        finally:
            # It would forget the modules of these pages, and the packages around them, which other
            # tests of this process have imported.
            Client.page_routes.clear()


@contextlib.asynccontextmanager
async def opened_page(runs: Path, data: Sequence[Path] = ()) -> AsyncIterator[User]:
    """A user of the page of `runs`."""
    runs.mkdir(parents=True, exist_ok=True)
    with fresh_nicegui():
        os.environ["NICEGUI_USER_SIMULATION"] = "true"
        try:
            prepare_simulation()
            page = Page(roots=Roots(runs, data or (runs.parent,)), commands=Commands(runs.parent))
            add_screens(page)
            ui.run()
            async with core.app.router.lifespan_context(core.app):
                transport = httpx.ASGITransport(core.app)
                async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                    yield User(client)
        finally:
            os.environ.pop("NICEGUI_USER_SIMULATION", None)


def with_user(
    runs: Path, act: Callable[[User], Awaitable[None]], data: Sequence[Path] = ()
) -> None:
    """Run `act` as a user of the page of `runs`."""

    async def whole() -> None:
        failure = None
        async with opened_page(runs, data) as user:
            try:
                await act(user)
            except BaseException as error:  # noqa: BLE001  (raised below)
                failure = error  # NiceGUI would not end, and later tests would fail
        if failure is not None:
            raise failure

    asyncio.run(whole())


@dataclass(frozen=True)
class Served:
    """A page that is served by a process."""

    process: subprocess.Popen[str]
    address: str
    """Such as ``http://127.0.0.1:40123/``, with the token if it asks for one."""

    @property
    def root(self) -> str:
        return self.address.partition("?")[0].rstrip("/")


@contextlib.contextmanager
def served(runs: Path, *options: str, cwd: Path | None = None) -> Iterator[Served]:
    """`onewan serve RUNS` in a process, at a free port, until the block ends."""
    command = [sys.executable, "-m", "onewan", "serve", str(runs), "--port", "0", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, encoding="utf-8", cwd=cwd or runs.parent
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        found = re.search(r"https?://\S+", first)
        assert found is not None, first + process.stdout.read()
        yield Served(process, found[0])
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
