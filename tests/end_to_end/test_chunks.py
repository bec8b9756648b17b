"""The feed-forward chunks that a plan has chosen are kept by a run that is resumed elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.runs import RunFile, layout_of, recorder

from onewan.config.schema import ResolvedRun
from onewan.errors import CheckpointError
from onewan.memory.plan import choose
from onewan.train.saved_state import read_facts
from onewan.train.trainer import WanTrainer


def fit(config: ResolvedRun, **settings: Any) -> dict[str, torch.Tensor]:
    """The weights that the run exports."""
    WanTrainer(config, listen=recorder([]), **settings).fit()
    (path,) = layout_of(config).exported()[config.train.steps]
    return load_file(path)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def chunks_of(config: ResolvedRun) -> set[int]:
    """Those in the newest state of the run."""
    layout = layout_of(config)
    facts = read_facts(layout.state(layout.saved_steps()[-1]))
    assert facts.feed_forward_chunks
    return set(facts.feed_forward_chunks.values())


def test_a_run_keeps_its_chunks_where_the_plan_would_choose_others(
    run_file: RunFile, sim: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(steps: int, name: str, *overrides: str) -> ResolvedRun:
        fixed = (f"train.steps={steps}", f"model.device={sim}", f"output.name={name}")
        return run_file("ti2v-5b", *fixed, *overrides)

    with monkeypatch.context() as narrow:
        narrow.setattr(choose, "_CHUNKS", (2,))  # as a device that is too small for one chunk
        whole = fit(run(2, "whole"))
        fit(run(1, "half"))
    assert chunks_of(run(1, "half")) == {2}
    fit(run(1, "new", "memory.vram=9GB"))
    assert chunks_of(run(1, "new")) == {1}

    with pytest.raises(CheckpointError) as refusal:
        fit(run(2, "half", "memory.feed_forward_chunks=1"), resume=True)
    (line,) = refusal.value.details
    assert line.startswith("memory.feed_forward_chunks: was 2, is 1 for ")

    resumed = fit(run(2, "half", "memory.vram=9GB"), resume=True)
    assert chunks_of(run(2, "half")) == {2}
    assert same(resumed, whole)
