"""LoRA files: their effect in other programs, their headers, and the refusal of damaged ones.

The reference is diffusers where it reads the file. For ComfyUI's keys it is also the definition:
the official weight plus alpha/rank times up times down, by official names.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.adapters import lora_config

from onewan.adapters.adapter_config import AdapterConfig
from onewan.adapters.lora import (
    adapter_of,
    adapter_parameters,
    adapter_weights,
    attach_adapter,
    load_adapter_weights,
)
from onewan.checkpoint.saver import AdapterHeader, WanModelSaver, expert_of
from onewan.errors import CheckpointError
from onewan.formats.key_maps import to_diffusers, to_official
from onewan.formats.lora import LINEARS, WanShape
from onewan.formats.lora_files import AdapterFile, read_adapter
from onewan.model.load import WanModelLoader
from onewan.variants import VARIANTS, Expert

WHOLE = lora_config(rank=4, alpha=6.5, dropout=0.3, modules=LINEARS, layers=(0, 1, 2))
PART = lora_config(rank=3, alpha=1.0, dropout=0.0, modules=("attn1.to_q", "ffn.net.2"), layers=(1,))
CROSS = lora_config(rank=8, alpha=2.0, dropout=0.0, modules=["attn2"], layers=(0, 2))
DATE = datetime(2026, 11, 23, 17, 49, tzinfo=timezone.utc)
HIGH, LOW = VARIANTS["t2v-a14b"].experts


def trained(folder: Path, expert: Expert, config: AdapterConfig) -> WanTransformer3DModel:
    """An expert with an adapter whose weights are as far from zero as after a long training."""
    model = WanModelLoader().load(folder, components=[expert.component])
    transformer = getattr(model, expert.component)
    attach_adapter(transformer, config, seed=1, name=expert.name)
    generator = torch.Generator().manual_seed(2)
    for parameter in adapter_parameters(transformer).values():
        parameter.data.normal_(0, 0.2, generator=generator)
    return transformer.eval()


def export(
    transformer: WanTransformer3DModel, config: AdapterConfig, path: Path, **changes
) -> Path:
    header = AdapterHeader(
        facts={"variant": "t2v-a14b", "expert": "low", "steps": 500},
        date=DATE,
        title=changes.get("title"),
        resolution=changes.get("resolution"),
    )
    notices = WanModelSaver().save_adapter(
        changes.get("modules") or adapter_of(transformer, config),
        path,
        changes.get("format", "comfyui"),
        header,
        dtype=changes.get("dtype"),
        shape=WanShape.of_config(transformer.config),
    )
    assert notices == []
    return path


def weights_of(file: AdapterFile) -> dict[str, torch.Tensor]:
    """Under PEFT's names."""
    return {
        f"{module}.{part}.weight": tensor
        for module, adapter in file.modules.items()
        for part, tensor in adapter.tensors.items()
    }


@torch.no_grad()
def velocity(transformer: WanTransformer3DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    channels = transformer.config.in_channels
    latents = torch.randn(2, channels, 2, 4, 6, generator=generator)
    text = torch.randn(2, 512, transformer.config.text_dim, generator=generator)
    return transformer(latents, torch.tensor([900.0, 300.0]), text, return_dict=False)[0]


def experts_pipeline(folder: Path) -> WanPipeline:
    return WanPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None, vae=None)


def assert_same_effect(got: torch.Tensor, want: torch.Tensor, base: torch.Tensor) -> None:
    """`got` is `want` to 1e-5 of what the adapter changes, and it changes something."""
    effect = (want - base).norm()
    assert effect > 0.02 * base.norm()
    assert (got - want).norm() < 1e-5 * effect


@pytest.mark.parametrize("format", ["comfyui", "no_alpha", "diffusers", "kohya"])
@pytest.mark.parametrize(
    ("expert", "config"),
    [(HIGH, WHOLE), (LOW, WHOLE), (HIGH, CROSS), (LOW, PART)],
    ids=["high-whole", "low-whole", "high-cross", "low-part"],
)
def test_diffusers_loads_the_adapter_that_was_trained(tiny_model, tmp_path, expert, config, format):
    folder = tiny_model("t2v-a14b")
    transformer = trained(folder, expert, config)
    path = export(transformer, config, tmp_path / "lora.safetensors", format=format)

    pipeline = experts_pipeline(folder)
    before = {e.name: velocity(getattr(pipeline, e.component)) for e in (HIGH, LOW)}
    into_low = expert is LOW
    pipeline.load_lora_weights(tmp_path, weight_name=path.name, load_into_transformer_2=into_low)
    after = {e.name: velocity(getattr(pipeline, e.component)) for e in (HIGH, LOW)}

    assert_same_effect(after[expert.name], velocity(transformer), before[expert.name])
    other = HIGH if into_low else LOW
    assert torch.equal(after[other.name], before[other.name])


