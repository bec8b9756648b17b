"""Every method on every variant, with one expert and with both: training, resuming, exported files.

Each case is one uninterrupted run, and one in another process that is killed (SIGKILL) at a random
moment and resumed. The two must end with the same bits.
"""

from __future__ import annotations

import multiprocessing
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.runs import METHODS, RunFile, layout_of, outcome, recorder
from support.slow_run import train_slowly

from onewan.adapters.lora import apply_lora
from onewan.checkpoint.store import StateStore
from onewan.config.load import load_run
from onewan.config.schema import ResolvedRun
from onewan.data.loader import Batch
from onewan.formats.lora_files import read_adapter
from onewan.media import probe
from onewan.model.embedding import WanModelEmbedding
from onewan.model.forward import predict_velocity
from onewan.model.load import WanModelLoader
from onewan.model.wan import WanModel
from onewan.runs.event_file import read_events
from onewan.train.saved_state import read_facts
from onewan.train.setup import WanModelSetup
from onewan.train.trainer import WanTrainer
from onewan.variants import VARIANTS

pytestmark = pytest.mark.long

STEPS = 16
EXPERTS = {"t2v-a14b": ("both", "low"), "i2v-a14b": ("both", "high"), "ti2v-5b": ("both",)}
CASES = [(m, v, e) for m in METHODS for v in EXPERTS for e in EXPERTS[v]]


def settings(method: str, variant: str, experts: str, workshop: Path) -> list[str]:
    side = 128 if variant == "ti2v-5b" else 64
    image = f", image: {workshop / 'clips' / 'still_square.png'}" if variant == "i2v-a14b" else ""
    prompt = "a <shape> turns" if method == "embedding" else "a red square"
    source = "named clips" if method == "embedding" else "clips"
    return [
        *METHODS[method],
        f"model.experts={experts}",
        f"video_data.sources=[{{path: {workshop / source}}}]",
        "wan_config.max_frames=5",
        f"train.steps={STEPS}",
        "train.save_every=3",
        "train.switch_expert_every=1",
        "validation.clips=2",
        f"sample.prompts=[{{prompt: {prompt}{image}}}]",
        *(f"sample.{k}={v}" for k, v in {"width": side, "height": side, "frames": 5}.items()),
        "sample.steps=1",
    ]


@pytest.mark.parametrize(("method", "variant", "experts"), CASES)
def test_a_method_trains_exports_and_resumes_bit_exact(
    run_file: RunFile, workshop: Path, tmp_path: Path, method: str, variant: str, experts: str
) -> None:
    chosen = settings(method, variant, experts, workshop)
    uninterrupted = run_file(variant, *chosen, name="whole")
    WanTrainer(uninterrupted).fit()
    check_validation_loss_fell(uninterrupted)
    check_exports(uninterrupted, method)
    layout = layout_of(uninterrupted)
    assert probe(layout.samples(STEPS) / "0.mp4").width == uninterrupted.sample.width
    if sys.platform == "win32":
        return  # no SIGKILL, no forkserver
    run_file(variant, *chosen, name="cut")
    overrides = [f"output.dir={tmp_path / 'runs'}", *chosen]
    resumed = killed_and_resumed(tmp_path / "cut.yaml", overrides, f"{method} {variant} {experts}")
    tensors, steps = outcome(uninterrupted)
    again, steps_again = outcome(resumed)
    # Steps that were repeated after the kill are in the events twice.
    assert dict(enumerate(steps)) == {e[0] - 1: e for e in steps_again}
    assert tensors.keys() == again.keys() and tensors
    assert [name for name in tensors if not torch.equal(tensors[name], again[name])] == []


def check_validation_loss_fell(config: ResolvedRun) -> None:
    """The validation loss of each expert is below that of the base model."""
    events = [e for e in read_events(layout_of(config).events) if e["event"] == "validation"]
    experts = VARIANTS[config.model.variant].selected(config.model.experts)
    last = {e["expert"]: e for e in events if e["step"] == STEPS}
    assert last.keys() == {expert.name for expert in experts}
    for name, event in last.items():
        assert event["loss"] < event["base"], name
        first = next(e for e in events if e["expert"] == name and e["step"] == 0)
        assert first["loss"] == event["base"]


