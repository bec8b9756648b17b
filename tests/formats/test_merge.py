"""Merging against arithmetic of its own: official names, float64, alpha/rank * up @ down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from onewan.checkpoint.convert import convert_model
from onewan.checkpoint.merge import merge
from onewan.checkpoint.model_files import read_model
from onewan.errors import CheckpointError
from onewan.formats.container import open_tensors
from onewan.formats.weights import open_component

LAYERS = ("blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.1.ffn.0")


@pytest.fixture
def high(t2v, tmp_path):
    convert_model(t2v / "high_noise_model", tmp_path / "high.safetensors", "single")
    return tmp_path / "high.safetensors"


def lora(path: Path, seed: int, layers=LAYERS, alpha: float = 3.0, **header: str) -> Path:
    """A LoRA of rank 4 in ComfyUI's key format."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        out = 512 if layer.endswith("ffn.0") else 256
        key = f"diffusion_model.{layer}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(4, 256, generator=generator) * 0.1
        tensors[f"{key}.lora_B.weight"] = torch.randn(out, 4, generator=generator) * 0.1
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, {f"onewan.{k}": v for k, v in header.items()} or None)
    return path


def added(path: Path) -> dict[str, torch.Tensor]:
    """float64 [out, in] by official layer: what the LoRA adds at weight 1."""
    file = {n.removeprefix("diffusion_model."): t.double() for n, t in load_file(path).items()}
    return {
        n.removesuffix(".alpha"): alpha
        / 4
        * (file[n.replace("alpha", "lora_B.weight")] @ file[n.replace("alpha", "lora_A.weight")])
        for n, alpha in file.items()
        if n.endswith(".alpha")
    }


def arrays(path: Path) -> dict[str, torch.Tensor]:
    weights = open_component(path)
    return {name: weights.read(name) for name in weights.entries}


def official(path: Path) -> dict[str, torch.Tensor]:
    file = open_tensors(path)
    return {name: file.read(name).clone() for name in file.tensors}


def half_step(tensor: torch.Tensor) -> torch.Tensor:
    """Half a unit in the last place of bfloat16, and what float32 arithmetic may add."""
    return tensor.abs() * 2**-8 + 1e-6


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_two_loras_are_added_with_their_weights(high, tmp_path, dtype):
    one, two = lora(tmp_path / "1.safetensors", 1), lora(tmp_path / "2.safetensors", 2, LAYERS[1:])
    written = merge(high, [(one, 0.8), (two, -1.5)], tmp_path / "m.safetensors", dtype=dtype)
    assert written.files == (tmp_path / "m.safetensors",) and written.notices == ()
    base, got = load_file(high), load_file(tmp_path / "m.safetensors")
    first, second = added(one), added(two)
    assert got.keys() == base.keys()
    for name, weight in base.items():
        layer = name.removesuffix(".weight")
        want = weight.double()
        if name.endswith(".weight") and layer in first:
            want = want + 0.8 * first[layer] - 1.5 * second.get(layer, torch.zeros(()))
        assert got[name].dtype == (dtype or weight.dtype)
        if dtype is torch.float32:
            torch.testing.assert_close(got[name].double(), want, rtol=1e-6, atol=1e-6)
        else:
            # Rounded once, from float32: to the nearest, but for ties that float32 decides.
            off = got[name] != want.to(got[name].dtype)
            assert off.float().mean() < 1e-3
            assert ((got[name].double() - want).abs() <= half_step(want)).all()
        if layer not in first:
            assert torch.equal(got[name], weight.to(got[name].dtype))


def test_a_weight_of_zero_and_opposite_weights_change_nothing(high, tmp_path):
    path = lora(tmp_path / "1.safetensors", 1)
    base = load_file(high)
    for number, loras in enumerate([[(path, 0.0)], [(path, 2.0), (path, -2.0)]]):
        merge(high, loras, tmp_path / f"m{number}.safetensors")
        got = load_file(tmp_path / f"m{number}.safetensors")
        assert all(torch.equal(got[name], weight) for name, weight in base.items())


