"""Size, length and steps of sample videos that a run file does not give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onewan.arithmetic.flops import TransformerSize, forward_flops, token_count
from onewan.config.load import dump_run
from onewan.config.resolve import resolve
from onewan.config.schema import ResolvedRun, ResolvedSample, RunConfig
from onewan.documents import parse_yaml
from onewan.variants import VARIANTS, VariantName


def run(variant: VariantName, **sections: dict[str, Any]) -> ResolvedRun:
    data = {"model": {"path": "a", "variant": variant}, "output": {"name": "a"}, **sections}
    return resolve(RunConfig.model_validate(data), Path.cwd())


def sample(variant: VariantName, **sections: dict[str, Any]) -> ResolvedSample:
    return run(variant, **sections).sample


def passes(variant: VariantName, frames: int, width: int, height: int) -> int:
    facts = VARIANTS[variant]
    tokens = token_count(
        (frames - 1) // facts.temporal_compression + 1,
        height // facts.spatial_compression,
        width // facts.spatial_compression,
    )
    return forward_flops(TransformerSize.of_variant(facts), tokens).total


@pytest.mark.parametrize("variant", ["t2v-a14b", "i2v-a14b", "ti2v-5b"])
def test_a_sample_of_an_official_clip_has_its_length_and_the_training_size(
    variant: VariantName,
) -> None:
    facts, found = VARIANTS[variant], sample(variant)
    assert (found.frames, found.steps) == (facts.frames, 25)
    assert found.height == 480 and found.width in (848, 864)


@pytest.mark.parametrize("variant", ["t2v-a14b", "ti2v-5b"])
def test_short_clips_have_longer_samples_that_cost_about_fifty_training_steps(
    variant: VariantName,
) -> None:
    found = sample(variant, wan_config={"max_frames": 17}, video_data={"resolution": 512})
    assert 17 < found.frames < VARIANTS[variant].frames and found.frames % 4 == 1
    cost = 2 * 25 * passes(variant, found.frames, found.width, found.height)
    one = passes(variant, 17, found.width, found.height)
    # With gradient checkpointing a step is two forward passes and about one and a half backward.
    assert 3 * 40 * one < cost < 4 * 50 * one


def test_few_distilled_steps_pay_for_more_frames(tmp_path: Path) -> None:
    short = {"wan_config": {"max_frames": 17}, "video_data": {"resolution": 512}}
    files = {name: tmp_path / f"{name}.safetensors" for name in ("high", "low")}
    few = sample("t2v-a14b", **short, sample={"distilled": files})
    assert few.frames == VARIANTS["t2v-a14b"].frames > sample("t2v-a14b", **short).frames
    assert few.steps == 25  # of full samples
    many = sample("t2v-a14b", **short, sample={"distilled": {**files, "steps": 25, "guidance": 2}})
    assert many.frames == sample("t2v-a14b", **short).frames


def test_what_is_given_is_kept_and_part_of_the_price() -> None:
    def frames(**given: Any) -> int:
        return sample("t2v-a14b", **{"wan_config": {"max_frames": 17}, **given}).frames

    usual = frames()
    assert frames(sample={"steps": 12}) > usual > frames(sample={"steps": 50})
    assert frames(sample={"guidance": [1, 1]}) > usual
    assert frames(train={"batch_size": 2}) > usual == frames(train={"steps": 9})
    assert frames(sample={"width": 1280, "height": 720}) == 17, "not fewer than in training"
    assert frames(sample={"frames": 5}) == 5
    portrait = sample("t2v-a14b", video_data={"resolution": ["480x832", 512]})
    assert (portrait.width, portrait.height) == (480, 832)
    assert sample("t2v-a14b", wan_config={"max_frames": 161}).frames == 81


def test_nulls_that_are_values_of_their_own_are_kept_in_the_dump() -> None:
    config = run("t2v-a14b", output={"name": "a", "keep_last": None, "dtype": None})
    assert (config.output.keep_last, config.output.dtype) == (None, None)
    dumped = parse_yaml(dump_run(config))["output"]
    assert {"keep_last", "dtype"} <= set(dumped) and dumped["keep_last"] is None
    usual = run("t2v-a14b").output
    assert (usual.keep_last, usual.dtype) == (4, "bfloat16")
