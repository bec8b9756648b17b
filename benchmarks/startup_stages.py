"""CPU seconds of what `onewan train RUN.yaml` does up to its first step, for `startup.py`.

    python benchmarks/startup_stages.py RUN.yaml

Prints one JSON object, with the stages in their order. The first one begins with the process.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

seconds: dict[str, float] = {}


@contextmanager
def stage(name: str) -> Generator[None]:
    begin = time.process_time() if seconds else 0.0
    yield
    seconds[name] = time.process_time() - begin


def main() -> None:
    run_file = Path(sys.argv[1])
    with stage("the run file"):
        from onewan.cli.heavy_imports import heavy_imports
        from onewan.config.load import load_run

        config = load_run(run_file)
    with heavy_imports():
        with stage("import of torch"):
            import torch  # noqa: F401
        with stage("import of diffusers, transformers and PEFT"):
            import peft  # noqa: F401
            from diffusers import AutoencoderKLWan, WanTransformer3DModel  # noqa: F401
            from transformers import UMT5EncoderModel  # noqa: F401
        with stage("import of onewan"):
            from onewan.train.run import sample_requests
            from onewan.train.setup import WanModelSetup
            from onewan.train.step import train_step
            from onewan.train.trainer import WanTrainer  # noqa: F401
            from onewan.train.validation import measure
    setup = WanModelSetup(config)
    with stage("headers of the model's files"):
        setup.check()
    with stage("clips and cache"):
        setup.dataset(sample_requests(config), lambda *_: None)
    loading = "weights, adapters, optimizers"
    with stage(loading):
        run = setup.build()
    seconds[loading] -= seconds["clips and cache"]  # which it opens once more
    with stage("loss of the base model, of both experts"):
        for name in run.state.experts:
            measure(run, name, with_base=True, between=lambda: None)
    with stage("first step"):
        train_step(run, next(run.loader.steps(0, config.train.steps, run.schedule.expert_at)))
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
