"""Reading run files: the values that result, and the messages about wrong files."""

from __future__ import annotations

import codecs
import json
import os
import sys
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from onewan.config import RunConfig, changed_fields, dump_run, load_run
from onewan.config.load import run_of_text
from onewan.config.schema import SCHEMA_VERSION
from onewan.errors import ConfigError
from onewan.presets.starter import StarterRequest, starter
from onewan.variants import NEGATIVE_PROMPT, VARIANTS, VariantName

SHARE = "train.high_expert_share"
EACH_STEP = "train: {steps: 10, switch_expert_every: 1, "
T2V = "model: {path: org/model, variant: t2v-a14b}\n"
I2V = "model: {path: org/model, variant: i2v-a14b}\n"
TI2V = "model: {path: org/model, variant: ti2v-5b}\n"
NAMES: tuple[VariantName, ...] = get_args(VariantName)


def write(folder: Path, text: str, name: str = "fox.yaml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def problems(file: Path, overrides: tuple[str, ...] = ()) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_run(file, overrides)
    assert caught.value.source == str(file)
    return caught.value.problems


def only_problem(folder: Path, text: str, overrides: tuple[str, ...] = ()) -> str:
    found = problems(write(folder, text), overrides)
    assert len(found) == 1, found
    return found[0]


# ---------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("name", NAMES)
def test_null_fields_become_the_variant_s_defaults(tmp_path: Path, name: VariantName) -> None:
    config = load_run(write(tmp_path, f"model: {{path: org/model, variant: {name}}}"))
    facts = VARIANTS[name]
    assert config.wan_config.spatial_compression_ratio == facts.spatial_compression
    assert config.wan_config.temporal_compression_ratio == facts.temporal_compression
    assert config.wan_config.max_frames == facts.frames
    assert config.video_data.target_fps == facts.fps
    assert config.video_data.resolution == (facts.training_area,)
    assert config.method.alpha == config.method.rank
    assert config.train.timesteps.shift == facts.flow_shift
    sample = config.sample
    assert (sample.frames, sample.fps, sample.steps) == (facts.frames, facts.fps, 25)
    assert sample.shift == facts.flow_shift
    assert sample.guidance == tuple(e.guidance_scale for e in facts.experts)
    assert sample.negative_prompt == NEGATIVE_PROMPT
    assert config.output.name == "fox"


def test_given_values_are_kept(tmp_path: Path) -> None:
    config = load_run(
        write(
            tmp_path,
            T2V + "method: {rank: 8, alpha: 1}\n"
            "video_data: {target_fps: 8, resolution: 832x480}\n"
            "sample: {negative_prompt: '', guidance: [1, 2], shift: 3, frames: 5}\n"
            "output: {name: cat}\n",
        )
    )
    assert (config.method.rank, config.method.alpha) == (8, 1)
    assert config.video_data.target_fps == 8
    assert config.video_data.resolution == ("832x480",)
    assert config.sample.negative_prompt == ""
    assert (config.sample.guidance, config.sample.shift, config.sample.frames) == ((1, 2), 3, 5)
    assert config.output.name == "cat"


def test_yaml_is_read_as_version_1_2(tmp_path: Path) -> None:
    config = load_run(
        write(tmp_path, T2V + "optimizer: {lr: 1e-4}\nsample: {prompts: [off, 12:30]}\n")
    )
    assert config.optimizer.lr == 1e-4
    assert [p.prompt for p in config.sample.prompts] == ["off", "12:30"]


def test_whole_numbers_may_be_written_as_floats_and_floats_as_whole_numbers(tmp_path: Path) -> None:
    text = T2V + "train: {steps: 2e3, max_grad_norm: 2, high_expert_share: 0.5}\nsample: {fps: 8}\n"
    config = load_run(write(tmp_path, text), ["train.save_every=1e2", "optimizer.lr=1"])
    assert (config.train.steps, config.train.save_every) == (2000, 100)
    assert isinstance(config.train.steps, int)
    assert (config.train.max_grad_norm, config.optimizer.lr, config.sample.fps) == (2, 1, 8)
    assert isinstance(config.optimizer.lr, float)
    json = '{"model": {"path": "org/model", "variant": "ti2v-5b"}, "train": {"steps": 5.0}}'
    assert load_run(write(tmp_path, json, "fox.json")).train.steps == 5


def test_json_may_have_tabs_and_a_byte_order_mark(tmp_path: Path) -> None:
    text = '\ufeff{\n\t"model": {"path": "org/model",\t"variant": "ti2v-5b"}\n}'
    assert load_run(write(tmp_path, text, "fox.json")).model.variant == "ti2v-5b"


def test_an_empty_section_is_all_defaults(tmp_path: Path) -> None:
    config = load_run(write(tmp_path, T2V + "method:\nsample:\n  # every: 5\n"))
    assert config.method.rank == 32


def test_changing_one_yaml_alias_does_not_change_the_other(tmp_path: Path) -> None:
    text = T2V + "video_data:\n  sources:\n    - &a {path: a}\n    - *a\n"
    config = load_run(write(tmp_path, text), ["video_data.sources.1.repeats=3"])
    assert [s.repeats for s in config.video_data.sources] == [1, 3]


# ----------------------------------------------------------------------------------------- paths


def test_paths_are_relative_to_the_file_or_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (there / "dog.png").touch()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = write(
        there,
        TI2V + "video_data:\n  sources: [{path: clips}, {path: ../more}, {path: ~/own}]\n"
        "sample: {prompts: [{prompt: a, image: dog.png}]}\n",
    )
    config = load_run(file, ["output.dir=out", "video_data.sources.3.path=clips"])
    paths = [s.path for s in config.video_data.sources]
    own = tmp_path / "home" / "own"
    assert paths == [there / "clips", tmp_path / "more", own, here / "clips"]
    # A default is relative to the run file, like a value in it.
    assert config.video_data.cache_dir == there / "cache"
    assert config.output.dir == here / "out"
    assert config.sample.prompts[0].image == there / "dog.png"
    # A relative name of the file itself makes no difference.
    assert load_run(Path("../there/fox.yaml")).video_data == load_run(file).video_data


@pytest.mark.parametrize(
    ("given", "resolved"),
    [
        ("org/model", "org/model"),
        ("model", "{folder}/model"),
        ("./org/model", "{folder}/org/model"),
        ("/models/wan", "/models/wan"),
    ],
)
def test_a_model_is_a_folder_or_a_repository(tmp_path: Path, given: str, resolved: str) -> None:
    (tmp_path / "model").mkdir()
    config = load_run(write(tmp_path, f"model: {{path: {given}, variant: t2v-a14b}}"))
    assert config.model.path == resolved.format(folder=tmp_path)


COMPONENTS = "transformer: high.gguf, transformer_2: ./low.gguf, vae: org/vae, text_encoder: t5"


def test_components_are_resolved_like_the_path_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "high.gguf").touch()
    config = load_run(
        write(tmp_path, f"model: {{{COMPONENTS}, variant: t2v-a14b}}"),
        ["model.tokenizer=google/umt5-xxl"],
    )
    assert config.model.sources() == {
        "transformer": str(tmp_path / "high.gguf"),
        "transformer_2": str(tmp_path / "low.gguf"),
        "vae": "org/vae",
        "text_encoder": "t5",
        "tokenizer": "google/umt5-xxl",
    }
    assert config.model.source_of("transformer_2") == str(tmp_path / "low.gguf")
    assert (config.memory.weights, config.model.check_file_names) == ("as_stored", True)
    assert load_run(write(tmp_path, dump_run(config), "again.yaml")).model == config.model
    mixed = load_run(write(tmp_path, "model: {path: org/a, vae: org/b, variant: t2v-a14b}"))
    assert mixed.model.sources() == {"path": "org/a", "vae": "org/b"}
    assert mixed.model.source_of("transformer") == "org/a"


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("variant: t2v-a14b", "model.path: is required, got nothing; give the folder or hub name"),
        (
            "transformer: a/b, variant: t2v-a14b",
            "model.transformer_2: is needed where model.path is not given, got nothing; give "
            "transformer_2 and vae and text_encoder, or a whole model as the path",
        ),
        ("transformer: a/b, vae: a/b, variant: ti2v-5b", "model.text_encoder: is needed where"),
        (
            "path: a/b, transformer_2: a/c, variant: ti2v-5b",
            "model.transformer_2: has no effect, since ti2v-5b has one transformer, got 'a/c'",
        ),
        (f"{COMPONENTS}, variant: t2v-a14b, quantized: no", "model.quantized: unknown field"),
    ],
)
def test_a_model_without_a_needed_component_is_refused(
    tmp_path: Path, model: str, expected: str
) -> None:
    assert only_problem(tmp_path, f"model: {{{model}}}").startswith(expected)


