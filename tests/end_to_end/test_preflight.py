"""What the run file and headers tell is reported before anything is encoded, by every command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from onewan.cli import main

Wrong = Callable[[Path, Path], tuple[str, str]]
"""Makes a wrong file in the second folder for the models in the first; returns an override, and a
part of the message."""


def layer_filter_of_another_model(_models: Path, _folder: Path) -> tuple[str, str]:
    return "method={kind: lora, modules: ['*transformer_blocks*']}", "each block has attn1.to_q"


def layers_of_another_model(_models: Path, _folder: Path) -> tuple[str, str]:
    override = "method={kind: fine_tune, weights: kahan, modules: [mid_block]}"
    return override, "method.modules"


def blocks_that_do_not_exist(_models: Path, _folder: Path) -> tuple[str, str]:
    return "wan_config.transformer_layers_to_train=[7]", "has no block 7"


def adapter_of_another_size(_models: Path, folder: Path) -> tuple[str, str]:
    key = "diffusion_model.blocks.0.self_attn.q"
    tensors = {f"{key}.lora_A.weight": torch.ones(2, 99), f"{key}.lora_B.weight": torch.ones(99, 2)}
    save_file(tensors, folder / "other_high_noise.safetensors")
    return (
        f"method={{kind: lora, init_from: [{folder / 'other_high_noise.safetensors'}]}}",
        "blocks",
    )


def embedding_of_another_encoder(_models: Path, folder: Path) -> tuple[str, str]:
    path = folder / "clip.safetensors"
    save_file({"umt5xxl": torch.ones(2, 768)}, path)
    embeddings = f"embeddings=[{{placeholder: <shape>, init_from: {path}}}]"
    return embeddings, "it is for another text encoder"


def embedding_that_no_caption_has(_models: Path, _folder: Path) -> tuple[str, str]:
    return "embeddings=[{placeholder: <absent>}]", "no caption contains '<absent>'"


def missing_package(_models: Path, _folder: Path) -> tuple[str, str]:
    return "optimizer={name: prodigy}", "needs the package prodigyopt"


def transformer_of_another_variant(models: Path, _folder: Path) -> tuple[str, str]:
    path = models / "i2v-a14b" / "transformer"
    return f"model.transformer={path}", "i2v-a14b"


def damaged_transformer(models: Path, folder: Path) -> tuple[str, str]:
    path = folder / "damaged.safetensors"
    good = models / "t2v-a14b" / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(good.read_bytes()[:-100])
    return f"model.transformer={path}", "is not a complete safetensors file"


def mistyped_transformer(_models: Path, folder: Path) -> tuple[str, str]:
    return f"model.transformer={folder / 'typo.safetensors'}", "there is no such file or folder"


CASES = [
    layer_filter_of_another_model,
    layers_of_another_model,
    blocks_that_do_not_exist,
    adapter_of_another_size,
    embedding_of_another_encoder,
    embedding_that_no_caption_has,
    missing_package,
    transformer_of_another_variant,
    damaged_transformer,
    mistyped_transformer,
]


@pytest.mark.parametrize("command", ["cache", "train", "train --dry-run"])
@pytest.mark.parametrize("wrong", CASES)
def test_it_is_reported_before_a_clip_is_encoded(
    wrong: Wrong,
    command: str,
    workshop: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    # A package that is None in `sys.modules` can't be imported, installed or not.
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    run = tmp_path / "run.yaml"
    run.write_text(
        f"model: {{path: {(workshop / 't2v-a14b').as_posix()}, variant: t2v-a14b}}\n"
        f"video_data: {{sources: [{{path: {(workshop / 'clips').as_posix()}}}], "
        f"resolution: 4096, min_resolution: [16, 16], cache_dir: {tmp_path / 'cache'}}}\n"
        "method: {kind: lora}\ntrain: {steps: 1}\n",
        encoding="utf-8",
    )
    override, text = wrong(workshop, tmp_path)
    assert main([*command.split(), str(run), f"output.dir={tmp_path / 'runs'}", override]) == 1
    error = capsys.readouterr().err
    assert text in error and "Traceback" not in error, error
    assert not list((tmp_path / "cache").rglob("*.safetensors")), "clips were encoded before"


def test_all_wrong_folders_and_model_files_get_a_line_each(
    workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    models = {name: (workshop / name).as_posix() for name in ("t2v-a14b", "ti2v-5b")}
    run = tmp_path / "run.yaml"
    run.write_text(
        f"model: {{path: {models['t2v-a14b']}, vae: {models['ti2v-5b']}/vae, variant: i2v-a14b}}\n"
        "video_data: {sources: [nowhere, no-more]}\nvalidation: {sources: run.yaml}\n",
        encoding="utf-8",
    )
    assert main(["cache", str(run)]) == 1
    first, *lines = capsys.readouterr().err.splitlines()
    assert f"{len(lines)} problems" in first
    fields = ["video_data.sources.0.path", "video_data.sources.1.path", "validation.sources.0.path"]
    paths = [tmp_path / "nowhere", tmp_path / "no-more", run]
    listed = ", nor a file that lists clips (csv, json, jsonl, ndjson, parquet, tar, tsv)"
    assert lines[:3] == [
        f"  {field}: {path} is not a folder{kinds}; correct it in the run file"
        for field, path, kinds in zip(fields, paths, ("", "", listed), strict=True)
    ]
    # The VAE and each of the two transformers, with one problem in a line.
    assert len(lines) >= 6 and not any("\\n" in line for line in lines)
    for part in ("t2v-a14b/transformer", "t2v-a14b/transformer_2", "ti2v-5b/vae"):
        assert any(part in line for line in lines[3:]), lines


def test_all_problems_are_reported_together(
    workshop: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    run = tmp_path / "run.yaml"
    run.write_text(
        f"model: {{path: {(workshop / 't2v-a14b').as_posix()}, variant: t2v-a14b}}\n"
        f"video_data: {{sources: [{{path: {(workshop / 'clips').as_posix()}}}]}}\n"
        "method: {kind: lora, modules: ['atn1.*']}\noptimizer: {name: adamw_schedule_free}\n"
        f"output: {{dir: {run}/runs}}\n",
        encoding="utf-8",
    )
    assert main(["cache", str(run)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert "3 problems" in lines[0] and len(lines) == 4, lines
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "output.dir",
        "optimizer.name",
        "method.modules",
    ]
    assert "did you mean attn1" in lines[-1]
