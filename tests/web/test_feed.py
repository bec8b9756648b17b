"""What the page reads of a run: as it grows, is resumed, damaged, replaced or deleted; and once for
all viewers."""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from made_runs import EventLines, MadeRun, begin_events, one_step, write_run
from nicegui.testing.user import User

from onewan.report.history import read_history
from onewan.runs import events
from onewan.serving.feed import Answer, Feed, Feeds
from onewan.serving.roots import OutsideError, Roots
from tests.support.page import with_user

MADE = MadeRun(steps=40, end="")


class Growing:
    """A run whose events come one after the other."""

    def __init__(self, folder: Path) -> None:
        self.layout = write_run(folder, MadeRun(steps=0, validate_every=0, end=""))
        self.lines, self._random = EventLines(), Random(0)
        begin_events(self.lines, self.layout, MADE)
        self.feed = Feed(self.layout, Roots(folder.parent, []).address)

    def steps(self, steps: range) -> None:
        for step in steps:
            self.lines.add(one_step(self._random, MADE, step, "high" if step % 2 else "low"), 4)

    def read(self) -> dict[str, Any]:
        """The summary, after what has come."""
        self.lines.write(self.layout.events)
        self.feed.refresh()
        return self.feed.summary()

    def losses(self) -> dict[str, list[float]]:
        """Those that are drawn of each expert."""
        series = content(self.feed.plots())["training"]["plot-loss"]["series"]
        return {each["label"]: each["y"] for each in series}


def content(answer: Answer) -> dict[str, Any]:
    return json.loads(gzip.decompress(answer.body))


def tiles(summary: dict[str, Any]) -> dict[str, list[str]]:
    return {name: rest for name, *rest in summary["tiles"]}


@pytest.fixture
def growing(tmp_path: Path) -> Growing:
    return Growing(tmp_path / "runs" / "dog")


def test_a_short_run_is_drawn_with_every_step_as_it_comes(growing: Growing) -> None:
    growing.steps(range(1, 7))
    first = growing.read()
    assert tiles(first)["Steps"] == ["6 of 40", "3 high, 3 low"]
    assert len(growing.losses()["high expert"]) == 3
    before = growing.feed.summary()
    growing.feed.refresh()
    assert growing.feed.summary() is before  # nothing is made again where nothing has come
    growing.steps(range(7, 8))
    second = growing.read()
    assert second["versions"]["plots"] != first["versions"]["plots"]
    assert len(growing.losses()["high expert"]) == 4


def test_what_is_computed_again_after_a_restart_replaces_what_was_there(growing: Growing) -> None:
    growing.steps(range(1, 9))
    growing.read()
    first = growing.losses()["low expert"]
    begin_events(growing.lines, growing.layout, MADE)
    growing.lines.add(events.Resumed(step=4, state=growing.layout.root))
    growing.steps(range(5, 7))
    assert tiles(growing.read())["Steps"][0] == "6 of 40"
    second = growing.losses()["low expert"]
    assert len(second) == 3 and second[:2] == first[:2] and second[2] != first[2]


def test_damaged_lines_are_told_and_cost_nothing_else(growing: Growing) -> None:
    growing.steps(range(1, 3))
    growing.lines.lines += ["{cut o", '{"event": "validation", "step": 3}', '{"event": "saved"}']
    growing.lines.lines += ['{"event": "sampled", "step": 2, "file": 7, "prompt": null}']
    growing.steps(range(3, 5))
    summary = growing.read()
    assert tiles(summary)["Steps"][0] == "4 of 40"
    assert len(summary["gaps"]) == 1 and "4 lines are damaged" in summary["gaps"][0]


def test_another_run_in_the_same_folder_is_read_from_its_beginning(growing: Growing) -> None:
    growing.steps(range(1, 9))
    old = growing.read()
    told = old["versions"]["events"]
    growing.lines = EventLines()
    begin_events(growing.lines, growing.layout, MADE)
    growing.lines.add(events.Note(text="a new run"))
    growing.steps(range(1, 3))
    assert tiles(growing.read())["Steps"][0] == "2 of 40"
    found = growing.feed.events(told)
    assert found["lines"][-1]["text"] == "note: a new run"


