"""The sizes that the plan computes, against real modules, adapters, optimizers and files."""

from __future__ import annotations

from functools import partial
from math import prod
from pathlib import Path

import pytest
import torch
from support.optimizers import CHOICES, uncompiled
from support.runs import RunFile, write_run_file
from support.tiny_models import TinyModels
from torch import nn

from onewan.adapters.adapter_config import adapter_config_for
from onewan.adapters.lora import adapter_parameters, attach_adapter
from onewan.adapters.select import select_weights
from onewan.arithmetic.byte_sizes import format_bytes, parse_bytes
from onewan.config.method import FineTuneMethod
from onewan.dtypes import torch_dtype
from onewan.memory.plan.bucket import Bucket
from onewan.memory.plan.shapes import TransformerShape, VaeShape
from onewan.memory.plan.storage import state_bytes
from onewan.memory.plan.stored import DECODED_ON_DEVICE, read_stored_model
from onewan.memory.plan.trained import trained_weights
from onewan.model.load import WanModelLoader
from onewan.model.meta_init import transformer_on_meta
from onewan.model.weight_storage import gguf_form_exists
from onewan.train.optimizers.builders import build_optimizer
from onewan.train.optimizers.parameters import library_group
from onewan.variants import VARIANTS, Variant

__all__ = ["uncompiled"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of each variant under its name."""
    folder = tmp_path_factory.mktemp("workshop")
    models = TinyModels(folder, width=64, layers=3)
    for variant in VARIANTS:
        models(variant)
    return folder


@pytest.fixture
def run_file(workshop: Path, tmp_path: Path) -> RunFile:
    return partial(write_run_file, workshop, tmp_path)


def transformer_of(shape: TransformerShape) -> nn.Module:
    return transformer_on_meta(
        {
            "num_attention_heads": shape.heads,
            "attention_head_dim": shape.width // shape.heads,
            "in_channels": shape.in_channels,
            "out_channels": shape.out_channels,
            "ffn_dim": shape.feed_forward,
            "num_layers": shape.layers,
            "text_dim": shape.text_width,
            "freq_dim": shape.time_frequencies,
            "reference_channels": shape.reference_channels or None,
        }
    )


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda v: v.name)
def test_a_transformer_has_the_weights_that_diffusers_gives_it(variant: Variant) -> None:
    shape = TransformerShape.of_variant(variant)
    module = transformer_of(shape)
    expected = {name: p.numel() for name, p in module.named_parameters()}
    assert {name: prod(size) for name, size in shape.named_weights()} == expected
    linears = {
        name: (m.out_features, m.in_features)
        for name, m in module.named_modules()
        if isinstance(m, nn.Linear)
    }
    assert dict(shape.linears()) == linears
    assert shape.weights == sum(expected.values())
    block = sum(size for name, size in expected.items() if name.startswith("blocks.0."))
    assert shape.block_matrix_weights + shape.block_vector_weights == block


@pytest.mark.parametrize(
    "method",
    [
        "method={kind: lora, rank: 8}",
        "method={kind: lora, rank: 8, modules: [all_linears], init: pissa}",
        "method={kind: lora, rank: 8, modules: [attention, 'ffn.net.2'],"
        " per_module: [{modules: [cross_attention], rank: 2}]}",
        "method={kind: dora, rank: 8, modules: ['blocks.[01].*']}",
        "method={kind: loha, rank: 4}",
        "method={kind: lokr, rank: 4}",
        "method={kind: lokr, rank: 2, factor: 8, decompose_both: true}",
        "method={kind: lokr, rank: 64, factor: 3}",
        "method={kind: oft, block_size: 16}",
    ],
)
@pytest.mark.parametrize("layers", ["null", "[1, 2]"])
def test_an_adapter_has_the_weights_that_peft_gives_it(
    run_file: RunFile, method: str, layers: str
) -> None:
    config = run_file(
        "t2v-a14b", method, f"wan_config.transformer_layers_to_train={layers}",
        "per_expert.low.rank=3" if "oft" not in method else "train.steps=6",
    )  # fmt: skip
    stored = read_stored_model(config)
    for expert in config.model.facts().experts:
        planned = trained_weights(config, stored.experts[expert.name].shape, expert)
        transformer = WanModelLoader().load(config.model.path or "", components=["transformer"])
        module = transformer.transformer
        assert module is not None and planned is not None
        settings = config.per_expert.low if expert.name == "low" else config.per_expert.high
        adapter = adapter_config_for(
            config.method,  # pyright: ignore[reportArgumentType]
            module,
            config.wan_config.transformer_layers_to_train,
            rank=settings.rank,
            alpha=settings.alpha,
        )
        attach_adapter(module, adapter, 0, expert.name)
        trained = adapter_parameters(module)
        assert planned.count == sum(p.numel() for p in trained.values())
        frozen = [b for n, b in module.named_buffers() if "pissa" in n]
        frozen += [p for n, p in module.named_parameters() if "pissa" in n]
        tensors = [*trained.values(), *frozen]
        assert planned.weights == sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("modules", ["[all]", "[attention, norms]", "[biases, 'blocks.0.*']"])
@pytest.mark.parametrize("weights", ["stochastic", "kahan", "float32"])
def test_fine_tuning_trains_the_selected_weights(
    run_file: RunFile, modules: str, weights: str
) -> None:
    config = run_file(
        "ti2v-5b", f"method={{kind: fine_tune, modules: {modules}, weights: {weights}}}",
        "model.dtype=bfloat16",
    )  # fmt: skip
    (expert,) = config.model.facts().experts
    shape = read_stored_model(config).experts["single"].shape
    planned = trained_weights(config, shape, expert)
    module = transformer_of(shape)
    assert isinstance(config.method, FineTuneMethod) and planned is not None
    names = select_weights(module, config.method.modules, None)  # pyright: ignore[reportArgumentType]
    count = sum(module.get_parameter(name).numel() for name in names)
    assert planned.count == count
    # Beyond the 2 bytes of the frozen weight that each replaces.
    assert planned.weights == {"stochastic": 0, "kahan": 2, "float32": 2}[weights] * count
    assert planned.gradients == planned.stored == (4 if weights == "float32" else 2) * count


@pytest.mark.parametrize("name", CHOICES)
def test_optimizer_state_is_that_of_the_real_optimizer(name: str) -> None:
    torch.manual_seed(0)
    shapes = [(256, 64), (64, 256), (300,)]
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = build_optimizer([library_group(weights, 1e-3, "high")], CHOICES[name])
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    tensors = [
        value
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.numel() > 1 and "qmap" not in name  # shared
    ]
    real = sum(map(_bytes_of, tensors))
    planned = state_bytes(CHOICES[name], shapes)
    tolerance = 0.25 if planned.is_estimate else 0.03
    assert planned.device == pytest.approx(real, rel=tolerance)


def _bytes_of(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's low-bit state is made of several tensors
        parts = tensor.__tensor_flatten__()[0]  # pyright: ignore[reportAttributeAccessIssue]
        return sum(_bytes_of(getattr(tensor, name)) for name in parts)
    return tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", ["as_stored", "bf16", "fp8", "int8", "nf4"])
def test_weights_in_memory_have_the_planned_bytes(
    run_file: RunFile, dtype: str, weights: str
) -> None:
    config = run_file("i2v-a14b", f"model.dtype={dtype}", f"memory.weights={weights}")
    planned = read_stored_model(config)
    model = WanModelLoader().load(
        config.model.path or "", dtype=torch_dtype(dtype), weights=config.memory.weights
    )
    assert model.transformer is not None and model.vae is not None
    tensors = dict(model.transformer.named_parameters())
    # Packed matrices are buffers; the others are rope tables, which are not among the weights.
    tensors |= {n: b for n, b in model.transformer.named_buffers() if "rope" not in n}
    sizes = {n: t.numel() * t.element_size() for n, t in tensors.items()}
    stored = planned.experts["high"]
    block = sum(size for name, size in sizes.items() if name.startswith("blocks.1."))
    assert stored.block_bytes == pytest.approx(block, rel=0.01)
    assert stored.outer_bytes == sum(s for n, s in sizes.items() if not n.startswith("blocks."))
    assert planned.vae.weights == sum(p.numel() for p in model.vae.parameters())
    assert model.text_encoder is not None
    text = sum(p.numel() * p.element_size() for p in model.text_encoder.parameters())
    assert planned.text_encoder == pytest.approx(text, rel=0.01)
    assert planned.notes == ()


def test_a_model_that_is_not_here_has_the_sizes_of_its_variant(run_file: RunFile) -> None:
    config = run_file("t2v-a14b", "model.path=Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    planned = read_stored_model(config)
    assert planned.experts["low"].shape == TransformerShape.of_variant(config.model.facts())
    assert planned.vae == VaeShape.of_variant(config.model.facts())
    (note,) = planned.notes
    assert "the files of the high expert and the low expert are not on this machine" in note


def test_gguf_types_that_stay_packed_are_those_that_the_loader_keeps() -> None:
    types = [*DECODED_ON_DEVICE, "IQ3_S", "TQ1_0", "Q8_1"]
    assert {t for t in types if gguf_form_exists(t, 256)} == DECODED_ON_DEVICE


@pytest.mark.parametrize(
    ("text", "amount"),
    [("24GB", 24 * 10**9), ("24GiB", 24 * 2**30), ("0.5 gb", 5 * 10**8), ("800MB", 8 * 10**8)],
)
def test_amounts_of_memory_are_read(text: str, amount: int) -> None:
    assert parse_bytes(text) == amount


@pytest.mark.parametrize("text", ["24", "GB", "-1GB", "1e9GB", "24GBs", "0GB", ""])
def test_other_texts_are_no_amounts_of_memory(text: str) -> None:
    with pytest.raises(ValueError, match="such as 24GB"):
        parse_bytes(text)


def test_amounts_are_shown_in_the_unit_that_suits_them() -> None:
    amounts = (24e9, 0.14e9, 0.02e9, 4_000, 12)
    assert [format_bytes(a) for a in amounts] == ["24.0 GB", "0.1 GB", "20.0 MB", "4.0 kB", "12 B"]


def test_the_vae_of_a_test_model_is_smaller() -> None:
    whole = VaeShape.of_variant(VARIANTS["t2v-a14b"])
    quarter = whole.scaled(whole.weights // 4)
    bucket = Bucket(frames=9, width=64, height=64)
    assert quarter.encoding_bytes(bucket) < 0.52 * whole.encoding_bytes(bucket)
