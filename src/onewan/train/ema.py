"""Moving averages of the weights that train (EMA), in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn


class Ema:
    """The moving average of each of `parameters`; starts as their present values.

    `device` says where the averages lie: "host" in host memory, or "device" beside the weights.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        decay: float,
        device: Literal["host", "device"],
    ) -> None:
        self._parameters = dict(parameters)
        self._decay = decay
        self._on_host = device == "host"
        self._averages = {
            name: self._copy(parameter) for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, count: int) -> None:
        """Take the present weights in, after `count` earlier updates.

        The old average counts min(decay, (1 + count) / (10 + count)), so that it does not hold on
        to the first values for long.
        """
        decay = min(self._decay, (1 + count) / (10 + count))
        # One by one: copies of all weights at once would be a whole model in float32.
        for name, parameter in self._parameters.items():
            average = self._averages[name]
            average.lerp_(parameter.detach().to(average), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averages in place of the weights, which come back afterwards to the bit."""
        kept = {name: p.detach().to("cpu", copy=True) for name, p in self._parameters.items()}
        try:
            self._write(self._averages)
            yield
        finally:
            self._write(kept)

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the averages by the names of their weights, float32 in host memory."""
        return {name: average.to("cpu", copy=True) for name, average in self._averages.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """All that `load_state_dict` needs; the number of updates is the caller's to keep."""
        return self.tensors()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over averages; ValueError if they are not those of these weights."""
        if state.keys() != self._averages.keys():
            odd = sorted(state.keys() ^ self._averages.keys())
            raise ValueError(f"averages of other weights: {odd[0]} is only on one side")
        for name, average in self._averages.items():
            if state[name].shape != average.shape:
                raise ValueError(
                    f"{name}: has the shape {tuple(state[name].shape)}, not {tuple(average.shape)}"
                )
            average.copy_(state[name])

    def restart(self) -> None:
        """Start from the weights as they are now."""
        self._averages = {name: self._copy(p) for name, p in self._parameters.items()}

    def to(self, device: torch.device) -> None:
        """Move what lies beside the weights; averages in host memory stay there."""
        if not self._on_host:
            self._averages = {name: a.to(device) for name, a in self._averages.items()}

    def _copy(self, parameter: nn.Parameter) -> Tensor:
        device = torch.device("cpu") if self._on_host else parameter.device
        return parameter.detach().to(device, torch.float32, copy=True)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
