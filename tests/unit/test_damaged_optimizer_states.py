"""An optimizer's state with any entry replaced is refused, or can be trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.optimizers import (
    CHOICES,
    Net,
    optimizer_over,
    train,
    uncompiled,  # noqa: F401  (used by each test)
)
from torch import nn

CHECKED = [name for name in CHOICES if name != "custom"]
"""What a custom optimizer keeps is not known, so that only its form is checked."""
TENSORS = (torch.zeros(5, 1, 7), torch.tensor(-5.0), torch.tensor(1j))
TENSORS += (torch.zeros((), device="meta"), torch.zeros(3).to_sparse())
ODD = (None, "x", (1,), -1, 1e300, 10**400, float("nan"), *TENSORS)


def net_of() -> Net:
    """Has a bias of zeros, for which some optimizers keep another state."""
    net = Net()
    nn.init.zeros_(net.first.bias)
    return net


def damaged(saved: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Copies of `saved` with another value for an entry of a weight's state or group: the entry,
    the value, and the copy."""
    for weight in ("first.weight", "first.bias"):
        for part in ("state", "group"):
            entries = saved[weight][part]
            for key in entries:
                for value in ODD:
                    changed = {**saved[weight], part: {**entries, key: value}}
                    yield f"{weight}.{part}.{key}", repr(value), {**saved, weight: changed}


@pytest.mark.parametrize("name", CHECKED)
def test_a_state_with_another_entry_is_refused_or_can_be_trained_on(name: str) -> None:
    net = net_of()
    optimizer = optimizer_over(net, CHOICES[name])
    train(net, optimizer, range(2))
    failures, refused = [], 0
    for entry, value, state in damaged(optimizer.state_dict()):
        resumed = net_of()
        second = optimizer_over(resumed, CHOICES[name])
        try:
            second.load_state_dict(state)
        except ValueError as error:
            assert str(error).startswith(f"{entry}: ")
            refused += 1
            continue
        try:
            train(resumed, second, range(2, 3))
        except Exception as error:  # noqa: BLE001  (whatever the library raises)
            failures.append(f"{entry} = {value}: {error!r}")
    assert not failures, "\n".join(failures)
    assert refused or name == "sgd"  # which keeps numbers alone