def check_exports(config: ResolvedRun, method: str) -> None:
    """The exported weights, in a newly loaded model, give the output of the run's own model."""
    run = WanModelSetup(config).build()
    layout = layout_of(config)
    folder = layout.state(STEPS)
    run.state.load(folder, read_facts(folder))
    fresh = WanModelLoader().load(config.model.path, dtype=run.model.dtype)
    batch = run.validation_batches()[0]
    for name, trained in run.state.experts.items():
        path = layout.weights(STEPS, trained.expert.file_suffix)
        if method == "fine_tune":
            fresh = WanModelLoader().load(
                {"path": config.model.path, trained.expert.component: str(path)},
                config.model.variant,
                run.model.dtype,
            )
        elif method != "embedding":
            apply_lora(fresh.expert(trained.expert), read_adapter(path).modules, name)
        else:
            fresh.embedding = WanModelEmbedding.from_file(layout.weights(STEPS, "_shape"))
            assert torch.equal(fresh.embedding.vectors, run.model.embedding.vectors)
        for model in (run.model, fresh):
            align(model.expert(trained.expert))
        ours, theirs = (
            predicted_velocity(model, trained.expert.name, batch) for model in (run.model, fresh)
        )
        untrained = WanModelLoader().load(config.model.path, dtype=run.model.dtype)
        base = predicted_velocity(untrained, trained.expert.name, batch)
        assert float((ours - theirs).norm() / ours.norm()) < 1e-5, name
        assert float((ours - base).norm() / ours.norm()) > 1e-4, name


def align(module: torch.nn.Module) -> None:
    """Let all weights begin at multiples of 64 bytes. In the memory of a file they begin anywhere,
    which depends on the length of its metadata, and matrix products may round differently then."""
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data = tensor.data.clone()


def predicted_velocity(model: WanModel, name: str, batch: Batch) -> torch.Tensor:
    transformer = model.expert(model.variant.expert(name)).eval()
    with torch.no_grad():
        return predict_velocity(
            transformer,
            batch.latents,
            torch.tensor([0.9]),
            model.encode_text(batch.captions) if batch.text is None else batch.text,
            condition_BCFHW=batch.condition,
            dtype=model.dtype,
        )


# --------------------------------------------------------------------------------- being killed


def killed_and_resumed(run_yaml: Path, overrides: list[str], case: str) -> ResolvedRun:
    """Train in another process, kill it at a random moment, check its folder, and resume."""
    config = load_run(run_yaml, overrides)
    layout = layout_of(config)
    chance = random.Random(case)  # a moment that differs between cases and not between test runs
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["onewan.train.trainer"])
    process = context.Process(target=train_slowly, args=(run_yaml, overrides))
    process.start()
    until = chance.randrange(1, STEPS - 1)
    while not any(
        e["event"] == "step" and e["step"] >= until for e in events_so_far(layout.events)
    ):
        assert process.is_alive(), "the run ended before it was killed"
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.05))
    process.kill()
    process.join()
    assert process.exitcode == -9
    events = events_so_far(layout.events)
    saved = max((e["step"] for e in events if e["event"] == "saved"), default=0)
    found = StateStore(layout, keep=2).newest(Path.is_dir)
    # A state is reported after it is complete: so it exists, and no state is damaged.
    assert (found.step if found else 0) >= saved
    assert found is None or found.damaged == ()
    events_of_resume: list[dict[str, Any]] = []
    WanTrainer(config, listen=recorder(events_of_resume), resume="auto").fit()
    assert not [p for p in layout.weights_dir.iterdir() if p.name.startswith(".")]
    resumed = [e["step"] for e in events_of_resume if e["event"] == "resumed"]
    assert resumed == ([found.step] if found else [])
    return config


def events_so_far(events: Path) -> list[dict[str, Any]]:
    return list(read_events(events)) if events.exists() else []


def test_at_least_30_runs_are_killed() -> None:
    assert len(CASES) >= 30


def test_a_state_holds_the_trained_weights_only(run_file: RunFile) -> None:
    config = run_file("ti2v-5b", "train.steps=1", "method={kind: fine_tune, modules: [norms]}")
    WanTrainer(config).fit()
    names = load_file(layout_of(config).state(1) / "single.safetensors").keys()
    assert names and all("norm" in name for name in names)
