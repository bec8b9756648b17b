"""Blocks that are run in parts have the results and gradients of diffusers' blocks, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from onewan.adapters.adapter_config import adapter_config_for
from onewan.adapters.lora import attach_adapter
from onewan.config.method import DoraMethod, LohaMethod, LokrMethod, LoraMethod, OftMethod
from onewan.memory.activations import KeptActivations
from onewan.memory.block_backward import BlockComputation
from onewan.memory.block_runner import CheckpointedBlocks
from onewan.model.attention import attend_within_frames
from onewan.model.block_parts import BlockParts
from onewan.model.forward import NoisyLatents, predict_velocities, predict_velocity
from onewan.model.precision import keep_float32_islands
from onewan.model.transformer import WanTransformer

METHODS = {
    "lora": LoraMethod(kind="lora", rank=4),
    "dora": DoraMethod(kind="dora", rank=4),
    "loha": LohaMethod(kind="loha", rank=4),
    "lokr": LokrMethod(kind="lokr", rank=2, factor=4),
    "oft": OftMethod(kind="oft", block_size=8),
}
DTYPES = (torch.float32, torch.bfloat16)
HOST = torch.device("cpu")


@pytest.fixture(scope="module")
def base() -> WanTransformer:
    torch.manual_seed(0)
    return WanTransformer(
        num_attention_heads=2, attention_head_dim=16, text_dim=24, ffn_dim=64, num_layers=3
    )


def transformer(base: WanTransformer, dtype: torch.dtype, trained: str) -> WanTransformer:
    """A copy of `base` in `dtype` that trains adapters (a key of METHODS), everything ("full"), or
    nothing but the text ("text")."""
    model = copy.deepcopy(base)
    islands = set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if not islands & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    keep_float32_islands(model)
    model.requires_grad_(trained == "full")
    if trained in METHODS:
        attach_adapter(model, adapter_config_for(METHODS[trained], model, None), 1, "high")
        generator = torch.Generator().manual_seed(2)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += 0.05 * noise  # new adapters are partly zero
    model.enable_gradient_checkpointing()
    return model.train()


def with_runner(model: WanTransformer, *, offload: bool = False, **how: Any) -> WanTransformer:
    model.block_runner = CheckpointedBlocks(
        blocks=list(model.blocks),  # pyright: ignore[reportArgumentType]
        computation=BlockComputation(**how),
        store=KeptActivations(HOST, lambda size: torch.empty(size, dtype=torch.uint8)),
        offload_inputs=offload,
        offload_attention=offload,
    )
    return model


def inputs(clean: Sequence[int] = ()) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "x_BCFHW": torch.randn(2, 16, 3, 4, 6, generator=generator),
        "t_B": torch.tensor([0.3, 0.8]),
        "text_BLD": torch.randn(2, 512, 24, generator=generator),
        "clean_frames_BF": torch.tensor([[n in clean for n in range(3)], [False] * 3])
        if clean
        else None,
    }


def step(
    model: WanTransformer, dtype: torch.dtype, *, text: bool = False, clean: Sequence[int] = ()
) -> dict[str, Tensor]:
    """The prediction and all gradients by name."""
    given = inputs(clean)
    given["text_BLD"].requires_grad_(text)
    torch.manual_seed(4)  # of the dropout
    prediction = predict_velocity(model, **given, dtype=dtype)
    prediction.square().mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    if text:
        found["text"] = given["text_BLD"].grad
    return {**found, "prediction": prediction.detach()}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different


@pytest.mark.parametrize("keep_attention", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trained", [*METHODS, "full", "text"])
def test_results_and_gradients_have_the_bits_of_diffusers_checkpointing(
    base: WanTransformer, trained: str, dtype: torch.dtype, keep_attention: bool
) -> None:
    text = trained == "text"
    expected = step(transformer(base, dtype, trained), dtype, text=text)
    model = with_runner(
        transformer(base, dtype, trained), keep_attention=keep_attention, offload=keep_attention
    )
    assert_same_bits(step(model, dtype, text=text), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_checkpointing_the_bits_are_the_same(
    base: WanTransformer, dtype: torch.dtype
) -> None:
    expected = step(transformer(base, dtype, "lora"), dtype)
    model = with_runner(transformer(base, dtype, "lora"))
    assert isinstance(model.block_runner, CheckpointedBlocks)
    model.block_runner.checkpointing = False
    assert_same_bits(step(model, dtype), expected)


@pytest.mark.parametrize("trained", ["lora", "full"])
def test_chunks_of_the_feed_forward_layer_change_the_order_of_sums_only(
    base: WanTransformer, trained: str
) -> None:
    expected = step(transformer(base, torch.float32, trained), torch.float32)
    model = with_runner(transformer(base, torch.float32, trained), chunks=4)
    actual = step(model, torch.float32)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-6, atol=1e-6 * value.abs().max())


def test_attention_within_frames_has_the_same_bits(base: WanTransformer) -> None:
    plain = transformer(base, torch.bfloat16, "lora")
    attend_within_frames(plain)
    expected = step(plain, torch.bfloat16)
    model = with_runner(transformer(base, torch.bfloat16, "lora"), frames_apart=True)
    assert_same_bits(step(model, torch.bfloat16), expected)
    together = with_runner(transformer(base, torch.bfloat16, "lora"))
    assert not torch.equal(step(together, torch.bfloat16)["prediction"], expected["prediction"])


@pytest.mark.parametrize("keep_attention", [False, True])
def test_dropout_is_the_same_when_a_part_is_computed_again(
    base: WanTransformer, keep_attention: bool
) -> None:
    def model() -> WanTransformer:
        found = transformer(base, torch.float32, "lora")
        for module in found.modules():
            if isinstance(module, torch.nn.ModuleDict) and "default" in module:
                unused = isinstance(module["default"], torch.nn.Identity)
                module["default"] = torch.nn.Dropout(0.3) if unused else module["default"]
        return found.train()

    expected = step(model(), torch.float32)
    actual = step(with_runner(model(), keep_attention=keep_attention, dropout=True), torch.float32)
    assert_same_bits(actual, expected)
    without = step(transformer(base, torch.float32, "lora"), torch.float32)
    assert not torch.equal(without["prediction"], expected["prediction"])


@pytest.mark.parametrize("clean", [(0,), (2,), (0, 2)])
@pytest.mark.parametrize("chunks", [1, 4])
def test_few_timesteps_of_a_clip_give_what_a_timestep_per_token_gives(
    base: WanTransformer, chunks: int, clean: tuple[int, ...]
) -> None:
    expected = step(transformer(base, torch.float32, "lora"), torch.float32, clean=clean)
    model = with_runner(transformer(base, torch.float32, "lora"), chunks=chunks)
    actual = step(model, torch.float32, clean=clean)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6 * value.abs().max())


def test_batches_that_go_through_the_blocks_together_have_the_gradients_of_one_after_another(
    base: WanTransformer,
) -> None:
    batches = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        batches.append(
            NoisyLatents(
                x=torch.randn(1, 16, 1 + seed, 4, 4, generator=generator),
                t=torch.tensor([0.2 + 0.3 * seed]),
                text=torch.randn(1, 512, 24, generator=generator),
            )
        )
    one_by_one = with_runner(transformer(base, torch.bfloat16, "lora"))
    predictions = []
    for batch in batches:
        (prediction,) = predict_velocities(one_by_one, [batch], dtype=torch.bfloat16)
        prediction.square().mean().backward()
        predictions.append(prediction)
    together = with_runner(transformer(base, torch.bfloat16, "lora"), keep_attention=True)
    results = predict_velocities(together, batches, dtype=torch.bfloat16)
    torch.autograd.backward([result.square().mean() for result in results])
    assert all(map(torch.equal, results, predictions))
    for (name, parameter), other in zip(
        together.named_parameters(), one_by_one.parameters(), strict=True
    ):
        if parameter.requires_grad:
            assert parameter.grad is not None and other.grad is not None
            assert torch.equal(parameter.grad, other.grad), name


def test_blocks_before_the_first_trained_one_keep_nothing(base: WanTransformer) -> None:
    model = copy.deepcopy(base).requires_grad_(False).train()
    adapter = adapter_config_for(METHODS["lora"], model, (2,))
    attach_adapter(model, adapter, 1, "high")
    with_runner(model)
    assert isinstance(model.block_runner, CheckpointedBlocks)
    prediction = predict_velocity(model, **inputs())
    store = model.block_runner.store
    assert {key[0] for key in store._kept} == {2}  # pyright: ignore[reportIndexIssue, reportGeneralTypeIssues]
    prediction.mean().backward()
    assert not store._kept


def test_what_a_pass_without_its_backward_pass_has_kept_is_dropped(base: WanTransformer) -> None:
    model = with_runner(transformer(base, torch.float32, "lora"), offload=True)
    expected = step(copy.deepcopy(model), torch.float32)
    predict_velocity(model, **inputs())  # such as one that ran out of memory
    assert_same_bits(step(model, torch.float32), expected)


def test_the_sampler_gets_the_values_of_diffusers_forward_pass(base: WanTransformer) -> None:
    given = inputs()
    plain = transformer(base, torch.bfloat16, "lora").eval()
    model = with_runner(transformer(base, torch.bfloat16, "lora"), chunks=1).eval()
    arguments = (given["x_BCFHW"], given["t_B"] * 1000, given["text_BLD"])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain(*arguments, return_dict=True).sample
        assert torch.equal(model(*arguments, return_dict=True).sample, expected)
        assert torch.equal(model(*arguments, return_dict=False)[0], expected)


def test_compiled_parts_are_compiled_once_for_all_blocks_addresses_and_sizes(
    base: WanTransformer,
) -> None:
    torch._dynamo.reset()
    # This backend runs the captured graphs without generating code, which would take minutes.
    parts = BlockParts.compiled("aot_eager")

    def compiled() -> WanTransformer:
        return with_runner(transformer(base, torch.float32, "lora"), parts=parts)

    first = compiled()
    actual = step(first, torch.float32)
    for name, value in step(transformer(base, torch.float32, "lora"), torch.float32).items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6 * value.abs().max())
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs < 60  # 3 blocks of 6 parts, with and without gradients
    for parameter in first.parameters():  # as streaming does
        if not parameter.requires_grad:
            parameter.data = parameter.data.clone()
    step(first, torch.float32)
    step(compiled(), torch.float32)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    longer = {**inputs(), "x_BCFHW": torch.randn(2, 16, 5, 4, 6)}
    predict_velocity(first, **longer).mean().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_gradients_of_a_block_do_not_change_after_it_is_complete(
    base: WanTransformer, trained: str, checkpointing: bool, chunks: int
) -> None:
    """Those of two batches that go through the blocks together, behind a pass before."""
    model = with_runner(transformer(base, torch.bfloat16, trained), chunks=chunks)
    runner = model.block_runner
    assert isinstance(runner, CheckpointedBlocks)
    runner.checkpointing = checkpointing
    given = inputs()
    batch = NoisyLatents(x=given["x_BCFHW"], t=given["t_B"], text=given["text_BLD"])

    def gradients(index: int) -> dict[str, Tensor]:
        named = model.blocks[index].named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}

    complete: dict[int, dict[str, Tensor]] = {}
    for callback in (None, lambda index: complete.update({index: gradients(index)})):
        runner.complete = callback
        predictions = predict_velocities(model, [batch, batch], dtype=torch.bfloat16)
        torch.autograd.backward([p.square().mean() for p in predictions])
    # Nothing before the first block has a gradient beside frozen weights, so that autograd does
    # not reach its beginning where it keeps everything.
    reached = [2, 1] if (trained, checkpointing) == ("lora", False) else [2, 1, 0]
    assert list(complete) == reached
    for index, found in complete.items():
        assert found
        assert_same_bits(found, gradients(index))
