"""Two tiny experts, trained plainly by diffusers' code or with blocks that `BlockExecution` runs.

What is trained, how the frozen weights are stored and the device are a `Case`. Both ways return for
each step its loss, all gradients, and the weights after the optimizer's update.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, cast

import torch
from torch import Tensor, nn

from onewan.adapters.adapter_config import adapter_config_for
from onewan.adapters.lora import adapter_parameters, attach_adapter
from onewan.adapters.weights import train_weights
from onewan.config.method import AdapterMethod, DoraMethod, LokrMethod, LoraMethod, OftMethod
from onewan.memory.block_weights import BlockTraining
from onewan.memory.execution import BlockExecution
from onewan.memory.plan import Settings
from onewan.memory.residency import DeviceResidency
from onewan.memory.streamed_transformer import StreamedTransformer
from onewan.memory.streaming import BlockStream
from onewan.model.forward import predict_velocity
from onewan.model.transformer import WanTransformer
from onewan.train.optimizers.block_updates import BlockUpdates
from onewan.train.optimizers.parameters import ParameterGroup
from onewan.train.optimizers.per_weight import PerWeightOptimizer
from onewan.train.rounding import Rounding
from support.adapters import perturb
from support.optimizers import CHOICES, build
from support.tiny_models import in_bfloat16, quantized, tiny_transformer

LAYERS = 4
HOST = torch.device("cpu")
ADAPTERS: dict[str, AdapterMethod] = {
    "lora": LoraMethod(rank=2, modules=("*.attn1.to_q",)),
    "dora": DoraMethod(rank=2, modules=("*.attn2.to_v",)),
    "lokr": LokrMethod(rank=2, modules=("*.ffn.net.0.proj",)),
    "oft": OftMethod(block_size=8, modules=("*.attn1.to_out.0",)),
}
TRAINED: dict[str, tuple[str, ...]] = {
    **{kind: (kind,) for kind in ADAPTERS},
    "all adapters": tuple(ADAPTERS),
    "embeddings": (),
    "fine-tuning": (),
}
"""The adapters of an expert. "all adapters" are in each block together, so that one step compares
the gradients of every kind. For "embeddings" the text is trained, and for "fine-tuning" all weights
of the blocks by a fused step, whose gradients are gone when it ends."""
STORAGES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "fp8_scaled": torch.bfloat16,
    "GGUF Q8_0": torch.float32,
}
"""How frozen weights are stored, and the precision of the matrix products."""

Name = Literal["high", "low"]
NAMES: tuple[Name, Name] = ("high", "low")
Record = dict[str, Tensor]
"""The loss, gradients and weights of one step, in host memory."""


@dataclass(frozen=True)
class Case:
    """What is trained on which frozen weights."""

    storage: str
    trained: str

    @property
    def dtype(self) -> torch.dtype:
        return STORAGES[self.storage]

    @property
    def is_fused(self) -> bool:
        return self.trained == "fine-tuning"


class Expert:
    """One transformer with what is trained, and its optimizer."""

    def __init__(self, case: Case, name: Name, device: torch.device) -> None:
        self.case = case
        self.model = copy.deepcopy(_attached(case, name))
        generator = torch.Generator().manual_seed(NAMES.index(name))
        self.inputs = [
            torch.randn(1, 16, 2, 4, 4, generator=generator).to(device),
            torch.tensor([0.7]).to(device),
            torch.randn(1, 12, 16, generator=generator).to(device),
        ]
        rounding: Rounding = "none"
        if case.is_fused:
            if case.dtype == torch.bfloat16:
                rounding = "stochastic"
            names = [n for n, _ in self.model.named_parameters() if n.startswith("blocks.")]
            precision = "float32" if rounding == "none" else rounding
            self.trained = train_weights(self.model, names, precision)
        elif not TRAINED[case.trained]:
            self.inputs[-1] = text = nn.Parameter(self.inputs[-1])
            self.trained = {"text": text}
        else:
            self.trained = adapter_parameters(self.model)
        group = ParameterGroup(
            names=tuple(self.trained), parameters=tuple(self.trained.values()), lr=0.01
        )
        self.optimizer = build(
            [group], CHOICES["adamw"], rounding=rounding, fused=case.is_fused, seed=0
        )
        self.steps = 0
        self.settle: Callable[[], None] = lambda: None
        """Returns when host memory has the values of weights that are trained there."""

    def backward(self) -> Tensor:
        """The loss; the gradients are in the parameters."""
        loss = predict_velocity(self.model, *self.inputs, dtype=self.case.dtype).square().mean()
        loss.backward()
        return loss.detach()

    def gradients(self, loss: Tensor) -> Record:
        found = {"loss": loss}
        for name, parameter in self.trained.items() if not self.case.is_fused else ():
            assert parameter.grad is not None, name
            found[f"gradient of {name}"] = parameter.grad
        return {name: tensor.to(HOST, copy=True) for name, tensor in found.items()}

    def step(self) -> Record:
        """One optimizer step."""
        update = self.optimizer.begin_step(self.steps, 1.0)
        found = self.gradients(self.backward())
        update.clip_grad_norm(None)
        update.apply()
        self.steps += 1
        self.settle()
        return found | {n: p.detach().to(HOST, copy=True) for n, p in self.trained.items()}


@cache
def _attached(case: Case, name: Name) -> WanTransformer:
    """An expert's transformer in host memory, with adapters that are no longer zero."""
    base = _stored(case.storage, name)
    model = copy.deepcopy(base)
    for kind in TRAINED[case.trained]:
        part = copy.deepcopy(base)
        config = adapter_config_for(ADAPTERS[kind], part, None)
        attach_adapter(part, config, 1, name)
        for layer in config.modules:
            model.set_submodule(layer, part.get_submodule(layer))
    perturb(model, 0.05)
    return model


