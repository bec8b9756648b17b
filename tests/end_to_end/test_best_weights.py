"""The files of the weights with the lowest validation loss."""

from __future__ import annotations

from pathlib import Path, PurePath
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.runs import METHODS, PLACEHOLDER, RunFile, layout_of, recorder

from onewan.checkpoint.saver import WanModelSaver
from onewan.config.schema import ResolvedRun
from onewan.model.load import WanModelLoader
from onewan.train.trainer import WanTrainer


def _best_file(config: ResolvedRun, suffix: str, ext: str = ".safetensors") -> Path:
    return layout_of(config).weights("best", suffix, ext=ext)


def _header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_the_best_weights_of_each_expert_have_a_file_of_their_own(run_file: RunFile) -> None:
    """Also where no export is due at their step, and after old exports were deleted."""
    settings = [
        "optimizer={name: sgd, lr: 300}",  # too large, so that the loss does not fall steadily
        "validation={clips: 1, timesteps: 2, every: 1}",
        "train.ema={decay: 0.5}",
        *("train.steps=4", "output.keep_last=1"),
    ]
    # With every export kept, there is one of each step to compare with.
    every = run_file(
        *("t2v-a14b", *settings),
        *("output.keep_last=null", "train.save_every=1", "train.steps=5"),
    )
    config = run_file("t2v-a14b", *settings, "train.save_every=3", name="some")
    WanTrainer(every).fit()
    events: list[dict[str, Any]] = []
    WanTrainer(config, listen=recorder(events)).fit()
    assert list(layout_of(config).exported()) == [4]
    assert list(layout_of(every).exported()) == [1, 2, 3, 4, 5]
    summary = {PurePath(e["file"]).name: e for e in events if e["event"] == "best_weights"}
    for expert in ("high", "low"):
        for suffix, key in (("", "loss"), ("_ema", "ema")):
            losses = {
                e["step"]: e[key]
                for e in events
                if e["event"] == "validation" and e["step"] and e["expert"] == expert
            }
            best = min(losses, key=lambda step: losses[step])
            file = _best_file(config, f"_{expert}_noise{suffix}")
            told = summary[file.name]
            assert (told["step"], told["loss"]) == (best, losses[best])
            assert told["base"] == _base_loss(events, expert) and not told["held_out"]
            header = _header(file)
            assert header["onewan.steps"] == str(best)
            assert float(header["onewan.validation_loss"]) == losses[best]
            # The step's own export of the other run has the same weights.
            same = layout_of(every).weights(best, f"_{expert}_noise{suffix}")
            expected = load_file(same)
            assert all(torch.equal(v, expected[k]) for k, v in load_file(file).items())
            assert _best_file(every, f"_{expert}_noise{suffix}").samefile(same)
    assert len(summary) == 4


def test_best_weights_of_a_step_without_an_export_are_not_those_of_the_next_one(
    run_file: RunFile,
) -> None:
    config = run_file(
        "ti2v-5b",
        *("optimizer.lr=0.01", "validation={clips: 1, every: 3}"),
        *("train.steps=5", "train.save_every=2"),
    )
    WanTrainer(config).fit()
    layout = layout_of(config)
    assert {step: _header(layout.weights(step))["onewan.steps"] for step in (2, 4, 5)} == {
        2: "2",
        4: "4",
        5: "5",
    }
    state = load_file(layout.state(4) / "single.safetensors")
    exported = load_file(layout.weights(4))
    norms = [
        {float(tensor.norm()) for name, tensor in tensors.items() if "lora_B" in name}
        for tensors in (state, exported)
    ]
    assert norms[0] == norms[1], "the weights of the state of this step"


def _base_loss(events: list[dict[str, Any]], expert: str) -> float:
    return next(e["base"] for e in events if e["event"] == "validation" and e["expert"] == expert)


