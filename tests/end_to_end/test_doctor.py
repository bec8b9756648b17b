"""`onewan doctor`: what it says about files is what the trainer does with them."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.browser import WINDOWS, open_page
from support.runs import RunFile

import onewan
from onewan.cli import main
from onewan.config.load import dump_run
from onewan.config.schema import ResolvedRun
from onewan.demo.clips import write_clips
from onewan.doctor.diagnosis import Diagnosis
from onewan.doctor.environment import Environment
from onewan.doctor.examination import Examination, examine
from onewan.doctor.page import html_page
from onewan.doctor.torch_facts import Torch
from onewan.media import probe, write_video

pytestmark = pytest.mark.long

BAD = {
    "audio_only.mp4": "has no video",
    "corrupt_middle.mp4": "is damaged",
    "decompression_bomb.png": "claims more pixels than any image has (3,600 million)",
    "empty.mp4": "is empty (0 bytes)",
    "one_byte.webm": "is not a video that FFmpeg can read (it has only 1 byte)",
    "text.mp4": "is not a video that FFmpeg can read (it is a text: 'this is a text file that",
    "truncated_no_index.mp4": "is cut off",
}
"""What is wrong with each bad clip."""

ENVIRONMENT = Environment(
    onewan="0.1.0",
    python="3.12.0",
    system="Linux",
    processor="8 CPU cores",
    memory=64 * 10**9,
    disk_free=10**12,
    torch=Torch(version="2.9.0", build="CPU only"),
    cards=(),
    driver="",
    packages={},
    optional={},
    extras={},
    variables={},
)


@pytest.fixture(scope="module")
def mixed(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the good, the odd and the bad clips."""
    folder = tmp_path_factory.mktemp("doctor") / "mixed"
    folder.mkdir()
    for kind in ("good", "odd", "bad"):
        for file in (clips / kind).iterdir():
            shutil.copy(file, folder)
    return folder


@pytest.fixture
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands do not look at this machine, for which torch is imported each time."""
    monkeypatch.setattr("onewan.cli.doctor.environment_ahead", lambda: lambda: ENVIRONMENT)


def settings(folder: Path, *more: str) -> list[str]:
    return [
        f"video_data.sources=[{{path: {folder.as_posix()}}}]",
        f"video_data.cache_dir={(folder.parent / 'cache').as_posix()}",
        "video_data.min_resolution=[1, 1]",
        "wan_config.max_frames=9",
        "model.device=cpu",
        *more,
    ]


def examined(config: ResolvedRun, *, previews: bool = False) -> Examination:
    return examine(config, lambda: ENVIRONMENT, previews=previews, advance=lambda *_: None)


def saved(config: ResolvedRun, folder: Path) -> str:
    path = folder / "saved.yaml"
    path.write_text(dump_run(config), encoding="utf-8")
    return str(path)


@pytest.mark.usefixtures("known_machine")
def test_every_bad_file_is_named_with_its_reason(
    run_file: RunFile, mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(mixed, folder)
    run = saved(run_file("t2v-a14b", *settings(folder)), tmp_path)
    assert main(["doctor", run]) == 1
    out = capsys.readouterr().out
    for name, reason in BAD.items():
        assert re.search(rf"{re.escape(name)}: {re.escape(reason)}", out), name
    assert "7 problems" in out
    for name in BAD:
        (folder / name).unlink()
        (folder / name).with_suffix(".txt").unlink()
    (folder / "name with spaces é 日本.txt").unlink()  # a missing caption is a problem too
    assert main(["doctor", run, "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    problems = [f for f in data["findings"] if f["severity"] == "problem"]
    assert [Path(problem["path"]).name for problem in problems] == ["name with spaces é 日本.mp4"]
    assert "has no caption" in problems[0]["text"] and not data["ok"]
    (folder / "name with spaces é 日本.mp4").unlink()
    assert main(["doctor", run, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ok"] and {f["severity"] for f in data["findings"]} == {"note"}
    assert len(data["data"]["clips"]) == 15


def moving(width: int, height: int, frames: int, seed: int = 0) -> np.ndarray:
    """A picture with coarse shapes that moves to the side, uint8 [F, H, W, 3]."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(60, 255, (6, 8, 3), np.uint8))
    picture = np.asarray(coarse.resize((width * 2, height), Image.Resampling.BICUBIC))
    return np.stack([picture[:, 3 * k : 3 * k + width] for k in range(frames)])