@pytest.mark.parametrize("variant", ["i2v-a14b", "ti2v-5b"])
def test_diffusers_loads_adapters_of_the_other_variants(tiny_model, tmp_path, variant):
    expert = VARIANTS[variant].experts[0]
    transformer = trained(tiny_model(variant), expert, WHOLE)
    path = export(transformer, WHOLE, tmp_path / "lora.safetensors")
    plain = WanTransformer3DModel.from_pretrained(tiny_model(variant) / expert.component)
    base = velocity(plain)
    WanPipeline.load_lora_into_transformer(WanPipeline.lora_state_dict(path), plain)
    assert_same_effect(velocity(plain), velocity(transformer), base)


def test_a_comfyui_file_defines_weight_plus_alpha_over_rank_times_up_down(tiny_model, tmp_path):
    folder = tiny_model("t2v-a14b")
    transformer = trained(folder, LOW, WHOLE)
    file = load_file(export(transformer, WHOLE, tmp_path / "lora.safetensors"))
    plain = WanTransformer3DModel.from_pretrained(folder / LOW.component)
    base = velocity(plain)

    merged = {to_official(name): weight for name, weight in plain.state_dict().items()}
    for key in [k for k in file if k.endswith(".alpha")]:
        module = key.removesuffix(".alpha")
        down, up = file[f"{module}.lora_A.weight"], file[f"{module}.lora_B.weight"]
        target = module.removeprefix("diffusion_model.") + ".weight"
        assert file[key].dtype == torch.float32 and file[key].shape == ()
        merged[target] = merged[target] + file[key] / len(down) * (up @ down)
    assert len(file) == 3 * len(LINEARS) * 3
    plain.load_state_dict({to_diffusers(name): weight for name, weight in merged.items()})
    assert_same_effect(velocity(plain), velocity(transformer), base)


def test_a_diffusers_file_equals_the_one_that_diffusers_writes(tiny_model, tmp_path):
    transformer = trained(tiny_model("t2v-a14b"), HIGH, PART)
    path = export(transformer, PART, tmp_path / "ours.safetensors", format="diffusers")
    settings = {
        "r": 3,
        "lora_alpha": 1,
        "target_modules": ["blocks.1.attn1.to_q", "blocks.1.ffn.net.2"],
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "lora_bias": False,
    }
    WanPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=adapter_weights(transformer),
        transformer_lora_adapter_metadata=settings,
        weight_name="theirs.safetensors",
    )
    ours, theirs = load_file(path), load_file(tmp_path / "theirs.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert header(path).items() >= header(tmp_path / "theirs.safetensors").items()


# ------------------------------------------------------------------------------------------- header


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_the_header_describes_the_adapter_and_the_run(tiny_model, tmp_path):
    transformer = trained(tiny_model("t2v-a14b"), LOW, PART)
    path = export(
        transformer, PART, tmp_path / "a" / "x.safetensors", title="my style", resolution=(832, 480)
    )
    metadata = header(path)
    raw = path.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    # Version and format version change by themselves; all else is spelled out.
    assert re.fullmatch(r"\d+\.\d+.*", metadata.pop("onewan.version"))
    assert metadata.pop("onewan.format_version") == "1"
    assert metadata == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "WAN-2.2/lora",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": "my style",
        "modelspec.date": "2026-11-23T17:49:00+00:00",
        "modelspec.resolution": "832x480",
        "modelspec.hash_sha256": "0x" + hashlib.sha256(data).hexdigest(),
        "onewan.variant": "t2v-a14b",
        "onewan.expert": "low",
        "onewan.steps": "500",
        "onewan.format": "comfyui",
        "onewan.kind": "lora",
        "onewan.rank": "3",
        "onewan.alpha": "1.0",
    }


