"""Every form that Wan 2.2 comes in loads through the one loader, with the values of its file."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from gguf import GGMLQuantizationType
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from support import other_program_files
from support.adapters import lora_config
from support.other_program_files import FOLDERS, Quantized, as_gguf, fp8, shards, single
from torch import Tensor, nn

from onewan.adapters.lora import (
    adapter_parameters,
    adapter_weights,
    apply_lora,
    attach_adapter,
)
from onewan.errors import CheckpointError
from onewan.formats.adapter import ModuleAdapter
from onewan.formats.key_maps import t5_to_transformers, to_diffusers
from onewan.formats.weights import open_component
from onewan.model.forward import predict_velocity
from onewan.model.gguf_forms import DECODERS, DECODERS_WITH_LEVELS
from onewan.model.load import WanModelLoader
from onewan.model.quantized_linear import QuantizedLinear
from onewan.model.text import pad_text
from onewan.model.wan import WanModel
from onewan.model.weight_storage import expanded, levels_of

PROMPTS = ["a small dog runs on the beach", "slow camera pan of a city at night"]
PREFIXES = ["", "model.diffusion_model.", "diffusion_model."]
FP8 = ["old", "old_one", "new", "new_header", "plain"]
QUANTIZED = [*(f"fp8 {key_style}" for key_style in FP8), "gguf", "gguf flat"]


def relative(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture(scope="session")
def expected(t2v: Path) -> dict[str, Tensor]:
    return load_file(t2v / "expected.safetensors")


@pytest.fixture(scope="session")
def high(t2v: Path) -> dict[str, Tensor]:
    """The high-noise expert's weights: official names, bfloat16."""
    return shards(t2v / "high_noise_model")


def load(path: Path, variant: Any = "t2v-a14b", **options: Any) -> WanTransformer3DModel:
    model = WanModelLoader().load(
        {"transformer": path}, variant, components=("transformer",), **options
    )
    assert model.transformer is not None
    return model.transformer


def run(
    transformer: WanTransformer3DModel, expected: Mapping[str, Tensor], t: float = 500
) -> Tensor:
    with torch.no_grad():
        return predict_velocity(
            transformer,
            expected["dit.latent"],
            torch.tensor([t / 1000]),
            pad_text([expected["text.embedding.0"]]),
            condition_BCFHW=expected.get("dit.condition"),
        )


def with_values(path: Path, values: Mapping[str, Tensor]) -> WanTransformer3DModel:
    """The model at `path`, its weights replaced by `values` (official names)."""
    model = load(path, weights="bf16")
    model.load_state_dict({to_diffusers(n): t for n, t in values.items()}, strict=True)
    return model


def packed_layers(module: nn.Module) -> dict[str, QuantizedLinear]:
    return {n: m for n, m in module.named_modules() if isinstance(m, QuantizedLinear)}


def quantize_as(
    form: str, weights: Mapping[str, Tensor], folder: Path, prefix: str = ""
) -> Quantized:
    kind, _, how = form.partition(" ")
    if kind == "gguf":
        return as_gguf(weights, folder / "wan.gguf", flat_patches=how == "flat")
    return fp8(weights, folder / "wan.safetensors", how, prefix)


# ------------------------------------------------------------------------------------ not quantized


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_single_files_load_as_the_official_model(
    tmp_path: Path, high: dict[str, Tensor], expected: dict[str, Tensor], prefix: str, dtype: str
) -> None:
    file = single(high, tmp_path / "wan.safetensors", prefix, getattr(torch, dtype))
    for t in (12.5, 950):
        assert relative(run(load(file), expected, t), expected[f"dit.high_noise_model.t{t}"]) < 2e-6


@pytest.mark.parametrize("variant", ["i2v-a14b", "ti2v-5b"])
def test_single_files_of_other_variants_load(shared: Path, tmp_path: Path, variant: str) -> None:
    folder = shared / "golden" / FOLDERS[variant]
    expected = load_file(folder / "expected.safetensors")
    single_one = variant == "ti2v-5b"
    part = "transformer" if single_one else "high_noise_model"
    weights = shards(folder if single_one else folder / part)
    file = single(weights, tmp_path / "wan_high_noise.safetensors", "model.diffusion_model.")
    model = WanModelLoader().load(file)  # no mapping, no variant: the file tells
    assert model.variant.name == variant and model.transformer is not None
    assert relative(run(model.transformer, expected), expected[f"dit.{part}.t500"]) < 2e-6


