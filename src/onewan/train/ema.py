"""Exponential moving average (EMA) of the trained weights, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """The moving average of each of `parameters`; it starts at their present values.

    With `offload` the averages stay in host memory, else they are on the device of the parameters.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], decay: float, *, offload: bool
    ) -> None:
        self._parameters = dict(parameters)
        self._decay = decay
        self._offload = offload
        self.averages: dict[str, Tensor] = {}
        """By the names of the parameters; float32, in host memory if they are offloaded."""
        self.reset()

    def reset(self) -> None:
        """Start at the present values of the parameters."""
        # Without `copy`, a float32 parameter and its average would share memory.
        self.averages = {
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
        decay = min(self._decay, (1 + num_updates) / (10 + num_updates))
        # One weight at a time: float32 copies of all weights at once would be a whole model.
        for name, parameter in self._parameters.items():
            average = self.averages[name]
            # In float32 also for bfloat16 weights, which are too coarse for the small steps of an
            # average.
            average.lerp_(parameter.detach().to(average), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the parameters for the length of the block.

        Afterwards the parameters are restored, bit-exact, from copies in host memory.
        """
        trained = {name: p.detach().to("cpu", copy=True) for name, p in self._parameters.items()}
        try:
            # Inside the try block, since a copy that is interrupted halfway has to be undone too.
            self._copy_into_parameters(self.averages)
            yield
        finally:
            self._copy_into_parameters(trained)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the averages by the names of their weights, float32 in host memory.

        The number of updates is not part of it; the caller passes it to `update`.
        """
        return {name: average.to("cpu", copy=True) for name, average in self.averages.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state`; ValueError if its names, shapes or dtypes are not those of the
        averages."""
        if state.keys() != self.averages.keys():
            unmatched = sorted(state.keys() ^ self.averages.keys())
            side = "the state" if unmatched[0] in state else "this run"
            raise ValueError(f"the averages are of other weights: {unmatched[0]} is only in {side}")
        for name, average in self.averages.items():
            if state[name].shape != average.shape:
                raise ValueError(
                    f"{name}: has the shape {tuple(state[name].shape)}, not {tuple(average.shape)}"
                )
            if state[name].dtype != average.dtype:
                raise ValueError(f"{name}: is {state[name].dtype}, not {average.dtype}")
        for name, average in self.averages.items():
            average.copy_(state[name])

    def to(self, device: torch.device) -> None:
        """Move the averages to `device`, unless they are offloaded."""
        if not self._offload:
            self.averages = {name: a.to(device) for name, a in self.averages.items()}

    @torch.no_grad()
    def _copy_into_parameters(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
