"""The smallest card that a run fits on, for machines that have none."""

from __future__ import annotations

from collections.abc import Callable

from onewan.memory.plan.machine import Machine, machine_of
from onewan.memory.plan.result import Plan

CARD_GIGABYTES = (8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 141, 180)
"""Device memory of common cards, ascending."""
_GIGABYTE = 10**9
_MOST = 2048
"""Gigabytes of host memory up to which a run is tried."""


def smallest_machine(plan_on: Callable[[Machine], Plan], ram: int) -> Machine | None:
    """The machine with the smallest common card that a run fits on; None if it fits on none.

    `plan_on` makes the run's plan, `ram` is the host memory that there is, in bytes. The machine
    has that much, or as many gigabytes as the run needs with this card: on a larger one, less of
    the model is kept in host memory.
    """

    def fits(vram: int, ram: int) -> bool:
        return plan_on(machine_of("", vram, ram)).fits

    for vram in (gigabytes * _GIGABYTE for gigabytes in CARD_GIGABYTES):
        if not fits(vram, _MOST * _GIGABYTE):
            continue
        if not fits(vram, ram):
            too_little, enough = ram // _GIGABYTE, _MOST
            while enough - too_little > 1:
                middle = (too_little + enough) // 2
                if fits(vram, middle * _GIGABYTE):
                    enough = middle
                else:
                    too_little = middle
            ram = enough * _GIGABYTE
        return machine_of("", vram, ram)
    return None
