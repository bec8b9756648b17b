"""How often the host waits for the device, and what is copied back, on a simulated accelerator.

A wait per tensor is what makes a training loop slow without anything looking wrong, so the numbers
are exact. `late_copies` delivers each asynchronous copy as late as its order allows, and the
sanitizer reports what is not ordered.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import waits_on_device
from support.waits_on_device import CASES

_KNOWN: dict[str, dict[str, Any]] = {}


@pytest.fixture
def found(case: str, sim: torch.device, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run of `case` on the simulated device does; the tests share it."""
    assert sim.type == waits_on_device.DEVICE
    if case not in _KNOWN:
        _KNOWN[case] = waits_on_device.case(tmp_path_factory.mktemp(case), case)
    return _KNOWN[case]


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_once(found) -> None:
    steps = found["step"]
    assert [step["waits"] for step in steps] == [1] * len(steps), steps[0]["places"]


@pytest.mark.parametrize("case", ["lora", "embeddings"])
def test_a_step_copies_only_the_trained_weights_to_averages_in_host_memory(found) -> None:
    """And the losses and the norm, of which there are three float32."""
    for step, expert in zip(found["step"], ("high", "high", "low", "low"), strict=False):
        trained = found["trained"].get(expert, 0) + found["trained"].get("embeddings", 0)
        assert step["to host"] == trained + 3 * 4


@pytest.mark.parametrize("case", CASES)
def test_a_change_of_expert_does_not_wait_and_copies_no_frozen_weight_back(found) -> None:
    changes = [found["bring"][2], found["bring"][4]]
    assert [bring["waits"] for bring in found["bring"]] == [0] * 6, changes[0]["places"]
    for change, leaving in zip(changes, ("high", "low"), strict=True):
        # At most: averages in host memory, and PyTorch's step counters, are there already.
        assert change["to host"] <= found["states"].get(leaving, 0)


@pytest.mark.parametrize("case", CASES)
def test_validation_waits_once_for_each_set_of_weights(found) -> None:
    assert found["validation clips"] > 1  # times three timesteps
    (validation,) = found["validation"]
    assert validation["waits"] == 2, validation["places"]


@pytest.mark.parametrize("case", CASES)
def test_sampling_runs_without_optimizer_states_on_the_device(found, case) -> None:
    """Only the expert, two prompts and the latents are there; afterwards everything is back, bit
    for bit."""
    inputs = 2 * 512 * 64 * 4 + 100_000
    if case == "embeddings":  # the text encoder is there in training too, and stays as long
        assert found["bytes while denoising"] < found["bytes while training"] + inputs
    else:
        assert found["bytes while denoising"] < found["expert"] + inputs
        assert found["bytes while training"] > found["expert"] + inputs
    assert found["sampling changes nothing"] and found["bytes are back"]


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_the_cpu(found) -> None:
    assert found["losses are the cpu's"]
    assert found["weights are the cpu's"]


@pytest.mark.parametrize("case", CASES)
def test_a_state_that_is_saved_behind_a_change_of_expert_is_complete(found) -> None:
    """Although no step has waited since what is saved began to leave the device."""
    assert found["saved behind a change of expert"]


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_used_before_its_copy_has_arrived(found) -> None:
    assert found["reports"] == []
    assert found["late copies change nothing"]
