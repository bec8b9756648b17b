"""What the processes of a run share besides its steps: filling the cache, and sample videos."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from support.equal_runs import Trainer, assert_equal_files
from support.runs import SMALL_SAMPLE, RunFile, layout_of
from support.torchrun import together

from onewan.cli import main
from onewan.config.load import load_run
from onewan.config.schema import ResolvedRun
from onewan.data import ahead, found_cuts
from onewan.data.cache import EntryKind
from onewan.data.encode import no_progress
from onewan.data.file_memory import FileMemory, FileState
from onewan.data.filling import CacheFiller
from onewan.data.found_cuts import FoundCuts
from onewan.devices import HOST
from onewan.errors import Interrupted
from onewan.media import write_video
from onewan.media.cuts import Cut
from onewan.parallel.environment import is_first_process
from onewan.parallel.ranks import join
from onewan.runs.control import request
from onewan.runs.event_file import read_events
from onewan.runs.events import Event, Sampling
from onewan.sample.generate import WanModelSampler
from onewan.train.setup import WanModelSetup
from onewan.train.trainer import WanTrainer

# ---------------------------------------------------------------------------------------- the cache


def videos(folder: Path, count: int) -> Path:
    """A folder of so many short videos, each with a content and a caption of its own."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(count):
        noise = draw.integers(0, 256, (5, 4, 4, 3), np.uint8).repeat(16, 1).repeat(16, 2)
        write_video(folder / f"{number:03}.mp4", noise, fps=16)
        (folder / f"{number:03}.txt").write_text(f"number {number % 20}", encoding="utf-8")
    return folder


def fill(run_yaml: Path, overrides: list[str]) -> tuple[list[str], int, list[str]]:
    """Fill the cache of a run in this process: the entries that it has made, the number of all,
    and what it reports."""
    made, save = [], CacheFiller.save

    def noted(self: CacheFiller, kind: EntryKind, key: str, *rest: Any) -> None:
        made.append(f"{kind} {key}")
        save(self, kind, key, *rest)

    with pytest.MonkeyPatch.context() as patch, join(HOST, 60) as ranks:
        patch.setattr(CacheFiller, "save", noted)
        setup = WanModelSetup(load_run(run_yaml, overrides), ranks=ranks)
        data = setup.dataset([], no_progress)
    return made, data.encoded, data.report.lines()


def entries(cache: Path) -> dict[str, bytes]:
    return {
        f"{path.relative_to(cache).parts[0]} {path.stem}": path.read_bytes()
        for path in cache.rglob("*.safetensors")
    }


@pytest.mark.long
def test_two_processes_fill_a_cache_as_one_does_and_make_each_entry_once(
    run_file: RunFile, tmp_path: Path
) -> None:
    clips, long_caption = videos(tmp_path / "videos", 200), "word " * 600
    (clips / "007.txt").write_text(long_caption, encoding="utf-8")
    (clips / "broken.mp4").write_bytes(b"no video")
    run_file("ti2v-5b")
    own = [f"video_data.sources=[{{path: {clips.as_posix()}}}]", "video_data.resolution=4096"]
    settings = [[*own, f"video_data.cache_dir={tmp_path / name}"] for name in ("one", "two")]
    made, encoded, report = fill(tmp_path / "run.yaml", settings[0])
    assert encoded == len(made) == 200 + 21
    found = together(2, fill, tmp_path / "run.yaml", settings[1])
    shares = [entries for entries, _, _ in found]
    assert sorted([*shares[0], *shares[1]]) == sorted(made)
    assert min(map(len, shares)) > 50
    assert [count for _, count, _ in found] == [encoded, encoded]
    assert entries(tmp_path / "one") == entries(tmp_path / "two")
    # The first one says what one process says, whoever has noticed it.
    assert any("more than the 512 tokens" in line for line in report)
    assert found[0][2] == [
        line.replace(str(tmp_path / "one"), str(tmp_path / "two")) for line in report
    ]


