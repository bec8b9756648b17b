"""Hostile and damaged weight files: ``onewan inspect``, ``convert`` and ``merge``.

Each case takes a small file that onewan reads (a model as safetensors, GGUF or PyTorch file, LoRAs
of all kinds with the keys of several trainers, an embedding, a model's folder), changes it, and
calls a command on it. Changes are of the bytes, of the header's or a configuration's JSON, of the
values of tensors, or replace the file by one that was made to do harm.

    python benchmarks/robustness/checkpoints.py --count 3000 --out checkpoints.json
"""

from __future__ import annotations

import atexit
import copy
import io
import json
import os
import pickle
import random
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from harness import canary, run_cases
from safetensors.torch import save
from torch import Tensor

from onewan.cli import main
from onewan.demo.tiny_model import write_tiny_model
from onewan.formats.key_maps import to_diffusers, to_official, transformer_names

WIDTH, FFN = 128, 256
LAYERS = ("self_attn.q", "cross_attn.v", "ffn.0", "ffn.2")


def run(arguments: Sequence[str]) -> int:
    return main(list(arguments))


# ------------------------------------------------------------------------------------ sound files


@lru_cache(maxsize=1)
def transformer() -> dict[str, Tensor]:
    """The weights of a T2V transformer of one block, by official names."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (WIDTH, 16, 1, 2, 2),
        "head.head.weight": (64, WIDTH),
        "head.head.bias": (64,),
        "head.modulation": (1, 2, WIDTH),
        "blocks.0.modulation": (1, 6, WIDTH),
        "text_embedding.0.weight": (WIDTH, 32),
        "time_embedding.0.weight": (WIDTH, 256),
        "time_projection.1.weight": (6 * WIDTH, WIDTH),
        "time_projection.1.bias": (6 * WIDTH,),
        "blocks.0.ffn.0.weight": (FFN, WIDTH),
        "blocks.0.ffn.0.bias": (FFN,),
        "blocks.0.ffn.2.weight": (WIDTH, FFN),
    }
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}
    for name in sorted(to_official(n) for n in transformer_names(1)):
        square = name.endswith(".weight") and "norm" not in name
        shape = shapes.get(name, (WIDTH, WIDTH) if square else (WIDTH,))
        weights[name] = torch.randn(shape, generator=generator).half()
    return weights


@lru_cache(maxsize=1)
def sound_files() -> dict[str, bytes]:
    """The content of each sound file by its name; the name's suffix is that of the container."""
    weights = transformer()
    pth = io.BytesIO()
    torch.save(weights, pth)
    fp8: dict[str, Tensor] = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for name, tensor in weights.items():
        quantized = name.startswith("blocks.") and tensor.ndim == 2
        fp8[name] = tensor.to(torch.float8_e4m3fn) if quantized else tensor
        if quantized:
            fp8[name.replace(".weight", ".scale_weight")] = torch.tensor(0.5)
    files = {
        "model_high_noise.safetensors": save(weights),
        "diffusers_low_noise.safetensors": save({to_diffusers(n): t for n, t in weights.items()}),
        "fp8_high_noise.safetensors": save(fp8),
        "model_high_noise.pth": pth.getvalue(),
        "model_high_noise.gguf": _gguf(weights),
        "embedding.safetensors": save({"umt5xxl": torch.randn(3, 64)}, {"onewan.placeholder": "x"}),
    }
    for name, (tensors, metadata) in loras().items():
        files[f"lora_{name}_high_noise.safetensors"] = save(tensors, metadata)
    return files


