"""OneTrainer's memory management as a `Residency`: its offload conductors move parts by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_PARTS = ("text_encoder", "vae", "transformer", "transformer_2")


class ConductorResidency:
    """Brings the parts of a OneTrainer model to the train device (`onewan.memory.residency`).

    Nothing is remembered of where parts were: OneTrainer itself brings what its next step needs.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        """`model` is the overlay's `WanModel`."""
        self._model = model
        self.device = device

    def bring(self, *modules: nn.Module) -> None:
        names = {id(getattr(self._model, name)): name for name in _PARTS}
        self._model.materialize_only(*(names[id(module)] for module in modules))

    @contextmanager
    def taking_turns(self, modules: Sequence[nn.Module]) -> Iterator[Callable[[nn.Module], None]]:
        del modules
        latest: nn.Module | None = None

        def bring(module: nn.Module) -> None:
            nonlocal latest
            # The conductors go through all weights, too much for every forward pass of a sample.
            if module is not latest:
                self.bring(module)
                latest = module

        yield bring