def test_a_resumed_run_has_the_best_weights_of_an_uninterrupted_one(run_file: RunFile) -> None:
    settings = ["optimizer={name: sgd, lr: 300}", "validation={clips: 2, every: 1}"]
    settings += ["train.save_every=3", "model.experts=high"]
    whole = run_file("t2v-a14b", *settings, name="whole")
    WanTrainer(whole).fit()
    WanTrainer(run_file("t2v-a14b", *settings, "train.steps=3", name="parts")).fit()
    parts = run_file("t2v-a14b", *settings, name="parts")
    events: list[dict[str, Any]] = []
    WanTrainer(parts, resume=True, listen=recorder(events)).fit()
    (told,) = [e for e in events if e["event"] == "best_weights"]
    headers = [_header(_best_file(config, "_high_noise")) for config in (whole, parts)]
    assert {header["onewan.steps"] for header in headers} == {str(told["step"])}
    weights = [load_file(_best_file(config, "_high_noise")) for config in (whole, parts)]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())


def test_embeddings_and_adapters_that_were_trained_together_are_of_one_step(
    run_file: RunFile, workshop: Path
) -> None:
    config = run_file(
        "t2v-a14b",
        PLACEHOLDER,
        f"video_data.sources=[{{path: {workshop / 'named clips'}}}]",
        "validation={clips: 1, every: 2}",
        "train.steps=4",
    )
    events: list[dict[str, Any]] = []
    WanTrainer(config, listen=recorder(events)).fit()
    told = [e for e in events if e["event"] == "best_weights"]
    losses = {
        step: fmean(e["loss"] for e in events if e["event"] == "validation" and e["step"] == step)
        for step in (2, 4)
    }
    best = min(losses, key=lambda step: losses[step])
    assert {(e["expert"], e["step"], e["loss"]) for e in told} == {
        (name, best, losses[best]) for name in ("high", "low", "embeddings")
    }
    assert PurePath(told[-1]["file"]).name == "run_best_shape.safetensors"


@pytest.mark.parametrize("format", ["comfyui", "diffusers"])
def test_the_best_fine_tuned_expert_shares_the_space_of_the_export_of_its_step(
    run_file: RunFile, format: str
) -> None:
    config = run_file(
        "ti2v-5b",
        *METHODS["fine_tune"],
        "wan_config.transformer_layers_to_train=[1]",
        f"output.formats=[{format}]",
        "validation={clips: 1, every: 1}",
        *("train.steps=3", "train.save_every=1"),
        "output.keep_last=2",
    )
    events: list[dict[str, Any]] = []
    WanTrainer(config, listen=recorder(events)).fit()
    (told,) = [e for e in events if e["event"] == "best_weights"]
    layout, ext = layout_of(config), "" if format == "diffusers" else ".safetensors"
    best = _best_file(config, "", ext)
    assert list(layout.exported()) == [2, 3] and best.exists()
    if told["step"] > 1:
        own = layout.weights(told["step"], ext=ext)
        for path in [own, *own.rglob("*")] if format == "comfyui" else own.rglob("*"):
            assert (best / path.relative_to(own)).samefile(path)
    loaded = WanModelLoader().load(
        {"transformer": str(best)}, "ti2v-5b", components=["transformer"]
    )
    assert loaded.transformer is not None


def test_best_weights_that_cant_be_written_leave_the_former_ones(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_file("ti2v-5b", "validation={clips: 1, every: 1}", "train.steps=3")
    write = WanModelSaver.save_adapter
    failed: list[Path] = []

    def on_a_full_disk(saver: WanModelSaver, adapter: Any, path: Path, *rest: Any, **more: Any):
        if "_best" in path.name and path.exists() and not failed:
            failed.append(path)
            raise OSError(28, "No space left on device", str(path))
        return write(saver, adapter, path, *rest, **more)

    monkeypatch.setattr(WanModelSaver, "save_adapter", on_a_full_disk)
    events: list[dict[str, Any]] = []
    WanTrainer(config, listen=recorder(events)).fit()
    losses = [e["loss"] for e in events if e["event"] == "validation"]
    assert failed and losses[1] > losses[2] > losses[3]
    assert any("step 2, can't be exported" in e.get("text", "") for e in events)
    (told,) = [e for e in events if e["event"] == "best_weights"]
    assert told["step"] == 3 and _header(_best_file(config, ""))["onewan.steps"] == "3"
