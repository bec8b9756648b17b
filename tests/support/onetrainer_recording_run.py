"""Runs OneTrainer's `scripts/train.py`, and records each computed loss as a JSON line.

Works from the root of a checkout without changing it: the setup that it creates is observed. With
RECORDER_DUMP, the first batch, its noise and its prediction are written there.
"""

import json
import os
import runpy
import sys

sys.path[:0] = [os.path.join(os.getcwd(), "scripts"), os.getcwd()]

import torch

torch.manual_seed(int(os.environ["RECORDER_SEED"]))

from modules.util import create

real = create.create_model_setup
dump = os.environ.get("RECORDER_DUMP")


def observed(*args, **kwargs):
    setup = real(*args, **kwargs)
    predict, loss = setup.predict, setup.calculate_loss
    seen = {}

    def recording_predict(model, batch, config, train_progress, *, deterministic=False):
        out = predict(model, batch, config, train_progress, deterministic=deterministic)
        step = train_progress.global_step
        seen.update(
            step=step,
            validation=deterministic,
            t=[float(t) for sample in out.get("samples", []) for t in sample.t_host],
            shape=list(out["predicted"].shape),
            names=[os.path.basename(path) for path in batch.get("image_path", [])],
        )
        if folder := os.environ.get("RECORDER_LATENTS"):
            for index, path in enumerate(batch["image_path"]):
                name = os.path.basename(path) + ".pt"
                torch.save(batch["latent_image"][index].clone(), os.path.join(folder, name))
        dump_step = int(os.environ.get("RECORDER_DUMP_STEP", "0"))
        if dump and step == dump_step and not os.path.exists(dump):
            sample = out["samples"][0]
            torch.save(
                {
                    "batch": {k: v for k, v in batch.items() if torch.is_tensor(v)},
                    "path": list(batch["image_path"]),
                    "prompt": list(batch["prompt"]),
                    "t": sample.t,
                    "x": sample.x,
                    "target": sample.target,
                    "predicted": out["predicted"].detach(),
                },
                dump,
            )
        return out

    def recording_loss(model, batch, data, config):
        out = loss(model, batch, data, config)
        with open(os.environ["RECORDER_OUT"], "a") as file:
            file.write(json.dumps({**seen, "loss": out.item()}) + "\n")
        return out

    setup.predict, setup.calculate_loss = recording_predict, recording_loss
    return setup


create.create_model_setup = observed
sys.argv[0] = "scripts/train.py"
runpy.run_path("scripts/train.py", run_name="__main__")