def write_clip(folder: Path, name: str, frames: np.ndarray, caption: str | bytes) -> None:
    folder.mkdir(exist_ok=True)
    write_video(folder / f"{name}.mp4", frames, 16)
    text = caption.encode() if isinstance(caption, str) else caption
    (folder / f"{name}.txt").write_bytes(text)


@pytest.fixture
def doubtful(tmp_path: Path) -> Path:
    """A folder with a clip of each kind that can be used, but should be looked at."""
    folder = tmp_path / "doubtful"
    good = moving(192, 128, 16)
    write_clip(folder, "good", good, "a good clip")
    shutil.copy(folder / "good.mp4", folder / "again.mp4")
    (folder / "again.txt").write_text("the same file", encoding="utf-8")
    write_clip(folder, "smaller", good[:, ::2, ::2], "the same, smaller")
    write_clip(folder, "black", np.zeros_like(good), "nothing")
    write_clip(folder, "frozen", np.repeat(moving(192, 128, 1, seed=1), 16, 0), "a photo")
    boxed = moving(192, 128, 16, seed=2)
    boxed[:, :20] = boxed[:, -20:] = 0
    write_clip(folder, "boxed", boxed, "one for two")
    write_clip(folder, "plain", moving(192, 128, 16, seed=3), "one for two")
    write_clip(folder, "silent", moving(192, 128, 16, seed=4), "")
    write_clip(folder, "long", moving(192, 128, 16, seed=5), "a word and " * 200)
    return folder


def test_notes_about_clips_and_captions(run_file: RunFile, doubtful: Path) -> None:
    found = examined(run_file("t2v-a14b", *settings(doubtful, "train.batch_size=20")))
    notes = {(f.path.stem if f.path else None, f.kind) for f in found.findings}
    assert not any(f.severity == "problem" for f in found.findings)
    assert notes >= {
        ("good", "duplicate"),
        ("smaller", "near duplicate"),
        ("black", "near black"),
        ("frozen", "frozen"),
        ("boxed", "letterboxed"),
        ("silent", "empty caption"),
        ("long", "long caption"),
        (None, "shared caption"),
        (None, "small bucket"),
    }
    looked_at = {"near duplicate", "duplicate", "near black", "frozen", "letterboxed"}
    assert {name for name, kind in notes if kind in looked_at} == {
        "good",
        "smaller",
        "black",
        "frozen",
        "boxed",
    }
    boxed = next(f.text for f in found.findings if f.kind == "letterboxed")
    # Of the picture as it is trained, whose crop has taken a part of them.
    assert re.search(r"top \(1\d %\) and bottom \(1\d %\)", boxed)
    shared = next(f.text for f in found.findings if f.kind == "shared caption")
    assert "boxed.mp4, plain.mp4" in shared and "'one for two'" in shared
    # The tiny model's tokenizer makes a token of each of the words, more or less.
    count = int(next(f.text for f in found.findings if f.kind == "long caption").split()[3])
    assert 600 <= count <= 2500


def test_combs_of_video_that_is_not_flagged_as_interlaced(
    run_file: RunFile, tmp_path: Path
) -> None:
    folder = tmp_path / "clips"
    frames = moving(192, 128, 32)
    woven = frames[::2].copy()
    woven[:, 1::2] = frames[1::2, 1::2]  # the bottom field comes second
    write_clip(folder, "woven", woven, "two fields in each frame")
    write_clip(folder, "whole", frames[:16], "whole frames")
    lengths = ["wan_config.frame_sample_strategy=chunks", "wan_config.max_frames=5"]
    found = examined(run_file("t2v-a14b", *settings(folder, *lengths)))
    (note,) = [f for f in found.findings if f.kind == "interlaced"]  # one for all clips of a file
    assert note.path == folder / "woven.mp4" and note.severity == "note"
    assert "interlaced: top_first deinterlaces" in note.text
    source = f"[{{path: {folder.as_posix()}, interlaced: top_first}}]"
    mended = examined(run_file("t2v-a14b", *settings(folder, f"video_data.sources={source}")))
    kinds = {(f.path.name, f.kind) for f in mended.findings if f.path}
    assert ("woven.mp4", "deinterlaced") in kinds
    assert not any(kind == "interlaced" for _, kind in kinds)


