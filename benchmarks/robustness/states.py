"""Resumes runs from damaged and hostile training states with ``onewan train --resume``.

Each case starts from a run of a tiny model with two states (LoRA with a moving average, full
fine-tuning with Kahan summation, or Prodigy) and changes the newer one, sometimes both: its JSON,
its tensors, the structure of its optimizer's state, its bytes, or what kind of file each is. The
manifest is then written anew, so that the change is not found by a digest, or is changed itself.
The command has to end with status 0 (another state was used, or the change makes no difference that
could be found) or 1 (one message).

    python benchmarks/robustness/states.py --count 500 --seconds 30 --out states.json
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import canary, run_cases
from safetensors.torch import load_file, save_file

from onewan.checkpoint.store import MANIFEST
from onewan.cli import main
from onewan.demo.clips import write_clips
from onewan.demo.tiny_model import write_tiny_model
from onewan.files import file_digest
from onewan.runs.layout import RunLayout

_RUN_FILE = """
model: {path: model, variant: ti2v-5b, dtype: float32}
wan_config: {max_frames: 5}
video_data: {sources: [{path: clips}], resolution: 16384}
optimizer: {lr: 0.01}
train: {steps: 4, save_every: 2, keep_last: 2, switch_expert_every: 2}
validation: {clips: 1, every: 2}
logging: {tensorboard: false}
"""
_RUNS = {
    "lora": ["train.ema={}", "train.keep_best=true"],
    "tuned": ["method={kind: fine_tune, weights: kahan}", "model.dtype=bfloat16"],
    "prodigy": ["optimizer={name: prodigy, lr: 1.0}"],
}
_FOLDER = "ONEWAN_STATES_FOLDER"
"""The environment variable that tells the workers where the runs are."""
_STEPS = 5
"""Of the resumed runs: one more step shows whether the state can be trained on."""


def run(arguments: Sequence[str]) -> int:
    return main(["train", arguments[0], "--resume", f"train.steps={_STEPS}"])


def make_runs(folder: Path) -> None:
    """The runs that the cases are copies of."""
    write_clips(folder / "clips")
    write_tiny_model(folder / "model", "ti2v-5b", width=32, layers=1)
    (folder / "run.yaml").write_text(_RUN_FILE, encoding="utf-8")
    for name, overrides in _RUNS.items():
        options = [*overrides, f"output.dir={folder / 'runs'}", f"output.name={name}"]
        if main(["train", str(folder / "run.yaml"), *options]):
            raise RuntimeError(f"the run {name} could not be trained")


def make(seed: int, folder: Path) -> list[str]:
    rng = random.Random(seed)
    copy = folder / "run"
    shutil.copytree(Path(os.environ[_FOLDER], "runs", rng.choice(list(_RUNS))), copy)
    layout = RunLayout(copy)
    for step in layout.saved_steps()[-rng.choice((1, 1, 1, 2)) :]:
        damage(rng, layout.state(step), canary(folder))
    return [str(copy)]


def damage(rng: random.Random, state: Path, mark: Path) -> None:
    kind = rng.choice(("json", "json", "tensors", "optimizer", "optimizer", "bytes", "file"))
    for _ in range(rng.choice((1, 1, 2))):
        _KINDS[kind](rng, state, mark)
    if rng.random() < 0.1:
        shutil.move(state, state.with_name(rng.choice(("000003", "000009", "999999999"))))
    elif rng.random() < 0.15:
        change_file_of_json(rng, state / MANIFEST)
    elif rng.random() < 0.95:
        write_manifest(state)


def write_manifest(state: Path) -> None:
    files = sorted(p for p in state.iterdir() if p.is_file() and p.name != MANIFEST)
    files = [p for p in files if not p.is_symlink()]
    manifest = {p.name: {"bytes": p.stat().st_size, "blake2b": file_digest(p)} for p in files}
    (state / MANIFEST).unlink(missing_ok=True)
    (state / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


# ------------------------------------------------------------------------------------------- JSON

_ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 4, 5, 10**400, 1e308, float("nan"), float("inf"), -0.0),
    *("", "x", "4", "\x1b[31m", "line\nline", "\ud800", "../x", [], {}, [[]], {"a": 1}, [1] * 1000),
)


def change_json(rng: random.Random, state: Path, mark: Path) -> None:
    del mark
    change_file_of_json(rng, state / "state.json")


def change_file_of_json(rng: random.Random, file: Path) -> None:
    if file.is_symlink() or not file.is_file():  # changed before
        return
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # changed before
        return
    if rng.random() < 0.1:
        document = rng.choice((*_ODD_VALUES, "nested"))
    else:
        change_leaf(rng, document, _ODD_VALUES)
    text = "[" * 100_000 if document == "nested" else json.dumps(document)
    file.write_text(text, encoding="utf-8", errors="surrogatepass")


def change_leaf(rng: random.Random, node: Any, values: Sequence[Any]) -> None:
    """Replace, delete or add an entry somewhere in nested containers."""
    while isinstance(node, (dict, list)) and node:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        inner = node[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.85:
            node = inner
            continue
        how = rng.random()
        if how < 0.15:
            del node[key]
        elif how < 0.3 and isinstance(node, dict):
            node[rng.choice(("x", "", "lr", "params", "step", "\x1b[2J", 7))] = rng.choice(values)
        elif how < 0.4 and isinstance(node, dict):
            node[f"{key}x"] = node.pop(key)
        else:
            node[key] = rng.choice(values)
        return


# ---------------------------------------------------------------------------------------- tensors


def odd_tensor(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` with other values, another shape or another dtype."""
    how = rng.randrange(9)
    if how == 0:
        return tensor.to(rng.choice((torch.float16, torch.float64, torch.int64, torch.bool)))
    if how == 1:
        return tensor.flatten()[:-1].clone()
    if how == 2:
        return tensor.unsqueeze(0).clone()
    if how == 3 and tensor.ndim == 2:
        return tensor.T.contiguous()
    if how == 4:
        return torch.empty(0)
    if how == 5:
        return torch.tensor(float("nan"))
    if how == 6:
        return torch.zeros(1).expand(10**12)
    changed = tensor.clone()
    if changed.numel():
        value = rng.choice((float("nan"), float("inf"), -1e30, -1.0))
        changed.view(-1)[0] = value if changed.is_floating_point() else 1
    return changed


