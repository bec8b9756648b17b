"""The screen Files: what is listed and found, what is said of a file, converting and merging."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from nicegui import ui
from nicegui.testing.user import User
from safetensors import safe_open
from safetensors.numpy import save_file
from support.page import with_user

from onewan.checkpoint.inspect import inspect
from onewan.errors import OnewanError
from onewan.media import write_video
from onewan.serving.files import Listing, entry_at, find_files, summary
from onewan.serving.roots import Roots
from onewan.serving.weight_commands import Conversion, Merge

RUN_FILE = "model: {path: org/model, variant: t2v-a14b}\n"


def write_lora(file: Path) -> Path:
    """A LoRA of one layer with ComfyUI's keys."""
    file.parent.mkdir(parents=True, exist_ok=True)
    key = "diffusion_model.blocks.0.self_attn.q"
    tensors = {
        f"{key}.lora_A.weight": np.ones((4, 64), np.float32),
        f"{key}.lora_B.weight": np.ones((64, 4), np.float32),
        f"{key}.alpha": np.array(4, np.float32),
    }
    save_file(tensors, file)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Runs and data, with things that are not to be seen."""
    run = tmp_path / "runs" / "fox"
    write_lora(run / "weights" / "fox_000100_high_noise.safetensors")
    write_lora(run / "state" / "000100" / "adapter.safetensors")
    (run / "events.jsonl").touch()
    sample = run / "samples" / "000100" / "0.mp4"
    sample.parent.mkdir(parents=True)
    write_video(sample, np.zeros((5, 16, 16, 3), np.uint8), 16)
    (run / "run.yaml").write_text(RUN_FILE, encoding="utf-8")
    (run / "notes.yaml").write_text("a: 1\n", encoding="utf-8")
    model = tmp_path / "models" / "tiny"
    write_lora(model / "transformer" / "diffusion_pytorch_model.safetensors")
    (model / "model_index.json").write_text("{}", encoding="utf-8")
    (tmp_path / "models" / "broken.safetensors").write_bytes(b"not one of these files")
    for name in ("compose.yaml", ".hidden/a.safetensors", "cache/video/ab/abc.safetensors"):
        file = tmp_path / "models" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("services: {}\n", encoding="utf-8")
    (tmp_path / "models" / "cache" / "digests.jsonl").touch()
    secret = write_lora(tmp_path / "elsewhere" / "secret.safetensors")
    (tmp_path / "models" / "link.safetensors").symlink_to(secret)
    return tmp_path


def roots(folder: Path) -> Roots:
    return Roots(folder / "runs", [folder / "models", folder / "runs" / "fox"])


def test_only_what_matters_is_listed_and_only_once_the_newest_first(folder: Path) -> None:
    model = folder / "models" / "tiny" / "model_index.json"
    os.utime(model, (2e9, 2e9))
    listing = find_files(roots(folder))
    assert listing.complete
    assert listing.entries[0].place == "data1/tiny"
    assert listing.entries[0].size > model.stat().st_size
    assert {entry.place: entry.kind for entry in listing.entries} == {
        "data1/tiny": "weights",
        "data1/broken.safetensors": "weights",
        "runs/fox/run.yaml": "run file",
        "runs/fox/samples/000100/0.mp4": "video",
        "runs/fox/weights/fox_000100_high_noise.safetensors": "weights",
    }


def test_names_are_found_and_addressed_with_all_their_characters(folder: Path) -> None:
    name = "my fox 50% #1 é.safetensors"
    write_lora(folder / "models" / name)

    async def act(user: User) -> None:
        await user.open("/files")
        user.find("Search").type("50% fox é")
        await user.should_see("1 file,", retries=100)
        link = next(e for e in user.find(ui.link).elements if e.text == name)
        await user.open(link.props["href"])
        await user.should_see("LoRA for Wan", retries=100)

    with_user(folder / "runs", act, data=[folder / "models"])


def test_a_file_that_was_written_anew_is_described_anew(folder: Path) -> None:
    place = ("runs", "fox/weights/fox_000100_high_noise.safetensors")
    before = entry_at(roots(folder), *place)
    assert summary(before).startswith("LoRA for Wan")
    before.path.write_bytes(b"\0" * 16)
    after = entry_at(roots(folder), *place)
    assert "LoRA" not in summary(after)


@pytest.mark.parametrize(
    "path", ["link.safetensors", "../elsewhere/secret.safetensors", "compose.yaml", "cache", ""]
)
def test_what_is_not_in_the_list_has_no_screen(folder: Path, path: str) -> None:
    with pytest.raises(OnewanError):
        entry_at(roots(folder), "data1", path)

    async def act(user: User) -> None:
        answer = await user.http_client.get(f"/files/data1/{path}")
        assert answer.status_code in (404, 307)
        assert "secret" not in answer.text

    with_user(folder / "runs", act, data=[folder / "models"])


def test_the_list_is_searched_by_words_and_by_kind(folder: Path) -> None:
    async def act(user: User) -> None:
        await user.open("/files")
        await user.should_see("5 files", retries=100)
        await user.should_see("LoRA for Wan", retries=100)
        user.find("Search").type("fox WEIGHTS")
        await user.should_see("1 file,", retries=100)
        await user.should_not_see("broken.safetensors", retries=100)
        user.find("Search").clear()
        select = next(iter(user.find(ui.select).elements))
        select.value = "run file"
        await user.should_see("fox/run.yaml", retries=100)
        await user.should_see("1 file,", retries=100)
        select.value = "video"
        await user.should_see("fox/samples/000100/0.mp4", retries=100)
        await user.should_see("1 file,", retries=100)
        user.find("Search").type("deer")
        await user.should_see("Nothing matches.", retries=100)

    with_user(folder / "runs", act, data=[folder / "models"])


def test_a_file_says_what_it_is_and_who_reads_it(folder: Path) -> None:
    async def act(user: User) -> None:
        await user.open("/files/runs/fox/weights/fox_000100_high_noise.safetensors")
        await user.should_see("LoRA for Wan", retries=100)
        await user.should_see("musubi-tuner", retries=100)
        await user.should_see("Convert", retries=100)
        await user.open("/files/data1/broken.safetensors")
        await user.should_not_see("Convert", retries=100)
        await user.open("/files/runs/fox/run.yaml")
        await user.should_see(RUN_FILE, retries=100)

    with_user(folder / "runs", act, data=[folder / "models"])


def test_the_list_says_how_much_it_has(folder: Path) -> None:
    listing = find_files(roots(folder))
    assert listing.total.startswith("5 files, ")
    found = listing.matching("FOX weights", "")
    assert [entry.path.parent.name for entry in found.entries] == ["weights"]
    assert listing.matching("fox", "video").total.startswith("1 file, ")
    assert listing.matching("deer", "").entries == ()
    assert replace(listing, complete=False).total.endswith("there are more, which are not listed")
    assert Listing((), True).total.startswith("There are no models")


def test_a_conversion_has_a_name_a_format_and_its_options(folder: Path) -> None:
    entry = entry_at(roots(folder), "runs", "fox/weights/fox_000100_high_noise.safetensors")
    conversion = Conversion.of(roots(folder), entry.path, inspect(entry.path))
    assert conversion.to == "no_alpha"  # it has the first format itself
    assert conversion.name == "fox_000100_high_noise_no_alpha.safetensors"
    conversion.to, conversion.name, conversion.dtype = "diffusers", "out.safetensors", "bfloat16"
    conversion.base = str(folder / "models" / "tiny")
    output = entry.path.parent / "out.safetensors"
    options = ["--to", "diffusers", "--base", conversion.base, "--dtype", "bfloat16"]
    assert conversion.arguments() == ["convert", str(entry.path), str(output), *options]
    assert conversion.line().startswith("onewan convert ") and not conversion.is_occupied()
    conversion.base = "/etc"
    assert "is outside the folders" in conversion.line()
    conversion.name = " "
    assert conversion.problem() == "Give a name." and conversion.line() == ""


@pytest.mark.parametrize(
    ("kind", "to", "name"),
    [
        ("adapter", "diffusers", "tiny_diffusers.safetensors"),
        ("model", "single", "tiny_single"),
        ("transformer", "official", "tiny_official"),
        ("transformer", "diffusers", "tiny_diffusers"),
        ("vae", "official", "tiny_official.pth"),
        ("vae", "single", "tiny_single.safetensors"),
    ],
)
def test_the_name_of_an_output_is_of_the_kind_that_its_format_is(
    folder: Path, kind: str, to: str, name: str
) -> None:
    source = folder / "models" / "tiny"
    conversion = Conversion(roots=roots(folder), source=source, name="", kind=kind, to=to)
    assert conversion.usual_name == name


def test_a_merge_says_what_is_missing(folder: Path) -> None:
    entry = entry_at(roots(folder), "runs", "fox/weights/fox_000100_high_noise.safetensors")
    merge = Merge.of(roots(folder), entry, inspect(entry.path))
    assert merge.line() == "Choose a model to merge into."
    merge.model = str(folder / "models" / "tiny")
    merge.choose(None)
    assert merge.line() == "Choose an adapter to merge."
    merge.choose(str(entry.path)).weight = 0.5
    output = entry.path.with_name(merge.name)
    assert merge.arguments() == ["merge", merge.model, f"{entry.path}:0.5", str(output)]
    merge.find_choices()
    assert list(merge.adapters) == [str(entry.path)]


def test_an_adapter_is_converted_and_nothing_is_overwritten_without_a_question(
    folder: Path,
) -> None:
    weights = folder / "runs" / "fox" / "weights"
    output = weights / "for_diffusers.safetensors"

    async def act(user: User) -> None:
        await user.open("/files/runs/fox/weights/fox_000100_high_noise.safetensors")
        to = next(iter(user.find("Format").elements))
        assert isinstance(to, ui.select) and to.value == "no_alpha"
        to.value = "diffusers"
        await user.should_see(
            "fox_000100_high_noise_diffusers.safetensors --to diffusers", retries=100
        )
        name = min(user.find("Output").elements, key=lambda each: each.id)  # merging has one too
        assert isinstance(name, ui.input)
        name.value = "../../../../elsewhere/out.safetensors"
        assert "is outside the folders that this page may use" in str(name.error)
        name.value = output.name
        assert name.error is None
        output.write_text("mine", encoding="utf-8")
        user.find(kind=ui.button, content="Convert").click()
        await user.should_see("Replace it?", retries=50)
        user.find("Keep it").click()
        await user.should_not_see("Replace it?", retries=100)
        assert output.read_text(encoding="utf-8") == "mine"
        user.find(kind=ui.button, content="Convert").click()
        await user.should_see("Replace it?", retries=50)
        user.find(kind=ui.button, content="Replace it").click()
        await user.should_see("Done.", retries=600)
        await user.should_see("Download", retries=20)

    with_user(folder / "runs", act)
    with safe_open(output, "numpy") as file:
        assert "transformer.blocks.0.attn1.to_q.lora_A.weight" in file.keys()  # noqa: SIM118


@pytest.mark.long
def test_the_error_of_a_command_is_shown_as_it_is(folder: Path) -> None:
    async def act(user: User) -> None:
        await user.open("/files/runs/fox/weights/fox_000100_high_noise.safetensors")
        to = next(iter(user.find("Format").elements))
        assert isinstance(to, ui.select)
        to.value = "kohya"
        user.find(kind=ui.button, content="Convert").click()
        await user.should_see("It ended with an error (exit status 1).", retries=600)
        await user.should_see("the adapter was trained on a transformer of width 64", retries=100)

    with_user(folder / "runs", act)


def test_models_and_adapters_to_merge_are_offered(folder: Path, shared: Path) -> None:
    golden = shared / "golden" / "ti2v-5B"

    async def act(user: User) -> None:
        await user.open("/files/runs/fox/weights/fox_000100_high_noise.safetensors")
        await user.should_see("Choose a model to merge into.", retries=100)
        model = next(e for e in user.find("Model").elements if isinstance(e, ui.select))
        path = str(golden.resolve())
        for _ in range(200):
            if path in model.options:
                break
            await asyncio.sleep(0.02)
        assert path in model.options
        model.value = path
        number = next(iter(user.find(ui.number).elements))
        number.value = 0.8
        await user.should_see(f"onewan merge {path} ", retries=100)
        await user.should_see("fox_000100_high_noise.safetensors:0.8 ", retries=100)

    with_user(folder / "runs", act, data=[golden.parent])
