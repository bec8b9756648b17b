"""The one owner of which modules of a model are on the device.

Training step, validation, sampler and encoding ask for the modules that they are about to run, and
never move one themselves. `Residency` is their interface; programs with their own memory management
(OneTrainer) implement it. `DeviceResidency` is onewan's: it decides which modules leave
(policy), while a `Placement` for each module knows how that module is moved (mechanism). Only
`WholeModule` assumes that a module is on one device and is moved as a whole, so block-by-block
streaming can be another `Placement`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor, nn

from onewan.devices import HOST
from onewan.memory.host_copies import QueuedCopies
from onewan.memory.tensor_moves import TensorMoves


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

        It yields a function that brings one of them. Modules that are ready at the start remain on
        the device together until one that is not ready is brought. Afterwards, also after an
        exception, each is on the device where it was before.
        """
        ...


class Companion(Protocol):
    """Data that is moved together with a module's weights: optimizer state, averages."""

    def to(self, device: torch.device) -> object:
        """Move the data, with the same values afterwards.

        Copies may still be under way when it returns, queued on the device's current stream
        (`DeviceResidency.settle` waits for those to host memory).
        """
        ...


class Placement(Protocol):
    """How one module gets onto the device and off it."""

    @property
    def is_ready(self) -> bool:
        """Whether the module can run on the device now."""
        ...

    def enter(self) -> None:
        """Make the module ready to run on the device. Repeatable, also after a failure."""
        ...

    def leave(self, *, trained: bool = True) -> None:
        """Give the device's memory back; without `trained`, weights that require gradients stay
        there. Repeatable, also after a failure. Copies may still be under way when it returns, as
        those of a `Companion`."""
        ...


