"""Time to read 17 frames at 16 fps from the middle of a video, compared with a bare PyAV loop.

Makes clips of several lengths and key frame intervals, reads the same span alternately with
`onewan.media.read_frames` and with the shortest correct loop over PyAV, and prints the medians.
Exits with 1 if reading takes more than 1.2 times as long as the bare loop, or if memory grows with
the length of the clip. Each clip is measured in its own process, which gives its peak memory.

    python benchmarks/decode.py [--folder DIR] [--json FILE] [--repeats 15]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
from figures import Chart, Figure, Value, add_output_options, measured_here, save

from onewan.media import probe, read_frames

FRAMES, FPS, SOURCE_FPS, SIZE = 17, 16, 24, (1280, 720)
LIMIT = 1.2
# The resident memory of a process varies by this much from run to run, with the decoder's buffers.
MEMORY_SLACK_MIB = 32


def make_clip(
    path: Path,
    seconds: int,
    gop: int,
    *,
    fps: int = SOURCE_FPS,
    size: tuple[int, int] = SIZE,
    numbered: bool = False,
) -> None:
    """A moving texture with grain, which takes a decoder about as long as real footage.

    With `numbered`, each frame shows its number, see `numbers_of`.
    """
    width, height = size
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (height // 8 + 1, width // 4 + 1), np.uint8)
    texture = np.kron(coarse, np.ones((8, 8), np.uint8))
    partial = path.with_suffix(".partial.mp4")
    with av.open(str(partial), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream(
            "libx264",
            rate=fps,
            options={"crf": "23", "preset": "veryfast", "x264-params": f"keyint={gop}:scenecut=0"},
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(seconds * fps):
            left = number * 3 % width
            luma = texture[:height, left : left + width] // 2 + np.uint8(60)
            luma[::3, number % 7 :: 7] += np.uint8(rng.integers(0, 40))
            if numbered:
                for bit, (rows, columns) in enumerate(_bits(height, width)):
                    luma[rows, columns] = 200 if number >> bit & 1 else 40
            chroma = np.full((height // 2, width), 90 + number % 60, np.uint8)
            frame = av.VideoFrame.from_ndarray(np.concatenate([luma, chroma]), format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    os.replace(partial, path)


def _bits(height: int, width: int) -> list[tuple[slice, slice]]:
    """Where a frame of this size shows each bit of its number, the lowest first."""
    rows = slice(height // 3, 2 * height // 3)
    return [
        (rows, slice(width * column // 16, width * (column + 1) // 16)) for column in range(2, 14)
    ]


def numbers_of(frames: np.ndarray) -> list[int]:
    """The numbers that frames of `make_clip`, uint8 [F, H, W, 3], show, scaled or not."""
    bits = _bits(*frames.shape[1:3])
    return [
        sum(
            int(frame[rows, columns].mean() > 120) << bit
            for bit, (rows, columns) in enumerate(bits)
        )
        for frame in frames
    ]


def bare(
    path: Path, times: Sequence[float], rgb: Callable[[av.VideoFrame], np.ndarray] | None = None
) -> np.ndarray:
    """The shortest correct loop: seek, decode the span, select by timestamp, convert to RGB.

    `rgb` converts a frame, by default at its own size.
    """
    rgb = rgb or (lambda frame: frame.to_ndarray(format="rgb24"))
    chosen: list[np.ndarray] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        container.seek(round(times[0] / stream.time_base), stream=stream)
        previous = None
        for frame in container.decode(stream):
            while len(chosen) < len(times) and frame.time >= times[len(chosen)]:
                wanted = times[len(chosen)]
                nearer = frame
                if previous is not None and wanted - previous.time <= frame.time - wanted:
                    nearer = previous
                chosen.append(rgb(nearer))
            if len(chosen) == len(times):
                break
            previous = frame
    return np.stack(chosen)


def peak_mib() -> float | None:
    """Peak resident memory of this process in MiB; None if the system does not report it."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where getrusage includes the peak of the parent process
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def measure(path: Path, repeats: int) -> dict[str, Any]:
    """Times of both readers, alternating, and the growth of peak memory by one reading."""
    info = probe(path)
    middle = (info.start + info.last) / 2
    times = [middle + k / FPS for k in range(FRAMES)]
    before = peak_mib()
    read_frames(path, times)
    after = peak_mib()
    reference = bare(path, times).astype(np.int16)
    difference = float(np.abs(read_frames(path, times) - reference).mean())
    seconds: dict[str, list[float]] = {"onewan": [], "bare": []}
    readers = [("onewan", read_frames), ("bare", bare)]
    for _ in range(repeats):
        readers.reverse()
        for name, reader in readers:
            begin = time.perf_counter()
            reader(path, times)
            seconds[name].append(time.perf_counter() - begin)
    probes = []
    for _ in range(repeats):
        begin = time.perf_counter()
        probe(path)
        probes.append(time.perf_counter() - begin)
    # The median of the ratios, not the ratio of the medians: other work on the machine slows down
    # both readings of a pair.
    ratios = [
        ours / theirs for ours, theirs in zip(seconds["onewan"], seconds["bare"], strict=True)
    ]
    return {
        "clip": path.stem,
        "onewan_s": seconds["onewan"],
        "bare_s": seconds["bare"],
        "ratio": median(ratios),
        "probe_s": probes,
        "mean_difference": difference,
        "memory_mib": None if before is None or after is None else after - before,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Decoding speed and memory of onewan.media")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the clips are made and kept (default: a temporary folder)",
    )
    add_output_options(parser)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=int, nargs="+", default=[10, 60, 180])
    parser.add_argument("--gops", type=int, nargs="+", default=[250, 30])
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # measures a single clip
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.repeats)))
        return 0

    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        results: list[dict[str, Any]] = []
        print(f"{'clip':>16} {'onewan s':>9} {'bare s':>9} {'ratio':>6} {'probe s':>8} {'MiB':>7}")
        for gop in args.gops:
            for seconds in args.seconds:
                path = folder / f"gop{gop}_{seconds}s.mp4"
                if not path.exists():
                    make_clip(path, seconds, gop)
                command = [sys.executable, __file__, "--one", str(path)]
                command += ["--repeats", str(args.repeats)]
                row = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
                results.append(row)
                memory = "-" if row["memory_mib"] is None else f"{row['memory_mib']:.0f}"
                print(
                    f"{row['clip']:>16} {median(row['onewan_s']):9.3f} "
                    f"{median(row['bare_s']):9.3f} {row['ratio']:6.2f} "
                    f"{median(row['probe_s']):8.4f} {memory:>7}"
                )
    save(figure_of(results), args)
    return report(results)


