"""A real OneTrainer on tiny models: configs, runs by its `scripts/train.py`, and their results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

RECORDER = Path(__file__).with_name("onetrainer_recording_run.py")

QUIET = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",
}


def python_of(checkout: Path) -> str:
    """The interpreter that runs a checkout: the one that is named, its own, or this one."""
    if named := os.environ.get("ONETRAINER_PYTHON"):
        return named
    for inside in ("venv/bin/python", "venv/Scripts/python.exe", ".venv/bin/python"):
        if (checkout / inside).exists():
            return str(checkout / inside)
    return sys.executable


@dataclass(frozen=True)
class Result:
    """The result of a run."""

    folder: Path
    code: int
    log: str
    steps: list[dict[str, Any]]
    """One entry for each loss that was computed, in order."""

    @property
    def losses(self) -> list[float]:
        return [step["loss"] for step in self.steps if not step["validation"]]

    def outputs(self) -> list[Path]:
        return sorted(p for p in (self.folder / "out").rglob("*") if p.is_file())

    def backups(self) -> list[Path]:
        return sorted((self.folder / "ws" / "backup").iterdir())

    def samples(self, suffix: str = "mp4") -> list[Path]:
        return sorted((self.folder / "ws" / "samples").rglob(f"*.{suffix}"))


class Scripts:
    """Runs OneTrainer's scripts one after the other, with one import of OneTrainer for all."""

    def __init__(self, python: str, checkout: Path) -> None:
        self._command, self._checkout = [python, str(RECORDER)], checkout
        self._folder = tempfile.TemporaryDirectory()
        self._process: subprocess.Popen[str] | None = None

    def run(self, *script: str, **environment: str) -> tuple[int, str]:
        """The exit status of a script, and what the imports and the script printed."""
        imports, output = (Path(self._folder.name) / name for name in ("imports", "output"))
        if self._process is None:
            kept = {k: v for k, v in os.environ.items() if not k.startswith("RECORDER_")}
            with imports.open("wb") as file:
                self._process = subprocess.Popen(
                    self._command,
                    cwd=self._checkout,
                    env={**kept, **QUIET},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    text=True,
                )
        assert self._process.stdin and self._process.stdout
        output.unlink(missing_ok=True)
        recorder = {k: v for k, v in os.environ.items() if k.startswith("RECORDER_")}
        job = {"script": script, "environment": recorder | environment, "output": str(output)}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        said = self._process.stdout.readline()
        status = int(said) if said else self._end()
        printed = [p.read_text("utf-8", "replace") for p in (imports, output) if p.exists()]
        return status, "".join(printed)

    def _end(self) -> int:
        assert self._process
        with self._process as process:  # closes its pipes, which ends it, and waits
            self._process = None
        return process.returncode

    def close(self) -> None:
        if self._process:
            self._end()
        self._folder.cleanup()


@dataclass(frozen=True)
class Lab:
    """A checkout with the add-on in it, and the interpreter that runs it. To be closed."""

    checkout: Path
    python: str

    @cached_property
    def scripts(self) -> Scripts:
        return Scripts(self.python, self.checkout)

    def close(self) -> None:
        self.scripts.close()

    def convert(self, source: Path, destination: Path, base: Path, format: str) -> None:
        """Run `scripts/convert_model.py` on a LoRA."""
        status, printed = self.scripts.run(
            "scripts/convert_model.py",
            *("--model-type", "WAN_2_2", "--training-method", "LORA"),
            *("--input-name", str(source), "--base-model-name", str(base)),
            *("--output-dtype", "FLOAT_32", "--output-model-format", format),
            *("--output-model-destination", str(destination)),
        )
        assert status == 0, printed[-6000:]

    def run(self, *args: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [self.python, *args],
            cwd=self.checkout,
            env={**os.environ, **QUIET, **env},
            capture_output=True,
            text=True,
            check=False,
        )
        if check:
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return done

    def train(self, folder: Path, config: dict[str, Any], *, seed: int = 1) -> Result:
        """Run `scripts/train.py` on `config`, observed by the recorder."""
        folder.mkdir(parents=True, exist_ok=True)
        file, out = folder / "config.json", folder / "steps.jsonl"
        file.write_text(json.dumps(config, indent=1), encoding="utf-8")
        out.unlink(missing_ok=True)
        status, log = self.scripts.run(
            *("scripts/train.py", "--config-path", str(file)),
            RECORDER_OUT=str(out),
            RECORDER_SEED=str(seed),
        )
        (folder / "log.txt").write_text(log, encoding="utf-8")
        lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
        return Result(folder, status, log, [json.loads(line) for line in lines])


def config_of(folder: Path, model: Path, clips: Path, **changes: Any) -> dict[str, Any]:
    """A OneTrainer config for a tiny model, with its concept and sample in it."""
    plain = {"train": True, "weight_dtype": "FLOAT_32"}
    config: dict[str, Any] = {
        "__version": 11,
        "model_type": "WAN_2_2",
        "training_method": "LORA",
        "base_model_name": str(model),
        "workspace_dir": str(folder / "ws"),
        "cache_dir": str(folder / "cache"),
        "debug_dir": str(folder / "debug"),
        "offline_mode": True,
        "tensorboard": False,
        "output_dtype": "FLOAT_32",
        "output_model_format": "COMFY_LORA",
        "output_model_destination": str(folder / "out" / "lora.safetensors"),
        "concepts": [concept_of(clips)],
        "samples": [sample_of()],
        "train_device": "cpu",
        "temp_device": "cpu",
        "train_dtype": "FLOAT_32",
        "fallback_train_dtype": "FLOAT_32",
        "transformer": {**plain},
        "transformer_2": {**plain},
        "text_encoder": {"train": False, "weight_dtype": "FLOAT_32"},
        "vae": {"weight_dtype": "FLOAT_32"},
        "resolution": "128",
        "frames": "5",
        "timestep_shift": 5.0,
        "wan_expert_block": 1,
        "epochs": 2,
        "batch_size": 1,
        "learning_rate": 1e-3,
        "learning_rate_warmup_steps": 0,
        "lora_rank": 2,
        "layer_filter_preset": "blocks",
        "layer_filter": "blocks",
        "dataloader_threads": 1,
        "sample_after": 1,
        "sample_after_unit": "EPOCH",
        "sample_skip_first": 0,
        "backup_after": 1,
        "backup_after_unit": "EPOCH",
        "save_every_unit": "NEVER",
        "clear_cache_before_training": False,
        **changes,
    }
    return config


def concept_of(clips: Path, **changes: Any) -> dict[str, Any]:
    image = {"enable_crop_jitter": False, **changes.pop("image", {})}
    concept = {"__version": 2, "name": "clips", "path": str(clips), "seed": 1, "enabled": True}
    return {**concept, "type": "STANDARD", "image": image, **changes}


def sample_of(**changes: Any) -> dict[str, Any]:
    sample = {"prompt": "a rabbit", "width": 64, "height": 64, "frames": 5, "diffusion_steps": 2}
    return {**sample, "seed": 1, "cfg_scale": 2.0, **changes}