def change_tensors(rng: random.Random, state: Path, mark: Path) -> None:
    del mark
    file = rng.choice(sorted(state.glob("*.safetensors")))
    try:
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    except Exception:  # noqa: BLE001  (changed before)
        return
    if not tensors:  # deleted before
        return
    name = rng.choice(sorted(tensors))
    how = rng.random()
    if how < 0.15:
        del tensors[name]
    elif how < 0.3:
        tensors[f"{name}x"] = tensors[name].clone()
    elif how < 0.4:
        tensors = {}
    else:
        odd = odd_tensor(rng, tensors[name])
        tensors[name] = odd if odd.numel() < 10**9 else torch.zeros(3)
    save_file(tensors, file)


def change_optimizer(rng: random.Random, state: Path, mark: Path) -> None:
    file = rng.choice(sorted(state.glob("*_optimizer.pt")))
    try:
        content = torch.load(file, weights_only=True)
    except Exception:  # noqa: BLE001  (changed before)
        return
    if not isinstance(content, dict) or not isinstance(content.get("weights"), dict):
        return
    tensors = [
        value
        for entry in content["weights"].values()
        if isinstance(entry, dict) and isinstance(entry.get("state"), dict)
        for value in entry["state"].values()
        if isinstance(value, torch.Tensor) and 0 < value.numel() < 10**9
    ] or [torch.zeros(3)]
    values = [*_ODD_VALUES, *(odd_tensor(rng, rng.choice(tensors)) for _ in range(40))]
    if rng.random() < 0.1:
        content = rng.choice((*values, {}, [], {"optimizer": "adamw", "weights": []}))
    elif rng.random() < 0.05:
        content = _Call(mark)
    else:
        change_leaf(rng, content, values)
    torch.save(content, file)


class _Call:
    """Unpickles as a call that creates a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._mark),)


# ------------------------------------------------------------------------------------------ files


def change_bytes(rng: random.Random, state: Path, mark: Path) -> None:
    del mark
    file = rng.choice(sorted(p for p in state.iterdir() if p.is_file() and not p.is_symlink()))
    data = bytearray(file.read_bytes())
    if rng.random() < 0.3:
        del data[rng.randrange(len(data) + 1) :]
    for _ in range(rng.choice((1, 1, 3, 20))):
        if data:
            # Headers are at the beginning of safetensors files and at the end of archives.
            place = rng.randrange(min(len(data), rng.choice((8, 400, len(data)))))
            data[rng.choice((place, -1 - place))] = rng.randrange(256)
    file.write_bytes(data)


def change_file(rng: random.Random, state: Path, mark: Path) -> None:
    del mark
    files = sorted(p for p in state.iterdir() if p.is_file() and not p.is_symlink())
    file = rng.choice(files)
    other = rng.choice(files).read_bytes()
    file.unlink()
    how = rng.randrange(7)
    if how == 0:
        file.mkdir()
    elif how == 1:
        os.mkfifo(file)
    elif how == 2:
        file.symlink_to(rng.choice(("/dev/zero", file.name, "/etc/hostname", "/proc/self/mem")))
    elif how == 3:
        file.write_bytes(b"")
    elif how == 4:
        file.write_bytes(other)
    elif how == 5:
        file.write_bytes(bytes(len(other)))


_KINDS: dict[str, Callable[[random.Random, Path, Path], None]] = {
    "json": change_json,
    "tensors": change_tensors,
    "optimizer": change_optimizer,
    "bytes": change_bytes,
    "file": change_file,
}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="onewan-states-") as runs:
        make_runs(Path(runs))
        os.environ[_FOLDER] = runs
        run_cases(__doc__, make, run)