def test_only_components_that_the_run_uses_are_needed(tmp_path: Path) -> None:
    one = "model: {transformer: a/b, vae: a/b, text_encoder: a/b, variant: t2v-a14b, experts: high}"
    assert load_run(write(tmp_path, one)).model.path is None
    found = problems(write(tmp_path, one + "\nsample: {prompts: [a fox]}"))
    assert [p[:30] for p in found] == ["model.transformer_2: is needed"]


def test_a_run_folder_is_read_in_place_of_its_run_file(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    first = load_run(write(tmp_path, T2V + "video_data: {sources: [{path: clips}]}\n"))
    moved = tmp_path / "elsewhere" / "renamed"
    moved.mkdir(parents=True)
    write(moved, dump_run(first), "resolved.yaml")
    again = load_run(moved)
    assert (again.output.dir, again.output.name) == (moved.parent, "renamed")
    assert {name for name, _, _ in changed_fields(first, again)} == {"output.dir", "output.name"}
    assert load_run(moved, ["output.name=third"]).output.name == "third"


@pytest.mark.parametrize(
    "sources",
    [
        "clips",
        "[clips]",
        "[{path: clips}]",
        "[clips, more]",
        "[{path: clips}, more]",
    ],
)
def test_a_path_alone_is_a_source(tmp_path: Path, sources: str) -> None:
    for field in ("video_data", "validation"):
        config = load_run(write(tmp_path, f"{T2V}{field}: {{sources: {sources}}}\n"))
        found = [source.path for source in getattr(config, field).sources]
        assert found == [tmp_path / "clips", tmp_path / "more"][: 1 + ("more" in sources)]
        assert load_run(write(tmp_path, dump_run(config), "again.yaml")) == config


def test_a_source_that_is_a_path_takes_overrides(tmp_path: Path) -> None:
    file = write(tmp_path, T2V + "video_data: {sources: clips}\n")
    (source,) = load_run(file, ["video_data.sources.0.repeats=3"]).video_data.sources
    assert (source.path, source.repeats) == (tmp_path / "clips", 3)
    (source,) = load_run(file, ["video_data.sources=/elsewhere"]).video_data.sources
    assert source.path == Path("/elsewhere").absolute()


def test_a_text_alone_is_a_prompt(tmp_path: Path) -> None:
    config = load_run(write(tmp_path, T2V + "sample: {prompts: a fox}\n"))
    assert [prompt.prompt for prompt in config.sample.prompts] == ["a fox"]


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ("null", (399360,)),
        ("480p", (399360,)),
        ("720P", (921600,)),
        ("512", (262144,)),
        ('"512"', (262144,)),
        ("5.12e2", (262144,)),
        ("2048", (2048**2,)),
        ("64", (4096,)),
        ("4096", (4096,)),
        ("399360", (399360,)),
        ("832x480", ("832x480",)),
        ("832 X 480", ("832x480",)),
        ("[832, 480]", ("832x480",)),  # a list of two sides is one size
        ("[512, 768]", ("512x768",)),
        ("[512]", (262144,)),
        ("[512, 640, 768]", (262144, 409600, 589824)),
        ('["512", "768"]', (262144, 589824)),
        ("[512, 589824]", (262144, 589824)),
        ("[36864, 921600]", (36864, 921600)),
        ("[[832, 480], [480, 832]]", ("832x480", "480x832")),
        ('["832x480", 480p, 512]', ("832x480", 399360, 262144)),
    ],
)
def test_training_sizes_are_written_in_many_ways(
    tmp_path: Path, given: str, sizes: tuple[int | str, ...]
) -> None:
    limit = "max_resolution: [1280, 1280]"
    text = f"{T2V}video_data: {{resolution: {given}, {limit}}}\n"
    config = load_run(write(tmp_path, text))
    assert config.video_data.resolution == sizes
    assert load_run(write(tmp_path, dump_run(config))) == config


