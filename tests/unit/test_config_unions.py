"""Sections of a run file that have one of several kinds: reading, overrides, dumps and errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from onewan.config import changed_fields, dump_run, load_run
from onewan.config.method import DoraMethod, FineTuneMethod, LoraMethod
from onewan.config.objective import BetaTimesteps, MinSnrWeighting, UniformTimesteps
from onewan.config.optimizer import (
    AdamWOptimizer,
    ConstantSchedule,
    CosineSchedule,
    CustomOptimizer,
    LionOptimizer,
    RexSchedule,
)
from onewan.config.schema import EmaSection
from onewan.errors import ConfigError

T2V = "model: {path: org/model, variant: t2v-a14b}\n"


def write(folder: Path, text: str, name: str = "fox.yaml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def problems(folder: Path, text: str, overrides: tuple[str, ...] = ()) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_run(write(folder, T2V + text), overrides)
    return caught.value.problems


# ------------------------------------------------------------------------------------------ reading


def test_a_section_without_a_kind_is_of_the_default_kind(tmp_path: Path) -> None:
    config = load_run(write(tmp_path, T2V + "method: {rank: 8}\noptimizer: {lr: 1}\n"))
    assert config.method == LoraMethod(rank=8, alpha=8)
    assert config.optimizer == AdamWOptimizer(lr=1)
    assert config.train.schedule == ConstantSchedule()
    assert config.train.timesteps == UniformTimesteps(shift=12)
    assert config.train.ema is None


def test_a_name_is_a_section_if_its_other_fields_have_defaults(tmp_path: Path) -> None:
    text = "train: {schedule: cosine, timesteps: beta, loss: {weighting: min_snr}, ema: {}}\n"
    config = load_run(write(tmp_path, T2V + text))
    assert config.train.schedule == CosineSchedule()
    assert config.train.timesteps == BetaTimesteps(shift=12)
    assert config.train.loss.weighting == MinSnrWeighting()
    assert config.train.ema == EmaSection(decay=0.999, offload=True)


def test_empty_sections_and_lists_are_their_defaults_at_any_depth(tmp_path: Path) -> None:
    text = """
