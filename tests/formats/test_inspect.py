"""`onewan inspect`: what it says of models, adapters, other models' files and rubbish."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from onewan.checkpoint.inspect import Inspection, inspect
from onewan.checkpoint.model_files import read_model
from onewan.checkpoint.saver import WanModelSaver
from onewan.cli import main
from onewan.errors import CheckpointError
from onewan.formats.embedding import read_embedding
from onewan.formats.key_maps import to_official, transformer_names
from onewan.formats.weights import open_component
from onewan.model.embedding import WanModelEmbedding
from onewan.model.load import WanModelLoader


def official(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a diffusers component folder under official names."""
    [file] = folder.glob("*.safetensors")
    return {to_official(name): tensor for name, tensor in load_file(file).items()}


def read_by(report: Inspection) -> dict[str, bool]:
    return {program.name: program.reads for program in report.programs}


def wide(changes: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Weights of a transformer of width 128 (one head), one block, by official names."""
    shapes: dict[str, tuple[int, ...]] = {"patch_embedding.weight": (128, 16, 1, 2, 2)}
    tensors = {}
    for name in transformer_names(1):
        default = (128, 128) if name.endswith("weight") and ".norm" not in name else (128,)
        tensors[to_official(name)] = torch.zeros(shapes.get(name, default), dtype=torch.float16)
    tensors |= {
        "head.head.weight": torch.zeros(64, 128),
        "text_embedding.0.weight": torch.zeros(128, 32),
        "time_embedding.0.weight": torch.zeros(128, 256),
        "blocks.0.ffn.0.weight": torch.zeros(512, 128),
    }
    return tensors | (changes or {})


def test_fun_control_is_recognized_by_its_reference_layer(tiny_model):
    report = inspect(tiny_model("fun-control-a14b"))
    assert (report.kind, report.variant, report.problems) == ("model", "fun-control-a14b", ())
    assert report.summary == "Wan 2.2 Fun-Control-A14B, diffusers layout"
    (high,) = (c for c in report.components if c.path.name == "transformer")
    assert not read_by(high)["diffusers"]


def test_a_whole_model_in_the_diffusers_layout_is_described(tiny_model):
    report = inspect(tiny_model("i2v-a14b"))
    assert (report.kind, report.variant, report.problems) == ("model", "i2v-a14b", ())
    # The inputs of both are the same.
    assert report.summary == "Wan 2.2 I2V-A14B or Fun-InP-A14B, diffusers layout"
    parts = {c.path.name: c for c in report.components}
    assert parts.keys() == {"transformer", "transformer_2", "vae", "text_encoder"}
    assert parts["transformer"].expert == "high" and parts["transformer_2"].expert == "low"
    assert parts["transformer"].expert_source == "folder"
    assert all(read_by(c)["diffusers"] for c in parts.values())
    assert not read_by(parts["transformer"])["ComfyUI"] and not read_by(parts["vae"])["ComfyUI"]
    config = json.loads((tiny_model("i2v-a14b") / "transformer" / "config.json").read_text())
    assert parts["transformer"].config["num_layers"] == config["num_layers"]
    count = sum(t.numel() for t in official(tiny_model("i2v-a14b") / "transformer").values())
    assert parts["transformer"].parameters == count


def test_missing_components_of_a_model_are_listed(tiny_model, tmp_path):
    for name in ("transformer", "vae"):
        (tmp_path / name).symlink_to(tiny_model("t2v-a14b") / name)
    report = inspect(tmp_path)
    assert report.problems == ("has no transformer_2", "has no text_encoder", "has no tokenizer")


def test_components_that_do_not_fit_are_reported_as_the_loader_refuses_them(tiny_model, tmp_path):
    for name in ("transformer", "transformer_2", "text_encoder", "tokenizer"):
        (tmp_path / name).symlink_to(tiny_model("t2v-a14b") / name)
    (tmp_path / "vae").symlink_to(tiny_model("ti2v-5b") / "vae")
    (problem,) = inspect(tmp_path).problems
    for read in (WanModelLoader().load, read_model):
        with pytest.raises(CheckpointError) as refusal:
            read(tmp_path)
        assert str(refusal.value) == problem
    assert problem.startswith(f"{tmp_path / 'vae'}: is a VAE with 48 latent channels, but t2v-a14b")


def test_a_whole_model_in_the_official_layout_is_described(shared):
    report = inspect(shared / "golden" / "ti2v-5B")
    assert report.summary == "Wan 2.2 TI2V-5B, official layout" and not report.problems
    parts = {c.kind: c for c in report.components}
    assert parts.keys() == {"transformer", "vae", "text_encoder"}
    assert parts["vae"].summary == "Wan 2.2 VAE, of TI2V-5B"
    assert parts["transformer"].expert == "single"
    assert all(read_by(c)["the official code"] for c in parts.values())


@pytest.mark.parametrize(
    ("prefix", "comfyui"),
    [("", True), ("model.diffusion_model.", True), ("diffusion_model.", False)],
)
def test_a_single_file_is_described_with_the_programs_that_read_it(tmp_path, prefix, comfyui):
    path = tmp_path / "wan2.2_t2v_low_noise_14B_fp16.safetensors"
    save_file({prefix + n: t for n, t in wide().items()}, path, {"modelspec.title": "A title"})
    report = inspect(path)
    assert (report.kind, report.variant, report.expert) == ("transformer", "t2v-a14b", "low")
    assert (report.expert_source, report.prefix, report.key_format) == ("name", prefix, "official")
    assert read_by(report)["ComfyUI"] is comfyui
    assert report.dtypes.keys() == {"F16", "F32"}
    text = "\n".join(report.lines())
    assert "T2V-A14B, for the low-noise expert (by its name)" in text
    assert "modelspec.title = A title" in text


def test_an_expert_without_header_or_name_is_reported_as_either(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(wide(), path)
    assert inspect(path).expert is None
    assert "neither its header nor its name says" in inspect(path).summary
    save_file(wide(), path, {"onewan.expert": "high"})
    assert inspect(path).expert == "high" and inspect(path).expert_source == "header"


SCALED = "blocks.0.self_attn.q"
FP8 = {f"{SCALED}.weight": torch.zeros(128, 128, dtype=torch.float8_e4m3fn)}
NOTE = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
ONE, MARKER = torch.ones(()), torch.zeros(0, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("extra", "metadata", "comfyui"),
    [
        ({f"{SCALED}.scale_weight": ONE, "scaled_fp8": MARKER}, {}, True),
        ({f"{SCALED}.scale_weight": ONE}, {}, False),
        ({f"{SCALED}.scale_weight": torch.ones(128, 1), "scaled_fp8": MARKER}, {}, False),
        ({f"{SCALED}.weight_scale": ONE, f"{SCALED}.comfy_quant": NOTE}, {}, True),
        ({f"{SCALED}.weight_scale": ONE}, {}, False),
        (
            {f"{SCALED}.weight_scale": ONE},
            {
                "_quantization_metadata": json.dumps(
                    {"layers": {SCALED: {"format": "float8_e4m3fn"}}}
                )
            },
            True,
        ),
    ],
)
def test_comfyui_reads_fp8_scaled_only_with_its_own_keys_and_metadata(
    tmp_path, extra, metadata, comfyui
):
    path = tmp_path / "x_high_noise.safetensors"
    save_file(wide(FP8 | extra), path, metadata)
    report = inspect(path)
    assert report.quantization == "fp8_scaled" and not report.problems
    assert read_by(report)["ComfyUI"] is comfyui
    assert not read_by(report)["diffusers"]  # loads them without the scales: wrong weights


def test_an_unknown_quantization_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    note = torch.frombuffer(bytearray(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    extra = {f"{SCALED}.weight_scale": ONE, f"{SCALED}.comfy_quant": note}
    save_file(wide(FP8 | extra), path)
    with pytest.raises(CheckpointError, match="quantized as nvfp4, which is not supported"):
        open_component(path)
    save_file(wide({f"{SCALED}.weight": torch.zeros(128, 128, dtype=torch.int8)}), path)
    with pytest.raises(CheckpointError, match="is stored as I8, an unsupported quantization"):
        open_component(path)


def test_missing_and_unexpected_keys_are_listed(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = wide({"more": torch.zeros(1)})
    del tensors["blocks.0.self_attn.k.weight"]
    save_file(tensors, path)
    missing, unexpected = inspect(path).problems
    assert missing == "has 1 missing keys, such as blocks.0.attn1.to_k.weight"
    assert unexpected == "has 1 unexpected keys, such as more"


def lora(
    prefix: str, alpha: float | None, *, rank: int = 4, modules: int = 10, width: int = 5120
) -> dict[str, torch.Tensor]:
    names = [n for n in sorted(transformer_names(1)) if n.startswith("blocks.")]
    linears = [n.removesuffix(".weight") for n in names if n.endswith("weight") and "norm" not in n]
    assert len(linears) == 10
    tensors = {}
    for name in linears[:modules]:
        key = prefix + to_official(name)
        tensors[f"{key}.lora_A.weight"] = torch.zeros(rank, width)
        tensors[f"{key}.lora_B.weight"] = torch.zeros(width, rank)
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha, dtype=torch.bfloat16)
    return tensors


def test_a_lora_is_described(tmp_path):
    path = tmp_path / "style-HighNoise.safetensors"
    save_file(lora("diffusion_model.", 2.0), path)
    report = inspect(path)
    assert (report.kind, report.expert, report.key_format) == ("adapter", "high", "comfyui")
    assert report.variant is None and "which have the same layers" in report.summary
    assert report.adapter["rank"] == "4" and report.adapter["alpha"] == "2"
    assert report.adapter["modules"] == 10 and report.adapter["kinds"] == {"LoRA": 10}
    without_alpha = {"ai-toolkit", "diffusion-pipe"}
    assert {name for name, reads in read_by(report).items() if not reads} == without_alpha


@pytest.mark.parametrize(
    ("alpha", "ai_toolkit", "diffusion_pipe"),
    [(2.0, False, False), (4.0, True, False), (None, True, True)],
)
def test_programs_that_do_not_use_alpha_are_listed_by_its_value(
    tmp_path, alpha, ai_toolkit, diffusion_pipe
):
    path = tmp_path / "style.safetensors"
    save_file(lora("diffusion_model.", alpha), path)  # of rank 4
    report = inspect(path)
    assert read_by(report)["ai-toolkit"] is ai_toolkit
    assert read_by(report)["diffusion-pipe"] is diffusion_pipe
    assert ("convert to no_alpha" in "\n".join(report.lines())) is not diffusion_pipe


def test_programs_that_do_not_read_a_lora_are_listed(tmp_path):
    path = tmp_path / "style.safetensors"
    save_file(lora("", None), path)  # as DiffSynth writes it, but for the name of the adapter
    report = inspect(path)
    assert report.kind == "adapter" and not read_by(report)["ComfyUI"]
    assert not read_by(report)["diffusers"]
    assert "convert to comfyui" in "\n".join(report.lines())


def test_diffusers_reads_only_complete_kohya_files(tmp_path):
    path = tmp_path / "style.safetensors"
    for modules, whole in ((10, True), (9, False)):
        dotted = lora("", 2.0, modules=modules, width=256)  # of no model that is known
        named = {}
        for key, tensor in dotted.items():
            module, _, part = key.partition(".lora_")
            module, part = (module, f"lora_{part}") if part else (key[:-6], "alpha")
            part = part.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
            named[f"lora_unet_{module.replace('.', '_')}.{part}"] = tensor
        save_file(named, path)
        report = inspect(path)
        assert report.key_format == "kohya" and report.problems == ()
        assert read_by(report)["diffusers"] is whole and read_by(report)["ComfyUI"]


def test_an_embedding_is_described(tmp_path):
    vectors = torch.randn(3, 64)
    path = WanModelSaver().save_embedding(
        WanModelEmbedding(
            placeholder="<face>", name="face", uuid="1234", vectors=nn.Parameter(vectors)
        ),
        tmp_path / "face.safetensors",
        date=datetime(2026, 1, 2, tzinfo=timezone.utc),
        facts={"steps": 20},
    )
    file = read_embedding(path, width=64)
    assert torch.equal(file.vectors, vectors) and not file.is_output_embedding
    assert (file.placeholder, file.uuid) == ("<face>", "1234")
    assert file.metadata["modelspec.architecture"] == "WAN-2.2/embedding"
    assert file.metadata["modelspec.title"] == "<face>" and file.metadata["onewan.steps"] == "20"
    report = inspect(path)
    assert report.kind == "embedding" and report.summary == "embedding of 3 tokens"
    # ComfyUI alone does not read it.
    assert [(p.name, p.reads) for p in report.programs] == [("ComfyUI", True)]
    assert "with the node that `onewan comfyui-node` adds" in report.programs[0].note
    with pytest.raises(CheckpointError, match="for another text encoder"):
        read_embedding(path, width=4096)
    file = read_embedding(
        WanModelSaver().save_embedding(
            WanModelEmbedding(
                placeholder="<out>",
                name="out",
                uuid="5678",
                vectors=nn.Parameter(vectors),
                is_output_embedding=True,
            ),
            tmp_path / "out.safetensors",
        )
    )
    assert file.is_output_embedding and torch.equal(file.vectors, vectors)


@pytest.mark.parametrize(
    ("names", "model"),
    [
        (["double_blocks.0.img_attn.qkv.weight"], "Flux"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "Stable Diffusion"),
        (["vace_blocks.0.self_attn.q.weight", "blocks.0.self_attn.q.weight"], "VACE"),
        (["blocks.0.cross_attn.k_img.weight", "blocks.0.self_attn.q.weight"], "Wan 2.1 image"),
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "LoRA of Flux"),
        (["model.layers.0.self_attn.q_proj.weight"], "language model"),
    ],
)
def test_a_file_of_another_model_is_named(tmp_path, names, model):
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(4, 4) for name in names}, path)
    report = inspect(path)
    assert report.kind == "other" and model in report.summary
    assert main(["inspect", str(path)]) == 0


def test_a_file_that_holds_no_weights_is_unreadable(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not weights at all, but long enough")
    assert main(["inspect", str(path)]) == 1
    error = capsys.readouterr().err
    assert "is not a safetensors, GGUF or PyTorch file" in error and error.count("\n") == 1
    assert main(["inspect", str(path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == "unreadable" and "is not a safetensors" in report["summary"]
    assert main(["inspect", str(tmp_path / "absent")]) == 1


def test_inspecting_imports_no_torch(tmp_path):
    path = tmp_path / "x_high_noise.safetensors"
    save_file(wide(FP8 | {f"{SCALED}.weight_scale": ONE, f"{SCALED}.comfy_quant": NOTE}), path)
    code = (
        "import sys; from onewan.cli import main; "
        f"status = main(['inspect', {str(path)!r}]); "
        "sys.exit(status or ('torch' in sys.modules) * 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


Q = "blocks.0.self_attn.q"
TWO = {"lora_down.weight": torch.ones(2, 64), "lora_up.weight": torch.ones(64, 2)}
ALPHA = {"alpha": torch.tensor(1.0)}
LOKR = {"lokr_w1": torch.ones(8, 8), "lokr_w2": torch.ones(8, 8)}
SPLIT = {"lokr_w1_a": torch.ones(8, 2), "lokr_w1_b": torch.ones(2, 8), "lokr_w2": torch.ones(8, 8)}
LOHA = {
    **{f"hada_w{n}_a": torch.ones(64, 2) for n in (1, 2)},
    **{f"hada_w{n}_b": torch.ones(2, 64) for n in (1, 2)},
}


@pytest.mark.parametrize(
    ("parts", "comfyui", "musubi"),
    [
        ({**TWO, **ALPHA}, True, True),
        ({**LOHA, **ALPHA}, True, True),
        ({**LOKR, **ALPHA}, True, True),
        ({**SPLIT, **ALPHA}, True, False),
        ({"oft_blocks": torch.ones(8, 8, 8)}, True, False),
        ({"oft_R.weight": torch.ones(8, 28)}, False, False),
        ({**TWO, "dora_scale": torch.ones(1, 64)}, True, False),
        ({**TWO, "dora_scale": torch.ones(64, 1)}, False, False),
        ({"diff": torch.ones(64, 64)}, True, False),
    ],
    ids=["lora", "loha", "lokr", "lokr split", "oft", "peft oft", "dora", "dora by output", "diff"],
)
def test_comfyui_reads_the_same_kinds_under_both_of_its_prefixes(tmp_path, parts, comfyui, musubi):
    """As measured with ComfyUI 0.33 and 0.3.64, and with musubi-tuner and kohya's keys."""
    path = tmp_path / "x.safetensors"
    flat = "lora_unet_" + Q.replace(".", "_")
    for start, key_format in ((flat, "kohya"), (f"diffusion_model.{Q}", "comfyui")):
        save_file({f"{start}.{name}": tensor.clone() for name, tensor in parts.items()}, path)
        report = inspect(path)
        assert report.key_format == key_format and not report.problems
        assert read_by(report)["ComfyUI"] is comfyui
        if key_format == "kohya":
            assert read_by(report)["musubi-tuner"] is musubi
            assert not read_by(report)["DiffSynth-Studio"]


def test_a_folder_of_loras_is_described_file_by_file(tmp_path, capsys):
    for expert in ("high", "low"):
        save_file(lora("diffusion_model.", 2.0), tmp_path / f"style_{expert}_noise.safetensors")
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "a folder of 2 LoRAs; give the path of one to convert, merge or sample" in text
    assert f"{tmp_path / 'style_low_noise.safetensors'}: LoRA for Wan 2.2" in text
    assert main(["convert", str(tmp_path), str(tmp_path / "out"), "--to", "kohya"]) == 1
    error = capsys.readouterr().err
    assert "is a folder of 2 LoRAs (style_high_noise.safetensors, style_low_" in error
    assert "give the path of one file" in error


def test_published_files_are_recognized(shared, tmp_path):
    path = shared / "clips" / "field" / "lora" / "lightx2v_style_i2v.safetensors"
    report = inspect(path)
    assert report.kind == "adapter" and not report.problems and read_by(report)["ComfyUI"]
    assert report.adapter["skipped"].startswith("5 keys that Wan 2.2 has no weights for")
    combined = {}
    for stage in (1, 2):
        combined |= lora(f"diffusion_model.transformer_{stage}.", None)
    save_file(combined, tmp_path / "x.safetensors")
    report = inspect(tmp_path / "x.safetensors")
    assert report.summary.endswith("both experts in one file") and not report.problems
    assert report.adapter["trainer"] == "ai-toolkit"
    assert read_by(report)["ai-toolkit"] and not read_by(report)["ComfyUI"]


def test_the_description_of_a_file_with_thousands_of_faults_is_short(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    tensors = {}
    for n in range(3000):
        tensors[f"diffusion_model.blocks.{n}.self_attn.q.lora_A.weight"] = torch.ones(2, 4)
        tensors[f"{'x' * 300}.{n}"] = torch.ones(1)
    save_file(tensors, path, {f"name {n} " + "y" * 500: "z" * 1000 for n in range(500)})
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert len(text) < 15_000
    assert "has 3000 damaged modules: blocks.0.attn1.to_q has no lora_B; " in text
    assert "has 3000 unexpected keys" in text and "495 more entries, which --all shows" in text