@pytest.mark.parametrize("name", ["720p", "704p"])
def test_a_named_size_is_the_variant_s_own(tmp_path: Path, name: str) -> None:
    config = load_run(write(tmp_path, f"{TI2V}video_data: {{resolution: {name}}}"))
    assert config.video_data.resolution == (1280 * 704,)


def test_two_sides_that_the_model_does_not_take_are_refused_as_one_size(tmp_path: Path) -> None:
    found = only_problem(tmp_path, T2V + "video_data: {resolution: [960, 540]}")
    assert found == (
        "video_data.resolution: sides must be multiples of 16, got '960x540'; the nearest is "
        "'960x544'"
    )


# ------------------------------------------------------------------------------------- overrides


def test_overrides_can_set_every_kind_of_field(tmp_path: Path) -> None:
    config = load_run(
        write(tmp_path, "model: {path: org/model}\n"),
        [
            "model.variant=ti2v-5b",
            "train.steps=1000",
            "train.steps=2_000",
            "optimizer.lr=3e-4",
            "wan_config.transformer_layers_to_train=[0, 1]",
            "video_data.sources.0.path=/a",
            "video_data.sources.1.path=/b",
            "video_data.sources.0.repeats=2",
            "method.alpha=null",
        ],
    )
    assert (config.train.steps, config.optimizer.lr) == (2000, 3e-4)
    assert config.wan_config.transformer_layers_to_train == (0, 1)
    assert [(str(s.path), s.repeats) for s in config.video_data.sources] == [("/a", 2), ("/b", 1)]
    assert config.method.alpha == 32


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a cat: it runs # fast", "a cat: it runs # fast"),
        ("[a cat", "[a cat"),
        ("2026", "2026"),
        ("'quoted: yes'", "quoted: yes"),
        ('""', ""),
        ("null", NEGATIVE_PROMPT),
    ],
)
def test_override_text_is_not_parsed_as_yaml_where_a_string_is_expected(
    tmp_path: Path, text: str, value: str
) -> None:
    config = load_run(write(tmp_path, T2V), [f"sample.negative_prompt={text}"])
    assert config.sample.negative_prompt == value


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stesp=5", "train.stesp: unknown field; did you mean 'steps'?"),
        (
            "sources=3",
            "sources: unknown field; did you mean video_data.sources or validation.sources?",
        ),
        ("logging.zzz=3", "logging.zzz: unknown field; known here: tensorboard, wandb"),
        ("train", "override 'train': is not path.to.field=value"),
        ("=5", "override '=5': is not path.to.field=value"),
        ("train..steps=5", "override 'train..steps=5': is not path.to.field=value"),
        ("train.steps=[1", "train.steps: can't read '[1' as YAML"),
        ("video_data.sources.1.path=/a", "video_data.sources.1.path: the list has 0 items"),
        ("train.0=1", "train.0: has no item 0"),
        ("model.path.x=1", "model.path.x: has no field 'x', got 'org/model'"),
    ],
)
def test_a_wrong_override_is_reported_with_its_key(
    tmp_path: Path, override: str, expected: str
) -> None:
    assert only_problem(tmp_path, T2V, (override,)).startswith(expected)


