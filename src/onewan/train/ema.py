"""Exponential moving average (EMA) of the trained weights, in float32."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from onewan.devices import is_accelerator, is_host, moved
from onewan.memory.host_copies import HostCopies

_POLL_SECONDS = 0.002


class Ema:
    """The moving average of each of `parameters`; it starts at their present values.

    With `offload` the averages stay in host memory, else they are on the device of the parameters.
    A training step waits for neither: it queues copies of the weights into pinned memory, as large
    as all of them, and a thread adds them to the averages in host memory while the next step runs.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], decay: float, *, offload: bool
    ) -> None:
        self._parameters = dict(parameters)
        self.decay = decay
        """May change between two updates."""
        self._offload = offload
        self._averages: dict[str, Tensor] = {}
        self._copies = HostCopies[str]()
        """Weights on their way to averages in host memory, and averages on their way back."""
        self._trained = HostCopies[str]()
        """The trained weights while the averages are applied."""
        self._parked = HostCopies[str]()
        """Averages of the device while they are not there."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="moving average")
        self._update: Future[None] | None = None
        """The update that the thread may still be at."""
        self.reset()

    @property
    def averages(self) -> Mapping[str, Tensor]:
        """By the names of the parameters; float32, in host memory if they are offloaded. With all
        updates that were asked for."""
        self._finish()
        return self._averages

    def reset(self) -> None:
        """Start at the present values of the parameters."""
        self._finish()
        # Without `copy`, a float32 parameter and its average would share memory.
        self._averages = {
            name: parameter.detach().to(
                "cpu" if self._offload else parameter.device, torch.float32, copy=True
            )
            for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """average = d * average + (1 - d) * weight, after `num_updates` earlier updates.

        d is the smaller of `decay` and (1 + n) / (10 + n), a warm-up without which the initial
        values would dominate the first 1 / (1 - decay) updates.
        """
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        self._finish()
        if self._offload and any(is_accelerator(p.device) for p in self._parameters.values()):
            weights = self._copies.store(self._parameters)
            self._update = self._thread.submit(self._follow_copies, weights, decay)
        else:
            self._follow(self._parameters, decay)

    def _follow_copies(self, weights: Mapping[str, Tensor], decay: float) -> None:
        # Waiting for the event would keep a processor core busy on some devices.
        while not self._copies.is_done:
            time.sleep(_POLL_SECONDS)
        self._follow(weights, decay)

    @torch.no_grad()
    def _follow(self, weights: Mapping[str, Tensor], decay: float) -> None:
        # One weight at a time: float32 copies of all weights at once would be a whole model.
        for name, weight in weights.items():
            average = self._averages[name]
            # In float32 also for bfloat16 weights, which are too coarse for the small steps of an
            # average.
            average.lerp_(weight.detach().to(average), 1 - decay)

    def _finish(self) -> None:
        """Return when the thread has nothing to do; raise what went wrong in it."""
        if self._update is not None:
            update, self._update = self._update, None
            update.result()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the parameters for the length of the block.

        Afterwards the parameters are restored, bit-exact, from copies in host memory.
        """
        self._finish()
        self._trained.store(self._parameters)
        try:
            # Inside the try block, since a copy that is interrupted halfway has to be undone too.
            self._apply()
            yield
        finally:
            self._trained.load(self._parameters)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the averages by the names of their weights, float32 in host memory.

        The number of updates is not part of it; the caller passes it to `update`.
        """
        on_device = {n: a for n, a in self.averages.items() if is_accelerator(a.device)}
        found = {**self._averages, **self._parked.store(on_device)}
        self._parked.wait()
        return {name: average.to("cpu", copy=True) for name, average in found.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state`; ValueError if its names, shapes or dtypes are not those of the
        averages."""
        self._finish()
        if state.keys() != self._averages.keys():
            unmatched = sorted(state.keys() ^ self._averages.keys())
            side = "the state" if unmatched[0] in state else "this run"
            raise ValueError(f"the averages are of other weights: {unmatched[0]} is only in {side}")
        for name, average in self._averages.items():
            if state[name].shape != average.shape:
                raise ValueError(
                    f"{name}: has the shape {tuple(state[name].shape)}, not {tuple(average.shape)}"
                )
            if state[name].dtype != average.dtype:
                raise ValueError(f"{name}: is {state[name].dtype}, not {average.dtype}")
        for name, average in self._averages.items():
            average.copy_(state[name])

    def to(self, device: torch.device) -> None:
        """Move the averages to `device`, unless they are offloaded. Copies to host memory may still
        be under way when it returns (`onewan.memory.residency.Companion`)."""
        if self._offload:
            return
        if is_host(device):
            on_device = {n: a for n, a in self._averages.items() if is_accelerator(a.device)}
            self._averages |= self._parked.store(on_device)
        else:
            self._averages = {
                name: moved(average, device) for name, average in self._averages.items()
            }

    @torch.no_grad()
    def _apply(self) -> None:
        """Copy the averages into the parameters."""
        on_device = {n: p for n, p in self._parameters.items() if is_accelerator(p.device)}
        if self._offload:
            # Through pinned memory, and rounded in host memory: the device has no room for both.
            self._copies.wait()
            for name, place in self._copies.reserve(on_device).items():
                place.copy_(self._averages[name])
            self._copies.load(on_device)
        for name, parameter in self._parameters.items():
            if not self._offload or name not in on_device:
                parameter.copy_(self._averages[name])