def test_masks_are_looked_at_and_shown(run_file: RunFile, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    for name in ("half", "white", "damaged"):
        write_clip(folder, name, np.full((16, 64, 64, 3), 128, np.uint8), name)
        mask = Image.new("L", (64, 64), 255)
        if name != "white":
            mask.paste(0, (0, 0, 64, 32))
        mask.save(folder / f"{name}.mask.png")
    damaged = folder / "damaged.mask.png"
    data = bytearray(damaged.read_bytes())
    data[-20] ^= 0xFF
    damaged.write_bytes(data)
    found = examined(
        run_file("t2v-a14b", *settings(folder, "video_data.masks=true")), previews=True
    )
    findings = {(f.path.name, f.severity, f.kind) for f in found.findings if f.path}
    assert ("white.mask.png", "note", "mask") in findings
    assert ("damaged.mp4", "problem", "unusable") in findings
    half = next(item.preview for item in found.clips if item.clip.name == "half.mp4")
    assert half is not None
    frame = np.asarray(Image.open(io.BytesIO(half.frames[0])), np.int16)
    top, bottom = frame[: len(frame) // 3], frame[-len(frame) // 3 :]
    assert (top[..., 0] - top[..., 1]).mean() > 50 > abs(bottom[..., 0] - bottom[..., 1]).mean()


def test_condition_images_are_looked_at_and_shown(run_file: RunFile, tmp_path: Path) -> None:
    folder = tmp_path / "conditions"
    for name in ("given", "damaged"):
        write_clip(folder, name, np.full((16, 64, 64, 3), 128, np.uint8), name)
        Image.new("RGB", (64, 64), (200, 30, 40)).save(folder / f"{name}.condition.png")
    damaged = folder / "damaged.condition.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    write_clip(folder, "random", np.full((16, 64, 64, 3), 90, np.uint8), "random")
    own = "condition: random_frame, timesteps: [0.0, 0.95]"
    source = f"[{{path: {folder.as_posix()}, {own}}}]"
    config = run_file("i2v-a14b", *settings(folder, f"video_data.sources={source}"))
    found = examined(config, previews=True)
    assert [f.path.name for f in found.findings if f.severity == "problem" and f.path] == [
        "damaged.mp4"
    ]
    shown = {item.clip.name: item for item in found.clips}
    preview = shown["given.mp4"].preview
    assert preview is not None
    (picture,) = preview.conditions
    pixels = np.asarray(Image.open(io.BytesIO(picture)), np.int16)
    assert np.abs(pixels.mean(axis=(0, 1)) - (200, 30, 40)).max() < 6
    data = {clip["name"]: clip for clip in found.as_data()["clips"]}
    assert data["given.mp4"]["condition_image"] == "given.condition.png"
    frame = data["random.mp4"]["condition_frame"]
    assert frame == shown["random.mp4"].clip.conditions.frame > 0
    assert data["given.mp4"]["timesteps"] == [0.0, 0.95]
    table = [line for line in found.lines() if line.startswith("  given.mp4")]
    assert "condition image, timesteps 0 to 0.95" in table[0]
    page = html_page(Diagnosis(environment=ENVIRONMENT, examination=found), "run")
    assert "With condition image given.condition.png:" in page
    assert page.count("Trained at timesteps 0 to 0.95 only.") == 2
    # With a model that takes none, they are neither looked at nor shown, which is said.
    plain = examined(run_file("t2v-a14b", *settings(folder)), previews=True)
    assert all(item.preview and not item.preview.conditions for item in plain.clips)
    assert any("2 condition images are not used" in f.text for f in plain.findings)


def test_a_cache_that_does_not_fit_on_the_disk_and_a_model_that_is_not_there(
    run_file: RunFile, doubtful: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(doubtful)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    found = examined(run_file("t2v-a14b", *settings(doubtful), "model.vae=./gone.safetensors"))
    problems = sorted((f.kind, f.text) for f in found.findings if f.severity == "problem")
    assert [kind for kind, _ in problems] == ["disk", "disk", "model"]
    (_, run), (_, cache), (_, model) = problems
    assert run.startswith("output.dir: checkpoints and weights take")
    assert cache.startswith("video_data.cache_dir: the cache takes")
    assert model.startswith("model.vae: ") and "gone.safetensors does" in model


def test_a_run_that_does_not_fit_is_a_problem(run_file: RunFile, doubtful: Path) -> None:
    too_little = ["memory.vram=400MB", "model.device=auto"]
    found = examined(run_file("t2v-a14b", *settings(doubtful), *too_little))
    problems = [f for f in found.findings if f.severity == "problem"]
    assert [f.kind for f in problems] == ["plan"]
    assert "0.4 GB" in problems[0].text
    assert found.needs is not None and "does not fit" in found.needs.verdict


@pytest.mark.usefixtures("known_machine")
def test_fix_writes_captions_as_utf_8_and_keeps_the_original(
    run_file: RunFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, caption = tmp_path / "clips", "a café in Zürich\r\n"
    frames = moving(64, 64, 16)
    write_clip(folder, "windows", frames, caption.encode("cp1252"))
    write_clip(folder, "wide", frames, "a plain text".encode("utf-16-le"))
    write_clip(folder, "right", frames, caption)
    run = saved(run_file("t2v-a14b", *settings(folder)), tmp_path)

    def files() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".mp4"}

    before = files()
    assert main(["doctor", run, "--json"]) == 1  # what is not UTF-16 for certain can't be used
    findings = json.loads(capsys.readouterr().out)["findings"]
    found = {(Path(f["path"]).name, f["kind"]) for f in findings if f["path"]}
    assert {("windows.txt", "caption encoding"), ("wide.mp4", "unusable")} <= found
    assert main(["doctor", run, "--fix"]) == 1  # pytest's stdin is no terminal: it does not ask
    assert "--yes" in capsys.readouterr().err and files() == before
    assert main(["doctor", run, "--fix", "--yes"]) == 0
    err = capsys.readouterr().err
    assert "a café in Zürich" in err and "Windows-1252" in err and "UTF-16" in err
    assert files() == before | {
        "windows.txt": caption.encode(),
        "windows.txt.bak": before["windows.txt"],
        "wide.txt": b"a plain text",
        "wide.txt.bak": before["wide.txt"],
    }
    assert main(["doctor", run, "--fix", "--yes"]) == 0
    assert "nothing to repair" in capsys.readouterr().err
    # Which of many encodings this is, nobody can tell: it is a problem, and stays as it is.
    write_clip(folder, "cyrillic", frames, "лиса бежит по снегу".encode("cp1251"))
    assert main(["doctor", run, "--fix", "--yes"]) == 1
    captured = capsys.readouterr()
    assert "nothing to repair" in captured.err and "cyrillic.mp4: its caption file" in captured.out


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("raise ImportError('libcudart.so.12: cannot open shared object file')", "libcudart.so.12"),
        ("import os; os.abort()", "ends with status"),
    ],
)
def test_without_torch_the_machine_and_the_clips_are_looked_at(
    run_file: RunFile, tmp_path: Path, broken: str, reason: str
) -> None:
    write_clip(tmp_path / "clips", "one", moving(64, 64, 16), "a caption")
    run = saved(run_file("t2v-a14b", *settings(tmp_path / "clips")), tmp_path)
    (tmp_path / "site" / "torch").mkdir(parents=True)
    (tmp_path / "site" / "torch" / "__init__.py").write_text(broken, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "onewan", "doctor", run, "--json"],
        capture_output=True,
        encoding="utf-8",
        env=with_packages(tmp_path / "site"),
        check=False,
    )
    data = json.loads(done.stdout)
    problems = [f for f in data["findings"] if f["severity"] == "problem"]
    assert done.returncode == 1 and [f["kind"] for f in problems] == ["torch"]
    assert reason in problems[0]["text"]
    assert data["environment"]["torch"]["version"] is None
    assert data["environment"]["packages"]["numpy"] == np.__version__
    assert [clip["name"] for clip in data["data"]["clips"]] == ["one.mp4"]


