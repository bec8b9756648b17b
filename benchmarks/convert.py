"""Measures the peak memory and the time of converting a large file.

Writes a single file of the T2V-A14B architecture with its full width, random bfloat16 weights and
as many blocks as fit into 3 GB, and converts it to each layout in a fresh process. The memory is
the peak of resident memory (mapped pages of files included), and of its anonymous part, above that
of the process with PyTorch and diffusers imported. Also times `onewan inspect` on the file.
Exits with status 1 if a peak is above 1 GB or `inspect` takes more than 2 s.

    python benchmarks/convert.py [--gigabytes 3] [--dir DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from figures import Chart, Figure, Value, add_output_options, as_case, measured_here, save

from onewan.formats.key_maps import to_official
from onewan.formats.modelspec import model_spec
from onewan.formats.write import LazyTensor, write_safetensors
from onewan.variants import VARIANTS

MEMORY_LIMIT = 1e9
"""Bytes above those of the interpreter with torch and diffusers."""
INSPECT_LIMIT = 2.0
"""Seconds, the start of Python included."""
JOBS = {
    "diffusers": ("diffusers", None),
    "fp8_scaled": ("fp8_scaled.safetensors", None),
    "official": ("official", None),
    "float32": ("float32.safetensors", torch.float32),
}


def architecture(blocks: int) -> dict[str, tuple[int, ...]]:
    """Shapes of T2V-A14B with `blocks` blocks, by official keys."""
    variant = VARIANTS["t2v-a14b"]
    with init_empty_weights():
        model = WanTransformer3DModel(
            num_attention_heads=variant.num_attention_heads,
            attention_head_dim=variant.attention_head_dim,
            in_channels=variant.in_channels,
            out_channels=variant.latent_channels,
            ffn_dim=variant.ffn_dim,
            num_layers=blocks,
        )
    return {to_official(name): tuple(p.shape) for name, p in model.named_parameters()}


def write_source(path: Path, gigabytes: float) -> tuple[int, int]:
    """Write a file of about `gigabytes`; returns (bytes, blocks)."""

    def size(blocks: int) -> int:
        return sum(2 * torch.Size(shape).numel() for shape in architecture(blocks).values())

    blocks = max(1, round((gigabytes * 1e9 - size(1)) / (size(2) - size(1))) + 1)
    generator = torch.Generator().manual_seed(0)

    def weight(shape: tuple[int, ...]) -> torch.Tensor:
        # Repeats a million random values, since generating 3 GB of them would dominate the time.
        count = torch.Size(shape).numel()
        values = torch.randn(min(count, 1 << 20), generator=generator) * 0.02
        return values.bfloat16().repeat(-(-count // len(values)))[:count].reshape(shape)

    tensors = {
        name: LazyTensor(shape, torch.bfloat16, lambda shape=shape: weight(shape))
        for name, shape in architecture(blocks).items()
    }
    write_safetensors(path, tensors, model_spec("wan_2_2", datetime.now(timezone.utc)))
    return path.stat().st_size, blocks


def memory() -> tuple[int, int]:
    """(resident, anonymous) bytes of this process; the second is 0 where the system does not report
    it."""
    status = Path("/proc/self/status")
    if not status.exists():
        import psutil

        return psutil.Process().memory_info().rss, 0
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return tuple(int(fields[f].split()[0]) * 1024 for f in ("VmRSS", "RssAnon"))  # pyright: ignore[reportReturnType]


def convert_once(source: Path, folder: Path, job: str) -> dict[str, float]:
    """Convert once in this process, which must be a fresh one, and sample its memory."""
    from onewan.checkpoint.convert import convert_model

    start = memory()
    peak = list(start)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[:] = map(max, peak, memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    name, dtype = JOBS[job]
    begin = time.perf_counter()
    to = "single" if job == "float32" else job
    convert_model(source, folder / name, to, dtype=dtype)  # pyright: ignore[reportArgumentType]
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    return {
        "seconds": seconds,
        "before": start[0],
        "peak_above": peak[0] - start[0],
        "anonymous_above": peak[1] - start[1],
    }


def run_job(source: Path, folder: Path, job: str) -> dict[str, float]:
    """`convert_once` in a fresh process, since freed memory does not all return to the system."""
    command = [
        sys.executable,
        __file__,
        "--job",
        job,
        "--dir",
        str(folder),
        "--source",
        str(source),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def inspect_seconds(source: Path) -> list[float] | None:
    """Times of three calls of ``onewan inspect``; None if it fails."""
    times: list[float] = []
    for _ in range(3):
        begin = time.perf_counter()
        call = [sys.executable, "-m", "onewan", "inspect", str(source), "--json"]
        result = subprocess.run(call, capture_output=True, check=False)
        if result.returncode:
            return None
        times.append(time.perf_counter() - begin)
    return times


def figure_of(
    results: dict[str, dict[str, float]], size: int, inspected: list[float] | None
) -> Figure:
    """Memory and time of each conversion, and the time of ``onewan inspect``."""
    values: list[Value] = []
    for job, found in results.items():
        case = as_case(what=f"convert to {job}")
        seconds, peak = found["seconds"], found["peak_above"]
        values += [
            Value(case=case, measure="time", unit="s", repeats=(seconds,)),
            Value(
                case=case, measure="peak of memory", unit="GB", repeats=(peak / 1e9,),
                limit=MEMORY_LIMIT / 1e9,
            ),
            Value(
                case=case, measure="of it anonymous", unit="GB",
                repeats=(found["anonymous_above"] / 1e9,),
            ),
        ]  # fmt: skip
    case = as_case(what="onewan inspect")
    if inspected is None:
        values.append(Value(case=case, measure="time", unit="s", reason="failed"))
    else:
        values.append(Value(case=case, measure="time", unit="s", repeats=tuple(inspected)))
    return measured_here(
        name="convert",
        title=f"Converting a file of {size / 1e9:.1f} GB",
        measured=(
            "One transformer of T2V-A14B's width in bfloat16, converted to each layout in a "
            "process of its own. Memory is above that of Python with PyTorch and diffusers; pages "
            "of mapped files count, but for the anonymous part."
        ),
        values=values,
        charts=[Chart(measure="peak of memory")],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3.0, help="of the file to convert")
    parser.add_argument("--dir", type=Path, help="where to write (default: a temporary folder)")
    add_output_options(parser)
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(convert_once(options.source, options.dir, options.job)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        source = folder / "wan2.2_t2v_high_noise.safetensors"
        size, blocks = write_source(source, options.gigabytes)
        print(f"{size / 1e9:.2f} GB, {blocks} blocks, bfloat16")
        results: dict[str, Any] = {}
        for job, (target, _) in JOBS.items():
            result = results[job] = run_job(source, folder, job)
            print(
                f"{job:10}  {result['seconds']:6.1f} s, peak {result['peak_above'] / 1e6:5.0f} MB "
                f"above {result['before'] / 1e6:.0f} MB, {result['anonymous_above'] / 1e6:.0f} MB "
                f"of it anonymous (limit {MEMORY_LIMIT / 1e6:.0f} MB)"
            )
            written = folder / target
            shutil.rmtree(written) if written.is_dir() else written.unlink()
        inspected = inspect_seconds(source)
    shown = "failed" if inspected is None else f"{min(inspected):.2f} s"
    print(f"inspect     {shown} (limit {INSPECT_LIMIT:.0f} s)")
    save(figure_of(results, size, inspected), options)
    worst = max(result["peak_above"] for result in results.values())
    return int(worst > MEMORY_LIMIT or min(inspected or [0]) > INSPECT_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
