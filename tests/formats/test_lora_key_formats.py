"""Adapters of every kind and trainer: read by their definition, written as each program reads them.

The references are diffusers' pipeline, PEFT's own merge, and the published definitions, written out
here once more by the keys of the file (LyCORIS' conventions, which ComfyUI follows).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.adapters import effective_weights
from support.lora_key_lists import LAYERS, TRAINERS, WIDTH, Written
from torch import Tensor

from onewan.adapters.lora import apply_lora
from onewan.checkpoint.saver import AdapterHeader, WanModelSaver, convert_adapter, expert_of
from onewan.errors import CheckpointError
from onewan.formats.adapter import ModuleAdapter
from onewan.formats.container import open_tensors
from onewan.formats.key_maps import to_official
from onewan.formats.lora import LINEARS, WanShape, layout_of
from onewan.formats.lora_files import parse_adapter, read_adapter
from onewan.formats.lora_writing import to_format
from onewan.variants import VARIANTS

HEADER = AdapterHeader(date=datetime(2026, 11, 23, tzinfo=timezone.utc))
MODULE_OF = {
    f"blocks.{n}.{official}": f"blocks.{n}.{diffusers}"
    for n in range(3)
    for official, diffusers, _, _ in LAYERS
}


@pytest.fixture(scope="module")
def folder(tiny_model) -> Path:
    return tiny_model("t2v-a14b")


@pytest.fixture(scope="module")
def base(folder) -> WanTransformer3DModel:
    transformer = WanTransformer3DModel.from_pretrained(folder / "transformer")
    return transformer.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def weight(base) -> Callable[[str], Tensor]:
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    return state.__getitem__


def close(got: Tensor, want: Tensor, bound: float = 1e-5) -> None:
    assert got.shape == want.shape
    assert want.norm() > 0
    assert (got.double() - want.double()).norm() < bound * want.double().norm()


# ------------------------------------------------------------------------------- what others write


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.__name__)
def test_files_of_other_trainers_are_read_as_the_difference_that_they_define(tmp_path, trainer):
    written: Written = trainer()
    path = tmp_path / "x.safetensors"
    save_file(written.tensors, path, written.metadata)
    adapter = read_adapter(path)
    assert adapter.modules.keys() == written.deltas.keys()
    for module, want in written.deltas.items():
        got = adapter.modules[module].difference()
        assert got is not None and got.dtype == torch.float32
        close(got, want, 1e-6)
    assert adapter.layout.key_format == written.key_format
    assert adapter.layout.trainer == written.trainer
    assert adapter.expert == written.expert
    assert adapter.metadata == written.metadata


def test_every_key_format_of_a_layer_is_recognized(tmp_path):
    """Each prefix with each world's names, for each of the ten layers."""
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    for prefix in ("diffusion_model.", "transformer.", "lora_unet_", "lora_transformer_",
                   "lycoris_", "base_model.model.", "pipe.dit.", ""):  # fmt: skip
        for names in (0, 1):
            tensors: dict[str, Tensor] = {}
            for layer in LAYERS:
                name = f"blocks.7.{layer[names]}"
                name = name.replace(".", "_") if prefix.endswith("_") else name
                tensors[f"{prefix}{name}.lora_down.weight"] = down.clone()
                tensors[f"{prefix}{name}.lora_up.weight"] = up.clone()
            save_file(tensors, tmp_path / "x.safetensors")
            adapter = read_adapter(tmp_path / "x.safetensors")
            assert adapter.modules.keys() == {f"blocks.7.{name}" for name in LINEARS}
            assert adapter.layout.names == ("official", "diffusers")[names]
            assert adapter.layout.experts == ()


def test_the_layout_is_found_without_reading_tensors(tmp_path):
    written = TRAINERS[0]()
    save_file(written.tensors, tmp_path / "x.safetensors")
    file = open_tensors(tmp_path / "x.safetensors")
    layout = layout_of(file.tensors, file.metadata)
    assert layout is not None
    assert set(layout.kinds.values()) == {"lora"} and set(layout.ranks.values()) == {4}
    assert (
        layout.modules["blocks.0.ffn.net.2"]["lora_A"]
        == "lora_unet_blocks_0_ffn_2.lora_down.weight"
    )
    assert layout_of({"blocks.0.ffn.0.weight": file.tensors[next(iter(file.tensors))]}, {}) is None