def test_wrong_overrides_and_a_wrong_file_are_reported_together(tmp_path: Path) -> None:
    found = problems(write(tmp_path, T2V + "train: {steps: 0}"), ("train", "memory.x=1"))
    assert [p.split(": ")[0] for p in found] == ["override 'train'", "train.steps", "memory.x"]


# -------------------------------------------------------------------------------------- problems


def test_all_invalid_fields_are_reported_at_once(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
model: {path: org/model, variant: t2v-a14b, experts: hihg}
wan_config: {transformer_layers_to_train: [3, 3]}
video_data: {sources: [{path: a, repeat: 2}]}
method: {rank: -2}
optimizer: {lr: fast}
train: {stesp: 5, steps: 10}
""",
    )
    assert set(problems(file)) == {
        "model.experts: must be 'both', 'high' or 'low', got 'hihg'; did you mean 'high'?",
        "wan_config.transformer_layers_to_train: has 3 twice, got [3, 3]; give each once",
        "video_data.sources.0.repeat: unknown field; did you mean 'repeats'?",
        "method.rank: must be at least 1, got -2; change it, or leave it out for 32",
        "optimizer.lr: must be a number, got 'fast'; change it, or leave it out for 0.0001",
        "train.stesp: unknown field; did you mean 'steps'?",
    }


def test_all_broken_rules_are_reported_at_once(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
model: {path: org/model, variant: t2v-a14b}
video_data: {resolution: [830x480]}
train: {steps: 10, warmup_steps: 10}
sample: {prompts: [a fox], every: 5, frames: 80, guidance: [1]}
""",
    )
    assert set(problems(file)) == {
        "video_data.resolution: sides must be multiples of 16, got '830x480'; "
        "the nearest is '832x480'",
        "train.warmup_steps: must be less than the 10 steps of the high expert, got 10; lower it, "
        "or give that expert more steps",
        "sample.frames: must be 4n+1, got 80; the nearest are 77 and 81",
        "sample.guidance: must have one scale for each expert of t2v-a14b, [high, low], got "
        "[1.0]; give 2, or leave it out for the official [4.0, 3.0]",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {steps: 1.5}", "train.steps: must be a whole number, got 1.5; change it"),
        (
            "train: {high_expert_share: often}",
            "train.high_expert_share: must be 'equal' or 'density', or a number",
        ),
        (
            "train: {high_expert_share: 1.5}",
            "train.high_expert_share: must be 'equal' or 'density', or at most 1",
        ),
        ("train: {steps: true}", "train.steps: must be a whole number, got true; change it"),
        ("train: {steps: '5'}", "train.steps: must be a whole number, got '5'; change it"),
        (
            "train: {high_expert_share: true}",
            "train.high_expert_share: must be 'equal' or 'density', or a number, ",
        ),
        ("wan_config: {transformer_layers_to_train: [true]}", "wan_config.transformer_layers_to_"),
        ("video_data: {resolution: true}", "video_data.resolution: true is neither a side (64 to"),
        ("train: {max_grad_norm: .inf}", "train.max_grad_norm: must be a finite number, got inf"),
        ("optimizer: {betas: [0.9, .nan]}", "optimizer.betas.1: must be a finite number, got nan"),
        ("sample: {guidance: [.inf, 1]}", "sample.guidance.0: must be a finite number, got inf"),
        ("optimizer: {lr: true}", "optimizer.lr: must be a number, got true"),
        ("train: 5", "train: must be a section with fields, got 5"),
        ("train: {3: 4}", "train.3: unknown field"),
        ("optimizer: {betas: [0.9]}", "optimizer.betas: has too few values, got [0.9]"),
        ("optimizer: {betas: [0.9, 1]}", "optimizer.betas.1: must be less than 1, got 1"),
        ("optimizer: {lr: .inf}", "optimizer.lr: must be a finite number, got inf"),
        ("output: {name: 7}", "output.name: must be text, got 7; put it in quotes"),
        ("output: {name: a/b}", "output.name: must be a plain name for a folder"),
        ("output: {formats: []}", "output.formats: must be a list of at least 1, got []"),
        ("output: {formats: [comfyui, comfyui]}", "output.formats: has comfyui twice"),
        ("memory: {gradient_checkpointing: 7}", "memory.gradient_checkpointing: must be true or"),
        ("sample: {prompts: 3}", "sample.prompts: must be a list, got 3"),
        ("sample: {prompts: [5]}", "sample.prompts.0: must be a section with fields, got 5"),
        ("sample: {prompts: [{seed: 5}]}", "sample.prompts.0.prompt: is required, got nothing"),
        ("sample: {every: 5}", "sample.every: has no effect, since sample.prompts is empty"),
        ("video_data: {sources: [3]}", "video_data.sources.0: must be a section with fields"),
        ("video_data: {resolution: 1080p}", "video_data.resolution: must be 480p or 720p if it is"),
        ("video_data: {resolution: 3000}", "video_data.resolution: 3000 is neither a side (64 to"),
        ("video_data: {resolution: 512.5}", "video_data.resolution: 512.5 is neither a side (64"),
        ("video_data: {resolution: []}", "video_data.resolution: has no size, got []; write 480p"),
        ("video_data: {resolution: [[1]]}", "video_data.resolution: [1] is neither a side (64 to"),
        ("video_data: {resolution: 1296x720}", "video_data.resolution: must fit into video_data."),
        (
            "video_data: {min_resolution: [512, 9], max_resolution: [256, 256]}",
            "video_data.min_resolution: must not be above video_data.max_resolution [256, 256]",
        ),
        (
            "video_data: {background: #ffffff\n}",
            'video_data.background: nothing is no color; write it as "#rrggbb", in quotes',
        ),
        (
            "video_data: {background: white}",
            "video_data.background: `white` is no color; write it as",
        ),
        ("wan_config: {transformer_layers_to_train: []}", "wan_config.transformer_layers_to_"),
        (
            "wan_config: {spatial_compression_ratio: 16}",
            "wan_config.spatial_compression_ratio: is 8 for t2v-a14b, got 16; leave it out",
        ),
        ("sample: {width: 333}", "sample.width: must be a multiple of 16 for t2v-a14b, got 333"),
        (
            "train: {condition_shares: {first: 1}}",
            "train.condition_shares: has no effect, since t2v-a14b is given no frames",
        ),
        (
            "sample: {prompts: [{prompt: a, image: no.png}]}",
            "sample.prompts.0.image: there is no file",
        ),
    ],
)
def test_one_problem_gives_one_line(tmp_path: Path, text: str, expected: str) -> None:
    found = only_problem(tmp_path, T2V + text)
    assert found.startswith(expected)
    assert "\n" not in found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            TI2V.replace("}", ", experts: high}"),
            "model.experts: ti2v-5b has one expert, got 'high'; leave it out",
        ),
        (
            TI2V + "train: {high_expert_share: 0.4}",
            "train.high_expert_share: has no effect, since only one expert is trained, got 0.4",
        ),
        (
            I2V.replace("}", ", experts: low}") + "train: {high_expert_share: 0.4}",
            f"{SHARE}: has no effect, since only one expert is trained, got 0.4; leave it out",
        ),
        (TI2V + "video_data: {resolution: 848x480}", "video_data.resolution: sides must be multi"),
        (TI2V + "sample: {height: 720}", "sample.height: must be a multiple of 32 for ti2v-5b"),
        (TI2V + "sample: {guidance: [4, 3]}", "sample.guidance: must have one scale for each"),
        (I2V + "sample: {prompts: [a]}", "sample.prompts.0.image: i2v-a14b starts from an image"),
        ("method: {rank: 4}", "model.variant: is required, got nothing; add it: 't2v-a14b'"),
    ],
)
def test_rules_depend_on_the_variant(tmp_path: Path, text: str, expected: str) -> None:
    found = problems(write(tmp_path, text))
    assert found[0].startswith(expected)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda:10", "mps", "xpu:0", "hpu", "sim:1"])
