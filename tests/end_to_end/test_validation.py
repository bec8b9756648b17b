"""Validation: the same loss for the same weights, and another loss after one step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.runs import SMALL_SAMPLE, RunFile, layout_of, recorder

from onewan.adapters.lora import adapter_weights
from onewan.errors import ConfigError
from onewan.model.embedding import WanModelEmbedding
from onewan.runs.event_file import read_events
from onewan.sample.generate import WanModelSampler
from onewan.train.objective import Objective
from onewan.train.run import Run
from onewan.train.saved_state import BestStep, read_facts
from onewan.train.setup import WanModelSetup
from onewan.train.step import train_step
from onewan.train.trainer import WanTrainer
from onewan.train.validation import clip_losses, mean_loss
from onewan.variants import VARIANTS


def measure(run: Run, kind: Any = "trained") -> list[float]:
    measured = (clip_losses(run, name, kind, lambda: None) for name in run.state.experts)
    return [mean_loss([losses]) for losses in measured]


@pytest.mark.parametrize("variant", ["t2v-a14b", "i2v-a14b", "ti2v-5b"])
def test_equal_weights_give_bit_exact_losses(run_file: RunFile, variant: str) -> None:
    config = run_file(
        variant,
        "validation={share: 0.4, clips: 2, timesteps: 3}",
        "train.ema={decay: 0.5}",
        "train.noise_offset=0.1",
        "train.caption_dropout=0.5",
        "method={kind: lora, rank: 4, dropout: 0.5}",
        "train.loss.kind=pseudo_huber",
    )
    run = WanModelSetup(config).build()
    base = measure(run, None)
    first = measure(run)
    assert first == base == measure(run)
    assert first == measure(WanModelSetup(config).build())  # in another run too
    for number, name in enumerate(run.state.experts):
        train_step(run, run.loader.step(number, name, 0))
    trained = measure(run)
    assert all(a != b for a, b in zip(trained, first, strict=True))
    assert trained == measure(run)
    # Without its adapters the model is the base model, bit for bit.
    assert measure(run, None) == base
    train_step(run, run.loader.step(2, next(iter(run.state.experts)), 1))
    averaged = measure(run, "ema")
    assert averaged[0] not in (measure(run)[0], trained[0], base[0])
    assert averaged == measure(run, "ema")


def test_held_out_clips_are_never_trained_on(run_file: RunFile) -> None:
    config = run_file("t2v-a14b", "validation={share: 0.4, clips: 9, every: 2}", "train.steps=4")
    run = WanModelSetup(config).build()
    held_out = {clip.name for clip in run.dataset.validation_clips}
    assert held_out == {name for batch in run.validation_batches() for name in batch.names}
    steps = list(run.loader.steps(0, 50, run.schedule.expert_at))
    assert held_out.isdisjoint(name for s in steps for b in s.batches for name in b.names)
    WanTrainer(config).fit()
    events = [e for e in read_events(layout_of(config).events) if e["event"] == "validation"]
    assert [(e["step"], e["expert"]) for e in events] == [
        (step, expert) for step in (0, 2, 4) for expert in ("high", "low")
    ]
    assert all(e["held_out"] for e in events)


def test_validation_does_not_change_training(run_file: RunFile) -> None:
    """Also for an optimizer that validates other weights than it trains."""
    outcomes = []
    for every in (0, 1):
        config = run_file(
            "t2v-a14b",
            "optimizer={name: adamw_schedule_free, lr: 0.01}",
            f"validation={{clips: {every}, every: {every}}}",
            "method.dropout=0.3",
            "train.steps=4",
            name=f"every-{every}",
        )
        WanTrainer(config).fit()
        steps = [e for e in read_events(layout_of(config).events) if e["event"] == "step"]
        outcomes.append([(e["loss"], e["grad_norm"]) for e in steps])
    assert outcomes[0] == outcomes[1]


def test_clips_with_the_base_as_target_pull_back_to_the_base(
    run_file: RunFile, workshop: Path
) -> None:
    """Clips whose target is the base model's own prediction: no gradient at the start, and a pull
    back to the base afterwards."""
    config = run_file(
        "t2v-a14b", f"video_data.sources=[{{path: {workshop / 'clips'}, target: base}}]"
    )
    run = WanModelSetup(config).build()
    metrics = train_step(run, run.loader.step(0, "high", 0))
    assert metrics.loss == 0 and metrics.grad_norm == 0
    for parameter in run.state.experts["high"].trainable.weights.parameters.values():
        parameter.data += 0.05
    assert train_step(run, run.loader.step(1, "high", 1)).loss > 0


def test_a_run_initialized_from_an_adapter_starts_at_its_loss(run_file: RunFile) -> None:
    first = run_file("t2v-a14b", "validation.clips=2", "train.steps=8", "optimizer.lr=0.01")
    WanTrainer(first).fit()
    layout = layout_of(first)
    files = [layout.weights(8, suffix) for suffix in ("_high_noise", "_low_noise")]
    on = run_file(
        "t2v-a14b",
        f"method={{kind: lora, init_from: [{files[1]}, {files[0]}]}}",
        "validation.clips=2",
        "train.steps=2",
        name="on",
    )
    WanTrainer(on).fit()
    ended, began = (
        {
            e["expert"]: e
            for e in read_events(layout_of(config).events)
            if e["event"] == "validation" and e["step"] == step
        }
        for config, step in ((first, 8), (on, 0))
    )
    for expert in ("high", "low"):
        assert began[expert]["loss"] == pytest.approx(ended[expert]["loss"], rel=1e-6)
        assert began[expert]["base"] == ended[expert]["base"]


def test_every_clip_and_timestep_has_its_own_noise(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = WanModelSetup(run_file("ti2v-5b", "validation={clips: 2, timesteps: 3}")).build()
    seeds: list[int] = []
    add_noise = Objective.add_noise_at_quantile

    def watched(objective: Objective, batch: Any, share: float, expert: Any, seed: int) -> Any:
        seeds.append(seed)
        return add_noise(objective, batch, share, expert, seed)

    monkeypatch.setattr(Objective, "add_noise_at_quantile", watched)
    measure(run)
    assert len(seeds) == 6 == len(set(seeds))


def test_the_average_of_embeddings_is_validated_too(run_file: RunFile, workshop: Path) -> None:
    config = run_file(
        "ti2v-5b",
        f"video_data.sources=[{{path: {workshop / 'named clips'}}}]",
        "embeddings=[{placeholder: <shape>, initial_text: a}]",
        "train.ema={}",
        "validation.clips=1",
    )
    run = WanModelSetup(config).build()
    before = measure(run, "ema")
    ema = run.state.embeddings.ema
    ema.load_state_dict({name: average + 1 for name, average in ema.state_dict().items()})
    assert measure(run, "ema") != before
    assert measure(run, "trained") == before
    WanTrainer(config).fit()
    layout = layout_of(config)
    averages = load_file(layout.state(6) / "embeddings_ema.safetensors")
    for suffix, vectors in (("_shape_ema", averages), ("_shape", None)):
        exported = WanModelEmbedding.from_file(layout.weights(6, suffix)).vectors
        assert torch.equal(exported, averages["shape"]) == (vectors is averages)


def test_clips_with_the_base_as_target_are_not_validated_on(
    run_file: RunFile, workshop: Path
) -> None:
    named, plain = workshop / "named clips", workshop / "clips"
    sources = f"video_data.sources=[{{path: {named}, target: base}}, {{path: {plain}}}]"
    run = WanModelSetup(run_file("ti2v-5b", sources, "validation.clips=100")).build()
    batches = run.validation_batches()
    assert 0 < len(batches) < len(run.dataset.clips)
    assert all(batch.is_prior is None for batch in batches)


def test_one_expert_can_be_initialized_from_a_file_and_the_other_as_usual(
    run_file: RunFile,
) -> None:
    first = run_file("t2v-a14b", "train.steps=2", "method.rank=3")
    WanTrainer(first).fit()
    layout = layout_of(first)
    low = layout.weights(2, "_low_noise")
    with safe_open(low, "pt") as file:  # both steps trained the other expert
        metadata = file.metadata()
    assert (metadata["onewan.steps"], metadata["onewan.expert_steps"]) == ("2", "0")
    assert metadata["onewan.base_model"] == "t2v-a14b"  # and not its path
    mixed = run_file("t2v-a14b", f"method={{kind: lora, rank: 2, init_from: [{low}]}}", name="m")
    experts = WanModelSetup(mixed).build().state.experts
    ranks = {
        name: {len(t) for key, t in trained.method.read().items() if "lora_A" in key}
        for name, trained in experts.items()
    }
    assert ranks == {"high": {2}, "low": {3}}
    assert experts["high"].method.starts_as_base and not experts["low"].method.starts_as_base
    copy = low.with_name("copy.safetensors")
    copy.write_bytes(low.read_bytes())
    for settings, complaint in (
        (
            ["per_expert.low.rank=4"],
            "per_expert.low.rank: has no effect, since the files of method.init_from decide it, "
            "got 4",
        ),
        (["model.experts=high"], f"{low} is for the low expert, which is not trained"),
        ([f"method.init_from=[{low}, {copy}]"], "two files are for the low expert"),
    ):
        wrong = run_file(
            "t2v-a14b", f"method={{kind: lora, init_from: [{low}]}}", *settings, name="wrong"
        )
        with pytest.raises(ConfigError, match=re.escape(complaint)):
            WanModelSetup(wrong).build()


def test_the_best_state_is_kept(run_file: RunFile) -> None:
    config = run_file(
        "t2v-a14b",
        "model.experts=high",
        "optimizer={name: sgd, lr: 300}",  # too large, so that the loss does not fall steadily
        "validation={clips: 2, every: 1}",
        "train={steps: 6, save_every: 3, keep_last: 1, keep_every: 3, keep_best: true}",
        "output.keep_last=1",
    )
    events: list[dict[str, Any]] = []
    WanTrainer(config, listen=recorder(events)).fit()
    losses = {e["step"]: e["loss"] for e in events if e["event"] == "validation" and e["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert [e["step"] for e in events if e["event"] == "best"][-1] == best
    assert layout_of(config).saved_steps() == [3, best, 6]
    assert list(layout_of(config).exported()) == [6]
    # A resumed run reads the best loss from the state.
    longer = run_file(
        "t2v-a14b",
        "model.experts=high",
        "optimizer={name: sgd, lr: 300}",
        "validation={clips: 2, every: 1}",
        "train={steps: 7, save_every: 3, keep_last: 1, keep_every: 3, keep_best: true}",
    )
    run = WanModelSetup(longer).build()
    newest = layout_of(config).state(6)
    run.state.load(newest, read_facts(newest))
    assert run.state.best == BestStep(step=best, loss=losses[best])


def test_schedule_free_weights_are_exported_as_validated(run_file: RunFile) -> None:
    config = run_file(
        "ti2v-5b",
        "optimizer={name: adamw_schedule_free, lr: 0.01}",
        "train.ema={}",
        "output.formats=[diffusers]",
    )
    WanTrainer(config).fit()
    layout = layout_of(config)
    assert sorted(p.name for p in layout.weights_dir.iterdir()) == [
        "run_000006.safetensors",
        "run_000006_ema.safetensors",
    ]
    run = WanModelSetup(config).build()
    folder = layout.state(6)
    run.state.load(folder, read_facts(folder))
    raw = run.state.experts["single"].method.read()
    with run.state.experts["single"].trainable.using("trained"):
        used = run.state.experts["single"].method.read()
    assert any(not torch.equal(raw[name], used[name]) for name in raw)
    again = run.state.experts["single"].method.read()
    assert all(torch.equal(raw[name], again[name]) for name in raw)
    averaged = load_file(layout.state(6) / "single_ema.safetensors")
    for suffix, weights in (("", used), ("_ema", averaged)):
        exported = load_file(layout.weights(6, suffix))
        for name, tensor in weights.items():
            plain = name.replace(".default", "")
            assert torch.equal(exported[f"transformer.{plain}"], tensor), (suffix, name)


def test_schedule_free_weights_are_sampled_as_exported(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_file(
        "ti2v-5b",
        "optimizer={name: adamw_schedule_free, lr: 0.01}",
        "output.formats=[diffusers]",
        *(f"sample.{k}={v}" for k, v in SMALL_SAMPLE.items()),
    )
    used: list[dict[str, torch.Tensor]] = []
    sample_to = WanModelSampler.sample_to

    def watched(sampler: WanModelSampler, *args: Any, **kwargs: Any) -> None:
        transformer = sampler.model.expert(VARIANTS["ti2v-5b"].experts[0])
        used.append(adapter_weights(transformer))
        sample_to(sampler, *args, **kwargs)

    monkeypatch.setattr(WanModelSampler, "sample_to", watched)
    WanTrainer(config).fit()
    layout = layout_of(config)
    assert layout.samples(6).joinpath("0.mp4").is_file()
    exported = load_file(layout.weights(6, ""))
    for name, tensor in used[-1].items():
        assert torch.equal(exported[f"transformer.{name}"], tensor), name
