"""Every command with places that can't be read or written: one line with the file, at once.

Tests may run as root, whom permissions do not bind; a path below a file, in /proc or in /sys can't
be written by root either.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from onewan.cli import main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs FIFOs, /proc and /sys")

SECONDS = 60
"""Longer than any of these commands takes on a busy machine; a FIFO is waited for without end."""
INPUTS = ("fifo", "socket", "device", "loop", "folder", "missing", "long", "below a file")
OUTPUTS = ("below a file", "in a loop", "long", "in /proc", "in /sys")

READING = {
    "cache": ["cache", "{bad}.yaml"],
    "train": ["train", "{bad}.yaml"],
    "resume": ["train", "{bad}.yaml", "--resume"],
    "train json": ["train", "{bad}.json"],
    "stop": ["stop", "{bad}"],
    "save": ["save", "{bad}"],
    "model": ["train", "{run}", "model.path={bad}"],
    "transformer": ["train", "{run}", "model.transformer={bad}.safetensors"],
    "vae": ["cache", "{run}", "model.vae={bad}.pth"],
    "tokenizer": ["cache", "{run}", "model.tokenizer={bad}"],
    "clips": ["cache", "{run}", "video_data.sources.0.path={bad}"],
    "init_from": ["train", "{run}", "method.init_from=[{bad}.safetensors]"],
    "sample": ["sample", "{bad}", "--prompt", "a", "--out", "{out}.mp4"],
    "prompts": ["sample", "{model}", "--prompts", "{bad}.txt", "--out", "{out}.mp4"],
    "lora": ["sample", "{model}", "--prompt", "a", "--out", "{out}.mp4", "--lora", "{bad}"],
    "inspect": ["inspect", "{bad}"],
    "inspect safetensors": ["inspect", "{bad}.safetensors"],
    "inspect gguf": ["inspect", "{bad}.gguf"],
    "convert": ["convert", "{bad}", "{out}", "--to", "diffusers"],
    "merge base": ["merge", "{bad}", "{lora}", "{out}"],
    "merge lora": ["merge", "{model}", "{bad}.safetensors", "{out}"],
    "import-config": ["import-config", "{bad}.json"],
    "onetrainer check": ["onetrainer", "check", "{bad}"],
    "onetrainer install": ["onetrainer", "install", "{bad}"],
    "onetrainer export": ["onetrainer", "export", "{bad}", "{out}.safetensors"],
}
WRITING = {
    "cache_dir": ["cache", "{run}", "video_data.cache_dir={bad}"],
    "output.dir": ["train", "{run}", "output.dir={bad}"],
    "demo": ["demo", "--dir", "{bad}"],
    "sample": ["sample", "{model}", "--prompt", "a", "--out", "{bad}.mp4"],
    "convert": ["convert", "{transformer}", "{bad}.safetensors", "--to", "single"],
    "convert folder": ["convert", "{transformer}", "{bad}", "--to", "diffusers"],
    "import-config": ["import-config", "{config}", "--output", "{bad}"],
}


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """Ends a test that hangs, and one that reads a device without end."""

    def end(*_: object) -> None:
        raise TimeoutError("the command waits")

    previous = signal.signal(signal.SIGALRM, end)
    memory = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, memory[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    resource.setrlimit(resource.RLIMIT_AS, memory)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def run_yaml(workshop: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{path: {workshop}/t2v-a14b, variant: t2v-a14b, dtype: float32}}\n"
        f"video_data: {{sources: [{{path: {workshop}/clips}}], resolution: 4096}}\n"
        "wan_config: {max_frames: 5}\n"
        "train: {steps: 1}\n",
        encoding="utf-8",
    )
    return path


def write_config(folder: Path) -> Path:
    """A config of OneTrainer."""
    path = folder / "config.json"
    path.write_text(
        '{"model_type": "WAN_2_2", "training_method": "LORA", "__version": 11, '
        '"base_model_name": "Wan2.2-T2V-A14B", "concepts": []}'
    )
    return path


def bad_input(kind: str, folder: Path, suffix: str) -> Path:
    path = folder / f"in{suffix}"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "long":
        return folder / ("x" * 300 + suffix)
    elif kind == "below a file":
        path.touch()
        return path / f"in{suffix}"
    return path


def bad_output(kind: str, folder: Path, suffix: str) -> Path:
    if kind == "below a file":
        (folder / "file").touch()
        return folder / "file" / f"out{suffix}"
    if kind == "in a loop":
        (folder / "loop").symlink_to(folder / "loop")
        return folder / "loop" / f"out{suffix}"
    if kind == "long":
        return folder / ("x" * 300 + suffix)
    return Path("/proc" if kind == "in /proc" else "/sys/x", f"out{suffix}")


def refused(
    words: list[str], places: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """The lines on stderr of a command that has to fail."""
    status = main([word.format_map(places) for word in words])
    err = capsys.readouterr().err
    assert status == 1, err
    assert err.startswith("onewan: ")
    # Of the system a text, not its number; and what is bad is not what another process uses.
    for word in ("Traceback", "defect", "[Errno", "in use"):
        assert word not in err
    return err.splitlines()


def suffix_of(words: list[str]) -> str:
    """The suffix of the bad place in a command."""
    return next(found[1] for word in words if (found := re.search(r"\{bad\}([.\w]*)", word)))


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("command", READING)
def test_what_can_not_be_read_is_one_line(
    command: str,
    kind: str,
    workshop: Path,
    run_yaml: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = READING[command]
    suffix = suffix_of(words)
    path = str(bad_input(kind, tmp_path, suffix))
    places = {"bad": path.removesuffix(suffix), "run": run_yaml, "out": tmp_path / "out"}
    places |= {"model": workshop / "t2v-a14b", "lora": tmp_path / "no.safetensors"}
    lines = refused(words, places, capsys)
    assert path in "".join(lines)
    # Of a run file and of clips: a heading, and the problem. An empty folder can be read, so there
    # is the report of a data set.
    assert len(lines) <= (4 if (command, kind) == ("clips", "folder") else 2)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("command", WRITING)
def test_what_can_not_be_written_is_one_line(
    command: str,
    kind: str,
    workshop: Path,
    run_yaml: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = WRITING[command]
    suffix = suffix_of(words)
    path = bad_output(kind, tmp_path, suffix)
    places = {
        "bad": str(path).removesuffix(suffix),
        "run": run_yaml,
        "config": write_config(tmp_path),
    }
    places["model"] = workshop / "t2v-a14b"
    places["transformer"] = workshop / "t2v-a14b" / "transformer"
    lines = refused(words, places, capsys)
    assert len(lines) <= 2
    part = path if kind in ("long", "in /proc") else path.parent
    assert str(part) in "".join(lines)


@pytest.mark.parametrize("command", [["convert"], ["cache"], ["import-config"]])
def test_a_write_that_fails_half_way_names_the_file_and_leaves_nothing(
    command: list[str],
    workshop: Path,
    run_yaml: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A limit on the size of files is like a full disk: writing fails in the middle of a file."""
    out = tmp_path / "out"
    transformer = str(workshop / "t2v-a14b" / "transformer")
    arguments = {
        "convert": [transformer, f"{out}.safetensors", "--to", "single"],
        "cache": [str(run_yaml), f"video_data.cache_dir={out}"],
        "import-config": [str(write_config(tmp_path)), "--output", f"{out}.yaml"],
    }[command[0]]
    before = set(tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        lines = refused([*command, *arguments], {}, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert lines[-1].startswith(f"onewan: {out}")
    left = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    # Lists, of which each line counts.
    assert {path.name for path in left} <= {"digests.jsonl", "probes.jsonl"}
