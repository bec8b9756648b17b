"""The one owner of which modules of a model are on the device.

Training step, validation, sampler and encoding ask for the modules that they are about to run, and
never move one themselves. `Residency` is what they ask; programs with their own memory management
(OneTrainer) bring their own. `DeviceResidency` is onewan's: it decides who has to leave (policy),
while a `Placement` for each module knows how that module gets onto the device (mechanism). Nothing
but `WholeModule` takes for granted that a module lies on one device or is moved as a whole, so that
streaming block by block is another `Placement`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Protocol

import torch
from torch import nn

_HOST = torch.device("cpu")


class Residency(Protocol):
    """Brings the modules that are about to run onto the device."""

    @property
    def device(self) -> torch.device:
        """Where the modules run; their inputs have to be there."""
        ...

    def bring(self, *modules: nn.Module) -> None:
        """Make `modules` ready to run together; others may leave the device for them.

        Cheap if they are ready, so that every step and every forward pass may call it.
        """
        ...

    def taking_turns(
        self, modules: Sequence[nn.Module]
    ) -> AbstractContextManager[Callable[[nn.Module], None]]:
        """A context in which `modules` run one after another, so that only the largest has to fit.

        It gives a `bring` for one of them. Modules that are ready together at the start stay so
        until one that is not is brought. Afterwards, also after an exception, each is where it was.
        """
        ...


class Companion(Protocol):
    """What goes with a module's weights: optimizer state, averages."""

    def to(self, device: torch.device) -> object: ...


class Placement(Protocol):
    """How one module gets onto the device and off it."""

    @property
    def is_ready(self) -> bool:
        """Whether the module can run on the device now."""
        ...

    def enter(self) -> None:
        """Make the module ready to run on the device. Repeatable, also after a failure."""
        ...

    def leave(self) -> None:
        """Give the device's memory back. Repeatable, also after a failure."""
        ...


class WholeModule:
    """All weights of a module on the device, or none of them."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module = module
        self._device = device
        found = dict.fromkeys(t.device for t in chain(module.parameters(), module.buffers()))
        self._is_ready = all(place == device for place in found)
        # Where the module came from, which on a machine with several devices is not always host
        # memory.
        self._away = next((place for place in found if place != device), _HOST)

    @property
    def is_ready(self) -> bool:
        return self._is_ready

    def enter(self) -> None:
        self._module.to(self._device)
        self._is_ready = True

    def leave(self) -> None:
        # First, since a move that fails (out of memory, an interrupt) leaves some weights behind.
        self._is_ready = self._away == self._device
        self._module.to(self._away)


class DeviceResidency:
    """Keeps modules on one device, and lets those leave that would be in the way.

    Modules that it was not told of are moved as a whole and stay until `release`. Which ones are
    ready is remembered rather than asked of all weights, which would cost milliseconds per step.
    """

    def __init__(self, device: torch.device | str) -> None:
        # As tensors name it: cuda is cuda:0, and the two don't compare equal.
        self._device = torch.empty(0, device=device).device
        self._placements: dict[nn.Module, Placement] = {}
        self._companions: dict[nn.Module, tuple[Companion, ...]] = {}
        self._alternating: set[nn.Module] = set()

    @property
    def device(self) -> torch.device:
        return self._device

    def manage(
        self,
        module: nn.Module,
        *companions: Companion,
        alternating: bool = False,
        placement: Placement | None = None,
    ) -> None:
        """Say more of `module` than that it is moved as a whole.

        `companions` go wherever `bring` and `release` send it. Of all `alternating` modules only
        those of the latest `bring` stay on the device. `placement` moves it in another way.
        """
        self._placements[module] = placement or WholeModule(module, self._device)
        self._companions[module] = companions
        if alternating:
            self._alternating.add(module)

    def is_ready(self, module: nn.Module) -> bool:
        """Whether `module` can run on the device now."""
        return self._placement(module).is_ready

    def bring(self, *modules: nn.Module) -> None:
        missing = [module for module in modules if not self.is_ready(module)]
        if not missing:
            return
        # Room is made first, so that the peak is that of the larger one, not of both.
        for other in self._alternating.difference(modules):
            if self.is_ready(other):
                self.release(other)
        for module in missing:
            self._placement(module).enter()
            for companion in self._companions.get(module, ()):
                companion.to(self._device)

    def release(self, module: nn.Module) -> None:
        """Send `module` and its companions off the device."""
        self._placement(module).leave()
        for companion in self._companions.get(module, ()):
            companion.to(_HOST)

    @contextmanager
    def taking_turns(self, modules: Sequence[nn.Module]) -> Iterator[Callable[[nn.Module], None]]:
        # Companions stay where they are: nothing is trained in between, and moving optimizer state
        # would take longer than what it makes room for is worth.
        placements = {module: self._placement(module) for module in modules}
        ready_before = {module: placement.is_ready for module, placement in placements.items()}

        def bring(module: nn.Module) -> None:
            if placements[module].is_ready:
                return
            for other, placement in placements.items():
                if other is not module and placement.is_ready:
                    placement.leave()
            placements[module].enter()

        try:
            yield bring
        finally:
            # Without asking whether they are ready: an interrupted move leaves a module in between.
            # Those that leave come first, to make room for those that return.
            for module in sorted(modules, key=ready_before.__getitem__):
                (placements[module].enter if ready_before[module] else placements[module].leave)()

    def _placement(self, module: nn.Module) -> Placement:
        if module not in self._placements:
            self._placements[module] = WholeModule(module, self._device)
        return self._placements[module]


def device_in_use(modules: Iterable[nn.Module]) -> torch.device:
    """The first device other than host memory where weights of `modules` lie, else host memory."""
    devices = (weight.device for module in modules for weight in module.parameters())
    return next((device for device in devices if device != _HOST), _HOST)
