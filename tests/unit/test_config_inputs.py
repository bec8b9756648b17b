"""What a form shows of a run file: every field has its input, and what is shown means the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from onewan.config.edits import RunText
from onewan.config.fields import ESSENTIAL, UNITS, leaves, schema_fields
from onewan.config.inputs import Input, pattern, run_inputs
from onewan.documents import parse_yaml
from onewan.presets.run_files import RunFile, listed
from onewan.presets.starter import StarterRequest, starter

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILE = Path("run.yaml").absolute()


def all_inputs(fields: list[Input]) -> Iterator[Input]:
    """All inputs that there may be, of each kind of each union and the first item of each list."""
    for field in fields:
        yield field
        if field.kind == "list":
            yield from all_inputs(field.items(0))
        elif field.union is not None:
            for kind in field.union.sections:
                yield from all_inputs(field.inner(kind))
        else:
            yield from all_inputs(field.inner())


def shown_inputs(run: RunText, fields: list[Input]) -> Iterator[Input]:
    """The inputs that a form of `run` has."""
    for field in fields:
        yield field
        if field.kind == "list":
            for index in range(len(run.value(field.path) or ())):
                yield from shown_inputs(run, field.items(index))
        elif field.union is not None:
            yield from shown_inputs(run, field.inner(run.kind(field.path, field.union)))
        else:
            yield from shown_inputs(run, field.inner())


ALL = list(all_inputs(run_inputs()))
HOLDING = ("section", "union", "list")


def find(name: str) -> Input:
    return next(field for field in ALL if pattern(field.path) == name)


def test_every_field_of_the_schema_has_an_input() -> None:
    keys = {
        f"{pattern(f.path)}.{f.union.keyed.key}" for f in ALL if f.union is not None
    }  # shown as the choice of the union
    there = {pattern(field.path) for field in ALL if field.kind not in HOLDING}
    assert there | keys | {"schema_version"} == set(leaves())
    assert all(field.help for field in ALL)
    assert all(field.choices for field in ALL if field.kind in ("choice", "choices"))


def test_inputs_are_of_the_kind_that_suits_the_field() -> None:
    kinds = {
        "model.variant": "choice",
        "model.path": "path",
        "model.check_file_names": "switch",
        "video_data.sources": "list",
        "video_data.sources.*.path": "path",
        "video_data.sources.*.masks": "choice",
        "video_data.sources.*.include": "lines",
        "video_data.sources.*.timesteps": "inline",
        "video_data.sources.*.weighting": "union",
        "video_data.sources.*.augment": "section",
        "video_data.resolution": "inline",
        "video_data.workers": "number",
        "method": "union",
        "method.rank": "number",
        "method.init_from": "paths",
        "method.modules": "lines",
        "optimizer.betas": "inline",
        "train.steps": "number",
        "sample.guidance": "inline",
        "sample.prompts.*.prompt": "long_text",
        "output.formats": "choices",
        "output.name": "text",
        "memory": "section",
    }
    assert {name: find(name).kind for name in kinds} == kinds


def test_inputs_say_bounds_units_and_choices() -> None:
    assert find("train.steps").bounds == "1 or more" and find("train.steps").unit == "steps"
    assert find("model.boundary").bounds == "more than 0, less than 1"
    assert find("train.caption_dropout").bounds == "0 to 1"
    assert find("video_data.workers").choices == ("auto",)
    assert find("output.formats").choices == ("comfyui", "no_alpha", "diffusers", "kohya")
    assert find("train.steps").default_text == "2000"
    assert find("optimizer.betas").default_text == "[0.9, 0.999]"
    assert find("output.formats").default_text == "[comfyui]"


def test_essential_fields_and_units_are_fields() -> None:
    assert set(ESSENTIAL) | set(UNITS) <= set(schema_fields())
    essential = [pattern(field.path) for field in ALL if field.essential]
    assert "video_data" in essential and "logging" not in essential
    assert len(set(essential) & set(leaves())) < 40


@pytest.mark.parametrize("row", listed(), ids=lambda row: row.file)
def test_a_run_file_stays_as_it_is_when_its_own_values_are_entered(row: RunFile) -> None:
    text = (CONFIGS / row.file).read_text(encoding="utf-8")
    run = RunText(text)
    entered = 0
    for field in shown_inputs(run, run_inputs()):
        if field.kind in HOLDING or not run.is_given(field.path):
            continue
        value = run.value(field.path)
        assert field.value(field.shown(value)) == value
        run.set(field.path, field.value(field.shown(value)))
        entered += 1
    assert run.text == text and entered > 8


def fresh() -> RunText:
    return RunText(starter(StarterRequest(variant="t2v-a14b", purpose="character", name="dog")))


def test_a_field_is_entered_and_taken_back() -> None:
    run = fresh()
    before = run.text
    rank = find("method.rank")
    run.enter(rank, "8")
    assert run.value(("method", "rank")) == 8 and "rank: 8  # a higher" in run.text
    run.enter(rank, "16")
    assert run.text == before
    run.enter(find("train.seed"), "7")
    assert "seed: 7" in run.text
    run.enter(find("train.seed"), "42")  # the default is not written
    assert run.text == before
    run.enter(find("train.loss.delta"), "2")
    assert run.value(("train", "loss")) == {"delta": 2}
    run.enter(find("train.loss.delta"), "")
    assert run.text == before


def test_what_is_wrong_is_entered_too_and_said_at_its_field() -> None:
    run = fresh()
    run.enter(find("train.steps"), "many")
    run.enter(find("method.rank"), "0")
    run.enter(find("output.name"), "a/b")
    found = run.checked(FILE)
    assert found.config is None and found.others == []
    assert found.by_field.keys() == {("train", "steps"), ("method", "rank"), ("output", "name")}
    message = found.by_field["train", "steps"]
    assert message.startswith("Must be a whole number, got 'many'; change it")
    assert find("train.steps").shown("many") == "many"


def test_rules_between_fields_are_said_at_a_field() -> None:
    run = fresh()
    run.enter(find("sample.every"), "10")
    run.remove(("sample", "prompts"))
    found = run.checked(FILE)
    assert [*found.by_field] == [("sample", "every")], found.others
    run.replace("model: {variant: t2v-a14b}\nnonsense: 1\n")
    (other,) = run.checked(FILE).others
    assert other.startswith("nonsense: unknown field")


def test_texts_that_look_like_other_types_stay_texts() -> None:
    run = fresh()
    run.enter(find("output.name"), "2024")
    run.enter(find("sample.negative_prompt"), "null: [ # x")
    assert run.value(("output", "name")) == "2024"
    assert run.value(("sample", "negative_prompt")) == "null: [ # x"
    config = run.checked(FILE).config
    assert config is not None and config.output.name == "2024"
    run.enter(find("train.max_grad_norm"), "null")
    assert run.is_given(("train", "max_grad_norm"))
    assert find("train.max_grad_norm").shown(None) == ""


def test_characters_that_yaml_can_not_have_are_left_out() -> None:
    run, name = fresh(), find("output.name")
    run.enter(name, "a\0b\ud800c\td")
    assert run.malformed is None
    assert run.value(("output", "name")) == "abc\td"


def test_a_kind_keeps_what_both_have_and_brings_the_rest_back() -> None:
    run = fresh()
    method = find("method")
    assert method.union is not None
    run.enter(find("method.rank"), "8")
    run.set(("method", "init"), "pissa")
    before = run.value(("method",))
    run.choose(("method",), method.union, "dora")
    assert run.value(("method",)) == {"kind": "dora", "rank": 8}
    run.choose(("method",), method.union, "oft")
    assert run.value(("method",)) == {"kind": "oft"}
    run.choose(("method",), method.union, "lora")
    assert run.value(("method",)) == before
    schedule = find("train.schedule")
    assert schedule.union is not None
    run.set(("train", "schedule"), "cosine")
    run.choose(("train", "schedule"), schedule.union, "rex")
    assert "schedule: rex" in run.text
    run.set(("train", "schedule", "end_factor"), 0.1)
    assert run.value(("train", "schedule")) == {"kind": "rex", "end_factor": 0.1}
    assert run.checked(FILE).config is not None


def test_a_kind_that_is_none_by_default_is_chosen_and_left() -> None:
    run = fresh()
    before = run.text
    weighting = find("video_data.sources.*.weighting")
    assert weighting.union is not None and weighting.nullable
    path = ("video_data", "sources", 0, "weighting")
    run.choose(path, weighting.union, "none")
    assert run.value(path) == {"kind": "none"}
    run.choose(path, weighting.union, None)
    assert run.text == before


def test_sections_that_may_be_left_out_are_switched() -> None:
    run = fresh()
    before = run.text
    run.switch(("train", "ema"), on=True)
    run.set(("train", "ema", "decay"), 0.9)
    run.remove(("train", "ema", "decay"))
    assert run.value(("train", "ema")) == {}  # still on
    run.set(("train", "ema", "decay"), 0.9)
    run.switch(("train", "ema"), on=False)
    assert run.text == before
    run.switch(("train", "ema"), on=True)
    assert run.value(("train", "ema")) == {"decay": 0.9}


def test_items_are_added_moved_and_removed() -> None:
    run = fresh()
    path = ("video_data", "sources")
    before = run.text
    run.add_item(path)
    run.set((*path, 1, "path"), "more")
    run.set((*path, 1, "repeats"), 2)
    assert run.value((*path, 1)) == {"path": "more", "repeats": 2}
    assert "    - path: more\n      repeats: 2\n" in run.text
    run.exchange(path, 0)
    assert [source["path"] for source in run.value(path)] == ["more", "clips"]
    run.remove_item(path, 0)
    assert run.text == before
    run.remove_item(path, 0)
    assert run.value(path) is None
    run.add_item(path)
    assert run.value(path) == [{}]
    assert run.checked(FILE).by_field.keys() == {(*path, 0, "path")}


def test_short_forms_are_spelled_out_where_a_field_within_is_set() -> None:
    run = RunText(
        "model: {variant: ti2v-5b, path: x}\nvideo_data:\n  sources: clips\nmemory: auto\n"
    )
    assert run.value(("video_data", "sources", 0, "path")) == "clips"
    run.set(("video_data", "sources", 0, "repeats"), 3)
    run.set(("memory", "vram"), "24GB")
    assert run.value(("video_data", "sources")) == [{"path": "clips", "repeats": 3}]
    assert run.checked(FILE).config is not None
    run.add_item(("video_data", "sources"))
    assert len(run.value(("video_data", "sources"))) == 2


def test_a_malformed_text_is_kept_with_the_values_of_before() -> None:
    run = fresh()
    broken = run.text + "x: [\n"
    run.replace(broken)
    assert run.text == broken and run.malformed is not None
    assert run.malformed.startswith("line ") and "column" in run.malformed
    assert run.value(("method", "rank")) == 16
    assert run.checked(FILE).others == [run.malformed]
    with pytest.raises(ValueError, match="line "):
        run.set(("train", "seed"), 1)
    assert run.text == broken


def test_a_text_that_is_too_long_is_kept_and_not_read() -> None:
    run = fresh()
    run.replace(run.text + "#" * 300_000)
    assert run.malformed == "longer than the 256 kB that a run file may have"
    assert run.value(("method", "rank")) == 16


def test_choices_are_of_the_types_of_their_fields() -> None:
    run = fresh()
    masks = find("video_data.sources.*.masks")
    assert masks.choices == ("true", "false") and masks.shown(False) == "false"
    run.enter(masks, "true")
    run.enter(find("output.dtype"), "null")
    optimizer = find("optimizer")
    assert optimizer.union is not None
    run.choose(("optimizer",), optimizer.union, "adamw_low_bit")
    run.enter(find("optimizer.bits"), "4")
    config = run.checked(FILE).config
    assert config is not None, run.checked(FILE).by_field
    assert config.video_data.sources[0].masks is True and config.output.dtype is None
    assert run.value(("optimizer", "bits")) == "4"
    run.enter(find("optimizer.bits"), "")
    run.enter(find("output.dtype"), "")
    assert not run.is_given(("optimizer", "bits")) and not run.is_given(("output", "dtype"))


def test_every_choice_of_every_field_is_a_value_that_it_takes() -> None:
    """Entered in a run file, none is refused as being of a wrong kind."""
    refused: list[str] = []
    for field in ALL:
        if field.kind != "choice" or any(part in field.path for part in ("optimizer", "method")):
            continue
        for choice in field.choices:
            run = fresh()
            run.enter(field, choice)
            problem = run.checked(FILE).by_field.get(field.path, "")
            if problem.startswith(("Must be one of", "Must be true", "Must be '")):
                refused.append(f"{field.path}: {problem}")
    assert refused == []


def test_what_an_input_shows_is_what_is_entered_there() -> None:
    run = fresh()
    before = run.text
    for name, entered in (
        ("model.check_file_names", False),
        ("train.ema", True),
        ("train.schedule", "cosine"),
        ("output.formats", ["comfyui", "kohya"]),
        ("train.steps", "many"),
    ):
        assert run.shown(find(name)) != entered
        run.enter(find(name), entered)
        assert run.shown(find(name)) == entered
    assert run.value(("output", "formats")) == ["comfyui", "kohya"]
    assert run.shown(find("video_data.sources")) == 1
    run.enter(find("model.check_file_names"), True)
    run.enter(find("train.ema"), False)
    run.enter(find("output.formats"), [])
    run.enter(find("train.schedule"), "constant")
    run.enter(find("train.steps"), "3000")
    assert run.shown(find("output.formats")) == ["comfyui"]
    run.remove(("train", "schedule"))
    assert parse_yaml(run.text) == parse_yaml(before)


def test_options_have_the_default_and_what_is_no_choice() -> None:
    run = fresh()
    dtype, variant = find("output.dtype"), find("model.variant")
    assert run.options(dtype)[""].startswith("Default: ") and run.options(dtype)["null"] == "null"
    assert "" not in run.options(variant)
    run.enter(variant, "")
    assert run.shown(variant) == "" and run.options(variant)[""] == "Not given"
    run.set(("method", "kind"), "lorra")
    assert run.options(find("method"))["lorra"] == "lorra (unknown)"


def test_a_default_that_depends_on_other_fields_is_that_of_the_last_text_that_was_right() -> None:
    run = fresh()
    alpha = find("method.alpha")
    assert run.default(alpha) == ""
    assert run.checked(FILE).problems() == [] and run.default(alpha) == "16.0"
    run.enter(find("train.steps"), "many")
    assert run.checked(FILE).problems()[0][1].startswith("train.steps: Must be a whole number")
    assert run.default(alpha) == "16.0"


def test_overrides_are_set_with_their_types() -> None:
    run = fresh()
    run.override(["memory.vram=24GB", "video_data.sources.0.repeats=3", "output.name=fox-2"])
    assert run.value(("memory", "vram")) == "24GB"
    assert run.value(("video_data", "sources", 0, "repeats")) == 3
    assert run.value(("output", "name")) == "fox-2"


def test_a_kind_has_its_help_and_its_problem() -> None:
    run = fresh()
    method = find("method")
    assert method.help_of("lora").startswith("LoRA") and method.help_of("lorra") == ""
    run.set(("method", "kind"), "lorra")
    assert run.checked(FILE).problem(method) is not None
    assert run.checked(FILE).problem(find("train.steps")) is None
