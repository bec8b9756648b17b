"""Incomplete and mixed models are refused with the reason; loaded weights have diffusers' types."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from onewan.demo.tiny_model import write_tiny_model
from onewan.errors import CheckpointError
from onewan.formats.key_maps import to_diffusers, to_official
from onewan.model.load import WanModelLoader
from onewan.model.sources import fingerprint


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), "t2v-a14b", width=32, layers=2)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(original, tmp_path / "model")


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


def test_float32_islands_stay_float32_when_loading_in_bfloat16(original: Path) -> None:
    model = WanModelLoader().load(original, dtype=torch.bfloat16)
    assert model.transformer is not None and model.vae is not None
    assert model.text_encoder is not None
    dtypes = {name: p.dtype for name, p in model.transformer.named_parameters()}
    float32 = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert {"scale_shift_table", "blocks.0.scale_shift_table", "blocks.1.norm2.weight"} <= float32
    assert "condition_embedder.time_embedder.linear_1.weight" in float32
    assert dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert model.transformer.rope.freqs_cos.dtype == torch.float32
    patches = model.transformer.patch_embedding(torch.zeros(1, 16, 1, 2, 2, dtype=torch.bfloat16))
    assert patches.dtype == torch.float32  # the residual stream, see onewan.model.precision
    assert model.vae.dtype == torch.float32 and model.text_encoder.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.transformer.parameters())


def test_only_the_requested_components_are_loaded(original: Path) -> None:
    model = WanModelLoader().load(original, components=("vae", "scheduler"))
    assert model.vae is not None and model.transformer is None and model.text_encoder is None
    assert model.noise_scheduler is not None
    assert model.noise_scheduler.config["flow_shift"] == 12.0  # not the hub's 3.0
    with pytest.raises(CheckpointError, match="the high expert was not loaded"):
        model.expert(model.variant.experts[0])
    with pytest.raises(CheckpointError, match="text encoder was not loaded"):
        model.encode_text(["x"])


def damage(what: str, folder: Path) -> str:
    """Damage the model; returns what the error message must contain."""
    weights = folder / "transformer_2" / "diffusion_pytorch_model.safetensors"
    if what == "missing expert":
        shutil.rmtree(folder / "transformer_2")
        return "has no transformer_2"
    if what == "missing weight":
        tensors = load_file(weights)
        tensors.pop("blocks.1.ffn.net.2.bias")
        save_file({k: v.clone() for k, v in tensors.items()}, weights, metadata={"format": "pt"})
        return "1 missing keys (blocks.1.ffn.net.2.bias)"
    if what == "unexpected weight":
        tensors = {k: v.clone() for k, v in load_file(weights).items()}
        save_file({**tensors, "more": torch.ones(2)}, weights, metadata={"format": "pt"})
        return "1 unexpected keys (more)"
    if what == "truncated":
        content = weights.read_bytes()
        weights.unlink()
        weights.write_bytes(content[: len(content) // 2])
        return "is not a complete safetensors file"
    if what == "clip branch":
        edit_json(folder / "transformer" / "config.json", image_dim=1280)
        return "Wan 2.1 image-to-video"
    if what == "other channels":
        edit_json(folder / "transformer" / "config.json", in_channels=33)
        return "in_channels is 33, but Wan 2.2 has 16 (t2v-a14b), 36 (i2v-a14b), "
    if what == "mixed experts":
        edit_json(folder / "transformer_2" / "config.json", in_channels=36)
        return "transformer_2: is a transformer of i2v-a14b (36 input channels)"
    if what == "other vae":
        edit_json(folder / "vae" / "config.json", z_dim=48)
        return f"{folder / 'vae'}: is a VAE with 48 latent channels, but t2v-a14b needs 16"
    if what == "other text encoder":
        edit_json(folder / "text_encoder" / "config.json", d_model=99)
        return (
            f"{folder / 'text_encoder'}: is a text encoder of width 99, but "
            f"{folder / 'transformer'} takes text of width 64; use components of one model"
        )
    if what == "other boundary":
        edit_json(folder / "model_index.json", boundary_ratio=0.9)
        return "boundary_ratio is 0.9"
    if what == "no json":
        (folder / "transformer" / "config.json").write_text("{", encoding="utf-8")
        return "not readable JSON"
    assert what == "no tokenizer"
    shutil.rmtree(folder / "tokenizer")
    return "contains no tokenizer; set model.tokenizer"


@pytest.mark.parametrize(
    "what",
    [
        "missing expert",
        "missing weight",
        "unexpected weight",
        "truncated",
        "clip branch",
        "other channels",
        "mixed experts",
        "other vae",
        "other text encoder",
        "other boundary",
        "no json",
        "no tokenizer",
    ],
)
def test_a_damaged_or_mixed_model_is_refused(folder: Path, what: str) -> None:
    expected = damage(what, folder)
    with pytest.raises(CheckpointError) as refusal:
        WanModelLoader().load(folder)
    error = refusal.value
    problems = error.details or [error.message]
    assert any(expected in problem for problem in problems)
    assert all(str(folder) in problem for problem in problems)


def test_a_wrong_variant_or_path_is_refused(original: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"transformer of t2v-a14b .* one of ti2v-5b.*set"):
        WanModelLoader().load(original, variant="ti2v-5b")
    with pytest.raises(CheckpointError, match="holds no weights"):
        WanModelLoader().load(tmp_path)
    with pytest.raises(CheckpointError, match="is not an index of shards"):
        WanModelLoader().load(original / "model_index.json")
    with pytest.raises(CheckpointError, match="there is no such file or folder"):
        WanModelLoader().load(tmp_path / "gone")


def test_the_fingerprint_changes_with_the_content_and_not_with_the_file_name(folder: Path) -> None:
    before = fingerprint(folder / "vae")
    assert fingerprint(folder / "vae") == before
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert fingerprint(folder / "vae") != before
    # That of a single file does not depend on its name.
    of_file = fingerprint(weights)
    assert of_file != fingerprint(folder / "vae")
    assert fingerprint(weights.rename(weights.with_name("renamed.safetensors"))) == of_file


def test_the_variant_is_inferred_from_the_encoders_where_they_differ(original: Path) -> None:
    loader = WanModelLoader()
    sources = {"vae": original / "vae"}
    assert loader.load(sources, "i2v-a14b").variant.name == "i2v-a14b"
    with pytest.raises(CheckpointError, match=r"name the variant \(t2v-a14b, i2v-a14b"):
        loader.load(sources)  # two variants share this VAE
    with pytest.raises(CheckpointError, match="16 latent channels, but ti2v-5b needs 48"):
        loader.load(sources, "ti2v-5b")


def test_weights_that_overflow_in_float16_stay_float32(original: Path) -> None:
    model = WanModelLoader().load(original, dtype=torch.float16, components=("text_encoder",))
    assert model.text_encoder is not None
    wide = {n for n, p in model.text_encoder.named_parameters() if p.dtype == torch.float32}
    assert wide and all(name.endswith("wo.weight") for name in wide)
    theirs = type(model.text_encoder).from_pretrained(
        original / "text_encoder", dtype=torch.float16
    )
    assert {n: p.dtype for n, p in theirs.named_parameters()} == {
        n: p.dtype for n, p in model.text_encoder.named_parameters()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_and_dtypes_are_those_of_diffusers(original: Path, dtype: torch.dtype) -> None:
    ours = WanModelLoader().load(original, dtype=dtype, components=("transformer",)).transformer
    assert ours is not None
    theirs = type(ours).from_pretrained(original / "transformer", torch_dtype=dtype)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert tensor.dtype == ours.state_dict()[name].dtype, name
        assert torch.equal(tensor, ours.state_dict()[name]), name
    assert not ours.training and ours.config["num_layers"] == 2


def test_key_maps_are_one_to_one(original: Path) -> None:
    names = load_file(original / "transformer" / "diffusion_pytorch_model.safetensors").keys()
    official = {name: to_official(name) for name in names}
    assert len(set(official.values())) == len(names) > 50
    assert all(to_diffusers(theirs) == ours for ours, theirs in official.items())
    assert official["blocks.1.norm2.weight"] == "blocks.1.norm3.weight"
    assert to_official("blocks.3.attn1.to_out.0") == "blocks.3.self_attn.o"
    for unknown in ("blocks.0.attn3.to_q", "blocks.0.norm1.weight", "more", "blocks.0.attn1.to_qq"):
        with pytest.raises(KeyError):
            to_official(unknown)