def test_differences_of_norms_biases_and_tables_are_converted_or_refused(tmp_path, base, weight):
    """Differences as LyCORIS and distillations have them, beside a LoRA; merged by apply_lora."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {
        "diffusion_model.blocks.0.norm3.diff": random(64),
        "diffusion_model.blocks.0.norm3.diff_b": random(64),
        "diffusion_model.blocks.1.self_attn.norm_q.diff": random(64),
        "diffusion_model.blocks.1.modulation.diff": random(1, 6, 64),
        "diffusion_model.blocks.2.self_attn.q.diff_b": random(64),
        "diffusion_model.blocks.2.self_attn.q.lora_A.weight": random(2, 64),
        "diffusion_model.blocks.2.self_attn.q.lora_B.weight": random(64, 2),
        "diffusion_model.head.head.diff_b": random(64),
        "diffusion_model.patch_embedding.diff": random(*weight("patch_embedding.weight").shape),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = read_adapter(tmp_path / "x.safetensors")
    model = copy.deepcopy(base)
    apply_lora(model, adapter.modules, "one")
    got = effective_weights(model)
    q = "diffusion_model.blocks.2.self_attn.q"
    added = {
        "blocks.0.norm2.weight": tensors["diffusion_model.blocks.0.norm3.diff"],
        "blocks.0.norm2.bias": tensors["diffusion_model.blocks.0.norm3.diff_b"],
        "blocks.1.attn1.norm_q.weight": tensors["diffusion_model.blocks.1.self_attn.norm_q.diff"],
        "blocks.1.scale_shift_table": tensors["diffusion_model.blocks.1.modulation.diff"],
        "blocks.2.attn1.to_q.weight": tensors[f"{q}.lora_B.weight"] @ tensors[f"{q}.lora_A.weight"],
        "blocks.2.attn1.to_q.bias": tensors[f"{q}.diff_b"],
        "proj_out.bias": tensors["diffusion_model.head.head.diff_b"],
        "patch_embedding.weight": tensors["diffusion_model.patch_embedding.diff"],
    }
    assert got.keys() == base.state_dict().keys()
    for name, want in added.items():
        close(got[name] - weight(name), want)
    assert all(torch.equal(got[n], weight(n)) for n in got if n not in added)

    convert_adapter(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "comfyui")
    again = load_file(tmp_path / "y.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: .* table.*comfyui"):
        convert_adapter(tmp_path / "x.safetensors", tmp_path / "z.safetensors", "kohya")
    with pytest.raises(CheckpointError, match="is a plain difference, which diffusers"):
        convert_adapter(tmp_path / "x.safetensors", tmp_path / "z.safetensors", "diffusers")


def test_a_file_with_both_experts_is_read_one_expert_at_a_time(tmp_path):
    down, high, low = torch.ones(2, 8), torch.ones(8, 2), torch.full((8, 2), 2.0)
    tensors = {}
    for prefix, up in (("transformer.", high), ("transformer_2.", low)):
        start = f"{prefix}blocks.0.attn1.to_q"
        tensors |= {f"{start}.lora_A.weight": down.clone(), f"{start}.lora_B.weight": up}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: holds the LoRAs of both experts"):
        read_adapter(path)
    for expert, up in (("high", high), ("low", low)):
        adapter = read_adapter(path, expert)
        assert adapter.expert == expert
        assert torch.equal(adapter.modules["blocks.0.attn1.to_q"].tensors["lora_B"], up)
        convert_adapter(path, tmp_path / "y.safetensors", "comfyui", expert=expert)
        with safe_open(tmp_path / "y.safetensors", "pt") as file:
            assert file.metadata()["onewan.expert"] == expert
    variant = VARIANTS["t2v-a14b"]
    assert expert_of(Path("high.safetensors"), {}, variant, "low").name == "low"


# -------------------------------------------------------------------------------------- round trips


def partial(dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A LoRA with ComfyUI's keys on some layers, ranks and alphas all different, and by module
    of diffusers what it adds."""
    generator = torch.Generator().manual_seed(21)
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    chosen = [n for i, n in enumerate(MODULE_OF) if i % 3 != 1 and not n.startswith("blocks.1.")]
    sizes = {official: (out, into) for official, _, out, into in LAYERS}
    for i, official in enumerate(chosen):
        out, into = sizes[official.split(".", 2)[2]]
        rank = 1 + i % 4
        # In bfloat16 diffusers rounds alpha/rank times the weights, but for powers of two.
        alpha = rank * 2.0 ** (i % 3 - 1) if dtype == torch.bfloat16 else 0.3 + i
        down = torch.randn(rank, into, generator=generator).mul(0.3).to(dtype)
        up = torch.randn(out, rank, generator=generator).mul(0.3).to(dtype)
        start = f"diffusion_model.{official}"
        tensors |= {f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}
        tensors[f"{start}.alpha"] = torch.tensor(alpha)
        deltas[MODULE_OF[official]] = tensors[f"{start}.alpha"] / rank * (up.float() @ down.float())
    return tensors, deltas


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_converting_through_all_formats_keeps_the_bits_and_diffusers_loads_each(
    tmp_path, folder, base, weight, dtype
):
    tensors, deltas = partial(dtype)
    paths = [tmp_path / f"{n}.safetensors" for n in range(4)]
    header = {"ss_note": "kept", "modelspec.title": "mine", "format": "pt", "onewan.rank": "9"}
    save_file(tensors, paths[0], header)
    for source, target, to in zip(
        paths[:3], paths[1:], ("kohya", "diffusers", "comfyui"), strict=True
    ):
        assert convert_adapter(source, target, to, base=weight) == []
        assert read_adapter(target).layout.key_format == to
        with safe_open(target, "pt") as file:
            assert file.metadata()["ss_note"] == "kept"
            assert "onewan.rank" not in file.metadata()  # they differ
            assert file.metadata()["modelspec.title"] == "mine"
            assert file.metadata()["modelspec.architecture"] == "WAN-2.2/lora"
    again = load_file(paths[-1])
    assert again.keys() == tensors.keys()
    for name, want in tensors.items():
        assert again[name].dtype == want.dtype and torch.equal(again[name], want)
    kohya = load_file(paths[1])
    assert len(kohya) == 3 * 10 * 3  # each module of each block: down, up, alpha

    for path in paths:
        pipeline = WanPipeline.from_pretrained(
            folder, text_encoder=None, tokenizer=None, vae=None, transformer_2=None
        )
        pipeline.load_lora_weights(path.parent, weight_name=path.name)
        pipeline.fuse_lora()
        fused = pipeline.transformer.state_dict()
        for name, plain in base.state_dict().items():
            module = name.removesuffix(".weight")
            key = name if name in fused else f"{module}.base_layer.weight"
            if ".bias" in name and key not in fused:
                key = name.replace(".bias", ".base_layer.bias")
            if module in deltas:
                # float32 next to weights of this size; merging works in the adapter's precision.
                close(fused[key] - plain, deltas[module], 1e-5 if dtype == torch.float32 else 8e-3)
            else:
                assert torch.equal(fused[key], plain)