def test_fp8_stays_fp8_and_untouched_layers_keep_their_bits(high, tmp_path):
    convert_model(high, tmp_path / "f.safetensors", "fp8_scaled")
    path = lora(tmp_path / "1.safetensors", 1)
    written = merge(tmp_path / "f.safetensors", [(path, 1.0)], tmp_path / "m.safetensors")
    assert any("quantized to fp8 again" in notice for notice in written.notices)
    before, after = load_file(tmp_path / "f.safetensors"), load_file(tmp_path / "m.safetensors")
    assert before.keys() == after.keys()
    base, extra = open_component(tmp_path / "f.safetensors"), added(path)
    for name, entry in base.entries.items():
        layer = entry.key.removesuffix(".weight")
        if layer not in extra or not entry.key.endswith(".weight"):
            assert torch.equal(after[entry.key].float(), before[entry.key].float()), name
            continue
        want = base.read(name).double() + extra[layer]
        scale = want.abs().max() / 448
        got = after[entry.key].double() * after[f"{layer}.scale_weight"].double()
        assert after[entry.key].dtype == torch.float8_e4m3fn
        bound = torch.maximum(want.abs() * 2**-4, scale * 2**-10) * (1 + 1e-5)
        assert ((got - want).abs() <= bound).all()


def test_each_lora_is_merged_into_its_expert_of_a_whole_model(t2v, tmp_path):
    one = lora(tmp_path / "style_high_noise.safetensors", 1)
    two = lora(tmp_path / "whatever.safetensors", 2, expert="low")
    for layout in ("official", "diffusers", "single"):
        base = t2v
        if layout != "official":
            convert_model(t2v, tmp_path / layout, layout)
            base = tmp_path / layout
        written = merge(base, [(one, 1.0), (two, 0.5)], tmp_path / f"{layout}-m")
        assert written.notices == ()
        got, want = read_model(tmp_path / f"{layout}-m"), read_model(base)
        assert set(got.formats.values()) == {layout}
        assert got.tokenizer == want.tokenizer
        for component, path, weight in (("transformer", one, 1.0), ("transformer_2", two, 0.5)):
            extra = added(path)
            for name, original in want.components[component].weights.items():
                key = {
                    "blocks.0.attn1.to_q.weight": LAYERS[0],
                    "blocks.1.attn2.to_out.0.weight": LAYERS[1],
                    "blocks.1.ffn.net.0.proj.weight": LAYERS[2],
                }.get(name)
                result = got.components[component].weights[name].read()
                if key is None:
                    assert torch.equal(result, original.read())
                    continue
                exact = original.read().double() + weight * extra[key]
                assert ((result.double() - exact).abs() <= half_step(exact)).all()
        for component in ("vae", "text_encoder"):
            for name, original in want.components[component].weights.items():
                assert torch.equal(got.components[component].weights[name].read(), original.read())
    only = merge(t2v, [(one, 1.0)], tmp_path / "only")
    assert any("transformer_2, which is copied unchanged" in notice for notice in only.notices)


def test_biases_and_plain_differences_are_merged(high, tmp_path):
    layer = "blocks.0.ffn.2"
    save_file(
        {
            f"diffusion_model.{layer}.diff": torch.full((256, 512), 0.25),
            f"diffusion_model.{layer}.diff_b": torch.full((256,), -0.5),
        },
        tmp_path / "d.safetensors",
    )
    merge(
        high, [(tmp_path / "d.safetensors", 2.0)], tmp_path / "m.safetensors", dtype=torch.float32
    )
    base, got = load_file(high), load_file(tmp_path / "m.safetensors")
    assert torch.equal(got[f"{layer}.weight"], base[f"{layer}.weight"].float() + 0.5)
    assert torch.equal(got[f"{layer}.bias"], base[f"{layer}.bias"].float() - 1.0)


