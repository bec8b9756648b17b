"""Runs OneTrainer's scripts, and records each computed loss as a JSON line in RECORDER_OUT.

Works from the root of a checkout without changing it: the setup that a script creates is observed.
With RECORDER_DUMP, the batch of a step, its noise and its prediction are written there.

OneTrainer is imported once, which takes longer than a short training. Then each line of the
standard input is a script to run, as JSON: its name and arguments, its environment and the file for
its output. It runs in a fork, and its exit status is printed. Without `os.fork` it runs in this
process, which ends with it.
"""

import gc
import json
import os
import runpy
import sys

sys.path[:0] = [os.path.join(os.getcwd(), "scripts"), os.getcwd()]
statuses = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever the imports print

import torch
from modules.util import create

real = create.create_model_setup


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
        dump = os.environ.get("RECORDER_DUMP")
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


def run(job):
    with open(job["output"], "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(job["environment"])
    torch.manual_seed(int(os.environ.get("RECORDER_SEED", "1")))
    create.create_model_setup = observed
    sys.argv = job["script"]
    runpy.run_path(sys.argv[0], run_name="__main__")


# OneTrainer collects garbage each time that a module leaves the device. With the objects of the
# imports among those that are searched, that takes longer than all steps of a tiny model.
gc.freeze()
for line in iter(sys.stdin.readline, ""):
    child = os.fork() if hasattr(os, "fork") else 0
    if not child:
        run(json.loads(line))
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=statuses, flush=True)
