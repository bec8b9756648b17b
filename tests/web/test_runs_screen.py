"""The screen Runs, as NiceGUI's `User` sees it; trainers are small programs in their place."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from made_runs import MadeRun, write_run
from nicegui import ui
from nicegui.testing.user import User
from support.acting import press, see, see_no, seen, until, until_told
from support.interrupted import locking
from support.page import with_user
from support.trainers import SLEEP, begin, run_file, stand_in

from onewan.files import IS_WINDOWS
from onewan.runs.event_file import EventFile
from onewan.runs.events import Failed
from onewan.runs.layout import RunLayout
from onewan.runs.machine import Gpu, Machine, gpus_of
from onewan.runs.processes import force_stop
from onewan.runs.queue import Queue

ENDED = MadeRun(steps=4, on_device=False)
STOPPED = MadeRun(steps=4, on_device=False, end="stopped")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONEWAN_DEVICE", "cpu")
    stand_in(SLEEP, monkeypatch)
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


def act(runs: Path, steps: Callable[[User], Awaitable[None]]) -> None:
    """Act on the screen, and end all trainers that were started."""

    async def on_screen(user: User) -> None:
        await user.open("/")
        await steps(user)

    try:
        with_user(runs, on_screen)
    finally:
        for entry in Queue(runs).entries():
            if entry.process is not None:
                force_stop(entry.process)


def buttons(user: User, subject: str) -> list[str]:
    """The names of the buttons about `subject`."""
    with user:
        elements = list(ui.context.client.elements.values())
    labels = [str(e.props.get("aria-label")) for e in elements if isinstance(e, ui.button)]
    return [label.partition(":")[0] for label in labels if label.endswith(f": {subject}")]


def test_runs_are_listed_with_where_they_stand_also_damaged_ones(runs: Path) -> None:
    write_run(runs / "mira", MadeRun(steps=40, on_device=False, end="finished", sample_steps=(40,)))
    write_run(runs / "<b>fox", MadeRun(steps=8, on_device=False, end="stopped"))
    (runs / "broken").mkdir()
    (runs / "broken" / "events.jsonl").write_bytes(b"\xff{{\n")

    async def steps(user: User) -> None:
        await see(user, "3 runs", "mira", "finished", "step 40 of 40 (high 20 of 20, low 20 of 20)")
        await see(user, "loss: high 0.", "t2v-a14b, lora; started 20", "stopped", "<b>fox")
        await see(user, "broken", "resolved.yaml: is missing")
        assert buttons(user, "mira") == ["Delete"]
        assert buttons(user, "<b>fox") == ["Continue", "Delete"]
        assert buttons(user, "broken") == ["Delete"]
        with user:
            elements = list(ui.context.client.elements.values())
        (picture,) = (e for e in elements if e.tag == "img" and "mira" in str(e.props["src"]))
        assert picture.props["src"] == "/poster/runs/mira/samples/000040/0.mp4"
        assert picture.props["alt"] == "Newest sample of mira"

    act(runs, steps)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names of files")
def test_names_and_errors_that_are_not_utf_8_are_written_with_escapes(runs: Path) -> None:
    strange = Path(os.fsdecode(os.fsencode(runs) + b"/fox\xff"))
    write_run(strange, ENDED)
    layout = write_run(runs / "dog", MadeRun(steps=4, on_device=False, end=""))
    with EventFile(layout.events) as file:
        file.write(Failed(error="a\udcff.mp4: is damaged\nmore"))

    async def steps(user: User) -> None:
        await see(user, "fox\\udcff", "a\\udcff.mp4: is damaged")
        response = await user.http_client.get("/")
        assert response.status_code == 200 and "is damaged" in response.text

    act(runs, steps)


def test_a_search_shows_the_runs_that_match_and_more_are_shown_on_request(runs: Path) -> None:
    for number in range(30):
        begin(RunLayout(runs / f"old-{number:02}"), end=True)
    write_run(runs / "mira", ENDED)

    async def steps(user: User) -> None:
        await see(user, "31 runs", "old-29")
        assert len([text for text in seen(user) if text.startswith("old-")]) < 30
        await press(user, "Show more")
        await see(user, *(f"old-{number:02}" for number in range(30)))
        user.find(ui.input).type("MIRA lora")
        await see(user, "1 of 31 runs", "mira")
        await see_no(user, "old-")
        user.find(ui.input).clear().type("stopped")
        await see(user, "30 of 31 runs")

    act(runs, steps)


def test_a_run_is_deleted_only_after_a_question(runs: Path) -> None:
    layout = write_run(runs / "mira", ENDED)

    async def steps(user: User) -> None:
        await press(user, "Delete: mira")
        await see(user, "Delete mira?", f"The folder {layout.root}")
        await press(user, "Cancel")
        await see_no(user, "Delete mira?")
        assert layout.root.exists()
        await press(user, "Delete: mira")
        await see(user, "This can't be undone")
        await press(user, "Delete")
        await see(user, "No runs yet")
        assert not layout.root.exists()

    act(runs, steps)


def test_a_run_of_a_terminal_is_watched_stopped_and_seen_when_it_is_killed(runs: Path) -> None:
    layout = RunLayout(runs / "fox")

    async def steps(user: User) -> None:
        await see(user, "No runs yet")
        write_run(layout.root, MadeRun(steps=4, on_device=False, end=""))
        with locking(layout.lock) as trainer:
            begin(layout)
            await see(user, "fox", "running")
            assert buttons(user, "fox") == ["Stop", "Force stop"]
            await press(user, "Stop: fox")
            await until_told(user, "fox: stops after the current step")
            assert (layout.control_dir / "stop").exists()
            trainer.kill()
            await see(user, "killed", "its process ended without a last event", seconds=5)
        assert buttons(user, "fox") == ["Continue", "Delete"]

    act(runs, steps)


def test_a_trainer_that_does_not_react_is_forced_to_stop(runs: Path) -> None:
    layout = write_run(runs / "fox", MadeRun(steps=4, on_device=False, end=""))
    layout.state(2).mkdir()

    async def steps(user: User) -> None:
        with locking(layout.lock) as trainer:
            begin(layout)
            await press(user, "Force stop: fox")
            await see(user, "Force fox to stop?", "the state of step 2 is kept")
            await press(user, "Cancel")
            await see_no(user, "Force fox to stop?")
            assert trainer.poll() is None
            await press(user, "Force stop: fox")
            await see(user, "saves nothing")
            await press(user, "Force stop")
            await see(user, "killed")
            assert trainer.wait(5) is not None

    act(runs, steps)


def test_a_question_stays_when_the_run_changes_meanwhile(runs: Path) -> None:
    layout = write_run(runs / "fox", MadeRun(steps=4, on_device=False, end=""))

    async def steps(user: User) -> None:
        with locking(layout.lock) as trainer:
            begin(layout)
            await press(user, "Force stop: fox")
            await see(user, "Force fox to stop?")
            trainer.kill()
            await see(user, "killed")
            await press(user, "Force stop")
            await until_told(user, "is not running, so there is nothing to end")

    act(runs, steps)


def test_the_queue_of_a_device_is_paused_reordered_and_started(runs: Path) -> None:
    for name in ("a", "b", "c"):
        write_run(runs / name, STOPPED)
        queue = Queue(runs)
        queue.add(runs / name, ["--resume=auto"])
    queue.pause("cpu", True)

    async def steps(user: User) -> None:
        await see(user, "Device cpu, paused", "this queue is paused")
        await see(user, f"onewan train --resume=auto {runs / 'a'}")
        assert buttons(user, "a") == ["Start next", "Down", "Remove"]
        assert buttons(user, "c") == ["Start next", "Up", "Remove"]
        await press(user, "Up: c")
        await until(lambda: [entry.run for entry in queue.entries()] == ["a", "c", "b"])
        await press(user, "Remove: b")
        await until(lambda: [entry.run for entry in queue.entries()] == ["a", "c"])
        await press(user, "Start next: c")
        await see(user, "is being trained", "this queue is paused")
        await press(user, "Start the queue: on cpu")
        await see(user, "waits for c, which uses the device cpu")
        await press(user, "Stop: c")
        await until_told(user, "c: was stopped before it had begun")
        await see(user, "ended before it began")
        await until(lambda: [entry.state for entry in queue.entries()] == ["failed", "started"])

    act(runs, steps)


def test_what_a_trainer_said_before_its_run_began_is_shown_in_full(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in("print('line 1\\nclips: there are none <b>'); raise SystemExit(1)", monkeypatch)
    Queue(runs).add(run_file(tmp_path, "fox"))

    async def steps(user: User) -> None:
        await see(user, "fox", "ended before it began", "line 1\nclips: there are none <b>")
        await press(user, "Remove: fox")
        await see(user, "Nothing waits")

    act(runs, steps)


def test_what_went_wrong_is_told_and_stays(runs: Path) -> None:
    layout = write_run(runs / "fox", STOPPED)

    async def steps(user: User) -> None:
        await see(user, "fox")
        layout.resolved.write_text("model: {path: x, variant: wan}", "utf-8")
        await press(user, "Continue: fox")
        await until_told(user, "model.variant")
        assert Queue(runs).entries() == ()
        (runs / ".queue" / "queue.json").parent.mkdir(exist_ok=True)
        (runs / ".queue" / "queue.json").write_text("{", "utf-8")
        await see(user, "is no queue that this version can read")
        (runs / ".queue" / "queue.json").unlink()
        await see_no(user, "is no queue that this version can read")

    act(runs, steps)


# ---------------------------------------------------------------------------------------- machine


def test_the_machine_is_on_the_screen(runs: Path) -> None:
    async def steps(user: User) -> None:
        await see(user, "CPU", "RAM", "Disk of the runs", " GB free")

    act(runs, steps)


def test_gpus_are_read_from_the_answer_of_the_driver(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = '0, NVIDIA H100, 45, 1024, 81559, 61\n1, "A, B", [N/A], [N/A], [N/A], [N/A]\nodd\n'
    expected = (
        Gpu(name="NVIDIA H100", load=0.45, used=2**30, total=81559 * 2**20, temperature=61),
        Gpu(name="A, B", load=None, used=None, total=None, temperature=None),
    )
    assert gpus_of(answer) == expected
    if IS_WINDOWS:
        return  # where a program is no script
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat <<'EOF'\n{answer}EOF\n", "utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    assert Machine(runs).read().gpus == expected
    program.write_text("#!/bin/sh\necho broken driver\nexit 9\n", "utf-8")
    assert Machine(runs).read().gpus == ()