def test_the_curves_of_a_long_run_are_made_anew_after_many_steps(tmp_path: Path) -> None:
    layout = write_run(tmp_path / "dog", MadeRun(steps=4000, validate_every=0, end=""))
    feed = Feed(layout, Roots(tmp_path, []).address)
    feed.refresh()
    first, random = feed.plots(), Random(0)
    series = content(first)["training"]["plot-loss"]["series"]
    assert [len(each["y"]) for each in series] == [800, 800]
    highest = read_history(layout.events).steps.column("loss").max()
    assert max(high for each in series for high in each["hi"]) == pytest.approx(highest, rel=1e-4)
    lines = EventLines()
    for count, is_same in ((1, True), (5, False)):
        for _ in range(count):
            lines.add(one_step(random, MadeRun(steps=4000), 4001 + len(lines.lines), "high"))
        with layout.events.open("a", encoding="ascii") as file:
            file.write("".join(f"{line}\n" for line in lines.lines[-count:]))
        feed.refresh()
        assert (feed.plots() is first) == is_same
        assert tiles(feed.summary())["Steps"][0] == f"{4000 + len(lines.lines):,} of 4,000"
    part = content(feed.part(1000, 1100))["training"]["plot-loss"]["series"][0]
    assert part["y"] == part["hi"] and part["x"][0] >= 1000 and part["x"][-1] <= 1100


def test_events_are_lines_and_those_after_a_number_come_alone(growing: Growing) -> None:
    root = growing.layout.root
    growing.steps(range(1, 3))
    growing.lines.add(events.Saved(step=2, state=growing.layout.state(2)))
    for expert in ("high", "low"):
        growing.lines.add(events.Exported(step=2, expert=expert, file=root / f"dog_{expert}.x"))
    growing.read()
    told = growing.feed.events(0)
    assert [line["kind"] for line in told["lines"]][-2:] == ["saved", "exported"]
    assert told["lines"][-1]["text"] == f"step 2: weights exported: {root}/dog_* (2 files)"
    growing.steps(range(3, 4))
    growing.lines.add(events.Warned(text="<b>loud</b>\n\x1b[31m"))
    growing.lines.add(
        events.Validated(step=3, expert="low", loss=1, ema=None, base=2, held_out=True)
    )
    growing.lines.add(events.Failed(error="no space\n  free some"))
    summary = growing.read()
    new = growing.feed.events(told["next"])
    assert [(line["kind"], line["text"]) for line in new["lines"]] == [
        ("warning", "warning: <b>loud</b>\\n\\x1b[31m"),
        ("failed", "failed: no space"),
        ("failed", "  free some"),
    ]
    assert summary["state"] == "failed" and summary["problem"]["lines"][0] == "no space"
    assert growing.feed.events(new["next"])["lines"] == []


def test_the_log_is_read_from_where_one_was_and_of_a_long_one_the_end(growing: Growing) -> None:
    log, feed = growing.layout.log, growing.feed
    assert feed.log(0) == {"next": 0, "new": False, "lines": []}
    log.write_bytes(b"one\ntwo \xff\x1b[0m\nhalf")
    found = feed.log(0)
    assert found == {"next": 14, "new": False, "lines": ["one", "two \ufffd\\x1b[0m"]}
    with log.open("ab") as file:
        file.write(b" a line\n")
    assert feed.log(14)["lines"] == ["half a line"]
    log.write_bytes(b"".join(b"line %06d\n" % number for number in range(20_000)))
    lines = feed.log(0)["lines"]
    assert lines[-1] == "line 019999" and lines[0].startswith("line 0") and len(lines) < 10_000
    log.write_bytes(b"anew\n")
    assert feed.log(240_000) == {"next": 5, "new": True, "lines": ["anew"]}