def test_the_reader_accepts_any_name_of_a_device(tmp_path: Path, device: str) -> None:
    """Only PyTorch knows which there are; `onewan.memory.device` asks it."""
    assert load_run(write(tmp_path, T2V), [f"model.device={device}"]).model.device == device


@pytest.mark.parametrize(
    ("text", "expert", "fewest"),
    [
        (T2V + EACH_STEP, "high", 5),
        (T2V + EACH_STEP + "high_expert_share: 0.3, ", "high", 3),
        (T2V + EACH_STEP + "high_expert_share: 0.9, ", "low", 1),
        (T2V + EACH_STEP + "high_expert_share: density, ", "low", 3),
        (T2V + "train: {steps: 10, ", "high", 10),  # one period: the low expert has no steps
        (T2V.replace("}", ", experts: low}") + "train: {steps: 10, ", None, 10),
        (TI2V + "train: {steps: 10, ", None, 10),
        (TI2V + "train: {steps: 1, ", None, 1),
        (T2V + "train: {steps: 1, ", "high", 1),
    ],
)
def test_a_warm_up_ends_before_each_expert_s_last_step(
    tmp_path: Path, text: str, expert: str | None, fewest: int
) -> None:
    file = write(tmp_path, f"{text}warmup_steps: {fewest - 1}}}")
    assert load_run(file).train.warmup_steps == fewest - 1
    found = only_problem(tmp_path, f"{text}warmup_steps: {fewest}}}")
    limit = f"the {fewest} steps of the {expert} expert" if expert else f"train.steps ({fewest})"
    assert found.startswith(f"train.warmup_steps: must be less than {limit}")


