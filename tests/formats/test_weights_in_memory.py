"""`memory.weights`: which weights are packed while loading, from which files, and what is lost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from gguf import GGMLQuantizationType
from safetensors.torch import load_file
from support import other_program_files
from support.adapters import lora_config
from support.other_program_files import as_gguf, fp8, shards, single
from torch import Tensor, nn

from onewan.adapters.lora import adapter_parameters, attach_adapter
from onewan.dtypes import WeightStorage
from onewan.errors import CheckpointError
from onewan.formats.key_maps import to_diffusers
from onewan.model.forward import predict_velocity
from onewan.model.load import WanModelLoader
from onewan.model.quantized_linear import QuantizedLinear
from onewan.model.text import pad_text
from onewan.model.wan import WanModel
from onewan.model.weight_storage import expanded, packed

FORMS: Mapping[WeightStorage, str] = {"fp8": "F8_E4M3", "int8": "int8", "nf4": "nf4"}
PACKED = pytest.mark.parametrize("storage", FORMS)


@pytest.fixture(scope="session")
def expected(t2v: Path) -> dict[str, Tensor]:
    return load_file(t2v / "expected.safetensors")


@pytest.fixture(scope="session")
def high(t2v: Path) -> dict[str, Tensor]:
    """The high-noise expert's weights: official names, bfloat16."""
    return shards(t2v / "high_noise_model")


def load(path: Path, weights: WeightStorage, **options: Any) -> WanModel:
    return WanModelLoader().load(
        {"transformer": path}, "t2v-a14b", components=("transformer",), weights=weights, **options
    )


def transformer_of(model: WanModel) -> WanTransformer3DModel:
    assert model.transformer is not None
    return model.transformer


def packed_layers(module: nn.Module) -> dict[str, QuantizedLinear]:
    return {n: m for n, m in module.named_modules() if isinstance(m, QuantizedLinear)}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# ----------------------------------------------------------------------------------- what is packed


@PACKED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_matrices_of_the_blocks_are_packed_and_nothing_else(
    tmp_path: Path, high: dict[str, Tensor], storage: WeightStorage, dtype: torch.dtype
) -> None:
    file = single(high, tmp_path / "high_noise.safetensors")
    model = load(file, storage, dtype=dtype)
    plain = transformer_of(load(file, "bf16", dtype=dtype))
    assert not model.notices and not packed_layers(plain)
    layers, state = packed_layers(transformer_of(model)), transformer_of(model).state_dict()
    linears = {n for n, m in plain.blocks.named_modules() if isinstance(m, nn.Linear)}
    assert {n.removeprefix("blocks.") for n in layers} == linears and len(linears) == 20
    for name, tensor in plain.state_dict().items():
        layer, _, which = name.rpartition(".")
        if layer not in layers or which == "bias":
            assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    for name, tensor in high.items():
        layer = layers.get(to_diffusers(name).removesuffix(".weight"))
        if layer is not None:
            want = expanded(FORMS[storage], packed(FORMS[storage], tensor))
            assert layer.form == FORMS[storage]
            assert torch.equal(layer.dequantized_weight(), want), name


@PACKED
@pytest.mark.parametrize("source", ["fp8", "Q8_0", "TQ2_0"])
def test_quantized_files_are_expanded_and_packed_again_with_a_notice(
    tmp_path: Path, high: dict[str, Tensor], storage: WeightStorage, source: str
) -> None:
    if source == "fp8":
        written = fp8(high, tmp_path / "high_noise.safetensors", "old")
    else:
        kind = GGMLQuantizationType[source]
        written = as_gguf(high, tmp_path / "high_noise.gguf", kind)
    model = load(written.path, storage)
    layers = packed_layers(transformer_of(model))
    assert len(layers) == 20
    if source == "fp8" and storage == "fp8":  # which is what was asked for
        assert not model.notices
    else:
        (notice,) = model.notices
        named = "F8_E4M3" if source == "fp8" else source
        assert f"20 weights were rounded twice, to {named} in the file and to {storage}" in notice
    for name in written.bounds:
        values = written.values[name].reshape(high[name].shape)
        if not (source == "fp8" and storage == "fp8"):
            values = expanded(FORMS[storage], packed(FORMS[storage], values))
        ours = layers[to_diffusers(name).removesuffix(".weight")].dequantized_weight()
        assert torch.equal(ours, values), name


