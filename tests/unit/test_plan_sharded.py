"""Bytes of shards by arithmetic, beside those of torch's `fully_shard` on the same parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from onewan.adapters.select import select_weights
from onewan.adapters.weights import Precision, train_weights
from onewan.config.load import load_run
from onewan.config.schema import ResolvedRun
from onewan.memory.plan.shapes import TransformerShape
from onewan.memory.plan.sharded import WHOLE_BLOCKS, exchanged, expert_weights, rank_bytes
from onewan.memory.plan.sharing import Sharing
from onewan.memory.plan.stored import StoredTransformer, assumed_model
from onewan.memory.plan.trained import trained_weights

RUN = """
model: {path: Owner/Model, variant: t2v-a14b}
method: {kind: fine_tune}
validation: {clips: 0}
"""


@pytest.fixture
def run(tmp_path: Path):
    """`run("method.weights=kahan")` is a run file with overrides."""

    def build(*overrides: str) -> ResolvedRun:
        file = tmp_path / "run.yaml"
        file.write_text(RUN, encoding="utf-8")
        return load_run(file, overrides)

    return build


def small_transformer() -> WanTransformer3DModel:
    """On the meta device, in bfloat16 but for what diffusers keeps in float32. Neither 5 nor 7
    divides the rows of a weight."""
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_layers=3, num_attention_heads=2, attention_head_dim=6, ffn_dim=26
        )
    kept = set(WanTransformer3DModel._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.bfloat16()
    return model


def stored(config: ResolvedRun, model: WanTransformer3DModel) -> StoredTransformer:
    large = assumed_model(config).experts["low"]
    return replace(large, shape=TransformerShape.of_config(model.config), expands=False)


@pytest.fixture
def process() -> Iterator[object]:
    """`process(rank, count)` is this process as one of several, which send each other nothing."""

    def start(rank: int, count: int) -> None:
        store = FakeStore()
        dist.init_process_group(backend="fake", rank=rank, world_size=count, store=store)

    yield start
    dist.destroy_process_group()


def shard(block: nn.Module, mesh: DeviceMesh) -> None:
    """As `onewan.memory.sharded_blocks` does: the weights and biases of linear layers."""
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    chosen = {parameter for linear in linears for parameter in linear.parameters()}
    fully_shard(block, mesh=mesh, ignored_params=set(block.parameters()) - chosen)


def local(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@pytest.mark.parametrize(("rank", "count"), [(0, 2), (1, 2), (0, 5), (3, 5), (4, 5), (6, 7)])
@pytest.mark.parametrize(
    ("precision", "modules"),
    [
        *(("stochastic", "all"), ("kahan", "all"), ("float32", "all")),
        ("stochastic", "cross_attention, norms"),
    ],
)
def test_shards_have_the_bytes_of_those_of_torch(
    run, process, precision: Precision, modules: str, rank: int, count: int
) -> None:
    overrides = [f"method.weights={precision}", f"method.modules=[{modules}]"]
    config = run(*overrides, "train.ema={decay: 0.9}")
    model = small_transformer()
    trained = set(select_weights(model, config.method.modules, None))
    train_weights(model, sorted(trained), precision)
    process(rank, count)
    mesh = init_device_mesh("cpu", (count,))
    for block in model.blocks:
        shard(block, mesh)
    tensors = {name: local(parameter) for name, parameter in model.named_parameters()}
    shards = [local(p) for p in model.parameters() if isinstance(p, DTensor)]
    whole_ones = [p for p in model.parameters() if not isinstance(p, DTensor)]

    own = stored(config, model)
    whole = trained_weights(config, own.shape, config.model.facts().expert("low"))
    found = rank_bytes(config, own, whole, Sharing(shards=count), rank)
    assert found.shards == sum(t.nbytes for t in shards)
    assert found.replicated == sum(t.nbytes for t in whole_ones)
    assert found.gradients == sum(t.nbytes for n, t in tensors.items() if n in trained)
    numbers = sum(t.numel() for n, t in tensors.items() if n in trained)
    assert found.averages == 4 * numbers
    assert found.state.device == 8 * numbers  # two moments of AdamW
    half = sum(t.numel() for n, t in tensors.items() if n in trained and t.dtype != torch.float32)
    assert found.residuals == (2 * half if precision == "kahan" else 0)
    assert found.parameters == found.shards + found.replicated + found.residuals


def linear_weights(block: nn.Module) -> list[nn.Parameter]:
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    return [parameter for linear in linears for parameter in linear.parameters()]


def test_buffers_have_the_bytes_of_whole_blocks(run) -> None:
    config, model = run(), small_transformer()
    own = stored(config, model)
    whole = trained_weights(config, own.shape, config.model.facts().expert("low"))
    found = rank_bytes(config, own, whole, Sharing(shards=2))  # 2 divides all rows
    block = linear_weights(model.blocks[0])
    assert found.whole_weights == WHOLE_BLOCKS * sum(p.nbytes for p in block)
    # Gradients of one block in the weights' type, and of another one in float32 with its sums.
    assert found.block_gradients == sum(p.nbytes for p in block)
    assert found.reduced_gradients == sum((4 + 4 // 2) * p.numel() for p in block)
    assert rank_bytes(config, own, None, Sharing(shards=2)).reduced_gradients == 0


@pytest.mark.parametrize("count", [2, 5, 7])
def test_what_is_gathered_is_the_padded_shards_of_all(run, process, count: int) -> None:
    config, model = run(), small_transformer()
    whole = [p for n, p in model.named_parameters() if ".attn" not in n and ".ffn." not in n]
    whole += [p for n, p in model.named_parameters() if ".norm_" in n]
    process(0, count)
    shard(model.blocks[0], init_device_mesh("cpu", (count,)))
    shards = [local(p) for p in linear_weights(model.blocks[0])]  # the first has most rows
    found = exchanged(config, stored(config, model), Sharing(shards=count))
    assert found.gathered == count * sum(t.nbytes for t in shards)
    assert found.reduced == count * sum(t.numel() for t in shards)
    assert found.summed == sum(p.numel() for p in whole)


def test_shards_of_all_processes_are_the_whole(run) -> None:
    config, model = run(), small_transformer()
    for count in (1, 2, 3, 8, 40):
        for weight in expert_weights(config, stored(config, model), fine_tunes=True):
            sharing = Sharing(shards=count)
            rows = [weight.rows_of(sharing, rank) for rank in range(count)]
            if weight.block is None:
                assert set(rows) == {weight.rows}
            else:
                assert sum(rows) == weight.rows and sorted(rows, reverse=True) == rows


def test_adapters_are_whole_beside_shards_of_frozen_weights(run) -> None:
    config = run("method={kind: lora, rank: 4}", "optimizer.name=adamw")
    own = assumed_model(config).experts["low"]
    whole = trained_weights(config, own.shape, config.model.facts().expert("low"))
    assert whole is not None
    found = rank_bytes(config, own, whole, Sharing(shards=8))
    assert found.adapters == whole.weights and found.gradients == whole.gradients
    assert found.state == whole.state and found.reduced_gradients == 0
    # All rows can be divided by 8. Beside linear layers a block has norms and modulation.
    others = own.shape.layers * (2 * 4 + 4 * 2 + 4 * 6) * own.shape.width
    assert found.replicated == own.outer_bytes + others
    assert found.shards == (own.all_bytes - found.replicated) / 8