def test_kohya_files_have_every_layer_of_the_model(tmp_path, weight):
    start = "diffusion_model.blocks.2.self_attn.q"
    path, out = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    for width, ffn, layers in ((5120, 13824, 40), (3072, 14336, 30)):
        down, up = torch.ones(2, width, dtype=torch.bfloat16), torch.ones(width, 2).bfloat16()
        save_file({f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}, path)
        convert_adapter(path, out, "kohya")
        header = open_tensors(out).tensors
        assert len(header) == layers * 10 * 3
        for n in range(layers):
            for official, _, out_scale, in_scale in LAYERS:
                rows, columns = (ffn if size != WIDTH else width for size in (out_scale, in_scale))
                name = f"lora_unet_blocks_{n}_{official.replace('.', '_')}"
                rank = 2 if (n, official) == (2, "self_attn.q") else 1
                assert header[f"{name}.lora_down.weight"].shape == (rank, columns)
                assert header[f"{name}.lora_up.weight"].shape == (rows, rank)
                assert header[f"{name}.lora_up.weight"].dtype == "BF16"
        modules = read_adapter(out).modules
        assert {module: adapter.alpha for module, adapter in modules.items()} == {
            "blocks.2.attn1.to_q": 2.0
        }
    tiny = {
        f"{start}.lora_A.weight": torch.ones(2, 64),
        f"{start}.lora_B.weight": torch.ones(64, 2),
    }
    save_file(tiny, path)
    with pytest.raises(CheckpointError, match=r"width 64, which no Wan 2\.2.*give --base"):
        convert_adapter(path, out, "kohya")
    convert_adapter(path, out, "kohya", base=weight)
    assert len(open_tensors(out).tensors) == 3 * 10 * 3