def test_without_a_card_the_plan_says_which_the_run_needs(
    run_file: RunFile, doubtful: Path
) -> None:
    found = examined(run_file("t2v-a14b", *settings(doubtful), "model.device=auto"))
    assert found.needs is not None
    assert "no card was found here; the run needs one of 8 GB or more" in found.needs.verdict
    assert "host memory" not in found.needs.verdict  # there is enough for the tiny model
    assert found.needs.as_data()["plan"]["smallest"]["vram"] == 8 * 10**9
    assert not any(f.kind == "plan" for f in found.findings)


def test_a_missing_package_leaves_the_machine_to_be_looked_at(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "av.py").write_text("raise ImportError('no av here')", encoding="utf-8")
    (tmp_path / "run.yaml").write_text("model: {path: a/b, variant: t2v-a14b}", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "onewan", "doctor", str(tmp_path / "run.yaml")],
        capture_output=True,
        encoding="utf-8",
        env=with_packages(tmp_path / "site"),
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "package is missing or broken: no av here" in done.stdout
    assert f"numpy {np.__version__}" in done.stdout


def test_a_package_that_needs_a_missing_one_is_a_problem(tmp_path: Path) -> None:
    """Found on a machine whose pydantic was installed without what it needs."""
    (tmp_path / "typing_inspection").mkdir()
    broken = tmp_path / "typing_inspection" / "__init__.py"
    broken.write_text("raise ImportError('nothing of it here')", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "onewan", "doctor"],
        capture_output=True,
        encoding="utf-8",
        env=with_packages(tmp_path),
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    said = " ".join(done.stdout.split())
    assert "a package that onewan needs can't be imported (nothing of it here)" in said
    assert "0 B of memory" not in said


