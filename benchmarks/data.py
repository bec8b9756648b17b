"""The data path in numbers: reading, filling the cache, a start, and the loader's share of a step.

Each line is a ratio or a time of one run, with the limit that it should keep. Ratios are medians of
pairs that alternate, so that other work on the machine slows down both. Decoders that are not
installed (OpenCV, torchcodec) are left out, and said so. Exits with status 1 if a limit is missed.

    python benchmarks/data.py [--clips 10000] [--folder DIR] [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
import torch
from av import VideoFrame
from decode import SIZE, bare, make_clip
from diffusers import AutoencoderKLWan
from figures import Figure, Value, add_output_options, as_case, measured_here, save
from torch import Tensor

from onewan.arithmetic.condition_shares import Given
from onewan.config.load import load_run
from onewan.config.schema import ResolvedRun
from onewan.data.ahead import results_ahead
from onewan.data.clip import Clip
from onewan.data.dataset import Dataset, prepare
from onewan.data.encode import LatentSource
from onewan.data.loader import WanDataLoader
from onewan.media import Fit, read_frames, write_video
from onewan.media.kinds import SWS_SCALING
from onewan.model.conditioning import conditioning_of
from onewan.model.sources import ENCODERS
from onewan.model.vae import encode_video
from onewan.variants import VARIANTS, ExpertName

FIT = Fit(848, 480)
FRAMES, FPS = 49, 16
STEP_SECONDS = 0.5
"""A short training step, with which the loader's time is compared."""


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


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of all threads of this process."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def ratio(
    slow: Callable[[], object],
    fast: Callable[[], object],
    repeats: int,
    measure: Callable[[Callable[[], object]], float] = seconds,
) -> float:
    """Median of time of `slow` over time of `fast`."""
    slow()
    fast()
    return median(measure(slow) / measure(fast) for _ in range(repeats))


# --- Reading -------------------------------------------------------------------------------------


def reading(folder: Path, repeats: int) -> Iterator[Row]:
    """Frames at their training size, against the shortest loops of other decoders."""
    clip, long = folder / "short.mp4", folder / "long.mp4"
    for path, length in ((clip, 12), (long, 180)):
        if not path.exists():
            make_clip(path, length, 48)
    times = [2 + k / FPS for k in range(FRAMES)]
    in_the_middle = [90 + k / FPS for k in range(FRAMES)]

    def ours() -> np.ndarray:
        return read_frames(clip, times, FIT)

    def others() -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
        yield "a bare PyAV loop with the same filter", partial(_pyav, clip, times)
        if find_spec("cv2"):
            yield "OpenCV, with its area filter", partial(_opencv, clip, times)
        else:
            print("OpenCV is not installed: not compared")
        if find_spec("torchcodec"):
            yield "torchcodec, with torch's bicubic filter", partial(_torchcodec, clip, times)
        else:
            print("torchcodec is not installed: not compared")

    for name, other in others():
        yield Row(f"reading / {name}, CPU time", ratio(ours, other, repeats, cpu_seconds), "", 1.3)

    flat = ratio(partial(read_frames, long, in_the_middle, FIT), ours, repeats, cpu_seconds)
    yield Row("reading of 3 minutes / of 12 s, from the middle, CPU time", flat, "", 1.2)

    def with_workers(workers: int) -> None:
        def read(_: int) -> np.ndarray:
            return read_frames(clip, times, FIT, threads=1)

        with closing(results_ahead(read, range(4), workers=workers)) as results:
            for _, result in results:
                result()

    faster = ratio(lambda: with_workers(1), lambda: with_workers(2), repeats)
    yield Row("two workers / one", faster, " times", 1.6, at_least=True)


def _pyav(clip: Path, times: Sequence[float]) -> np.ndarray:
    cover = FIT.cover(*SIZE)
    rows = slice(cover.top, cover.top + FIT.height)
    columns = slice(cover.left, cover.left + FIT.width)

    def rgb(frame: VideoFrame) -> np.ndarray:
        pixels = frame.to_ndarray(
            format="rgb24", width=cover.width, height=cover.height, interpolation=SWS_SCALING
        )
        return pixels[rows, columns]

    return bare(clip, times, rgb)


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
            scaled = cv2.resize(frame, (FIT.width, FIT.height), interpolation=cv2.INTER_AREA)
            frames.append(cv2.cvtColor(scaled, cv2.COLOR_BGR2RGB))
    return np.stack(frames)


def _torchcodec(clip: Path, times: Sequence[float]) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]

    decoder = VideoDecoder(str(clip), seek_mode="approximate", num_ffmpeg_threads=0)
    frames = decoder.get_frames_played_at(list(times)).data
    size = (FIT.height, FIT.width)
    scaled = torch.nn.functional.interpolate(frames, size, mode="bicubic", antialias=True)
    return scaled.permute(0, 2, 3, 1).numpy()


# --- The cache -----------------------------------------------------------------------------------


class StandIn:
    """A model whose encoders take `delay` seconds and whose latents are small."""

    class vae:  # noqa: N801  (an attribute of WanModel)
        # Pixels are converted on the VAE's device: this one costs the host nothing, as a card.
        device = torch.device("meta")

    def __init__(self, delay: float = 0.0) -> None:
        self._delay = delay

    def encode_video(self, _pixels: Tensor) -> Tensor:
        time.sleep(self._delay)
        return torch.full((1, 16, 3, 8, 8), 0.5)

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
        copies_of(folder / "short.mp4", folder / "overlap", 20)
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
    """A second start with many cached clips, and epochs over them with both experts."""
    if not (folder / "many").exists():
        tiny_clips(folder, "many", number)
    config = run_file(folder, "many", 9, 4096)
    with without_syncing():
        filled(folder, config, StandIn())
    data: list[Dataset] = []
    spent = cpu_seconds(lambda: data.append(filled(folder, config, StandIn())))
    assert data[0].encoded == 0
    yield Row(f"start with {len(data[0].clips)} cached clips, CPU time", spent, " s", 5.0)
    yield from ordering(data[0].clips)
    yield from epochs(loader_of(data[0].clips, data[0].source))


