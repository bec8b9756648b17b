"""Commands that the page runs: what they print, how far they are, that they end with all they
started."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from onewan.errors import OnewanError
from onewan.serving import commands as page_commands
from onewan.serving.commands import Command, Commands, Progress, command_line


def test_output_and_status_are_those_of_the_command(tmp_path: Path) -> None:
    async def act() -> None:
        commands = Commands(tmp_path)
        made = commands.start("a run file", ["init", "dog.yaml"])
        assert await made.wait() == 0
        assert (tmp_path / "dog.yaml").is_file() and made.line == "onewan init dog.yaml"
        again = commands.start("a run file", ["init", "dog.yaml"])
        assert await again.wait() == 1
        assert "dog.yaml" in "\n".join(again.output) and commands.started == [made, again]
        assert made.state == "Done." and "error (exit status 1)" in again.state

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
    def children() -> set[psutil.Process]:
        return set(psutil.Process().children(recursive=True))

    others = children()  # of tests that ran before in this process

    def running() -> list[psutil.Process]:
        return [p for p in children() - others if p.is_running()]

    async def act() -> None:
        commands = Commands(tmp_path)
        demo = commands.start("the demo", ["demo", "--dir", "demo"])
        assert demo.state == "Starting ..." and commands.running("demo", "merge") == [demo]
        asked = asyncio.create_task(commands.json_of(["demo", "--dir", "other"]))
        end = time.monotonic() + 20
        while len(running()) < 2 and time.monotonic() < end:
            await asyncio.sleep(0.02)
        assert len(running()) >= 2
        asked.cancel()
        await demo.stop()
        assert await demo.wait() != 0 and demo.stopped and demo.state.startswith("Stopped")
        assert commands.running("demo") == [] and demo.written() == []
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert running() == []

    asyncio.run(act())


def test_a_command_that_is_not_wanted_any_more_when_it_starts_ends(tmp_path: Path) -> None:
    others = set(psutil.Process().children(recursive=True))

    async def act() -> None:
        asked = asyncio.create_task(Commands(tmp_path).json_of(["demo", "--dir", "demo"]))
        await asyncio.sleep(0)  # it is being started
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert set(psutil.Process().children(recursive=True)) <= others

    asyncio.run(act())


def test_the_line_to_copy_is_quoted() -> None:
    assert command_line(["inspect", "a file.safetensors"]) in (
        "onewan inspect 'a file.safetensors'",
        'onewan inspect "a file.safetensors"',
    )


def with_command(
    folder: Path,
    script: str,
    act: Callable[[Command], Awaitable[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run `act` with a command whose program is `script`."""
    package = folder / "onewan"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(script, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))

    async def whole() -> None:
        await act(Commands(folder).start("A command", ["convert", "a b", "c"]))

    asyncio.run(whole())


def test_progress_is_told_and_is_not_a_line_of_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = """
import json, os, sys
assert os.environ["ONEWAN_PROGRESS"] == "json"
print("a note")
fields = {"activity": "writing", "done": 1200, "total": 3000, "unit": "MB", "note": ""}
print(json.dumps({"progress": fields}), file=sys.stderr)
print('{"progress": "none of ours"}', sys.argv[1:])
"""

    async def act(command: Command) -> None:
        while command.result is None:
            await command.news()
        assert command.result == 0
        assert command.progress is not None
        assert command.progress.text == "writing: 1,200 of 3,000 MB"
        assert sorted(command.output) == [
            "a note",
            "{\"progress\": \"none of ours\"} ['convert', 'a b', 'c']",
        ]

    with_command(tmp_path, script, act, monkeypatch)


def test_units_are_counted() -> None:
    told = Progress(activity="captions", done=1, total=7, unit="item")
    assert told.text == "captions: 1 of 7 items"
    assert told.model_copy(update={"total": 1}).text == "captions: 1 of 1 item"


def test_what_a_command_has_written_is_its_destination_or_the_files_that_it_names(
    tmp_path: Path,
) -> None:
    output = tmp_path / "lora.safetensors"
    experts = [tmp_path / f"lora_{name}_noise.safetensors" for name in ("high", "low")]
    for file in (*experts, tmp_path.parent / "other.safetensors"):
        file.touch()
    lines = [f"{file}: 1.0 MB" for file in (*experts, tmp_path.parent / "other.safetensors")]
    command = Command(title="Convert", arguments=("convert",), destination=output)
    command.output.extend(["note: the name says which", *lines])
    assert command.written() == []  # it has not ended
    command.result = 0
    assert command.written() == experts
    command.destination = tmp_path
    assert command.written() == [tmp_path]


@pytest.mark.parametrize("listens", [True, False])
def test_a_command_that_is_stopped_may_clean_up_and_is_killed_if_it_does_not_end(
    listens: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_commands, "_STOPPING_SECONDS", 0.5 if not listens else 30)
    script = f"""
import signal, time
if not {listens}:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
try:
    print("begun", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("cleaned up")
    raise SystemExit(130)
"""

    async def act(command: Command) -> None:
        while not command.output:
            await command.news()
        await command.stop()
        result = await asyncio.wait_for(command.wait(), 20)
        assert list(command.output) == (["begun", "cleaned up"] if listens else ["begun"])
        assert result == (130 if listens else -9)

    with_command(tmp_path, script, act, monkeypatch)
