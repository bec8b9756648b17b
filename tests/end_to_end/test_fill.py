"""Filling the cache: the same bytes with any number of workers, and after whatever goes wrong."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.runs import RunFile

from onewan.data.dataset import Dataset
from onewan.data.encode import no_progress
from onewan.train.setup import WanModelSetup

pytestmark = pytest.mark.long


def settings(folder: Path, cache: str) -> list[str]:
    return [
        f"video_data.sources=[{{path: {(folder / 'clips').as_posix()}}}]",
        f"video_data.cache_dir={folder / cache}",
        "video_data.min_resolution=[1,1]",
    ]


@pytest.fixture
def own(workshop: Path, tmp_path: Path) -> Path:
    """A folder with a copy of the clips, which the test may change."""
    shutil.copytree(workshop / "clips", tmp_path / "clips")
    return tmp_path


def filled(run_file: RunFile, folder: Path, cache: str, *overrides: str) -> Dataset:
    config = run_file("t2v-a14b", *settings(folder, cache), *overrides)
    return WanModelSetup(config).dataset([], no_progress)


def entries(cache: Path) -> dict[str, bytes]:
    """The content of all entries by their place in the cache."""
    return {
        path.relative_to(cache).as_posix(): path.read_bytes()
        for path in sorted(cache.rglob("[!.]*.safetensors"))  # without temporary files
    }


@pytest.mark.parametrize("workers", ["1", "4", "auto"])
def test_entries_and_report_are_the_same_with_any_number_of_workers(
    run_file: RunFile, own: Path, clips: Path, workers: str
) -> None:
    for file in [*(clips / "bad").iterdir(), *(clips / "good").iterdir()]:
        shutil.copy(file, own / "clips" / file.name)
    for name in ("truncated", "again"):  # copies, which fail one by one
        shutil.copy(clips / "bad" / "corrupt_middle.mp4", own / "clips" / f"{name}.mp4")
        (own / "clips" / f"{name}.txt").write_text(name, encoding="utf-8")
    in_turn = filled(run_file, own, "in_turn", "video_data.workers=0")
    ahead = filled(run_file, own, "ahead", f"video_data.workers={workers}")
    assert entries(own / "ahead") == entries(own / "in_turn")
    assert ahead.report.problems == in_turn.report.problems
    assert {p.path.name for p in ahead.report.problems} >= {"truncated.mp4", "again.mp4"}
    assert ahead.report.warnings == in_turn.report.warnings
    assert ahead.digest == in_turn.digest and ahead.encoded == in_turn.encoded > 20


def test_another_precision_of_the_vae_encodes_the_clips_again_and_only_them(
    run_file: RunFile, own: Path
) -> None:
    exact = filled(run_file, own, "cache")
    rounded = filled(run_file, own, "cache", "video_data.vae_dtype=bfloat16")
    assert rounded.encoded == len(rounded.clips) == 5
    for clip in rounded.clips:
        a, b = (
            exact.source.video(clip, "first")["latents"],
            rounded.source.video(clip, "first")["latents"],
        )
        assert a.dtype == b.dtype == torch.float32
        assert 0 < float((a - b).norm() / a.norm()) < 2e-2
    assert filled(run_file, own, "cache").encoded == 0
    online = filled(
        run_file, own, "cache", "video_data.vae_dtype=bfloat16", "video_data.cache=false"
    )
    for clip in online.clips:
        expected = rounded.source.video(clip, "first")["latents"]
        assert torch.equal(online.source.video(clip, "first")["latents"], expected)


# --- Interruptions -------------------------------------------------------------------------------


@pytest.fixture
def many(own: Path) -> Path:
    """`own` with more clips, so that filling takes a while: each with content of its own."""
    for source in sorted((own / "clips").glob("*.mp4")):
        for number in range(12):
            copy = source.with_stem(f"{source.stem}_{number}")
            # An empty box at the end of an MP4, which changes its content and no picture.
            copy.write_bytes(source.read_bytes() + bytes([0, 0, 0, 9]) + b"free" + bytes([number]))
            copy.with_suffix(".txt").write_text(f"clip {number}", encoding="utf-8")
    return own


def fill_and_exit(run_file: RunFile, folder: Path, cache: str) -> None:
    filled(run_file, folder, cache)


def start_filling(run_file: RunFile, folder: Path, cache: str) -> BaseProcess:
    # Forked, as a new process needs seconds to import torch before it does anything.
    process = multiprocessing.get_context("fork").Process(
        target=fill_and_exit, args=(run_file, folder, cache)
    )
    process.start()
    return process


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that are forked and killed")
def test_after_kills_at_random_moments_the_cache_is_that_of_an_undisturbed_run(
    run_file: RunFile, many: Path
) -> None:
    filled(run_file, many, "undisturbed")
    expected = entries(many / "undisturbed")
    draws, kills = random.Random(5), 0
    for wanted in (1, 5, 9, 14, 19):
        process = start_filling(run_file, many, "cache")
        while process.is_alive() and len(entries(many / "cache")) < wanted:
            time.sleep(0.002)
        time.sleep(draws.uniform(0, 0.1))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        # What there is, is complete.
        assert entries(many / "cache").items() <= expected.items()
    assert kills >= 4  # the last one may have come too late
    filled(run_file, many, "cache")
    assert entries(many / "cache") == expected
    assert not list((many / "cache").rglob(".*"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that are forked")
def test_two_processes_share_the_filling_of_one_cache_and_agree(
    run_file: RunFile, many: Path
) -> None:
    undisturbed = filled(run_file, many, "undisturbed")
    written = many / "written"
    written.mkdir()

    def fill_and_count(number: int) -> None:
        encoded = filled(run_file, many, "cache").encoded
        (written / str(number)).write_text(str(encoded))

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill_and_count, args=(number,)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert entries(many / "cache") == entries(many / "undisturbed")
    counts = [int((written / str(number)).read_text()) for number in range(2)]
    # Each entry was encoded once, by one of them.
    assert sum(counts) == undisturbed.encoded and min(counts) > undisturbed.encoded / 10


def test_filling_that_is_interrupted_ends_its_threads_and_goes_on_later(
    run_file: RunFile, many: Path
) -> None:
    config = run_file("t2v-a14b", *settings(many, "cache"), "video_data.workers=4")

    def interrupt(activity: str, done: int, _total: int) -> None:
        if activity == "encoding clips" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        WanModelSetup(config).dataset([], interrupt)
    assert not [t for t in threading.enumerate() if t.name.startswith("onewan-")]
    assert len(list((many / "cache" / "video").rglob("*.safetensors"))) == 3
    filled(run_file, many, "cache")
    filled(run_file, many, "undisturbed")
    assert entries(many / "cache") == entries(many / "undisturbed")


def test_a_full_disk_ends_with_the_name_of_the_entry_and_a_valid_cache(
    run_file: RunFile, own: Path
) -> None:
    resource = pytest.importorskip("resource")
    filled(run_file, own, "undisturbed")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.ExitStack() as room:
        # Captions fit, and clips of several frames do not.
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
        room.callback(resource.setrlimit, resource.RLIMIT_FSIZE, before)
        with pytest.raises(OSError, match="File too large") as error:
            filled(run_file, own, "cache")
    assert str(own / "cache") in str(error.value.filename)
    there = entries(own / "cache")
    assert there.items() < entries(own / "undisturbed").items()
    assert not list((own / "cache").rglob(".*"))
    filled(run_file, own, "cache")
    assert entries(own / "cache") == entries(own / "undisturbed")


# --- What is encoded again -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "encoded"),
    [
        (["video_data.target_fps=8"], 4),  # the videos; an image has no rate
        (["video_data.resolution=[80x48]"], 5),
        (["video_data.resolution=[64x64]"], 0),  # as before, by another name
        (["wan_config.max_frames=5"], 4),
        (["train.seed=9", "train.batch_size=2", "video_data.workers=3"], 0),
    ],
    ids=["rate", "crop", "same size", "frames", "nothing of the clips"],
)
def test_a_change_encodes_the_entries_that_it_concerns(
    run_file: RunFile, own: Path, changes: list[str], encoded: int
) -> None:
    filled(run_file, own, "cache")
    assert filled(run_file, own, "cache", *changes).encoded == encoded
    assert filled(run_file, own, "cache").encoded == 0


def test_another_vae_encodes_the_clips_again_and_another_text_encoder_the_captions(
    run_file: RunFile, own: Path, workshop: Path
) -> None:
    data = filled(run_file, own, "cache")
    shutil.copytree(workshop / "t2v-a14b", own / "model")
    model = f"model.path={(own / 'model').as_posix()}"
    assert filled(run_file, own, "cache", model).encoded == 0  # the same files elsewhere
    for component, encoded in (("vae", 5), ("text_encoder", data.encoded - 5)):
        (file,) = (own / "model" / component).glob("*.safetensors")
        tensors = load_file(file)
        tensors[min(tensors)] += 0.01
        save_file(tensors, file, {"format": "pt"})
        assert filled(run_file, own, "cache", model).encoded == encoded
