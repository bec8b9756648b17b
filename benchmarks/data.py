"""The data path in numbers: reading, filling the cache, a start, and the loader's share of a step.

Each line is a ratio or a time of one run, with the limit that it should keep. Ratios are medians of
pairs that alternate, so that other work on the machine slows down both. Decoders that are not
installed (OpenCV, torchcodec) are left out, and said so. Exits with status 1 if a limit is missed.

    python benchmarks/data.py [--clips 10000] [--folder DIR] [--repeats 5] [--write]
"""

from __future__ import annotations

import argparse
import os
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
import torch
from decode import bare, make_clip
from diffusers import AutoencoderKLWan
from markers import replace_between
from torch import Tensor

from onewan.config.load import load_run
from onewan.config.schema import ResolvedRun
from onewan.data.ahead import results_ahead
from onewan.data.dataset import Dataset, prepare
from onewan.data.loader import WanDataLoader
from onewan.media import Fit, fit_image, read_frames, write_video
from onewan.model.conditioning import conditioning_of
from onewan.model.sources import ENCODERS
from onewan.model.vae import encode_video
from onewan.variants import ExpertName

FIT = Fit(848, 480)
FRAMES, FPS = 49, 16
STEP_SECONDS = 0.5
"""A short training step, with which the loader's time is compared."""
DOCUMENT = Path(__file__).parent.parent / "docs" / "performance.md"


@dataclass(frozen=True)
class Row:
    """One measurement."""

    what: str
    value: float
    unit: str
    limit: float
    at_least: bool = False

    @property
    def kept(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        bound = "at least" if self.at_least else "at most"
        mark = "" if self.kept else " MISSED"
        return f"| {self.what} | {self.value:.3g}{self.unit} | {bound} {self.limit:g}{mark} |"


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def ratio(slow: Callable[[], object], fast: Callable[[], object], repeats: int) -> float:
    """Median of time of `slow` over time of `fast`."""
    slow()
    fast()
    return median(seconds(slow) / seconds(fast) for _ in range(repeats))


# --- Reading -------------------------------------------------------------------------------------


def reading(folder: Path, repeats: int) -> Iterator[Row]:
    """Frames at their training size, against bare loops that resize with the same filter."""
    clip = folder / "short.mp4"
    if not clip.exists():
        make_clip(clip, 12, 48)
    times = [2 + k / FPS for k in range(FRAMES)]

    def ours(threads: int = 0) -> np.ndarray:
        return read_frames(clip, times, FIT, threads=threads)

    def bare_pyav() -> np.ndarray:
        return np.stack([fit_image(frame, FIT) for frame in bare(clip, times)])

    yield Row("reading / a bare PyAV loop", ratio(ours, bare_pyav, repeats), "", 1.3)
    if find_spec("cv2"):
        yield Row("reading / OpenCV", ratio(ours, lambda: _opencv(clip, times), repeats), "", 1.3)
    else:
        print("OpenCV is not installed: not compared")
    if find_spec("torchcodec"):
        other = ratio(ours, lambda: _torchcodec(clip, times), repeats)
        yield Row("reading / torchcodec", other, "", 1.3)
    else:
        print("torchcodec is not installed: not compared")

    def with_workers(workers: int) -> None:
        with closing(results_ahead(lambda _: ours(1), range(4), workers=workers)) as results:
            for _, result in results:
                result()

    faster = ratio(lambda: with_workers(1), lambda: with_workers(2), repeats)
    yield Row("two workers / one", faster, " times", 1.6, at_least=True)


def _opencv(clip: Path, times: Sequence[float]) -> np.ndarray:
    import cv2  # pyright: ignore[reportMissingImports]

    capture = cv2.VideoCapture(str(clip))
    capture.set(cv2.CAP_PROP_POS_MSEC, times[0] * 1000)
    frames = list[np.ndarray]()
    while len(frames) < len(times):
        good, frame = capture.read()
        if not good:
            break
        # OpenCV names the time of the next frame.
        if capture.get(cv2.CAP_PROP_POS_MSEC) / 1000 >= times[len(frames)]:
            frames.append(fit_image(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), FIT))
    return np.stack(frames)


def _torchcodec(clip: Path, times: Sequence[float]) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]

    frames = VideoDecoder(str(clip)).get_frames_played_at(list(times)).data
    return np.stack([fit_image(frame.permute(1, 2, 0).numpy(), FIT) for frame in frames])


# --- The cache -----------------------------------------------------------------------------------


class StandIn:
    """A model whose encoders take `delay` seconds and whose latents are small."""

    class vae:  # noqa: N801  (an attribute of WanModel)
        device = torch.device("cpu")

    def __init__(self, delay: float = 0.0) -> None:
        self._delay = delay

    def encode_video(self, pixels: Tensor) -> Tensor:
        time.sleep(self._delay)
        return torch.full((1, 16, 3, 8, 8), float(pixels.mean()))

    def encode_condition(self, _pixels: Tensor) -> dict[str, Tensor]:
        return {}

    def token_count(self, _caption: str) -> int:
        return 3

    def encode_prompt(self, _caption: str) -> Tensor:
        return torch.zeros(3, 8)


def run_file(folder: Path, name: str, frames: int, resolution: int | str) -> ResolvedRun:
    """A run on the clips of `folder`/NAME with a cache of its own."""
    path = folder / f"{name}.yaml"
    path.write_text(
        f"""
model: {{path: {folder.as_posix()}/model, variant: t2v-a14b, dtype: float32}}
wan_config: {{max_frames: {frames}}}
video_data:
  sources: [{{path: {(folder / name).as_posix()}}}]
  resolution: {resolution}
  cache_dir: {(folder / f"cache_{name}").as_posix()}
method: {{kind: lora, rank: 4}}
train: {{steps: 6}}
validation: {{share: null, clips: 0}}
logging: {{tensorboard: false}}
""",
        encoding="utf-8",
    )
    return load_run(path, [])


