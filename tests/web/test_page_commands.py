"""Commands that the page runs: what they print, that they end with all they started."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import psutil
import pytest

from onewan.errors import OnewanError
from onewan.web.commands import Commands, command_line


def test_output_and_status_are_those_of_the_command(tmp_path: Path) -> None:
    async def act() -> None:
        commands = Commands(tmp_path)
        made = commands.start("a run file", ["init", "dog.yaml"])
        assert await made.wait() == 0
        assert (tmp_path / "dog.yaml").is_file() and made.line == "onewan init dog.yaml"
        again = commands.start("a run file", ["init", "dog.yaml"])
        assert await again.wait() == 1
        assert "dog.yaml" in "\n".join(again.output) and commands.started == [made, again]

    asyncio.run(act())


def test_a_document_is_read_and_an_error_is_the_commands(tmp_path: Path) -> None:
    async def act() -> None:
        commands = Commands(tmp_path)
        assert "properties" in await commands.json_of(["schema"])
        with pytest.raises(OnewanError, match="no such folder") as error:
            await commands.json_of(["runs", "nothing", "--json"])
        assert not error.value.message.startswith("onewan:")

    asyncio.run(act())


def test_a_command_can_be_stopped_and_one_that_nobody_waits_for_ends(tmp_path: Path) -> None:
    def running() -> list[psutil.Process]:
        return [p for p in psutil.Process().children(recursive=True) if p.is_running()]

    async def act() -> None:
        commands = Commands(tmp_path)
        demo = commands.start("the demo", ["demo", "--dir", "demo"])
        asked = asyncio.create_task(commands.json_of(["demo", "--dir", "other"]))
        end = time.monotonic() + 20
        while len(running()) < 2 and time.monotonic() < end:
            await asyncio.sleep(0.02)
        assert len(running()) >= 2
        asked.cancel()
        await demo.stop()
        assert await demo.wait() != 0 and demo.stopped
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert running() == []

    asyncio.run(act())


def test_the_line_to_copy_is_quoted() -> None:
    assert command_line(["inspect", "a file.safetensors"]) in (
        "onewan inspect 'a file.safetensors'",
        'onewan inspect "a file.safetensors"',
    )
