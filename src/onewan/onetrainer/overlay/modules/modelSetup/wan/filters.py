"""Which layers are trained: OneTrainer's layer filter within the selected blocks."""

from modules.util.config.TrainConfig import TrainConfig
from modules.util.ModuleFilter import ModuleFilter

import torch

from onewan.adapters.select import block_of
from onewan.onetrainer import settings


class _InBlocks:
    """A layer filter that matches in some blocks only."""

    def __init__(self, inner: ModuleFilter, blocks: tuple[int, ...]):
        self._inner = inner
        self._blocks = blocks

    def matches(self, module_name: str) -> bool:
        return block_of(module_name) in self._blocks and self._inner.matches(module_name)

    def was_used(self) -> bool:
        return self._inner.was_used()


def filters_of(config: TrainConfig) -> list:
    """Filters of weights, for fine-tuning."""
    filters = ModuleFilter.create(config)
    blocks = settings.layers_of(config)
    return filters if blocks is None else [_InBlocks(f, blocks) for f in filters]


def names_of(config: TrainConfig, transformer: torch.nn.Module) -> list[str] | None:
    """The linear layers that get an adapter; None if no blocks are selected."""
    if settings.layers_of(config) is None:
        return None
    filters = filters_of(config)
    return [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and any(f.matches(name) for f in filters)
    ]