def test_a_warm_up_that_is_too_long_for_one_expert_names_the_remedy(tmp_path: Path) -> None:
    found = only_problem(tmp_path, T2V + EACH_STEP + "warmup_steps: 7}")
    assert found.endswith("got 7; lower it, or give that expert more steps")


@pytest.mark.parametrize(("share", "idle", "other"), [("0", "high", "low"), ("1.0", "low", "high")])
def test_an_expert_share_that_leaves_no_steps_is_refused(
    tmp_path: Path, share: str, idle: str, other: str
) -> None:
    # A warm-up longer than no steps follows from the share, and is not a second problem.
    found = only_problem(tmp_path, T2V + f"train: {{high_expert_share: {share}, warmup_steps: 2}}")
    assert found == (
        f"{SHARE}: leaves the {idle} expert no steps, got {float(share):g}; leave it out, "
        f"and set model.experts={other} to train the {other} expert alone"
    )


def test_t2v_refuses_an_image_that_exists(tmp_path: Path) -> None:
    (tmp_path / "dog.png").touch()
    found = only_problem(tmp_path, T2V + "sample: {prompts: [{prompt: a, image: dog.png}]}")
    assert found.startswith("sample.prompts.0.image: t2v-a14b takes no image")


def test_max_resolution_applies_in_either_orientation(tmp_path: Path) -> None:
    text = T2V + "video_data: {max_resolution: [1280, 720], resolution: "
    assert load_run(write(tmp_path, text + "720x1280}")).video_data.resolution == ("720x1280",)
    found = problems(write(tmp_path, text + "[800x800, 1280x720, 64x1296]}"))
    assert [p.split(": must fit into")[0] for p in found] == [
        "video_data.resolution.0",
        "video_data.resolution.2",
    ]


def test_rules_are_checked_only_after_all_fields_are_valid(tmp_path: Path) -> None:
    text = "model: {path: a, variant: t2v}\nsample: {width: 333, frames: 6, prompts: [a]}\n"
    found = problems(write(tmp_path, text))
    assert [p.split(":")[0] for p in found] == ["model.variant"]
    found = problems(write(tmp_path, text.replace("{path: a, variant: t2v}", "5")))
    assert [p.split(":")[0] for p in found] == ["model"]
    found = problems(write(tmp_path, text.replace("t2v", "t2v-a14b")))
    assert [p.split(":")[0] for p in found] == ["sample.width", "sample.frames"]


# ------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (T2V + "train: {steps: 1, steps: 2}", "line 2, column 19: 'steps' is given twice"),
        ("model:\n\tpath: a", "line 2, column 1: a tab; indent with spaces"),
        ("model: [1,", "line 1, column 11: expected the node content"),
        ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2", "line 2, column 1: expected a single document"),
        ("a: !!python/none x", "line 1, column 4: the tag tag:yaml.org,2002:python/none is not"),
        ("a: !!bool abc", "line 1, column 4: the tag tag:yaml.org,2002:bool is not supported"),
        ("%YAML 1.1\n---\na: off", "line 2, column 1: is not YAML 1.2"),
        ('a: "\\UFFFFFFFF"', "line 1: \\UFFFFFFFF is no character"),
        ('a: "\\ud800"', "line 1, column 4: contains half of a character"),
        ('a: "C:\\clips"', "line 1, column 8: in double quotes a backslash starts an escape"),
        ('a: "C:\\Users\\x"', "line 1, column 9: in double quotes a backslash starts an escape"),
        ("a: " + "[" * 600, "line 1, column 44: nested more than 40 levels deep"),
        ("a: " + "1" * 400, "line 1, column 4: a number of 400 characters; shorten it"),
        ("a: " + "9" * 21, "line 1, column 4: 999999999999999999999 does not fit into 64 bits"),
        ("a: 0x_", "line 1, column 4: '0x_' is no number"),
        ("a: &a [*a]", "line 1, column 8: *a stands for something that contains it"),
        ("a: [" + "1, " * 6000 + "]", "line 1, column "),
        ("a: '" + "x" * 300_000 + "'", "can't be read: is larger than 256 KiB"),
        ("a: 1\nb: \x01", "line 2: '\\x01' is not allowed"),
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- a", "must have fields such as `model:` at the top level, got ['a']"),
        ("schema_version: 99\nnew: 1", "schema_version: is 99, but this onewan knows versions up"),
        (T2V + "schema_version: one", "schema_version: must be a whole number, got 'one'"),
    ],
)
def test_an_unreadable_yaml_file_gives_one_problem(
    tmp_path: Path, text: str, expected: str
) -> None:
    found = only_problem(tmp_path, text)
    assert found.startswith(expected)
    assert "\n" not in found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ('{"a": 1,\n}', "line "),
        (" ", "is empty"),
        ("[]", "must have fields"),
        ("[" * 600 + "]" * 600, "is nested more than 40 levels deep"),
        ("[" * 100_000, "is nested more than 40 levels deep"),
        ('{"a": ' + "1" * 400 + "}", "has a number of 400 digits"),
        ('{"a": 99999999999999999999}', "99999999999999999999 does not fit into 64 bits"),
        ('{"a": "\\ud800"}', "has '\\ud800': contains half of a character"),
        (json.dumps({"a": [1] * 6000}), "has more than 5,000 values"),
    ],
)
def test_an_unreadable_json_file_gives_one_problem(
    tmp_path: Path, text: str, expected: str
) -> None:
    (found,) = problems(write(tmp_path, text, "fox.json"))
    assert found.startswith(expected)


