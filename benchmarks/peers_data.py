"""The same files read by onewan and by other trainers' own code, in one run on the CPU.

Takes checkouts of the trainers, and a Python in which they can be imported; those that are not
given are left out. Each reading is a process of its own, and the trainers alternate, so that other
work on the machine slows down all of them. What a reader returned is checked by the number that
every frame shows. Exits with status 1 if onewan returns a wrong frame, or if a trainer takes less
CPU time in a row.

    python benchmarks/peers_data.py [--musubi DIR] [--diffusion-pipe DIR] [--diffsynth DIR]
        [--folder DIR] [--repeats 3] [--memory 10] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

os.environ.setdefault("OMP_NUM_THREADS", "1")

import peers_readers as readers
import torch
from decode import make_clip, numbers_of
from figures import Chart, Figure, Value, add_output_options, as_case, measured_here, save
from peers_readers import FPS, Encoder, Reader, Request
from tables import tables_of

SHORT_RATES = (24, 25, 30, 50, 60)
LONG_SECONDS, LONG_RATE, LONG_INTERVAL = 120, 24, 48
"""The long file's length, rate and frames from one key frame to the next."""
VAE_PIXELS = (1, 3, 9, 128, 80)
NOT_RUN = "not run"
"""Of a trainer without a checkout."""
_T = TypeVar("_T")

TIME_LIMIT = 300.0
"""After so many seconds a reading is stopped."""

