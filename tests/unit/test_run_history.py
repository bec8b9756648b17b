"""What is read from the events of a run: restarts, ends, damage; and how plots thin it out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from made_runs import EventLines, MadeRun, begin_events, one_step, write_run

from onewan.pages.plots import BUCKETS, curve, smoothed, thinned
from onewan.report.curves import of_experts, step_plots
from onewan.report.history import History, HistoryReader, read_history
from onewan.runs import events
from onewan.runs.layout import RunLayout

MADE = MadeRun(steps=20)


def history_of(lines: EventLines, folder: Path) -> History:
    path = folder / "events.jsonl"
    lines.write(path)
    return read_history(path)


def begun(folder: Path) -> EventLines:
    lines = EventLines()
    begin_events(lines, RunLayout(folder), MADE)
    return lines


def add_steps(lines: EventLines, steps: range, seed: int = 0) -> list[float]:
    random, losses = Random(seed), list[float]()
    for step in steps:
        event = one_step(random, MADE, step, "high" if step % 2 else "low")
        losses.append(event.loss)
        lines.add(event, 4)
    return losses


def test_steps_after_the_state_that_a_run_goes_on_from_are_replaced(tmp_path: Path) -> None:
    lines = begun(tmp_path)
    first = add_steps(lines, range(1, 9))
    for step in (4, 8):
        lines.add(
            events.Validated(step=step, expert="high", loss=1, ema=None, base=2, held_out=True)
        )
        lines.add(events.Exported(step=step, expert="high", file=tmp_path / f"run_{step}.x"))
        lines.add(events.Sampled(step=step, file=tmp_path / str(step) / "0.mp4", prompt="a"))
    lines.add(events.Saved(step=4, state=tmp_path))
    begin_events(lines, RunLayout(tmp_path), MADE)
    lines.add(events.Resumed(step=4, state=tmp_path))
    stopped_at_once = history_of(lines, tmp_path)
    assert stopped_at_once.steps.last == 4  # also of one that does no further step
    second = add_steps(lines, range(5, 7), seed=1)
    lines.add(events.Finished(step=6, run=tmp_path))
    found = history_of(lines, tmp_path)
    assert found.steps.replaced == 4
    losses = found.steps.column("loss")
    assert losses.tolist() == [*first[:4], *second]
    assert found.steps.of("high").tolist() == [1, 3, 5]
    assert found.steps.of("low").tolist() == [2, 4, 6]
    assert [len(part) for part in found.steps.timesteps("high")] == [3, 3, 3]
    assert [step for step, _ in found.validations] == [4]
    assert [*found.exports] == ["run_4.x"] and [step for step, _ in found.samples] == [4]
    assert [(p.how, p.first_step, p.last_step) for p in found.processes] == [
        ("killed", 0, 8),
        ("finished", 4, 6),
    ]


def test_changed_settings_and_rejected_requests_are_read(tmp_path: Path) -> None:
    lines = begun(tmp_path)
    add_steps(lines, range(1, 9))
    for step in (3, 8):
        lines.add(events.SettingChanged(step=step, name="optimizer.lr", old=1e-4, new=5e-5))
    lines.add(events.Rejected(step=8, request="settings", reason="train.seed: can't change"))
    assert [*history_of(lines, tmp_path).changes] == [(3, "optimizer.lr"), (8, "optimizer.lr")]
    begin_events(lines, RunLayout(tmp_path), MADE)
    lines.add(events.Resumed(step=4, state=tmp_path))
    found = history_of(lines, tmp_path)
    assert [*found.changes] == [(3, "optimizer.lr")]
    rejected = "a request (settings) was not followed: train.seed: can't change"
    assert rejected in found.warnings


def test_a_run_that_starts_again_from_the_beginning_replaces_all(tmp_path: Path) -> None:
    lines = begun(tmp_path)
    add_steps(lines, range(1, 9))
    begin_events(lines, RunLayout(tmp_path), MADE)
    again = add_steps(lines, range(1, 3), seed=1)
    found = history_of(lines, tmp_path)
    assert found.steps.column("loss").tolist() == again and found.steps.replaced == 8
    assert found.steps.experts == ["high", "low"]


@pytest.mark.parametrize(
    ("last", "how"),
    [
        (events.Finished(step=2, run=Path("run")), "finished"),
        (events.Stopped(step=2), "stopped"),
        (events.Failed(error="no space"), "failed"),
        (None, "running"),
    ],
)
def test_how_a_process_ended(tmp_path: Path, last: events.Event | None, how: str) -> None:
    lines = begun(tmp_path)
    add_steps(lines, range(1, 3))
    if last is not None:
        lines.add(last)
    found = history_of(lines, tmp_path)
    assert [process.how for process in found.processes] == [how]
    assert found.error == ("no space" if how == "failed" else "")
    assert found.planned_steps == 20 and found.seconds == pytest.approx(70)


def test_damaged_lines_and_fields_are_counted_and_left_out(tmp_path: Path) -> None:
    lines = begun(tmp_path)
    add_steps(lines, range(1, 4))
    good = lines.lines[-1]
    for change in ({"step": None}, {"step": "7"}, {"expert": 3}, {"step": -1}):
        lines.lines.append(json.dumps({**json.loads(good), **change}))
    lines.lines += [
        good[:100],
        "\x00\x01",
        json.dumps({"event": "validation", "step": 3}),
        json.dumps({"event": "warning", "text": 7}),
        json.dumps({"event": ["odd"]}),
        json.dumps({"event": "step", "step": 4, "expert": "low", "loss": None, "t": "no"}),
        json.dumps({"event": "of a later version", "step": 1}),
    ]
    path = tmp_path / "events.jsonl"
    lines.write(path)
    with path.open("ab") as file:
        file.write(good[:50].encode())  # a line that is being written
    found = read_history(path)
    assert found.steps.last == 4 and np.isnan(found.steps.column("loss")[-1])
    assert found.damaged_count == 8 and len(found.damaged) == 2


def test_a_history_grows_with_its_file_as_if_it_were_read_at_once(tmp_path: Path) -> None:
    path, lines = tmp_path / "events.jsonl", begun(tmp_path)
    heard = list[str]()
    reader = HistoryReader(path, lambda event: heard.append(event["event"]))
    assert not reader.update()
    add_steps(lines, range(1, 7))
    lines.write(path)
    assert reader.update() and not reader.update()
    assert reader.history.steps.last == 6
    begin_events(lines, RunLayout(tmp_path), MADE)
    lines.add(events.Resumed(step=4, state=tmp_path))
    add_steps(lines, range(5, 6), seed=1)
    lines.write(path)
    with path.open("ab") as file:
        file.write(b'{"event": "step", "st')  # is being written
    assert reader.update() and not reader.update()
    found, whole = reader.history, read_history(path)
    assert found.steps.column("loss").tolist() == whole.steps.column("loss").tolist()
    assert [each.how for each in found.processes] == ["killed", "running"]
    assert found.processes == whole.processes and len(heard) == len(lines.lines) - 7
    path.unlink()
    assert reader.update() and not len(reader.history.steps)


def test_a_part_of_the_curves_has_the_steps_of_that_part(tmp_path: Path) -> None:
    history = read_history(write_run(tmp_path / "run", MadeRun(steps=400)).events)
    (plot,) = [p for p in step_plots(of_experts(history, (100, 200))) if p.name == "plot-loss"]
    high, _, validation, _ = plot.series
    assert high.label == "high expert" and validation.label == "high expert, validation"
    assert 100 <= high.x[0] < 111 and 190 < high.x[-1] <= 200
    assert validation.x.tolist() == [100, 200]


def test_no_file_and_no_event_are_an_empty_history(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").touch()
    for path in (tmp_path / "events.jsonl", tmp_path / "none.jsonl"):
        found = read_history(path)
        assert not found.processes and not len(found.steps)
        assert len(found.steps.of("high")) == len(found.steps.column("loss")) == 0
        assert [len(part) for part in found.steps.timesteps("high")] == [0, 0, 0]


def test_a_made_up_run_has_what_a_real_one_writes(tmp_path: Path) -> None:
    layout = write_run(tmp_path / "run", MadeRun(steps=40, validate_every=20))
    found = read_history(layout.events)
    assert found.damaged_count == 0 and found.experts == ["high", "low"]
    assert len(found.validations) == 6 and [*found.warnings]


def test_embeddings_have_a_learning_rate_of_their_own(tmp_path: Path) -> None:
    lines = begun(tmp_path)
    for step in (1, 2):
        event = one_step(Random(0), MADE, step, "high")
        lines.add(replace(event, embeddings_lr=0.01 * step))
    (plot,) = [
        p for p in step_plots(of_experts(history_of(lines, tmp_path))) if p.name == "plot-lr"
    ]
    assert [(each.label, each.color) for each in plot.series] == [
        ("high expert", "high"),
        ("embeddings, high expert", "embeddings"),
    ]
    assert plot.series[1].y.tolist() == [0.01, 0.02]


# ----------------------------------------------------------------------------------------- thinning


def test_a_long_curve_keeps_its_spikes_in_few_points() -> None:
    x = np.arange(1.0, 50_001)
    y = np.sin(x / 5000)
    y[12_345], y[40_000], y[77] = 90.0, -7.0, np.nan
    found = curve("loss", "high", x, y)
    assert len(found.x) == BUCKETS and found.x[-1] == 50_000
    assert found.lowest is not None and found.highest is not None
    assert np.nanmax(found.highest) == 90 and np.nanmin(found.lowest) == -7
    assert np.isfinite(found.y).all() and found.y.max() < 2  # smoothed
    data = found.as_data()
    assert max(value for value in data["hi"] if value is not None) == 90
    assert all(isinstance(value, int) for value in data["x"])
    rates = np.where(x < 30_000, 1e-4, 1e-5)
    rates[123] = 0.0
    kept = thinned("lr", "high", x, rates)
    assert len(kept.x) <= BUCKETS + 2 and kept.y.min() == 0 and kept.x[-1] == 50_000


def test_what_is_drawn_of_a_long_curve_are_means_that_the_page_smooths() -> None:
    x, y = np.arange(1.0, 100_001), np.tile([1.0, 1.0, 4.0, 4.0, 0.0], 20_000)
    y[500:1000] = np.nan
    found = curve("loss", "high", x, y).as_data()
    assert found["y"][:3] == [2, 2, 2] and found["y"][5] is None
    points, steps = found["smoothing"]
    assert steps == 1000 and points == pytest.approx(1000 * BUCKETS / 100_000)


def test_a_short_curve_has_every_value() -> None:
    x, y = np.arange(1.0, 5), np.array([1.0, np.nan, 3.0, 5.0])
    found = curve("loss", "high", x, y)
    assert found.lowest is not None and found.highest is not None
    np.testing.assert_array_equal(found.highest, y)
    np.testing.assert_array_equal(found.lowest, y)
    np.testing.assert_array_equal(found.y, y)
    assert found.as_data()["y"] == [1, None, 3, 5]


def test_smoothing_is_the_mean_of_the_values_around() -> None:
    y = np.array([2.0, 4.0, np.nan, 8.0, 10.0])
    np.testing.assert_allclose(smoothed(y, 3), [3, 3, 6, 9, 9])
    assert np.isnan(smoothed(np.full(3, np.nan), 3)).all()
    np.testing.assert_array_equal(smoothed(y[[0, 1, 3]], 1), [2, 4, 8])