def test_vae_and_text_encoder_load_from_other_files(
    shared: Path, tmp_path: Path, expected: dict[str, Tensor]
) -> None:
    """The VAEs and UMT5 as ComfyUI has them: .safetensors, and transformers' names."""
    for name, vae in (("t2v-A14B", "Wan2.1_VAE.pth"), ("ti2v-5B", "Wan2.2_VAE.pth")):
        folder = shared / "golden" / name
        file = tmp_path / f"{name}.safetensors"
        single(torch.load(folder / vae, weights_only=True), file)
        sources = {"path": folder, "vae": file}
        model = WanModelLoader().load(sources, components=("vae",))
        official = WanModelLoader().load(folder, components=("vae",))
        pixels = load_file(folder / "expected.safetensors")["vae.pixels"]
        assert torch.equal(model.encode_video(pixels), official.encode_video(pixels))
    t2v = shared / "golden" / "t2v-A14B"
    file = single(other_program_files.text_encoder(t2v), tmp_path / "umt5.safetensors")
    sources = {"text_encoder": file, "tokenizer": t2v / "google" / "umt5-xxl"}
    model = WanModelLoader().load(sources, "t2v-a14b")
    for number, prompt in enumerate(PROMPTS):
        assert relative(model.encode_prompt(prompt), expected[f"text.embedding.{number}"]) < 2e-6


def test_weights_are_those_that_diffusers_loads(
    t2v: Path, tmp_path: Path, high: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    """Written by diffusers and transformers themselves."""
    official = WanModelLoader().load(t2v)
    assert official.tokenizer is not None and official.noise_scheduler is not None
    for name in ("transformer", "transformer_2", "vae", "text_encoder", "tokenizer"):
        getattr(official, name).save_pretrained(tmp_path / name)
    model = WanModelLoader().load(tmp_path)
    assert model.transformer is not None and model.text_encoder is not None
    out = run(model.transformer, expected)
    assert relative(out, expected["dit.high_noise_model.t500"]) < 2e-6
    assert torch.equal(model.encode_text(PROMPTS), official.encode_text(PROMPTS))
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "transformer")
    assert theirs.state_dict().keys() == model.transformer.state_dict().keys()
    assert high.keys() == {k for k in high if to_diffusers(k) in theirs.state_dict()}


# ---------------------------------------------------------------------------------------- quantized


@pytest.mark.parametrize("form", QUANTIZED)
def test_quantized_files_compute_within_the_bounds_of_their_format(
    tmp_path: Path, high: dict[str, Tensor], expected: dict[str, Tensor], form: str
) -> None:
    """The outputs are those of the file's values, whose error is within the format's bound."""
    written = quantize_as(form, high, tmp_path)
    reference = run(with_values(written.path, written.values), expected)
    kept, dequantized_model = load(written.path), load(written.path, weights="bf16")
    layers = packed_layers(kept)
    assert layers.keys() == {to_diffusers(n).removesuffix(".weight") for n in written.bounds}
    assert len(layers) == 20 and not packed_layers(dequantized_model)
    for name, bound in written.bounds.items():
        ours = layers[to_diffusers(name).removesuffix(".weight")].dequantized_weight()
        assert torch.equal(ours, written.values[name])
        assert torch.equal(ours, dequantized_model.state_dict()[to_diffusers(name)])
        error = (ours - high[name].float()).abs()
        assert (error <= bound * (1 + 1e-6)).all()  # the bound itself is computed in float32
    assert relative(run(kept, expected), reference) < 1e-6
    assert relative(run(dequantized_model, expected), reference) < 1e-6
    loss = relative(reference, expected["dit.high_noise_model.t500"])
    print(f"{form}: the file's values are {loss:.1e} off the originals'")
    assert 1e-5 < loss < 0.05


@pytest.mark.parametrize("prefix", PREFIXES[1:])
@pytest.mark.parametrize("key_style", FP8)
def test_fp8_files_load_under_every_prefix(
    tmp_path: Path,
    high: dict[str, Tensor],
    expected: dict[str, Tensor],
    key_style: str,
    prefix: str,
) -> None:
    bare, prefixed = tmp_path / "bare", tmp_path / "prefixed"
    bare.mkdir()
    prefixed.mkdir()
    one = run(load(quantize_as(f"fp8 {key_style}", high, bare).path), expected)
    other = run(load(quantize_as(f"fp8 {key_style}", high, prefixed, prefix).path), expected)
    assert torch.equal(one, other)