def tiny_clips(folder: Path, name: str, number: int) -> None:
    """`folder`/NAME with `number` videos of 12 frames of 64x64."""
    noise = np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3), dtype=np.uint8)
    write_video(folder / "tiny.mp4", noise, fps=16)
    copies_of(folder / "tiny.mp4", folder / name, number)


def loader_of(clips: Sequence[Clip], source: LatentSource) -> WanDataLoader:
    conditioning = conditioning_of(VARIANTS["t2v-a14b"])
    return WanDataLoader(
        {"high": clips, "low": clips}, source, conditioning, batch_size=1, accumulation=1, seed=1
    )


def alternating(block: int) -> Callable[[int], tuple[ExpertName, int]]:
    """The expert of a step and its own count of steps, where each has `block` in turn."""

    def expert_at(step: int) -> tuple[ExpertName, int]:
        turn, within = divmod(step, block)
        return ("high" if turn % 2 == 0 else "low"), turn // 2 * block + within

    return expert_at


class InMemory:
    """A source whose entries take no time: what is left is the loader itself."""

    workers = 0

    def __init__(self) -> None:
        self._entry = {"latents": torch.zeros(16, 3, 8, 8)}
        self._text = torch.zeros(3, 8)

    def video(self, clip: Clip, given: Given) -> dict[str, Tensor]:
        del clip, given
        return self._entry

    def text(self, caption: str) -> Tensor:
        del caption
        return self._text


def ordering(clips: Sequence[Clip]) -> Iterator[Row]:
    """What the loader itself takes for a step: order, captions and batches, without reading."""
    steps, slowest = 1000, 0.0
    for block in (1, 10, 500):
        loader = loader_of(clips, InMemory())
        batches = loader.steps(0, steps + 1, alternating(block))
        next(batches)  # with the first order
        slowest = max(slowest, cpu_seconds(lambda batches=batches: list(batches)) / steps)
    yield Row("the loader's part of a step, experts changing", slowest * 1000, " ms", 1.0)


def epochs(loader: WanDataLoader) -> Iterator[Row]:
    """Three passes over cached entries with both experts, and steps that wait for them."""
    memory, steps = list[int](), 2 * loader.batches_per_epoch["high"]
    spent = 0.0
    for epoch in range(3):
        batches = loader.steps(epoch * steps, (epoch + 1) * steps, alternating(1))
        spent = cpu_seconds(lambda batches=batches: deque(batches, maxlen=0))
        memory.append(psutil.Process().memory_info().rss)
    # Of the last pass: entries are verified in the first one.
    yield Row("reading a step's entries, CPU time", 1000 * spent / steps, " ms", 5.0)
    growth = (memory[-1] - memory[0]) / 2**20
    yield Row("memory from the first to the third epoch", growth, " MiB", 20.0)

    waited, trained = 0.0, 20
    batches = loader.steps(0, trained + 1, alternating(1))
    next(batches)  # before the first step there is nothing to read beside
    for _ in range(trained):
        time.sleep(STEP_SECONDS)
        waited += seconds(lambda: next(batches))
    share = 100 * waited / (trained * STEP_SECONDS)
    yield Row("waiting for the loader, of steps of 0.5 s", share, " %", 1.0)


def doctor(folder: Path) -> Iterator[Row]:
    """`onewan doctor` over 1,000 files, as a user runs it."""
    if not (folder / "looked_at").exists():
        tiny_clips(folder, "looked_at", 1000)
    run_file(folder, "looked_at", 9, 4096)
    command = [sys.executable, "-m", "onewan", "doctor", str(folder / "looked_at.yaml"), "--json"]
    done: list[subprocess.CompletedProcess[str]] = []
    spent = seconds(lambda: done.append(subprocess.run(command, capture_output=True, text=True)))
    clips = json.loads(done[0].stdout)["data"]["clips"]
    yield Row(f"doctor over {len(clips)} files", spent, " s", 30.0)


def figure_of(rows: Sequence[Row]) -> Figure:
    """All rows, with their limits."""
    return measured_here(
        name="data",
        title="The data path against its limits",
        measured=(
            "Reading, filling the cache, a start, the loader and onewan doctor in one run. Ratios "
            "are medians of pairs that take turns. Reading is of 49 frames of 848x480 from 720p."
        ),
        values=[
            Value(
                case=as_case(measured=row.what),
                measure="value",
                unit=row.unit.strip(),
                repeats=(row.value,),
                limit=row.limit,
                at_least=row.at_least,
            )
            for row in rows
        ],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="The data path of onewan in numbers")
    parser.add_argument("--clips", type=int, default=10_000, help="cached clips (10000)")
    parser.add_argument("--folder", type=Path, help="where clips are kept for the next time")
    parser.add_argument("--repeats", type=int, default=5)
    add_output_options(parser)
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
            doctor(folder),
        ):
            for row in measured:
                print(row, flush=True)
                rows.append(row)
    save(figure_of(rows), options)
    return 0 if all(row.kept for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