HEAD: dict[str, tuple[str | None, Reader]] = {
    "onewan": (None, readers.onewan),
    "bare PyAV loop": (None, readers.bare_pyav),
    "musubi-tuner": ("musubi", partial(readers.musubi, extraction="head", rate_given=False)),
    "musubi-tuner, rate typed in": (
        "musubi",
        partial(readers.musubi, extraction="head", rate_given=True),
    ),
    "diffusion-pipe": ("diffusion_pipe", readers.diffusion_pipe),
    "DiffSynth": ("diffsynth", partial(readers.diffsynth, fixed_rate=False)),
    "DiffSynth, not from its command line": (
        "diffsynth",
        partial(readers.diffsynth, fixed_rate=True),
    ),
}
"""The name of the checkout and the reader, for the beginning of a file."""
MIDDLE: dict[str, tuple[str | None, Reader]] = {
    "onewan": HEAD["onewan"],
    "bare PyAV loop": HEAD["bare PyAV loop"],
    "musubi-tuner, head": HEAD["musubi-tuner, rate typed in"],
    "musubi-tuner, uniform": (
        "musubi",
        partial(readers.musubi, extraction="uniform", rate_given=True),
    ),
    "diffusion-pipe": HEAD["diffusion-pipe"],
    "DiffSynth, head": HEAD["DiffSynth, not from its command line"],
}
"""The same for the middle; "head" is what reads the beginning of a file only."""
VAES: dict[str, tuple[str | None, Callable[[torch.dtype], Encoder]]] = {
    "onewan": (None, readers.onewan_vae),
    "musubi-tuner": ("musubi", readers.musubi_vae),
    "diffusion-pipe": ("diffusion_pipe", readers.diffusion_pipe_vae),
    "DiffSynth": ("diffsynth", readers.diffsynth_vae),
}
ROWS: dict[str, tuple[str, int, tuple[int, int]]] = {
    "17 frames from five short clips": ("short", 17, (416, 240)),
    "17 frames from the middle of two minutes": ("long", 17, (848, 480)),
    "81 frames from the middle of two minutes": ("long", 81, (848, 480)),
}
"""The folder, the number of frames and the size."""
VAE_ROWS = {
    "VAE in float32, for 10,000 pixels": torch.float32,
    "VAE in bfloat16, for 10,000 pixels": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class Measured:
    cpu: float
    """CPU time of all threads and processes, s."""
    seconds: float
    right: int = 0
    """Frames that are 1/16 s apart, to half a frame of the source."""
    frames: int = 0
    first: float = 0.0
    """The time of the last file's first frame, s."""


def readers_of(row: str) -> Sequence[str]:
    if row in VAE_ROWS:
        return tuple(VAES)
    return tuple(HEAD if ROWS[row][0] == "short" else MIDDLE)


def checkout_of(row: str, name: str) -> str | None:
    table = VAES if row in VAE_ROWS else HEAD if ROWS[row][0] == "short" else MIDDLE
    return table[name][0]


# --- In the process of a reader ------------------------------------------------------------------


def measure(row: str, name: str, folder: Path) -> Measured:
    if row in VAE_ROWS:
        encode = VAES[name][1](VAE_ROWS[row])
        pixels = torch.rand(VAE_PIXELS) * 2 - 1
        with torch.no_grad():
            cpu, seconds, _ = timed(partial(encode, pixels))
        unit = pixels[0, 0].numel() / 10_000
        return Measured(cpu / unit, seconds / unit)
    kind, frames, size = ROWS[row]
    read = (HEAD if kind == "short" else MIDDLE)[name][1]
    place: readers.Place = "head" if kind == "short" else "middle"
    # Once for whatever libraries do at their first use.
    warm = folder / "short" / "24" / "clip.mp4"
    read(Request(warm, 5, "head", (64, 48), 24))
    cpu = seconds = first = 0.0
    right = 0
    paths = sorted((folder / kind).glob("*/clip.mp4"))
    for path in paths:
        rate = float(path.parent.name)
        more_cpu, more, pixels = timed(partial(read, Request(path, frames, place, size, rate)))
        cpu, seconds = cpu + more_cpu, seconds + more
        numbers = numbers_of(pixels)
        right += right_frames(numbers, rate)
        first = numbers[0] / rate
    return Measured(cpu, seconds, right, frames * len(paths), first)


def timed(work: Callable[[], _T]) -> tuple[float, float, _T]:
    """CPU time and time of some work in seconds, and its result."""
    before, begin = os.times(), time.perf_counter()
    result = work()
    seconds, after = time.perf_counter() - begin, os.times()
    # With that of processes that it has started, as DiffSynth does for FFmpeg; Windows has no sums.
    return sum(after[:4]) - sum(before[:4]), seconds, result


def right_frames(numbers: Sequence[int], rate: float) -> int:
    """How many frames of a source of `rate` are nearest to instants 1/16 s apart.

    The first frame stands for any instant that it is nearest to; the best one is taken.
    """
    return max(
        sum(
            abs(number - numbers[0] - shift - k * rate / FPS) <= 0.5 + 1e-6
            for k, number in enumerate(numbers)
        )
        for shift in (step / 20 for step in range(-10, 11))
    )


def one(row: str, name: str, folder: Path, memory: float) -> None:
    with suppress(ImportError):  # Windows has no such limit
        import resource

        limit = round(memory * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    # Libraries print to the standard output; the last line is the result.
    print("\n" + json.dumps(asdict(measure(row, name, folder))))


# --- The table -----------------------------------------------------------------------------------


def in_a_process(row: str, name: str, checkout: Path | None, options: argparse.Namespace) -> object:
    """`Measured`, or why there is none."""
    path = [] if checkout is None else [checkout / "src", checkout]
    path += [Path(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    command = [sys.executable, __file__, "--one", row, name, "--folder", str(options.folder)]
    try:
        done = subprocess.run(
            [*command, "--memory", str(options.memory)],
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))},
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {TIME_LIMIT:.0f} s"
    if done.returncode == 0:
        return Measured(**json.loads(done.stdout.splitlines()[-1]))
    error = (done.stderr.strip().splitlines() or ["killed"])[-1]
    if "emory" in error or done.returncode < 0:
        return f"more than {options.memory:g} GiB, stopped"
    return f"failed: {error}"


def results_of(results: Sequence[object]) -> Sequence[Measured] | str:
    """All readings; why there is none, if one has failed."""
    measured = [result for result in results if isinstance(result, Measured)]
    if measured and len(measured) == len(results):
        return measured
    return next((str(r) for r in results if not isinstance(r, Measured)), NOT_RUN)


def make_clips(folder: Path, rows: Collection[str]) -> None:
    """The files of `rows`, where they are not there yet."""
    kinds = {ROWS[row][0] for row in rows if row in ROWS}
    # A reading begins with a short clip, for whatever libraries do at their first use.
    for rate in SHORT_RATES if kinds else ():
        path = folder / "short" / str(rate) / "clip.mp4"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            make_clip(path, 3, rate, fps=rate, size=(1280, 720), numbered=True)
    path = folder / "long" / str(LONG_RATE) / "clip.mp4"
    if "long" in kinds and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        make_clip(path, LONG_SECONDS, LONG_INTERVAL, fps=LONG_RATE, numbered=True)
    for path in folder.glob("*/*/clip.mp4"):
        path.with_suffix(".txt").write_text("a caption", encoding="utf-8")


Results = Mapping[str, Sequence[Measured] | str]
"""Of each reader of a row, or why there are none."""


def figure_of(table: Mapping[str, Results]) -> Figure:
    """The results, relative to onewan's CPU time."""
    values: list[Value] = []
    for row, results in table.items():
        ours = results["onewan"]
        base = None if isinstance(ours, str) else median(m.cpu for m in ours)
        for name, found in results.items():
            case = as_case(what=row, read_by=name)
            if isinstance(found, str):
                values.append(Value(case=case, measure="CPU time", unit="s", reason=found))
                continue
            cpu = [m.cpu for m in found]
            values.append(
                Value(
                    case=case, measure="CPU time", unit="s", repeats=tuple(cpu), baseline="onewan",
                    ratio=median(cpu) / base if base and name != "onewan" else None,
                )
            )  # fmt: skip
            times = tuple(m.seconds for m in found)
            values.append(Value(case=case, measure="time", unit="s", repeats=times))
            if frames := found[0].frames:
                right, first = median(m.right for m in found), median(m.first for m in found)
                values.append(
                    Value(case=case, measure="right frames", repeats=(right,), expected=frames)
                )
                values.append(Value(case=case, measure="from", unit="s", repeats=(first,)))
    return measured_here(
        name="peers",
        title="The same files read by onewan and by other trainers' own code",
        measured=(
            "Each reading is a process of its own, in which other trainers' code runs from their "
            "checkouts as it is. Five short clips have 24, 25, 30, 50 and 60 frames per second at "
            "720p, and the long file has two minutes of 720p at 24; 16 frames per second are read, "
            "and each frame is checked by the number that it shows. The VAE has random weights. "
            "Trainers whose code was not there are given as not run."
        ),
        values=values,
        charts=[
            Chart(
                measure="CPU time", series="read by", only={"what": row}, title=f"CPU time: {row}"
            )
            for row, results in table.items()
            if any(not isinstance(found, str) for found in results.values())
        ],
        arithmetic="of",
    )


def misses(table: Mapping[str, Results]) -> list[str]:
    """Where onewan returns a wrong frame, or another trainer takes less CPU time."""
    found = list[str]()
    for row, results in table.items():
        ours = results["onewan"]
        if isinstance(ours, str) or any(m.right < m.frames for m in ours):
            found.append(f"{row}: onewan has {ours}")
            continue
        cpu = median(m.cpu for m in ours)
        found += [
            f"{row}: {name} takes less CPU time"
            for name, others in results.items()
            if name != "bare PyAV loop"
            and not isinstance(others, str)
            and median(m.cpu for m in others) < cpu
        ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Reading beside other trainers' own code")
    parser.add_argument("--musubi", type=Path, help="a checkout of kohya-ss/musubi-tuner")
    parser.add_argument("--diffusion-pipe", type=Path, help="of tdrussell/diffusion-pipe")
    parser.add_argument("--diffsynth", type=Path, help="of modelscope/DiffSynth-Studio")
    parser.add_argument("--folder", type=Path, help="where clips are kept for the next time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=float, default=10, help="of a process, in GiB (10)")
    parser.add_argument("--rows", nargs="+", help="only rows that contain one of these texts")
    add_output_options(parser)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # row and name of one reading
    options = parser.parse_args()
    if options.one:
        row, name = options.one
        one(row, name, options.folder, options.memory)
        return 0
    checkouts = {
        "musubi": options.musubi,
        "diffusion_pipe": options.diffusion_pipe,
        "diffsynth": options.diffsynth,
    }
    table: dict[str, Results] = {}
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = (options.folder or Path(temporary)).resolve()
        rows = [
            row
            for row in (*ROWS, *VAE_ROWS)
            if not options.rows or any(text in row for text in options.rows)
        ]
        make_clips(options.folder, rows)
        for row in rows:
            needed = {name: checkout_of(row, name) for name in readers_of(row)}
            results: dict[str, list[object]] = {
                name: [] for name, key in needed.items() if key is None or checkouts[key]
            }
            for _ in range(options.repeats):
                for name, so_far in results.items():
                    if so_far and not isinstance(so_far[-1], Measured):
                        continue  # it fails or takes too long
                    checkout = checkouts.get(needed[name] or "")
                    so_far.append(in_a_process(row, name, checkout, options))
            table[row] = {name: results_of(results.get(name, ())) for name in needed}
            print(f"{row}: measured", file=sys.stderr, flush=True)
    figure, missed = figure_of(table), misses(table)
    tables = [table.markdown() for table in tables_of(figure)]
    print("\n".join([*tables, "", *missed]))
    save(figure, options)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