def test_a_dora_is_merged_with_the_norm_of_the_base_weight(high, tmp_path):
    layer, generator = LAYERS[0], torch.Generator().manual_seed(4)
    down, up = (torch.randn(s, generator=generator) * 0.1 for s in ((4, 256), (256, 4)))
    magnitude = torch.rand(256, generator=generator) + 0.5
    key = "transformer.blocks.0.attn1.to_q"
    save_file(
        {
            f"{key}.lora_A.weight": down,
            f"{key}.lora_B.weight": up,
            f"{key}.lora_magnitude_vector": magnitude,
        },
        tmp_path / "d.safetensors",
    )
    merge(
        high, [(tmp_path / "d.safetensors", 1.0)], tmp_path / "m.safetensors", dtype=torch.float32
    )
    changed = load_file(high)[f"{layer}.weight"].double() + (up @ down).double()
    want = changed * (magnitude.double() / changed.norm(dim=1))[:, None]
    got = load_file(tmp_path / "m.safetensors")[f"{layer}.weight"].double()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (
            {f"{LAYERS[0].replace('0', '7')}.lora_{s}.weight": torch.ones(4, 4) for s in "AB"},
            r"1 of 1 layers \(no layer blocks\.7\.attn1\.to_q\)",
        ),
        (
            {
                f"{LAYERS[0]}.lora_A.weight": torch.ones(4, 128),
                f"{LAYERS[0]}.lora_B.weight": torch.ones(256, 4),
            },
            r"to_q is \[256, 256\], but \[256, 128\] in the LoRA",
        ),
        ({f"{LAYERS[0]}.diff_b": torch.ones(7)}, r"bias of blocks\.0\.attn1\.to_q is not \[7\]"),
        ({"lora_te_x.lora_A.weight": torch.ones(4, 4)}, "x.safetensors"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(high, tmp_path, tensors, match):
    save_file({f"diffusion_model.{n}": t for n, t in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=match) as caught:
        merge(high, [(tmp_path / "x.safetensors", 1.0)], tmp_path / "m.safetensors")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.safetensors").exists()


def test_loras_for_a_missing_or_unknown_expert_are_refused(t2v, high, tmp_path):
    path = lora(tmp_path / "style.safetensors", 1)
    with pytest.raises(CheckpointError, match="neither its header nor its name"):
        merge(t2v, [(path, 1.0)], tmp_path / "m")
    with pytest.raises(CheckpointError, match="is the source itself"):
        merge(high, [(path, 1.0)], path, force=True)
    with pytest.raises(CheckpointError, match="contains no transformer"):
        merge(t2v / "Wan2.1_VAE.pth", [(path, 1.0)], tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="exists already"):
        (tmp_path / "m.safetensors").write_text("x")
        merge(high, [(path, 1.0)], tmp_path / "m.safetensors")


def test_the_folder_of_one_expert_is_merged_into_a_folder(t2v, tmp_path):
    path = lora(tmp_path / "style.safetensors", 1)
    merge(t2v / "low_noise_model", [(path, 1.0)], tmp_path / "low")
    config = json.loads((tmp_path / "low/config.json").read_text())
    assert config["dim"] == 256
    want = official(t2v / "low_noise_model")
    got = official(tmp_path / "low")
    layers = {f"{layer}.weight" for layer in LAYERS}
    assert {n for n in want if not torch.equal(want[n], got[n])} == layers


def test_a_lora_of_the_other_expert_is_refused_unless_allowed(t2v, tmp_path):
    path = lora(tmp_path / "style_high_noise.safetensors", 1)
    low = t2v / "low_noise_model"
    with pytest.raises(CheckpointError, match=r"high-noise expert, but .* is the low-noise one"):
        merge(low, [(path, 1.0)], tmp_path / "low")
    assert not (tmp_path / "low").exists()
    merge(low, [(path, 1.0)], tmp_path / "low", check_file_names=False)
    assert (tmp_path / "low" / "config.json").is_file()