def test_conversion_keeps_the_precision_unless_a_dtype_is_given(tmp_path):
    tensors, _ = partial(torch.bfloat16)
    path, out = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    save_file(tensors, path)
    convert_adapter(path, out, "comfyui", dtype=torch.float32)
    again = load_file(out)
    for name, tensor in tensors.items():
        assert again[name].dtype == torch.float32 and torch.equal(again[name], tensor.float())


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 0.0), (torch.float32, 1e-7)], ids=["powers of 2", "any"]
)
def test_no_alpha_writes_the_same_difference_without_alphas(tmp_path, dtype, bound):
    tensors, deltas = partial(dtype)
    path, out = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    save_file(tensors, path, {"onewan.alpha": "9", "ss_network_alpha": "9", "ss_note": "kept"})
    convert_adapter(path, out, "no_alpha")
    written = load_file(out)
    assert written.keys() == {name for name in tensors if not name.endswith(".alpha")}
    with safe_open(out, "pt") as file:
        header = file.metadata()
    assert header["onewan.format"] == "no_alpha" and header["ss_note"] == "kept"
    assert not {"onewan.alpha", "ss_network_alpha"} & header.keys()
    for official, module in MODULE_OF.items():
        if module in deltas:
            start = f"diffusion_model.{official}"
            up, down = written[f"{start}.lora_B.weight"], written[f"{start}.lora_A.weight"]
            assert up.dtype == down.dtype == dtype
            assert torch.equal(down, tensors[f"{start}.lora_A.weight"])
            added, want = up.float() @ down.float(), deltas[module]
            assert (added - want).norm() <= bound * want.norm(), module
    again = read_adapter(out).modules
    assert again.keys() == deltas.keys() and all(a.scale == 1 for a in again.values())


def test_no_alpha_is_refused_where_it_can_not_say_the_same(tmp_path, weight):
    tensors, _ = partial(torch.float16)
    path, out = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    start = "diffusion_model.blocks.0.self_attn.q"
    save_file({**tensors, f"{start}.alpha": torch.tensor(1e6)}, path)
    with pytest.raises(
        CheckpointError, match=r"x.saf.*to_q.lora_B: .* too large for torch.float16"
    ):
        convert_adapter(path, out, "no_alpha")
    save_file({**tensors, f"{start}.diff_b": torch.ones(WIDTH)}, path)
    with pytest.raises(CheckpointError, match="to_q: is LoRA and changes a bias too, but"):
        convert_adapter(path, out, "no_alpha")
    save_file({f"{start}.diff": torch.ones(WIDTH, WIDTH)}, path)
    with pytest.raises(CheckpointError, match=r"to_q: is a plain difference, but .* as comfyui"):
        convert_adapter(path, out, "no_alpha", base=weight)
    assert not out.exists()


# ------------------------------------------------------------------------------------ PEFT's kinds


def defined(file: dict[str, Tensor], start: str, weight: Tensor) -> Tensor:
    """What the tensors under `start` add to `weight`, by the definition that ComfyUI follows."""
    part = {k.removeprefix(start + "."): v.double() for k, v in file.items() if k.startswith(start)}
    weight = weight.double()
    alpha = part.get("alpha")
    for down, up in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
        if f"{down}.weight" in part:
            a, b = part[f"{down}.weight"], part[f"{up}.weight"]
            return (1.0 if alpha is None else alpha / len(a)) * b @ a
    if "hada_w1_a" in part:
        scale = 1.0 if alpha is None else alpha / len(part["hada_w1_b"])
        first, second = (part[f"hada_w{n}_a"] @ part[f"hada_w{n}_b"] for n in (1, 2))
        return scale * first * second
    if any(name.startswith("lokr") for name in part):
        scale, factors = 1.0, []
        for n in (1, 2):
            if f"lokr_w{n}" in part:
                factors.append(part[f"lokr_w{n}"])
                continue
            left, right = part[f"lokr_w{n}_a"], part[f"lokr_w{n}_b"]
            factors.append(left @ right)
            scale = 1.0 if alpha is None else float(alpha) / len(right)
        product = factors[0][:, None, :, None] * factors[1][None, :, None, :]
        return scale * product.reshape(weight.shape)
    if "oft_blocks" in part:
        size = part["oft_blocks"].shape[-1]
        turned = []
        for n, block in enumerate(part["oft_blocks"]):
            q, one = block - block.T, torch.eye(size, dtype=torch.float64)
            rotation = (one + q) @ torch.linalg.inv(one - q)
            turned.append(rotation.T @ weight[n * size : (n + 1) * size])
        return torch.cat(turned) - weight
    return part["diff"]


