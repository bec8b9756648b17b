"""Schedule-free optimizers: their averages are the library's, and the weights come back."""

from __future__ import annotations

import pytest
import torch
from support.optimizers import (
    CHOICES,
    PER_WEIGHT,
    Net,
    are_equal,
    build,
    group_of,
    loss_of,
    optimizer_over,
    train,
    weights_of,
)

from onewan.config.optimizer import AdamWOptimizer, AdamWScheduleFreeOptimizer
from onewan.train.optimizers.builders import is_schedule_free
from onewan.train.rounding import Rounding

SCHEDULE_FREE = [name for name, choice in CHOICES.items() if is_schedule_free(choice)]
CASES = [
    (name, rounding)
    for name in SCHEDULE_FREE
    for rounding in ("none", "kahan")
    if rounding == "none" or name in PER_WEIGHT
]


@pytest.mark.parametrize(("name", "rounding"), CASES)
def test_looking_at_the_averages_changes_no_bit_of_training(name: str, rounding: Rounding) -> None:
    dtype = torch.float32 if rounding == "none" else torch.bfloat16
    nets = Net(dtype), Net(dtype)
    looked, not_looked = (optimizer_over(n, CHOICES[name], rounding=rounding) for n in nets)
    for number in range(10):
        before = weights_of(nets[0])
        with looked.evaluating():
            if number > 1:  # the average of one step is the result of that step
                assert not are_equal(before, weights_of(nets[0]))
        assert are_equal(before, weights_of(nets[0]))
        train(nets[0], looked, range(number, number + 1))
        train(nets[1], not_looked, range(number, number + 1))
        assert are_equal(weights_of(nets[0]), weights_of(nets[1]))


def test_averages_are_those_of_the_library() -> None:
    from schedulefree import AdamWScheduleFree

    net, reference = Net(), Net()
    optimizer = build([group_of(net, 1e-2)], AdamWScheduleFreeOptimizer())
    theirs = AdamWScheduleFree(reference.parameters(), lr=1e-2, weight_decay=0.01)
    theirs.train()
    for number in range(10):
        step = optimizer.begin_step(number, 1.0)
        for each in (net, reference):
            loss_of(each, number).backward()
        step.apply()
        theirs.step()
        theirs.zero_grad()
    theirs.eval()
    with optimizer.evaluating():
        assert are_equal(weights_of(net), weights_of(reference))
    assert not are_equal(weights_of(net), weights_of(reference))


def test_the_weights_come_back_after_an_error() -> None:
    net = Net()
    optimizer = optimizer_over(net, CHOICES["adamw_schedule_free"])
    train(net, optimizer, range(3))
    before = weights_of(net)
    with pytest.raises(KeyboardInterrupt), optimizer.evaluating():
        raise KeyboardInterrupt
    assert are_equal(before, weights_of(net))
    train(net, optimizer, range(3, 4))


def test_evaluating_changes_nothing_with_other_optimizers() -> None:
    net = Net()
    optimizer = optimizer_over(net, AdamWOptimizer())
    train(net, optimizer, range(2))
    before = weights_of(net)
    with optimizer.evaluating():
        assert are_equal(before, weights_of(net))