embeddings:
per_expert: {high: }
optimizer:
train: {schedule: , timesteps: , loss: , ema: }
video_data: {sources: }
sample: {prompts: }
"""
    config = load_run(write(tmp_path, T2V + text))
    assert config == load_run(write(tmp_path, T2V))


# ---------------------------------------------------------------------------------------- overrides


def test_an_override_can_change_the_kind(tmp_path: Path) -> None:
    file = write(tmp_path, T2V + "train: {schedule: cosine}\n")
    config = load_run(
        file,
        [
            "optimizer.name=lion",
            "optimizer.lr=1e-5",
            "train.schedule.kind=rex",
            "train.schedule.end_factor=0.5",
            "train.loss.weighting=min_snr",
            "train.loss.weighting.gamma=3",
            "train.ema.decay=0.9",
            "method.kind=fine_tune",
            "method.modules.0=norms",
        ],
    )
    assert config.optimizer == LionOptimizer(lr=1e-5)
    assert config.train.schedule == RexSchedule(end_factor=0.5)
    assert config.train.loss.weighting == MinSnrWeighting(gamma=3)
    assert config.train.ema == EmaSection(decay=0.9)
    assert config.method == FineTuneMethod(modules=("norms",))
    assert load_run(file, ["train.schedule=linear"]).train.schedule.kind == "linear"
    custom = ["optimizer.name=custom", "optimizer.class_path=torch.optim.RAdam"]
    arguments = ["optimizer.arguments.eps=1e-6", "optimizer.arguments.betas=[0.8, 0.9]"]
    assert load_run(file, custom + arguments).optimizer == CustomOptimizer(
        class_path="torch.optim.RAdam", arguments={"eps": 1e-6, "betas": (0.8, 0.9)}
    )


def test_fields_that_the_overridden_kind_does_not_have_are_reported(tmp_path: Path) -> None:
    text = "method: {kind: lora, rank: 8, dropout: 0.1, modules: [ffn]}\n"
    assert problems(tmp_path, text, ("method.kind=fine_tune",)) == (
        "method.rank: unknown field of method.kind fine_tune, but one of lora, dora, loha, lokr; "
        "fine_tune has modules, weights, fused_step",
        "method.dropout: unknown field of method.kind fine_tune, but one of lora, dora; fine_tune "
        "has modules, weights, fused_step",
    )
    dora = load_run(write(tmp_path, T2V + text), ["method.kind=dora"]).method
    assert dora == DoraMethod(rank=8, alpha=8, dropout=0.1, modules=("ffn",))


def test_paths_of_members_and_lists_are_relative_to_the_file(tmp_path: Path) -> None:
    for name in ("high.safetensors", "fox.safetensors"):
        (tmp_path / name).touch()
    config = load_run(
        write(
            tmp_path,
            T2V + "method: {init_from: [high.safetensors]}\n"
            "embeddings: [{placeholder: <fox>, init_from: fox.safetensors}]\n"
            "validation: {sources: [{path: held}]}\n",
        )
    )
    assert isinstance(config.method, LoraMethod)
    assert config.method.init_from == (tmp_path / "high.safetensors",)
    assert config.embeddings[0].init_from == tmp_path / "fox.safetensors"
    assert config.validation.sources[0].path == tmp_path / "held"


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "method: {kind: fine_tun}",
            "method.kind: must be 'lora', 'dora', 'loha', 'lokr', 'oft', 'fine_tune' or "
            "'embedding', got 'fine_tun'; did you mean 'fine_tune'?",
        ),
        (
            "optimizer: {name: adamx}",
            "optimizer.name: must be 'adamw', 'adamw_8bit', 'adamw_schedule_free', 'adafactor', "
            "'prodigy', 'prodigy_plus_schedule_free', 'lion', 'muon', 'came', 'adam_mini', 'sgd', "
            "'adamw_low_bit', 'adamw_cpu_offload' or 'custom', got 'adamx'; did you mean 'adamw'?",
        ),
        (
            "train: {schedule: cosin}",
            "train.schedule.kind: must be 'constant', 'linear', 'cosine', 'cosine_with_restarts', "
            "'rex' or 'polynomial', got 'cosin'; did you mean 'cosine'?",
        ),
        (
            "train: {loss: {weighting: 7}}",
            "train.loss.weighting: must be a section with fields, got 7; change it, or leave it "
            "out",
        ),
        (
            "train: {loss: {weighting: {kind: 7}}}",
            "train.loss.weighting.kind: must be 'none', 'min_snr', 'curve' or 'spline', got 7; "
            "change it, or leave it out for 'none'",
        ),
        (
            "method: {kind: }",
            "method.kind: must be 'lora', 'dora', 'loha', 'lokr', 'oft', 'fine_tune' or "
            "'embedding', got nothing; change it, or leave it out for 'lora'",
        ),
        (
            "method: dora",
            "method: must be a section with fields, got 'dora'; write {kind: dora}",
        ),
        ("method: {rnak: 3}", "method.rnak: unknown field; did you mean 'rank'?"),
        (
            "method: {kind: embedding, zzz: 3}\nembeddings: [{placeholder: <a>}]",
            "method.zzz: unknown field of method.kind embedding; embedding has no fields",
        ),
        (
            "method: {kind: oft, rank: 3}",
            "method.rank: unknown field of method.kind oft, but one of lora, dora, loha, lokr; oft "
            "has modules, init_from, block_size",
        ),
        (
            "optimizer: {name: lion, eps: 1}",
            "optimizer.eps: unknown field of optimizer.name lion, but one of adamw, adamw_8bit, "
            "adamw_schedule_free, prodigy, ...; lion has lr, betas, weight_decay",
        ),
        (
            "train: {timesteps: {mean: 1}}",
            "train.timesteps.mean: unknown field of train.timesteps.distribution uniform, but one "
            "of logit_normal; uniform has shift, shift_by_tokens, stratified",
        ),
        # A member that is called as one of its own fields.
        (
            "train: {timesteps: {distribution: beta, beta: 0}}",
            "train.timesteps.beta: must be more than 0, got 0; change it, or leave it out for 2.0",
        ),
        (
            "train: {timesteps: {distribution: beta, alpha: 0, beta: 1}}",
            "train.timesteps.alpha: must be more than 0, got 0; change it, or leave it out for 2.0",
        ),
        (
            "train: {timesteps: {distribution: beta, beta: 1, zzz: 1}}",
            "train.timesteps.zzz: unknown field of train.timesteps.distribution beta; beta has",
        ),
        (
            "train: {timesteps: table}",
            "train.timesteps.weights: is required, got nothing; add it: Weights of equally wide",
        ),
        (
            "train: {timesteps: {distribution: table, weights: [1, -1]}}",
            "train.timesteps.weights.1: must be at least 0, got -1; change it",
        ),
        (
            "optimizer: {name: lion, lr: 0}",
            "optimizer.lr: must be more than 0, got 0; change it, or leave it out for 2e-05",
        ),
        ("optimizer: {name: custom}", "optimizer.class_path: is required, got nothing; add it"),
        (
            "optimizer: {name: custom, class_path: torch.optim.SGD, arguments: {a: {}}}",
            "optimizer.arguments.a: must be true or false, or a whole number, or a number, or text",
        ),
        ("train: {ema: true}", "train.ema: must be a section with fields, got true"),
        (
            "embeddings: [{placeholder: two words}]",
            "embeddings.0.placeholder: must have the form",
        ),
        ("embeddings: [{name: fox}]", "embeddings.0.placeholder: is required, got nothing"),
    ],
)
def test_one_problem_gives_one_line(tmp_path: Path, text: str, said: str) -> None:
    found = problems(tmp_path, text)
    assert len(found) == 1, found
    assert found[0].startswith(said), found[0]


def test_a_wrong_kind_hides_only_its_own_section_and_is_one_problem(tmp_path: Path) -> None:
    text = """
