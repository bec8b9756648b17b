"""The buttons of the screen Run; a process that holds the run's lock stands for its trainer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from made_runs import MadeRun, write_run
from nicegui import ui
from nicegui.testing.user import User
from support.acting import press, see, seen, until, until_told
from support.interrupted import locking
from support.page import with_user
from support.trainers import SLEEP, begin, stand_in

from onewan.cli.steering_parsers import FORMATS as COMMAND_FORMATS
from onewan.config.load import dump_run, load_run, with_change
from onewan.runs.control import take_orders
from onewan.runs.export_choices import ADAPTER_FORMATS
from onewan.runs.layout import RunLayout
from onewan.runs.queue import Queue

RUNNING = MadeRun(steps=4, on_device=False, end="")
STOPPED = MadeRun(steps=4, on_device=False, end="stopped")
ALL = ["Continue", "Stop", "Force stop", "Save now", "Sample now", "Export", "Change settings"]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONEWAN_DEVICE", "cpu")
    stand_in(SLEEP, monkeypatch)
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


def act(runs: Path, steps: Callable[[User], Awaitable[None]]) -> None:
    """Act on the screen of the run fox."""

    async def on_screen(user: User) -> None:
        await user.open("/run/fox")
        await steps(user)

    with_user(runs, on_screen)


def elements(user: User, kind: type[Any]) -> list[Any]:
    with user:
        return [each for each in ui.context.client.elements.values() if isinstance(each, kind)]


def enabled(user: User) -> list[str]:
    """The buttons that can be pressed, of those that depend on how the run stands."""
    labels = {
        str(b.props.get("aria-label")).removesuffix(": fox")
        for b in elements(user, ui.button)
        if b.enabled
    }
    return [name for name in ALL if name in labels]


def field(user: User, label: str) -> Any:
    """The newest field with this label."""
    kinds = (ui.input, ui.textarea, ui.number, ui.select)
    found = [e for kind in kinds for e in elements(user, kind) if e.props.get("label") == label]
    return found[-1]


async def fill(user: User, label: str, value: object) -> None:
    with user:
        field(user, label).set_value(value)
    await asyncio.sleep(0)


def test_what_can_be_done_follows_how_the_run_stands(runs: Path) -> None:
    layout = write_run(runs / "fox", RUNNING)

    async def steps(user: User) -> None:
        with locking(layout.lock) as trainer:
            begin(layout)
            await until(lambda: enabled(user) == [name for name in ALL if name != "Continue"])
            await press(user, "Save now: fox")
            await until_told(user, "save requested; the trainer acts on it after the current step")
            await press(user, "Stop: fox")
            await until_told(user, "stops after the current step, with its state saved")
            requested = {path.name for path in layout.control_dir.iterdir()}
            assert requested == {"save", "stop"}
            trainer.kill()
            await until(lambda: enabled(user) == ["Continue"], seconds=5)

    act(runs, steps)


def test_force_stop_asks_first(runs: Path) -> None:
    layout = write_run(runs / "fox", RUNNING)
    layout.state(2).mkdir()

    async def steps(user: User) -> None:
        with locking(layout.lock) as trainer:
            begin(layout)
            await until(lambda: "Force stop" in enabled(user))
            await press(user, "Force stop: fox")
            await see(user, "Force fox to stop?", "the state of step 2 is kept")
            assert trainer.poll() is None
            await press(user, "Force stop")
            await until(lambda: enabled(user) == ["Continue", "Export"])
            assert trainer.wait(5) is not None

    act(runs, steps)


def test_a_video_of_a_prompt_is_ordered_and_what_is_wrong_is_said_at_its_field(runs: Path) -> None:
    layout = write_run(runs / "fox", RUNNING)

    async def steps(user: User) -> None:
        with locking(layout.lock):
            begin(layout)
            await until(lambda: "Sample now" in enabled(user))
            await press(user, "Sample now: fox")
            await see(user, "Sample fox now")
            assert field(user, "Frames (4n+1)").props["placeholder"] == "81"
            await fill(user, "Prompt", "a <b>red</b> fox")
            await fill(user, "Frames (4n+1)", "6")
            await fill(user, "Seed", "x")
            await press(user, "Make the video")
            await until(lambda: field(user, "Seed").error is not None)
            assert "must be a whole number" in field(user, "Seed").error
            await fill(user, "Seed", "7")
            await press(user, "Make the video")
            await until(lambda: "must be 4n+1, got 6" in (field(user, "Frames (4n+1)").error or ""))
            assert field(user, "Seed").error is None
            await fill(user, "Frames (4n+1)", "9")
            await press(user, "Make the video")
            await until_told(user, "a sample video is requested")
            assert [*take_orders(layout, "sample")] == [
                {"prompt": "a <b>red</b> fox", "frames": 9, "seed": 7}
            ]

    act(runs, steps)


def test_settings_are_changed_with_the_history_of_changes_below(runs: Path) -> None:
    layout = write_run(runs / "fox", RUNNING)
    changed = with_change(load_run(layout.root), 0, {"train.save_every": 70})
    layout.resolved.write_text(dump_run(changed), encoding="utf-8")

    async def steps(user: User) -> None:
        with locking(layout.lock):
            begin(layout)
            await until(lambda: "Change settings" in enabled(user))
            await press(user, "Change settings: fox")
            await see(user, "Change settings of fox", "Changes so far", "train.save_every", "70")
            assert field(user, "Steps between checkpoints").value == "70"
            labels = [str(e.props.get("label")) for e in elements(user, ui.input)]
            assert not any("decay" in label for label in labels)  # the run has no average
            await fill(user, "Learning rate", "-1")
            await press(user, "Change")
            await until(lambda: field(user, "Learning rate").error is not None)
            assert "must be more than 0, got -1" in field(user, "Learning rate").error
            await fill(user, "Learning rate", "5e-5")
            await fill(
                user,
                "Prompts of sample videos, one in each line",
                'a fox\nan owl, "at night": dark',
            )
            await press(user, "Change")
            await until_told(user, "requested: optimizer.lr = 5e-05")
            (order,) = take_orders(layout, "settings")
            prompts = [each["prompt"] for each in order["sample.prompts"]]  # type: ignore[index]
            assert prompts == ["a fox", 'an owl, "at night": dark']
            assert len(order) == 2

    act(runs, steps)


def test_a_run_is_continued_to_more_steps_with_words_about_what_that_means(runs: Path) -> None:
    layout = write_run(runs / "fox", STOPPED)
    with layout.resolved.open("a", encoding="utf-8") as file:
        file.write("validation: {clips: 0}\n")
    text = layout.resolved.read_text("utf-8").replace("  seed: 0", "  seed: 0\n  schedule: cosine")
    layout.resolved.write_text(text, encoding="utf-8")
    layout.state(4).mkdir()
    Queue(runs).pause("cpu", True)

    async def steps(user: User) -> None:
        await until(lambda: enabled(user) == ["Continue", "Export"])
        await press(user, "Continue: fox")
        await see(user, "Continue fox", "It resumes from the state of step 4", "left: 4, about")
        await see(user, "It is not exactly a run of 8 steps", "follows the schedule cosine")
        await fill(user, "Continue to step", 4)
        await until(lambda: field(user, "Continue to step").error is not None)
        assert "must be more than 4" in field(user, "Continue to step").error
        await fill(user, "Continue to step", 12)
        await see(user, "left: 8, about")
        await press(user, "Continue")
        await until_told(user, "is in the queue")
        (entry,) = Queue(runs).entries()
        assert entry.arguments == ("--resume", "--allow-change", str(layout.root), "train.steps=12")
        await see(user, "In the queue: this queue is paused")
        assert enabled(user) == ["Export"]

    act(runs, steps)


def test_a_run_is_continued_though_its_captions_have_changed(runs: Path) -> None:
    layout = write_run(runs / "fox", STOPPED)
    layout.resolved.write_text(
        layout.resolved.read_text("utf-8").replace("steps: 4", "steps: 8"), encoding="utf-8"
    )
    layout.state(4).mkdir()
    Queue(runs).pause("cpu", True)

    async def steps(user: User) -> None:
        await until(lambda: "Continue" in enabled(user))
        await press(user, "Continue: fox")
        await see(user, "Continue fox")
        (changed,) = elements(user, ui.checkbox)
        with user:
            changed.set_value(True)
        await press(user, "Continue")
        await until_told(user, "is in the queue")
        (entry,) = Queue(runs).entries()
        assert entry.arguments == ("--resume=auto", "--allow-change", str(layout.root))

    act(runs, steps)


def test_exported_files_can_be_downloaded_and_formats_say_who_reads_them(runs: Path) -> None:
    layout = write_run(runs / "fox", STOPPED)
    layout.state(4).mkdir()
    layout.weights(4, "_high_noise").write_bytes(b"x" * 2000)
    layout.weights("best", "_high_noise").write_bytes(b"x")

    async def steps(user: User) -> None:
        await until(lambda: "Export" in enabled(user))
        await press(user, "Export: fox")
        await see(user, "Export fox", "Exported files", "2.0 kB")
        assert field(user, "Weights").options == {4: "of the state of step 4"}
        readers = field(user, "Format, and the programs that read it").options["kohya"]
        assert readers == "kohya (ComfyUI, diffusers, musubi-tuner)"
        links = [link.props["href"] for link in elements(user, ui.link)]
        name = "fox_000004_high_noise.safetensors"
        assert f"/media/runs/fox/weights/{name}?save=1" in links
        assert "/media/runs/fox/weights/fox_best_high_noise.safetensors?save=1" in links

    act(runs, steps)


@pytest.mark.long
def test_what_keeps_a_state_from_being_exported_is_said(runs: Path) -> None:
    layout = write_run(runs / "fox", STOPPED)
    layout.state(4).mkdir()

    async def steps(user: User) -> None:
        await until(lambda: "Export" in enabled(user))
        await press(user, "Export: fox")
        await see(user, "Exported files")
        await press(user, "Export")
        await see(user, "state.json: is missing", seconds=60)
        assert "Exporting ..." not in seen(user)

    act(runs, steps)


def test_formats_are_those_of_the_command() -> None:
    assert tuple(ADAPTER_FORMATS) == COMMAND_FORMATS


def test_a_run_whose_settings_can_not_be_read_can_still_be_stopped(runs: Path) -> None:
    layout = RunLayout(runs / "fox")

    async def steps(user: User) -> None:
        with locking(layout.lock):
            await until(lambda: "Stop" in enabled(user))
            await press(user, "Change settings: fox")
            await until_told(user, "1 problem")

    layout.create()
    begin(layout)
    layout.resolved.write_text("model: {variant: nothing}\n", encoding="utf-8")
    act(runs, steps)