def with_packages(folder: Path) -> dict[str, str]:
    """The environment of a process that imports packages from `folder` first."""
    source = Path(onewan.__file__).parents[1]
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{source}"}


@pytest.mark.usefixtures("known_machine")
def test_a_wrong_run_file_is_a_problem_beside_the_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    model = "model: {path: owner/model, variant: t2v-a14b}\n"
    for text, reason in (
        ("model: {path: owner/model, variant: t2v}\n", "model.variant"),
        (f"{model}video_data: {{sources: [{{path: ./gone}}]}}\n", "is not a folder"),
        (model, "video_data.sources: is empty"),
    ):
        path.write_text(text, encoding="utf-8")
        assert main(["doctor", str(path), "--json"]) == 1
        data = json.loads(capsys.readouterr().out)
        problems = [f["text"] for f in data["findings"] if f["severity"] == "problem"]
        assert any(reason in problem for problem in problems), problems
        assert data["environment"]["python"] == ENVIRONMENT.python


@pytest.mark.skipif(os.name != "posix", reason="nvidia-smi is a shell script here")
@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch that knows no card")
def test_a_card_that_torch_can_not_use_is_a_problem(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    row = "570.12, NVIDIA GeForce RTX 4090, 24564 MiB, 812 MiB"
    program.write_text(f"#!/bin/sh\necho '{row}'\n", encoding="utf-8")
    program.chmod(0o755)
    shown = {name: value for name, value in os.environ.items() if "VISIBLE_DEVICES" not in name}
    done = subprocess.run(
        [sys.executable, "-m", "onewan", "doctor"],
        capture_output=True,
        encoding="utf-8",
        env={**shown, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "driver     NVIDIA 570.12: NVIDIA GeForce RTX 4090, 24564 MiB" in done.stdout
    assert "problem: torch can't use the card NVIDIA GeForce RTX 4090" in done.stdout


# --------------------------------------------------------------------------------- the page


@pytest.fixture
def page(known_machine: None, run_file: RunFile, tmp_path: Path) -> Path:  # noqa: ARG001
    """The page of a run on drawn clips, a still image and a hostile caption among them."""
    folder = tmp_path / "clips"
    write_clips(folder)
    write_clip(folder, "hostile", moving(64, 128, 16), '<script>alert("x")</script>')
    run = saved(run_file("t2v-a14b", *settings(folder)), tmp_path)
    assert main(["doctor", run, "--html", str(tmp_path / "page.html")]) == 0
    return tmp_path / "page.html"


def test_the_page_has_everything_in_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    addresses = re.findall(r'(?:src|href|poster|action|url)\s*[=(]\s*["\']?([^"\'\s>)]+)', text)
    assert addresses and all(address.startswith("data:") for address in addresses)
    assert text.count("<script>") == 1 and "&lt;script&gt;alert(&quot;x&quot;)" in text
    assert "hostile.mp4" in text and "Clips as they are trained" in text
    video = re.search(r'aria-label="hostile.mp4"[^>]*src="data:video/mp4;base64,([^"]+)"', text)
    assert video is not None
    file = page.with_name("hostile.mp4")
    file.write_bytes(base64.b64decode(video[1]))
    info = probe(file)
    assert info.frames_at(1 / info.frame_interval) == 9 and info.frame_interval == 1 / 16
    assert info.height > info.width


def test_videos_are_left_out_of_a_page_that_would_be_too_large(
    run_file: RunFile, tmp_path: Path
) -> None:
    write_clips(tmp_path / "clips")
    found = examined(run_file("t2v-a14b", *settings(tmp_path / "clips")), previews=True)
    videos = [item.preview.video for item in found.clips if item.preview and item.preview.video]
    diagnosis = Diagnosis(environment=ENVIRONMENT, examination=found)
    some = html_page(diagnosis, "run", most_video_bytes=len(videos[0]))
    assert some.count("<video") == 1
    assert f"{len(videos) - 1} videos can't be played here" in some
    assert html_page(diagnosis, "run").count("<video") == len(videos)


_PLAY = """
const videos = [...document.querySelectorAll("video")];
const sizes = await Promise.all(videos.map((video) => new Promise((done) => {
  video.onloadeddata = () => done(`${video.videoWidth}x${video.videoHeight}`);
  video.onerror = () => done("error");
  video.preload = "auto";
  video.load();
})));
note("loaded", sizes.join(" "));
const [video] = videos, button = document.querySelector(".player button");
button.click();
await until(() => video.currentTime >= 0.1);
note("played", `${button.textContent} ${video.paused}`);
const find = document.getElementById("find");
find.value = "hostile";
find.dispatchEvent(new Event("input"));
note("found", document.getElementById("shown").textContent);
note("paused", video.paused);
await until(() => button.textContent === "Play");
"""
"""Loads the videos of the page and notes their sizes, plays the first one, and looks for a clip."""


@pytest.mark.parametrize("window", WINDOWS)
def test_the_page_in_a_browser_asks_for_nothing_and_has_no_error(
    page: Path, tmp_path: Path, window: str
) -> None:
    text = page.read_text(encoding="utf-8")
    opened = open_page(page, tmp_path / "profile", window, _PLAY)
    noted = opened.noted
    assert "error" not in noted["loaded"]
    videos = text.count("<video")
    assert len(noted["loaded"].split()) == videos == opened.dom.count(">Play</button>") > 0
    assert noted["played"] == "Pause false"
    # The one that is played is not among those that are found, so it is stopped.
    assert re.fullmatch(r"1 of \d+ clips", noted["found"]) and noted["paused"]
    assert not noted["overflow"] and not opened.requests
    # What the policy of the page forbids is an error here too.
    assert not opened.console
