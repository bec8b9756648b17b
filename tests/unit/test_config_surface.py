"""All fields of the run file, listed so that none is added or removed by accident."""

from __future__ import annotations

from onewan.config import json_schema, leaves

LEAVES = [
    "schema_version",
    "model.path",
    "model.transformer",
    "model.transformer_2",
    "model.vae",
    "model.text_encoder",
    "model.tokenizer",
    "model.variant",
    "model.check_file_names",
    "model.experts",
    "model.boundary",
    "model.dtype",
    "model.device",
    "wan_config.max_frames",
    "wan_config.clip_lengths",
    "wan_config.frame_sample_strategy",
    "wan_config.clips_per_video",
    "wan_config.stride",
    "wan_config.avoid_cuts",
    "wan_config.temporal_consistency_weight",
    "wan_config.transformer_layers_to_train",
    "wan_config.use_temporal_attention",
    "wan_config.spatial_compression_ratio",
    "wan_config.temporal_compression_ratio",
    "video_data.sources.*.path",
    "video_data.sources.*.kind",
    "video_data.sources.*.recursive",
    "video_data.sources.*.include",
    "video_data.sources.*.exclude",
    "video_data.sources.*.repeats",
    "video_data.sources.*.loss_weight",
    "video_data.sources.*.timesteps",
    "video_data.sources.*.weighting.kind",
    "video_data.sources.*.weighting.gamma",
    "video_data.sources.*.weighting.points",
    "video_data.sources.*.target",
    "video_data.sources.*.trigger_word",
    "video_data.sources.*.caption_prefix",
    "video_data.sources.*.caption_dropout",
    "video_data.sources.*.augment.flip",
    "video_data.sources.*.augment.crop",
    "video_data.sources.*.augment.brightness",
    "video_data.sources.*.augment.contrast",
    "video_data.sources.*.augment.saturation",
    "video_data.sources.*.augment.hue",
    "video_data.sources.*.augment.variants",
    "video_data.sources.*.target_fps",
    "video_data.sources.*.max_frames",
    "video_data.sources.*.frame_sample_strategy",
    "video_data.sources.*.clips_per_video",
    "video_data.sources.*.max_duration",
    "video_data.sources.*.resolution",
    "video_data.sources.*.min_resolution",
    "video_data.sources.*.max_resolution",
    "video_data.sources.*.interlaced",
    "video_data.sources.*.masks",
    "video_data.sources.*.speed",
    "video_data.sources.*.shuffle_tags",
    "video_data.sources.*.keep_tags",
    "video_data.supported_formats",
    "video_data.max_duration",
    "video_data.min_resolution",
    "video_data.max_resolution",
    "video_data.captions",
    "video_data.interlaced",
    "video_data.background",
    "video_data.masks",
    "video_data.cache",
    "video_data.cache_dir",
    "video_data.workers",
    "video_data.vae_dtype",
    "video_data.target_fps",
    "video_data.slow_video",
    "video_data.resolution",
    "method.modules",
    "method.init_from",
    "method.rank",
    "method.alpha",
    "method.per_module.*.modules",
    "method.per_module.*.rank",
    "method.per_module.*.alpha",
    "method.dropout",
    "method.lora_plus_ratio",
    "method.kind",
    "method.use_rslora",
    "method.init",
    "method.factor",
    "method.decompose_both",
    "method.block_size",
    "method.weights",
    "method.fused_step",
    "embeddings.*.placeholder",
    "embeddings.*.token_count",
    "embeddings.*.initial_text",
    "embeddings.*.is_output_embedding",
    "embeddings.*.init_from",
    "embeddings.*.train",
    "embeddings.*.lr",
    "embeddings.*.name",
    "per_expert.high.steps",
    "per_expert.high.lr",
    "per_expert.high.rank",
    "per_expert.high.alpha",
    "per_expert.low.steps",
    "per_expert.low.lr",
    "per_expert.low.rank",
    "per_expert.low.alpha",
    "optimizer.name",
    "optimizer.lr",
    "optimizer.betas",
    "optimizer.eps",
    "optimizer.weight_decay",
    "optimizer.paged",
    "optimizer.warmup_steps",
    "optimizer.decay_rate",
    "optimizer.clip_threshold",
    "optimizer.scale_parameter",
    "optimizer.d0",
    "optimizer.d_coef",
    "optimizer.safeguard_warmup",
    "optimizer.bias_correction",
    "optimizer.factored",
    "optimizer.momentum",
    "optimizer.nesterov",
    "optimizer.ns_steps",
    "optimizer.match_adamw",
    "optimizer.bits",
    "optimizer.class_path",
    "optimizer.arguments",
    "train.steps",
    "train.epochs",
    "train.batch_size",
    "train.accumulation",
    "train.seed",
    "train.schedule.kind",
    "train.schedule.end_factor",
    "train.schedule.cycles",
    "train.schedule.power",
    "train.warmup_steps",
    "train.cooldown_steps",
    "train.max_grad_norm",
    "train.high_expert_share",
    "train.switch_expert_every",
    "train.caption_dropout",
    "train.first_frame_probability",
    "train.first_frame_noise",
    "train.noise_offset",
    "train.input_perturbation",
    "train.timesteps.shift",
    "train.timesteps.shift_by_tokens",
    "train.timesteps.stratified",
    "train.timesteps.distribution",
    "train.timesteps.mean",
    "train.timesteps.std",
    "train.timesteps.scale",
    "train.timesteps.alpha",
    "train.timesteps.beta",
    "train.timesteps.weights",
    "train.loss.kind",
    "train.loss.delta",
    "train.loss.weighting.kind",
    "train.loss.weighting.gamma",
    "train.loss.weighting.points",
    "train.loss.unmasked_weight",
    "train.ema.decay",
    "train.ema.offload",
    "train.save_every",
    "train.save_every_minutes",
    "train.keep_last",
    "train.keep_every",
    "train.keep_best",
    "validation.sources.*.path",
    "validation.sources.*.kind",
    "validation.sources.*.recursive",
    "validation.sources.*.include",
    "validation.sources.*.exclude",
    "validation.sources.*.repeats",
    "validation.sources.*.loss_weight",
    "validation.sources.*.timesteps",
    "validation.sources.*.weighting.kind",
    "validation.sources.*.weighting.gamma",
    "validation.sources.*.weighting.points",
    "validation.sources.*.target",
    "validation.sources.*.trigger_word",
    "validation.sources.*.caption_prefix",
    "validation.sources.*.caption_dropout",
    "validation.sources.*.augment.flip",
    "validation.sources.*.augment.crop",
    "validation.sources.*.augment.brightness",
    "validation.sources.*.augment.contrast",
    "validation.sources.*.augment.saturation",
    "validation.sources.*.augment.hue",
    "validation.sources.*.augment.variants",
    "validation.sources.*.target_fps",
    "validation.sources.*.max_frames",
    "validation.sources.*.frame_sample_strategy",
    "validation.sources.*.clips_per_video",
    "validation.sources.*.max_duration",
    "validation.sources.*.resolution",
    "validation.sources.*.min_resolution",
    "validation.sources.*.max_resolution",
    "validation.sources.*.interlaced",
    "validation.sources.*.masks",
    "validation.sources.*.speed",
    "validation.sources.*.shuffle_tags",
    "validation.sources.*.keep_tags",
    "validation.share",
    "validation.every",
    "validation.clips",
    "validation.timesteps",
    "sample.prompts.*.prompt",
    "sample.prompts.*.negative_prompt",
    "sample.prompts.*.image",
    "sample.prompts.*.seed",
    "sample.every",
    "sample.at_start",
    "sample.seed",
    "sample.format",
    "sample.width",
    "sample.height",
    "sample.frames",
    "sample.fps",
    "sample.steps",
    "sample.shift",
    "sample.guidance",
    "sample.negative_prompt",
    "output.dir",
    "output.formats",
    "output.dtype",
    "output.keep_last",
    "output.name",
    "memory.gradient_checkpointing",
    "memory.offload_inactive_expert",
    "memory.weights",
    "memory.resident_blocks",
    "memory.offload_inputs",
    "memory.keep_attention",
    "memory.feed_forward_chunks",
    "memory.compile",
    "memory.attention",
    "memory.host_weights",
    "memory.vram",
    "memory.ram",
    "logging.tensorboard",
    "logging.wandb.project",
    "logging.wandb.entity",
    "logging.wandb.name",
    "logging.wandb.mode",
]


