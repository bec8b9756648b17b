"""`memory.attention`: the backend of a run is checked, used, recorded and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.runs import RunFile, layout_of, recorder

from onewan.config.schema import ResolvedRun
from onewan.errors import CheckpointError, ConfigError
from onewan.train.attention import resumed_attention
from onewan.train.saved_state import SavedAttention, read_facts
from onewan.train.setup import WanModelSetup
from onewan.train.trainer import WanTrainer


def fit(
    config: ResolvedRun, *, resume: bool = False, allow_change: bool = False
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Events of the run, and its exported weights."""
    events: list[dict[str, Any]] = []
    WanTrainer(config, listen=recorder(events), resume=resume, allow_change=allow_change).fit()
    (path,) = layout_of(config).exported()[config.train.steps]
    return events, load_file(path)


def chosen(events: list[dict[str, Any]]) -> str:
    (event,) = [event for event in events if event["event"] == "attention"]
    assert event["milliseconds"] == {}  # nothing is measured on the CPU
    return event["backend"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_trains_with_the_backend_that_is_named_and_resumes_with_it(run_file: RunFile) -> None:
    steps = "train.steps=2"
    math = run_file("ti2v-5b", steps, "memory.attention=math", "output.name=math")
    events, by_math = fit(math)
    assert chosen(events) == "math"
    events, by_default = fit(run_file("ti2v-5b", steps, "output.name=auto"))
    assert chosen(events) == "flash"
    # The last bits show that it was used.
    assert not same(by_math, by_default)
    assert all(torch.allclose(by_math[n], by_default[n], rtol=0.1, atol=1e-4) for n in by_math)

    half = run_file("ti2v-5b", "train.steps=1", "memory.attention=math", "output.name=half")
    fit(half)
    state = layout_of(half).state(1)
    assert read_facts(state).attention == SavedAttention(backend="math", device="cpu")
    # Back to auto: the run keeps its backend, and no --allow-change is needed.
    rest = run_file("ti2v-5b", steps, "output.name=half")
    events, resumed = fit(rest, resume=True)
    assert chosen(events) == "math"
    assert same(resumed, by_math)


def test_another_backend_on_resume_has_to_be_allowed(run_file: RunFile) -> None:
    fit(run_file("ti2v-5b", "train.steps=1"))
    other = run_file("ti2v-5b", "train.steps=2", "memory.attention=math")
    with pytest.raises(CheckpointError) as refusal:
        WanTrainer(other, resume=True).fit()
    assert refusal.value.details == ("memory.attention: was 'flash', is 'math'",)
    events, _ = fit(other, resume=True, allow_change=True)
    assert chosen(events) == "math"
    assert read_facts(layout_of(other).state(2)).attention == SavedAttention(
        backend="math", device="cpu"
    )


def test_a_state_names_a_backend_that_this_machine_does_not_have(run_file: RunFile) -> None:
    run = WanModelSetup(run_file("ti2v-5b", "train.steps=1")).build()
    kept, change = resumed_attention(run, SavedAttention(backend="cudnn", device="cpu"))
    assert kept is None
    why = "PyTorch has no such kernel for cpu"
    assert change == f"memory.attention: was 'cudnn', which can't be used here: {why}"
    kept, change = resumed_attention(run, SavedAttention(backend="flash_attn_9", device="cpu"))
    assert kept is None
    assert change is not None
    assert "there is no backend 'flash_attn_9'" in change
    flash = SavedAttention(backend="flash", device="cpu")
    assert resumed_attention(run, flash) == (flash, None)
    # States of before it was recorded used PyTorch's choice.
    assert resumed_attention(run, None) == (flash, None)
    # On another type of device the results differ anyway.
    assert resumed_attention(run, SavedAttention(backend="cudnn", device="cuda")) == (None, None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "cudnn",
            "memory.attention: 'cudnn' can't be used on cpu in float32 with 32 channels per head "
            "(PyTorch has no such kernel for cpu); choose auto",
        ),
        ("flash_attn", "memory.attention: 'flash_attn' needs the package flash-attn ("),
    ],
)
def test_a_backend_that_can_not_be_used_is_refused_before_anything_is_encoded(
    name: str, message: str, run_file: RunFile, tmp_path: Path
) -> None:
    config = run_file(
        "t2v-a14b", f"memory.attention={name}", f"video_data.cache_dir={tmp_path / 'none'}"
    )
    with pytest.raises(ConfigError) as error:
        WanTrainer(config).fit()
    (problem,) = error.value.problems
    assert problem.startswith(message)
    assert not (tmp_path / "none").exists()


def test_sage_attention_is_refused_with_the_reason(run_file: RunFile) -> None:
    with pytest.raises(ConfigError) as error:
        run_file("ti2v-5b", "memory.attention=sage")
    (problem,) = error.value.problems
    assert problem.startswith("memory.attention: ")
    assert "SageAttention has no backward pass" in problem


def test_an_accelerator_keeps_its_choice_over_a_resume(
    run_file: RunFile, sim: torch.device
) -> None:
    device = f"model.device={sim}"
    events, whole = fit(run_file("ti2v-5b", "train.steps=2", device, "output.name=whole"))
    (event,) = [event for event in events if event["event"] == "attention"]
    half = run_file("ti2v-5b", "train.steps=1", device, "output.name=half")
    fit(half)
    facts = read_facts(layout_of(half).state(1))
    assert facts.attention == SavedAttention(backend=event["backend"], device="sim")
    rest = run_file("ti2v-5b", "train.steps=2", device, "output.name=half")
    events, resumed = fit(rest, resume=True)
    assert chosen(events) == event["backend"]
    assert same(resumed, whole)
