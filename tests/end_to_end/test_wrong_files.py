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


class _Runs:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return (open, (str(self.path), "w"))


@pytest.fixture
def write(workshop: Path) -> Callable[[dict[str, Tensor], Path], None]:
    """Writes an expert with its configuration, which shapes alone would not tell at this size."""
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


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command complains about: one line and status 1, no traceback."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("onewan: ") and "\n" not in error and "Traceback" not in error
    return error


Write = Callable[[dict[str, Tensor], Path], None]


def cut_off(tensors: dict[str, Tensor], path: Path, write: Write) -> None:
    write(tensors, path)
    path.write_bytes(path.read_bytes()[:-100])


def absurd(_tensors: dict[str, Tensor], path: Path, _write: Write) -> None:
    path.write_bytes(struct.pack("<Q", 2**62) + b'{"a":1}')


def evil(_tensors: dict[str, Tensor], path: Path, _write: Write) -> None:
    path.write_bytes(pickle.dumps({"a": _Runs(path.with_name("proof"))}, protocol=2))


def empty(_tensors: dict[str, Tensor], path: Path, _write: Write) -> None:
    path.write_bytes(b"")


def folder(_tensors: dict[str, Tensor], path: Path, _write: Write) -> None:
    path.mkdir()


def clip_branch(tensors: dict[str, Tensor], path: Path, write: Write) -> None:
    width = tensors["patch_embedding.weight"].shape[0]
    more = {f"blocks.0.cross_attn.{n}_img.weight": torch.zeros(width, width) for n in "kv"}
    write(tensors | more, path)


def missing(tensors: dict[str, Tensor], path: Path, write: Write) -> None:
    left_out = ("blocks.0.self_attn.q.weight", "blocks.1.ffn.0.bias")
    write({n: t for n, t in tensors.items() if n not in left_out}, path)


def surplus(tensors: dict[str, Tensor], path: Path, write: Write) -> None:
    write(tensors | {"blocks.0.extra.weight": torch.zeros(1)}, path)


def misshapen(tensors: dict[str, Tensor], path: Path, write: Write) -> None:
    write(tensors | {"blocks.0.self_attn.q.weight": torch.zeros(3, 5)}, path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut_off, "is not a whole safetensors file: has "),
        (absurd, "should begin with a header of 4611686018427387904 bytes, and has 15 bytes"),
        (evil, "is a pickle that holds more than tensors"),
        (empty, "is empty (0 bytes)"),
        (folder, "holds no weights (*.safetensors, *.gguf, *.pth)"),
        (clip_branch, "is a Wan 2.1 image-to-video transformer, which has a CLIP branch"),
        (missing, "2 weights missing (blocks.0.attn1.to_q.weight, blocks.1.ffn.net.0.proj.bias)"),
        (surplus, "1 weights surplus (blocks.0.extra.weight)"),
        (misshapen, "blocks.0.attn1.to_q.weight is [3, 5], expected [32, 32]"),
    ],
)
@pytest.mark.parametrize("command", ["train", "convert"])
def test_wrong_files(tmp_path, capsys, run, official, write, spoil, said, command):
    path = tmp_path / "wan_high_noise.safetensors"
    spoil(official, path, write)
    if command == "train":
        error = complaint(capsys, "train", run, f"model.transformer={path}")
    else:
        error = complaint(capsys, "convert", path, tmp_path / "out", "--to", "diffusers")
        assert not (tmp_path / "out").exists()
    assert said in error and path.name in error
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    ("component", "given", "said"),
    [
        (
            "transformer",
            "i2v-a14b/transformer",
            "is a transformer of i2v-a14b (36 input channels), and one of t2v-a14b (16) is wanted",
        ),
        ("vae", "ti2v-5b/vae", "is a VAE with 48 latent channels, and t2v-a14b needs 16"),
        ("vae", "t2v-a14b/text_encoder", "was given as model.vae, and holds a text encoder"),
    ],
)
def test_components_of_other_models(capsys, run, workshop, component, given, said):
    path = workshop / given
    error = complaint(capsys, "train", run, f"model.{component}={path}")
    assert said in error and str(path) in error


def test_a_name_that_contradicts_its_place(tmp_path, capsys, run, official, write):
    path = tmp_path / "wan_low_noise.safetensors"
    write(official, path)
    error = complaint(capsys, "train", run, f"model.transformer={path}")
    assert "model.transformer (high noise), and by its name is the low-noise expert" in error
    assert "model.check_file_names" in error


def test_a_lora_of_another_model(tmp_path, capsys, workshop, official, write):
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
        error = complaint(capsys, *arguments)
        assert "flux.safetensors" in error and "Flux" in error
    assert not (tmp_path / "out.safetensors").exists()
