"""OneTrainer's configs as run files: every key accounted for, and the same meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.onetrainer_configs import DEFAULTS
from support.tiny_models import TinyModels

from onewan.cli import main
from onewan.config.load import load_run
from onewan.config.schema import ResolvedRun
from onewan.demo.clips import write_clips
from onewan.errors import ConfigError
from onewan.importing import (
    ROWS,
    Imported,
    data,
    import_config,
    looks_like_onetrainer,
    method,
    output,
)
from onewan.importing.table import flatten, value_at
from onewan.onetrainer.install import overlay

T2V = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.mp4").write_bytes(b"")
        (folder / f"{number}.txt").write_text("a fox", "utf-8")
    (folder / "0-masklabel.png").write_bytes(b"")
    return folder


def config_of(clips: Path, **changes: Any) -> dict[str, Any]:
    return {
        "__version": 11,
        "model_type": "WAN_2_2",
        "training_method": "LORA",
        "base_model_name": T2V,
        "train_dtype": "BFLOAT_16",
        "output_model_format": "COMFY_LORA",
        "concepts": [{"path": str(clips), "name": "fox"}],
        "samples": [],
        "epochs": 10,
        "learning_rate_warmup_steps": 0,
        **changes,
    }


def imported(tmp_path: Path, config: dict[str, Any], name: str = "config.json", **how: Any):
    path = tmp_path / name
    path.write_text(json.dumps(config), "utf-8")
    return import_config(path, **how)


def run_of(tmp_path: Path, found: Imported) -> ResolvedRun:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(found.document), "utf-8")
    return load_run(path)


def test_every_key_of_onetrainer_is_accounted_for_once(tmp_path, clips):
    """All that OneTrainer knows, given with its defaults."""
    train = {**DEFAULTS["train"], **config_of(clips)}
    train["concepts"] = [{**DEFAULTS["concept"], "path": str(clips)}]
    train["samples"] = [{**DEFAULTS["sample"], "prompt": "a fox"}]
    train["additional_embeddings"] = [{**DEFAULTS["embedding"], "placeholder": "<fox>"}]
    found = imported(tmp_path, train)
    keys = [entry.key for entry in found.entries]
    assert len(keys) == len(set(keys))
    expected = {k for k, _ in flatten(train) if not k.startswith(("cloud", "secrets"))}
    assert expected <= set(keys)
    assert not [entry for entry in found.entries if entry.outcome == "unknown"]
    assert all(entry.note for entry in found.entries)


def test_the_tables_have_onetrainers_own_defaults():
    """A key that a config leaves out means there what it means here."""
    tables = {
        "train": ROWS,
        "concept": data.CONCEPT_ROWS,
        "sample": (*output.PROMPT_ROWS, *output.SAMPLING_ROWS),
        "embedding": method.EMBEDDING_ROWS,
    }
    for kind, rows in tables.items():
        for row in rows:
            if row.key != "model_type":  # a config without one is refused
                assert value_at(DEFAULTS[kind], row.key) == row.default, row.key


CARRIED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"epochs": 3, "batch_size": 2}, {"train.steps": 9, "train.batch_size": 2}),
    ({"gradient_accumulation_steps": 2, "epochs": 4}, {"train.steps": 12, "train.accumulation": 2}),
    ({"learning_rate": 2e-4}, {"optimizer.lr": 2e-4}),
    (
        {"learning_rate": 2e-4, "transformer_2": {"learning_rate": 1e-4}},
        {"optimizer.lr": 2e-4, "per_expert.low.lr": 1e-4},
    ),
    (
        {"learning_rate": 1e-4, "learning_rate_scaler": "BATCH", "batch_size": 4, "epochs": 4},
        {"optimizer.lr": 2e-4},
    ),
    ({"transformer_2": {"train": False}}, {"model.experts": "high"}),
    ({"transformer": {"train": False}}, {"model.experts": "low"}),
    ({"lora_rank": 8, "lora_alpha": 4.0}, {"method.rank": 8, "method.alpha": 4.0}),
    ({"lora_decompose": True}, {"method.kind": "dora"}),
    ({"peft_type": "LOHA"}, {"method.kind": "loha"}),
    (
        {"peft_type": "LOKR", "lokr_dim": 5, "lokr_decompose_factor": 4},
        {"method.kind": "lokr", "method.rank": 5, "method.factor": 4},
    ),
    ({"peft_type": "OFT_2", "oft_block_size": 16}, {"method.kind": "oft", "method.block_size": 16}),
    ({"wan_low_lora_rank": 4}, {"per_expert.low.rank": 4}),
    ({"layer_filter": "attn1,ffn"}, {"method.modules": ("self_attention", "ffn")}),
    ({"layer_filter": "blocks"}, {"method.modules": ("blocks.*",)}),
    ({"training_method": "FINE_TUNE"}, {"method.kind": "fine_tune", "method.modules": ("all",)}),
    (
        {"training_method": "FINE_TUNE", "transformer": {"weight_dtype": "BFLOAT_16"}},
        {"method.weights": "stochastic"},
    ),
    ({"frames": "81"}, {"wan_config.max_frames": 81}),
    ({"wan_layers": "0-2, 5"}, {"wan_config.transformer_layers_to_train": (0, 1, 2, 5)}),
    (
        {"wan_high_share": "0.25", "wan_expert_block": 7},
        {"train.high_expert_share": 0.25, "train.switch_expert_every": 7},
    ),
    ({"resolution": "512"}, {"video_data.resolution": (512 * 512,)}),
    ({"resolution": "512,832x480"}, {"video_data.resolution": (512 * 512, "832x480")}),
    (
        {"resolution": "512", "aspect_ratio_bucketing": False},
        {"video_data.resolution": ("512x512",)},
    ),
    (
        {
            "timestep_distribution": "LOGIT_NORMAL",
            "noising_bias": 0.5,
            "noising_weight": 0.2,
            "timestep_shift": 3.0,
        },
        {
            "train.timesteps.distribution": "logit_normal",
            "train.timesteps.mean": 0.5,
            "train.timesteps.std": 1.2,
            "train.timesteps.shift": 3.0,
        },
    ),
    ({"dynamic_timestep_shifting": True}, {"train.timesteps.shift_by_tokens": True}),
    (
        {"loss_weight_fn": "MIN_SNR_GAMMA", "loss_weight_strength": 3.0},
        {"train.loss.weighting.kind": "min_snr", "train.loss.weighting.gamma": 3.0},
    ),
    (
        {"mse_strength": 0.0, "huber_strength": 1.0, "huber_delta": 0.5},
        {"train.loss.kind": "huber", "train.loss.delta": 0.5},
    ),
    ({"ema": "GPU", "ema_decay": 0.99}, {"train.ema.decay": 0.99, "train.ema.offload": False}),
    ({"clip_grad_norm": None}, {"train.max_grad_norm": None}),
    (
        {"learning_rate_scheduler": "COSINE", "learning_rate_min_factor": 0.1},
        {"train.schedule.kind": "cosine", "train.schedule.end_factor": 0.1},
    ),
    ({"learning_rate_warmup_steps": 10}, {"train.warmup_steps": 5}),
    ({"learning_rate_warmup_steps": 0.2}, {"train.warmup_steps": 6}),
    (
        {"optimizer": {"optimizer": "PRODIGY", "d_coef": 0.5}, "learning_rate": 1.0},
        {"optimizer.name": "prodigy", "optimizer.d_coef": 0.5},
    ),
    (
        {"optimizer": {"optimizer": "ADAMW", "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.1}},
        {"optimizer.betas": (0.8, 0.9), "optimizer.weight_decay": 0.1},
    ),
    (
        {"masked_training": True, "unmasked_weight": 0.3},
        {"video_data.masks": True, "train.loss.unmasked_weight": 0.3},
    ),
    ({"latent_caching": False}, {"video_data.cache": False}),
    ({"text_encoder": {"dropout_probability": 0.1}}, {"train.caption_dropout": 0.1}),
    ({"transformer": {"gradient_checkpointing": False}}, {"memory.gradient_checkpointing": False}),
    ({"backup_after": 2, "backup_after_unit": "EPOCH"}, {"train.save_every": 12}),
    ({"backup_after": 5, "backup_after_unit": "MINUTE"}, {"train.save_every_minutes": 5.0}),
    ({"save_every": 7, "save_every_unit": "STEP"}, {"train.save_every": 7}),
    (
        {"output_model_format": "KOHYA_LORA", "output_dtype": "BFLOAT_16"},
        {"output.formats": ("kohya",), "output.dtype": "bfloat16"},
    ),
    ({"output_model_destination": "models/fox.safetensors"}, {"output.name": "fox"}),
    ({"wan_boundary": 0.8}, {"model.boundary": 0.8}),
    ({"train_dtype": "FLOAT_32"}, {"model.dtype": "float32"}),
]


@pytest.mark.parametrize(("changes", "expected"), CARRIED, ids=[str(c)[:60] for c, _ in CARRIED])
def test_a_setting_becomes_the_field_with_the_same_meaning(tmp_path, clips, changes, expected):
    config = run_of(tmp_path, imported(tmp_path, config_of(clips, **changes)))
    for place, value in expected.items():
        node: Any = config
        for part in place.split("."):
            node = getattr(node, part)
        assert node == value, place


def test_concepts_become_sources_and_samples_become_prompts(tmp_path, clips):
    concepts = [
        {"path": str(clips), "balancing": 3.0, "loss_weight": 0.5},
        {
            "path": str(clips),
            "type": "PRIOR_PREDICTION",
            "balancing": 12,
            "balancing_strategy": "SAMPLES",
        },
        {"path": str(clips), "type": "VALIDATION"},
        {"path": str(clips), "enabled": False},
    ]
    samples = [
        {
            "prompt": "a fox",
            "frames": 80,
            "width": 500,
            "height": 300,
            "cfg_scale": 4.0,
            "wan_low_cfg_scale": 3.0,
            "seed": 7,
        },
        {"prompt": "off", "enabled": False},
    ]
    found = imported(
        tmp_path,
        config_of(clips, concepts=concepts, samples=samples, validation=True, validate_after=1),
    )
    run = run_of(tmp_path, found)
    first, second = run.video_data.sources
    assert (first.repeats, first.loss_weight, first.target) == (3, 0.5, "data")
    assert (second.repeats, second.target) == (2, "base")
    assert [s.path for s in run.validation.sources] == [clips]
    assert run.train.steps == 10 * (18 + 12)
    assert run.validation.every == 30
    (prompt,) = run.sample.prompts
    assert (prompt.prompt, prompt.seed) == ("a fox", 7)
    assert (run.sample.frames, run.sample.width, run.sample.height) == (81, 496, 304)
    assert run.sample.guidance == (4.0, 3.0)


def test_the_embedding_of_the_method_becomes_a_section(tmp_path, clips):
    embedding = {
        "uuid": "x",
        "placeholder": "<fox>",
        "token_count": 3,
        "initial_embedding_text": "fox",
    }
    config = config_of(
        clips, training_method="EMBEDDING", embedding=embedding, embedding_learning_rate=1e-3
    )
    run = run_of(tmp_path, imported(tmp_path, config))
    (section,) = run.embeddings
    assert (section.placeholder, section.token_count, section.initial_text) == ("<fox>", 3, "fox")
    assert section.lr == 1e-3 and run.method.kind == "embedding"


def test_files_named_by_the_config_are_read_relative_to_the_checkout(tmp_path, clips):
    root = tmp_path / "OneTrainer"
    (root / "modules/util/enum").mkdir(parents=True)
    (root / "modules/util/enum/ModelType.py").write_text("", "utf-8")
    (root / "training_concepts").mkdir()
    (root / "training_concepts/concepts.json").write_text(
        json.dumps([{"path": str(clips)}]), "utf-8"
    )
    (root / "workspace").mkdir()
    config = config_of(clips)
    del config["concepts"]
    found = imported(root / "workspace", config)
    assert found.document["video_data"]["sources"] == [{"path": str(clips)}]
    assert found.document["output"]["dir"] == str(root / "workspace/run")
    with pytest.raises(ConfigError, match=r"concept_file_name: is 'nowhere\.json'"):
        imported(root / "workspace", {**config, "concept_file_name": "nowhere.json"})


def test_a_relative_root_means_the_same_wherever_the_run_file_is(tmp_path, clips, monkeypatch):
    checkout, elsewhere = tmp_path / "OneTrainer", tmp_path / "runs" / "one"
    (checkout / "training_concepts").mkdir(parents=True)
    (checkout / "model").mkdir()
    elsewhere.mkdir(parents=True)
    clips.rename(checkout / "clips")
    file = tmp_path / "config.json"
    config = {**config_of(clips), "concepts": [{"path": "clips"}], "base_model_name": "model"}
    file.write_text(json.dumps(config), "utf-8")
    monkeypatch.chdir(tmp_path)
    command = ["import-config", "config.json", "--root", "OneTrainer", "--variant", "t2v-a14b"]
    assert main([*command, "--output", str(elsewhere / "run.yaml")]) == 0
    found = load_run(elsewhere / "run.yaml")
    assert found.video_data.sources[0].path == checkout / "clips"
    assert str(found.model.path) == str(checkout / "model")
    assert found.output.dir == checkout / "workspace/run"


def test_a_root_that_is_no_folder_is_refused(tmp_path, clips, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_of(clips)), "utf-8")
    assert main(["import-config", str(file), "--root", str(tmp_path / "nowhere")]) == 1
    assert "nowhere: is not a folder" in capsys.readouterr().err


def test_a_config_of_wan_without_a_version_is_current(tmp_path, clips):
    config = config_of(clips)
    del config["__version"]
    assert imported(tmp_path, config).document == imported(tmp_path, config_of(clips)).document
    with pytest.raises(ConfigError, match="__version: is 0, and only version 11 is imported"):
        imported(tmp_path, {**config, "model_type": "HUNYUAN_VIDEO"})


def test_all_problems_are_reported_at_once(tmp_path, clips):
    config = config_of(clips, frames="x", resolution="big", peft_type="NEW", train_dtype="INT_8")
    with pytest.raises(ConfigError) as error:
        imported(tmp_path, config)
    said = str(error.value)
    for name in ("frames", "resolution", "peft_type: is 'NEW'", "train_dtype: is 'INT_8'"):
        assert name in said
    with pytest.raises(ConfigError, match="--variant"):
        imported(tmp_path, config_of(clips, base_model_name="mine"))
    (tmp_path / "bad.json").write_text("{", "utf-8")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        import_config(tmp_path / "bad.json")


def test_settings_without_a_counterpart_are_reported(tmp_path, clips):
    concept = {"path": str(clips), "image": {"enable_random_flip": True}, "balancing": 1.5}
    found = imported(
        tmp_path,
        config_of(
            clips,
            concepts=[concept],
            optimizer={"optimizer": "TIGER"},
            learning_rate_scheduler="CUSTOM",
            no_such_key=1,
            sample_after=3,
            sample_after_unit="MINUTE",
        ),
    )
    said = "\n".join(found.notices)
    for text in ("enable_random_flip", "TIGER", "CUSTOM", "1.5", "sample.every"):
        assert text in said
    assert [e.key for e in found.entries if e.outcome == "unknown"] == ["no_such_key"]


def test_secrets_are_neither_imported_nor_shown(tmp_path, clips, capsys):
    config = config_of(
        clips,
        cloud={"huggingface_token": "hf_SECRET"},
        secrets={"huggingface_token": "hf_SECRET", "cloud": {"api_key": "k_SECRET"}},
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), "utf-8")
    for account in ("short", "full", "json"):
        assert main(["import-config", str(path), "--account", account]) == 0
        said = capsys.readouterr()
        assert "SECRET" not in said.out + said.err
        assert "secrets" in said.err


@pytest.mark.parametrize("version", [0, 10])
def test_older_versions_are_sent_back_to_onetrainer(tmp_path, clips, version):
    config = config_of(clips, __version=version)
    with pytest.raises(
        ConfigError, match=r"__version: is .*; open and save it in OneTrainer first"
    ):
        imported(tmp_path, config)


def test_newer_versions_need_a_newer_onewan(tmp_path, clips):
    with pytest.raises(ConfigError, match=r"__version: is 12, .*; update onewan"):
        imported(tmp_path, config_of(clips, __version=12))


@pytest.mark.parametrize("model_type", [None, "FLUX_DEV_1", "STABLE_DIFFUSION_15"])
def test_other_model_types_are_refused_in_one_line(tmp_path, clips, model_type):
    config = config_of(clips, model_type=model_type)
    with pytest.raises(ConfigError) as error:
        imported(tmp_path, config, variant="t2v-a14b")
    assert "only configs of WAN_2_2 and HUNYUAN_VIDEO are imported" in str(error.value)
    assert len(str(error.value).splitlines()) == 2


def test_a_hunyuan_video_config_trains_wan_from_its_official_model(tmp_path, clips):
    config = config_of(
        clips,
        model_type="HUNYUAN_VIDEO",
        base_model_name="hunyuanvideo-community/HunyuanVideo",
        transformer={"model_name": "hunyuan.safetensors"},
    )
    with pytest.raises(ConfigError, match="--variant"):
        imported(tmp_path, config)
    found = imported(tmp_path, config, variant="t2v-a14b")
    run = run_of(tmp_path, found)
    assert run.model.path == T2V and run.model.transformer is None
    assert any("is HUNYUAN_VIDEO; the run file trains" in notice for notice in found.notices)
    (entry,) = [e for e in found.entries if e.key == "transformer.model_name"]
    assert (entry.outcome, entry.note) == ("not applicable", "a file of another model")


@pytest.mark.parametrize("name", [n for n in overlay() if n.startswith("resources/wan_presets/")])
def test_the_addons_presets_are_imported_without_unknown_keys(tmp_path, name):
    path = tmp_path / name.rpartition("/")[2]
    path.write_bytes(overlay()[name])
    found = import_config(path)
    assert not [e for e in found.entries if e.outcome == "unknown"]
    assert found.document["model"]["variant"] in name.lower().replace(" ", "-")
    found.document["video_data"]["sources"] = [{"path": "clips"}]
    run_of(tmp_path, found)


def test_presets_of_hunyuan_video_are_imported_and_others_refused(real_checkout, tmp_path):
    presets = sorted((real_checkout / "training_presets").rglob("#*.json"))
    assert len(presets) > 40
    for preset in presets:
        if json.loads(preset.read_text("utf-8")).get("model_type") != "HUNYUAN_VIDEO":
            with pytest.raises(ConfigError, match="only configs of WAN_2_2 and HUNYUAN_VIDEO"):
                import_config(preset, variant="t2v-a14b")
            continue
        found = import_config(preset, variant="t2v-a14b")
        assert not [e for e in found.entries if e.outcome == "unknown"], preset
        found.document["video_data"]["sources"] = [{"path": "clips"}]
        run_of(tmp_path, found)


def test_run_files_and_broken_files_are_not_taken_for_onetrainer_configs(tmp_path, clips):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(config_of(clips)), "utf-8")
    assert looks_like_onetrainer(path)
    path.write_text(json.dumps({"model": {"variant": "t2v-a14b"}}), "utf-8")
    assert not looks_like_onetrainer(path)
    path.write_text("[", "utf-8")
    assert not looks_like_onetrainer(path)


def test_the_train_command_accepts_a_onetrainer_config(tmp_path, capsys):
    """`onewan train CONFIG.json` on a tiny model and the demo's clips."""
    folder = tmp_path / "clips"
    write_clips(folder)
    config = config_of(
        folder,
        base_model_name=str(TinyModels(tmp_path / "models")("t2v-a14b")),
        train_dtype="FLOAT_32",
        train_device="cpu",
        workspace_dir=str(tmp_path / "ws"),
        cache_dir=str(tmp_path / "cache"),
        output_model_destination="out.safetensors",
        resolution="64",
        frames="5",
        epochs=1,
        lora_rank=2,
        timestep_shift=5.0,
        concepts=[{"path": str(folder)}],
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), "utf-8")
    assert main(["train", str(path)]) == 0
    said = capsys.readouterr().err
    assert "was imported as" in said
    files = sorted(
        p.name for p in (tmp_path / "ws" / "out").rglob("*.safetensors") if "_noise" in p.name
    )
    assert len(files) == 2
    (tmp_path / "config.onewan.yaml").write_text("mine", "utf-8")
    assert main(["train", str(path)]) == 1
    assert "was not made from it" in capsys.readouterr().err


