"""Reading headers of each container and of shards, and the errors for damaged files."""

from __future__ import annotations

import json
import pickle
import struct
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from onewan.errors import CheckpointError
from onewan.formats.backends import TensorInfo
from onewan.formats.container import open_tensors
from onewan.formats.weights import open_component
from onewan.formats.write import LazyTensor, write_safetensors

TENSORS = {
    "patch_embedding.weight": torch.randn(8, 16, 1, 2, 2),
    "blocks.0.self_attn.q.weight": torch.randn(8, 8).bfloat16(),
    "blocks.0.self_attn.q.bias": torch.randn(8, dtype=torch.float64),
    "fp8": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(2.5),
    "bytes": torch.arange(16, dtype=torch.uint8),
    "none": torch.zeros(0, 3),
}


def write_gguf(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "wan")
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).numpy()
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    half = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16)
    writer.add_tensor("half", half, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.add_tensor("flat", values)
    writer.add_array("comfy.gguf.orig_shape.flat", [2, 2, 1, 8, 8])
    writer.add_string("general.name", "tiny")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def fault(path: Path) -> str:
    """What opening `path` and reading all of it complains about: one line, naming the file."""
    with pytest.raises(CheckpointError) as caught:
        file = open_tensors(path)
        for name in file.tensors:
            file.read(name)
    message = str(caught.value)
    assert "\n" not in message and path.name in message
    return message


def test_a_safetensors_file_is_read(tmp_path):
    path = tmp_path / "any.bin"  # the extension decides nothing
    save_file(TENSORS, path, {"a": "b"})
    file = open_tensors(path)
    assert (file.container, file.metadata, file.files) == ("safetensors", {"a": "b"}, (path,))
    assert file.tensors["fp8"] == TensorInfo((4, 4), "F8_E4M3")
    assert file.tensors["scalar"] == TensorInfo((), "F32")
    for name, tensor in TENSORS.items():
        read = file.read(name)
        assert read.dtype == tensor.dtype and read.shape == tensor.shape
        assert same_bits(read, tensor)
    with pytest.raises(KeyError):
        file.read("absent")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_read(tmp_path, zipped):
    path = tmp_path / "any.pth"
    tensors = {n: t for n, t in TENSORS.items() if zipped or n != "fp8"}  # older than fp8
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    file = open_tensors(path)
    assert file.container == "pickle"
    expected = {
        "patch_embedding.weight": ((8, 16, 1, 2, 2), "F32"),
        "blocks.0.self_attn.q.weight": ((8, 8), "BF16"),
        "blocks.0.self_attn.q.bias": ((8,), "F64"),
        "fp8": ((4, 4), "F8_E4M3"),
        "scalar": ((), "F32"),
        "bytes": ((16,), "U8"),
        "none": ((0, 3), "F32"),
    }
    found = {n: (i.shape, i.dtype) for n, i in file.tensors.items()}
    assert found == {n: expected[n] for n in tensors}
    assert torch.equal(file.read("bytes"), TENSORS["bytes"])


def test_a_gguf_file_is_read(tmp_path):
    file = open_tensors(write_gguf(tmp_path / "a.gguf"))
    assert file.container == "gguf" and file.metadata["general.name"] == "tiny"
    assert file.tensors == {
        "packed": TensorInfo((4, 64), "Q8_0"),
        "half": TensorInfo((4, 64), "BF16"),
        "flat": TensorInfo((2, 2, 1, 8, 8), "F32"),
    }
    assert [n for n, i in file.tensors.items() if i.is_quantized] == ["packed"]
    assert file.read("packed").shape == (4, 64 // 32 * 34)
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(file.read("flat"), values.reshape(2, 2, 1, 8, 8))
    assert torch.equal(file.read("half"), values.bfloat16())


# ------------------------------------------------------------------------------------------- shards


def write_shards(folder: Path) -> dict[str, str]:
    homes = {}
    for number, name in enumerate(TENSORS, start=1):
        file = f"model-{number:05}-of-{len(TENSORS):05}.safetensors"
        save_file({name: TENSORS[name]}, folder / file)
        homes[name] = file
    return homes


def write_index(folder: Path, homes: object) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": homes}), encoding="utf-8")


@pytest.mark.parametrize("indexed", [True, False])
def test_shards_are_read_as_one_file(tmp_path, indexed):
    homes = write_shards(tmp_path)
    if indexed:
        write_index(tmp_path, homes)
    file = open_tensors(tmp_path)
    assert file.tensors.keys() == TENSORS.keys() and len(file.files) == len(TENSORS)
    assert torch.equal(file.read("scalar"), TENSORS["scalar"])


def test_shards_of_different_checkpoints_are_refused(tmp_path):
    homes = write_shards(tmp_path)
    last = sorted(homes.values())[-1]

    write_index(tmp_path, homes | {"more": last})
    assert "lists 1 tensors that no shard holds, such as more" in fault(tmp_path)
    write_index(tmp_path, homes | {"more": "../elsewhere.safetensors"})
    assert "'../elsewhere.safetensors', which is not the name of a file" in fault(tmp_path)
    write_index(tmp_path, homes | {"more": "..\\elsewhere.safetensors"})
    assert "which is not the name of a file" in fault(tmp_path)
    write_index(tmp_path, [1, 2])
    assert "is not an index of shards" in fault(tmp_path)
    write_index(tmp_path, homes)
    (tmp_path / last).unlink()
    with pytest.raises(CheckpointError, match=f"{last}: is missing"):
        open_tensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "has no shard 7" in fault(tmp_path)


def test_a_folder_without_exactly_one_checkpoint_is_refused(tmp_path):
    assert "holds no weights" in fault(tmp_path)
    save_file(TENSORS, tmp_path / "a.safetensors")
    assert open_tensors(tmp_path).tensors.keys() == TENSORS.keys()
    save_file(TENSORS, tmp_path / "b.safetensors")
    assert "holds 2 files of weights (a.safetensors, b.safetensors)" in fault(tmp_path)


# ------------------------------------------------------------------------------------ other content


class _Runs:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_does_not_run(tmp_path, zipped):
    path, proof = tmp_path / "evil.pth", tmp_path / "proof"
    if zipped:
        torch.save({"a": torch.zeros(1), "b": _Runs(proof)}, path)
    else:
        path.write_bytes(pickle.dumps({"a": _Runs(proof)}, protocol=2))
    message = fault(path)
    assert "more than tensors" in message and "open" in message
    assert not proof.exists()


def test_a_file_of_other_content_is_refused_with_a_description_of_it(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match="there is no such file"):
        open_tensors(path)
    path.write_bytes(b"")
    assert "is empty (0 bytes)" in fault(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "Git LFS pointer" in fault(path)
    path.write_bytes(b"<!DOCTYPE html><html>Not found</html>")
    assert "is not a safetensors, GGUF or PyTorch file" in fault(path)
    path.write_bytes(b"abc")
    assert "is not a safetensors, GGUF or PyTorch file" in fault(path)
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    assert "header of 9223372036854775808 bytes, and has 10 bytes" in fault(path)
    save_file(TENSORS, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert f"has {len(whole) - 1} bytes, and its header describes {len(whole)}" in fault(path)
    path.write_bytes(whole + b"\0")
    assert f"has {len(whole) + 1} bytes, and its header describes {len(whole)}" in fault(path)

    torch.save([torch.zeros(1)], path)
    assert "not a dictionary of tensors" in fault(path)
    torch.save({"a": {"b": torch.zeros(1)}}, path)
    assert "not a dictionary of tensors" in fault(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "is not a complete PyTorch file" in fault(path)

    write_gguf(path)
    path.write_bytes(path.read_bytes()[:-40])
    assert "is not a complete GGUF file" in fault(path)


def test_a_pickle_with_a_type_that_weights_never_have_is_refused(tmp_path):
    torch.save({"a": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: a has the type complex64"):
        open_tensors(tmp_path / "a.pth")


def test_a_gguf_header_that_points_past_the_end_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    counts = struct.pack("<IQQ", 3, 0, 1)  # version, tensors, key-value pairs
    key = struct.pack("<Q", 1) + b"a"
    array = struct.pack("<IIQ", 9, 0, 3_000_000)  # an array of so many bytes
    path.write_bytes(b"GGUF" + counts + key + array + bytes(64))
    assert "is not a complete GGUF file (its header points to byte" in fault(path)


# -------------------------------------------------------------------------------- mutated headers

_SANE = json.dumps(
    {
        "__metadata__": {"format": "pt"},
        "patch_embedding.weight": {
            "dtype": "F32",
            "shape": [4, 16, 1, 2, 2],
            "data_offsets": [0, 1024],
        },
        "blocks.0.self_attn.q.weight": {
            "dtype": "F8_E4M3",
            "shape": [8, 8],
            "data_offsets": [1024, 1088],
        },
        "blocks.0.self_attn.q.scale_weight": {
            "dtype": "F32",
            "shape": [1],
            "data_offsets": [1088, 1092],
        },
        "blocks.0.self_attn.q.comfy_quant": {
            "dtype": "U8",
            "shape": [4],
            "data_offsets": [1092, 1096],
        },
    }
)
_NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, 1, 2**31, 2**32, 2**63, 2**64])
)
_LEAVES = st.one_of(st.none(), st.booleans(), _NUMBERS, st.text(max_size=8))
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


def _paths(node: object, at: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """The path of every value in a JSON document."""
    inner = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    return [at, *(place for key, value in inner for place in _paths(value, (*at, key)))]


def _with_value(node: object, place: tuple[object, ...], value: object) -> object:
    if not place:
        return value
    copy = dict(node) if isinstance(node, dict) else list(node)  # type: ignore[call-overload]
    copy[place[0]] = _with_value(copy[place[0]], place[1:], value)
    return copy


@st.composite
def mutated_safetensors(draw: st.DrawFn) -> bytes:
    header = json.loads(_SANE)
    for _ in range(draw(st.integers(0, 3))):
        if isinstance(header, dict):
            header = _with_value(header, draw(st.sampled_from(_paths(header))), draw(_VALUES))
    text = json.dumps(header).encode()
    length = draw(st.one_of(st.just(len(text)), st.integers(0, 2**64 - 1)))
    content = bytearray(struct.pack("<Q", length) + text + bytes(1096))
    for _ in range(draw(st.integers(0, 3))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])


def _survives(path: Path) -> None:
    """Opening, detecting and reading give what is there, or one clear line; never anything else,
    and nothing is read past the end of the file."""
    size = path.stat().st_size
    try:
        file = open_tensors(path)
        assert all(i.is_quantized or i.elements <= size for i in file.tensors.values())
        for name, info in file.tensors.items():
            assert info.is_quantized or tuple(file.read(name).shape) == info.shape
        open_component(file)
    except CheckpointError as error:
        message = str(error)
        assert "\n" not in message and path.name in message and len(message) < 1000


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(content=mutated_safetensors())
def test_mutated_safetensors_headers_never_crash_the_reader(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(content)
    _survives(path)


@pytest.mark.parametrize("kind", ["gguf", "pickle", "old pickle"])
def test_mutated_bytes_of_other_containers_never_crash_the_reader(tmp_path, kind):
    path = tmp_path / "mutated"
    if kind == "gguf":
        write_gguf(path)
    else:
        torch.save({"a": torch.zeros(4)}, path, _use_new_zipfile_serialization=kind == "pickle")
    whole = path.read_bytes()

    @settings(max_examples=200, deadline=None)
    @given(
        flips=st.lists(
            st.tuples(st.integers(0, min(len(whole), 700) - 1), st.integers(0, 255)), max_size=3
        ),
        length=st.one_of(st.just(len(whole)), st.integers(1, len(whole))),
    )
    def check(flips: list[tuple[int, int]], length: int) -> None:
        content = bytearray(whole)
        for place, value in flips:
            content[place] = value
        path.write_bytes(content[:length])
        _survives(path)

    check()


# ------------------------------------------------------------------------------------------ writing


def test_a_written_file_reads_back_equal(tmp_path):
    path = tmp_path / "deep" / "a.safetensors"
    counts: list[int] = []
    write_safetensors(path, TENSORS, {"title": "é"}, counts.append)
    file = open_tensors(path)
    assert file.metadata["title"] == "é" and sum(counts) == sum(t.nbytes for t in TENSORS.values())
    for name, tensor in TENSORS.items():
        assert same_bits(file.read(name), tensor)
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    made: list[weakref.ref[torch.Tensor]] = []

    def make() -> torch.Tensor:
        assert not any(ref() is not None for ref in made), "an earlier tensor is still in memory"
        tensor = torch.zeros(8)
        made.append(weakref.ref(tensor))
        return tensor

    tensors = {f"t{i}": LazyTensor((8,), torch.float32, make) for i in range(5)}
    write_safetensors(tmp_path / "a.safetensors", tensors, {})
    assert len(made) == 5


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"before")

    def make() -> torch.Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        write_safetensors(path, {"a": LazyTensor((8,), torch.float32, make)}, {})
    with pytest.raises(ValueError, match=r"expected \[8\] torch.float32"):
        write_safetensors(path, {"a": LazyTensor((8,), torch.float32, lambda: torch.zeros(4))}, {})
    assert path.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1
