"""`onewan convert` and `onewan merge`, as a user calls them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from onewan.cli import main, parse


class Result(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Result]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command in this process; raises anything but an OnewanError."""

    def run(*arguments: str | Path) -> Result:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        return Result(code, *capsys.readouterr())

    return run


def test_the_convert_and_merge_commands_write_what_the_library_does(
    tmp_path: Path, workshop: Path, call: Call
) -> None:
    """For models and LoRAs; a wrong request gives one line and no traceback."""
    tiny = workshop / "t2v-a14b"
    single = tmp_path / "high_noise.safetensors"
    done = call("convert", tiny / "transformer", single, "--to", "single")
    assert done.code == 0, done.err
    assert re.search(r"^writing \d+/\d+ MB$", done.out, re.M)
    assert re.search(rf"^{re.escape(str(single))}: [\d.]+ MB$", done.out, re.M)
    assert "note: " in done.out  # ComfyUI does not support its heads of 32 channels
    written = single.read_bytes()

    key = "diffusion_model.blocks.0.self_attn.q"
    lora = tmp_path / "style.safetensors"
    side = load_file(single)["blocks.0.self_attn.q.weight"].shape[0]
    a, b = torch.full((2, side), 0.5), torch.full((side, 2), 0.25)
    save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, lora)
    merged = tmp_path / "merged.safetensors"
    assert call("merge", single, f"{lora}:0.5", lora, merged).code == 0
    before, after = load_file(single), load_file(merged)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {"blocks.0.self_attn.q.weight"}
    difference = after["blocks.0.self_attn.q.weight"] - before["blocks.0.self_attn.q.weight"]
    torch.testing.assert_close(difference, torch.full((side, side), 0.375))

    spelled = tmp_path / "kohya.safetensors"
    assert call("convert", lora, spelled, "--to", "diffusers").code == 0
    assert set(load_file(spelled)) == {
        f"transformer.blocks.0.attn1.to_q.lora_{s}.weight" for s in "AB"
    }

    for arguments, said in (
        (("convert", single, tmp_path / "x", "--to", "comfyui"), "for models use --to diff"),
        (("convert", lora, tmp_path / "x", "--to", "official"), "for LoRAs use --to comfyui"),
        (("convert", tiny / "transformer", single, "--to", "single"), "add --force"),
        (("convert", lora, spelled, "--to", "comfyui"), "add --force"),
        (("convert", lora, tmp_path / "x", "--to", "comfyui"), "a name that ends in .safetensors"),
        (("convert", tmp_path / "nix", tmp_path / "x", "--to", "single"), "there is no such file"),
        (("convert", single, tmp_path / "x", "--to", "diffusers", "--base", single), "for LoRAs"),
        (("merge", single, single, tmp_path / "x.safetensors"), "none of a LoRA"),
        (("merge", single, lora, merged), "add --force"),
    ):
        refused = call(*arguments)
        assert refused.code == 1, arguments
        assert re.search(said, refused.err), refused.err
        assert len(refused.err.splitlines()) == 1 and refused.err.startswith("onewan: ")
    assert single.read_bytes() == written
    assert call("merge", single, f"{lora}:much", merged).code == 2
    assert call("convert", single, tmp_path / "x", "--to", "gguf").code == 2
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "x").exists()
    forced = call("convert", tiny / "transformer_2", single, "--to", "single", "--force")
    assert forced.code == 0 and single.read_bytes() != written


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("style.safetensors:0.8", "style.safetensors", 0.8),
        ("style.safetensors:-1e-1", "style.safetensors", -0.1),
        (r"C:\loras\style.safetensors", r"C:\loras\style.safetensors", 1.0),
        (r"C:\loras\style.safetensors:0.5", r"C:\loras\style.safetensors", 0.5),
        ("C:/loras/style.safetensors:2", "C:/loras/style.safetensors", 2.0),
        ("C:/loras/style.safetensors", "C:/loras/style.safetensors", 1.0),
        ("C:7", "C:7", 1.0),
    ],
)
def test_a_lora_argument_is_parsed_with_its_weight(text: str, path: str, weight: float) -> None:
    options = parse(["merge", "base", text, "dst"])
    assert options.loras == [(Path(path), weight)]
