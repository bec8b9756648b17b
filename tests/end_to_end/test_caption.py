"""`onewan caption` against a server of the test's own, over real sockets."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from robustness.chat_server import Behavior, MisbehavingServer, Received, completion, serving
from support.clips import planner
from support.interrupted import leave_interrupted

from onewan.captioning import server as server_module
from onewan.cli import main
from onewan.data.clip import ClipSource
from onewan.data.index import index_clips
from onewan.media import write_video

SMALL = "video_data.resolution=64"
"""An override with which the images need not be enlarged."""


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_FIRST_WAIT", 0.01)


def by_content(_: int, __: Received) -> Behavior:
    """Each clip gets a caption of its own."""
    return lambda request: completion(f"seen {request.fingerprint}")


def write_images(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (64, 64), (10 * number, 255 - 10 * number, 99)).save(folder / name)
    return folder


def write_numbered(path: Path, frames: int, fps: int = 16) -> None:
    """A video whose frame k has the gray level 4 k."""
    levels = np.arange(frames, dtype=np.uint8) * 4
    write_video(path, np.broadcast_to(levels[:, None, None, None], (frames, 64, 64, 3)), fps)


def shown(request: Received) -> list[Image.Image]:
    """The pictures of a request."""
    prefix = "data:image/jpeg;base64,"
    assert all(url.startswith(prefix) for url in request.images)
    data = [base64.b64decode(url.removeprefix(prefix)) for url in request.images]
    return [Image.open(io.BytesIO(each), formats=["JPEG"]) for each in data]


def gray_levels(request: Received) -> list[int]:
    """The numbers of the frames of `write_numbered` in a request."""
    return [round(float(np.asarray(picture).mean()) / 4) for picture in shown(request)]


def caption(folder: Path, there: MisbehavingServer, *more: str) -> int:
    return main(["caption", str(folder), SMALL, "--server", there.url, *more])


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}


def test_clips_without_a_caption_get_one_and_files_that_exist_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "clips", "a.png", "b.png", "c.png", "d.png")
    write_numbered(folder / "v.mp4", 17)
    (folder / "b.txt").write_text("by hand", encoding="utf-8")
    (folder / "c.TXT").write_text("", encoding="utf-8")
    write_numbered(folder / "v.control.mp4", 17)
    write_images(folder, "v.mask.png", "v.condition.png")
    with serving(MisbehavingServer(by_content)) as there:
        assert caption(folder, there) == 0
        by_image = {len(request.images): request.fingerprint for request in there.received}
        written = texts(folder)
        assert set(written) == {"a.txt", "b.txt", "d.txt", "v.txt"}
        assert written["b.txt"] == "by hand"
        assert written["v.txt"] == f"seen {by_image[8]}\n"
        assert written["a.txt"] != written["d.txt"]
        out = capsys.readouterr().out
        assert "3 clips to caption by seer at http://127.0.0.1" in out
        assert "the first caption, of " in out and "3 captions written (2 had a caption" in out
        assert caption(folder, there) == 0
        assert len(there.received) == 3 and texts(folder) == written
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []
    # Nothing is left to do but to tidy up, so no server is needed.
    (left,) = leave_interrupted(folder / "a.txt")
    assert main(["caption", str(folder), SMALL, "--server", "http://127.0.0.1:9"]) == 0
    assert not left.exists()


def test_the_frames_are_those_that_the_run_trains(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    write_numbered(folder / "v.mp4", 60, fps=16)
    run = tmp_path / "run.yaml"
    run.write_text(
        """
