"""Imports hostile and damaged OneTrainer configs with the command `import-config`.

Each case starts from a preset of the add-on or a config with every key that is converted, with
concepts, samples and embeddings in it, and changes its data, its text and its bytes.

    python benchmarks/robustness/onetrainer_configs.py --count 2000 --out onetrainer_configs.json
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from harness import MAX_OUTPUT_BYTES, run_cases
from run_files import at, nested, odd_text, odd_value, places

from onewan.cli import main
from onewan.cli.boundary import guarded
from onewan.config.load import load_run
from onewan.importing import ROWS, data, method, output
from onewan.importing.table import Row, set_path


def run(arguments: Sequence[str]) -> int:
    """Import a config, and read the run file that was written, if one was."""
    status = main(list(arguments))
    written = Path(arguments[-1])
    if status == 0 and written.name == "run.yaml":
        return guarded(lambda: 0 if load_run(written) else 1)
    return status


@cache
def documents() -> list[dict[str, Any]]:
    """Configs that can be imported: presets, and one with every key that is converted."""
    folder = Path(str(files("onewan.onetrainer").joinpath("overlay/resources/wan_presets")))
    presets = [json.loads(file.read_text("utf-8")) for file in sorted(folder.glob("*.json"))]
    whole = {"model_type": "WAN_2_2", **_defaults(ROWS), "base_model_name": "Wan2.2-T2V-A14B"}
    whole["concepts"] = [_defaults(data.CONCEPT_ROWS), {"path": "x", "image": {}, "text": {}}]
    whole["samples"] = [_defaults((*output.PROMPT_ROWS, *output.SAMPLING_ROWS))]
    whole["embedding"] = _defaults(method.EMBEDDING_ROWS)
    whole["additional_embeddings"] = [_defaults(method.EMBEDDING_ROWS)]
    embedding = {**copy.deepcopy(whole), "training_method": "EMBEDDING"}
    lora = {**copy.deepcopy(whole), "training_method": "LORA"}
    return [{"__version": 11, **config} for config in (*presets, whole, embedding, lora)]


def _defaults(rows: Sequence[Row]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for row in rows:
        set_path(config, row.key, row.default)
    return config


def change(rng: random.Random, config: dict[str, Any]) -> None:
    """One random change of a config's data."""
    path = rng.choice(list(places(config)) or [("model_type",)])
    around, last = at(config, path[:-1]), path[-1]
    match rng.randrange(8):
        case 0 | 1 | 2:
            around[last] = odd_value(rng)
        case 3:
            around[last] = rng.choice((0, -1, None, "", [], {}, True, False, 1.5, 10**400))
        case 4:
            key = rng.choice(ROWS).key
            section, _, name = key.rpartition(".")
            inside = config.setdefault(section, {}) if section else config
            if isinstance(inside, dict):
                inside[name] = odd_value(rng)
        case 5:
            del around[last]
        case 6:
            around[last] = rng.choice(([around[last]], {"a": around[last]}, str(around[last])))
        case _ if isinstance(around, dict):
            around[odd_text(rng)] = odd_value(rng)
        case _:
            around.append(odd_value(rng))


def make(seed: int, folder: Path) -> list[str]:
    rng = random.Random(seed)
    config = copy.deepcopy(rng.choice(documents()))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        change(rng, config)
    if rng.random() < 0.02:
        text = json.dumps(nested(rng, 500)).replace("1", "[" * rng.choice((500, 100_000)))
    else:
        text = json.dumps(config, ensure_ascii=rng.random() < 0.5)
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    if rng.random() < 0.15:  # damaged bytes
        for _ in range(rng.choice((1, 3, 20))):
            place = rng.randrange(len(content))
            content[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    if rng.random() < 0.03:
        content = content[: rng.randrange(len(content))]
    path = folder / rng.choice(("config.json", "#preset.json"))
    path.write_bytes(content)
    account = rng.choice(("short", "full", "json"))
    if account == "json" and len(content) > MAX_OUTPUT_BYTES // 4:
        account = "full"  # JSON is for programs and repeats every value in full
    how = [f"--account={account}"]
    variant = [f"--variant={rng.choice(('t2v-a14b', 'i2v-a14b', 'ti2v-5b'))}"]
    written = ["--output", str(folder / "run.yaml")] if rng.random() < 0.3 else []
    return ["import-config", str(path), *how, *(variant if rng.random() < 0.6 else []), *written]


if __name__ == "__main__":
    run_cases(__doc__, make, run)