TARGETS = ["attn1.to_q", "attn2.to_k", "ffn.net.0.proj", "ffn.net.2"]
PEFT_KINDS = {
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "lora-patterns": LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=TARGETS,
        rank_pattern={"attn1.to_q": 2},
        alpha_pattern={"blocks.1.attn2.to_k": 5},
    ),
    "rslora": LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=TARGETS),
    "dora": LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=TARGETS),
    "loha": LoHaConfig(r=3, alpha=5, target_modules=TARGETS),
    "lokr-full": LoKrConfig(r=64, alpha=48, target_modules=TARGETS),
    "lokr": LoKrConfig(r=3, alpha=5, decompose_factor=4, target_modules=TARGETS),
    "lokr-both": LoKrConfig(r=2, alpha=5, decompose_both=True, target_modules=TARGETS),
    "oft": OFTConfig(oft_block_size=8, target_modules=TARGETS),
    "oft-exact": OFTConfig(oft_block_size=16, use_cayley_neumann=False, target_modules=TARGETS),
    "oft-3": OFTConfig(oft_block_size=8, num_cayley_neumann_terms=3, target_modules=TARGETS),
    "oft-shared": OFTConfig(oft_block_size=8, block_share=True, target_modules=TARGETS),
}
NATIVE = ("lora", "lora-patterns", "rslora", "loha", "lokr-full", "lokr", "lokr-both")


@pytest.fixture(scope="module")
def trained(base):
    """(PEFT's tensors, its settings, what it adds by module) of each kind, far from zero."""
    cache: dict[str, tuple] = {}

    def make(kind: str):
        if kind not in cache:
            model = get_peft_model(copy.deepcopy(base), copy.deepcopy(PEFT_KINDS[kind]))
            generator = torch.Generator().manual_seed(31)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    magnitude = "magnitude" in name
                    parameter.data = (
                        parameter.data * (1 + 0.3 * noise) if magnitude else 0.2 * noise
                    )
            state = {n: t.clone() for n, t in get_peft_model_state_dict(model).items()}
            settings = PEFT_KINDS[kind].to_dict()
            merged = model.merge_and_unload().state_dict()
            deltas = {
                name.removesuffix(".weight"): merged[name] - plain
                for name, plain in base.state_dict().items()
                if not torch.equal(merged[name], plain)
            }
            assert len(deltas) == 3 * len(TARGETS)
            cache[kind] = state, settings, deltas
        return cache[kind]

    return make


@pytest.mark.parametrize("format", ["comfyui", "kohya"])
@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_exported_files_define_what_peft_merges(tmp_path, trained, weight, kind, format):
    state, settings, deltas = trained(kind)
    path = tmp_path / "x.safetensors"
    modules = parse_adapter(state, settings, source="PEFT")
    shape = WanShape(width=64, ffn_width=256, num_layers=3)
    if kind not in NATIVE:
        with pytest.raises(CheckpointError, match="give --base"):
            WanModelSaver().save_adapter(modules, path, format, HEADER, shape=shape)
    notices = WanModelSaver().save_adapter(modules, path, format, HEADER, shape=shape, base=weight)
    assert bool(notices) == (kind not in ("lora", "lora-patterns", "rslora"))
    assert any("plain differences" in notice for notice in notices) == (kind not in NATIVE)
    file, adapter = load_file(path), read_adapter(path)
    if kind in NATIVE:
        assert not any(key.endswith(".diff") for key in file)
    assert adapter.modules.keys() == deltas.keys()
    for module, want in deltas.items():
        official = to_official(module)
        prefix = {"comfyui": "diffusion_model.", "kohya": "lora_unet_"}[format]
        start = prefix + (official.replace(".", "_") if format == "kohya" else official)
        plain = weight(f"{module}.weight")
        close(defined(file, start, plain), want, 3e-6)
        got = adapter.modules[module].difference(plain)
        assert got is not None
        close(got, want, 3e-6)


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_any_kind_can_be_applied_for_sampling(tmp_path, trained, base, weight, kind):
    """A folder as PEFT saves it, with its settings beside the weights."""
    state, settings, deltas = trained(kind)
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings, default=sorted))
    adapter = read_adapter(tmp_path)
    assert adapter.layout.trainer == "PEFT"
    model = copy.deepcopy(base)
    apply_lora(model, adapter.modules, "one")
    for module, want in deltas.items():
        close(effective_weights(model)[f"{module}.weight"] - weight(f"{module}.weight"), want)