def test_a_missing_file_a_plain_folder_and_another_encoding_are_reported(tmp_path: Path) -> None:
    assert problems(tmp_path / "no.yaml")[0].startswith("there is no such file")
    assert problems(tmp_path)[0].startswith("is a folder without resolved.yaml")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("model: \u00e9".encode("latin-1"))
    found = "is not UTF-8 text (byte 7, in Windows-1252 'é'); save it as UTF-8"
    assert problems(latin) == (found,)


def test_dates_are_text(tmp_path: Path) -> None:
    config = load_run(write(tmp_path, T2V + "output: {name: 2026-13-01}"))
    assert config.output.name == "2026-13-01"


def test_aliases_that_stand_for_millions_of_values_are_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 11)]
    text = "\n".join(lines)
    assert len(text) < 700
    assert "more than 5,000 values" in only_problem(tmp_path, text)


def test_twenty_thousand_unknown_keys_give_one_line(tmp_path: Path) -> None:
    text = T2V + "".join(f"key{number}: 1\n" for number in range(20_000))
    assert "more than 5,000 values" in only_problem(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("train:\n" + "".join(f"  key{n}: 1\n" for n in range(2000)), "train: unknown fields"),
        ("video_data: {sources: [" + "{path: a, repeats: -1}, " * 400 + "]}", "video_data.sour"),
        ("sample: {prompts: [" + "{prompt: a, image: no.png}, " * 400 + "]}", "sample.prompts.*"),
    ],
)
def test_many_problems_of_one_kind_give_a_few_lines_and_a_count(
    tmp_path: Path, text: str, counted: str
) -> None:
    found = problems(write(tmp_path, T2V + text))
    assert len(found) == 6
    assert found[-1].startswith(counted)
    assert found[-1].endswith(" more like these")


def test_a_long_value_is_shortened(tmp_path: Path) -> None:
    text = T2V + f"video_data: {{resolution: '8{'[' * 100_000}'}}"
    assert len(only_problem(tmp_path, text)) < 1100


def test_a_path_that_lost_its_backslashes_to_double_quotes_is_refused(tmp_path: Path) -> None:
    text = T2V + 'video_data: {sources: [{path: "C:\\new\\textures"}]}'
    found = only_problem(tmp_path, text)
    assert found.startswith("video_data.sources.0.path: contains a line break, a tab or another")
    assert "use single quotes, or forward slashes" in found


@pytest.mark.parametrize(
    "override",
    [
        f"video_data.sources.{'9' * 5000}.path=x",
        f"train.steps={'9' * 5000}",
        f"{'a.' * 3000}b=1",
        f"{'a' * 5000}=1",
        "train.steps=" + "[" * 5000,
        "train.steps=!!bool abc",
        "sample.negative_prompt=\udcff",
        "output.name=\udcff",
        "output.name=a\tb",
        "model.path=a\nb",
    ],
)
def test_odd_overrides_give_one_short_line(tmp_path: Path, override: str) -> None:
    found = only_problem(tmp_path, T2V + "video_data: {sources: [{path: a}]}", (override,))
    assert len(found) < 300


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files in folders")
def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    fifo = tmp_path / "run.yaml"
    os.mkfifo(fifo)
    assert problems(fifo) == ("can't be read: is a FIFO, not a file",)
    assert problems(Path("/dev/zero")) == ("can't be read: is a device, not a file",)
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    assert problems(loop)[0].startswith("can't be read: ")
    long = tmp_path / ("x" * 300 + ".yaml")
    assert problems(long)[0].startswith("can't be read: ")
    assert problems(tmp_path / "a\0b.yaml")[0].startswith("can't be read: ")


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names of any bytes")
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_a_run_file_may_begin_with_a_byte_order_mark(
    tmp_path: Path, encoding: str, ending: str
) -> None:
    text = '{"model": {"path": "org/model", "variant": "t2v-a14b"}, "sample": {"seed": 7}}'
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    file = tmp_path / f"run.{ending}"
    file.write_bytes(mark + text.encode(encoding))  # Windows PowerShell's > writes utf-16
    assert load_run(file).sample.seed == 7


