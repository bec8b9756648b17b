"""Adapters as other programs publish them: extra keys, both experts in one file, convolutions, and
values that would break a model.

The reference is ComfyUI's formula by the keys of the file: weight + alpha / rank * up @ down for
each layer that the model has, a ``diff`` added to the weight, a ``diff_b`` to the bias.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from support.adapters import effective_weights
from torch import Tensor

from onewan.adapters.lora import apply_lora
from onewan.checkpoint.convert import convert_model
from onewan.checkpoint.merge import merge
from onewan.checkpoint.saver import convert_adapter
from onewan.cli import main
from onewan.config.load import load_run
from onewan.errors import CheckpointError
from onewan.formats.key_maps import to_diffusers, to_official
from onewan.formats.lora_files import read_adapter, read_adapters
from onewan.model.load import WanModelLoader
from onewan.train.trainable_setup import initial_adapters

Q = "diffusion_model.blocks.0.self_attn.q"


@pytest.fixture(scope="module")
def base() -> WanTransformer3DModel:
    """One block of width 128, as the distilled LoRA of the field files was made for."""
    torch.manual_seed(3)
    model = WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=128,
        in_channels=36,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=512,
        num_layers=1,
    )
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def base_file(base: WanTransformer3DModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "wan2.2_i2v_high_noise.safetensors"
    state = {to_official(name): t.float().contiguous() for name, t in base.state_dict().items()}
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def distilled(shared: Path) -> Path:
    return shared / "clips" / "field" / "lora" / "lightx2v_style_i2v.safetensors"


def by_comfyui(file: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    """float64, by official names: the weights after ComfyUI has applied the keys that it knows."""
    merged = {name: tensor.double() for name, tensor in base.items()}
    for name, weight in base.items():
        key = "diffusion_model." + name.removesuffix(".weight")
        for down, up in (("lora_down", "lora_up"), ("lora_A", "lora_B")):
            if name.endswith(".weight") and f"{key}.{down}.weight" in file:
                a, b = (file[f"{key}.{part}.weight"].double() for part in (down, up))
                scale = file.get(f"{key}.alpha", torch.tensor(len(a))).double() / len(a)
                merged[name] += scale * (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
        if name.endswith(".weight") and f"{key}.diff" in file:
            merged[name] += file[f"{key}.diff"].double()
        bias = "diffusion_model." + name.removesuffix(".bias") + ".diff_b"
        if name.endswith(".bias") and bias in file:
            merged[name] += file[bias].double()
    return merged


def official_state(model: WanTransformer3DModel) -> dict[str, Tensor]:
    """The weights that the model computes with, by official names."""
    return {to_official(name): tensor for name, tensor in effective_weights(model).items()}


def assert_equal_weights(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name].double(), tensor, rtol=1e-5, atol=1e-6, msg=name)


def changed(got: dict[str, Tensor], base: dict[str, Tensor]) -> int:
    return sum(not torch.equal(got[name].float(), tensor.float()) for name, tensor in base.items())


# -------------------------------------------------------------------------------- distilled LoRAs


def test_a_distilled_lora_does_in_a_model_what_it_does_in_comfyui(
    distilled, base, base_file, tmp_path, capsys
):
    file, plain = load_file(distilled), load_file(base_file)
    want = by_comfyui(file, plain)
    assert changed(want, plain) == 10 + 10 + 4  # weights, biases, norms
    adapter = read_adapter(distilled)
    (notice,) = adapter.notices
    assert "5 of 39 keys are skipped, as in ComfyUI" in notice
    assert "cross_attn.k_img" in notice and str(distilled) in notice

    written = merge(base_file, [(distilled, 1.0)], tmp_path / "m.safetensors")
    assert notice in written.notices
    assert_equal_weights(load_file(tmp_path / "m.safetensors"), want)

    model = copy.deepcopy(base)
    apply_lora(model, adapter.modules, "one")
    assert_equal_weights(official_state(model), want)

    assert (
        main(["convert", str(distilled), str(tmp_path / "c.safetensors"), "--to", "comfyui"]) == 0
    )
    assert notice in capsys.readouterr().out
    again = load_file(tmp_path / "c.safetensors")
    assert len(again) == 39 - 5
    assert_equal_weights(by_comfyui(again, plain), want)
    assert read_adapter(tmp_path / "c.safetensors").notices == ()


def test_what_would_change_the_meaning_is_refused(distilled, tmp_path):
    file = load_file(distilled)
    path = tmp_path / "x.safetensors"
    clip_branch = {k: t for k, t in file.items() if "k_img" in k or k.endswith("diff_m")}
    for tensors, message in (
        (clip_branch, r"5 of 5 keys are not of a Wan 2\.2 LoRA, but of Wan 2\.1 I2V"),
        ({**file, f"{Q}.lora_mid.weight": torch.ones(4, 4)}, "1 of 40 keys .*lora_mid"),
        ({**file, "diffusion_model.vace_blocks.0.q.lora_up.weight": torch.ones(4, 4)}, "Wan VACE"),
    ):
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=message):
            read_adapter(path)


# --------------------------------------------------------------------------- values of LoRA files


def lora(**changes: Tensor) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for n, layer in enumerate(("self_attn.q", "self_attn.k", "cross_attn.v", "ffn.2")):
        generator = torch.Generator().manual_seed(n)
        key = f"diffusion_model.blocks.0.{layer}"
        inputs = 512 if layer == "ffn.2" else 128
        tensors[f"{key}.lora_A.weight"] = torch.randn(2, inputs, generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.randn(128, 2, generator=generator)
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
    return {**tensors, **changes}


def with_value(value: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    tensor = torch.ones(128, 2)
    tensor[5, 1] = value
    return tensor.to(dtype)


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{Q}.lora_B.weight": with_value(NAN)}, rf"1 of 12 tensors .*NaN.* such as {Q}\.lora_B"),
        ({f"{Q}.lora_B.weight": with_value(-INFINITY, dtype=torch.bfloat16)}, "1 of 12 tensors"),
        ({f"{Q}.lora_B.weight": with_value(NAN, dtype=torch.float8_e4m3fn)}, "1 of 12 tensors"),
        ({f"{Q}.lora_B.weight": with_value(INFINITY, dtype=torch.float8_e5m2)}, "1 of 12 tensors"),
        (
            {k: torch.full_like(t, NAN) for k, t in lora().items()},
            r"12 of 12 tensors hold .* such as (\S+, ){3}\.\.\.;",
        ),
        ({f"{Q}.alpha": torch.tensor(NAN)}, r"1 of 12 tensors .*q\.alpha"),
        ({f"{Q}.alpha": torch.tensor(INFINITY)}, r"1 of 12 tensors .*q\.alpha"),
        ({f"{Q}.alpha": torch.tensor(1e30)}, r"1 of 4 modules have an impossible alpha: .*1e\+30"),
        ({f"{Q}.diff_b": torch.full((128,), INFINITY)}, r"1 of 13 tensors .*q\.diff_b"),
        (
            {
                f"{Q}.lora_A.weight": torch.empty(0, 128),
                f"{Q}.lora_B.weight": torch.empty(128, 0),
            },
            r"lora_A \[0, 128\] and lora_B \[128, 0\]",
        ),
        ({f"{Q}.dora_scale": torch.ones(7, 1)}, "fits neither 128 outputs nor 128 inputs"),
    ],
)
def test_impossible_values_are_refused_by_merging_and_converting(
    base_file, tmp_path, capsys, changes, message
):
    path, out = tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    save_file(lora(**changes), path)
    with pytest.raises(CheckpointError, match=rf"x\.safetensors: .*{message}"):
        read_adapter(path)
    for arguments in (
        ["convert", str(path), str(out), "--to", "kohya"],
        ["merge", str(base_file), str(path), str(out)],
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert str(path) in error and error.count("\n") == 1 and len(error) < 600
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(("alpha", "words"), [(0.0, "an alpha of 0"), (-1.0, "a negative alpha")])
def test_alphas_without_effect_or_of_the_opposite_sign_are_reported(
    base_file, tmp_path, capsys, alpha, words
):
    path = tmp_path / "x.safetensors"
    save_file(lora(**{f"{Q}.alpha": torch.tensor(alpha)}), path)
    (notice,) = read_adapter(path).notices
    assert f"1 of 4 modules have {words}" in notice and "blocks.0.attn1.to_q" in notice
    assert main(["merge", str(base_file), str(path), str(tmp_path / "m.safetensors")]) == 0
    assert notice in capsys.readouterr().out
    want = by_comfyui(load_file(path), load_file(base_file))
    assert_equal_weights(load_file(tmp_path / "m.safetensors"), want)


@pytest.mark.parametrize(
    "settings",
    [
        '{"r": 2, "lora_alpha": 1e999}',
        '{"r": 2, "lora_alpha": NaN}',
        '{"r": 2, "lora_alpha": 1e300}',
        '{"r": 0, "lora_alpha": 2}',
        '{"r": 2, "lora_alpha": ',
        '{"r": 2, "lora_alpha": [2]}',
        '{"r": 2, "lora_alpha": 2, "alpha_pattern": {"(.*)*(.*)*(.*)*x": 4}}',
        '{"r": 2, "lora_alpha": 2, "rank_pattern": {"(": 4}}',
        '{"a":' * 5000,
    ],
)
def test_impossible_settings_in_the_header_are_refused_at_once(tmp_path, settings):
    tensors = {k: t for k, t in lora().items() if not k.endswith("alpha")}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": settings})
    with pytest.raises(CheckpointError, match=r"x\.safetensors: .*(is damaged|impossible alpha)"):
        read_adapter(tmp_path / "x.safetensors")


# ------------------------------------------------------------------------ both experts in one file


@pytest.fixture
def combined(tmp_path) -> Path:
    """As ai-toolkit writes it with ``split_multistage_loras: false``."""
    tensors = {}
    for stage, factor in (("transformer_1", 1.0), ("transformer_2", -2.0)):
        for key, tensor in lora().items():
            key = key.replace("diffusion_model.", f"diffusion_model.{stage}.")
            tensors[key] = tensor * (factor if "lora_B" in key else 1)
    save_file(tensors, tmp_path / "combined.safetensors")
    return tmp_path / "combined.safetensors"


def test_a_combined_file_is_split_in_two(combined, capsys):
    out = combined.parent / "style.safetensors"
    assert main(["convert", str(combined), str(out), "--to", "comfyui"]) == 0
    assert not out.exists()
    for expert, factor in (("high", 1.0), ("low", -2.0)):
        path = combined.parent / f"style_{expert}_noise.safetensors"
        assert str(path) in capsys.readouterr().out or expert == "low"
        got, want = load_file(path), lora()
        assert got.keys() == want.keys()
        for key, tensor in want.items():
            assert torch.equal(got[key], tensor * (factor if "lora_B" in key else 1))
        assert read_adapter(path).layout.trainer == "onewan"


def test_a_combined_file_is_merged_and_sampled_by_expert(combined, base, base_file):
    high, low = read_adapters(combined)
    assert (high.expert, low.expert) == ("high", "low")
    assert high.layout.trainer == "ai-toolkit"
    plain = load_file(base_file)
    for adapter in (high, low):
        model = copy.deepcopy(base)
        apply_lora(model, adapter.modules, "one")
        file = {
            k.replace(f"transformer_{1 if adapter is high else 2}.", ""): t
            for k, t in load_file(combined).items()
        }
        assert_equal_weights(official_state(model), by_comfyui(file, plain))
    out = combined.parent / "m.safetensors"
    merge(base_file, [(combined, 1.0)], out)  # the base is the high-noise expert by its name
    file = {k.replace("transformer_1.", ""): t for k, t in load_file(combined).items()}
    assert_equal_weights(load_file(out), by_comfyui(file, plain))


def test_one_expert_of_a_combined_file_says_which(combined):
    tensors = {k: t for k, t in load_file(combined).items() if "transformer_1" in k}
    save_file(tensors, combined)
    assert read_adapter(combined).expert == "high"


# ----------------------------------------------------------------------------- the patch embedding


@pytest.mark.parametrize("flat", [False, True], ids=["convolution", "matrices"])
def test_a_lora_on_the_patch_embedding_is_used(base, base_file, tmp_path, flat):
    key = "diffusion_model.patch_embedding"
    down, up = torch.randn(3, 36, 1, 2, 2), torch.randn(128, 3, 1, 1, 1)
    tensors = {
        f"{key}.lora_A.weight": down.flatten(1) if flat else down,
        f"{key}.lora_B.weight": up.flatten(1) if flat else up,
        f"{key}.alpha": torch.tensor(1.5),
    }
    path, out = tmp_path / "x.safetensors", tmp_path / "m.safetensors"
    save_file({**lora(), **tensors}, path)
    plain = load_file(base_file)
    want = by_comfyui(load_file(path), plain)
    assert changed({"p": want["patch_embedding.weight"]}, {"p": plain["patch_embedding.weight"]})
    merge(base_file, [(path, 1.0)], out)
    assert_equal_weights(load_file(out), want)
    adapter = read_adapter(path)
    model = copy.deepcopy(base)
    apply_lora(model, adapter.modules, "one")
    assert_equal_weights(official_state(model), want)

    convert_adapter(path, out, "comfyui")
    again = load_file(out)
    assert all(torch.equal(again[name], tensor) for name, tensor in load_file(path).items())
    convert_adapter(path, out, "diffusers")
    pipeline_part = copy.deepcopy(base)
    WanPipeline.load_lora_into_transformer(
        WanPipeline.lora_state_dict(out, return_lora_metadata=True)[0],
        pipeline_part,
        metadata=WanPipeline.lora_state_dict(out, return_lora_metadata=True)[1],
    )
    layer = pipeline_part.get_submodule("patch_embedding")
    assert isinstance(layer, LoraLayer)
    (name,) = layer.active_adapters
    got = layer.get_delta_weight(name)  # pyright: ignore[reportAttributeAccessIssue]
    delta = want["patch_embedding.weight"] - plain["patch_embedding.weight"].double()
    torch.testing.assert_close(got.double(), delta, rtol=1e-5, atol=1e-5)


def test_a_convolution_that_does_not_fit_is_named(base_file, tmp_path):
    key = "diffusion_model.patch_embedding"
    tensors = {
        f"{key}.lora_A.weight": torch.ones(3, 16, 1, 2, 2),  # of T2V, which has 16 channels
        f"{key}.lora_B.weight": torch.ones(128, 3, 1, 1, 1),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"patch_embedding is \[128, 36, 1, 2, 2\]"):
        merge(base_file, [(tmp_path / "x.safetensors", 1.0)], tmp_path / "m.safetensors")
    assert to_diffusers("patch_embedding") == "patch_embedding"


def test_the_folder_that_diffusion_pipe_writes_is_a_lora(tmp_path, capsys):
    folder = tmp_path / "epoch10_high"
    folder.mkdir()
    tensors = {k: t for k, t in lora().items() if not k.endswith("alpha")}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2}))
    (folder / "config.toml").write_text("epochs = 10\n")
    assert main(["inspect", str(folder)]) == 0
    assert "LoRA for Wan" in capsys.readouterr().out
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(folder), str(out), "--to", "kohya", "--dtype", "float32"]) == 0
    modules = read_adapter(out).modules
    assert len(modules) == 4 and {adapter.scale for adapter in modules.values()} == {1.0}


# ------------------------------------------------------------------------------- values of models


@pytest.mark.parametrize("to", ["single", "fp8_scaled", "official"])
def test_a_model_with_values_that_are_not_finite_is_not_converted(base_file, tmp_path, capsys, to):
    weights = load_file(base_file)
    weights["blocks.0.ffn.0.weight"][3, 4] = NAN
    weights["blocks.0.norm3.bias"][1] = INFINITY
    path, out = tmp_path / "wan_high_noise.safetensors", tmp_path / "out"
    save_file(weights, path)
    if to != "official":
        out = out.with_suffix(".safetensors")
    assert main(["convert", str(path), str(out), "--to", to]) == 1
    error = capsys.readouterr().err
    assert "2 of 42 weights hold values that are NaN or infinite, such as" in error
    assert "blocks.0.ffn.net.0.proj.weight" in error and "blocks.0.norm2.bias" in error
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("quantized", [False, True])
def test_a_model_with_values_that_are_not_finite_is_not_loaded(base_file, tmp_path, quantized):
    path = tmp_path / "wan_high_noise.safetensors"
    name = "blocks.0.ffn.0.weight"
    if quantized:
        convert_model(base_file, path, "fp8_scaled")
    else:
        save_file(load_file(base_file), path)
    WanModelLoader().load({"transformer": path})
    weights = load_file(path)
    weights[name].view(torch.uint8)[0, :4] = 0x7F if quantized else 0xFF
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=r"1 of 42 weights .* such as .*ffn\.net\.0\.proj"):
        WanModelLoader().load({"transformer": path}, dtype=torch.bfloat16)


def test_merging_into_a_damaged_model_is_refused(base_file, tmp_path):
    weights = load_file(base_file)
    weights["blocks.0.self_attn.q.weight"][0, 0] = INFINITY
    path = tmp_path / "wan_high_noise.safetensors"
    save_file(weights, path)
    save_file(lora(), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"1 of 42 weights .*attn1\.to_q\.weight"):
        merge(path, [(tmp_path / "x.safetensors", 1.0)], tmp_path / "m.safetensors")


# ------------------------------------------------------------------------------ starting training


@pytest.mark.parametrize(("experts", "found"), [("both", {"high", "low"}), ("low", {"low"})])
def test_training_starts_from_a_combined_file(combined, experts, found):
    run = combined.parent / "run.yaml"
    run.write_text(
        f"model: {{path: org/model, variant: i2v-a14b, experts: {experts}}}\n"
        "video_data: {sources: [{path: .}]}\n"
        f"method: {{init_from: [{combined.name}]}}\n"
    )
    files = initial_adapters(load_run(run))
    assert files.keys() == found
    assert all(len(file.modules) == 4 for file in files.values())