def test_equal_weights_give_equal_files(tiny_model, tmp_path):
    transformer = trained(tiny_model("t2v-a14b"), LOW, PART)
    title = 'quotes " and \\, tabs \t, \x1f, \x7f, 色调 and \U0001f600'
    first = export(transformer, PART, tmp_path / "1.safetensors", title=title)
    second = export(transformer, PART, tmp_path / "2.safetensors", title=title)
    assert first.read_bytes() == second.read_bytes()
    assert header(first)["modelspec.title"] == title


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("wan_2_2", "WAN-2.2"),
        ("wan_2_2-lora", "WAN-2.2/lora"),
        ("wan_2_2-embedding", "WAN-2.2/embedding"),
    ],
)
def test_model_spec_resources_have_all_constant_fields(name, architecture):
    import onewan

    folder = Path(onewan.__file__).parent / "resources" / "sd_model_spec"
    spec = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert spec.pop("modelspec.title").startswith("WAN 2.2")
    assert spec == {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
    }


# ------------------------------------------------------------------------------- precision, writing


def test_bfloat16_export_rounds_to_nearest(tiny_model, tmp_path):
    transformer = trained(tiny_model("t2v-a14b"), LOW, PART)
    config = replace(PART, alphas=dict.fromkeys(PART.modules, 0.1))
    lora = read_adapter(
        export(transformer, config, tmp_path / "x.safetensors", dtype=torch.bfloat16)
    )
    alphas = {adapter.alpha for adapter in lora.modules.values()}
    assert alphas == {torch.tensor(0.1).item()}  # float32 whatever the weights
    for name, weight in adapter_weights(transformer).items():
        found = weights_of(lora)[name]
        assert found.dtype == torch.bfloat16
        # 8 bits of significand: half a unit in the last place is 2^-9 of the power of two below.
        assert ((found.float() - weight).abs() <= weight.abs() * 2**-8).all()