method: {kind: tuning, weights: khan, fused_step: true}
optimizer: {name: custm, arguments: 5}
train: {schedule: {kind: rexx, end_factor: 2}, steps: 0, max_grad_norm: null}
"""
    found = problems(tmp_path, text)
    assert [p.split(": ")[0] for p in found] == [
        "method.kind",
        "optimizer.name",
        "train.steps",
        "train.schedule.kind",
    ]
    found = problems(
        tmp_path,
        """
method: {kind: fine_tune, weights: khan, fused_step: true}
optimizer: {name: custom, arguments: 5}
train: {schedule: {kind: rex, end_factor: 2}, steps: 0, max_grad_norm: null}
""",
    )
    assert [p.split(": ")[0] for p in found] == [
        "method.weights",
        "optimizer.class_path",
        "optimizer.arguments",
        "train.steps",
        "train.schedule.end_factor",
    ]
    assert found[0] == (
        "method.weights: must be 'stochastic', 'kahan' or 'float32', got 'khan'; did you mean "
        "'kahan'?"
    )
    # Fields that no kind has would be reported; those of another kind than the guessed one are not.
    found = problems(tmp_path, "method: {kind: 5, rank: 4, alpha: 3, block_size: 2}\n")
    assert [p.split(": ")[0] for p in found] == ["method.kind"]


def test_an_unknown_field_suggests_the_least_nested_key_path(tmp_path: Path) -> None:
    found = problems(tmp_path, "betas: 3\nlogging: {steps: 4}\n")
    assert found == (
        "logging.steps: unknown field; did you mean train.steps or sample.steps?",
        "betas: unknown field; did you mean optimizer.betas?",
    )


# ------------------------------------------------------------------------------- writing, comparing


@pytest.mark.parametrize(
    "text",
    [
        "method: {kind: dora, rank: 4, per_module: [{modules: [ffn], rank: 2}]}",
        "method: {kind: lora, rank: 4, alpha: 2, per_module: [{modules: [ffn], rank: 2}]}",
        "method: {kind: lokr, factor: 4}\nper_expert: {high: {steps: 5, rank: 3}, low: {steps: 7}}",
        "method: {kind: oft, init_from: [a.safetensors]}",
        "method: {kind: lora, init_from: [a.safetensors]}",
        "model: {path: a, variant: t2v-a14b, dtype: float32}\nmethod: {kind: fine_tune}",
        "method: {kind: fine_tune, fused_step: true}\ntrain: {max_grad_norm: null}",
        "method: {kind: embedding}\nembeddings: [{placeholder: <a>, init_from: a.safetensors}]",
        "embeddings: [{placeholder: <a>}, {placeholder: <b>, token_count: 2, lr: 1}]",
        "optimizer: {name: came, betas: [0.1, 0.2, 0.3]}\ntrain: {schedule: polynomial, ema: {}}",
        "optimizer: {name: custom, class_path: torch.optim.SGD, arguments: {a: [1, 2], b: x}}",
        "train: {timesteps: {distribution: table, weights: [1, 2]}, save_every_minutes: 5}",
        "train: {loss: {kind: huber, weighting: {kind: curve, points: [[0, 1], [1, 2]]}}}",
        "model: {path: a, variant: ti2v-5b}\ntrain: {first_frame_noise: [-3.5, 0.5]}",
        "validation: {share: 0.1, every: 5}\ntrain: {keep_best: true}",
    ],
)
def test_a_dump_of_every_kind_is_read_back_equal(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.safetensors").touch()
    config = load_run(write(tmp_path, text if text.startswith("model") else T2V + text))
    again = load_run(write(tmp_path, dump_run(config), "again.yaml"))
    assert again == config.model_copy(update={"output": again.output})
    assert again.output.name == "fox"


def test_a_change_of_kind_is_listed_leaf_by_leaf(tmp_path: Path) -> None:
    old = load_run(write(tmp_path, T2V + "method: {rank: 8}\n"))
    new = load_run(
        write(tmp_path, T2V + "method: {kind: oft}\nembeddings: [{placeholder: <fox>}]\n"),
        ["optimizer.name=sgd", "train.schedule=linear", "train.ema.decay=0.9"],
    )
    assert changed_fields(new, new) == []
    changed = {name: (before, after) for name, before, after in changed_fields(old, new)}
    assert changed["method.kind"] == ("lora", "oft")
    assert changed["method.rank"] == (8, None)
    assert changed["method.block_size"] == (None, 32)
    assert changed["optimizer.name"] == ("adamw", "sgd")
    assert changed["optimizer.lr"] == (1e-4, 1e-2)
    assert changed["optimizer.momentum"] == (None, 0)
    assert changed["train.schedule.kind"] == ("constant", "linear")
    assert changed["train.schedule.end_factor"] == (None, 0)
    assert changed["train.ema.decay"] == (None, 0.9)
    assert changed["embeddings.0.placeholder"] == (None, "<fox>")
    assert "embeddings" not in changed
    assert "method.modules" not in changed
    back = {name: (after, before) for name, before, after in changed_fields(new, old)}
    assert back == changed