def _gguf(weights: dict[str, Tensor]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        writer = gguf.GGUFWriter(str(path), "wan")
        writer.add_array("tokens", ["a", "b"] * 100)
        # GGUF has four axes at most; ComfyUI-GGUF keeps the shape of the patch embedding beside it.
        writer.add_array("comfy.gguf.orig_shape.patch_embedding.weight", [WIDTH, 16, 1, 2, 2])
        packed = gguf.GGMLQuantizationType.Q8_0
        for name, tensor in weights.items():
            data = tensor.float().numpy()
            if name.startswith("blocks.") and data.ndim == 2:
                writer.add_tensor(name, gguf.quants.quantize(data, packed), raw_dtype=packed)
            else:
                flat = data.reshape(WIDTH, 16, -1) if data.ndim > 4 else data
                writer.add_tensor(name, np.ascontiguousarray(flat))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def loras() -> dict[str, tuple[dict[str, Tensor], dict[str, str] | None]]:
    """(tensors, header) of LoRA files by the kind and the keys."""

    def random_tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    generator = torch.Generator().manual_seed(1)
    files: dict[str, dict[str, Tensor]] = {}
    for layer in LAYERS:
        out, into = transformer()[f"blocks.0.{layer}.weight"].shape
        official, diffusers = f"blocks.0.{layer}", to_diffusers(f"blocks.0.{layer}")
        down, up = random_tensor(2, into), random_tensor(out, 2)
        alpha = {"alpha": torch.tensor(2.0)}
        pair = {"lora_A.weight": down, "lora_B.weight": up}
        kohya = {"lora_down.weight": down, "lora_up.weight": up, **alpha}
        loha = {f"hada_w{n}_a": random_tensor(out, 2) for n in (1, 2)}
        loha |= {f"hada_w{n}_b": random_tensor(2, into) for n in (1, 2)}
        lokr = {"lokr_w1": random_tensor(4, 4), "lokr_w2_a": random_tensor(out // 4, 2)}
        lokr |= {"lokr_w2_b": random_tensor(2, into // 4)}
        rotation = {"oft_R.weight": random_tensor(into // 8, 28)}
        flat = official.replace(".", "_")
        for name, start, parts in (
            ("comfyui", f"diffusion_model.{official}", {**pair, **alpha}),
            ("kohya", f"lora_unet_{flat}", kohya),
            ("fun", f"lora_unet__{flat}", kohya),
            ("diffusers", f"transformer.{diffusers}", pair),
            ("combined", f"diffusion_model.transformer_1.{official}", pair),
            ("combined", f"diffusion_model.transformer_2.{official}", pair),
            ("plain", official, {k.replace(".w", ".default.w"): t for k, t in pair.items()}),
            ("peft", f"base_model.model.{diffusers}", pair),
            ("loha", f"diffusion_model.{official}", {**loha, **alpha}),
            ("lokr", f"lycoris_{diffusers.replace('.', '_')}", {**lokr, **alpha}),
            ("oft", f"lora_unet_{flat}", {"oft_blocks": random_tensor(out // 8, 8, 8), **alpha}),
            ("peft_oft", f"diffusion_model.{official}", rotation),
            ("dora", f"diffusion_model.{official}", {**pair, "dora_scale": torch.ones(1, into)}),
            ("diff", f"diffusion_model.{official}", {"diff": random_tensor(out, into)}),
            ("distilled", f"diffusion_model.{official}", {**pair, "diff_b": random_tensor(out)}),
        ):
            files.setdefault(name, {}).update({f"{start}.{k}": t.clone() for k, t in parts.items()})
    files["distilled"]["diffusion_model.blocks.0.cross_attn.k_img.diff_b"] = random_tensor(WIDTH)
    files["distilled"]["diffusion_model.blocks.0.diff_m"] = random_tensor(1, 6, WIDTH)
    files["comfyui"]["diffusion_model.patch_embedding.lora_A.weight"] = random_tensor(
        2, 16, 1, 2, 2
    )
    files["comfyui"]["diffusion_model.patch_embedding.lora_B.weight"] = random_tensor(
        WIDTH, 2, 1, 1, 1
    )
    settings = {"r": 2, "lora_alpha": 4, "rank_pattern": {}, "alpha_pattern": {"ffn.net.2": 1}}
    header = json.dumps({f"transformer.{name}": value for name, value in settings.items()})
    return {
        name: (tensors, {"lora_adapter_metadata": header} if name == "diffusers" else {"a": "b"})
        for name, tensors in files.items()
    }


@lru_cache(maxsize=1)
def sound_model() -> Path:
    """A whole model in the diffusers layout, whose transformer has shards."""
    folder = Path(tempfile.mkdtemp(prefix="onewan-robustness-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_tiny_model(folder, "ti2v-5b", width=32, layers=1)
    return folder


# ---------------------------------------------------------------------------------------- changes

_ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**62, 2**64, 10**30, 1.5, float("nan"), float("inf"), "", "a",
    "\0", "\ud800", "../x", "/dev/zero", "\x1b[31m", "a\nb", "x" * 100_000, [], [[]], {},
    [2**40] * 3, "(.*)*(.*)*x", "1e999", '{"a":' * 20_000,
)  # fmt: skip


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    content = bytearray(data)
    # Most of a file is values, and most faults are in its header.
    end = len(content) if rng.random() < 0.3 else min(len(content), 3000)
    position = rng.randrange(max(end, 1))
    kind = rng.randrange(7)
    if kind == 0:
        return bytes(content[:position])
    if kind == 1:
        content[position : position + rng.choice((1, 8, 500))] = b""
    elif kind == 2:
        content[position:position] = rng.randbytes(rng.choice((1, 8, 500)))
    elif kind == 3:
        content[position : position + 8] = rng.choice((2**60, 2**32, 2**63, 0, 7)).to_bytes(
            8, "little"
        )
    elif kind == 4:
        content[position : position + 400] = rng.randbytes(400)
    elif kind == 5:
        content[-400:] = rng.choice((b"\xff", b"\0", b"\x7f")) * 400
    else:
        for _ in range(rng.choice((1, 3, 30))):
            content[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(content)


def change_json(rng: random.Random, node: Any) -> Any:
    """`node` with one value or name somewhere below it replaced."""
    if isinstance(node, dict) and node and rng.random() < 0.9:
        name = rng.choice(list(node))
        kind = rng.randrange(8)
        if kind == 0:
            del node[name]
        elif kind == 1:
            node[str(rng.choice(_ODD))] = node.pop(name)
        elif kind == 2:
            node[name.replace("0", "99999999999999") + rng.choice(("", ".x"))] = node[name]
        else:
            node[name] = change_json(rng, node[name])
        return node
    if isinstance(node, list) and node and rng.random() < 0.8:
        index = rng.randrange(len(node))
        node[index] = change_json(rng, node[index])
        return node
    if isinstance(node, int) and rng.random() < 0.5:
        return node + rng.choice((-1, 1, 4, 1000, 2**33))
    return copy.deepcopy(rng.choice(_ODD))


def dumps(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def change_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with changes in its header's JSON."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for _ in range(rng.choice((1, 1, 2, 5))):
        header = change_json(rng, header)
    if rng.random() < 0.3 and isinstance(header, dict):
        odd = rng.choice(_ODD)
        names = ("lora_adapter_metadata", "onewan.config", "_quantization_metadata", "software")
        text = odd if isinstance(odd, str) else json.dumps({"r": odd, "lora_alpha": odd})
        header["__metadata__"] = {rng.choice((*names, "modelspec.title")): text}
    if rng.random() < 0.05 and isinstance(header, dict):
        header |= {
            f"k{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(20_000)
        }
    text = dumps(header)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def harmful_pickle(rng: random.Random, mark: Path) -> bytes:
    call = rng.choice(
        (
            Call(os.system, f"touch {mark}"),
            Call(exec, f"open({str(mark)!r}, 'w').close()"),
            Call(open, str(mark), "w"),
            Call(bytearray, 10**11),
            Call(torch.FloatTensor, 10**11),
            Call(torch.Tensor.expand, torch.zeros(1), 10**12),
            Call(torch.load, str(mark)),
        )
    )
    try:
        content = pickle.dumps(
            {"blocks.0.self_attn.q.weight": call}, protocol=rng.choice((2, 2, 4))
        )
    except (pickle.PicklingError, TypeError, AttributeError):
        content = b"\x80\x02" + b"(" * 100_000 + b"."
    if rng.random() < 0.5:
        return content
    archive = io.BytesIO()
    compression = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(archive, "w", compression) as file:
        file.writestr("archive/data.pkl", rng.choice((content, content, b"\0" * 20_000_000)))
        file.writestr("archive/version", "3\n")
    return archive.getvalue()


def harmful_gguf(rng: random.Random) -> bytes:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", rng.choice((len(value), len(value), 2**62))) + value

    counts = (0, 1, 2, 1000, 300_000, 2**40, 2**63)
    pairs = b""
    for _ in range(rng.randrange(4)):
        kind = rng.choice((0, 4, 8, 9, 9, 9, 12, 77))
        pairs += text(b"name") + struct.pack("<I", kind)
        if kind == 9:
            element = rng.choice((0, 4, 8, 8, 9))
            pairs += struct.pack("<IQ", element, rng.choice(counts))
        pairs += rng.choice((b"", b"\0" * rng.choice((4, 8, 1000, 3_000_000)), rng.randbytes(64)))
    for _ in range(rng.randrange(3)):
        axes = rng.choice((0, 1, 2, 5, 2**31))
        pairs += text(b"blocks.0.self_attn.q.weight") + struct.pack("<I", axes)
        pairs += struct.pack(
            "<QQIQ", rng.choice(counts), 128, rng.randrange(45), rng.choice(counts)
        )
    version = rng.choice((3, 3, 3, 2, 1, 0x03000000))
    return b"GGUF" + struct.pack("<IQQ", version, rng.choice(counts), rng.choice(counts)) + pairs


def changed_file(rng: random.Random, name: str, mark: Path) -> bytes:
    data = sound_files()[name]
    kind = rng.random()
    if name.endswith(".safetensors") and kind < 0.5:
        return change_header(rng, data)
    if name.endswith(".pth") and kind < 0.5:
        return harmful_pickle(rng, mark)
    if name.endswith(".gguf") and kind < 0.5:
        return harmful_gguf(rng)
    if kind < 0.75:
        for _ in range(rng.choice((1, 1, 3))):
            data = change_bytes(rng, data)
    elif kind < 0.85:  # values alone, which are at the end in all containers
        values = rng.choice((b"\xff", b"\0", b"\x7f", rng.randbytes(1))) * rng.choice((1, 16, 400))
        return data[: -len(values)] + values if not name.endswith(".pth") else data
    return data


# ------------------------------------------------------------------------------------------ cases


def changed_model(rng: random.Random, folder: Path) -> Path:
    """A whole model: links to the sound one's files, with some of the files replaced."""
    model = folder / rng.choice(("model", "model", "a b", "\x1b[31mred"))
    source = sound_model()
    files = [path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file()]
    changed = set(rng.sample(files, rng.choice((1, 1, 2, 4))))
    for file in files:
        target = model / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if file not in changed:
            target.symlink_to(source / file)
        elif rng.random() < 0.9:
            change_file_of_model(rng, source / file, target)
    if rng.random() < 0.3:
        index = {
            "weight_map": {"a": rng.choice(("../x", "\0", "\ud800", "..", "model.safetensors"))}
        }
        part = rng.choice(("transformer", "vae", "text_encoder"))
        (model / part / "x.safetensors.index.json").write_bytes(dumps(index))
    return model


def change_file_of_model(rng: random.Random, source: Path, target: Path) -> None:
    data = source.read_bytes()
    if source.suffix == ".json" and rng.random() < 0.7:
        content = json.loads(data)
        for _ in range(rng.choice((1, 1, 3))):
            content = change_json(rng, content)
        target.write_bytes(dumps(content))
    elif source.suffix == ".safetensors" and rng.random() < 0.4:
        target.write_bytes(change_header(rng, data))
    elif rng.random() < 0.1:
        rng.choice((target.mkdir, lambda: os.mkfifo(target), lambda: target.symlink_to(target)))()
    else:
        target.write_bytes(change_bytes(rng, data))


def make(seed: int, folder: Path) -> list[str]:
    rng = random.Random(seed)
    mark = canary(folder)
    command = rng.choice(("inspect", "inspect", "convert", "convert", "merge"))
    lora_names = [name for name in sound_files() if name.startswith("lora_")]
    if command == "merge":
        base = folder / "model_high_noise.safetensors"
        lora = folder / rng.choice(lora_names)
        change_base = rng.random() < 0.3
        for path, change in ((base, change_base), (lora, not change_base)):
            content = changed_file(rng, path.name, mark) if change else sound_files()[path.name]
            path.write_bytes(content)
        weight = rng.choice(("", "", ":0.5", ":-1", ":1e30"))
        return ["merge", str(base), f"{lora}{weight}", str(folder / "out.safetensors")]
    if rng.random() < 0.2:
        source = changed_model(rng, folder)
        if rng.random() < 0.3:
            source = source / rng.choice(("transformer", "vae", "text_encoder", "tokenizer"))
    elif rng.random() < 0.05:
        source = folder / "loras"
        source.mkdir()
        for name in rng.sample(lora_names, 3):
            (source / name).write_bytes(changed_file(rng, name, mark))
    else:
        name = rng.choice(list(sound_files()))
        source = folder / name
        source.write_bytes(changed_file(rng, name, mark))
    if command == "inspect":
        return ["inspect", str(source), *rng.choice(([], [], ["--json"]))]
    for_loras = source.name.startswith("lora") != (rng.random() < 0.1)
    formats = ("comfyui", "kohya", "diffusers", "no_alpha")
    to = rng.choice(formats if for_loras else ("diffusers", "official", "single", "fp8_scaled"))
    file = for_loras or (to in ("single", "fp8_scaled") and not source.is_dir())
    suffix = ".safetensors" if file != (rng.random() < 0.1) else ""
    arguments = ["convert", str(source), str(folder / f"out{suffix}"), "--to", to]
    if rng.random() < 0.3:
        arguments += ["--dtype", rng.choice(("float16", "bfloat16", "float32"))]
    return arguments


if __name__ == "__main__":
    run_cases(__doc__, make, run)