def test_a_weight_beyond_float16_is_refused(tiny_model, tmp_path):
    transformer = trained(tiny_model("t2v-a14b"), LOW, PART)
    modules = adapter_of(transformer, PART)
    modules["blocks.1.ffn.net.2"].tensors["lora_B"][3, 1] = 70000.0
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match=r"ffn\.net\.2.*7e\+04.*bfloat16"):
        export(transformer, PART, path, modules=modules, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_views_of_one_storage_are_exported(tiny_model, tmp_path):
    transformer = trained(tiny_model("t2v-a14b"), LOW, PART)
    modules = adapter_of(transformer, PART)
    name = "blocks.1.attn1.to_q"
    shared = torch.arange(3 * 64, dtype=torch.float32)
    views = {"lora_A": shared.view(3, 64), "lora_B": shared.view(3, 64).T}
    modules[name] = replace(modules[name], tensors=views)
    path = export(transformer, PART, tmp_path / "x.safetensors", modules=modules)
    found = weights_of(read_adapter(path))
    assert torch.equal(found[f"{name}.lora_A.weight"], shared.view(3, 64))
    assert torch.equal(found[f"{name}.lora_B.weight"], found[f"{name}.lora_A.weight"].T)


@pytest.mark.parametrize("place", ["header", "tensors"])
def test_a_bit_flipped_by_the_disk_is_detected(tiny_model, tmp_path, monkeypatch, place):
    """The fault is put in where a real one would be: between writing and reading back."""
    transformer = trained(tiny_model("t2v-a14b"), LOW, PART)
    path = export(transformer, PART, tmp_path / "x.safetensors")
    good = path.read_bytes()
    where = good.index(b'"onewan.steps":"500"') + 16 if place == "header" else len(good) - 5

    def faulty_sync(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[where] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr("onewan.formats.write.sync", faulty_sync)
    with pytest.raises(CheckpointError, match="reads back different"):
        export(transformer, PART, path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert path.read_bytes() == good


def test_a_file_in_place_of_the_folder_is_named(tiny_model, tmp_path):
    (tmp_path / "weights").write_text("in the way")
    transformer = trained(tiny_model("t2v-a14b"), LOW, PART)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: can't be written"):
        export(transformer, PART, tmp_path / "weights" / "x.safetensors")


# ------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("format", ["comfyui", "diffusers", "kohya"])
@pytest.mark.parametrize("config", [WHOLE, PART], ids=["whole", "part"])
def test_a_saved_adapter_reads_back_equal(tiny_model, tmp_path, config, format):
    folder = tiny_model("t2v-a14b")
    transformer = trained(folder, LOW, config)
    lora = read_adapter(export(transformer, config, tmp_path / "x.safetensors", format=format))
    weights = adapter_weights(transformer)
    assert lora.layout.key_format == format
    assert lora.layout.trainer == "onewan"
    assert weights_of(lora).keys() == weights.keys()
    assert all(torch.equal(weights_of(lora)[name], weights[name]) for name in weights)
    assert {m: a.rank for m, a in lora.modules.items()} == config.ranks
    assert {m: a.alpha for m, a in lora.modules.items()} == config.alphas

    fresh = trained(folder, LOW, config)
    for parameter in adapter_parameters(fresh).values():
        parameter.data.zero_()
    load_adapter_weights(fresh, weights_of(lora), str(lora.path))
    assert torch.equal(velocity(fresh), velocity(transformer))


def test_down_and_up_without_alpha_are_read_at_scale_1(tiny_model, tmp_path):
    transformer = trained(tiny_model("t2v-a14b"), LOW, PART)
    file = load_file(export(transformer, PART, tmp_path / "x.safetensors"))
    respelled = {
        name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): tensor
        for name, tensor in file.items()
        if not name.endswith(".alpha")
    }
    save_file(respelled, tmp_path / "y.safetensors")
    lora = read_adapter(tmp_path / "y.safetensors")
    found = weights_of(lora)
    assert all(torch.equal(found[n], w) for n, w in adapter_weights(transformer).items())
    assert {adapter.scale for adapter in lora.modules.values()} == {1.0}


@pytest.mark.parametrize("format", ["comfyui", "diffusers"])
def test_ranks_and_alphas_may_differ_by_module(tiny_model, tmp_path, format):
    """A file of another trainer: read by us it does what it does in diffusers."""
    folder = tiny_model("t2v-a14b")
    ranks = {"blocks.0.attn1.to_q": 2, "blocks.2.attn1.to_q": 5, "blocks.2.ffn.net.0.proj": 3}
    alphas = {"blocks.0.attn1.to_q": 4.0, "blocks.2.attn1.to_q": 1.0, "blocks.2.ffn.net.0.proj": 3}
    generator = torch.Generator().manual_seed(5)
    file, settings = {}, {}
    for module, rank in ranks.items():
        outputs = 256 if "ffn" in module else 64
        name = f"transformer.{module}"
        if format == "comfyui":
            name = f"diffusion_model.{to_official(module)}"
            file[f"{name}.alpha"] = torch.tensor(float(alphas[module]))
        file[f"{name}.lora_A.weight"] = torch.randn(rank, 64, generator=generator) * 0.3
        file[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.3
    if format == "diffusers":
        settings = {
            "transformer.r": 2,
            "transformer.lora_alpha": 4.0,
            "transformer.rank_pattern": {"blocks.2.attn1.to_q": 5, "blocks.2.ffn.net.0.proj": 3},
            "transformer.alpha_pattern": {"blocks.2.attn1.to_q": 1.0, "ffn.net.0.proj": 3},
            "transformer.target_modules": list(ranks),
        }
    path = tmp_path / "x.safetensors"
    save_file(file, path, {"lora_adapter_metadata": json.dumps(settings)} if settings else None)

    lora = read_adapter(path)
    assert lora.layout.ranks == ranks
    assert {module: adapter.alpha for module, adapter in lora.modules.items()} == alphas
    transformer = WanModelLoader().load(folder, components=["transformer"]).transformer
    base = velocity(transformer)
    config = LoraConfig(rank_pattern=ranks, alpha_pattern=alphas, target_modules=list(ranks))
    inject_adapter_in_model(config, transformer)
    transformer.peft_config = {"default": config}
    load_adapter_weights(transformer, weights_of(lora), str(path))

    pipeline = experts_pipeline(folder)
    pipeline.load_lora_weights(tmp_path, weight_name=path.name)
    assert_same_effect(velocity(transformer), velocity(pipeline.transformer), base)


Q = "diffusion_model.blocks.0.self_attn.q"
GOOD = {f"{Q}.lora_A.weight": torch.ones(4, 8), f"{Q}.lora_B.weight": torch.ones(8, 4)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "has no tensors"),
        ({"blocks.0.attn1.to_q.weight": torch.ones(8, 8)}, "1 tensors, none of a LoRA, such as"),
        (
            {"lora_unet_down_blocks_0_attn.lora_down.weight": torch.ones(4, 8)},
            "of Stable Diffusion, such as lora_unet_down",
        ),
        (
            {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 8)},
            "of Flux or HunyuanVideo",
        ),
        (
            {k.replace("self_attn.q", "cross_attn.k_img"): v for k, v in GOOD.items()},
            r"2 of 2 keys .* Wan 2\.1 I2V .*k_img",
        ),
        ({**GOOD, "blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 8)}, "1 of 3 keys"),
        ({**GOOD, f"{Q}.lora_down.weight": torch.ones(4, 8)}, r"attn1\.to_q has lora_A twice"),
        ({**GOOD, f"{Q}.hada_w1_a": torch.ones(4, 8)}, r"to_q mixes hada_w1_a and lora_A"),
        ({**GOOD, f"{Q}.diff": torch.ones(8, 8)}, r"to_q mixes diff and lora_A"),
        (
            {**GOOD, f"{Q}.dora_scale": torch.ones(4, 1)},
            r"magnitude \[4, 1\], which fits neither 8",
        ),
        ({f"{Q}.lokr_t2": torch.ones(4, 8)}, r"1 of 1 keys .*lokr_t2"),
        ({f"{Q}.lokr_w1": torch.ones(4, 8)}, "has no lokr_w2"),
        ({f"{Q}.hada_w1_a": torch.ones(4, 8)}, "has no hada_w1_b"),
        ({f"{Q}.oft_blocks": torch.ones(2, 4, 3)}, r"oft_blocks \[2, 4, 3\], not \[blocks"),
        ({f"{Q}.oft_R.weight": torch.ones(2, 5)}, r"oft_R \[2, 5\], not"),
        ({k.replace(".self_attn.q", ""): v for k, v in GOOD.items()}, "2 of 2 keys"),
        ({k.replace("blocks.0", "blocks.x"): v for k, v in GOOD.items()}, "2 of 2 keys"),
        ({f"{Q}.alpha": torch.tensor(4.0)}, r"to_q has alpha without weights"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 8)}, "has no lora_B"),
        ({f"{Q}.lora_B.weight": torch.ones(8, 4)}, "has no lora_A"),
        ({**GOOD, f"{Q}.lora_B.weight": torch.ones(8, 5)}, r"\[4, 8\] and lora_B \[8, 5\]"),
        ({**GOOD, f"{Q}.lora_B.weight": torch.ones(8, 4, 1)}, r"lora_B \[8, 4, 1\]"),
        ({**GOOD, f"{Q}.lora_B.weight": torch.ones(8, 4, dtype=torch.int8)}, "lora_B as I8"),
        ({**GOOD, f"{Q}.alpha": torch.ones(2)}, r"alpha of shape \[2\]"),
    ],
)
def test_files_that_are_no_adapter_for_wan_are_refused_with_the_reason(tmp_path, tensors, message):
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"bad\.safetensors: .*{message}"):
        read_adapter(path)


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_truncated_files_are_refused(tiny_model, tmp_path, cut):
    transformer = trained(tiny_model("t2v-a14b"), LOW, PART)
    path = export(transformer, PART, tmp_path / "x.safetensors")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"is (empty|not a (complete )?safetensors)"):
        read_adapter(path)


