"""`onewan caption` on 200 clips with a server of which every tenth answer fails, also killed."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from robustness.chat_server import MisbehavingServer, fingerprint, often_failing, serving

from onewan.captioning.tasks import TaskPlanner
from onewan.config.load import run_of_settings
from onewan.media import write_video

pytestmark = pytest.mark.long

CLIPS, KILLS, PARALLEL = 200, 20, 4
FAILURES = [
    *("status 500", "status 503 after 0", "status 429 after 0", "broken", "cut", "reset"),
    *("page", "status 502"),
]


def write_clips(folder: Path) -> None:
    """`CLIPS` clips, no two alike, of which every 20th is a video."""
    folder.mkdir()
    for number in range(CLIPS):
        color = (number, 255 - number, 7 * number % 256)
        name = folder / f"clip_{number:03}"
        if number % 20:
            Image.new("RGB", (64, 64), color).save(name.with_suffix(".png"))
        else:
            frames = np.empty((5, 64, 64, 3), np.uint8)
            frames[:] = color
            write_video(name.with_suffix(".mp4"), frames, 16)


def expected_captions(folder: Path) -> dict[str, str]:
    """The text of each caption file by its name."""
    sources = [{"path": str(folder)}]
    config = run_of_settings(
        {
            "model": {"path": "nowhere", "variant": "t2v-a14b"},
            "video_data": {"sources": sources, "resolution": 64, "cache": False},
        },
        "test",
    )
    plan = TaskPlanner(config=config, frames=8, longest_side=640, for_review=False).plan()
    return {task.target.name: f"seen {fingerprint(task.images())}\n" for task in plan.tasks}


def start(folder: Path, there: MisbehavingServer) -> subprocess.Popen[str]:
    settings = ["video_data.resolution=64", "--server", there.url, "--parallel", str(PARALLEL)]
    return subprocess.Popen(
        [sys.executable, "-m", "onewan", "caption", str(folder), *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


class Captions:
    """The caption files of a folder: none may be incomplete, and none may change."""

    def __init__(self, folder: Path, expected: dict[str, str]) -> None:
        self.folder, self.expected = folder, expected
        self.seen: dict[str, tuple[str, int]] = {}
        """Text and time of the last change."""

    def write_by_hand(self, name: str) -> None:
        """What a user does while the command runs; it may come too late."""
        try:
            with (self.folder / name).open("x", encoding="utf-8") as file:
                file.write("by hand")
        except FileExistsError:
            return
        self.seen[name] = ("by hand", (self.folder / name).stat().st_mtime_ns)

    def check(self) -> None:
        for path in self.folder.glob("clip_*.txt"):
            found = (path.read_text(encoding="utf-8"), path.stat().st_mtime_ns)
            assert self.seen.setdefault(path.name, found) == found
            assert found[0] in (self.expected[path.name], "by hand")


@pytest.mark.parametrize("kills", [0, KILLS])
def test_each_clip_is_captioned_once_none_is_lost_and_none_is_overwritten(
    tmp_path: Path, kills: int
) -> None:
    folder, rng = tmp_path / "clips", random.Random(kills)
    write_clips(folder)
    captions = Captions(folder, expected_captions(folder))
    assert len(set(captions.expected.values())) == CLIPS
    by_hand = sorted(rng.sample(sorted(captions.expected), 12))
    for name in by_hand[:4]:
        captions.write_by_hand(name)
    with serving(MisbehavingServer(often_failing(kills, FAILURES))) as there:
        for number in range(kills):
            before = len(there.received)
            process = start(folder, there)
            # After some of the requests, and at any time within one.
            while len(there.received) - before < rng.randrange(1, 9) and process.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
            captions.write_by_hand(by_hand[number % 12])
            process.kill()
            process.communicate()
            captions.check()
        done_before = len(list(folder.glob("clip_*.txt")))
        process = start(folder, there)
        output, _ = process.communicate(timeout=300)
    captions.check()
    assert process.returncode == 0, output
    assert set(captions.seen) == set(captions.expected)
    assert f"({done_before} had a caption file)" in output
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    answers = Counter(there.answered)
    assert len(there.received) - len(there.answered) >= 10
    if kills:
        # What was being answered at a kill is asked again.
        assert sum(count - 1 for count in answers.values()) <= kills * PARALLEL
        assert done_before < CLIPS - 20, "the kills come too late to be of interest"
    else:
        assert set(answers.values()) == {1} and len(answers) == CLIPS - 4