def test_the_text_encoder_is_not_packed_since_its_embeddings_are_cached(
    t2v: Path, tmp_path: Path
) -> None:
    text = fp8(other_program_files.text_encoder(t2v), tmp_path / "umt5.safetensors", "old").path
    for storage, count in (("as_stored", 14), ("nf4", 14), ("bf16", 0)):
        model = WanModelLoader().load(
            {"path": t2v, "text_encoder": text},
            components=("text_encoder",),
            weights=storage,  # pyright: ignore[reportArgumentType]
        )
        assert model.text_encoder is not None and not model.notices
        layers = packed_layers(model.text_encoder).values()
        assert len(layers) == count and {layer.form for layer in layers} <= {"F8_E4M3"}


@PACKED
def test_values_that_are_not_finite_are_refused(
    tmp_path: Path, high: dict[str, Tensor], storage: WeightStorage
) -> None:
    name = "blocks.1.ffn.0.weight"
    damaged = {**high, name: high[name].clone()}
    damaged[name][3, 5] = float("nan")
    file = single(damaged, tmp_path / "high_noise.safetensors")
    with pytest.raises(CheckpointError, match=r"1 of \d+ weights .*NaN .*blocks\.1\.ffn\.net\.0"):
        load(file, storage)


def test_a_matrix_without_whole_blocks_is_refused(tmp_path: Path) -> None:
    model = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, text_dim=16, ffn_dim=20, num_layers=1
    )
    model.save_pretrained(tmp_path / "odd")
    with pytest.raises(CheckpointError, match=r"is \[12, 12\], but nf4 .*fp8 or int8"):
        WanModelLoader().load(
            {"transformer": tmp_path / "odd"}, components=("transformer",), weights="nf4"
        )


# ------------------------------------------------------------------------------------- what is lost

LORA = lora_config(rank=4, alpha=4, dropout=0, modules=["attn1", "attn2", "ffn"], layers=(0, 1))


def loss_and_gradients(
    model: WanTransformer3DModel, expected: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    attach_adapter(model, LORA, 0, "high")
    for number, parameter in enumerate(adapter_parameters(model).values()):
        generator = torch.Generator().manual_seed(number)
        parameter.data.normal_(std=0.05, generator=generator)
    model.train()
    out = predict_velocity(
        model,
        expected["dit.latent"],
        torch.tensor([0.5]),
        pad_text([expected["text.embedding.0"]]),
        dtype=torch.bfloat16,
    )
    loss = (out - expected["dit.latent"]).square().mean()
    loss.backward()
    return loss.detach(), {
        n: p.grad for n, p in adapter_parameters(model).items() if p.grad is not None
    }


@pytest.mark.parametrize(
    ("storage", "of_loss", "of_gradients"),
    # About twice what was measured.
    [("fp8", 1e-4, 0.045), ("int8", 1e-4, 0.017), ("nf4", 1e-4, 0.17)],
)
def test_loss_and_gradients_are_near_those_of_bfloat16(
    tmp_path: Path,
    high: dict[str, Tensor],
    expected: dict[str, Tensor],
    storage: WeightStorage,
    of_loss: float,
    of_gradients: float,
) -> None:
    file = single(high, tmp_path / "high_noise.safetensors")
    options = {"dtype": torch.bfloat16}
    loss, ours = loss_and_gradients(transformer_of(load(file, storage, **options)), expected)
    want, theirs = loss_and_gradients(transformer_of(load(file, "bf16", **options)), expected)
    assert ours.keys() == theirs.keys() and len(ours) == 40
    together = [torch.cat([g[n].flatten() for n in theirs]) for g in (ours, theirs)]
    errors = relative(loss, want), relative(*together)
    print(f"{storage}: loss {errors[0]:.1e}, gradients {errors[1]:.1e}")
    assert loss.isfinite() and together[0].isfinite().all()
    assert 0 < errors[0] < of_loss and 0 < errors[1] < of_gradients