def test_a_missing_file_and_a_damaged_header_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such file"):
        read_adapter(tmp_path / "none.safetensors")
    path = tmp_path / "x.safetensors"
    tensors = {k.replace(Q, "transformer.blocks.0.attn1.to_q"): v for k, v in GOOD.items()}
    for damage in ("{", "[]", '{"transformer.r": 4}', '{"transformer.lora_alpha": "much"}'):
        save_file(tensors, path, {"lora_adapter_metadata": damage})
        with pytest.raises(CheckpointError, match="lora_adapter_metadata in its header is damaged"):
            read_adapter(path)


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("fox_000500_high_noise", "high"),
        ("wan2.2_i2v_A14b_low_noise_lora_rank64", "low"),
        ("Wan2.2-HighNoise-style", "high"),
        ("style_low", "low"),
        ("high_contrast_low_noise", "low"),
        ("HIGH-lora", "high"),
        ("highlands", None),
        ("style_high_low", None),
        ("style", None),
    ],
)
def test_the_expert_is_inferred_from_the_file_name(name, expert):
    variant, path = VARIANTS["t2v-a14b"], Path(f"{name}.safetensors")
    if expert is None:
        with pytest.raises(CheckpointError, match=r"name it \.\.\._high_noise"):
            expert_of(path, {}, variant)
    else:
        assert expert_of(path, {}, variant) is variant.expert(expert)


def test_the_expert_in_the_header_precedes_the_file_name():
    pair, single = VARIANTS["t2v-a14b"], VARIANTS["ti2v-5b"]
    path = Path("style_high_noise.safetensors")
    assert expert_of(path, {"onewan.expert": "low"}, pair) is LOW
    assert expert_of(path, {}, single) is single.experts[0]
    with pytest.raises(CheckpointError, match="made for the low expert, and ti2v-5b has single"):
        expert_of(path, {"onewan.expert": "low"}, single)
