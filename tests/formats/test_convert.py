"""Full weights into every layout and back: the same bits, complete, readable by who should read it.

Official checkpoints (the golden ones) go round; diffusers, transformers and PyTorch themselves are
the references for what they load.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import get_args

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.interrupted import locking, replace_and_die
from transformers import UMT5EncoderModel

from onewan import files
from onewan.checkpoint import atomic_write as publishing
from onewan.checkpoint.convert import convert_model
from onewan.checkpoint.model_files import read_model
from onewan.checkpoint.saver import WanModelSaver
from onewan.checkpoint.target_formats import LORA_FORMATS, MODEL_FORMATS, ModelFormat
from onewan.errors import CheckpointError, OnewanError
from onewan.formats.container import open_tensors
from onewan.formats.lora import LoraFormat
from onewan.formats.weights import open_component
from onewan.formats.write import LazyTensor, bytes_of
from onewan.formats.write_pth import write_pth
from onewan.model.load import WanModelLoader
from onewan.model.meta_init import module_on_meta
from onewan.variants import VARIANTS

GOLDEN = {"t2v-a14b": "t2v-A14B", "i2v-a14b": "i2v-A14B", "ti2v-5b": "ti2v-5B"}
BLOCK_LINEAR = r"blocks\.\d+\.(self_attn|cross_attn)\.[qkvo]\.weight|blocks\.\d+\.ffn\.[02]\.weight"


@pytest.fixture(scope="module", params=list(GOLDEN))
def variant(request):
    return VARIANTS[request.param]


@pytest.fixture(scope="module")
def official(variant, shared):
    return shared / "golden" / GOLDEN[variant.name]


@pytest.fixture(scope="module")
def rounds(official, tmp_path_factory):
    """The official model as diffusers, of that single files, and of those official again."""
    folder = tmp_path_factory.mktemp("rounds")
    source = official
    for to in ("diffusers", "single", "official"):
        convert_model(source, folder / to, to)
        source = folder / to
    return folder


@pytest.fixture
def high(t2v, tmp_path):
    """An expert as a single file."""
    convert_model(t2v / "high_noise_model", tmp_path / "high.safetensors", "single")
    return tmp_path / "high.safetensors"


def tensors(path: Path) -> dict[str, torch.Tensor]:
    file = open_tensors(path)
    return {name: file.read(name).clone() for name in file.tensors}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)


def files_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def refuses(match: str, *arguments, **options) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        convert_model(*arguments, **options)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------- round trips


def test_a_round_trip_through_all_layouts_is_bit_exact(rounds, official, variant):
    places = ["high_noise_model", "low_noise_model", "Wan2.1_VAE.pth"]
    if len(variant.experts) == 1:
        places = [".", "Wan2.2_VAE.pth"]
    for place in [*places, "models_t5_umt5-xxl-enc-bf16.pth"]:
        assert_same(tensors(rounds / "official" / place), tensors(official / place))
    for place in places[:-1]:
        config = json.loads((rounds / "official" / place / "config.json").read_text())
        want = json.loads((official / place / "config.json").read_text())
        config.pop("_diffusers_version"), want.pop("_diffusers_version")
        # The tiny model's text is not 4096 wide, so the config must state the width.
        assert config.pop("text_dim") == 64
        assert config == want
    for file in (official / "google" / "umt5-xxl").iterdir():
        assert (rounds / "official/google/umt5-xxl" / file.name).read_bytes() == file.read_bytes()


def test_files_have_the_paths_where_programs_look_for_them(rounds, variant):
    one = len(variant.experts) == 1
    kind = variant.name.partition("-")[0]
    tokenizer = ["spiece.model", "tokenizer.json", "tokenizer_config.json"]
    single = [*(f"tokenizer/{name}" for name in tokenizer), "umt5_xxl_fp32.safetensors"]
    if one:
        single += ["wan2.2_ti2v_5B_bf16.safetensors", "wan2.2_vae.safetensors"]
    else:
        single += [f"wan2.2_{kind}_{e}_noise_14B_bf16.safetensors" for e in ("high", "low")]
        single += ["wan_2.1_vae.safetensors"]
    assert files_in(rounds / "single") == sorted(single)
    stem = "diffusion_pytorch_model"
    shards = ["config.json", f"{stem}-00001-of-00001.safetensors", f"{stem}.safetensors.index.json"]
    folders = [""] if one else ["high_noise_model/", "low_noise_model/"]
    assert files_in(rounds / "official") == sorted(
        [
            *(folder + name for folder in folders for name in shards),
            *(f"google/umt5-xxl/{name}" for name in tokenizer),
            "Wan2.2_VAE.pth" if one else "Wan2.1_VAE.pth",
            "models_t5_umt5-xxl-enc-bf16.pth",
        ]
    )
    assert not list(rounds.glob(".*"))


def test_every_layout_reads_back_as_the_same_model(rounds, official):
    want = read_model(official)
    for layout in ("diffusers", "single", "official"):
        got = read_model(rounds / layout)
        assert got.components.keys() == want.components.keys()
        for component_name, component in want.components.items():
            assert got.components[component_name].config == component.config
            assert got.components[component_name].expert == component.expert
            assert_same(
                {n: w.read() for n, w in got.components[component_name].weights.items()},
                {n: w.read() for n, w in component.weights.items()},
            )


@torch.no_grad()
def test_diffusers_computes_the_official_outputs_with_the_result(
    rounds, official, variant, tmp_path
):
    folder = tmp_path / "float32"
    convert_model(rounds / "single", folder, "diffusers", dtype=torch.float32)
    image = variant.needs_image
    pipeline = (WanImageToVideoPipeline if image else WanPipeline).from_pretrained(folder)
    assert pipeline.config.boundary_ratio == variant.boundary
    assert pipeline.config.expand_timesteps == variant.has_clean_first_frame
    assert pipeline.scheduler.config.flow_shift == variant.flow_shift
    assert pipeline.scheduler.config.use_flow_sigmas
    expected = load_file(official / "expected.safetensors")
    text = torch.zeros(1, 512, expected["text.embedding.0"].shape[-1])
    text[0, : len(expected["text.embedding.0"])] = expected["text.embedding.0"]
    latent = expected["dit.latent"]
    if image:
        latent = torch.cat([latent, expected["dit.condition"]], dim=1)
    theirs = {"high": "high_noise_model", "low": "low_noise_model", "single": "transformer"}
    for expert in variant.experts:
        transformer = getattr(pipeline, expert.component)
        out = transformer(latent, torch.tensor([500.0]), text, return_dict=False)[0]
        golden = expected[f"dit.{theirs[expert.name]}.t500"]
        assert (out - golden).norm() < 2e-6 * golden.norm()
    ids = pipeline.tokenizer("a small dog runs on the beach").input_ids
    assert ids == expected["text.input_ids"][0, : len(ids)].tolist()
    out = pipeline.text_encoder(torch.tensor([ids]))[0][0]
    assert (out - expected["text.embedding.0"]).norm() < 2e-6 * out.norm()
    mean = pipeline.vae.encode(expected["vae.pixels"]).latent_dist.mode()
    assert (mean - expected["vae.mean_unscaled"]).norm() < 1e-5 * mean.norm()


def test_headers_of_single_files_describe_their_component(rounds, variant):
    for path in (rounds / "single").glob("*.safetensors"):
        weights = open_component(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        assert metadata["modelspec.architecture"] == "WAN-2.2"
        assert len(metadata["modelspec.hash_sha256"]) == 66
        assert metadata["onewan.component"] == weights.kind
        assert "/" not in metadata["onewan.source"]
        if weights.kind != "transformer":
            continue
        assert metadata["onewan.variant"] == variant.name
        name = "high" if "high" in path.name else "low" if "low" in path.name else "single"
        assert metadata["onewan.expert"] == name
        assert weights.prefix == "" and weights.key_format == "official"
    encoder = load_file(rounds / "single" / "umt5_xxl_fp32.safetensors")
    spiece = (rounds / "official/google/umt5-xxl/spiece.model").read_bytes()
    assert encoder["spiece_model"].numpy().tobytes() == spiece
    assert "shared.weight" in encoder


def test_large_components_are_divided_into_shards(high, tmp_path):
    convert_model(high, tmp_path / "d", "diffusers", shard_bytes=1_000_000)
    shards = sorted((tmp_path / "d").glob("*.safetensors"))
    assert [p.name[-20:] for p in shards] == [
        f"{n:05}-of-{len(shards):05}.safetensors"[-20:] for n in range(1, len(shards) + 1)
    ]
    assert len(shards) > 3
    sizes = [sum(t.nbytes for t in load_file(shard).values()) for shard in shards]
    assert max(sizes) <= 1_000_000
    index = json.loads((tmp_path / "d/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "d").state_dict()
    plain = {name: open_component(high).read(name) for name in open_component(high).entries}
    assert_same(
        {n: t for n, t in loaded.items() if n in plain}, {n: t.float() for n, t in plain.items()}
    )


@pytest.mark.parametrize("to", ["diffusers", "single", "official"])
def test_a_text_encoder_is_converted_by_itself(t2v, tmp_path, to):
    source = t2v / "models_t5_umt5-xxl-enc-bf16.pth"
    target = {"diffusers": "t", "single": "t.safetensors", "official": "t.pth"}[to]
    written = convert_model(source, tmp_path / target, to)
    want = open_component(source)
    got = open_component(tmp_path / target)
    assert_same({n: got.read(n) for n in got.entries}, {n: want.read(n) for n in want.entries})
    assert any("spiece.model" in notice for notice in written.notices) == (to == "single")
    if to == "diffusers":
        assert UMT5EncoderModel.from_pretrained(tmp_path / target).dtype == torch.float32
        convert_model(source, tmp_path / "half", to, dtype=torch.bfloat16)
        assert UMT5EncoderModel.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    if to == "official":
        assert_same(torch.load(tmp_path / target, weights_only=True), tensors(source))


# -------------------------------------------------------------------------------- types, quantizing


def bound_of_fp8(weight: torch.Tensor) -> torch.Tensor:
    """How far float8_e4m3fn with one scale may be off: half a unit in the last of 4 significant
    bits, 2^-4 of the value, and half the smallest subnormal, 2^-10, times the scale."""
    scale = weight.abs().max() / 448
    return torch.maximum(weight.abs() * 2**-4, scale * 2**-10) * (1 + 1e-6)


@pytest.mark.parametrize("place", ["high_noise_model", "models_t5_umt5-xxl-enc-bf16.pth"])
def test_fp8_scaled_rounds_to_nearest_and_has_the_keys_that_comfyui_reads(t2v, tmp_path, place):
    source, path = open_component(t2v / place), tmp_path / "f.safetensors"
    convert_model(t2v / place, path, "fp8_scaled")
    file = load_file(path)
    assert file["scaled_fp8"].shape == (0,) and file["scaled_fp8"].dtype == torch.float8_e4m3fn
    weights = open_component(path)
    module_on_meta(weights)
    quantized = [n for n, entry in weights.entries.items() if entry.packing == "fp8"]
    assert len(quantized) == (20 if source.kind == "transformer" else 14)
    for name, entry in weights.entries.items():
        want, got = source.read(name).float(), weights.read(name).float()
        if name not in quantized:
            assert file[entry.key].dtype == torch.bfloat16
            assert torch.equal(got, want.bfloat16().float())
            continue
        assert entry.scale == entry.key.removesuffix(".weight") + ".scale_weight"
        scale = file[entry.scale]
        assert scale.dtype == torch.float32 and scale.shape == ()
        assert scale == want.abs().max() / 448
        assert ((got - want).abs() <= bound_of_fp8(want)).all()
        assert (got - want).norm() / want.norm() > 0.01  # it is 8 bits, not something better


def test_fp8_keeps_its_bits_and_gets_the_older_keys(high, tmp_path):
    convert_model(high, tmp_path / "f.safetensors", "fp8_scaled")
    old = load_file(tmp_path / "f.safetensors")
    new = {}
    for name, tensor in old.items():
        if name.endswith(".scale_weight"):
            module = name.removesuffix(".scale_weight")
            # Weights that do not reach 448, so that this is not the scale that we would choose.
            packed = (old[f"{module}.weight"].float() * 0.6).to(torch.float8_e4m3fn)
            old[f"{module}.weight"] = new[f"{module}.weight"] = packed
            new[f"{module}.weight_scale"] = tensor
            text = json.dumps({"format": "float8_e4m3fn"}).encode()
            new[f"{module}.comfy_quant"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        elif name != "scaled_fp8":
            new.setdefault(name, tensor)
    save_file(new, tmp_path / "new.safetensors")
    convert_model(tmp_path / "new.safetensors", tmp_path / "again.safetensors", "fp8_scaled")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == old.keys()
    for name, tensor in old.items():
        assert same_bits(again[name], tensor), name


def test_quantized_weights_become_bfloat16_with_a_notice(high, tmp_path):
    convert_model(high, tmp_path / "f.safetensors", "fp8_scaled", dtype=torch.float16)
    packed = open_component(tmp_path / "f.safetensors")
    written = convert_model(tmp_path / "f.safetensors", tmp_path / "d", "diffusers")
    assert any("bfloat16" in notice for notice in written.notices)
    plain = open_component(tmp_path / "d")
    for name, entry in packed.entries.items():
        want = packed.read(name)
        want = want.to(torch.bfloat16) if entry.packing == "fp8" else want
        got = plain.read(name)
        assert got.dtype == want.dtype and torch.equal(got, want)
    assert plain.read("patch_embedding.weight").dtype == torch.float16
    convert_model(
        tmp_path / "f.safetensors", tmp_path / "x.safetensors", "single", dtype=torch.float32
    )
    exact = open_component(tmp_path / "x.safetensors")
    assert all(torch.equal(exact.read(n), packed.read(n).float()) for n in packed.entries)


def test_a_gguf_file_is_dequantized_into_a_single_file(high, tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "wan")
    want = {}
    for name, tensor in tensors(high).items():
        data = tensor.float().numpy()
        if name.endswith("ffn.0.weight"):
            packed = gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            numbers = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
            want[name] = torch.from_numpy(numbers).to(torch.bfloat16)
            continue
        if data.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(data.shape))
            data = data.reshape(data.shape[0], -1)
        writer.add_tensor(name, data)
        want[name] = tensor.float()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    convert_model(tmp_path / "m.gguf", tmp_path / "s.safetensors", "single")
    assert_same(load_file(tmp_path / "s.safetensors"), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_applies_to_all_weights_except_the_vae_of_a_whole_model(t2v, tmp_path, dtype):
    convert_model(t2v, tmp_path / "s", "single", dtype=dtype)
    short = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    path = tmp_path / "s" / f"wan2.2_t2v_low_noise_14B_{short}.safetensors"
    want = tensors(t2v / "low_noise_model")
    assert_same(load_file(path), {n: t.to(dtype) for n, t in want.items()})
    text = load_file(tmp_path / "s" / f"umt5_xxl_{short}.safetensors")
    assert {t.dtype for n, t in text.items() if n != "spiece_model"} == {dtype}
    assert_same(load_file(tmp_path / "s/wan_2.1_vae.safetensors"), tensors(t2v / "Wan2.1_VAE.pth"))
    convert_model(t2v / "Wan2.1_VAE.pth", tmp_path / "v.safetensors", "single", dtype=dtype)
    assert {t.dtype for t in load_file(tmp_path / "v.safetensors").values()} == {dtype}


def test_a_value_that_overflows_float16_is_refused_by_the_name_of_its_weight(high, tmp_path):
    file = load_file(high)
    file["blocks.1.ffn.2.weight"][3, 4] = 1e5
    save_file(file, tmp_path / "big.safetensors")
    refuses(
        r"blocks\.1\.ffn\.net\.2\.weight: .*9\.98e\+04.*float16.*bfloat16",
        *(tmp_path / "big.safetensors", tmp_path / "d", "diffusers"),
        dtype=torch.float16,
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.safetensors", "high.safetensors"]
    file["blocks.1.ffn.2.weight"][3, 4] = torch.nan
    save_file(file, tmp_path / "nan.safetensors")
    refuses(
        r"1 of \d+ weights hold values that are NaN .*ffn\.net\.2\.weight",
        tmp_path / "nan.safetensors",
        tmp_path / "f.safetensors",
        "fp8_scaled",
    )
    file["blocks.1.ffn.2.weight"].zero_()
    save_file(file, tmp_path / "zero.safetensors")
    convert_model(tmp_path / "zero.safetensors", tmp_path / "f.safetensors", "fp8_scaled")
    assert load_file(tmp_path / "f.safetensors")["blocks.1.ffn.2.scale_weight"] == 1
    assert not open_component(tmp_path / "f.safetensors").read("blocks.1.ffn.net.2.weight").any()


def test_settings_that_a_layout_cannot_store_are_reported(tiny_model, tmp_path):
    model = tiny_model("t2v-a14b")  # its VAE's latents have a mean of their own
    written = convert_model(model / "vae", tmp_path / "v.pth", "official")
    assert any("latents_mean, latents_std" in notice for notice in written.notices)
    written = convert_model(model / "vae", tmp_path / "v.safetensors", "single")
    assert written.notices == ()
    assert (
        open_component(tmp_path / "v.safetensors").config["latents_mean"]
        == (open_component(model / "vae").config["latents_mean"])
    )
    written = convert_model(model / "transformer", tmp_path / "t.safetensors", "single")
    assert any("heads of 32" in notice for notice in written.notices)
    assert open_component(tmp_path / "t.safetensors").config["num_attention_heads"] == 2


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("source", "target", "to", "dtype", "match"),
    [
        ("Wan2.1_VAE.pth", "v.safetensors", "fp8_scaled", None, "is a VAE.*--to single"),
        ("high_noise_model", "h.safetensors", "fp8_scaled", torch.float32, "choose bfloat16"),
        ("high_noise_model", "h.pth", "single", None, r"the output is a \.safetensors file"),
        ("high_noise_model", "h", "single", None, r"the output is a \.safetensors file"),
        ("high_noise_model", "h.safetensors", "diffusers", None, "the output is a folder"),
        ("Wan2.1_VAE.pth", "v.safetensors", "official", None, r"the output is a \.pth file"),
        ("none.safetensors", "h.safetensors", "single", None, "there is no such file"),
        ("google/umt5-xxl", "x", "diffusers", None, "holds no weights"),
    ],
)
def test_impossible_requests_are_refused_in_one_line(
    t2v, tmp_path, source, target, to, dtype, match
):
    refuses(match, t2v / source, tmp_path / target, to, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_source_is_refused_before_anything_is_written(high, tmp_path):
    file = load_file(high)
    del file["blocks.1.self_attn.q.weight"]
    save_file(file, tmp_path / "part.safetensors")
    refuses(
        r"1 missing keys \(blocks\.1\.attn1\.to_q",
        tmp_path / "part.safetensors",
        tmp_path / "d",
        "diffusers",
    )
    assert not (tmp_path / "d").exists()


def test_mixed_models_are_refused(shared, tmp_path):
    shutil.copytree(shared / "golden/t2v-A14B", tmp_path / "m")
    shutil.rmtree(tmp_path / "m/low_noise_model")
    shutil.copytree(shared / "golden/i2v-A14B/low_noise_model", tmp_path / "m/low_noise_model")
    refuses(
        "low_noise_model: is a transformer of i2v-a14b .*, but t2v-a14b has 16",
        tmp_path / "m",
        tmp_path / "d",
        "diffusers",
    )
    shutil.rmtree(tmp_path / "m/low_noise_model")
    written = convert_model(tmp_path / "m", tmp_path / "d", "diffusers")
    assert any("has no transformer_2" in notice for notice in written.notices)


def test_existing_files_are_replaced_only_by_force(t2v, high, tmp_path):
    before = high.read_bytes()
    refuses("exists already; add --force", t2v / "low_noise_model", high, "single")
    assert high.read_bytes() == before
    convert_model(t2v / "low_noise_model", high, "single", force=True)
    assert high.read_bytes() != before

    folder = tmp_path / "d"
    folder.mkdir()
    convert_model(high, folder, "diffusers", shard_bytes=1_000_000)  # an empty folder is free
    refuses("contains config.json, .*add --force", high, folder, "diffusers")
    convert_model(high, folder, "diffusers", force=True)
    assert files_in(folder) == ["config.json", "diffusion_pytorch_model.safetensors"]
    (folder / "thesis.doc").write_text("years of work")
    refuses("thesis.doc, which is not part of a model", high, folder, "diffusers", force=True)
    assert (folder / "thesis.doc").exists()
    refuses(
        "is a folder, but the output is a file",
        high,
        folder.rename(tmp_path / "d.safetensors"),
        "single",
        force=True,
    )
    refuses("is the source itself", high, high, "single", force=True)
    refuses("contains the source itself", high, tmp_path, "diffusers", force=True)


def test_a_full_disk_is_refused_before_writing(high, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(publishing.shutil, "disk_usage", lambda _path: usage(9, 9, 1_000_000))
    refuses(r"needs 0\.00 GB, and 0\.00 GB are free", high, tmp_path / "new" / "d", "diffusers")
    assert [p.name for p in tmp_path.iterdir()] == ["high.safetensors"]


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("target", ["old", "old.safetensors"])
def test_an_interruption_leaves_the_old_file(t2v, high, tmp_path, fault, target):
    to = "single" if "." in target else "diffusers"
    convert_model(high, tmp_path / target, to)
    before = {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)}
    calls = []

    def on_progress(done: int, total: int) -> None:
        calls.append(done)
        if done > total / 2:
            raise fault

    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        convert_model(
            t2v / "low_noise_model", tmp_path / target, to, force=True, on_progress=on_progress
        )
    assert calls
    assert {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)} == before
    assert not list(tmp_path.glob(".*"))


def test_a_killed_conversion_leaves_nothing_under_the_final_name(t2v, tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from onewan.checkpoint.convert import convert_model\n"
        "def pause(done, total):\n"
        "    if done > total / 2: print('half', flush=True); time.sleep(60)\n"
        "convert_model(Path(sys.argv[1]), Path(sys.argv[2]), 'diffusers', on_progress=pause)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(t2v), str(tmp_path / "d")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "half"
    process.kill()
    process.wait()
    assert not (tmp_path / "d").exists() and list(tmp_path.glob(".tmp-*"))
    convert_model(t2v, tmp_path / "d", "diffusers")
    assert (tmp_path / "d/model_index.json").exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_leftover_with_the_same_temporary_name_is_not_published(high, tmp_path, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "0" * 2 * count)
    with files.temporary_beside(tmp_path / "d") as staging:
        pass
    staging.mkdir()
    (staging / "stale.safetensors").touch()
    convert_model(high, tmp_path / "d", "diffusers")
    assert files_in(tmp_path / "d") == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_a_destination_that_another_process_writes_to_is_refused(high, tmp_path):
    with locking(tmp_path / ".lock-d") as process:
        with pytest.raises(OnewanError, match=rf"d: is in use by process {process.pid} on"):
            convert_model(high, tmp_path / "d", "diffusers")
        assert not (tmp_path / "d").exists()
    convert_model(high, tmp_path / "d", "diffusers")  # the process was killed
    assert not list(tmp_path.glob(".*"))


def test_a_model_that_a_killed_conversion_moved_aside_is_moved_back(t2v, high, tmp_path):
    folder = tmp_path / "d"
    convert_model(high, folder, "diffusers")
    before = tensors(folder)
    replace_and_die(folder, after_renames=1)
    assert not folder.exists()
    named = r"d: there is no such file.*; rename .*\.replaced-.*-d back, where a killed process"
    refuses(named, folder, tmp_path / "other", "single")
    with pytest.raises(CheckpointError, match=named):
        WanModelLoader().load(folder, "t2v-a14b")
    refuses("contains config.json, .*add --force", high, folder, "diffusers")
    assert_same(tensors(folder), before)
    replace_and_die(folder, after_renames=1)
    low = t2v / "low_noise_model"
    written = convert_model(low, folder, "diffusers", force=True)
    assert f"{folder}: moved back; replacing it was interrupted" in written.notices
    after = tensors(folder)
    assert after.keys() == before.keys()
    assert not all(torch.equal(after[name], before[name]) for name in before)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", [".", "..", "d/.."])
def test_a_destination_without_a_name_is_refused(high, tmp_path, monkeypatch, name):
    (tmp_path / "d").mkdir()
    monkeypatch.chdir(tmp_path / "d")
    refuses("has no name of its own", high, Path(name), "diffusers", force=True)


def test_progress_ends_at_the_total(t2v, tmp_path):
    progress = []
    convert_model(t2v, tmp_path / "s", "single", on_progress=lambda *call: progress.append(call))
    done = [count for count, _ in progress]
    assert done == sorted(done) and len({total for _, total in progress}) == 1
    assert progress[-1][0] == progress[-1][1]


# --------------------------------------------------------------------------------- the .pth writer


def test_pytorch_reads_the_written_pth(tmp_path):
    want = {
        "a.b": torch.randn(3, 5),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.0, dtype=torch.float16),
        "deep": torch.randn(2, 1, 3, 4, 5).bfloat16(),
        "double": torch.randn(7).double(),
    }
    lazy = {n: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for n, t in want.items()}
    write_pth(tmp_path / "x.pth", lazy)
    for mapped in (True, False):
        assert_same(torch.load(tmp_path / "x.pth", weights_only=True, mmap=mapped), want)
    import zipfile

    assert zipfile.ZipFile(tmp_path / "x.pth").testzip() is None
    assert torch.load(tmp_path / "x.pth", mmap=True)["a.b"].data_ptr() % 64 == 0
    write_pth(tmp_path / "y.pth", lazy)
    assert (tmp_path / "x.pth").read_bytes() == (tmp_path / "y.pth").read_bytes()


def test_a_pth_of_more_than_4_gb_uses_zip64(tmp_path, monkeypatch):
    import zipfile

    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    want = {"big": torch.randn(3000), "small": torch.randn(3)}
    lazy = {n: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for n, t in want.items()}
    write_pth(tmp_path / "x.pth", lazy)
    loaded = torch.load(tmp_path / "x.pth", weights_only=True, mmap=True)
    assert_same(loaded, want)
    assert loaded["big"].data_ptr() % 64 == 0 and loaded["small"].data_ptr() % 64 == 0


def test_a_bit_flipped_by_the_disk_is_detected_in_a_pth(tmp_path, monkeypatch):
    from onewan.formats import write_pth as module

    write = module._write

    def faulty(path, tensors, on_bytes):
        checksums = write(path, tensors, on_bytes)
        content = bytearray(path.read_bytes())
        place = content.index(torch.arange(1000.0).numpy().tobytes()[400:480])
        content[place] ^= 1
        path.write_bytes(content)
        return checksums

    monkeypatch.setattr(module, "_write", faulty)
    with pytest.raises(CheckpointError, match=r"x\.pth: reads back different.*name"):
        write_pth(
            tmp_path / "x.pth",
            {"name": LazyTensor((1000,), torch.float32, lambda: torch.arange(1000.0))},
        )
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------- from memory


def test_save_writes_the_loaded_components(tiny_model, tmp_path, variant):
    folder = tiny_model(variant.name)
    model = WanModelLoader().load(folder)
    model.transformer.register_to_config(_name_or_path=str(folder))
    for format in ("diffusers", "official", "single"):
        WanModelSaver().save(model, tmp_path / format, format=format)
        got, want = read_model(tmp_path / format), read_model(folder)
        assert got.components.keys() == want.components.keys()
        for component_name, component in want.components.items():
            weights = got.components[component_name].weights
            assert_same(
                {n: w.read() for n, w in weights.items()},
                {n: w.read() for n, w in component.weights.items()},
            )
    saved = WanModelLoader().load(tmp_path / "diffusers")
    assert saved.tokenizer("a red fox").input_ids == model.tokenizer("a red fox").input_ids
    config = json.loads((tmp_path / "diffusers/transformer/config.json").read_text())
    assert "_name_or_path" not in config


@pytest.mark.parametrize("kind", [LoraConfig, LoHaConfig])
def test_save_merges_adapters_and_does_not_change_the_model(tiny_model, tmp_path, kind):
    model = WanModelLoader().load(tiny_model("t2v-a14b"), components=["transformer"])
    assert model.transformer is not None
    plain = {n: p.clone() for n, p in model.transformer.state_dict().items()}
    config = kind(target_modules=["to_q", "ffn.net.2"])
    if kind is LoraConfig:
        model.transformer.add_adapter(config)
    else:
        get_peft_model(model.transformer, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.transformer.named_parameters():
        if "lora_" in name or "hada_" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    held = {n: p.clone() for n, p in model.transformer.state_dict().items()}
    WanModelSaver().save(model, tmp_path / "t.safetensors", format="single")
    assert_same(dict(model.transformer.state_dict()), held)

    weights = open_component(tmp_path / "t.safetensors")
    changed = 0
    for name in weights.entries:
        module = name.removesuffix(".weight")
        want = plain[name]
        if name.endswith(("to_q.weight", "ffn.net.2.weight")):
            changed += 1
            layer = model.transformer.get_submodule(module)
            want = want + layer.get_delta_weight("default")
        torch.testing.assert_close(weights.read(name), want, rtol=1e-6, atol=1e-6)
        assert torch.equal(weights.read(name), plain[name]) != name.endswith(
            ("to_q.weight", "ffn.net.2.weight")
        )
    assert changed == 9


def test_a_quantized_model_is_saved_without_loss(high, tmp_path):
    convert_model(high, tmp_path / "f.safetensors", "fp8_scaled")
    model = WanModelLoader().load({"transformer": tmp_path / "f.safetensors"}, dtype=torch.bfloat16)
    WanModelSaver().save(model, tmp_path / "again.safetensors", format="fp8_scaled")
    first, again = load_file(tmp_path / "f.safetensors"), load_file(tmp_path / "again.safetensors")
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        assert same_bits(again[name], tensor), name
    WanModelSaver().save(model, tmp_path / "x.safetensors", format="single", dtype=torch.float32)
    numbers, want = (
        open_component(tmp_path / "x.safetensors"),
        open_component(tmp_path / "f.safetensors"),
    )
    assert all(torch.equal(numbers.read(n), want.read(n).float()) for n in want.entries)


def test_the_table_of_formats_has_all_that_can_be_written() -> None:
    assert tuple(MODEL_FORMATS) == get_args(ModelFormat)
    assert tuple(LORA_FORMATS) == get_args(LoraFormat)
