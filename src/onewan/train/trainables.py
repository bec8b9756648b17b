"""The trainable parameters of an expert, or of the embeddings: one class for each method.

The training step, the state and the trainer use `ExpertMethod` alone; `onewan.train.export` writes
the result to files. An adapter is trained beside frozen weights, a full fine-tune trains the
weights themselves, and all experts train the embeddings together, through the text encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, Protocol

from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from onewan.adapters.adapter_config import AdapterConfig
from onewan.adapters.lora import (
    adapter_of,
    adapter_parameters,
    adapter_weights,
    adapters_disabled,
    is_lora_b,
    load_adapter_weights,
)
from onewan.adapters.merging import FixedParts
from onewan.adapters.weights import load_weights, weights_of
from onewan.errors import CheckpointError
from onewan.formats.adapter import ModuleAdapter
from onewan.model.embedding import WanModelEmbedding
from onewan.train.optimizers.parameters import ParameterGroup
from onewan.train.rounding import Rounding


class ExpertMethod(Protocol):
    """The trainable parameters of one expert."""

    rounding: Rounding
    """How the optimizer's float32 results are rounded to the precision of the weights."""
    fused: bool
    """Whether each weight is updated in the backward pass, as soon as its gradient is complete."""
    starts_as_base: bool
    """Whether the model equals the base model before the first step."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The trainable parameters, by names that stay the same in every run."""
        ...

    def groups(self, lr: float) -> list[ParameterGroup]:
        """The parameters by learning rate; `lr` is the default one."""
        ...

    def read(self) -> dict[str, Tensor]:
        """Copies of the trained weights on the CPU, in the precision of each."""
        ...

    def present(self) -> Mapping[str, Tensor]:
        """As `read`, but large weights are not copied; to be used before the next step."""
        ...

    def write(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Overwrite the trained weights with those of `read`. `source` names the file for the
        CheckpointError that missing, unexpected or misshapen weights raise."""
        ...

    def base(self) -> AbstractContextManager[None]:
        """A context in which the expert computes as the base model."""
        ...


class AdapterTraining:
    """The adapter that `attach_adapter` has put on `transformer`, beside its frozen weights."""

    rounding: Rounding = "none"
    fused = False

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        config: AdapterConfig,
        fixed: FixedParts,
        *,
        lora_plus_ratio: float = 1.0,
        starts_as_base: bool = True,
    ) -> None:
        """`fixed` are parts of the same adapter that `transformer` has in its weights."""
        self.config = config
        self.starts_as_base = starts_as_base
        self.parameters = adapter_parameters(transformer)
        self._transformer = transformer
        self._fixed = fixed
        self.has_fixed_parts = bool(fixed.modules)
        """Whether weights of the transformer contain parts of the adapter."""
        self._lora_plus_ratio = lora_plus_ratio

    def groups(self, lr: float) -> list[ParameterGroup]:
        """All at `lr`, but B of a LoRA at `lora_plus_ratio` times it (LoRA+, arXiv 2402.12354)."""
        ratio = self._lora_plus_ratio
        fast = {n: p for n, p in self.parameters.items() if ratio != 1 and is_lora_b(n)}
        rest = {n: p for n, p in self.parameters.items() if n not in fast}
        # The default rate comes first, since the first group's rate is the one that is logged.
        return [
            ParameterGroup(names=tuple(chosen), parameters=tuple(chosen.values()), lr=rate)
            for chosen, rate in ((rest, lr), (fast, lr * ratio))
            if chosen
        ]

    def read(self) -> dict[str, Tensor]:
        return adapter_weights(self._transformer)

    def present(self) -> Mapping[str, Tensor]:
        return self.read()

    def write(self, weights: Mapping[str, Tensor], source: str) -> None:
        own = self.read()
        # Loading would round other dtypes silently. Wrong names and shapes are found by it.
        wrong = [n for n, t in weights.items() if n in own and t.dtype != own[n].dtype]
        if wrong:
            raise CheckpointError(
                f"{source}: {len(wrong)} weights have another dtype than those of this run, such "
                f"as {wrong[0]} ({weights[wrong[0]].dtype}, not {own[wrong[0]].dtype})"
            )
        load_adapter_weights(self._transformer, weights, source)

    @contextmanager
    def base(self) -> Iterator[None]:
        with adapters_disabled(self._transformer), self._fixed.removed():
            yield

    def adapter(self) -> dict[str, ModuleAdapter]:
        """The adapter in its present state with its fixed parts, by module, on the CPU."""
        return self._fixed.added_to(adapter_of(self._transformer, self.config))


class FullFineTune:
    """`parameters` of the transformer itself, as `train_weights` has prepared them."""

    starts_as_base = True

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        precision: Literal["stochastic", "kahan", "float32"],
        fused: bool,
    ) -> None:
        self.parameters: Mapping[str, nn.Parameter] = parameters
        self.rounding: Rounding = "none" if precision == "float32" else precision
        self.fused = fused
        self.settle: Callable[[], None] = lambda: None
        """Returns when host memory has the present weights, where streamed ones are read and
        written (`BlockStream.settle`)."""

    def use_shards(self, shards: Mapping[str, nn.Parameter]) -> None:
        """Train `shards` in the place of the parameters of these names, before there is an
        optimizer: this process's rows of weights that are sharded now."""
        self.parameters = {n: shards.get(n, p) for n, p in self.parameters.items()}

    def groups(self, lr: float) -> list[ParameterGroup]:
        names, parameters = tuple(self.parameters), tuple(self.parameters.values())
        return [ParameterGroup(names=names, parameters=parameters, lr=lr)]

    def read(self) -> dict[str, Tensor]:
        self.settle()
        return weights_of(self.parameters)

    def present(self) -> Mapping[str, Tensor]:
        self.settle()
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def write(self, weights: Mapping[str, Tensor], source: str) -> None:
        self.settle()
        load_weights(self.parameters, weights, source)

    def base(self) -> AbstractContextManager[None]:
        # A copy of the base weights would need as much memory as the model.
        raise AssertionError("the base weights are not kept; the rules of the run file forbid this")


class EmbeddingTraining:
    """The vectors of placeholders, each with its own learning rate."""

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

    def present(self) -> Mapping[str, Tensor]:
        return self.read()

    def write(self, weights: Mapping[str, Tensor], source: str) -> None:
        load_weights(self.parameters, weights, source)
