"""Wan 2.2 trains in a real OneTrainer, and as onewan itself trains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from support.onetrainer_runs import Lab, concept_of, config_of, sample_of

from onewan.adapters.lora import apply_lora
from onewan.arithmetic.clip_timesteps import ALL_TIMESTEPS
from onewan.config.schema import TrainSection
from onewan.data.clip import Clip
from onewan.data.decode import decode
from onewan.data.encode import encode_frames
from onewan.data.loader import Batch, StepBatches, condition_channels
from onewan.formats.lora_files import read_adapter
from onewan.media import probe, read_frames
from onewan.model.forward import predict_velocity
from onewan.model.load import WanModelLoader
from onewan.model.text import pad_text
from onewan.onetrainer.settings import SEED
from onewan.train.objective import velocity_loss
from onewan.train.run import objective_of

VARIANTS = ("t2v-a14b", "i2v-a14b", "ti2v-5b")
LORA_FORMATS = ("DIFFUSERS_LORA", "KOHYA_LORA", "ORIGINAL_LORA", "COMFY_LORA")


def sample_for(variant: str, clips: Path) -> dict[str, Any]:
    image = str(clips / "rabbit_portrait.png") if variant == "i2v-a14b" else ""
    return sample_of(base_image_path=image)


def method_config(method: str, folder: Path) -> dict[str, Any]:
    if method == "LORA":
        return {}
    if method == "FINE_TUNE":
        return {
            "training_method": "FINE_TUNE",
            "output_model_format": "DIFFUSERS",
            "output_model_destination": str(folder / "out" / "model"),
        }
    return {
        "training_method": "EMBEDDING",
        "output_model_format": "SAFETENSORS",
        "output_model_destination": str(folder / "out" / "fox.safetensors"),
        "embedding_learning_rate": 1e-2,
        "embedding": {
            "uuid": "11111111-2222-3333-4444-555555555555",
            "placeholder": "rabbit",
            "initial_embedding_text": "animal",
            "token_count": 2,
            "train": True,
        },
    }


@pytest.mark.parametrize("method", ["LORA", "FINE_TUNE", "EMBEDDING"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_method_trains_samples_and_resumes_exactly(
    lab: Lab, tiny, clips, tmp_path, variant, method
):
    """Caches, trains both experts, validates, samples, backs up and saves; the second half of an
    interrupted run equals that of an uninterrupted one."""
    validation = concept_of(clips, name="held", type="VALIDATION")

    def config(folder: Path, **changes: Any) -> dict[str, Any]:
        return config_of(
            folder,
            tiny(variant),
            clips,
            concepts=[concept_of(clips), validation],
            samples=[sample_for(variant, clips)],
            validation=True,
            validate_after=1,
            validate_after_unit="EPOCH",
            dropout_probability=0.1 if method == "LORA" else 0.0,
            **method_config(method, folder),
            **changes,
        )

    whole = lab.train(tmp_path / "whole", config(tmp_path / "whole", epochs=4))
    assert whole.code == 0, whole.log[-4000:]
    assert "Traceback" not in whole.log, whole.log[-6000:]
    trained = [s for s in whole.steps if not s["validation"]]
    held = [s for s in whole.steps if s["validation"]]
    assert len(trained) == 12 and held
    boundary = {"t2v-a14b": 0.875, "i2v-a14b": 0.9}.get(variant)
    if boundary:
        above = [s["t"][0] >= boundary for s in trained]
        assert above == [True, False] * 6
        assert [t >= boundary for t in held[0]["t"]] == [True] * 4 + [False] * 4
    else:
        assert len(held[0]["t"]) == 4
    videos = whole.samples()
    assert videos
    assert read_frames(videos[-1], [0.0]).shape == (1, 64, 64, 3)
    interval = probe(videos[0]).frame_interval
    assert interval == pytest.approx(1 / (24 if variant == "ti2v-5b" else 16), abs=1e-4)

    first = lab.train(tmp_path / "cut", config(tmp_path / "cut", epochs=2))
    assert first.losses == whole.losses[:6]
    second = lab.train(
        tmp_path / "cut", config(tmp_path / "cut", epochs=4, continue_last_backup=True)
    )
    assert second.code == 0, second.log[-4000:]
    assert second.losses == whole.losses[6:]
    for path in whole.outputs():
        if path.suffix == ".safetensors":
            other = tmp_path / "cut" / path.relative_to(tmp_path / "whole")
            ours, theirs = load_file(path), load_file(other)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[k], theirs[k]) for k in ours), path.name


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_loss_equals_onewans_own(lab: Lab, tiny, clips, tmp_path, variant, monkeypatch):
    """The same clip, decoded, encoded, noised and compared by onewan alone."""
    dump = tmp_path / "first.pt"
    monkeypatch.setenv("RECORDER_DUMP", str(dump))
    config = config_of(
        tmp_path, tiny(variant), clips, epochs=1, samples=[sample_for(variant, clips)]
    )
    done = lab.train(tmp_path, config)
    assert done.code == 0, done.log[-3000:]
    seen = torch.load(dump, weights_only=True)

    model = WanModelLoader().load(tiny(variant), variant)
    path = Path(seen["path"][0])
    shape = seen["batch"]["latent_image"].shape
    frames = (shape[2] - 1) * 4 + 1
    size = shape[4] * model.spatial_compression, shape[3] * model.spatial_compression
    info = probe(path)
    fps = float(model.variant.fps)
    slack = max(0.0, info.last - info.start - (frames - 1) / fps)
    whole = int(slack * 0.5 / info.frame_interval + 1e-6)
    clip = Clip(
        path=path,
        name=path.name,
        captions=("",),
        kind=info.kind,
        start=info.start + whole * info.frame_interval,
        fps=fps,
        frames=frames,
        size=size,
        source_size=info.shown_size,
        repeats=1,
    )
    takes_frames = "condition" in model.conditioning.parts("first")
    entry = encode_frames(model, decode(clip).frames, "float32", with_condition=takes_frames)
    assert torch.equal(entry["latents"], seen["batch"]["latent_image"][0])
    text = pad_text([model.encode_prompt(seen["prompt"][0])])
    assert torch.allclose(text, seen["batch"]["text_padded"], atol=1e-6)
    given = model.conditioning.draw(frames, seed=SEED, step=0, index=0)
    batch = Batch(
        latents=entry["latents"][None],
        text=text,
        captions=tuple(seen["prompt"]),
        condition=condition_channels(model.conditioning, [entry], [given]),
        mask=None,
        loss_weights=(1.0,),
        timesteps=(ALL_TIMESTEPS,),
        is_prior=None,
        names=(path.name,),
        given=(given,),
        last_frame=None,
        first_sample_index=0,
    )
    train = TrainSection.model_validate({"timesteps": {"distribution": "uniform", "shift": 5.0}})
    expert = model.variant.experts[0]
    step = StepBatches(number=0, expert=expert.name, batches=(batch,), global_size=1)
    objective = objective_of(train, model.variant, model.variant.experts)
    sample = objective.add_noise(batch, step, expert)
    assert torch.equal(sample.t, seen["t"]) and torch.equal(sample.target, seen["target"])
    with torch.no_grad():
        predicted = predict_velocity(
            model.expert(expert),
            sample.x,
            sample.t,
            text,
            condition_BCFHW=batch.condition,
            clean_frames_BF=sample.clean_frames,
        )
    loss = velocity_loss(predicted, sample, train.loss).item()
    assert loss == pytest.approx(done.losses[0], rel=1e-5)


@pytest.fixture(scope="module")
def backup(lab: Lab, tiny, clips, tmp_path_factory) -> Path:
    """A short LoRA run, as a user starts it, whose backup all formats are made from."""
    folder = tmp_path_factory.mktemp("backup")
    config = config_of(folder, tiny("t2v-a14b"), clips, epochs=1)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    done = lab.run("scripts/train.py", "--config-path", str(folder / "config.json"))
    assert "Traceback" not in done.stderr
    (backup,) = (folder / "ws" / "backup").iterdir()
    return backup


@pytest.mark.parametrize("format", LORA_FORMATS)
def test_every_lora_format_loads_in_diffusers_with_the_same_weights(
    lab: Lab, tiny, tmp_path, backup, format
):
    """By OneTrainer's convert tool, from a backup; each expert's file, applied by diffusers. The
    tool itself reads the file unchanged, too."""
    out, again = tmp_path / "out.safetensors", tmp_path / "again" / "out.safetensors"
    lab.convert(backup, out, tiny("t2v-a14b"), format)
    lab.convert(out, again, tiny("t2v-a14b"), format)
    raw = load_file(backup / "lora" / "lora.safetensors")
    for part, noise in (("transformer", "high"), ("transformer_2", "low")):
        file = tmp_path / f"out_{noise}_noise.safetensors"
        first, second = load_file(file), load_file(again.with_name(file.name))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[k], second[k]) for k in first)
        if format == "ORIGINAL_LORA":  # bare names, which diffusers tells by ComfyUI's prefix
            tensors = {f"diffusion_model.{k}": v for k, v in first.items()}
            save_file(tensors, file)
        transformer = WanTransformer3DModel.from_pretrained(tiny("t2v-a14b"), subfolder=part)
        pipeline = WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=diffusers.AutoencoderKLWan.from_pretrained(tiny("t2v-a14b"), subfolder="vae"),
            scheduler=diffusers.UniPCMultistepScheduler(),
            transformer=transformer,
        )
        before = {n: p.clone() for n, p in transformer.named_parameters()}
        pipeline.load_lora_weights(str(tmp_path), weight_name=file.name)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        after = dict(transformer.named_parameters())
        modules = {
            k.rpartition(".lora_down")[0] for k in raw if k.startswith(f"{part}.") and "down" in k
        }
        assert modules
        for module in modules:
            name = module.removeprefix(f"{part}.") + ".weight"
            down, up = raw[f"{module}.lora_down.weight"], raw[f"{module}.lora_up.weight"]
            scale = float(raw[f"{module}.alpha"]) / len(down)
            assert torch.allclose(after[name] - before[name], scale * up @ down, atol=1e-6), name


@pytest.mark.parametrize("format", ["DIFFUSERS", "ORIGINAL_TRANSFORMER"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fine_tuned_models_load_in_diffusers(lab: Lab, tiny, clips, tmp_path, variant, format):
    destination = tmp_path / "out" / ("model" if format == "DIFFUSERS" else "model.safetensors")
    config = config_of(
        tmp_path,
        tiny(variant),
        clips,
        training_method="FINE_TUNE",
        epochs=1,
        samples=[sample_for(variant, clips)],
        output_model_format=format,
        output_model_destination=str(destination),
    )
    done = lab.train(tmp_path, config)
    assert done.code == 0, done.log[-3000:]
    trained = done.backups()[-1]
    parts = ["transformer"] if variant == "ti2v-5b" else ["transformer", "transformer_2"]
    for part in parts:
        base = WanTransformer3DModel.from_pretrained(tiny(variant), subfolder=part)
        if format == "DIFFUSERS":
            saved = WanTransformer3DModel.from_pretrained(destination, subfolder=part)
        else:
            suffix = (
                "" if len(parts) == 1 else {"transformer": "_high_noise"}.get(part, "_low_noise")
            )
            saved = WanTransformer3DModel.from_single_file(
                str(destination.with_name(f"model{suffix}.safetensors")),
                config=str(tiny(variant)),
                subfolder=part,
            )
        held = WanTransformer3DModel.from_pretrained(trained, subfolder=part)
        ours, theirs = saved.state_dict(), held.state_dict()
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
        changed = base.state_dict()
        assert any(not torch.equal(ours[k], changed[k]) for k in ours)


CHANGES: dict[str, dict[str, Any]] = {
    "uncached": {"latent_caching": False, "dataloader_threads": 2},
    "batches": {"batch_size": 2, "gradient_accumulation_steps": 2, "epochs": 4},
    "bfloat16": {"train_dtype": "BFLOAT_16"},
    "float8": {"train_dtype": "BFLOAT_16", "both": {"weight_dtype": "FLOAT_8"}},
    "int8": {"train_dtype": "BFLOAT_16", "both": {"weight_dtype": "INT_W8A8"}},
    "offloaded": {"both": {"offload_fraction": 0.5, "activation_offloading": True}},
    "masked": {"masked_training": True},
    "prior": {"concepts": "prior"},
    "one expert stops": {"high": {"stop_training_after": 1, "stop_training_after_unit": "EPOCH"}},
    "no placeholder": {
        "training_method": "EMBEDDING",
        "embedding": {"uuid": "x", "placeholder": "<never>", "initial_embedding_text": "animal"},
        "embedding_learning_rate": 1e-3,
        "output_model_format": "SAFETENSORS",
    },
    "one expert": {"low": {"train": False}},
    "captions dropped": {"text": {"dropout_probability": 0.5}},
    "blocks": {"wan_layers": "0"},
    "own low rank": {"wan_low_lora_rank": 4, "wan_low_lora_alpha": 2.0},
    "within frames": {"wan_use_temporal_attention": False},
    "dora": {"lora_decompose": True},
    "loha": {"peft_type": "LOHA"},
    "lokr": {"peft_type": "LOKR"},
    "oft": {"peft_type": "OFT_2", "oft_block_size": 8},
    "ema": {"ema": "CPU"},
    "huber": {"mse_strength": 0.5, "huber_strength": 0.5},
    "embeddings beside": {"additional_embeddings": "fox"},
    "one size": {"aspect_ratio_bucketing": False},
    "colours": {"concepts": "colours"},
    "dynamic shift": {"dynamic_timestep_shifting": True},
    "webm": {"samples": [sample_of(wan_format="webm")]},
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_option_trains_samples_and_saves(lab: Lab, tiny, clips, tmp_path, name):
    """Each trains to the end, samples and saves, without a traceback."""
    changes = dict(CHANGES[name])
    config = config_of(tmp_path, tiny("t2v-a14b"), clips)
    for key in ("transformer", "transformer_2"):
        config[key] |= changes.get("both", {})
    config["transformer_2"] |= changes.pop("low", {})
    config["transformer"] |= changes.pop("high", {})
    config["text_encoder"] |= changes.pop("text", {})
    changes.pop("both", None)
    if changes.get("concepts") == "prior":
        changes["concepts"] = [concept_of(clips, type="PRIOR_PREDICTION")]
    if changes.get("concepts") == "colours":
        switches = ("brightness", "contrast", "saturation", "hue", "flip", "rotate")
        image = {f"enable_random_{switch}": True for switch in switches}
        strengths = {f"random_{s}_max_strength": 0.2 for s in switches[:4]}
        image |= strengths | {"enable_crop_jitter": True, "random_rotate_max_angle": 5.0}
        changes["concepts"] = [concept_of(clips, image=image, image_variations=2)]
    if name == "embeddings beside":
        entry = {"placeholder": "rabbit", "initial_embedding_text": "animal", "train": True}
        changes["additional_embeddings"] = [{"uuid": "abcdef", **entry}]
    if name == "masked":
        folder = tmp_path / "clips"
        shutil.copytree(clips, folder)
        for number, file in enumerate(sorted(folder.glob("*.mp4"))):
            info = probe(file)
            mask = np.zeros((info.height, info.width), np.uint8)
            mask[:, : info.width // 2] = 255
            from PIL import Image

            suffix = "-masklabel.png" if number else ".mask.png"
            Image.fromarray(mask).save(file.with_name(f"{file.stem}{suffix}"))
        changes["concepts"] = [concept_of(folder)]
    config |= changes
    done = lab.train(tmp_path, config)
    assert done.code == 0, done.log[-4000:]
    assert "Traceback" not in done.log, done.log[-6000:]
    assert done.outputs() and done.samples("webm" if name == "webm" else "mp4")
    assert all(np.isfinite(done.losses))
    if name == "prior":  # what it should predict is what an untrained model predicts
        assert done.losses[0] == pytest.approx(0, abs=1e-6)
    if name == "one expert stops":  # the other has all steps of the second epoch
        assert [s["t"][0] >= 0.875 for s in done.steps] == [True, False, True] + [False] * 3
    if name == "one expert":
        assert [p.name for p in done.outputs()] == ["lora_high_noise.safetensors"]
    if name == "own low rank":
        ranks = {
            p.name: next(len(v) for k, v in load_file(p).items() if "lora_A" in k)
            for p in done.outputs()
        }
        assert list(ranks.values()) == [2, 4]
    if name == "uncached":
        cached = lab.train(
            tmp_path / "cached", config_of(tmp_path / "cached", tiny("t2v-a14b"), clips)
        )
        # OneTrainer deals the clips in another order where nothing is cached.
        assert done.steps[0]["names"] == cached.steps[0]["names"]
        assert done.losses[0] == pytest.approx(cached.losses[0], rel=1e-6)


@pytest.mark.parametrize("variant", ["i2v-a14b", "ti2v-5b"])
def test_frames_are_given_in_the_shares_of_the_config(lab: Lab, tiny, clips, tmp_path, variant):
    """With clips and a picture in one cache, and without a cache."""
    image = str(clips / "rabbit_portrait.png")
    shares = "first 0.25, both 0.25, last 0.25, none 0.25"

    def trained(name: str, **changes: object):
        sample = sample_of(base_image_path=image, wan_last_image_path=image)
        config = config_of(tmp_path / name, tiny(variant), clips, samples=[sample], epochs=3)
        done = lab.train(tmp_path / name, config | {"wan_condition_shares": shares} | changes)
        assert done.code == 0 and "Traceback" not in done.log, done.log[-6000:]
        assert done.outputs() and done.samples("mp4") and all(np.isfinite(done.losses))
        return done

    cached, online = trained("cached"), trained("online", latent_caching=False)
    assert cached.steps[0]["names"] == online.steps[0]["names"]
    assert cached.losses[0] == pytest.approx(online.losses[0], rel=1e-6)
    assert trained("first", wan_condition_shares="").losses != cached.losses


def test_unusable_settings_are_reported_all_at_once(lab: Lab, tiny, clips, tmp_path):
    config = config_of(
        tmp_path, tiny("t2v-a14b"), clips, frames="many", mae_strength=1.0, wan_layers="x"
    )
    done = lab.train(tmp_path, config)
    assert done.code != 0
    for name in ("frames: is 'many'", "mae_strength: is 1.0", "wan_layers: is 'x'"):
        assert name in done.log


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora_alpha": 4.0},
    "dora": {"lora_decompose": True},
    "loha": {"peft_type": "LOHA"},
    "lokr": {"peft_type": "LOKR", "lokr_dim": 2},
    "oft": {"peft_type": "OFT_2", "oft_block_size": 8},
}


@pytest.mark.parametrize("kind", KINDS)
def test_exported_adapters_predict_what_onetrainer_predicted(
    lab: Lab, tiny, clips, tmp_path, kind, monkeypatch
):
    """A prediction of OneTrainer's, again by onewan with the file that was exported."""
    dump = tmp_path / "seen.pt"
    monkeypatch.setenv("RECORDER_DUMP", str(dump))
    monkeypatch.setenv("RECORDER_DUMP_STEP", "4")
    model = tiny("t2v-a14b")
    config = config_of(tmp_path, model, clips, learning_rate=1e-2, **KINDS[kind])
    # The last two steps change nothing, so that what is saved is what step 4 was predicted with.
    config |= {"epochs": 2, "transformer_2": {**config["transformer_2"], "train": False}}
    config |= {"transformer": {**config["transformer"], "stop_training_after": 1}}
    config["transformer"]["stop_training_after_unit"] = "EPOCH"
    done = lab.train(tmp_path, config)
    assert done.code == 0 and "Traceback" not in done.log, done.log[-4000:]
    seen = torch.load(dump, weights_only=True)
    (file,) = done.outputs()
    held = WanModelLoader().load(model, "t2v-a14b")
    (expert,) = [e for e in held.variant.experts if e.name == "high"]
    transformer = held.expert(expert)

    def predicted():
        with torch.no_grad():
            return predict_velocity(transformer, seen["x"], seen["t"], seen["batch"]["text_padded"])

    before = predicted()
    apply_lora(transformer, read_adapter(file).modules, "exported")
    after = predicted()
    moved = (seen["predicted"] - before).norm()
    assert moved > 1e-3 * before.norm()
    assert (after - seen["predicted"]).norm() < 1e-3 * moved


