"""Full fine-tuning (memory of gradients, selected weights) and embeddings (side effects)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.runs import RunFile, layout_of, leaves
from torch import nn

from onewan.data.loader import StepBatches
from onewan.errors import ConfigError, TrainingError
from onewan.model.embedding import WanModelEmbedding
from onewan.model.load import WanModelLoader
from onewan.runs.event_file import read_events
from onewan.sample.generate import WanModelSampler
from onewan.train import steps
from onewan.train.run import Run, sample_requests
from onewan.train.setup import WanModelSetup
from onewan.train.step import NoisedInputs, StepMetrics, predict, train_step
from onewan.train.trainer import WanTrainer


@pytest.mark.parametrize("weights", ["stochastic", "kahan", "float32"])
def test_a_fused_step_holds_the_gradients_of_one_block(run_file: RunFile, weights: str) -> None:
    """Whenever a weight's gradient is computed, the gradients in memory belong to its own block."""
    config = run_file(
        "t2v-a14b",
        f"method={{kind: fine_tune, weights: {weights}, fused_step: true}}",
        "model.dtype=bfloat16",
        "train.max_grad_norm=null",
    )
    run = WanModelSetup(config).build()
    parameters = run.state.experts["high"].method.parameters
    before = {name: p.detach().clone() for name, p in parameters.items()}
    held: list[set[str]] = []

    def watch(name: str) -> Callable[[torch.Tensor], None]:
        def hook(_gradient: torch.Tensor) -> None:
            alive = [n for n, p in parameters.items() if p.grad is not None]
            held.append({block_of(n) for n in [name, *alive]})

        return hook

    for name, parameter in parameters.items():
        parameter.register_hook(watch(name))
    metrics = train_step(run, run.loader.step(0, "high", 0))
    assert len(held) >= len(parameters) - 5 and max(map(len, held)) == 1
    assert all(p.grad is None for p in parameters.values()) and metrics.grad_norm > 0
    moved = [n for n, p in parameters.items() if not torch.equal(p, before[n])]
    assert len(moved) > 0.9 * len(parameters)