def filled(folder: Path, config: ResolvedRun, model: object) -> Dataset:
    paths = {name: folder / "model" / name for name in ENCODERS}
    for path in paths.values():
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text("{}")

    def load(_: Collection[str]) -> object:
        return model

    return prepare(config, paths, load)  # pyright: ignore[reportArgumentType]


def copies_of(clip: Path, folder: Path, number: int) -> None:
    """Files with the pictures of `clip`, an MP4, and each with content of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    data = clip.read_bytes()
    for index in range(number):
        # An empty box at the end changes the content.
        (folder / f"{index:05}.mp4").write_bytes(data + struct.pack(">I4sQ", 16, b"free", index))
        (folder / f"{index:05}.txt").write_text(f"a clip of kind {index % 50}", encoding="utf-8")


@contextmanager
def without_syncing() -> Iterator[None]:
    """Files are not flushed to the disk one by one: 10,000 of them take minutes on some disks."""
    before, os.fsync = os.fsync, lambda _: None
    try:
        yield
    finally:
        os.fsync = before


def overlapping(folder: Path, repeats: int) -> Iterator[Row]:
    """Filling with a VAE that takes as long as decoding, ahead and in turn."""
    if not (folder / "overlap").exists():
        copies_of(folder / "short.mp4", folder / "overlap", 6)
    config = run_file(folder, "overlap", FRAMES, "848x480")
    alone = seconds(
        lambda: read_frames(
            folder / "short.mp4", [2 + k / FPS for k in range(FRAMES)], FIT, threads=0
        )
    )

    def fill(workers: int) -> None:
        for entry in (folder / "cache_overlap").rglob("*.safetensors"):
            entry.unlink()
        data = config.video_data.model_copy(update={"workers": workers})
        filled(folder, config.model_copy(update={"video_data": data}), StandIn(alone))

    faster = ratio(lambda: fill(0), lambda: fill(1), max(1, repeats // 2))
    yield Row("decoding and encoding in turn / overlapped", faster, " times", 1.7, at_least=True)


def real_vae(folder: Path) -> Iterator[Row]:
    """From a file to latents with the VAE's true layers, at a small size."""
    vae = AutoencoderKLWan()
    clip, fit = folder / "short.mp4", Fit(128, 80)
    times = [2 + k / FPS for k in range(5)]
    frames: list[np.ndarray] = []
    reading = seconds(lambda: frames.append(read_frames(clip, times, fit)))
    pixels = torch.from_numpy(frames[0]).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    encoding = seconds(lambda: encode_video(vae, pixels))
    print(f"5 frames of 128x80: read in {reading:.2f} s, encoded in {encoding:.2f} s")
    share = (reading + encoding) / encoding
    yield Row("file to latents / the VAE alone, at 128x80", share, "", 1.2)


def start_and_epochs(folder: Path, number: int) -> Iterator[Row]:
    """A second start with many cached clips, and three epochs over them with both experts."""
    if not (folder / "many").exists():
        noise = np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3), dtype=np.uint8)
        write_video(folder / "tiny.mp4", noise, fps=16)
        copies_of(folder / "tiny.mp4", folder / "many", number)
    config = run_file(folder, "many", 9, 4096)
    with without_syncing():
        filled(folder, config, StandIn())
    begin = time.process_time()
    data = filled(folder, config, StandIn())
    spent = time.process_time() - begin
    assert data.encoded == 0
    yield Row(f"start with {len(data.clips)} cached clips, CPU time", spent, " s", 5.0)

    loader = WanDataLoader(
        {"high": data.clips, "low": data.clips},
        data.source,
        conditioning_of(config.model.facts()),
        batch_size=1,
        accumulation=1,
        seed=1,
    )

    def expert_at(step: int) -> tuple[ExpertName, int]:
        return ("high" if step % 2 == 0 else "low"), step // 2

    memory, steps = list[int](), 2 * loader.batches_per_epoch["high"]
    spent = 0.0
    for epoch in range(3):
        begin = time.process_time()
        for _ in loader.steps(epoch * steps, (epoch + 1) * steps, expert_at):
            pass
        spent = time.process_time() - begin  # of the last: entries are verified in the first
        memory.append(psutil.Process().memory_info().rss)
    per_step = spent / steps
    share = 100 * per_step / STEP_SECONDS
    yield Row("reading a step, of a step of 0.5 s", share, " %", 1.0)
    growth = (memory[-1] - memory[0]) / 2**20
    yield Row("memory from the first to the third epoch", growth, " MiB", 20.0)

    begin = time.process_time()
    for step in range(1000):
        expert, index = expert_at(step)
        loader._epoch(expert, index // loader.batches_per_epoch[expert])
    per_order = time.process_time() - begin
    yield Row("the order of a step, experts alternating", per_order, " ms", 1.0)


def main() -> int:
    parser = argparse.ArgumentParser(description="The data path of onewan in numbers")
    parser.add_argument("--clips", type=int, default=10_000, help="cached clips (10000)")
    parser.add_argument("--folder", type=Path, help="where clips are kept for the next time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="put the table into the document")
    options = parser.parse_args()
    rows = list[Row]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for measured in (
            reading(folder, options.repeats),
            overlapping(folder, options.repeats),
            real_vae(folder),
            start_and_epochs(folder, options.clips),
        ):
            for row in measured:
                print(row, flush=True)
                rows.append(row)
    if options.write:
        lines = ["| measured | value | limit |", "| --- | --- | --- |", *map(str, rows)]
        replace_between(DOCUMENT, "data", "\n".join(lines))
    return 0 if all(row.kept for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
