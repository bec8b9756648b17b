"""Record the keys and defaults of OneTrainer's configs, which the tests of the import compare with.

    cd CHECKOUT; PYTHON_OF_ONETRAINER .../take_onetrainer_defaults.py

Runs in a checkout with the add-on installed, by OneTrainer's own interpreter.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, os.getcwd())

from modules.util import create  # noqa: F401  (lets the add-on in)
from modules.util.config.ConceptConfig import ConceptConfig
from modules.util.config.SampleConfig import SampleConfig
from modules.util.config.TrainConfig import TrainConfig, TrainEmbeddingConfig

OUT = Path(__file__).parents[1] / "tests" / "onetrainer" / "onetrainer_defaults.json"
RANDOM = {"uuid": "", "seed": 0}


def plain(config: object) -> dict:
    taken = config.to_dict()
    return {k: RANDOM.get(k, v) if k in ("uuid",) else v for k, v in taken.items()}


def main() -> None:
    train = plain(TrainConfig.default_values())
    train["embedding"]["uuid"] = ""
    train.pop("secrets", None)  # what is secret is neither known nor carried
    taken = {
        "train": train,
        "concept": {**plain(ConceptConfig.default_values()), "seed": 0},
        "sample": plain(SampleConfig.default_values()),
        "embedding": plain(TrainEmbeddingConfig.default_values()),
    }
    OUT.write_text(json.dumps(taken, indent=1) + "\n", encoding="utf-8")


main()
