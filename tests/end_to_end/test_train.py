"""Complete runs: the loss falls, the run folder has all files, and other programs can use them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from support.runs import SMALL_SAMPLE, RunFile, layout_of, recorder

from onewan.data.cache import EntryCache
from onewan.data.loader import StepBatches
from onewan.errors import CheckpointError, TrainingError
from onewan.files import remove
from onewan.media import probe
from onewan.model.forward import predict_velocity
from onewan.runs.control import request
from onewan.runs.event_file import read_events
from onewan.runs.events import Event, StepDone
from onewan.train.saved_state import read_facts
from onewan.train.setup import WanModelSetup
from onewan.train.step import train_step
from onewan.train.trainer import WanTrainer


def grid(events: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """First and last validation loss of each expert."""
    losses: dict[str, list[float]] = {}
    for event in events:
        if event["event"] == "validation":
            losses.setdefault(event["expert"], []).append(event["loss"])
    return {name: (values[0], values[-1]) for name, values in losses.items()}


@pytest.mark.parametrize("variant", ["t2v-a14b", "i2v-a14b", "ti2v-5b"])
def test_a_run_lowers_the_loss_and_fills_its_folder(
    run_file: RunFile, workshop: Path, variant: str
) -> None:
    side = 128 if variant == "ti2v-5b" else 64
    image = f", image: {workshop / 'clips' / 'still_square.png'}" if variant == "i2v-a14b" else ""
    config = run_file(
        variant,
        "train.steps=60",
        "train.save_every=30",
        "validation.clips=3",
        "train.batch_size=2",
        "optimizer.lr=0.01",
        "method.rank=16",
        f"sample.prompts=[{{prompt: a red square{image}}}]",
        *(f"sample.{k}={v}" for k, v in {"width": side, "height": side, "frames": 5}.items()),
        "sample.steps=2",
        "output.formats=[comfyui, diffusers, kohya, no_alpha]",
        "logging.tensorboard=true",
    )
    WanTrainer(config, run_file="# as given\n").fit()
    layout = layout_of(config)
    events = list(read_events(layout.events))
    for name, (first, last) in grid(events).items():
        assert last < 0.9 * first, name
    suffixes = [e.file_suffix for e in config.model.facts().experts]
    assert sorted(p.name for p in layout.weights_dir.iterdir()) == sorted(
        f"run_{step}{suffix}_{fmt}.safetensors"
        for step in ("000030", "000060", "best")
        for suffix in suffixes
        for fmt in ("comfyui", "diffusers", "kohya", "no_alpha")
    )
    video = probe(layout.samples(60) / "0.mp4")
    assert (video.width, video.height, video.frames_at(config.sample.fps)) == (side, side, 5)
    assert layout.run_file.read_text(encoding="utf-8") == "# as given\n"
    assert layout.resolved.is_file() and "started" in {e["event"] for e in events}
    assert list(layout.tensorboard.iterdir())
    assert sum(e["event"] == "step" for e in events) == 60


@pytest.mark.parametrize("variant", ["t2v-a14b", "i2v-a14b", "ti2v-5b"])
@pytest.mark.parametrize("fmt", ["comfyui", "diffusers", "kohya"])
def test_exported_files_give_the_output_of_the_training_model(
    run_file: RunFile, workshop: Path, variant: str, fmt: str
) -> None:
    """The exported files, loaded with diffusers, compared with the model of the run."""
    config = run_file(variant, "method.modules=[self_attention, ffn]", f"output.formats=[{fmt}]")
    WanTrainer(config).fit()
    layout = layout_of(config)
    run = WanModelSetup(config).build()
    folder = layout.state(6)
    run.state.load(folder, read_facts(folder))
    kind = WanImageToVideoPipeline if variant == "i2v-a14b" else WanPipeline
    pipeline = kind.from_pretrained(workshop / variant)
    batch = run.loader.validation_batches(run.dataset.clips, 2)[1]
    for name, trained in run.state.experts.items():
        path = layout.weights(6, trained.expert.file_suffix)
        second = trained.expert.component == "transformer_2"
        pipeline.load_lora_weights(str(path), load_into_transformer_2=second)
        loaded = getattr(pipeline, trained.expert.component)
        with torch.no_grad():
            ours, theirs = (
                predict_velocity(
                    model,
                    batch.latents,
                    torch.tensor([0.7]),
                    batch.text,
                    condition_BCFHW=batch.condition,
                )
                for model in (trained.transformer.eval(), loaded.eval())
            )
            loaded.disable_lora()
            base = predict_velocity(
                loaded,
                batch.latents,
                torch.tensor([0.7]),
                batch.text,
                condition_BCFHW=batch.condition,
            )
        assert float((ours - theirs).norm() / ours.norm()) < 1e-5, name
        assert float((ours - base).norm() / ours.norm()) > 1e-3, name  # the LoRA has an effect
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
        assert about["modelspec.architecture"] == "WAN-2.2/lora"
        assert (about["onewan.variant"], about["onewan.expert"]) == (variant, name)
        assert about["onewan.steps"] == "6" and about["onewan.dataset_digest"]


def test_accumulation_equals_one_large_batch(run_file: RunFile) -> None:
    """Three clips in one batch, in a batch of two and one of one, and one by one."""
    config = run_file("t2v-a14b", "wan_config.max_frames=5")
    results = []
    for sizes in ((3,), (2, 1), (1, 1, 1)):
        run = WanModelSetup(config).build()
        for parameter in run.state.experts["high"].method.parameters.values():
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
        every = run.loader.validation_batches(run.dataset.clips, 9)
        clips = [b for b in every if b.latents.shape[2] == 2][:3]
        batches, start = [], 0
        for size in sizes:
            part = clips[start : start + size]
            batches.append(
                replace(
                    part[0],
                    latents=torch.cat([b.latents for b in part]),
                    text=torch.cat([b.text for b in part]),
                    loss_weights=tuple(w for b in part for w in b.loss_weights),
                    timesteps=tuple(each for b in part for each in b.timesteps),
                    names=tuple(b.names[0] for b in part),
                    first_sample_index=start,
                )
            )
            start += size
        results.append(
            train_step(
                run,
                StepBatches(number=0, expert="high", batches=tuple(batches), global_size=3),
            )
        )
    for other in results[1:]:
        assert other.t == results[0].t
        assert other.loss == pytest.approx(results[0].loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(results[0].grad_norm, rel=1e-5)


def test_without_temporal_attention_training_mixes_no_frames(run_file: RunFile) -> None:
    """A change of one latent frame then changes the prediction for that frame only."""
    config = run_file("t2v-a14b", "wan_config.use_temporal_attention=false")
    run = WanModelSetup(config).build()
    transformer = run.bring_expert("high").transformer.train()
    batch = run.loader.validation_batches(run.dataset.clips, 1)[0]
    changed = batch.latents.clone()
    changed[:, :, 1] += 1
    t = torch.tensor([0.9])
    with torch.no_grad():
        a, b = (predict_velocity(transformer, x, t, batch.text) for x in (batch.latents, changed))
        moved = (a - b).abs().amax(dim=(0, 1, 3, 4))
        assert moved[1] > 1e-3 and moved[0] < 1e-6 and moved[2] < 1e-6
        one = predict_velocity(transformer, batch.latents[:, :, :1], t, batch.text)
        torch.testing.assert_close(one, a[:, :, :1], rtol=1e-4, atol=1e-5)
        transformer.eval()  # in evaluation mode, attention spans all frames
        a, b = (predict_velocity(transformer, x, t, batch.text) for x in (batch.latents, changed))
        assert (a - b).abs().amax(dim=(0, 1, 3, 4)).min() > 1e-5


def test_only_the_selected_layers_are_trained(run_file: RunFile) -> None:
    config = run_file("t2v-a14b", "wan_config.transformer_layers_to_train=[1]", "train.steps=2")
    WanTrainer(config).fit()
    names = load_file(layout_of(config).weights(2, "_high_noise"))
    assert names and all(name.startswith("diffusion_model.blocks.1.") for name in names)


def test_a_loss_that_is_not_finite_stops_the_run(run_file: RunFile, tmp_path: Path) -> None:
    config = run_file(
        "t2v-a14b", f"video_data.cache_dir={tmp_path / 'cache'}", "train.save_every=1"
    )
    events: list[dict[str, Any]] = []
    corrupted: list[str] = []

    def listen(event: Event) -> None:
        recorder(events)(event)
        if isinstance(event, StepDone) and event.step == 2:
            for path in (tmp_path / "cache" / "video").rglob("*.safetensors"):
                tensors = {k: v * float("nan") for k, v in load_file(path).items()}
                # As a VAE that overflows would write it: complete, with a digest that fits.
                EntryCache(tmp_path / "cache").save("video", path.stem, tensors, "")
                corrupted.append(path.name)

    with pytest.raises(
        TrainingError, match=r"step \d \((high|low) expert\): the loss is not finite"
    ):
        WanTrainer(config, listen=listen).fit()
    assert corrupted and events[-1]["event"] == "failed"
    last = [e["step"] for e in events if e["event"] == "step"][-1]
    assert layout_of(config).saved_steps()[-1] == last
    text = layout_of(config).events.read_text(encoding="utf-8").splitlines()[-1]
    assert any(
        name in json.loads(text)["error"]
        for name in ("red_square.mp4", ".webm", ".mov", ".avi", ".png")
    )


def test_save_and_sample_requests_are_acted_on_and_a_failed_sample_is_survived(
    run_file: RunFile,
) -> None:
    """Both are requested through the run folder; training continues after the failure."""
    config = run_file(
        "t2v-a14b",
        "train.steps=4",
        "sample.prompts=[a red square]",
        *("sample.width=64", "sample.height=64", "sample.frames=5", "sample.steps=1"),
    )
    events: list[dict[str, Any]] = []

    def listen(event: Event) -> None:
        recorder(events)(event)
        if isinstance(event, StepDone) and event.step == 2:
            request(layout_of(config), "save")
            request(layout_of(config), "sample")
        if isinstance(event, StepDone) and event.step == 3:
            # A file where the folder of the last sample should be: sampling has to fail.
            layout_of(config).samples(4).write_text("in the way", encoding="utf-8")

    WanTrainer(config, listen=listen).fit()
    assert [e["step"] for e in events if e["event"] == "saved"] == [2, 4]
    assert [e["step"] for e in events if e["event"] == "sampled"] == [2]
    assert any("sampling 'a red square' failed" in e.get("text", "") for e in events)
    assert events[-1]["event"] == "finished"


def test_one_set_of_videos_answers_a_request_at_a_step_where_sampling_is_due(
    run_file: RunFile,
) -> None:
    config = run_file(
        "ti2v-5b",
        "train.steps=4",
        "sample.every=2",
        *(f"sample.{k}={v}" for k, v in SMALL_SAMPLE.items()),
    )
    events: list[dict[str, Any]] = []

    def listen(event: Event) -> None:
        recorder(events)(event)
        if isinstance(event, StepDone) and event.step == 2:
            request(layout_of(config), "sample")

    WanTrainer(config, listen=listen).fit()
    assert [e["step"] for e in events if e["event"] == "sampled"] == [2, 4]
    steps = {e["step"] for e in read_events(layout_of(config).events) if e["event"] == "sampling"}
    assert steps == {2, 4}


def test_a_request_for_samples_without_prompts_is_reported(run_file: RunFile) -> None:
    config = run_file("ti2v-5b", "train.steps=2")
    events: list[dict[str, Any]] = []

    def listen(event: Event) -> None:
        recorder(events)(event)
        if isinstance(event, StepDone) and event.step == 1:
            request(layout_of(config), "sample")

    WanTrainer(config, listen=listen).fit()
    (warning,) = [e["text"] for e in events if e["event"] == "warning"]
    assert "sample.prompts is empty" in warning


def test_requests_to_an_earlier_process_are_not_acted_on(run_file: RunFile) -> None:
    config = run_file("ti2v-5b", "train.steps=2")
    WanTrainer(config).fit()
    request(layout_of(config), "stop")
    request(layout_of(config), "save")
    events: list[dict[str, Any]] = []
    longer = run_file("ti2v-5b", "train.steps=4")
    WanTrainer(longer, listen=recorder(events), resume=True).fit()
    assert [e["step"] for e in events if e["event"] == "saved"] == [4]


@pytest.mark.parametrize("deleted", ["tensorboard", "events.jsonl"])
def test_training_continues_when_a_log_is_deleted(run_file: RunFile, deleted: str) -> None:
    config = run_file("ti2v-5b", "train.steps=4", "logging.tensorboard=true")
    layout = layout_of(config)
    events: list[dict[str, Any]] = []

    def listen(event: Event) -> None:
        recorder(events)(event)
        if isinstance(event, StepDone) and event.step == 2:
            remove(layout.root / deleted)

    WanTrainer(config, listen=listen).fit()
    warnings = [e["text"] for e in events if e["event"] == "warning"]
    assert warnings and all(deleted.partition(".")[0] in text.lower() for text in warnings)
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 4]
    assert events[-1]["event"] == "finished"
    *_, last = read_events(layout.events)
    assert last["event"] == "finished"


def test_training_continues_when_the_listener_fails(run_file: RunFile) -> None:
    config = run_file("ti2v-5b", "train.steps=3")

    def listen(event: Event) -> None:
        if isinstance(event, StepDone):
            raise BrokenPipeError("nobody reads this any more")

    WanTrainer(config, listen=listen).fit()
    events = list(read_events(layout_of(config).events))
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3]
    (warning,) = [e["text"] for e in events if e["event"] == "warning"]
    assert "nobody reads this" in warning


def test_another_boundary_is_used_in_training_and_sampling(
    run_file: RunFile, workshop: Path, tmp_path: Path
) -> None:
    """For a base model with that boundary in its index, which is refused without the setting."""
    folder = tmp_path / "model"
    shutil.copytree(workshop / "t2v-a14b", folder)
    index = folder / "model_index.json"
    text = json.loads(index.read_text(encoding="utf-8"))
    index.write_text(json.dumps({**text, "boundary_ratio": 0.5}), encoding="utf-8")
    settings = [f"model.path={folder}", "train.steps=40", "train.switch_expert_every=1"]
    settings += ["train.timesteps={distribution: uniform, shift: 1}", "sample.prompts=[a]"]
    settings += [f"sample.{k}={v}" for k, v in {"width": 64, "height": 64, "frames": 5}.items()]
    with pytest.raises(CheckpointError, match=r"set model\.boundary to 0\.5"):
        WanTrainer(run_file("t2v-a14b", *settings)).fit()
    config = run_file("t2v-a14b", *settings, "model.boundary=0.5", "sample.steps=2", name="b")
    WanTrainer(config).fit()
    levels = {"high": list[float](), "low": list[float]()}
    for event in read_events(layout_of(config).events):
        if event["event"] == "step":
            levels[event["expert"]] += event["t"]
    assert 0.5 <= min(levels["high"]) < 0.8 and max(levels["high"]) > 0.8
    assert 0.2 < max(levels["low"]) < 0.5
    assert (layout_of(config).samples(40) / "0.mp4").is_file()


def test_lora_plus_trains_b_at_a_multiple_of_the_learning_rate(run_file: RunFile) -> None:
    """At first A has no gradient, since B is zero."""
    moved = []
    for ratio in (1, 16):
        config = run_file(
            "ti2v-5b",
            f"method={{kind: lora, rank: 2, lora_plus_ratio: {ratio}}}",
            "optimizer={name: sgd, lr: 0.01}",
            name=f"ratio-{ratio}",
        )
        run = WanModelSetup(config).build()
        train_step(run, run.loader.step(0, "single", 0))
        weights = run.state.experts["single"].method.read()
        moved.append(torch.cat([t.flatten() for n, t in weights.items() if "lora_B" in n]))
    assert moved[0].abs().max() > 0
    torch.testing.assert_close(moved[1], 16 * moved[0], rtol=1e-5, atol=0)


def test_output_dtype_changes_only_the_exported_files(run_file: RunFile) -> None:
    config = run_file("ti2v-5b", "train.steps=1", "output.dtype=bfloat16")
    WanTrainer(config).fit()
    state = load_file(layout_of(config).state(1) / "single.safetensors")
    exported = load_file(layout_of(config).weights(1))
    assert {t.dtype for n, t in exported.items() if "lora" in n} == {torch.bfloat16}
    assert {t.dtype for t in state.values()} == {torch.float32}


def test_averages_and_learning_rates_follow_each_trainables_own_steps(
    run_file: RunFile, workshop: Path
) -> None:
    config = run_file(
        "t2v-a14b",
        f"video_data.sources=[{{path: {workshop / 'named clips'}}}]",
        "embeddings=[{placeholder: <shape>, initial_text: a}]",
        "train={steps: 6, switch_expert_every: 1, schedule: linear, ema: {decay: 0.9}}",
        "optimizer.lr=0.01",
    )
    run = WanModelSetup(config).build()
    trainables = {trainable.name: trainable for trainable in run.state.trainables}
    expected = {name: trainable.ema.state_dict() for name, trainable in trainables.items()}
    steps = dict.fromkeys(trainables, 0)
    for number in range(6):
        name, before = run.schedule.expert_at(number)
        metrics = train_step(run, run.loader.step(number, name, before))
        assert metrics.lr == pytest.approx(0.01 * (1 - before / 3))
        assert run.lr_factor("embeddings", number) == pytest.approx(1 - number / 6)
        for moved in (name, "embeddings"):
            decay = min(0.9, (1 + steps[moved]) / (10 + steps[moved]))
            now = trainables[moved].weights.parameters
            for key, average in expected[moved].items():
                average.lerp_(now[key].detach(), 1 - decay)
            steps[moved] += 1
    for name, averages in expected.items():
        for key, average in trainables[name].ema.state_dict().items():
            torch.testing.assert_close(average, averages[key], rtol=1e-5, atol=1e-7)