@cache
def _stored(storage: str, name: Name) -> WanTransformer:
    """An expert's frozen transformer in host memory."""
    base = tiny_transformer(LAYERS)
    if name == "low":
        for parameter in base.parameters():
            parameter.data = parameter.data.flip(0).contiguous()
    if storage == "bfloat16":
        base = in_bfloat16(base)
    elif storage != "float32":
        base = quantized(base, {"fp8_scaled": "F8_E4M3", "GGUF Q8_0": "gguf"}[storage])
    base.__class__ = WanTransformer
    return cast(WanTransformer, base).train()


# ------------------------------------------------------------------------------ the plain steps


@dataclass(frozen=True)
class Plain:
    """What plain training computes: diffusers' blocks, PyTorch's checkpointing, no switches."""

    steps: list[Record]
    chunked: Record
    """The last step with the feed-forward layer in chunks, and otherwise plainly resident
    weights."""


@cache
def plain_training(
    case: Case, name: Name, device: torch.device, *, steps: int, chunks: int
) -> Plain:
    """`steps` steps of one expert."""
    expert = _plain_expert(case, name, device)
    records = [expert.step() for _ in range(steps - 1)]
    if case.is_fused:  # the weights change with each backward pass
        other = _plain_expert(case, name, device)
        for _ in range(steps - 1):
            other.step()
        _run_in_chunks(other, device, chunks)
        return Plain([*records, expert.step()], other.step())
    _run_in_chunks(expert, device, chunks)
    chunked = expert.gradients(expert.backward())
    for parameter in expert.trained.values():
        parameter.grad = None
    expert.model.block_runner = None
    return Plain([*records, expert.step()], chunked)


def _plain_expert(case: Case, name: Name, device: torch.device) -> Expert:
    expert = Expert(case, name, device)
    cast(nn.Module, expert.model).to(device)  # diffusers' own hint is wrong
    expert.model.enable_gradient_checkpointing()
    return expert


def _run_in_chunks(expert: Expert, device: torch.device, chunks: int) -> None:
    settings = Settings(resident_blocks=LAYERS, feed_forward_chunks=chunks)
    BlockExecution(device, settings, streams=False).add(expert.model)


# --------------------------------------------------------------------------------- executed steps


@dataclass
class Executed:
    """Both experts on `device`, with their blocks run by one `BlockExecution`."""

    case: Case
    device: torch.device
    settings: Settings
    experts: dict[Name, Expert] = field(init=False)
    execution: BlockExecution = field(init=False)
    placements: dict[Name, StreamedTransformer] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.experts = {name: Expert(self.case, name, self.device) for name in NAMES}
        self.execution = BlockExecution(self.device, self.settings, streams=True)
        self.residency = DeviceResidency(self.device)
        for name, expert in self.experts.items():
            placement = self.execution.add(
                expert.model, training=_training(expert) if self.case.is_fused else None
            )
            assert isinstance(placement, StreamedTransformer)
            self.placements[name] = placement
            self.residency.manage(
                expert.model, expert.optimizer, alternating=True, placement=placement
            )

    def use(self, name: Name, *, following: Name | None = None) -> Expert:
        """Bring an expert for its next step; with `following`, announce the one of the step after
        it."""
        expert = self.experts[name]
        self.residency.bring(expert.model)
        if following is not None:
            self.execution.announce(expert.model, self.experts[following].model)
        return expert

    @property
    def stream(self) -> BlockStream:
        stream = self.execution.stream
        assert stream is not None
        return stream

    @property
    def block_size(self) -> int:
        """Bytes of one block in its master, the same for all."""
        (size,) = {
            placement.weights.size(index)
            for placement in self.placements.values()
            for index in range(LAYERS)
        }
        return size


def _training(expert: Expert) -> Callable[[BlockStream], BlockTraining]:
    def training(stream: BlockStream) -> BlockTraining:
        assert isinstance(expert.optimizer, PerWeightOptimizer)
        expert.settle = stream.settle
        blocks = list(expert.model.blocks)
        return BlockUpdates(expert.optimizer, blocks, stream.device, stream.settle)

    return training


def differences(found: Record, expected: Record) -> list[str]:
    """Names of the tensors that differ in a bit."""
    assert found.keys() == expected.keys()
    return [name for name in found if not torch.equal(found[name], expected[name])]


def distance(found: Record, expected: Record, before: Record | None = None) -> float:
    """The norm of the difference of all gradients, relative to their norm. Or with `before`, the
    step before: of the changes of all weights since then."""

    def norm(tensors: Iterable[Tensor]) -> float:
        return float(sum(tensor.double().square().sum() for tensor in tensors)) ** 0.5

    names = [n for n in expected if n != "loss" and n.startswith("gradient") == (before is None)]
    assert names
    since = before or {name: torch.zeros(()) for name in names}
    difference = norm(found[name].float() - expected[name].float() for name in names)
    return difference / norm(expected[name].float() - since[name].float() for name in names)