@pytest.mark.parametrize("scale", ["row", "block"])
def test_scales_of_rows_and_blocks_are_applied(
    tmp_path: Path, high: dict[str, Tensor], scale: str
) -> None:
    """musubi-tuner's: a scale for each row, or for each block of 64 in a row."""
    name = "blocks.1.ffn.0.weight"
    weights = {n: t for n, t in high.items() if n != name}
    values = high[name].float()
    grouped = values if scale == "row" else values.unflatten(1, (-1, 64))
    scales = grouped.abs().amax(-1, keepdim=True) / other_program_files.LARGEST
    packed = (grouped / scales).to(torch.float8_e4m3fn)
    weights[name] = packed.reshape(values.shape)
    weights["blocks.1.ffn.0.scale_weight"] = scales
    (layer,) = packed_layers(load(single(weights, tmp_path / "a.safetensors"))).values()
    assert torch.equal(layer.dequantized_weight(), (packed.float() * scales).reshape(values.shape))
    weights["blocks.1.ffn.0.scale_weight"] = torch.ones(3)
    with pytest.raises(CheckpointError, match=r"scale_weight: is \[3\] for a weight"):
        load(single(weights, tmp_path / "b.safetensors"))


def _random_rows(kind: GGMLQuantizationType) -> np.ndarray:
    """8 rows of 512 weights: quantized if gguf can, else bytes of which each is a valid weight."""
    random = np.random.default_rng(0)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        return gguf.quants.quantize(random.standard_normal((8, 512), np.float32), kind)
    except NotImplementedError:
        return random.integers(0, 256, (8, 512 // block * size), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "all others"])
def test_gguf_decoding_is_bit_exact_with_the_reference(kind: str) -> None:
    named = {"Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K"}
    kinds = (DECODERS | DECODERS_WITH_LEVELS).keys() - named if kind == "all others" else {kind}
    assert len(kinds) >= (7 if kind == "all others" else 1)
    for name in kinds:
        rows = _random_rows(GGMLQuantizationType[name])
        with np.errstate(all="ignore"):
            reference = gguf.quants.dequantize(rows, GGMLQuantizationType[name])
        ours = expanded(
            name, (torch.from_numpy(rows).view(torch.int8), None, levels_of(name))
        ).numpy()
        assert np.array_equal(ours, reference, equal_nan=True), name


def test_gguf_types_without_a_decoder_are_dequantized(
    tmp_path: Path, high: dict[str, Tensor]
) -> None:
    written = as_gguf(high, tmp_path / "a.gguf", GGMLQuantizationType.TQ2_0)
    model = WanModelLoader().load({"transformer": written.path}, components=("transformer",))
    assert model.transformer is not None and not packed_layers(model.transformer)
    (notice,) = model.notices
    assert "20 weights of type TQ2_0 were expanded" in notice
    name = "blocks.0.ffn.0.weight"
    ours = model.transformer.state_dict()[to_diffusers(name)]
    assert torch.equal(ours, written.values[name])


@pytest.mark.parametrize("key_style", ["old", "new"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_text_encoder_of_comfyui_loads(
    t2v: Path, tmp_path: Path, expected: dict[str, Tensor], key_style: str, dtype: torch.dtype
) -> None:
    """fp8_scaled, names of transformers, the tokenizer inside."""
    written = fp8(other_program_files.text_encoder(t2v), tmp_path / "umt5.safetensors", key_style)
    tensors = load_file(written.path)
    single({**tensors, "spiece_model": other_program_files.spiece(t2v)}, written.path)
    sources = {"path": t2v, "text_encoder": written.path, "tokenizer": written.path}
    loader = WanModelLoader()
    for given in (sources, {"text_encoder": written.path}):
        model = loader.load(given, "t2v-a14b", dtype, components=("text_encoder", "tokenizer"))
        assert model.tokenizer is not None and model.text_encoder is not None
        ids = model.tokenizer(PROMPTS[0]).input_ids
        assert ids == expected["text.input_ids"][0, : len(ids)].tolist()
    reference = loader.load(t2v, dtype=dtype, components=("text_encoder", "tokenizer"))
    assert reference.text_encoder is not None
    reference.text_encoder.load_state_dict(written.values, strict=False)
    layers = packed_layers(model.text_encoder)
    # float16 overflows in wo, which transformers keeps in float32 for it.
    assert len(layers) == (12 if dtype == torch.float16 else 14)
    out = model.encode_text(PROMPTS)
    assert out.dtype == dtype
    assert relative(out, reference.encode_text(PROMPTS)) < 1e-6
    if dtype == torch.float32:
        assert 1e-5 < relative(model.encode_prompt(PROMPTS[0]), expected["text.embedding.0"]) < 0.1
    embedding: Any = model.text_encoder
    assert embedding.encoder.embed_tokens.weight is embedding.shared.weight


def test_a_tokenizer_loads_from_the_sentencepiece_model(t2v: Path, tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes((t2v / "google/umt5-xxl/spiece.model").read_bytes())
    loader = WanModelLoader()
    theirs = loader.load(t2v, components=("tokenizer",)).tokenizer
    for place in (tmp_path, tmp_path / "spiece.model"):
        sources = {"path": t2v, "tokenizer": place}
        ours = loader.load(sources, components=("tokenizer",)).tokenizer
        assert ours is not None and theirs is not None
        for text in (
            *PROMPTS,
            "",
            "\uff21 \uff46\uff55\uff4c\uff4c  width",
            "日本 €5 — naïve",
            "x\u200by",
            "a" * 900,
        ):
            assert ours(text).input_ids == theirs(text).input_ids
            long = {"max_length": 512, "truncation": True, "return_attention_mask": True}
            assert ours(text, **long).input_ids == theirs(text, **long).input_ids
    without = single({"shared.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"no usable tokenizer .*set model\.tokenizer"):
        loader.load({"path": t2v, "tokenizer": without}, components=("tokenizer",))
    bare = single(other_program_files.text_encoder(t2v), tmp_path / "umt5.safetensors")
    with pytest.raises(CheckpointError, match=r"contains no tokenizer; set model\.tokenizer"):
        loader.load({"text_encoder": bare}, "t2v-a14b", components=("text_encoder", "tokenizer"))


# ----------------------------------------------------------------------------------- packed at work

SPEC = lora_config(rank=4, alpha=4, dropout=0, modules=["attn1", "ffn"], layers=(0, 1))


def _gradients(
    model: WanTransformer3DModel, expected: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    attach_adapter(model, SPEC, 0, "high")
    for number, parameter in enumerate(adapter_parameters(model).values()):
        generator = torch.Generator().manual_seed(number)
        parameter.data.normal_(std=0.05, generator=generator)
    model.train()
    out = predict_velocity(
        model,
        expected["dit.latent"],
        torch.tensor([0.5]),
        pad_text([expected["text.embedding.0"]]),
        dtype=dtype,
    )
    out.square().mean().backward()
    gradients = {n: p.grad for n, p in adapter_parameters(model).items()}
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())
    return {n: g for n, g in gradients.items() if g is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["fp8 old", "gguf"])
def test_a_lora_trains_as_on_the_dequantized_model(
    tmp_path: Path,
    high: dict[str, Tensor],
    expected: dict[str, Tensor],
    form: str,
    dtype: torch.dtype,
    checkpointing: bool,
) -> None:
    file = quantize_as(form, high, tmp_path).path
    kept, dequantized_model = (
        load(file, dtype=dtype),
        load(file, dtype=dtype, weights="bf16"),
    )
    if checkpointing:
        kept.enable_gradient_checkpointing()
    ours, theirs = _gradients(kept, expected, dtype), _gradients(dequantized_model, expected, dtype)
    assert ours.keys() == theirs.keys() and len(packed_layers(kept)) == 20
    for name, gradient in theirs.items():
        assert ours[name].dtype == torch.float32
        assert relative(ours[name], gradient) < 1e-6, name
    assert adapter_weights(kept).keys() == adapter_weights(dequantized_model).keys()


def test_autograd_saves_only_the_packed_weight(
    tmp_path: Path, high: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    model = load(quantize_as("fp8 new", high, tmp_path).path)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _gradients(model, expected, torch.float32)
    weights = {layer.weight.data_ptr() for layer in packed_layers(model).values()}
    shapes = {(layer.out_features, layer.in_features) for layer in packed_layers(model).values()}
    assert len(weights & {t.data_ptr() for t in kept}) > 10  # of 20: where gradients pass
    big = [t for t in kept if t.is_floating_point() and tuple(t.shape) in shapes]
    own = {p.data_ptr() for p in model.parameters()}
    assert not [t.shape for t in big if t.data_ptr() not in own]


def test_a_quantized_layer_moves_and_saves_like_any_layer(
    tmp_path: Path, high: dict[str, Tensor]
) -> None:
    """Bias gradients, autocast, a round trip of the state; a cast does not round the scales."""
    file = quantize_as("fp8 old", high, tmp_path).path
    layer = packed_layers(load(file))["blocks.0.ffn.net.0.proj"]
    plain = nn.Linear(256, 512)
    plain.load_state_dict({"weight": layer.dequantized_weight(), "bias": layer.bias})
    layer.bias.requires_grad_(True)
    x, y = torch.randn(2, 3, 256, requires_grad=True), torch.randn(2, 3, 256)
    y = y.copy_(x.detach()).requires_grad_(True)
    layer(x).square().sum().backward()
    plain(y).square().sum().backward()
    assert relative(x.grad, y.grad) < 1e-6 and relative(layer.bias.grad, plain.bias.grad) < 1e-6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), plain(y)) and layer(x).dtype == torch.bfloat16

    other = packed_layers(load(file))["blocks.0.ffn.net.0.proj"]
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x)) and layer.state_dict()["weight"].dtype == torch.int8
    assert torch.equal(other.to(torch.bfloat16).dequantized_weight(), layer.dequantized_weight())
    assert other.bias.dtype == torch.bfloat16 and other.to("meta").weight.is_meta


def test_writing_to_a_loaded_model_does_not_change_the_file(
    tmp_path: Path, high: dict[str, Tensor]
) -> None:
    """Weights stay mapped from the file where that is possible; a full fine-tune writes to them."""
    files = [
        single(high, tmp_path / "a.safetensors", dtype=torch.float32),
        as_gguf(high, tmp_path / "b.gguf").path,
        fp8(high, tmp_path / "c.safetensors", "old").path,
    ]
    torch.save({n: t.float() for n, t in high.items()}, tmp_path / "d.pth")
    for file in (*files, tmp_path / "d.pth"):
        before = file.read_bytes()
        model = load(file)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        assert file.read_bytes() == before, file
        again = load(file)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, again.state_dict()[name] + 1), (file, name)


def test_weights_stay_in_one_mapping_of_the_file(tmp_path: Path, high: dict[str, Tensor]) -> None:
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("needs /proc")
    for file in (
        single(high, tmp_path / "mapped.safetensors", dtype=torch.float32),
        as_gguf(high, tmp_path / "mapped.gguf").path,
    ):
        model = load(file)
        lines = [line for line in maps.read_text().splitlines() if line.endswith(str(file))]
        assert len(lines) == 1, lines  # a thousand would each be as long as the file
        del model


# ------------------------------------------------------------------------------- which path is what


def test_adapters_that_change_base_weights_need_them_dequantized(
    tmp_path: Path, high: dict[str, Tensor]
) -> None:
    file = quantize_as("fp8 old", high, tmp_path).path
    factors = {name: torch.full((16, 16), 0.1) for name in ("lokr_w1", "lokr_w2")}
    lokr = {"blocks.0.attn1.to_q": ModuleAdapter(kind="lokr", tensors=factors)}
    with pytest.raises(
        CheckpointError, match=r"are packed in memory here; .*memory\.weights: bf16"
    ):
        apply_lora(load(file), lokr, "a.safetensors")
    model = load(file, weights="bf16")
    before = model.blocks[0].attn1.to_q.weight.clone()
    apply_lora(model, lokr, "a.safetensors")
    torch.testing.assert_close(model.blocks[0].attn1.to_q.weight.data, before.data + 0.01)


def test_components_load_from_different_places(
    t2v: Path, tmp_path: Path, high: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    """One expert in fp8, the other in GGUF, the VAE from a folder, the rest official."""
    low = shards(t2v / "low_noise_model")
    official = WanModelLoader().load(t2v)
    for name in ("vae", "text_encoder"):
        getattr(official, name).save_pretrained(tmp_path / name)
    given = {
        "path": t2v,
        "transformer": fp8(high, tmp_path / "wan_high_noise.safetensors", "new").path,
        "transformer_2": as_gguf(low, tmp_path / "Wan2.2-LowNoise-Q8_0.gguf").path,
        "vae": tmp_path / "vae",
    }
    model = WanModelLoader().load(given)
    assert model.variant.name == "t2v-a14b" and not model.notices and model.source == str(t2v)
    assert model.transformer is not None and model.transformer_2 is not None
    assert (
        1e-5
        < relative(run(model.transformer_2, expected), expected["dit.low_noise_model.t500"])
        < 0.02
    )
    assert len(packed_layers(model.transformer)) == len(packed_layers(model.transformer_2)) == 20
    assert torch.equal(model.encode_text(PROMPTS), official.encode_text(PROMPTS))
    # A component out of a whole model; without a path for the rest.
    parts = {"transformer": t2v, "transformer_2": t2v, "vae": tmp_path, "text_encoder": t2v}
    model = WanModelLoader().load(parts)
    assert model.transformer_2 is not None and model.vae is not None
    out = run(model.transformer_2, expected)
    assert relative(out, expected["dit.low_noise_model.t500"]) < 2e-6


def test_a_folder_of_single_files_is_a_model(
    t2v: Path, tmp_path: Path, high: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    """As ComfyUI's users have them; what each is follows from its content, but for high and low."""
    folder = tmp_path / "files"
    folder.mkdir()
    single(high, folder / "b_HighNoise.safetensors")
    as_gguf(shards(t2v / "low_noise_model"), folder / "a_LowNoise_Q8_0.gguf")
    single(torch.load(t2v / "Wan2.1_VAE.pth", weights_only=True), folder / "c.safetensors")
    text = {
        **other_program_files.text_encoder(t2v),
        "spiece_model": other_program_files.spiece(t2v),
    }
    single(text, folder / "d.safetensors")
    model = WanModelLoader().load(folder)
    assert model.transformer is not None and len(packed_layers(model.transformer_2)) == 20
    assert relative(run(model.transformer, expected), expected["dit.high_noise_model.t500"]) < 2e-6
    official = WanModelLoader().load(
        t2v, components=["text_encoder", "tokenizer"], variant="t2v-a14b"
    )
    assert torch.equal(model.encode_text(PROMPTS), official.encode_text(PROMPTS))
    single(high, folder / "e_high_noise.safetensors")
    with pytest.raises(CheckpointError, match=r"two files of the transformer \(b_High.*, e_high"):
        WanModelLoader().load(folder)


def test_an_expert_is_detected_by_its_file_name(tmp_path: Path, high: dict[str, Tensor]) -> None:
    file = single(high, tmp_path / "wan2.2_t2v_low_noise_14B.safetensors")
    model = WanModelLoader().load(file)
    assert model.transformer is None and model.transformer_2 is not None
    (notice,) = model.notices
    assert "is used as model.transformer_2 (low noise) because of its name" in notice
    assert str(file) in notice
    nameless = single(high, tmp_path / "wan.safetensors")
    with pytest.raises(CheckpointError, match=r"give it as model\.transformer \(high noise\) or"):
        WanModelLoader().load(nameless)


def fake_hub(monkeypatch: pytest.MonkeyPatch, folder: Path, repositories: dict[str, Path]) -> None:
    """`repositories` as a hub: what is asked for is copied to a snapshot below `folder`."""

    def snapshot_download(name: str, allow_patterns: list[str], local_files_only: bool) -> str:
        if name not in repositories or local_files_only:
            raise LocalEntryNotFoundError("Cannot find it.\nCheck your connection.")
        snapshot = folder / name
        for path in sorted(p for p in repositories[name].rglob("*") if p.is_file()):
            inside = path.relative_to(repositories[name])
            if any(fnmatch(inside.as_posix(), pattern) for pattern in allow_patterns):
                (snapshot / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, snapshot / inside)
        return str(snapshot)

    monkeypatch.setattr("onewan.model.sources.snapshot_download", snapshot_download)


@pytest.mark.parametrize("variant", ["t2v-a14b", "ti2v-5b"])
def test_hub_repositories_download_only_what_is_needed(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: Any
) -> None:
    official = shared / "golden" / FOLDERS[variant]
    diffusers = tmp_path / "diffusers"
    complete = WanModelLoader().load(official)
    for name in ("transformer", "transformer_2", "vae", "text_encoder", "tokenizer"):
        if (part := getattr(complete, name)) is not None:
            part.save_pretrained(diffusers / name)
    hub = {
        "a/official": official,
        "a/diffusers": diffusers,
        "google/x": official / "google/umt5-xxl",
    }
    fake_hub(monkeypatch, tmp_path / "snapshots", hub)
    loader = WanModelLoader()
    for name in ("a/official", "a/diffusers"):
        model = loader.load(name, components=("vae", "tokenizer"))
        assert model.variant.name == variant and model.vae is not None
        fetched = {p.name for p in (tmp_path / "snapshots" / name).rglob("*.*") if p.is_file()}
        weights = {n for n in fetched if n.endswith(("safetensors", "pth"))}
        assert len(weights) == 1, weights  # no expert and no text encoder was downloaded
        with pytest.raises(CheckpointError, match=r"but i2v-a14b has 36|i2v-a14b needs 16"):
            loader.load(name, "i2v-a14b", components=("vae",))
        assert loader.load(name).transformer is not None
    given = {"path": official, "tokenizer": "google/x", "vae": "a/diffusers"}
    model = loader.load(given, components=("tokenizer", "vae"))
    assert model.tokenizer is not None and model.tokenizer("a dog").input_ids[-1] == 1
    # What is not needed is not fetched, and need not even be there.
    model = loader.load({**given, "transformer": "a/b"}, components=("vae",))
    assert model.variant.name == variant
    with pytest.raises(CheckpointError, match=r"a/b: is neither .*Cannot find it") as refusal:
        loader.load("a/b")
    assert "\n" not in str(refusal.value)


# ----------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="session")
def wrong(t2v: Path, high: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that nobody should load."""
    folder = tmp_path_factory.mktemp("wrong")
    clip = {**high, "blocks.0.cross_attn.k_img.weight": torch.ones(2, 2)}
    single(clip, folder / "clip.safetensors")
    single({"blocks.0.ffn.0.lora_A.weight": torch.ones(2, 2)}, folder / "lora.safetensors")
    less = {n: t for n, t in high.items() if n != "head.head.bias"}
    single(less, folder / "less.safetensors")
    single(shards(t2v.parent / "ti2v-5B"), folder / "one.safetensors")
    (folder / "half.safetensors").write_bytes((folder / "clip.safetensors").read_bytes()[:100_000])
    (folder / "empty.safetensors").touch()
    shutil.copytree(t2v, folder / "no_vae", ignore=shutil.ignore_patterns("*VAE.pth"))
    return folder


@pytest.mark.parametrize(
    ("given", "expected_message"),
    [
        (
            "transformer=i2v",
            "{i2v}/high_noise_model: is a transformer of i2v-a14b (36 input channels), but "
            "t2v-a14b has 16; use one of t2v-a14b, or set model.variant to i2v-a14b",
        ),
        ("transformer=i2v transformer_2=i2v", "to i2v-a14b\n  {i2v}/low_noise_model: is a"),
        ("transformer_2=i2v", "{i2v}/low_noise_model: is a transformer of i2v-a14b"),
        ("vae=ti2v", "{ti2v}/Wan2.2_VAE.pth: is a VAE with 48 latent channels, but t2v-a14b needs"),
        ("path=ti2v vae=t2v", "{t2v}/Wan2.1_VAE.pth: is a VAE with 16 latent channels, but ti2v"),
        ("path=ti2v transformer_2=less", "{less}: is a transformer of t2v-a14b"),
        ("path=ti2v transformer_2=one", "{one}: is used as transformer_2 (low noise), "),
        ("transformer=clip", "{clip}: is a Wan 2.1 image-to-video transformer, which has a CLIP"),
        ("transformer=empty", "{empty}: is empty (0 bytes)"),
        ("transformer=half", "{half}: is not a complete safetensors file"),
        ("transformer=lora", "{lora}: is an adapter"),
        (
            "transformer=less",
            "{less}: is not a complete transformer of Wan 2.2; 1 missing keys (pro",
        ),
        ("vae=high", "{t2v}/high_noise_model: is used as vae, but holds a transformer"),
        (
            "text_encoder=vae",
            "{t2v}/Wan2.1_VAE.pth: is used as text_encoder, but holds a v",
        ),
        (
            "transformer=low",
            "{t2v}/low_noise_model: is used as transformer (high noise), but is named as the "
            "low-noise expert; swap the two, or set model.check_file_names to false if the ",
        ),
        ("transformer=low transformer_2=high", "is wrong\n  {t2v}/low_noise_model: is used as"),
        ("colour=high", "model: has no colour; known are path, transformer, transformer_2, vae"),
        ("vae=gone", "{gone}: there is no such file or folder"),
        ("path=google", "{t2v}/google: holds no weights"),
        ("vae=no_vae", "{no_vae}: is used as model.vae, but contains only"),
        ("transformer=empty vae=half", "(0 bytes); copy or download it again\n  {half}: is not"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    t2v: Path, wrong: Path, given: str, expected_message: str
) -> None:
    golden = t2v.parent
    places = {
        "t2v": t2v,
        "i2v": golden / "i2v-A14B",
        "ti2v": golden / "ti2v-5B",
        "high": t2v / "high_noise_model",
        "low": t2v / "low_noise_model",
        "vae": t2v / "Wan2.1_VAE.pth",
        "google": t2v / "google",
        "gone": wrong / "gone.safetensors",
        "no_vae": wrong / "no_vae",
    }
    places |= {
        n: wrong / f"{n}.safetensors" for n in ("clip", "empty", "half", "lora", "less", "one")
    }
    source = {k: places[v] for k, v in (part.split("=") for part in given.split())}
    variant: Any = None
    if "path" not in source:
        source["path"], variant = t2v, "t2v-a14b"
    with pytest.raises(CheckpointError) as refusal:
        WanModelLoader().load(source, variant)
    # One line per problem, below a heading if there are several.
    message = str(refusal.value)
    assert message.startswith(f"{message.count(chr(10))} problems\n") or "\n" not in message
    assert expected_message.format(**places) in message


def test_missing_and_swapped_experts_are_refused(t2v: Path, tmp_path: Path) -> None:
    loader = WanModelLoader()
    high, low = t2v / "high_noise_model", t2v / "low_noise_model"
    both = ("transformer", "transformer_2", "vae")
    with pytest.raises(CheckpointError) as refusal:
        loader.load({"transformer": high}, "t2v-a14b", components=both)
    message = str(refusal.value)
    assert "has no transformer_2, vae; give a path for model.transformer_2 (low noise)" in message
    assert "two experts" in message and "\n" not in message
    # An official folder without its second expert: half a download, or Wan 2.1.
    half = tmp_path / "half"
    shutil.copytree(t2v, half, ignore=shutil.ignore_patterns("low_noise_model"))
    with pytest.raises(CheckpointError, match=r"has no transformer_2.*Wan 2\.1"):
        loader.load(half)
    assert loader.load(half, components=("transformer", "vae")).transformer is not None
    # Names can be overruled.
    swapped = {"transformer": low, "transformer_2": high}
    assert loader.load(swapped, check_file_names=False).transformer is not None
    same = {"transformer": high, "transformer_2": high}
    with pytest.raises(CheckpointError, match=r"is named as the high-noise"):
        loader.load(same)


def test_a_text_encoder_of_another_width_is_refused(t2v: Path, tmp_path: Path) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=200, d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=1,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    UMT5EncoderModel(config).save_pretrained(tmp_path / "text")
    with pytest.raises(CheckpointError, match=r"text encoder of width 32.*text of width 64"):
        WanModelLoader().load({"path": t2v, "text_encoder": tmp_path / "text"})


def test_the_t5_key_map_is_the_one_written_out_for_tests(t2v: Path) -> None:
    official = open_component(t2v / "models_t5_umt5-xxl-enc-bf16.pth")
    renamed = other_program_files.text_encoder(t2v)
    assert official.entries.keys() == renamed.keys()
    for name in torch.load(t2v / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True):
        assert t5_to_transformers(name) in renamed
    assert isinstance(WanModelLoader().load(t2v, components=("vae",)), WanModel)