class WholeModule:
    """All weights of a module on the device, or none of them."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module = module
        self._moves = TensorMoves(device)
        found = dict.fromkeys(tensor.device for tensor in self._tensors().values())
        self._is_ready = all(current == device for current in found)
        # The device that the module came from: on a machine with several devices not always the
        # CPU.
        self._away = next((current for current in found if current != device), HOST)
        self._is_at_home = self._away == device

    @property
    def is_ready(self) -> bool:
        return self._is_ready

    def enter(self) -> None:
        self._moves.enter(self._tensors())
        self._is_ready = True

    def leave(self, *, trained: bool = True) -> None:
        # Set first, since a move that fails (out of memory, an interrupt) moves only some weights.
        self._is_ready = self._is_at_home
        self._moves.leave(leaving(self._tensors(), trained=trained), self._away)

    def _tensors(self) -> dict[str, Tensor]:
        """All parameters and buffers, each once."""
        return dict(chain(self._module.named_parameters(), self._module.named_buffers()))


def leaving(tensors: dict[str, Tensor], *, trained: bool) -> dict[str, Tensor]:
    """Those of `tensors` that leave the device: without `trained`, only frozen ones."""
    return {name: t for name, t in tensors.items() if trained or not t.requires_grad}


class DeviceResidency:
    """Keeps modules on one device, and moves an alternating module away while another one runs.

    Modules without a call of `manage` are moved as a whole and remain until `release`. Which ones
    are ready is stored: looking at the device of every weight would cost milliseconds per step.

    Within a run the host does not wait for what leaves: the device's memory is reused in the order
    of its stream, behind the copies. Only before the host itself reads what has left, it calls
    `settle`.
    """

    def __init__(self, device: torch.device | str) -> None:
        # As tensors name it: without an index it means the first one, but does not compare equal.
        self._device = torch.empty(0, device=device).device
        self._placements: dict[nn.Module, Placement] = {}
        self._companions: dict[nn.Module, tuple[Companion, ...]] = {}
        self._alternating: set[nn.Module] = set()
        self._parked: set[nn.Module] = set()
        self._leaving = QueuedCopies()

    @property
    def device(self) -> torch.device:
        return self._device

    def manage(
        self,
        module: nn.Module,
        *companions: Companion,
        alternating: bool = False,
        parked: bool = True,
        placement: Placement | None = None,
    ) -> None:
        """Configure how `module` is moved; the default is as a whole, without companions.

        `bring` and `release` move `companions` with it. Of all `alternating` modules only those of
        the latest `bring` remain on the device; what is trained of the others and their companions
        leave with them if they are `parked`, and stay otherwise. `placement` replaces the move as a
        whole.
        """
        self._placements[module] = placement or WholeModule(module, self._device)
        self._companions[module] = companions
        if alternating:
            self._alternating.add(module)
        if parked:
            self._parked.add(module)

    def is_ready(self, module: nn.Module) -> bool:
        """Whether `module` can run on the device now."""
        return self._placement(module).is_ready

    def bring(self, *modules: nn.Module) -> None:
        missing = [module for module in modules if not self.is_ready(module)]
        if not missing:
            return
        # Others leave first, so that the memory peak is that of the larger module, not of both.
        for module in self._alternating.difference(modules):
            if self.is_ready(module):
                self._leave(module, trained=module in self._parked)
        for module in missing:
            self._placement(module).enter()
            for companion in self._companions.get(module, ()):
                companion.to(self._device)

    def release(self, *modules: nn.Module) -> None:
        """Move `modules` and their companions off the device."""
        for module in modules:
            self._leave(module, trained=True)
        self.settle()

    def forget(self, module: nn.Module) -> None:
        """Keep no reference to `module`, which runs no more, so that its memory can be freed."""
        self._placements.pop(module, None)
        self._companions.pop(module, None)
        self._alternating.discard(module)
        self._parked.discard(module)

    def settle(self) -> None:
        """Return when host memory has the values of everything that has left the device.

        To be called before the host reads or writes what `bring` may have moved there. After
        `release` and `taking_turns` it is settled.
        """
        self._leaving.wait()

    def _leave(self, module: nn.Module, *, trained: bool) -> None:
        try:
            self._placement(module).leave(trained=trained)
            if trained:
                for companion in self._companions.get(module, ()):
                    companion.to(HOST)
        finally:  # a move that failed has queued some of the copies
            self._leaving.record(self._device)

    @contextmanager
    def taking_turns(self, modules: Sequence[nn.Module]) -> Iterator[Callable[[nn.Module], None]]:
        placements = {module: self._placement(module) for module in modules}
        ready_before = {module: placement.is_ready for module, placement in placements.items()}
        # Optimizer states and averages have nothing to do meanwhile, and need as much memory as the
        # activations of a large video. Those of idle modules come back with the next `bring`.
        idle = [m for m in self._alternating - self._parked if not self.is_ready(m)]
        companions = [
            companion
            for module, placement in self._placements.items()
            if placement.is_ready
            for companion in self._companions.get(module, ())
        ]

        def bring(module: nn.Module) -> None:
            if placements[module].is_ready:
                return
            for other, placement in placements.items():
                if other is not module and placement.is_ready:
                    placement.leave()
            placements[module].enter()

        try:
            for module in idle:
                self._leave(module, trained=True)
            for companion in companions:
                companion.to(HOST)
            yield bring
        finally:
            # `is_ready` is not consulted: an interrupted move leaves a module on two devices.
            # Modules that leave come first, to free the memory that the returning ones need.
            for module in sorted(modules, key=ready_before.__getitem__):
                (placements[module].enter if ready_before[module] else placements[module].leave)()
            self._leaving.record(self._device)
            self.settle()
            for companion in companions:
                companion.to(self._device)

    def _placement(self, module: nn.Module) -> Placement:
        if module not in self._placements:
            self._placements[module] = WholeModule(module, self._device)
        return self._placements[module]


def device_in_use(modules: Iterable[nn.Module]) -> torch.device:
    """The first device other than the CPU that holds weights of `modules`, else the CPU."""
    devices = (weight.device for module in modules for weight in module.parameters())
    return next((device for device in devices if device != HOST), HOST)
