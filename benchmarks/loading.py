"""Host memory and time that loading a transformer takes, beside the size of its file (Linux).

    python benchmarks/loading.py [--gigabytes 1] [--folder DIR] [--json FILE]

Writes random weights of about that size as bfloat16, float32 and fp8 with scales, loads each in a
process of its own with every `memory.weights`, and deletes them. Prints a JSON line for each:

- `file` and `kept`: bytes of the file, and of the tensors of the loaded module;
- `peak`: the highest resident memory above that before loading. Pages of the mapped file count, but
  the system may drop them when memory is short;
- `peak_of_own`: the same without pages of the file (anonymous memory, sampled every 5 ms);
- `seconds`, with the file in the page cache.

All in GB (10^9 bytes). Without a second copy `peak_of_own` is `kept` and at most one matrix more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from figures import Chart, Figure, Value, add_output_options, as_case, measured_here, save
from safetensors.torch import save_file
from torch import Tensor

from onewan.formats.key_maps import to_official
from onewan.model.load import WanModelLoader
from onewan.model.meta_init import transformer_on_meta

_CASES: tuple[tuple[str, str], ...] = (
    ("bfloat16", "as_stored"),
    ("bfloat16", "fp8"),
    ("bfloat16", "int8"),
    ("bfloat16", "nf4"),
    ("float32", "bf16"),
    ("float32", "nf4"),
    ("fp8", "as_stored"),
    ("fp8", "bf16"),
    ("fp8", "nf4"),
)

MEASURES = (
    ("file", "size of the file", "GB"),
    ("kept", "kept", "GB"),
    ("peak", "peak", "GB"),
    ("peak_of_own", "own peak", "GB"),
    ("seconds", "time", "s"),
)
"""Keys of `measured`, and what a figure calls them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the file in bfloat16")
    parser.add_argument("--folder", type=Path, help="where the files are written (default: /tmp)")
    add_output_options(parser)
    parser.add_argument("--load", nargs=2, metavar=("FILE", "STORAGE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(measured(Path(options.load[0]), options.load[1])))
        return
    values: list[Value] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        previous = ""
        for source, storage in _CASES:
            file = Path(folder) / f"{source}.safetensors"
            if source != previous:
                (Path(folder) / f"{previous}.safetensors").unlink(missing_ok=True)
                write(file, source, options.gigabytes)
            previous = source
            command = [sys.executable, __file__, "--load", str(file), storage]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout)
            print(json.dumps({"source": source, "weights": storage, **found}))
            case = as_case(file=source, weights=storage)
            values += [
                Value(case=case, measure=measure, unit=unit, repeats=(found[key],))
                for key, measure, unit in MEASURES
            ]
    save(figure_of(values), options)


def figure_of(values: Sequence[Value]) -> Figure:
    return measured_here(
        name="loading",
        title="Host memory and time of loading a transformer",
        measured=(
            "Random weights of about 1 GB in bfloat16, unless the command says otherwise, loaded "
            "in a process of its own with every memory.weights, with the file in the page cache. "
            "The peak counts pages of the mapped file, which the system may drop when memory is "
            "short; the own peak does not."
        ),
        values=values,
        charts=[Chart(measure="own peak"), Chart(measure="time")],
    )


def write(path: Path, source: str, gigabytes: float) -> None:
    """Random weights of a transformer of T2V-A14B's kind, of width 1536."""
    of_block = 2 * (8 * 1536**2 + 2 * 1536 * 8960)
    module = transformer_on_meta(
        {
            "num_attention_heads": 12,
            "attention_head_dim": 128,
            "ffn_dim": 8960,
            "num_layers": max(1, round(gigabytes * 1e9 / of_block)),
        }
    )
    assert isinstance(module, WanTransformer3DModel)
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        key = to_official(name)
        values = torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(
            std=0.02, generator=generator
        )
        if source == "fp8" and name.startswith("blocks.") and values.ndim == 2:
            scale = values.abs().max().float() / 448
            weights[key] = (values / scale).to(torch.float8_e4m3fn)
            weights[key.removesuffix("weight") + "scale_weight"] = scale
        else:
            weights[key] = values.float() if source == "float32" else values
    if source == "fp8":
        weights["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(weights, path)


def measured(file: Path, storage: str) -> Mapping[str, float]:
    """What loading `file` takes in this process."""
    own = Sampler("RssAnon")
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    with own:
        start = time.perf_counter()
        model = WanModelLoader().load(
            {"transformer": file},
            dtype=torch.bfloat16,
            components=("transformer",),
            weights=storage,  # pyright: ignore[reportArgumentType]
        )
        seconds = time.perf_counter() - start
    peak = status("VmHWM") - before
    assert model.transformer is not None
    tensors = (*model.transformer.parameters(), *model.transformer.buffers())
    sizes = {
        "file": file.stat().st_size,
        "kept": sum(tensor.nbytes for tensor in tensors),
        "peak": peak,
        "peak_of_own": own.highest - own.first,
    }
    return {**{n: round(size / 1e9, 3) for n, size in sizes.items()}, "seconds": round(seconds, 1)}


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


class Sampler:
    """Samples a field of /proc/self/status in a thread while a block runs."""

    def __init__(self, field: str) -> None:
        self._field = field
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.first = self.highest = status(field)

    def _run(self) -> None:
        while not self._stop.wait(0.005):
            self.highest = max(self.highest, status(self._field))

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


if __name__ == "__main__":
    main()