def test_samples_are_told_with_their_prompt_seed_and_address(growing: Growing) -> None:
    layout = growing.layout
    layout.resolved.write_text(
        "model: {variant: ti2v-5b}\nsample: {seed: 7, width: 64, height: 32, prompts: "
        "[{prompt: a fox}, {prompt: a cat, seed: 9}]}\n",
        encoding="utf-8",
    )
    for steps, second in ((range(1, 3), "a cat"), (range(3, 5), "a dog")):
        growing.steps(steps)
        for number, prompt in enumerate(("a fox", second)):
            file = layout.samples(steps[-1]) / f"{number}.mp4"
            growing.lines.add(events.Sampled(step=steps[-1], file=file, prompt=prompt))
    growing.read()
    found = content(growing.feed.samples())
    assert found["prompts"] == [
        {"text": "a fox", "seed": 7, "distilled": False},
        {"text": "a cat", "seed": 9, "distilled": False},
        {"text": "a dog", "seed": None, "distilled": False},  # the prompt was changed since
    ]
    assert [video[:2] for video in found["videos"]] == [[2, 0], [2, 1], [4, 0], [4, 2]]
    assert found["videos"][0][2] == "/media/runs/dog/samples/000002/0.mp4"
    assert found["shape"] == [64, 32] and found["fps"] == 24


def test_many_viewers_cost_one_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "dog", MadeRun(steps=20))
    feeds, read = Feeds(Roots(tmp_path, [])), list[int]()
    refresh = Feed.refresh

    def counted(feed: Feed) -> None:
        read.append(1)
        refresh(feed)

    monkeypatch.setattr(Feed, "refresh", counted)

    async def whole() -> None:
        found = await asyncio.gather(*(feeds.ask("dog", Feed.summary) for _ in range(50)))
        assert len(read) == 1 and len({id(summary) for summary in found}) == 1
        with pytest.raises(OutsideError):
            await feeds.ask("cat", Feed.summary)
        shutil.rmtree(tmp_path / "dog")
        with pytest.raises(OutsideError):
            await feeds.ask("dog", Feed.summary)
        write_run(tmp_path / "dog", MadeRun(steps=30))
        assert tiles(await feeds.ask("dog", Feed.summary))["Steps"][0] == "30 of 30"

    asyncio.run(whole())


def asked(runs: Path, act: Callable[[User], Any]) -> None:
    async def whole(user: User) -> None:
        await act(user)

    with_user(runs, whole)


def test_answers_are_sent_once_and_then_only_when_they_have_changed(tmp_path: Path) -> None:
    layout = write_run(tmp_path / "runs" / "dog", MadeRun(steps=20, sample_steps=(20,)))
    layout.log.write_text("a line\n", encoding="utf-8")

    async def act(user: User) -> None:
        client = user.http_client
        for path in ("summary", "plots", "samples", "events", "log", "plots?first=2&last=9"):
            answer = await client.get(f"/api/run/dog/{path}")
            assert answer.status_code == 200 and answer.headers["content-encoding"] == "gzip"
            assert isinstance(answer.json(), dict)
            again = await client.get(
                f"/api/run/dog/{path}", headers={"if-none-match": answer.headers["etag"]}
            )
            assert again.status_code == 304 and not again.content
        gauges = (await client.get("/api/run/dog/summary")).json()["machine"]
        assert "CPU" in [name for name, *_ in gauges]
        address = (await client.get("/api/run/dog/samples")).json()["videos"][0][2]
        assert (await client.get(address)).headers["content-type"] == "video/mp4"
        poster = await client.get(address.replace("/media/", "/poster/"))
        assert poster.headers["content-type"] == "image/jpeg"
        for path, status in (
            ("/api/run/cat/summary", 404),
            ("/api/run/..%2fdog/summary", 404),
            ("/api/run/dog/log?after=-1", 422),
            ("/api/run/dog/events?after=x", 422),
            ("/api/run/dog/plots?first=nan&last=1", 422),
            ("/api/run/dog/plots?first=9&last=2", 200),
        ):
            assert (await client.get(path)).status_code == status, path

    asked(tmp_path / "runs", act)