def test_a_fused_step_whose_loss_is_not_finite_ends_the_run_with_its_last_state(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights have been updated before the loss is known, so nothing may be saved afterwards."""
    config = run_file(
        "ti2v-5b",
        "method={kind: fine_tune, fused_step: true}",
        *("train.max_grad_norm=null", "train.steps=4", "train.save_every=1"),
    )
    plain = steps.train_step

    def damaged(run: Run, step: StepBatches) -> StepMetrics:
        if step.number == 2:
            step.batches[0].latents[0, 0, 0, 0, 0] = float("nan")
        return plain(run, step)

    monkeypatch.setattr(steps, "train_step", damaged)
    with pytest.raises(TrainingError, match=r"step 3 .* the loss is not finite with"):
        WanTrainer(config).fit()
    layout = layout_of(config)
    assert layout.saved_steps()[-1] == 2 and [*layout.exported()][-1] == 2
    saved = load_file(layout.state(2) / "single.safetensors")
    assert all(bool(weight.isfinite().all()) for weight in saved.values())


def test_fine_tuning_with_streamed_blocks_has_the_same_bits(run_file: RunFile) -> None:
    assert_streamed_blocks_have_the_same_bits(run_file, "cpu")


def test_fine_tuning_with_streamed_blocks_has_the_same_bits_on_a_device(
    run_file: RunFile, sim: torch.device
) -> None:
    assert_streamed_blocks_have_the_same_bits(run_file, sim.type)


def assert_streamed_blocks_have_the_same_bits(run_file: RunFile, device: str) -> None:
    """Of both experts, whose trained weights and optimizer states are in host memory."""
    results = []
    for resident in ("null", "1"):
        config = run_file(
            "t2v-a14b",
            "method={kind: fine_tune, weights: kahan, fused_step: true}",
            "model.dtype=bfloat16",
            f"model.device={device}",
            "train.max_grad_norm=null",
            f"memory.resident_blocks={resident}",
        )
        run = WanModelSetup(config).build()
        for number, name in enumerate(("high", "low", "low", "high")):
            run.bring_expert(name)
            train_step(run, run.loader.step(number, name, 0))
        experts = run.state.experts.values()
        states = [e.trainable.optimizer.state_dict() for e in experts if e.trainable is not None]
        results.append([{**e.method.read()} for e in experts if e.method is not None])
        results[-1] += [
            {
                f"{name}.{key}": value
                for name, entry in state.items()
                for key, value in tensors(entry)
            }
            for state in states
        ]
    for resident, streamed in zip(*results, strict=True):
        assert resident.keys() == streamed.keys()
        assert all(torch.equal(value, streamed[key]) for key, value in resident.items())


def tensors(entry: dict) -> list[tuple[str, torch.Tensor]]:
    """The tensors in a weight's entry of an optimizer's state."""
    found = [*entry["state"].items(), ("rest", entry["rest"])]
    return [(key, value) for key, value in found if isinstance(value, torch.Tensor)]


def test_averages_of_streamed_weights_are_refused(run_file: RunFile) -> None:
    config = run_file(
        "ti2v-5b",
        "method={kind: fine_tune, fused_step: true}",
        "train.max_grad_norm=null",
        "train.ema={decay: 0.9}",
        "memory.resident_blocks=1",
    )
    with pytest.raises(ConfigError, match=r"train\.ema: is not possible while"):
        WanModelSetup(config).build()


def block_of(name: str) -> str:
    found = re.match(r"blocks\.\d+", name)
    return found[0] if found else name


@pytest.mark.parametrize("modules", [["norms"], ["biases"], ["attn1.to_q.weight"]])
def test_only_the_selected_weights_change(run_file: RunFile, workshop: Path, modules: list) -> None:
    config = run_file(
        "ti2v-5b",
        f"method={{kind: fine_tune, modules: {modules}}}",
        "wan_config.transformer_layers_to_train=[1]",
        "train.steps=3",
        "output.formats=[comfyui, diffusers]",
    )
    WanTrainer(config).fit()
    folder = layout_of(config).weights_dir
    assert sorted(p.name for p in folder.iterdir()) == [
        "run_000003_comfyui.safetensors",
        "run_000003_diffusers",
    ]
    base = WanModelLoader().load(workshop / "ti2v-5b", components=["transformer"]).transformer
    for path in folder.iterdir():
        source = {"transformer": str(path)}
        ours = WanModelLoader().load(source, "ti2v-5b", components=["transformer"]).transformer
        changed = {
            name
            for (name, a), b in zip(base.named_parameters(), ours.parameters(), strict=True)
            if not torch.equal(a, b)
        }
        assert changed and all(name.startswith("blocks.1.") for name in changed)
        words = {"norms": "norm", "biases": ".bias"}
        assert all(words.get(modules[0], modules[0]) in name for name in changed)


@pytest.mark.parametrize("is_output", [False, True])
def test_an_embedding_and_a_lora_train_together(
    run_file: RunFile, workshop: Path, is_output: bool
) -> None:
    """Both are trained and exported, and the text encoder is unchanged."""
    section = (
        "{placeholder: <shape>, initial_text: square, token_count: 2, lr: 0.1, "
        f"is_output_embedding: {str(is_output).lower()}}}"
    )
    config = run_file(
        "t2v-a14b",
        f"video_data.sources=[{{path: {workshop / 'named clips'}}}]",
        f"embeddings=[{section}]",
        "sample.prompts=[a <shape> turns]",
        *("sample.width=64", "sample.height=64", "sample.frames=5", "sample.steps=2"),
        "sample.at_start=true",
        "train.steps=8",
        "wan_config.use_temporal_attention=false",
        "wan_config.temporal_consistency_weight=2.0",
    )
    WanTrainer(config).fit()
    layout = layout_of(config)
    steps = [e for e in read_events(layout.events) if e["event"] == "step"]
    assert {(e["lr"], e["embeddings_lr"]) for e in steps} == {(0.005, 0.1)}
    assert sorted(p.name for p in layout.weights_dir.iterdir()) == [
        "run_000008_high_noise.safetensors",
        "run_000008_low_noise.safetensors",
        "run_000008_shape.safetensors",
    ]
    learned = WanModelEmbedding.from_file(layout.weights(8, "_shape"))
    state = load_file(layout.state(8) / "embeddings.safetensors")
    with safe_open(layout.weights(8, "_shape"), "pt") as file:
        assert file.metadata()["onewan.lr"] == "0.1"
    assert torch.equal(state["shape"], learned.vectors) and learned.vectors.shape[0] == 2
    fresh = WanModelLoader().load(workshop / "t2v-a14b")
    plain = fresh.encode_text(["a square turns", "nothing of it"])
    started = WanModelEmbedding.initial(
        fresh,
        placeholder="<shape>",
        initial_text="square",
        token_count=2,
        is_output_embedding=is_output,
        seed=config.train.seed,
    )
    assert started.uuid == learned.uuid and not torch.equal(started.vectors, learned.vectors)
    (request,) = sample_requests(config)
    videos = []
    for embedding in (started, learned):
        fresh.embedding, fresh.additional_embeddings = embedding, []
        assert torch.equal(fresh.encode_text(["a square turns", "nothing of it"]), plain)
        videos.append(WanModelSampler(fresh).sample(request))
    assert not np.array_equal(*videos)
    table = fresh.text_encoder.get_input_embeddings().weight
    assert torch.equal(
        table, WanModelLoader().load(workshop / "t2v-a14b").text_encoder.shared.weight
    )
    assert (layout.samples(0) / "0.mp4").is_file() and (layout.samples(8) / "0.mp4").is_file()


def test_a_placeholder_in_no_caption_is_refused(run_file: RunFile) -> None:
    config = run_file(
        "ti2v-5b", "method={kind: embedding}", "embeddings=[{placeholder: <nowhere>}]"
    )
    with pytest.raises(ConfigError, match="no caption contains '<nowhere>'"):
        WanTrainer(config).fit()


@pytest.mark.parametrize("enabled", [True, False])
def test_gradient_checkpointing_saves_memory_in_both_models(
    run_file: RunFile, workshop: Path, enabled: bool
) -> None:
    """The transformer and the text encoder keep fewer tensors for the backward pass with it."""
    config = run_file(
        "ti2v-5b",
        "method={kind: embedding}",
        "embeddings=[{placeholder: <shape>, initial_text: a}]",
        f"video_data.sources=[{{path: {workshop / 'named clips'}}}]",
        f"memory.gradient_checkpointing={str(enabled).lower()}",
    )
    run = WanModelSetup(config).build()
    batch = run.loader.validation_batches(run.dataset.clips, 1)[0]
    trained = run.bring_expert("single")
    trained.transformer.train()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(1) or t, lambda t: t):
        text = run.text(batch)
        of_text = len(kept)
        step = run.loader.step(0, "single", 0)
        sample = run.objective.add_noise(batch, step, trained.expert)
        predict(run, trained, [NoisedInputs(batch, sample, text)])
    of_video = len(kept) - of_text
    assert (of_text < 30) == enabled and (of_video < 45) == enabled, (of_text, of_video)


def test_a_notice_about_exported_files_is_reported_once(run_file: RunFile) -> None:
    settings = ["method={kind: fine_tune, modules: [norms]}", "train={steps: 2, save_every: 1}"]
    config = run_file("t2v-a14b", *settings)
    WanTrainer(config).fit()
    warnings = [e for e in read_events(layout_of(config).events) if e["event"] == "warning"]
    assert sum("ComfyUI assumes 128 for all Wan models" in e["text"] for e in warnings) == 1
    assert len(list(layout_of(config).weights_dir.iterdir())) == 4


def test_clips_without_the_placeholder_give_no_gradient(run_file: RunFile, workshop: Path) -> None:
    config = run_file(
        "ti2v-5b",
        "method={kind: embedding}",
        "embeddings=[{placeholder: <shape>, initial_text: a}]",
        "video_data.sources="
        f"[{{path: {workshop / 'named clips'}}}, {{path: {workshop / 'clips'}}}]",
        "optimizer={name: adafactor, lr: 0.01}",
        "train.steps=10",
        "train.ema={}",
    )
    WanTrainer(config).fit()
    events = list(read_events(layout_of(config).events))
    norms = [e["grad_norm"] for e in events if e["event"] == "step"]
    assert len(norms) == 10 and any(norms) and not all(norms)
    (warning,) = [e["text"] for e in events if e["event"] == "warning"]
    assert "clips have no caption with a trained placeholder" in warning


def test_states_are_saved_on_the_cpu_as_plain_tensors(run_file: RunFile) -> None:
    config = run_file("ti2v-5b", "train.steps=1", "train.ema={}")
    WanTrainer(config).fit()
    for path in layout_of(config).state(1).glob("*.pt"):
        tensors = [t for _, t in leaves(torch.load(path, weights_only=True), "")]
        assert tensors and all(t.device.type == "cpu" for t in tensors)
        assert not any(isinstance(t, nn.Parameter) for t in tensors)