def cache_command(run_yaml: Path, overrides: list[str]) -> tuple[int, str]:
    """The status of `onewan cache`, and what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = main(["cache", str(run_yaml), *overrides, "--strict"])
    return status, printed.getvalue()


@pytest.mark.long
def test_the_first_process_prints_the_report_of_all(run_file: RunFile, tmp_path: Path) -> None:
    clips = videos(tmp_path / "videos", 6)
    (clips / "broken.mp4").write_bytes(b"no video")
    run_file("ti2v-5b")
    own = [f"video_data.sources=[{{path: {clips.as_posix()}}}]", "video_data.resolution=4096"]
    own += [f"video_data.cache_dir={tmp_path / 'own'}"]
    (status, printed), (other_status, nothing) = together(
        2, cache_command, tmp_path / "run.yaml", own
    )
    assert status == other_status == 1  # with --strict, for the broken file
    assert "12 entries encoded now" in printed and "1 file can't be used" in printed
    assert not nothing


def test_the_first_process_alone_writes_what_people_read(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list of problems too, by which the next start knows which of them are new."""
    clips, cache = videos(tmp_path / "videos", 1), tmp_path / "own"
    (clips / "broken.mp4").write_bytes(b"no video")
    own = [f"video_data.sources=[{{path: {clips.as_posix()}}}]", "video_data.resolution=4096"]
    config = run_file("ti2v-5b", *own, f"video_data.cache_dir={cache}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, written in (("1", []), ("0", ["contact_sheet_run.jpg", "unusable_files.txt"])):
        monkeypatch.setenv("RANK", rank)
        assert WanModelSetup(config).dataset([], no_progress).report.problems
        found = [*cache.glob("*.jpg"), *cache.glob("*.txt")]
        assert [path.name for path in found] == written


def test_a_file_that_another_process_has_searched_for_cuts_is_not_searched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, memory, searched = [tmp_path / f"{n}.mp4" for n in range(8)], tmp_path / "cuts", []
    for file in files:
        file.write_bytes(b"a video")

    def search(path: Path) -> list[Cut]:
        searched.append(path)
        return [Cut(1.0, 1.1)]

    monkeypatch.setattr(found_cuts, "find_cuts", search)
    # Both begin before either has found anything.
    one, other = FoundCuts(memory), FoundCuts(memory)
    one.prepare(files[:6])
    other.prepare(files)
    one.prepare(files)
    assert sorted(searched) == files
    assert all(finder.of(file) == (Cut(1.0, 1.1),) for finder in (one, other) for file in files)


def test_a_line_that_another_process_has_not_written_to_its_end_is_read_later(
    tmp_path: Path,
) -> None:
    file, video, state = tmp_path / "memory", tmp_path / "é.mp4", FileState(1, 2)
    memory, writer = FileMemory(file), FileMemory(tmp_path / "other")
    writer.set(video, state, "found")
    writer.save()
    line = (tmp_path / "other").read_bytes()
    for end in (0, len(line) - 1, len(line)):
        file.write_bytes(line[:end])
        memory.refresh()
        assert memory.get(video, state) == ("found" if end == len(line) else None)


def test_processes_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = ahead.usable_cores()
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert ahead.usable_cores() == 16 and cores >= 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert ahead.usable_cores() == 2
    # A process that is bound to its cores already keeps them.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5}, raising=False)
    assert ahead.usable_cores() == 1


def test_the_first_process_is_the_only_one_or_torchruns_first() -> None:
    assert is_first_process({}) and is_first_process({"RANK": "3"})
    assert is_first_process({"RANK": "0", "WORLD_SIZE": "2"})
    assert not is_first_process({"RANK": "1", "WORLD_SIZE": "2"})


# ------------------------------------------------------------------------------------ sample videos

PROMPTS = ["a red square", "a blue disc", "a green bar"]


def sampling(*prompts: str) -> list[str]:
    """Settings of a short run that samples `prompts` after its second and after its last step."""
    sample = {**SMALL_SAMPLE, "prompts": f"[{', '.join(prompts)}]", "every": 2}
    return [
        "train.steps=3",
        "train.save_every=2",
        "train.switch_expert_every=1",
        "train.accumulation=2",
        "wan_config.max_frames=1",
        "optimizer.lr=0.05",
        *(f"sample.{name}={value}" for name, value in sample.items()),
    ]


def of_kind(config: ResolvedRun, *kinds: str) -> list[dict[str, Any]]:
    return [e for e in read_events(layout_of(config).events) if e["event"] in kinds]


def sampled(config: ResolvedRun) -> list[tuple[int, str, str]]:
    return [(e["step"], e["prompt"], Path(e["file"]).name) for e in of_kind(config, "sampled")]


def assert_same_videos(one: ResolvedRun, other: ResolvedRun) -> None:
    """On the CPU, videos differ from one start to the next in the last bits of their pixels, and in
    what the codec makes of them."""
    folders = [layout_of(config).root / "samples" for config in (one, other)]
    names = [sorted(p.relative_to(f) for p in f.rglob("*.mp4")) for f in folders]
    assert names[0] == names[1] and names[0]
    for name in names[0]:
        pixels = [read_all(folder / name) for folder in folders]
        assert np.abs(pixels[0] - pixels[1]).mean() < 0.3, name


def read_all(path: Path) -> np.ndarray:
    """All pixels, [F, H, W, 3]."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames).astype(float)


@pytest.mark.long
@pytest.mark.parametrize(("processes", "optimizer"), [(2, "adamw"), (4, "adamw_schedule_free")])
def test_sample_videos_are_divided_among_processes_and_are_those_of_one(
    run_file: RunFile, tmp_path: Path, processes: int, optimizer: str
) -> None:
    settings = [*sampling(*PROMPTS), f"optimizer.name={optimizer}"]
    trainer = Trainer(run_file=run_file, folder=tmp_path, variant="t2v-a14b", settings=settings)
    one, several = trainer.train("one"), trainer.train("several", processes)
    expected = [(step, p, f"{n}.mp4") for step in (2, 3) for n, p in enumerate(PROMPTS)]
    assert sampled(one) == sampled(several) == expected
    assert_same_videos(one, several)
    assert_equal_files(one, several)
    for rank in range(1, processes):
        log = layout_of(several).rank_log(rank).read_text("utf-8")
        assert log.count("sample video") == len(expected)
    first = layout_of(several).log.read_text("utf-8")
    assert first.count("sample video") == len(expected)


def train_with(run_yaml: Path, overrides: list[str], resume: bool, what: str) -> str:
    """Train in this process, in which `what` happens while videos are made; how it ended."""
    config = load_run(run_yaml, overrides)
    make = WanModelSampler.sample_to

    def fails(self: WanModelSampler, path: Path, *rest: Any, **named: Any) -> Path:
        if what == "fails" and not is_first_process():
            raise RuntimeError("no memory is left")
        return make(self, path, *rest, **named)

    def listen(event: Event) -> None:
        if what == "stops" and isinstance(event, Sampling):
            request(layout_of(config), "stop")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WanModelSampler, "sample_to", fails)
        try:
            WanTrainer(config, listen=listen, resume=resume).fit()
        except Interrupted:
            return "stopped"
    return "finished"


@pytest.mark.long
def test_a_video_that_another_process_fails_to_make_is_reported(
    run_file: RunFile, tmp_path: Path
) -> None:
    settings = sampling(*PROMPTS)
    config = run_file("ti2v-5b", *settings)
    settings += [f"output.dir={config.output.dir}"]
    ended = together(2, train_with, tmp_path / "run.yaml", settings, False, "fails")
    assert ended == ["finished", "finished"]
    assert [prompt for _, prompt, _ in sampled(config)] == 2 * [PROMPTS[0], PROMPTS[2]]
    warnings = [e["text"] for e in of_kind(config, "warning")]
    assert warnings == 2 * ["sampling 'a blue disc' failed: no memory is left"]
    assert "RuntimeError: no memory is left" in layout_of(config).rank_log(1).read_text("utf-8")


@pytest.mark.long
def test_a_run_that_is_stopped_while_it_samples_makes_the_rest_when_it_is_resumed(
    run_file: RunFile, tmp_path: Path
) -> None:
    settings = sampling(*PROMPTS)
    trainer = Trainer(run_file=run_file, folder=tmp_path, variant="t2v-a14b", settings=settings)
    one = trainer.train("one")
    stopped = run_file("t2v-a14b", *settings, f"output.dir={tmp_path / 'stopped'}")
    run = [tmp_path / "run.yaml", [*settings, f"output.dir={tmp_path / 'stopped'}"]]
    assert together(2, train_with, *run, False, "stops") == ["stopped", "stopped"]
    assert layout_of(stopped).saved_steps() == [2] and len(sampled(stopped)) < 3
    assert {e["number"] for e in of_kind(stopped, "sampling")} == {0}  # and not 2, its next one
    assert together(2, train_with, *run, True, "nothing") == ["finished", "finished"]
    assert [name for _, _, name in sampled(stopped)] == 2 * ["0.mp4", "1.mp4", "2.mp4"]
    assert_same_videos(one, stopped)
    assert_equal_files(one, stopped)