def figure_of(results: list[dict[str, Any]]) -> Figure:
    """Both readers' times, and the memory of onewan's."""
    values: list[Value] = []
    for row in results:
        for key, name in (("onewan_s", "onewan"), ("bare_s", "bare PyAV loop")):
            values.append(
                Value(
                    case={"clip": row["clip"], "read by": name},
                    measure="time",
                    unit="s",
                    repeats=tuple(row[key]),
                )
            )
        case = {"clip": row["clip"], "read by": "onewan"}
        values.append(
            Value(case=case, measure="time / bare loop's", repeats=(row["ratio"],), limit=LIMIT)
        )
        values.append(
            Value(case=case, measure="header alone", unit="s", repeats=tuple(row["probe_s"]))
        )
        if row["memory_mib"] is not None:
            values.append(
                Value(case=case, measure="memory", unit="MiB", repeats=(row["memory_mib"],))
            )
    return measured_here(
        name="decode",
        title=f"Reading {FRAMES} frames from the middle of a video",
        measured=(
            f"{FRAMES} frames at {FPS} per second of 720p from files of several lengths and "
            "intervals between key frames (gop), by onewan and by the shortest correct loop over "
            "PyAV, in turns. Memory is by how much one reading raises the peak of a process."
        ),
        values=values,
        charts=[Chart(measure="time", series="read by")],
    )


def report(results: list[dict[str, Any]]) -> int:
    """Prints the verdict; returns the exit status."""
    worst = max(float(r["ratio"]) for r in results)
    memory = [float(r["memory_mib"]) for r in results if r["memory_mib"] is not None]
    growth = max(memory) - min(memory) if memory else 0.0
    passed = worst <= LIMIT and growth <= MEMORY_SLACK_MIB
    print(f"worst ratio {worst:.2f} (limit {LIMIT}), memory differs by {growth:.0f} MiB")
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
