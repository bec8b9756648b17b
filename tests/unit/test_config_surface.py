"""The run file's fields, listed one by one: a new one is a decision, never an accident."""

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
    "model.check_names",
    "model.quantised",
    "model.experts",
    "model.dtype",
    "model.device",
    "wan_config.max_frames",
    "wan_config.frame_sample_strategy",
    "wan_config.temporal_consistency_weight",
    "wan_config.transformer_layers_to_train",
    "wan_config.use_temporal_attention",
    "wan_config.spatial_compression_ratio",
    "wan_config.temporal_compression_ratio",
    "video_data.sources.*.path",
    "video_data.sources.*.repeats",
    "video_data.supported_formats",
    "video_data.target_fps",
    "video_data.max_duration",
    "video_data.min_resolution",
    "video_data.max_resolution",
    "video_data.resolution",
    "video_data.cache",
    "video_data.cache_dir",
    "method.kind",
    "method.rank",
    "method.alpha",
    "method.dropout",
    "method.modules",
    "optimizer.name",
    "optimizer.lr",
    "optimizer.betas",
    "optimizer.eps",
    "optimizer.weight_decay",
    "train.steps",
    "train.batch_size",
    "train.accumulation",
    "train.seed",
    "train.schedule",
    "train.warmup_steps",
    "train.max_grad_norm",
    "train.high_share",
    "train.expert_block",
    "train.first_frame_probability",
    "train.timesteps.distribution",
    "train.timesteps.mean",
    "train.timesteps.std",
    "train.timesteps.shift",
    "train.grid_every",
    "train.grid_clips",
    "train.save_every",
    "train.keep_states",
    "sample.prompts.*.prompt",
    "sample.prompts.*.negative_prompt",
    "sample.prompts.*.image",
    "sample.prompts.*.seed",
    "sample.every",
    "sample.at_start",
    "sample.width",
    "sample.height",
    "sample.frames",
    "sample.fps",
    "sample.steps",
    "sample.shift",
    "sample.guidance",
    "sample.negative_prompt",
    "sample.seed",
    "sample.format",
    "output.dir",
    "output.name",
    "output.formats",
    "output.dtype",
    "memory.gradient_checkpointing",
    "memory.offload_inactive_expert",
    "logging.tensorboard",
]


def test_the_leaves_are_these() -> None:
    assert leaves() == LEAVES


def test_there_are_not_too_many() -> None:
    assert len(LEAVES) <= 120  # peers have 400 to 950


def test_every_field_is_explained_in_the_schema() -> None:
    schema = json_schema()
    sections = [schema, *schema["$defs"].values()]
    silent = [
        f"{section['title']}.{name}"
        for section in sections
        for name, field in section["properties"].items()
        if not field.get("description")
    ]
    assert silent == []


def test_the_schema_allows_what_reading_allows() -> None:
    schema = json_schema()
    prompts = schema["$defs"]["SampleSection"]["properties"]["prompts"]
    assert {"type": "string"} in prompts["items"]["anyOf"]  # a mere text is a prompt
    assert {"type": "null"} in schema["properties"]["sample"]["anyOf"]  # an empty section
    assert schema["required"] == ["model"]
    assert schema["additionalProperties"] is False