def test_a_folder_whose_name_is_not_utf8_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    assert "name is not UTF-8" in only_problem(folder, T2V)
    file = tmp_path / os.fsdecode(b"caf\xe9.yaml")
    file.write_text(T2V, encoding="utf-8")
    assert problems(file)[0].startswith("output.name: ")


def test_the_message_has_the_file_and_a_line_per_problem(tmp_path: Path) -> None:
    file = write(tmp_path, T2V + "train: {steps: 0, seed: -1}")
    with pytest.raises(ConfigError) as caught:
        load_run(file)
    first, *rest = str(caught.value).splitlines()
    assert first == f"{file}: 2 problems"
    assert len(rest) == 2


# ------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("name", NAMES)
def test_a_dump_is_read_back_equal(tmp_path: Path, name: VariantName) -> None:
    config = load_run(write(tmp_path, starter(StarterRequest(variant=name))))
    text = dump_run(config)
    assert text.startswith(f"schema_version: {SCHEMA_VERSION}\n")
    assert load_run(write(tmp_path, text, "other.yaml")) == config


_CHARACTERS = st.characters(exclude_characters="\0", exclude_categories=["Cs"])


@settings(max_examples=60, deadline=None)
@given(text=st.text(_CHARACTERS), lr=st.floats(min_value=1e-300, max_value=1e300))
def test_any_text_and_float_is_read_back_from_a_dump(
    tmp_path_factory: pytest.TempPathFactory, text: str, lr: float
) -> None:
    folder = tmp_path_factory.mktemp("dump")
    base = load_run(write(folder, T2V))
    sample = base.sample.model_copy(update={"negative_prompt": text})
    optimizer = base.optimizer.model_copy(update={"lr": lr})
    config = base.model_copy(update={"sample": sample, "optimizer": optimizer})
    assert load_run(write(folder, dump_run(config), "again.yaml")) == config


@pytest.mark.parametrize("text", ["a\x85b", "a\u2028b", "off", "1e-4", "a: b # c", "a\nb ", "~"])
def test_text_that_looks_like_yaml_is_read_back_from_a_dump(tmp_path: Path, text: str) -> None:
    base = load_run(write(tmp_path, T2V))
    sample = base.sample.model_copy(update={"negative_prompt": text})
    config = base.model_copy(update={"sample": sample})
    assert load_run(write(tmp_path, dump_run(config), "again.yaml")) == config


def test_changed_fields_lists_the_leaves_that_differ(tmp_path: Path) -> None:
    text = TI2V + "sample: {prompts: [a, b]}\n"
    old = load_run(write(tmp_path, text))
    new = load_run(write(tmp_path, text), ["train.steps=5", "sample.prompts=[a, c, d]"])
    assert changed_fields(old, old) == []
    assert changed_fields(old, new) == [
        ("train.steps", 2000, 5),
        ("sample.prompts.1.prompt", "b", "c"),
        ("sample.prompts.2.prompt", None, "d"),
    ]


def test_a_dump_is_plain_yaml(tmp_path: Path) -> None:
    config = load_run(write(tmp_path, T2V))
    data = YAML(typ="safe", pure=True).load(dump_run(config))
    assert next(iter(data)) == "schema_version"
    assert list(data) == list(RunConfig.model_fields)


@pytest.mark.parametrize(
    ("variant", "probability", "shares"),
    [
        ("ti2v-5b", 0.3, {"first": 0.3, "both": 0.0, "last": 0.0, "none": 0.7}),
        ("ti2v-5b", 0, {"first": 0.0, "both": 0.0, "last": 0.0, "none": 1.0}),
        # The field had no effect on other variants, though their resolved files have it.
        ("i2v-a14b", 0.2, {"first": 1.0, "both": 0.0, "last": 0.0, "none": 0.0}),
    ],
)
def test_files_of_the_version_with_first_frame_probability_are_read(
    tmp_path: Path, variant: str, probability: float, shares: dict[str, float]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {{path: x/y, variant: {variant}}}\n"
        f"video_data: {{sources: {tmp_path}}}\n"
        f"train: {{first_frame_probability: {probability}}}\n",
        encoding="utf-8",
    )
    config = load_run(file)
    assert config.train.condition_shares is not None
    assert dict(config.train.condition_shares) == pytest.approx(shares)


def test_a_text_is_read_as_the_file_that_it_would_be(tmp_path: Path) -> None:
    text = starter(StarterRequest(variant="ti2v-5b", purpose="style", name="dog"))
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    assert run_of_text(text, file) == load_run(file)
    with pytest.raises(ConfigError, match="is empty"):
        run_of_text("# nothing\n", file)
    with pytest.raises(ConfigError) as caught:
        run_of_text(text + "x: [\n", file)
    assert caught.value.problems[0].startswith("line ")