def test_every_field_of_the_run_file_is_listed_here() -> None:
    assert leaves() == LEAVES


def test_the_run_file_does_not_grow() -> None:
    # Comparable trainers have 400 to 950 fields. Drop or merge one before raising a limit.
    assert len(LEAVES) <= 248
    # Of these three sections, a run sees the fields of one choice only.
    choices = ("method", "optimizer", "embeddings")
    assert len([leaf for leaf in LEAVES if leaf.split(".")[0] not in choices]) <= 201


def test_every_field_has_a_description_in_the_schema() -> None:
    schema = json_schema()
    sections = [schema, *schema["$defs"].values()]
    silent = [
        f"{section['title']}.{name}"
        for section in sections
        for name, field in section["properties"].items()
        if not field.get("description")
    ]
    assert silent == []


def test_the_schema_accepts_the_short_forms_that_reading_accepts() -> None:
    schema = json_schema()
    prompts = schema["$defs"]["SampleSection"]["properties"]["prompts"]
    assert {"type": "string"} in prompts["items"]["anyOf"]  # a string alone is a prompt
    train = schema["$defs"]["TrainSection"]["properties"]
    for empty in (schema["properties"]["sample"], train["loss"], train["ema"]):
        assert {"type": "null"} in empty["anyOf"]
    assert schema["properties"]["embeddings"]["type"] == ["array", "null"]
    assert schema["required"] == ["model"]
    assert schema["additionalProperties"] is False


def test_the_schema_distinguishes_the_members_of_a_union() -> None:
    schema = json_schema()
    method, train = schema["properties"]["method"], schema["$defs"]["TrainSection"]["properties"]
    # With none, or with several, that match a mapping without its kind, no file would be valid.
    assert "required" not in schema["$defs"]["LoraMethod"]
    assert schema["$defs"]["DoraMethod"]["required"] == ["kind"]
    assert schema["$defs"]["CustomOptimizer"]["required"] == ["name", "class_path"]
    assert schema["$defs"]["TableTimesteps"]["required"] == ["distribution", "weights"]
    assert len(method["oneOf"]) == 8  # seven kinds, and nothing
    assert method["oneOf"][-1] == {"type": "null"}
    courses = ["constant", "linear", "cosine", "cosine_with_restarts", "rex", "polynomial"]
    assert {"enum": courses} in train["schedule"]["oneOf"]
    texts = next(part["enum"] for part in train["timesteps"]["oneOf"] if "enum" in part)
    assert texts == ["uniform", "logit_normal", "mode", "beta"]  # a table needs its weights
    assert not any("enum" in part for part in method["oneOf"])