@pytest.mark.parametrize("kind", ["lora", "lora-patterns", "rslora", "dora"])
def test_diffusers_merges_the_same_difference_as_peft(tmp_path, trained, folder, weight, kind):
    state, settings, deltas = trained(kind)
    path = tmp_path / "x.safetensors"
    modules = parse_adapter(state, settings, source="PEFT")
    WanModelSaver().save_adapter(modules, path, "diffusers", HEADER)
    pipeline = WanPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None, vae=None)
    pipeline.load_lora_weights(tmp_path, weight_name=path.name)
    pipeline.fuse_lora()
    for module, want in deltas.items():
        layer = pipeline.transformer.get_submodule(module)
        close(layer.get_base_layer().weight - weight(f"{module}.weight"), want)
    adapter = read_adapter(path)
    for module, want in deltas.items():
        got = adapter.modules[module].difference(weight(f"{module}.weight"))
        assert got is not None
        close(got, want)


def test_biases_of_peft_are_scaled(tmp_path, folder, base):
    """PEFT's ``lora_bias``: alpha/rank times, as ``diff_b`` in a file for ComfyUI."""
    config = LoraConfig(r=4, lora_alpha=6, lora_bias=True, target_modules=["attn1.to_q"])
    model = get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(8)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2, generator=generator)
    state = get_peft_model_state_dict(model)
    modules = parse_adapter(state, config.to_dict(), source="PEFT")
    path = tmp_path / "x.safetensors"
    WanModelSaver().save_adapter(modules, path, "comfyui", HEADER)
    with pytest.raises(CheckpointError, match="changes a bias too"):
        WanModelSaver().save_adapter(modules, path, "diffusers", HEADER)
    merged = model.merge_and_unload().state_dict()
    pipeline = WanPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None, vae=None)
    pipeline.load_lora_weights(tmp_path, weight_name=path.name)
    pipeline.fuse_lora()
    ours = copy.deepcopy(base)
    apply_lora(ours, read_adapter(path).modules, "one")
    for n in range(3):
        name = f"blocks.{n}.attn1.to_q"
        layer = pipeline.transformer.get_submodule(name).get_base_layer()
        for part in ("weight", "bias"):
            plain = base.state_dict()[f"{name}.{part}"]
            want = merged[f"{name}.{part}"] - plain
            close(getattr(layer, part) - plain, want)
            close(effective_weights(ours)[f"{name}.{part}"] - plain, want)


@pytest.mark.parametrize("kind", ["loha", "lokr", "oft"])
def test_the_diffusers_format_refuses_kinds_other_than_lora_and_dora(tmp_path, trained, kind):
    state, settings, _ = trained(kind)
    with pytest.raises(CheckpointError, match=r"which diffusers reads in no key format.*comfyui"):
        modules = parse_adapter(state, settings, source="PEFT")
        WanModelSaver().save_adapter(modules, tmp_path / "x.safetensors", "diffusers", HEADER)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------- LyCORIS' kinds, by hand