def test_the_export_command_writes_the_weights_of_a_backup(
    lab: Lab, tiny, clips, tmp_path, backup, capsys
):
    from onewan.cli import main

    raw = load_file(backup / "lora" / "lora.safetensors")
    for format in ("comfyui", "diffusers", "kohya"):
        out = tmp_path / format / "fox.safetensors"
        assert main(["onetrainer", "export", str(backup), str(out), "--to", format]) == 0
        for part, noise in (("transformer", "high"), ("transformer_2", "low")):
            file = read_adapter(out.with_name(f"fox_{noise}_noise.safetensors"))
            for module, adapter in file.modules.items():
                name = f"{part}.{module}"
                down, up = raw[f"{name}.lora_down.weight"], raw[f"{name}.lora_up.weight"]
                expected = float(raw[f"{name}.alpha"]) / len(down) * up @ down
                assert torch.allclose(adapter.difference(), expected, atol=1e-7)
    tuned = lab.train(
        tmp_path / "tuned",
        config_of(
            tmp_path / "tuned",
            tiny("ti2v-5b"),
            clips,
            epochs=1,
            **method_config("FINE_TUNE", tmp_path),
        ),
    )
    out = tmp_path / "tuned.safetensors"
    assert main(["onetrainer", "export", str(tuned.backups()[-1]), str(out), "--to", "single"]) == 0
    theirs = WanTransformer3DModel.from_pretrained(tuned.backups()[-1], subfolder="transformer")
    ours = WanTransformer3DModel.from_single_file(
        str(out), config=str(tiny("ti2v-5b")), subfolder="transformer"
    )
    assert all(torch.equal(ours.state_dict()[k], v) for k, v in theirs.state_dict().items())
    taught = lab.train(
        tmp_path / "taught",
        config_of(
            tmp_path / "taught",
            tiny("ti2v-5b"),
            clips,
            epochs=1,
            **method_config("EMBEDDING", tmp_path),
        ),
    )
    out = tmp_path / "word.safetensors"
    assert main(["onetrainer", "export", str(taught.backups()[-1]), str(out)]) == 0
    assert load_file(out)["umt5xxl"].shape[0] == 2
    assert main(["onetrainer", "export", str(tmp_path), str(out)]) == 1
    assert "is not a backup" in capsys.readouterr().err
