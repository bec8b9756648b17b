"""The plan's bytes of sharded weights, beside those that real processes have."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.held_bytes import held_bytes
from support.runs import RunFile
from support.tiny_models import TinyModels
from support.torchrun import together

from onewan.memory.plan import read_stored_model
from onewan.memory.plan.sharded import RankBytes, rank_bytes
from onewan.memory.plan.sharing import Sharing
from onewan.memory.plan.trained import trained_weights

pytestmark = pytest.mark.long

AVERAGED = "train.ema={decay: 0.9, offload: false}"
METHODS = {
    "float32": ["method={kind: fine_tune, weights: float32}"],
    "kahan": ["method={kind: fine_tune, weights: kahan}", "model.dtype=bfloat16"],
    "adapter": ["method={kind: lora, rank: 4}", "parallel.weights=sharded"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """With more blocks than are whole at a time."""
    return TinyModels(tmp_path_factory.mktemp("models"), width=64, layers=4)


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("method", METHODS)
def test_processes_have_the_bytes_that_are_planned(
    run_file: RunFile, models: TinyModels, tmp_path: Path, method: str, processes: int
) -> None:
    settings = [
        f"model.path={models('ti2v-5b').as_posix()}",
        *("wan_config.max_frames=5", f"train.accumulation={processes}", *METHODS[method]),
    ]
    config = run_file("ti2v-5b", *settings, AVERAGED)
    every = together(processes, held_bytes, tmp_path / "run.yaml", [*settings, AVERAGED])
    (stored,), (expert,) = read_stored_model(config).experts.values(), config.model.facts().experts
    trained = trained_weights(config, stored.shape, expert)
    for rank, counted in enumerate(every):
        planned = rank_bytes(config, stored, trained, Sharing(shards=processes), rank)
        assert _differences(planned, counted) == {}


def _differences(planned: RankBytes, counted: dict[str, int]) -> dict[str, tuple[int, int]]:
    """(planned, counted) of what differs by more than 1 %: an optimizer also counts its steps."""
    expected = {
        "parameters": planned.parameters,
        "gradients": planned.gradients,
        "state": planned.state.device,
        "averages": planned.averages,
        "whole weights": planned.whole_weights,
        "block gradients": planned.block_gradients,
        "reduced gradients": planned.reduced_gradients,
    }
    return {
        name: (amount, counted[name])
        for name, amount in expected.items()
        if counted[name] != pytest.approx(amount, rel=0.01)
    }