UNUSABLE: list[tuple[dict[str, Any], str]] = [
    ({"batch_size": 0}, "batch_size: is 0; give 1 or more"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: is 0; give 1 or more"),
    ({"epochs": 0}, "epochs: is 0; give 1 or more"),
    ({"wan_layers": None}, "wan_layers: is nothing; remove the key"),
    ({"wan_layers": "0-999999999"}, "wan_layers: is '0-999999999'; give numbers and ranges"),
    ({"lora_rank": 2.5}, "lora_rank: is 2.5; give a whole number"),
    ({"frames": "9" * 5000}, "frames: is '999"),
    ({"learning_rate": 10**400}, "learning_rate: is 1000"),
    ({"transformer_2": 5}, "transformer_2: is 5; give an object"),
    ({"samples": [{"width": "wide"}]}, "samples.0.width: is 'wide'; give a number"),
    ({"concepts": [{"path": ["a"]}]}, "concepts.0.path: is ['a']; give a single value"),
    ({"concepts": [{"image": 5}]}, "concepts.0.image: is 5; give an object"),
    ({"train_dtype": "\x1b[2J"}, r"train_dtype: is '\x1b[2J'"),
]


@pytest.mark.parametrize(("changes", "problem"), UNUSABLE, ids=lambda value: str(value)[:30])
def test_a_value_of_another_type_or_out_of_range_is_a_problem(tmp_path, clips, changes, problem):
    with pytest.raises(ConfigError) as error:
        imported(tmp_path, config_of(clips, **changes))
    (found,) = [line for line in error.value.problems if line.startswith(problem)]
    assert len(found) < 200
    assert found.isprintable()


def test_hostile_files_are_refused_or_accounted_for_in_few_lines(tmp_path, clips, capsys):
    path = tmp_path / "config.json"
    path.write_text("[" * 100_000, "utf-8")
    with pytest.raises(ConfigError, match="nested too deeply"):
        import_config(path)
    odd = {"9" * 5000: list(range(20_000)), "\x1b[31mred\u202e": 1}
    odd |= {f"key_{number}": 1 for number in range(20_000)}
    path.write_text(json.dumps(config_of(clips) | odd), "utf-8")
    assert main(["import-config", str(path), "--variant", "t2v-a14b"]) == 0
    told = capsys.readouterr().err
    assert len(told) < 100_000 and "more (--account json" in told
    assert all(line.isprintable() for line in told.splitlines())
    assert r"\x1b[31mred\u202e" in told


def test_subfolders_are_left_out_where_onetrainer_leaves_them_out(tmp_path, clips):
    (clips / "sub").mkdir()
    (clips / "sub" / "6.mp4").write_bytes(b"")
    (clips / "sub" / "6.txt").write_text("a fox", "utf-8")
    for included in (False, True):
        concept = {"path": str(clips), "include_subdirectories": included}
        found = imported(tmp_path, config_of(clips, concepts=[concept]))
        (source,) = run_of(tmp_path, found).video_data.sources
        assert source.recursive is included
