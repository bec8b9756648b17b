"""Wrong files at the command line: one line with the file, what was found and what was expected."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from onewan.cli import main
from onewan.formats.key_maps import to_official


class _CreatesFile:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return (open, (str(self.path), "w"))


@pytest.fixture
def write(workshop: Path) -> Callable[[dict[str, Tensor], Path], None]:
    """Writes an expert with its config, which can't be inferred from shapes at this size."""
    config = (workshop / "t2v-a14b" / "transformer" / "config.json").read_text(encoding="utf-8")
    return lambda tensors, path: save_file(tensors, path, {"onewan.config": config})


@pytest.fixture
def official(workshop: Path) -> dict[str, Tensor]:
    """The high-noise expert of a tiny model, by official names."""
    folder = workshop / "t2v-a14b" / "transformer"
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    return {to_official(name): tensor for name, tensor in weights.items()}


@pytest.fixture
def run(workshop: Path, tmp_path: Path) -> Path:
    """A run file on the tiny model."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{path: {(workshop / 't2v-a14b').as_posix()}, variant: t2v-a14b}}\n"
        f"video_data: {{sources: [{{path: {(workshop / 'clips').as_posix()}}}], "
        "resolution: 4096, min_resolution: [16, 16]}\n"
        "method: {kind: lora}\ntrain: {steps: 1}\n",
        encoding="utf-8",
    )
    return path


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The error message of a command: one line and status 1, no traceback."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("onewan: ") and "\n" not in error and "Traceback" not in error
    return error


Write = Callable[[dict[str, Tensor], Path], None]


def truncated(tensors: dict[str, Tensor], path: Path, write: Write) -> None:
    write(tensors, path)
    path.write_bytes(path.read_bytes()[:-100])


def huge_header(_tensors: dict[str, Tensor], path: Path, _write: Write) -> None:
    path.write_bytes(struct.pack("<Q", 2**62) + b'{"a":1}')


def pickle_with_code(_tensors: dict[str, Tensor], path: Path, _write: Write) -> None:
    path.write_bytes(pickle.dumps({"a": _CreatesFile(path.with_name("proof"))}, protocol=2))


def empty(_tensors: dict[str, Tensor], path: Path, _write: Write) -> None:
    path.write_bytes(b"")


def folder(_tensors: dict[str, Tensor], path: Path, _write: Write) -> None:
    path.mkdir()


def clip_branch(tensors: dict[str, Tensor], path: Path, write: Write) -> None:
    width = tensors["patch_embedding.weight"].shape[0]
    more = {f"blocks.0.cross_attn.{n}_img.weight": torch.zeros(width, width) for n in "kv"}
    write(tensors | more, path)


def missing_keys(tensors: dict[str, Tensor], path: Path, write: Write) -> None:
    left_out = ("blocks.0.self_attn.q.weight", "blocks.1.ffn.0.bias")
    write({n: t for n, t in tensors.items() if n not in left_out}, path)


def unexpected_key(tensors: dict[str, Tensor], path: Path, write: Write) -> None:
    write(tensors | {"blocks.0.extra.weight": torch.zeros(1)}, path)


def wrong_shape(tensors: dict[str, Tensor], path: Path, write: Write) -> None:
    write(tensors | {"blocks.0.self_attn.q.weight": torch.zeros(3, 5)}, path)


@pytest.mark.parametrize(
    ("write_wrong_file", "expected"),
    [
        (truncated, "is not a complete safetensors file: has "),
        (huge_header, "should begin with a header of 4611686018427387904 bytes, and has 15 bytes"),
        (pickle_with_code, "is a pickle that holds more than tensors"),
        (empty, "is empty (0 bytes)"),
        (folder, "holds no weights (*.safetensors, *.gguf, *.pth)"),
        (clip_branch, "is a Wan 2.1 image-to-video transformer, which has a CLIP branch"),
        (
            missing_keys,
            "2 missing keys (blocks.0.attn1.to_q.weight, blocks.1.ffn.net.0.proj.bias)",
        ),
        (unexpected_key, "1 unexpected keys (blocks.0.extra.weight)"),
        (wrong_shape, "blocks.0.attn1.to_q.weight is [3, 5], expected [32, 32]"),
    ],
)
@pytest.mark.parametrize("command", ["train", "convert"])
def test_a_wrong_transformer_file_is_refused_with_the_reason(
    tmp_path, capsys, run, official, write, write_wrong_file, expected, command
):
    path = tmp_path / "wan_high_noise.safetensors"
    write_wrong_file(official, path, write)
    if command == "train":
        error = error_of(capsys, "train", run, f"model.transformer={path}")
    else:
        error = error_of(capsys, "convert", path, tmp_path / "out", "--to", "diffusers")
        assert not (tmp_path / "out").exists()
    assert expected in error and path.name in error
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    ("component", "given", "expected"),
    [
        (
            "transformer",
            "i2v-a14b/transformer",
            "is a transformer of i2v-a14b (36 input channels), but t2v-a14b has 16",
        ),
        ("vae", "ti2v-5b/vae", "is a VAE with 48 latent channels, but t2v-a14b needs 16"),
        ("vae", "t2v-a14b/text_encoder", "is used as vae, but holds a text encoder"),
    ],
)
def test_a_component_of_another_model_is_refused(capsys, run, workshop, component, given, expected):
    path = workshop / given
    error = error_of(capsys, "train", run, f"model.{component}={path}")
    assert expected in error and str(path) in error


def test_a_file_name_of_the_other_expert_is_refused(tmp_path, capsys, run, official, write):
    path = tmp_path / "wan_low_noise.safetensors"
    write(official, path)
    error = error_of(capsys, "train", run, f"model.transformer={path}")
    assert "is used as transformer (high noise), but is named as the low-noise expert" in error
    assert "model.check_file_names" in error


def test_a_lora_of_another_model_is_refused(tmp_path, capsys, workshop, official, write):
    lora, base = tmp_path / "flux.safetensors", tmp_path / "high_noise.safetensors"
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file(
        {
            f"{name}.lora_down.weight": torch.zeros(4, 8),
            f"{name}.lora_up.weight": torch.zeros(8, 4),
        },
        lora,
    )
    write(official, base)
    for arguments in (
        ("merge", base, lora, tmp_path / "out.safetensors"),
        ("convert", lora, tmp_path / "out.safetensors", "--to", "comfyui"),
        ("sample", workshop / "t2v-a14b", "--prompt", "x", "--lora", lora, "--out", "o.mp4"),
    ):
        error = error_of(capsys, *arguments)
        assert "flux.safetensors" in error and "Flux" in error
    assert not (tmp_path / "out.safetensors").exists()
