"""Files made to crash, hang, fill the memory or run code are refused with one line, at once."""

from __future__ import annotations

import json
import os
import pickle
import struct
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from onewan.cli import main
from onewan.errors import CheckpointError
from onewan.formats.container import open_tensors
from onewan.formats.weights import open_component


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """Each file is refused within two seconds, or five where all processors are busy."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 5


def refused(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which `onewan inspect` refuses `path`."""
    assert main(["inspect", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and len(error) < 700
    return error


def header_of(text: str | bytes, data: bytes = b"") -> bytes:
    text = text if isinstance(text, bytes) else text.encode()
    return len(text).to_bytes(8, "little") + text + data


ONE = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    "content",
    [
        pytest.param((2**60).to_bytes(8, "little") + b'{"a":1}', id="a header of 2^60 bytes"),
        pytest.param(header_of('{"a":' * 40_000), id="nested"),
        pytest.param(header_of("[" * 40_000), id="lists"),
        pytest.param(header_of('{"\\ud800":1}'), id="a lone surrogate"),
        pytest.param(header_of("{" + ONE + "," + ONE + "}", b"\0" * 8), id="the same key twice"),
        pytest.param(header_of('{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}')),
        pytest.param(header_of('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}')),
        pytest.param(
            header_of(
                "{" + ONE + ',"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}', b"\0" * 6
            ),
            id="overlapping",
        ),
        pytest.param(
            header_of('{"a":{"dtype":"F32","shape":[4611686018427387904,8],"data_offsets":[0,4]}}'),
            id="a product that overflows",
        ),
        pytest.param(header_of('{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4)),
        pytest.param(header_of('{"__metadata__":{"a":1}}')),
        pytest.param(header_of(b'{"\xff":1}')),
        pytest.param(b"\x80\x02."),
        pytest.param(b"PK\x03\x04" + b"\0" * 40),
        pytest.param(b"GGUF"),
    ],
)
def test_damaged_headers_are_refused(tmp_path, capsys, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert str(path) in refused(path, capsys)


def test_a_safetensors_header_of_a_gigabyte_of_entries_is_refused(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((40 << 20).to_bytes(8, "little") + b'{"a"')
        file.truncate(60 << 20)
    assert "has a header of 41943040 bytes, more than any model's" in refused(path, capsys)


# -------------------------------------------------------------------------------------------- GGUF


def gguf_file(path: Path, pairs: bytes, num_pairs: int, num_tensors: int = 0) -> Path:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_pairs) + pairs)
    return path


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def test_a_gguf_with_a_large_vocabulary_opens_at_once(tmp_path):
    tokens = b"".join(text(f"token{n}") for n in range(256_000))
    pairs = [
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 256_000) + tokens,
        text("tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, 256_000) + b"\0" * 1_024_000,
        text("general.name") + struct.pack("<I", 8) + text("größe"),
    ]
    started = time.monotonic()
    file = open_tensors(gguf_file(tmp_path / "t5.gguf", b"".join(pairs), 3))
    assert time.monotonic() - started < 2
    assert file.metadata == {
        "tokenizer.ggml.tokens": "256000 values",
        "tokenizer.ggml.scores": "256000 values",
        "general.name": "größe",
    }


def test_tensors_of_the_gguf_library_are_found(tmp_path):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(str(path), "wan")
    writer.add_array("comfy.gguf.orig_shape.a", [2, 3, 4])
    values = {
        "a": np.arange(24, dtype=np.float32).reshape(2, 12),
        "c": np.ones(3, np.float16),
        "e": np.ones((0, 4), np.float32),
    }
    for name, value in values.items():
        writer.add_tensor(name, value)
    packed = gguf.GGMLQuantizationType.Q8_0
    block = gguf.quants.quantize(np.ones((2, 64), np.float32), packed)
    writer.add_tensor("b", block, raw_dtype=packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_tensors(path)
    assert {n: (i.shape, i.dtype) for n, i in file.tensors.items()} == {
        "a": ((2, 3, 4), "F32"),
        "b": ((2, 64), "Q8_0"),
        "c": ((3,), "F16"),
        "e": ((0, 4), "F32"),
    }
    for keep in (True, False):
        assert torch.equal(file.read("a", keep_mapped=keep), torch.arange(24.0).reshape(2, 3, 4))
        assert np.array_equal(file.read("b", keep_mapped=keep).numpy(), block)
        assert torch.equal(file.read("c", keep_mapped=keep), torch.ones(3).half())
        assert file.read("e", keep_mapped=keep).shape == (0, 4)


@pytest.mark.parametrize(
    ("pairs", "num_pairs", "num_tensors"),
    [
        pytest.param(text("a") + struct.pack("<IIQ", 9, 4, 2**62), 1, 0, id="a long array"),
        pytest.param(text("a") + struct.pack("<IIQ", 9, 8, 2**62), 1, 0, id="of strings"),
        pytest.param(text("a") + struct.pack("<II", 9, 9) * 50_000, 1, 0, id="arrays in arrays"),
        pytest.param(text("a") + struct.pack("<IQ", 8, 2**62), 1, 0, id="a long string"),
        pytest.param(struct.pack("<Q", 2**62), 1, 0, id="a long name"),
        pytest.param(b"", 2**62, 0, id="many pairs"),
        pytest.param(b"", 0, 2**62, id="many tensors"),
        pytest.param(text("a") + struct.pack("<II", 77, 0), 1, 0, id="an unknown type"),
        pytest.param(text("t") + struct.pack("<I", 2**31), 0, 1, id="many axes"),
        pytest.param(text("t") + struct.pack("<IQIQ", 1, 2**62, 0, 0), 0, 1, id="a huge tensor"),
        pytest.param(text("t") + struct.pack("<IQIQ", 1, 4, 0, 2**62), 0, 1, id="an offset"),
        pytest.param(text("t") + struct.pack("<IQIQ", 1, 4, 999, 0), 0, 1, id="a tensor's type"),
        pytest.param(text("t") + struct.pack("<IQIQ", 1, 3, 8, 0), 0, 1, id="part of a block"),
        pytest.param(b"\xff" * 100, 1, 0, id="rubbish"),
    ],
)
def test_hostile_gguf_headers_are_refused(tmp_path, capsys, pairs, num_pairs, num_tensors):
    path = gguf_file(tmp_path / "x.gguf", pairs, num_pairs, num_tensors)
    assert "is not a complete GGUF file" in refused(path, capsys)


def test_an_array_of_empty_strings_as_large_as_the_file_is_refused(tmp_path, capsys):
    pairs = text("a") + struct.pack("<IIQ", 9, 8, 5_000_000)
    path = gguf_file(tmp_path / "x.gguf", pairs, 1)
    with path.open("r+b") as file:
        file.truncate(60 << 20)
    assert "arrays of 5000000 strings" in refused(path, capsys)


# ----------------------------------------------------------------------------------------- pickles


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, ...]:
        return self.call


def zipped(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    return path


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(Calls(os.system, "touch canary"), id="a program"),
        pytest.param(Calls(bytearray, 10**12), id="a byte array"),
        pytest.param(Calls(torch.FloatTensor, 10**11), id="a tensor"),
        pytest.param(Calls(eval, "1"), id="an expression"),
    ],
)
def test_pickles_that_create_more_than_tensors_are_not_loaded(tmp_path, monkeypatch, capsys, value):
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps({"blocks.0.self_attn.q.weight": value}, protocol=2)
    assert "more than tensors" in refused(zipped(tmp_path / "x.pth", content), capsys)
    (tmp_path / "old.pth").write_bytes(content)
    assert "more than tensors" in refused(tmp_path / "old.pth", capsys)
    assert {p.name for p in tmp_path.iterdir()} == {"x.pth", "old.pth"}


def test_compressed_archives_and_endless_pickles_are_not_loaded(tmp_path, capsys):
    bomb = zipped(tmp_path / "bomb.pth", b"\0" * (40 << 20), zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 100_000
    assert "is compressed, which PyTorch never does" in refused(bomb, capsys)
    long = zipped(tmp_path / "long.pth", b"\x80\x02" + b"]" * (17 << 20) + b".")
    assert "has a pickle of more than 16 MB" in refused(long, capsys)


def test_tensors_larger_than_their_values_are_refused(tmp_path, capsys):
    repeated = torch.zeros(1).expand(10**6, 10**6)
    torch.save({"blocks.0.self_attn.q.weight": repeated}, tmp_path / "x.pth")
    assert "have no values of their own" in refused(tmp_path / "x.pth", capsys)
    meta = torch.zeros(8, 8, device="meta")
    torch.save({"blocks.0.self_attn.q.weight": meta}, tmp_path / "y.pth")
    assert "more than tensors" in refused(tmp_path / "y.pth", capsys)


# ------------------------------------------------------------------ shards, configurations, devices


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "..", "a\0b", "\ud800", "C:\\x", "a\nb", "", "a" * 5000],
)
def test_names_of_shards_that_lead_elsewhere_are_refused(tmp_path, capsys, name):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    index = tmp_path / "m" / "model.safetensors.index.json"
    index.parent.mkdir()
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    assert "which is not the name of a file" in refused(index.parent, capsys)


@pytest.mark.parametrize("content", ['{"a":' * 50_000, "[" * 50_000, "NaN", "1" * 5000, "\0", "{}"])
def test_hostile_indices_are_refused(tmp_path, capsys, content):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    assert str(index) in refused(tmp_path, capsys)
    assert str(index) in refused(index, capsys)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 10**9},
        {"num_layers": "many"},
        {"num_layers": None},
        {"rope_max_seq_len": 10**9},
        {"ffn_dim": 10**30},
        {"num_attention_heads": True},
        {"in_channels": [1] * 2000},
    ],
)
def test_hostile_configurations_are_refused(tiny_model, tmp_path, changes):
    source = tiny_model("t2v-a14b") / "transformer"
    for file in source.glob("*.safetensors"):
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    (name,) = changes
    with pytest.raises(CheckpointError, match=rf"does not describe its weights \({name} is"):
        open_component(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "x.safetensors")
    assert "is not a file" in refused(tmp_path / "x.safetensors", capsys)
    assert "is not a file" in refused(tmp_path, capsys)


def test_an_unknown_type_of_tensor_is_no_weight(tmp_path, capsys):
    entry = {"dtype": "F8_E8M0", "shape": [4, 4], "data_offsets": [0, 16]}
    header = json.dumps(
        {"blocks.0.self_attn.q.weight": entry, "x": entry | {"data_offsets": [16, 32]}}
    )
    (tmp_path / "x.safetensors").write_bytes(header_of(header, b"\0" * 32))
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 0
    assert "an unsupported quantization" in capsys.readouterr().out
