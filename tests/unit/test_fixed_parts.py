"""The parts of an adapter file that are merged into the model and not trained."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel
from support.adapters import METHODS, file_of, output, relative, trained
from support.streamed import stream_blocks
from support.tiny_models import in_bfloat16, quantized, tiny_transformer
from torch import Tensor

from onewan.adapters.adapter_config import adapter_config_from_file
from onewan.adapters.lora import adapter_of, apply_lora, attach_adapter
from onewan.adapters.merging import FixedParts, split_adapter
from onewan.errors import CheckpointError
from onewan.formats.adapter import ModuleAdapter
from onewan.memory.block_weights import BlockWeights
from onewan.memory.host_memory import HostMemory
from onewan.memory.streaming import BlockStream
from onewan.train.trainables import AdapterTraining

Q, NORM = "blocks.0.attn1.to_q", "blocks.0.attn1.norm_q"


@pytest.fixture(scope="module")
def base() -> WanTransformer3DModel:
    return tiny_transformer()


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))) * 0.3


def with_differences(modules: dict[str, ModuleAdapter]) -> dict[str, ModuleAdapter]:
    """The adapter with differences of biases and norms, and a pair on the patch embedding."""
    biased = {
        module: ModuleAdapter(
            kind=adapter.kind,
            tensors={**adapter.tensors, "diff_b": some(len(adapter_bias(module)))},
            alpha=adapter.alpha,
        )
        for module, adapter in modules.items()
    }
    patch = {"lora_A": some(2, 16, 1, 2, 2), "lora_B": some(32, 2, 1, 1, 1)}
    return biased | {
        NORM: ModuleAdapter(kind="difference", tensors={"diff": some(32)}),
        "proj_out": ModuleAdapter(kind="difference", tensors={"diff_b": some(64)}),
        "blocks.1.scale_shift_table": ModuleAdapter(
            kind="difference", tensors={"diff": some(1, 6, 32)}
        ),
        "patch_embedding": ModuleAdapter(kind="lora", tensors=patch, alpha=1.0),
    }


def adapter_bias(module: str) -> Tensor:
    return torch.empty(64 if module.endswith("ffn.net.0.proj") else 32)


def start(
    model: WanTransformer3DModel, modules: dict[str, ModuleAdapter], method: str
) -> AdapterTraining:
    """Training of `model` that starts from `modules`, as `trainable_setup` attaches it."""
    to_train, fixed = split_adapter(modules)
    file = file_of(to_train)
    config, weights = adapter_config_from_file(file, METHODS[method], model)
    parts = FixedParts(model, fixed, "start")
    attach_adapter(model, config, 0, "high", weights)
    return AdapterTraining(model, config, parts)


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr", "oft"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_starts_as_the_applied_file_and_has_it_again(base, method, precision):
    adapted, config = trained(base, METHODS[method])
    modules = with_differences(adapter_of(adapted, config))
    if precision == "bfloat16":
        base = in_bfloat16(base)
    dtype = getattr(torch, precision)
    model, applied = copy.deepcopy(base), copy.deepcopy(base)
    before = {n: p.clone() for n, p in model.named_parameters()}
    training = start(model, modules, method)
    apply_lora(applied, modules, "start")
    got = output(model, dtype)
    limit = 1e-5 if precision == "float32" else 0.02
    assert relative(got, output(applied, dtype)) < limit < 0.05 < relative(got, output(base, dtype))
    with training.base():
        assert torch.equal(output(model, dtype), output(base, dtype))
        now = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
        assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    assert torch.equal(output(model, dtype), got)
    written = training.adapter()
    assert written.keys() == modules.keys()
    for module, adapter in modules.items():
        for part in {"diff", "diff_b"} & adapter.tensors.keys():
            assert torch.equal(written[module].tensors[part], adapter.tensors[part])
    again = copy.deepcopy(base)
    apply_lora(again, written, "again")
    assert relative(output(again, dtype), got) < limit
    assert not [name for name in model.state_dict() if ".base_bias" in name]


@pytest.mark.parametrize("how", ["fp8", "gguf"])
def test_the_base_may_be_quantized_unless_a_quantized_weight_changes(base, how):
    adapted, config = trained(base, METHODS["lora"])
    modules = with_differences(adapter_of(adapted, config))
    # A bias of a layer that is not trained.
    modules[Q] = ModuleAdapter(kind="difference", tensors={"diff_b": some(32)})
    packed = quantized(base, how)
    model, applied = copy.deepcopy(packed), copy.deepcopy(packed)
    training = start(model, modules, "lora")
    apply_lora(applied, modules, "start")
    assert relative(output(model), output(applied)) < 1e-5
    with training.base():
        assert torch.equal(output(model), output(packed))
    modules[Q] = ModuleAdapter(kind="difference", tensors={"diff": some(32, 32)})
    with pytest.raises(CheckpointError, match=r"weights of blocks\.0\.attn1\.to_q themselves"):
        start(copy.deepcopy(packed), modules, "lora")


def test_the_base_weights_move_with_the_model(base):
    """As to another device; here to another precision."""
    model = copy.deepcopy(base)
    parts = FixedParts(
        model, {NORM: ModuleAdapter(kind="difference", tensors={"diff": some(32)})}, "x"
    )
    model.double()
    norm = model.get_submodule(NORM)
    want = base.get_submodule(NORM).weight.double()
    with parts.removed():
        assert torch.equal(norm.weight, want) and norm.weight.dtype == torch.float64
    torch.testing.assert_close(norm.weight, want + some(32).double())


@pytest.mark.parametrize(
    ("module", "adapter", "words"),
    [
        (
            NORM,
            ModuleAdapter(kind="difference", tensors={"diff": some(1)}),
            r"norm_q \(\[1\] in the file, \[32\] in the model\)",
        ),
        (
            NORM,
            ModuleAdapter(kind="difference", tensors={"diff_b": some(32)}),
            r"norm_q \(it has no bias\)",
        ),
        (
            "blocks.9.norm2",
            ModuleAdapter(kind="difference", tensors={"diff": some(32)}),
            r"has no layer blocks\.9\.norm2",
        ),
    ],
)
def test_parts_that_do_not_fit_are_found_without_weights(base, module, adapter, words):
    for model in (copy.deepcopy(base), copy.deepcopy(base).to("meta")):
        with pytest.raises(CheckpointError, match=rf"start: .*{words}"):
            FixedParts(model, {module: adapter}, "start")


def test_the_base_weights_are_removed_also_while_blocks_are_streamed(base):
    """Each use of a block binds its weights anew, which must not bring the merged ones back."""
    modules = {
        NORM: ModuleAdapter(kind="difference", tensors={"diff": some(32)}),
        "blocks.1.scale_shift_table": ModuleAdapter(
            kind="difference", tensors={"diff": some(1, 6, 32)}
        ),
    }
    model = copy.deepcopy(base)
    parts = FixedParts(model, modules, "x")
    merged = output(model, torch.float32)
    stream = BlockStream(torch.device("cpu"))
    stream.select(BlockWeights.take(list(model.blocks), HostMemory(stream.device)), resident=1)
    stream_blocks(model, stream)
    assert torch.equal(output(model, torch.float32), merged)
    with parts.removed():
        assert torch.equal(output(model, torch.float32), output(base, torch.float32))
    assert torch.equal(output(model, torch.float32), merged)
    assert not torch.equal(merged, output(base, torch.float32))
