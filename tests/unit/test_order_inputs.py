"""The fields of a form for what may be ordered of a trainer, and what their texts mean."""

from __future__ import annotations

from pathlib import Path

from onewan.config.changes import CHANGEABLE
from onewan.config.load import load_run, settings_given
from onewan.config.order_inputs import (
    SettingInput,
    sample_entered,
    sample_inputs,
    setting_inputs,
)
from onewan.config.schema import ResolvedRun
from onewan.errors import ConfigError


def config(folder: Path, variant: str = "t2v-a14b", *overrides: str) -> ResolvedRun:
    path = folder / "fox.yaml"
    path.write_text(
        f"model: {{path: model, variant: {variant}}}\n"
        "sample: {prompts: [{prompt: a fox, seed: 3}, an owl]}\n",
        encoding="utf-8",
    )
    return load_run(path, overrides)


def by_name(run: ResolvedRun) -> dict[str, SettingInput]:
    return {each.name: each for group in setting_inputs(run).values() for each in group}


def test_each_setting_that_can_change_has_its_field(tmp_path: Path) -> None:
    with_average = config(tmp_path, "t2v-a14b", "train.ema={}")
    assert by_name(with_average).keys() == CHANGEABLE.keys()
    one_expert = by_name(config(tmp_path, "ti2v-5b")).keys()
    missing = {"per_expert.high.lr", "per_expert.low.lr", "train.ema.decay"}
    assert CHANGEABLE.keys() - one_expert == missing
    silent = setting_inputs(config(tmp_path, "t2v-a14b", "sample.prompts=[]"))
    assert list(silent) == ["Learning", "Saved and exported", "Validation"]


def test_what_is_entered_becomes_an_override(tmp_path: Path) -> None:
    run = config(tmp_path)
    fields = by_name(run)
    every = fields["train.save_every"]
    assert (every.label, every.kind, every.text) == ("Steps between checkpoints", "line", "250")
    assert every.hint == "train.save_every, 1 or more"
    assert every.override("70") == "train.save_every=70"
    assert fields["per_expert.high.lr"].hint.endswith("empty: that of optimizer.lr")
    assert fields["train.keep_best"].kind == "switch"
    for each in fields.values():
        assert settings_given(run, 0, [each.override(each.text)]) == {}, each.name


def test_prompts_that_stay_keep_their_seeds(tmp_path: Path) -> None:
    run = config(tmp_path)
    prompts = by_name(run)["sample.prompts"]
    assert (prompts.kind, prompts.text) == ("lines", "a fox\nan owl")
    given = settings_given(run, 0, [prompts.override(' a fox\n\nan elk, "at night": dark')])
    found = [(each["prompt"], each["seed"]) for each in given["sample.prompts"]]
    assert found == [("a fox", 3), ('an elk, "at night": dark', None)]


def test_a_video_is_ordered_with_what_differs_from_the_run(tmp_path: Path) -> None:
    fields = {each.name: each for each in sample_inputs(config(tmp_path))}
    assert fields["frames"].placeholder == "81" and "image" not in fields
    assert "image" in {each.name for each in sample_inputs(config(tmp_path, "ti2v-5b"))}
    entered = dict.fromkeys(fields, "") | {"prompt": "7", "seed": "7", "frames": "-5", "steps": "x"}
    assert sample_entered(entered) == {"prompt": "7", "seed": 7, "frames": -5, "steps": "x"}


def test_problems_belong_to_the_fields_in_which_they_are() -> None:
    error = ConfigError("fox", ["seed: is odd", "image.path: is missing", "images: are", "other"])
    assert error.by_field(["seed", "image"]) == (
        {"seed": "is odd", "image": "is missing"},
        ["images: are", "other"],
    )
