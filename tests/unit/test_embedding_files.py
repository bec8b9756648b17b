"""Learned vectors: their initial values, their files, and the samples they change."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from support import placeholders
from support.placeholders import BOTH, FOX, INK, ids, learned, rows
from torch import nn
from transformers import UMT5EncoderModel

import onewan
from onewan.checkpoint.saver import WanModelSaver
from onewan.cli import main
from onewan.errors import CheckpointError, ConfigError
from onewan.model.embedding import WanModelEmbedding
from onewan.model.load import WanModelLoader
from onewan.model.wan import WanModel
from onewan.sample.generate import SampleRequest, WanModelSampler

# Fixtures are found by pytest as attributes of the module.
model_folder, load, model = placeholders.model_folder, placeholders.load, placeholders.model

DATE = datetime(2026, 1, 2, tzinfo=timezone.utc)


# ------------------------------------------------------------------------------ from text and files


def test_initial_input_vectors_are_rows_of_the_table(model):
    tokens = ids(model, "red square")
    count = len(tokens)
    assert count > 2
    fox = WanModelEmbedding.initial(model, placeholder=FOX, initial_text=" red  square ")
    assert torch.equal(fox.vectors, rows(model, tokens))
    assert fox.vectors.requires_grad and fox.vectors.is_leaf
    assert (fox.name, fox.initial_text, fox.is_output_embedding) == ("fox", " red  square ", False)
    longer = WanModelEmbedding.initial(
        model, placeholder=FOX, initial_text="red square", token_count=2 * count + 1, name="other"
    )
    assert torch.equal(longer.vectors, rows(model, [*tokens, *tokens, tokens[0]]))
    assert longer.name == "other"
    shorter = WanModelEmbedding.initial(
        model, placeholder=FOX, initial_text="red square", token_count=1
    )
    assert torch.equal(shorter.vectors, rows(model, tokens[:1]))
    with torch.no_grad():
        fox.vectors.add_(1)
    assert not torch.equal(fox.vectors, rows(model, tokens)), "shares memory with the table"


def test_initial_output_vectors_are_the_encoders_outputs_for_the_text(model):
    fox = WanModelEmbedding.initial(
        model, placeholder=FOX, initial_text="red square", is_output_embedding=True
    )
    assert torch.equal(fox.vectors, model.encode_prompt("red square")[:-1])
    assert fox.is_output_embedding and fox.vectors.requires_grad


def test_initial_vectors_of_a_bfloat16_encoder_are_float32(load):
    model = load(torch.bfloat16)
    for is_output in (False, True):
        fox = WanModelEmbedding.initial(model, placeholder=FOX, is_output_embedding=is_output)
        assert fox.vectors.dtype == torch.float32 and fox.initial_text == "*"
        model.embedding = fox
        assert model.encode_prompt("a <fox>").dtype == torch.bfloat16


def test_the_uuid_depends_on_the_seed_and_the_placeholder_alone(model):
    def uuid(**given) -> str:
        return WanModelEmbedding.initial(model, **given).uuid

    assert uuid(placeholder=FOX) == uuid(placeholder=FOX, initial_text="red")
    assert len({uuid(placeholder=p, seed=s) for p in (FOX, INK) for s in (0, 1)}) == 4


@pytest.mark.parametrize("text", ["", "  "])
def test_an_initial_text_without_tokens_is_refused(model, text):
    with pytest.raises(ConfigError, match=r"initial_text: .* has no tokens"):
        WanModelEmbedding.initial(model, placeholder=FOX, initial_text=text, token_count=2)


def test_placeholders_that_no_prompt_can_contain_are_refused():
    for wrong, why in (
        ("&amp;", "would be '&' in a cleaned prompt"),
        ("a b", "has a space"),
        ("", "would be|has a space"),
        ("\u201cfox\u201d", "would be '\"fox\"'"),
    ):
        with pytest.raises(ConfigError, match=f"placeholder: .*({why}).*choose a single word"):
            learned(wrong)
    with pytest.raises(ValueError, match="not \\[tokens, width\\]"):
        WanModelEmbedding(
            placeholder=FOX, name="fox", uuid="", vectors=nn.Parameter(torch.zeros(4))
        )
    with pytest.raises(ValueError, match="not float32"):
        WanModelEmbedding(
            placeholder=FOX, name="fox", uuid="", vectors=nn.Parameter(torch.zeros(1, 4).bfloat16())
        )


def test_ambiguous_placeholders_are_refused(model):
    model.add_embedding(learned("<fox>"))
    model.add_embedding(learned("ink"))
    for placeholder, why in (
        ("<fox>", "placeholder: is a duplicate, got '<fox>'"),
        ("<ink>", "placeholder: must not contain another .* got '<ink>' beside 'ink'"),
    ):
        with pytest.raises(ConfigError, match=why):
            model.add_embedding(learned(placeholder))
    assert [e.placeholder for e in model.all_embeddings()] == ["<fox>", "ink"]


@BOTH
def test_export_and_reload_change_no_bit(model, tmp_path, is_output):
    fox = WanModelEmbedding.initial(
        model, placeholder=FOX, is_output_embedding=is_output, initial_text="red", seed=3
    )
    with torch.no_grad():
        fox.vectors.add_(torch.randn(fox.vectors.shape) * 1e-6)
    path = WanModelSaver().save_embedding(fox, tmp_path / "a.safetensors", facts={"steps": 5})
    back = WanModelEmbedding.from_file(path, width=64)
    assert torch.equal(back.vectors, fox.vectors) and not back.vectors.requires_grad
    fields = ("placeholder", "name", "uuid", "is_output_embedding", "initial_text")
    assert all(getattr(back, name) == getattr(fox, name) for name in fields)
    model.add_embedding(fox)
    want = model.encode_prompt("a <fox> runs").detach()
    model.embedding = back
    assert torch.equal(model.encode_prompt("a <fox> runs"), want)
    twice = WanModelSaver().save_embedding(
        back, tmp_path / "b.safetensors", facts={"steps": 5}, date=DATE
    )
    again = WanModelSaver().save_embedding(
        fox, tmp_path / "c.safetensors", facts={"steps": 5}, date=DATE
    )
    assert twice.read_bytes() == again.read_bytes()


def test_a_placeholder_and_a_name_override_those_of_the_file(tmp_path):
    path = WanModelSaver().save_embedding(learned(), tmp_path / "a.safetensors")
    other = WanModelEmbedding.from_file(path, placeholder="<ocelot>", name="cat")
    assert (other.placeholder, other.name, other.uuid) == ("<ocelot>", "cat", "uuid of <fox>")
    assert WanModelEmbedding.from_file(path, placeholder="<ocelot>").name == "ocelot"
    with pytest.raises(CheckpointError, match="for another text encoder"):
        WanModelEmbedding.from_file(path, width=4096)


def test_a_file_without_metadata_is_called_by_its_file_name(tmp_path):
    values = torch.randn(1, 64).half()
    save_file({"t5": values}, tmp_path / "ocelot.safetensors")
    embedding = WanModelEmbedding.from_file(tmp_path / "ocelot.safetensors")
    assert (embedding.placeholder, embedding.name) == ("ocelot", "ocelot")
    assert torch.equal(embedding.vectors, values.float()) and embedding.initial_text is None
    again = WanModelEmbedding.from_file(tmp_path / "ocelot.safetensors")
    assert embedding.uuid == again.uuid
    save_file({"t5": values}, tmp_path / "my ocelot.safetensors")
    with pytest.raises(ConfigError, match=r"my ocelot.*a space.*names no placeholder, so its own"):
        WanModelEmbedding.from_file(tmp_path / "my ocelot.safetensors")


@pytest.mark.parametrize(
    "values",
    [torch.zeros(0, 64), torch.zeros(2, 64, dtype=torch.int32), torch.full((2, 64), torch.nan)],
    ids=["none", "integers", "nan"],
)
def test_damaged_files_are_refused_by_name(tmp_path, values):
    save_file({"umt5xxl": values}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        WanModelEmbedding.from_file(tmp_path / "a.safetensors")


def test_several_are_saved_at_once_in_lower_precision(tmp_path):
    made, half = [learned(), learned(INK, is_output=True, seed=1)], torch.float16
    paths = [
        WanModelSaver().save_embedding(e, tmp_path / "new" / f"{e.name}.safetensors", dtype=half)
        for e in made
    ]
    assert [path.name for path in paths] == ["fox.safetensors", "ink.safetensors"]
    for path, embedding in zip(paths, made, strict=True):
        back = WanModelEmbedding.from_file(path)
        assert torch.equal(back.vectors, embedding.vectors.half().float())
        assert back.is_output_embedding is embedding.is_output_embedding
    with torch.no_grad():
        made[0].vectors[0, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"<fox>.*too large for torch.float16"):
        WanModelSaver().save_embedding(made[0], tmp_path / "a.safetensors", dtype=torch.float16)


def test_the_header_has_the_facts_of_the_run(tmp_path):
    path = WanModelSaver().save_embedding(
        learned(),
        tmp_path / "a.safetensors",
        facts={"steps": 5, "run": "x"},
        title="Fox",
        date=DATE,
    )
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    facts = header.pop("__metadata__")
    assert list(header) == ["umt5xxl"] and header["umt5xxl"]["dtype"] == "F32"
    assert facts["modelspec.title"] == "Fox" and facts["modelspec.date"].startswith("2026-01-02")
    assert (facts["onewan.placeholder"], facts["onewan.uuid"]) == (FOX, "uuid of <fox>")
    assert (facts["onewan.steps"], facts["onewan.run"]) == ("5", "x")


def test_moving_keeps_the_parameter_object():
    fox = learned()
    parameter = fox.vectors
    assert fox.to("cpu") is fox and fox.vectors is parameter


# -------------------------------------------------------------------------------------- in samples


@pytest.fixture(scope="module")
def whole(model_folder) -> Callable[[], WanModel]:
    return cache(lambda: WanModelLoader().load(model_folder))


def request_for(prompt: str, negative: str = "blue circle") -> SampleRequest:
    return SampleRequest(
        prompt=prompt,
        negative_prompt=negative,
        image=None,
        width=64,
        height=32,
        frames=5,
        steps=2,
        guidance=(4.0,),
        shift=5.0,
        seed=1,
        fps=8.0,
    )


@BOTH
def test_vectors_change_samples_of_prompts_with_the_placeholder_only(whole, is_output):
    model = whole()
    fox = learned(is_output=is_output)
    before = WanModelSampler(model).sample(request_for("a red square"))
    model.embedding = fox
    try:
        sampler = WanModelSampler(model)
        assert np.array_equal(sampler.sample(request_for("a red square")), before)
        first = sampler.sample(request_for("a <fox> square"))
        with torch.no_grad():
            fox.vectors.mul_(-3)
        second = sampler.sample(request_for("a <fox> square"))
        negative = sampler.sample(request_for("a red square", "<fox>"))
        assert np.array_equal(sampler.sample(request_for("a red square")), before)
    finally:
        model.embedding = None
    videos = [before, first, second, negative]
    for number, video in enumerate(videos):
        assert not any(np.array_equal(video, other) for other in videos[:number])
    assert fox.vectors.requires_grad and fox.vectors.grad is None


def test_no_gradient_is_recorded_while_sampling(whole, monkeypatch):
    model = whole()
    model.embedding = learned()
    recorded: list[bool] = []
    encode = UMT5EncoderModel.forward

    def watched(self: UMT5EncoderModel, *args: object, **kwargs: object) -> object:
        output = encode(self, *args, **kwargs)
        recorded.append(output.last_hidden_state.requires_grad)
        return output

    monkeypatch.setattr(UMT5EncoderModel, "forward", watched)
    try:
        WanModelSampler(model).sample(request_for("a <fox> square", "<fox>"))
        assert torch.is_grad_enabled() and recorded == [False, False]
    finally:
        model.embedding = None


def sample_command(model_folder: Path, out: Path, prompt: str, *more: str | Path) -> int:
    small = ["--width", "64", "--height", "32", "--frames", "5", "--steps", "1", "--fps", "8"]
    arguments = [model_folder, "--prompt", prompt, "--out", out, "--force", "--device", "cpu"]
    return main(["sample", *map(str, [*arguments, *small, *more])])


def test_the_sample_command_reports_embeddings_without_effect(model_folder, tmp_path, capsys):
    saver = WanModelSaver()
    fox = saver.save_embedding(learned(), tmp_path / "a.safetensors")
    ink = saver.save_embedding(learned(INK, 1, is_output=True), tmp_path / "b.safetensors")
    out = tmp_path / "out.mp4"
    assert sample_command(model_folder, out, "a <ink> dog", "--embedding", fox, ink) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{ink}: <ink> is replaced by 1 vector" in lines
    assert (
        f"{fox}: <fox> is replaced by 2 vectors; no prompt contains <fox>, "
        "so the embedding has no effect"
    ) in lines
    with_ink = out.read_bytes()
    assert sample_command(model_folder, out, "a <ink> dog", "--embedding", ink) == 0
    assert out.read_bytes() == with_ink
    assert sample_command(model_folder, out, "a <ink> dog") == 0
    assert out.read_bytes() != with_ink


def test_the_sample_command_refuses_embeddings_that_do_not_fit(model_folder, tmp_path, capsys):
    path = tmp_path / "wide.safetensors"
    save_file({"umt5xxl": torch.zeros(2, 4096)}, path)
    out = tmp_path / "out.mp4"
    assert sample_command(model_folder, out, "a wide dog", "--embedding", path) == 1
    assert "for another text encoder" in capsys.readouterr().err
    path = WanModelSaver().save_embedding(learned(), path)
    assert sample_command(model_folder, out, "<fox>", "--embedding", path, path) == 1
    assert "placeholder: is a duplicate, got '<fox>'" in capsys.readouterr().err
    assert not out.exists()


# -------------------------------------------------------------------------------------- public API


def test_the_class_is_public():
    assert onewan.WanModelEmbedding is WanModelEmbedding


def test_transformer_lora_lists_the_adapter_weights(model_folder):
    model = WanModelLoader().load(model_folder, components=["transformer"])
    assert model.transformer_lora is None
    model.transformer.add_adapter(LoraConfig(r=2, target_modules=["attn1.to_q"]))
    shown = model.transformer_lora
    assert {name: p.shape for name, p in shown.items()} == {
        "transformer.blocks.0.attn1.to_q.lora_A.default.weight": (2, 32),
        "transformer.blocks.0.attn1.to_q.lora_B.default.weight": (32, 2),
    }
    trained = {id(p) for p in model.transformer.parameters() if p.requires_grad}
    assert {id(p) for p in shown.values()} == trained