model: {path: nowhere, variant: t2v-a14b}
wan_config: {max_frames: 13, frame_sample_strategy: head}
video_data: {sources: [{path: clips, trigger_word: ohwx}], resolution: 64, target_fps: 8}
""",
        encoding="utf-8",
    )
    with serving(MisbehavingServer(by_content)) as there:
        assert main(["caption", str(run), "--server", there.url, "--frames", "5"]) == 0
        (request,) = there.received
        # 13 frames at 8 of 16 per second are every second one.
        assert gray_levels(request) == [0, 6, 12, 18, 24]
        assert {picture.size for picture in shown(request)} == {(64, 64)}
        assert "5 frames of a video of 1.6 seconds" in request.text
        assert "is called ohwx" in request.text
        assert texts(folder)["v.txt"] == f"ohwx, seen {request.fingerprint}\n"

        # Several clips of a file have one caption, and the frames are of all of them.
        (folder / "v.txt").unlink()
        chunks = "wan_config.frame_sample_strategy=chunks"
        arguments = ["wan_config.max_frames=9", "video_data.target_fps=16", chunks]
        assert main(["caption", str(run), *arguments, "--server", there.url, "--frames", "3"]) == 0
        assert gray_levels(there.received[1]) == [0, 26, 53]
        assert len(there.received) == 2


def test_frames_are_no_larger_than_wanted_and_one_frame_is_the_middle_one(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    frames = np.zeros((5, 120, 200, 3), np.uint8)
    frames[2] = 200
    write_video(folder / "v.mp4", frames, 16)
    with serving(MisbehavingServer(by_content)) as there:
        settings = ["video_data.resolution=128", "--frames", "1", "--frame-size", "100"]
        assert main(["caption", str(folder), *settings, "--server", there.url]) == 0
    (picture,) = shown(there.received[0])
    assert max(picture.size) == 100 and np.asarray(picture).mean() > 150
    assert "the middle frame of a video" in there.received[0].text


def test_for_review_captions_go_into_files_that_training_does_not_read(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "clips", "a.png", "b.png")
    (folder / "b.txt").write_text("by hand", encoding="utf-8")
    with serving(MisbehavingServer(by_content)) as there:
        assert caption(folder, there, "--review") == 0
        written = texts(folder)
        assert set(written) == {"a.caption.txt", "b.caption.txt", "b.txt"}
        assert caption(folder, there, "--review") == 0
        assert len(there.received) == 2 and texts(folder) == written
    report = index_clips([ClipSource(path=folder)], planner(), use_masks=False)
    assert [(clip.name, clip.captions) for clip in report.clips] == [("b.png", ("by hand",))]
    assert [problem.path.name for problem in report.problems] == ["a.png"]
    (warning,) = report.warnings
    assert warning.text.startswith("2 captions for review (NAME.caption.txt) in ")


def test_the_caption_of_another_clip_is_no_file_for_review(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "clips", "a.png", "a.caption.png")
    with serving(MisbehavingServer(by_content)) as there:
        assert caption(folder, there, "--review") == 1
    assert set(texts(folder)) == {"a.caption.caption.txt"}
    assert "a.caption.txt would be the caption of another clip" in capsys.readouterr().out
    report = index_clips([ClipSource(path=folder)], planner(), use_masks=False)
    assert "1 caption for review" in report.warnings[0].text


def test_a_file_that_is_written_meanwhile_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "clips", "a.png")

    def behave(_: int, __: Received) -> Behavior:
        (folder / "a.txt").write_text("by hand", encoding="utf-8")
        return "a fox"

    with serving(MisbehavingServer(behave)) as there:
        assert caption(folder, there) == 0
    assert texts(folder) == {"a.txt": "by hand"}
    assert "written by somebody else meanwhile" in capsys.readouterr().out


def test_failures_are_reported_with_their_clips_and_the_same_command_does_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"{letter}.png" for letter in "abcdef"]
    folder = write_images(tmp_path / "clips", *names)
    (folder / "broken.png").write_bytes(b"no image")
    answers: list[Behavior] = ["I'm sorry, I can't help with that.", "", "status 400", "broken"]
    answers += ["<think>hm</think>a fox", "word " * 600]

    def behave(number: int, _: Received) -> Behavior:
        return answers[number] if number < len(answers) else "later"

    with serving(MisbehavingServer(behave)) as there:
        assert caption(folder, there, "--parallel", "1", "--retries", "0") == 1
        out = capsys.readouterr().out
        assert texts(folder) == {"e.txt": "a fox\n", "f.txt": "word " * 599 + "word\n"}
        for name, reason in {
            "a.png": "the model refuses: 'I'm sorry, I can't help with that.'",
            "b.png": "the answer is empty",
            "c.png": "the server answers 400: as the test wants it",
            "d.png": "the answer is no valid JSON",
            "broken.png": "is not an image",
        }.items():
            (line,) = [line for line in out.splitlines() if f"{name}: " in line]
            assert reason in line
        assert "5 files without a new caption" in out
        assert "1 answer had thinking in front, which was taken off" in out
        assert "f.png: a caption has about" in out and "reads the first 512" in out
        (folder / "broken.png").unlink()
        assert caption(folder, there) == 0
    assert {name for name, text in texts(folder).items() if text == "later\n"} == {
        *("a.txt", "b.txt", "c.txt", "d.txt")
    }
    assert len(there.received) == 10


def test_what_would_fail_for_all_clips_ends_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "clips", *(f"{number:02}.png" for number in range(20)))
    there = MisbehavingServer(lambda *_: "status 404", models=("one", "two"))
    with serving(there):
        assert caption(folder, there, "--model", "three") == 1
        out = capsys.readouterr().out
        assert "stopped: the server answers 404: as the test wants it" in out
        assert "the models of the server are one, two" in out
        assert "20 clips left; the same command does the rest" in out
        assert 1 <= len(there.received) <= 4
        assert caption(folder, there) == 1
        assert "has one, two; name one" in capsys.readouterr().err
    assert main(["caption", str(folder), SMALL, "--model", "x", "--server", there.url]) == 1
    assert "no server answers at http://127.0.0.1" in capsys.readouterr().err
    assert texts(folder) == {}


def test_after_many_failures_in_a_row_the_others_are_not_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "clips", *(f"{number:02}.png" for number in range(20)))
    with serving(MisbehavingServer(lambda *_: "status 500")) as there:
        assert caption(folder, there, "--retries", "0", "--parallel", "1") == 1
    out = capsys.readouterr().out
    assert len(there.received) == 10
    assert "stopped: 10 clips in a row got no caption" in out and "10 clips left" in out


def test_a_dry_run_connects_to_nothing_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "clips", "a.png")
    write_numbered(folder / "v.mp4", 17)
    before = sorted(folder.iterdir())
    with serving(MisbehavingServer(by_content)) as there:
        assert caption(folder, there, "--dry-run", "--prompt", "Say what {material} shows.") == 0
        out = capsys.readouterr().out
        assert caption(folder, there, "--dry-run", "--json") == 0
        data = json.loads(capsys.readouterr().out)
    assert there.paths == [] and sorted(folder.iterdir()) == before
    assert "v.mp4: 8 frames of 64x64 from 0.00 s to 1.00 s -> v.txt" in out
    assert "asked of a.png: Say what an image shows." in out and "nothing was sent" in out
    assert [Path(task["caption_file"]).name for task in data["tasks"]] == ["a.txt", "v.txt"]


def test_the_report_as_json_is_alone_on_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "clips", "a.png", "b.png")
    there = MisbehavingServer(lambda number, _: "" if number else "a fox")
    with serving(there):
        assert caption(folder, there, "--json", "--parallel", "1") == 1
    data = json.loads(capsys.readouterr().out)
    assert (data["ok"], data["model"], data["not_asked"]) == (False, "seer", 0)
    assert [entry["text"] for entry in data["captions"]] == ["a fox"]
    assert [Path(entry["path"]).name for entry in data["problems"]] == ["b.png"]


def test_tables_give_captions_or_have_them_beside_their_files(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "clips", "a.png", "b.png")
    write_numbered(folder / "v.mp4", 40)
    table = folder / "clips.csv"
    table.write_text("path,caption\na.png,a fox\nb.png,\n", encoding="utf-8")
    with serving(MisbehavingServer(by_content)) as there:
        assert caption(table, there) == 0
        assert there.received == []
        # Two parts of a video have one caption; the frames are those of both.
        table.write_text("path,start,end\nv.mp4,0,0.6\nv.mp4,1.5,2.2\n", encoding="utf-8")
        assert caption(table, there, "--frames", "4") == 0
    assert gray_levels(there.received[0]) == [0, 6, 27, 33]
    assert set(texts(folder)) == {"v.txt"}


def test_sources_that_no_text_can_be_written_beside_are_noted_and_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "clips", "a.png")
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        shard.add(folder / "a.png", "b.png")
    sources = [folder.as_posix(), (tmp_path / "shard.tar").as_posix(), "https://127.0.0.1:9/c.csv"]
    with serving(MisbehavingServer(by_content)) as there:
        assert caption(folder, there, f"video_data.sources=[{', '.join(sources)}]") == 0
    out = capsys.readouterr().out
    assert set(texts(folder)) == {"a.txt"} and out.count("is left out: no text can be written") == 2


@pytest.mark.parametrize("given", ["the command line", "the run file"])
def test_each_caption_contains_the_trigger_word(tmp_path: Path, given: str) -> None:
    folder = write_images(tmp_path / "clips", "a.png", "b.png")
    answers = ["a fox", "A big ohwx runs"]
    word = ["--trigger-word", "ohwx"]
    if given == "the run file":
        word = [f"video_data.sources=[{{path: {folder.as_posix()}, trigger_word: ohwx}}]"]
    with serving(MisbehavingServer(lambda number, _: answers[number])) as there:
        assert caption(folder, there, *word, "--parallel", "1", "--template", "style") == 0
    assert texts(folder) == {"a.txt": "ohwx, a fox\n", "b.txt": "A big ohwx runs\n"}
    assert "Begin the caption with ohwx and a comma." in there.received[0].text


def test_requests_run_at_the_same_time_up_to_the_limit(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "clips", *(f"{number:02}.png" for number in range(9)))
    with serving(MisbehavingServer(lambda *_: "late 0.2")) as there:
        assert caption(folder, there, "--parallel", "3") == 0
    assert there.most_at_once == 3 and len(texts(folder)) == 9


def test_the_key_comes_from_the_environment_and_is_not_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_images(tmp_path / "clips", "a.png")
    there = MisbehavingServer(by_content, key="sk-right")
    with serving(there):
        monkeypatch.setenv("ONEWAN_CAPTION_KEY", "sk-wrong")
        assert caption(folder, there) == 1
        monkeypatch.setenv("OTHER_KEY", "sk-right")
        assert caption(folder, there, "--key-variable", "OTHER_KEY") == 0
        with pytest.raises(SystemExit) as caught:
            caption(folder, there, "--key-variable", "NO_SUCH_KEY")
    assert caught.value.code == 2
    printed = "".join(capsys.readouterr())
    assert "401" in printed and "--key-variable" in printed and "sk-" not in printed


@pytest.mark.parametrize(
    ("make", "status", "text"),
    [
        (lambda folder: folder / "nothing", 1, "there is no such file or folder"),
        (lambda _: "https://example.com/clips", 1, "is an address; captions are written beside"),
        (lambda folder: folder / "a.png", 1, "is neither a folder of clips nor a table of them"),
    ],
)
def test_other_sources_are_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], Any],
    status: int,
    text: str,
) -> None:
    folder = write_images(tmp_path, "a.png")
    assert main(["caption", str(make(folder)), "--server", "http://127.0.0.1:9"]) == status
    assert text in capsys.readouterr().err


def test_frames_that_leave_the_machine_are_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_images(tmp_path / "clips", "a.png")
    # The name of this machine is not that of a loopback address, wherever it leads.
    monkeypatch.setattr(server_module.Address, "is_local", False)
    with serving(MisbehavingServer(by_content)) as there:
        assert caption(folder, there) == 0
    assert "their frames are sent to 127.0.0.1, without encryption" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for a single process")
def test_ctrl_c_keeps_what_is_written_and_ends_at_once(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "clips", *(f"{number:02}.png" for number in range(8)))

    def behave(number: int, _: Received) -> Behavior:
        return "a fox" if number < 2 else "late 60"

    with serving(MisbehavingServer(behave)) as there:
        process = subprocess.Popen(
            [sys.executable, "-m", "onewan", "caption", str(folder), SMALL, "--server", there.url],
            stdout=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 60
        while len(there.received) < 6 or len(texts(folder)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
        assert time.monotonic() - started < 10
        there.ended()
    assert process.returncode == 130
    assert "2 captions written" in out and "6 clips left; the same command does the rest" in out
    assert len(texts(folder)) == 2
