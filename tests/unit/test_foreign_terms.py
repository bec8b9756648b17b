"""Names of other trainers in a run file: the table, the messages, and the page for readers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from onewan.config import load_run
from onewan.config.fields import schema_fields
from onewan.config.foreign_terms import TERMS, Term
from onewan.errors import ConfigError
from onewan.importing import data, method, model, optimizer, output, train

ROOT = Path(__file__).resolve().parents[2]
T2V = "model: {path: org/model, variant: t2v-a14b}\n"
ALL = [term for terms in TERMS.values() for term in terms]


def problems(folder: Path, text: str, name: str = "run.yaml") -> tuple[str, ...]:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_run(file)
    return caught.value.problems


# ------------------------------------------------------------------------------------- the table


def test_every_field_that_the_table_names_exists() -> None:
    assert {term.field for term in ALL if term.field} <= schema_fields().keys()


def test_a_term_without_a_field_says_why() -> None:
    assert [term for term in ALL if not term.field and not term.remark] == []


def test_every_term_has_a_name_and_no_trainer_s_name_stands_for_two_fields() -> None:
    assert all(term.names() for term in ALL)
    for trainer in ("ai_toolkit", "flags", "diffusion_pipe", "onetrainer"):
        counts = Counter(name for term in ALL for name in term.names(trainer))
        assert [name for name, count in counts.items() if count > 1] == []


def test_onetrainer_s_names_lead_where_import_config_leads() -> None:
    modules = (data, method, model, optimizer, output, train)
    imported = {row.key: row.field for module in modules for row in module.ROWS}
    ours = {name: term.field for term in ALL for name in term.names("onetrainer")}
    # Of epochs it makes steps, since it knows the clips.
    common = (imported.keys() & ours.keys()) - {"epochs"}
    assert len(common) > 40
    for name in common:
        shorter, longer = sorted((imported[name], ours[name]), key=len)
        assert longer == shorter or longer.startswith(f"{shorter}."), name


def test_the_page_for_readers_has_the_table() -> None:
    """`python scripts/write_coming_from.py` writes it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    script = ROOT / "scripts" / "write_coming_from.py"
    subprocess.run([sys.executable, script, "--check"], env=environment, check=True)


# ---------------------------------------------------------------------------------- the messages

STEPS = "train.steps (of both experts together; add up those of two separate trainings)"
LR = "optimizer.lr (per_expert.high.lr and per_expert.low.lr where the experts differ)"
KIND = "method.kind (lora, dora, loha, lokr, oft, fine_tune or embedding)"
SOURCES = "video_data.sources (one folder, or a list of folders with their settings)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_train_steps: 100", f"max_train_steps: unknown field; in onewan that is {STEPS}"),
        (
            "train: {max_train_steps: 9}",
            f"train.max_train_steps: unknown field; in onewan that is {STEPS}",
        ),
        ("learning_rate: 1e-4", f"learning_rate: unknown field; in onewan that is {LR}"),
        ("train: {lr: 1e-4}", f"train.lr: unknown field; in onewan that is {LR}"),
        ("network_dim: 16", "network_dim: unknown field; in onewan that is method.rank"),
        ("method: {linear: 16}", "method.linear: unknown field; in onewan that is method.rank"),
        ("type: lora", f"type: unknown field; in onewan that is {KIND}"),
        ("method: {type: lora}", f"method.type: unknown field; in onewan that is {KIND}"),
        ("datasets: data.toml", f"datasets: unknown field; in onewan that is {SOURCES}"),
        (
            "num_repeats: 2",
            "num_repeats: unknown field; in onewan that is video_data.sources[].repeats",
        ),
        (
            "video_data: {sources: [{path: a}, {path: b, num_repeats: 2}]}",
            "video_data.sources.1.num_repeats: unknown field; in onewan that is "
            "video_data.sources.1.repeats",
        ),
        (
            "train: {unload_text_encoder: true}",
            "train.unload_text_encoder: unknown field; there is no counterpart in onewan: "
            "encoders are freed before the transformers are loaded",
        ),
        # A misspelled name of onewan's own is no other trainer's.
        ("optimizr: {}", "optimizr: unknown field; did you mean 'optimizer'?"),
        ("train: {stepps: 5}", "train.stepps: unknown field; did you mean 'steps'?"),
        ("train: {frames: 5}", "train.frames: unknown field; did you mean sample.frames?"),
    ],
)
def test_another_trainer_s_name_is_answered_by_ours(
    tmp_path: Path, text: str, expected: str
) -> None:
    assert problems(tmp_path, T2V + text) == (expected,)


def test_the_settings_of_another_trainer_s_section_get_a_line_each(tmp_path: Path) -> None:
    text = """
network: {type: lora, linear: 16, unheard_of: 1}
datasets: [{folder_path: clips, caption_ext: txt}]
"""
    assert problems(tmp_path, T2V + text) == (
        "network: unknown field; onewan has its settings in other sections",
        f"network.type: in onewan that is {KIND}",
        "network.linear: in onewan that is method.rank",
        f"datasets: unknown field; in onewan that is {SOURCES}",
        "datasets.0.folder_path: in onewan that is video_data.sources[].path",
        "datasets.0.caption_ext: there is no counterpart in onewan: the caption of NAME.mp4 is "
        "NAME.txt, beside it",
    )


def test_all_of_many_names_are_reported(tmp_path: Path) -> None:
    names = [name for term in ALL for name in term.names("flags") if "." not in name]
    unknown = [name for name in names if name not in schema_fields()]
    found = problems(tmp_path, T2V + "".join(f"{name}: 1\n" for name in unknown))
    assert [line.partition(":")[0] for line in found] == unknown


def test_a_whole_file_of_ai_toolkit_is_recognized(tmp_path: Path) -> None:
    text = """
job: extension
config:
  name: fox
  process:
    - type: sd_trainer
      network: {type: lora, linear: 32}
      train: {steps: 2000}
"""
    first, *lines = problems(tmp_path, text)
    assert first.startswith("is a configuration of ai-toolkit, not a run file; `onewan init`")
    assert "docs/coming-from.md" in first
    assert lines == [
        "config.name: in onewan that is output.name",
        f"config.process.0.network.type: in onewan that is {KIND}",
        "config.process.0.network.linear: in onewan that is method.rank",
        f"config.process.0.train.steps: in onewan that is {STEPS}",
    ]


def test_a_whole_file_of_onetrainer_is_recognized(tmp_path: Path) -> None:
    text = '{"training_method": "LORA", "model_type": "WAN_2_2", "learning_rate": 1}'
    (line,) = problems(tmp_path, text, "config.json")
    assert line == (
        "is a configuration of OneTrainer, not a run file; `onewan import-config` makes a run file "
        "from it"
    )


def test_a_toml_file_is_told_from_a_run_file(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, "[general]\nresolution = [960, 544]\n", "config.toml")
    assert line.startswith("is a TOML file, as musubi-tuner, sd-scripts and diffusion-pipe read")
    assert "docs/coming-from.md" in line


def test_a_term_lists_its_names_by_trainer() -> None:
    term = Term("train.steps", ai_toolkit="train.steps", flags="max_train_steps train_steps")
    assert term.names("flags") == ["max_train_steps", "train_steps"]
    assert term.names() == ["train.steps", "max_train_steps", "train_steps"]
