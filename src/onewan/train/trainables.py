"""What is trained of one expert, and what becomes of it: a value for each method.

The trainer, the step and the state know `ExpertMethod` alone. Adapters train beside frozen weights
and leave as LoRA files; fine-tuning trains the weights themselves, which leave as a model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, Protocol

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from onewan.adapters.adapter_config import AdapterConfig
from onewan.adapters.lora import (
    adapter_parameters,
    adapter_weights,
    adapters_disabled,
    base_weight,
    exported,
    is_lora_b,
    load_adapter_weights,
)
from onewan.adapters.weights import load_weights, weights_of
from onewan.checkpoint.convert import save_expert
from onewan.checkpoint.saver import WanModelSaver
from onewan.formats.lora import LoraFormat, WanShape
from onewan.model.embedding import WanModelEmbedding
from onewan.train.update import ParameterGroup, Rounding
from onewan.variants import Expert, Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportFacts:
    """What goes into the header of an exported file."""

    facts: Mapping[str, str | int | float]
    """About the run: ``variant``, ``expert``, ``steps``, ..."""
    title: str
    resolution: tuple[int, int]
    """Width and height of the largest training size."""
    dtype: torch.dtype | None
    """Precision to store; None is that of the weights."""


class ExpertMethod(Protocol):
    """What is trained of one expert."""

    rounding: Rounding
    """How the optimizer's float32 results become weights."""
    fused: bool
    """Whether each weight moves as soon as its gradient is there."""
    starts_as_base: bool
    """Whether the model is the untrained one before the first step."""
    what: str
    """What an exported file holds, for its title: ``LoRA``, ..."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What trains, by names that stay the same; empty if nothing does."""
        ...

    def groups(self, lr: float) -> list[ParameterGroup]:
        """The parameters by learning rate, `lr` being that of most."""
        ...

    def read(self) -> dict[str, Tensor]: ...

    def write(self, weights: Mapping[str, Tensor], source: str) -> None: ...

    def base(self) -> AbstractContextManager[None]:
        """The expert as it was before training, for as long as the block lasts."""
        ...

    def extension(self, format: LoraFormat) -> str:
        """How the name of what `export` writes ends; "" is a folder."""
        ...

    def export(self, path: Path, format: LoraFormat, about: ExportFacts) -> list[str]:
        """Write the weights to `path`; returns what the user should know of the file."""
        ...


class AdapterTraining:
    """An adapter beside the frozen weights of `transformer`, which has it already."""

    rounding: Rounding = "none"
    fused = False

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        spec: AdapterConfig,
        *,
        lora_plus_ratio: float = 1.0,
        starts_as_base: bool = True,
    ) -> None:
        self._transformer = transformer
        self._spec = spec
        self._ratio = lora_plus_ratio
        self.starts_as_base = starts_as_base
        self.what = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT"}[
            spec.kind
        ]
        self.parameters = adapter_parameters(transformer)

    def groups(self, lr: float) -> list[ParameterGroup]:
        fast = {n: p for n, p in self.parameters.items() if self._ratio != 1 and is_lora_b(n)}
        rest = {n: p for n, p in self.parameters.items() if n not in fast}
        return [
            ParameterGroup(names=tuple(chosen), parameters=tuple(chosen.values()), lr=rate)
            for chosen, rate in ((rest, lr), (fast, lr * self._ratio))
            if chosen
        ]

    def read(self) -> dict[str, Tensor]:
        return adapter_weights(self._transformer)

    def write(self, weights: Mapping[str, Tensor], source: str) -> None:
        load_adapter_weights(self._transformer, weights, source)

    def base(self) -> AbstractContextManager[None]:
        return adapters_disabled(self._transformer)

    def extension(self, format: LoraFormat) -> str:
        del format
        return ".safetensors"

    def export(self, path: Path, format: LoraFormat, about: ExportFacts) -> list[str]:
        weights, settings = exported(self._transformer, self._spec)

        def base(name: str) -> Tensor:
            layer, _, which = name.rpartition(".")
            return base_weight(self._transformer, layer, which)

        return WanModelSaver().save_lora(
            weights,
            path,
            format=format,
            dtype=about.dtype or torch.float32,
            peft_config=settings,
            facts=about.facts,
            date=datetime.now(timezone.utc),
            title=about.title,
            resolution=about.resolution,
            shape=WanShape.of_config(self._transformer.config),
            base=base,
        )


class FullFineTune:
    """The chosen `parameters` of `transformer` itself."""

    starts_as_base = True
    what = "fine-tuned"

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        parameters: Mapping[str, nn.Parameter],
        *,
        precision: Literal["stochastic", "kahan", "float32"],
        fused: bool,
        variant: Variant,
        expert: Expert,
        source: str,
    ) -> None:
        self._transformer = transformer
        self.parameters = parameters
        self.rounding: Rounding = "none" if precision == "float32" else precision
        self.fused = fused
        self._variant = variant
        self._expert = expert
        self._source = source

    def groups(self, lr: float) -> list[ParameterGroup]:
        return [
            ParameterGroup(
                names=tuple(self.parameters), parameters=tuple(self.parameters.values()), lr=lr
            )
        ]

    def read(self) -> dict[str, Tensor]:
        return weights_of(self.parameters)

    def write(self, weights: Mapping[str, Tensor], source: str) -> None:
        load_weights(self.parameters, weights, source)

    def base(self) -> AbstractContextManager[None]:
        raise AssertionError("the untrained weights are not kept; the run file's rules forbid it")

    def extension(self, format: LoraFormat) -> str:
        return ".safetensors" if format == "comfyui" else ""

    def export(self, path: Path, format: LoraFormat, about: ExportFacts) -> list[str]:
        written = save_expert(
            self._transformer,
            path,
            "single" if format == "comfyui" else "diffusers",
            dtype=about.dtype,
            variant=self._variant,
            expert=self._expert,
            source=self._source,
            facts=about.facts,
        )
        return list(written.notices)


class EmbeddingTraining:
    """Placeholders' vectors, each at its own learning rate."""

    rounding: Rounding = "none"
    fused = False

    def __init__(self, chosen: Sequence[tuple[WanModelEmbedding, float]]) -> None:
        self.lr = {embedding.name: lr for embedding, lr in chosen}
        self.embeddings = [embedding for embedding, _ in chosen]
        self.parameters = {e.name: e.vectors for e in self.embeddings}

    def groups(self, lr: float) -> list[ParameterGroup]:
        del lr  # each has its own
        return [
            ParameterGroup(names=(name,), parameters=(vectors,), lr=self.lr[name])
            for name, vectors in self.parameters.items()
        ]

    def read(self) -> dict[str, Tensor]:
        return weights_of(self.parameters)

    def write(self, weights: Mapping[str, Tensor], source: str) -> None:
        load_weights(self.parameters, weights, source)
