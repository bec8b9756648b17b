"""Time that filling a cache takes with one process and with two, each on a core of its own (Linux).

    python benchmarks/parallel_caching.py [--clips 200] [--size 9x80x96] [--repeats 3] [--json FILE]

Writes that many clips, and the demonstration's model; encodes them with one process, and with two
that torchrun starts, each time into an empty cache; and compares the caches, which have to be
equal file by file, with each entry encoded once.

- "time": from the search for clips to the last entry, by the clock on the wall. Importing PyTorch,
  which takes seconds, and starting torchrun are not in it;
- "busiest process": the time that the processor worked for the process that worked most, which
  other work on the machine does not make longer;
- "speed": of two processes relative to one, by both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from figures import Chart, Value, add_output_options, as_case, measured_here, save
from measuring import Size, parse_size
from torch import Tensor

from onewan.config.load import dump_run, load_run
from onewan.data.cache import EntryKind
from onewan.data.encode import no_progress
from onewan.data.filling import CacheFiller
from onewan.demo import prepare_demo
from onewan.devices import HOST
from onewan.media import write_video
from onewan.parallel.ranks import join
from onewan.train.setup import WanModelSetup

PROCESSES = (1, 2)
LIMIT = 1.7
"""How many times as fast two processes should be."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument(
        "--size", type=parse_size, default=(9, 80, 96), help="frames, height and width of a clip"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fill", nargs=2, metavar=("RUN", "RESULTS"), help=argparse.SUPPRESS)
    add_output_options(parser)
    options = parser.parse_args(arguments)
    if options.fill:
        run, results = map(Path, options.fill)
        fill(run, results)
        return 0
    with tempfile.TemporaryDirectory() as name:
        values = list(measured(Path(name), options.clips, options.size, options.repeats))
    size = "x".join(map(str, options.size))
    figure = measured_here(
        name="parallel_caching",
        title=f"Filling a cache of {options.clips} clips with several processes",
        measured=(
            f"Clips of {size}, the demonstration's model, a core for each "
            "process; the caches are equal, and each entry was encoded once."
        ),
        values=values,
        charts=[Chart(measure="time")],
    )
    save(figure, options)
    return 1 if figure.missed() else 0


def measured(folder: Path, clips: int, size: Size, repeats: int) -> Iterator[Value]:
    """The values of the figure."""
    run = made(folder, clips, size)
    found: dict[int, list[list[Mapping[str, Any]]]] = {count: [] for count in PROCESSES}
    for repeat in range(repeats):
        for count in PROCESSES:
            found[count].append(filled(run, folder / f"results-{repeat}-{count}", count))
            (run.parent / "cache").rename(folder / f"cache-{count}")
        compare(folder / "cache-1", folder / "cache-2", [found[c][-1] for c in PROCESSES])
        for count in PROCESSES:
            shutil.rmtree(folder / f"cache-{count}")

    def times(count: int, key: str) -> list[float]:
        return [max(process[key] for process in processes) for processes in found[count]]

    for measure, key in (("time", "wall"), ("busiest process", "cpu")):
        one, several = (times(count, key) for count in PROCESSES)
        for count, seconds in zip(PROCESSES, (one, several), strict=True):
            yield Value(
                case=as_case(processes=count), measure=measure, unit="s", repeats=tuple(seconds)
            )
        speeds = tuple(alone / shared for alone, shared in zip(one, several, strict=True))
        yield Value(
            case=as_case(processes=PROCESSES[-1]),
            measure=f"speed by {measure}",
            repeats=speeds,
            limit=LIMIT,
            at_least=True,
        )


def made(folder: Path, clips: int, size: Size) -> Path:
    """The run file of a data set of so many clips, each of `size`."""
    prepare_demo(folder, "t2v-a14b", lambda _: None)
    videos = folder / "videos"
    videos.mkdir()
    draw = np.random.default_rng(0)
    frames, height, width = size
    for number in range(clips):
        # Noise in large squares: as many details as a film has, where single pixels have too many.
        noise = draw.integers(0, 256, (frames, height // 16, width // 16, 3), np.uint8)
        write_video(videos / f"{number:03}.mp4", noise.repeat(16, 1).repeat(16, 2), fps=16)
        (videos / f"{number:03}.txt").write_text(f"number {number}", encoding="utf-8")
    run = folder / "run.yaml"
    overrides = [
        f"video_data.resolution=[{width}x{height}]",
        f"wan_config.max_frames={frames}",
        f"video_data.sources=[{{path: {videos.as_posix()}}}]",
        # Decoding in threads would need cores of its own.
        "video_data.workers=0",
        "sample.prompts=[]",
    ]
    resolved = load_run(run, overrides)
    run.write_text(dump_run(resolved), encoding="utf-8")
    return run


def filled(run: Path, results: Path, processes: int) -> list[Mapping[str, Any]]:
    """What each of so many processes says of filling the cache of `run`."""
    results.mkdir()
    own = [__file__, "--fill", str(run), str(results)]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [sys.executable, *(torchrun if processes > 1 else []), *own]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=run.parent
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(results.iterdir())]


def fill(run: Path, results: Path) -> None:
    """Fill the cache of `run` in this process, which may be one of several; writes what it took,
    and the entries that it has made."""
    rank = int(os.environ.get("RANK", "0"))
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    config, made_here = load_run(run), list[str]()
    save = CacheFiller.save

    def noted(
        self: CacheFiller, kind: EntryKind, key: str, tensors: Mapping[str, Tensor], about: str
    ) -> None:
        made_here.append(f"{kind} {key}")
        save(self, kind, key, tensors, about)

    CacheFiller.save = noted
    with join(HOST, 600) as ranks:
        setup = WanModelSetup(config, ranks=ranks)
        ranks.gathered(None)  # all begin at the same time
        wall, cpu = time.perf_counter(), time.process_time()
        data = setup.dataset([], no_progress)
        taken = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    found = {**taken, "entries": made_here, "encoded": data.encoded, "clips": len(data.clips)}
    (results / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def compare(one: Path, other: Path, filled_by: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """RuntimeError unless two caches have the same files, and each entry was made once."""
    first, second = (
        {path.relative_to(cache): path for path in cache.rglob("*.safetensors")}
        for cache in (one, other)
    )
    if first.keys() != second.keys():
        raise RuntimeError(f"the caches differ in {first.keys() ^ second.keys()}")
    if different := [p for p in first if first[p].read_bytes() != second[p].read_bytes()]:
        raise RuntimeError(f"the caches differ in the content of {different}")
    for processes in filled_by:
        entries = [entry for process in processes for entry in process["entries"]]
        expected = {f"{p.parts[0]} {p.stem}" for p in first if p.parts[0] != "preview"}
        if sorted(entries) != sorted(expected):
            raise RuntimeError("an entry was made twice, or not at all")
        if any(process["encoded"] != len(expected) for process in processes):
            raise RuntimeError("the processes count other entries than those that they made")


if __name__ == "__main__":
    sys.exit(main())