def test_lycoris_oft_rotates_outputs_and_alpha_bounds_it(tmp_path, weight):
    blocks = torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(4)) * 0.1
    start, module = "diffusion_model.blocks.0.self_attn.q", "blocks.0.attn1.to_q"
    path, out = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    plain = weight(f"{module}.weight")
    for alpha in (None, 1e6, 0.5):
        tensors = {f"{start}.oft_blocks": blocks.clone()}
        if alpha is not None:
            tensors[f"{start}.alpha"] = torch.tensor(alpha)
        save_file(tensors, path)
        adapter = read_adapter(path).modules[module]
        with pytest.raises(ValueError, match="depends on the weight"):
            adapter.difference()
        shrunk = dict(tensors)
        if alpha == 0.5:
            length = (blocks - blocks.transpose(1, 2)).norm()
            assert length > alpha
            shrunk[f"{start}.oft_blocks"] = blocks * alpha / length
        got = adapter.difference(plain)
        assert got is not None
        close(got, defined(shrunk, start, plain), 2e-5)
        lengths = (plain + got).norm(dim=0)  # a rotation keeps them
        torch.testing.assert_close(lengths, plain.norm(dim=0))
        convert_adapter(path, out, "kohya")
        convert_adapter(out, path, "comfyui")
        again = load_file(path)
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("shape", [(64,), (64, 1), (1, 64)])
def test_dora_magnitudes_by_output_and_by_input_are_read(tmp_path, weight, shape):
    generator = torch.Generator().manual_seed(5)
    start, module = "diffusion_model.blocks.0.self_attn.q", "blocks.0.attn1.to_q"
    tensors = {
        f"{start}.lora_A.weight": torch.randn(4, 64, generator=generator) * 0.2,
        f"{start}.lora_B.weight": torch.randn(64, 4, generator=generator) * 0.2,
        f"{start}.alpha": torch.tensor(3.0),
        f"{start}.dora_scale": torch.rand(shape, generator=generator) + 0.5,
    }
    path, out = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    save_file(tensors, path)
    plain = weight(f"{module}.weight").double()
    down, up = (tensors[f"{start}.lora_{side}.weight"].double() for side in "AB")
    whole = plain + 0.75 * up @ down
    by_input = shape == (1, 64)
    for i in range(64):
        line = whole[:, i] if by_input else whole[i]
        line *= tensors[f"{start}.dora_scale"].reshape(-1)[i].double() / line.square().sum().sqrt()
    got = read_adapter(path).modules[module].difference(plain.float())
    assert got is not None
    close(got, whole - plain, 1e-6)
    notices = convert_adapter(path, out, "comfyui", base=weight)
    again = load_file(out)
    if by_input:  # which ComfyUI applies by its definition
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[name], tensors[name]) for name in tensors)
        with pytest.raises(CheckpointError, match="DoRA by inputs, which diffusers"):
            convert_adapter(path, out, "diffusers")
    else:
        assert again.keys() == {f"{start}.diff"}
        close(again[f"{start}.diff"], whole - plain, 1e-6)
        assert "1.64e-05 GB" in notices[0]
        convert_adapter(path, out, "diffusers")
        assert f"transformer.{module}.lora_magnitude_vector" in load_file(out)


def test_the_diffusers_format_refuses_lora_beside_dora(tmp_path):
    tensors: dict[str, Tensor] = {}
    for n in (0, 1):
        start = f"diffusion_model.blocks.{n}.self_attn.q"
        tensors[f"{start}.lora_A.weight"] = torch.ones(2, 8)
        tensors[f"{start}.lora_B.weight"] = torch.ones(8, 2)
    tensors["diffusion_model.blocks.1.self_attn.q.dora_scale"] = torch.ones(8)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="LoRA in some modules and DoRA in others"):
        convert_adapter(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "diffusers")


def test_official_keys_are_comfyuis_without_their_prefix(tmp_path):
    start = "lora_unet_blocks_1_self_attn_q"
    tensors = {f"{start}.lora_{end}.weight": torch.ones(4, 4) for end in ("down", "up")}
    modules = parse_adapter(tensors, source="memory")
    keys: dict[str, set[str]] = {}
    for format in ("comfyui", "official"):
        path = tmp_path / f"{format}.safetensors"
        WanModelSaver().save_adapter(modules, path, format, HEADER)
        keys[format] = set(load_file(path))
        assert read_adapter(path).modules.keys() == {"blocks.1.attn1.to_q"}
    assert keys["official"] == {k.removeprefix("diffusion_model.") for k in keys["comfyui"]}
    assert keys["official"] == {f"blocks.1.self_attn.q.lora_{which}.weight" for which in "AB"}


def test_a_dora_that_becomes_a_difference_keeps_its_bias(weight):
    """ComfyUI has no keys for the magnitude by output, but for the bias beside it."""
    module = "blocks.0.attn1.to_q"
    bias = torch.arange(64.0)
    tensors = {"lora_A": torch.ones(2, 64), "lora_B": torch.ones(64, 2), "diff_b": bias}
    tensors["magnitude"] = weight(f"{module}.weight").norm(dim=1)
    dora = ModuleAdapter(kind="dora", tensors=tensors)
    written = to_format({module: dora}, "comfyui", base=weight).tensors
    key = "diffusion_model.blocks.0.self_attn.q"
    assert written.keys() == {f"{key}.diff", f"{key}.diff_b"}
    assert torch.equal(written[f"{key}.diff_b"], bias)
