"""The ComfyUI node for embeddings: its file, its installation, and its effect in a real ComfyUI."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from onewan.checkpoint.convert import convert_model
from onewan.checkpoint.saver import WanModelSaver
from onewan.cli import main
from onewan.formats.embedding import INPUT
from onewan.model.embedding import WanModelEmbedding
from onewan.model.load import WanModelLoader

ENCODE_PROMPTS = Path(__file__).parents[1] / "support" / "comfyui_prompts.py"

PROMPTS = {
    "a <fox> in snow": "a embedding:fox in snow",
    "<fox>": "embedding:fox",
    "<fox>, red <fox>": "embedding:fox, red embedding:fox",
    "a red square": "a red square",
}
"""By prompts for onewan, those for ComfyUI."""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The node's file, in the folder of a ComfyUI."""
    (tmp_path / "custom_nodes").mkdir()
    assert main(["comfyui-node", str(tmp_path)]) == 0
    [file] = (tmp_path / "custom_nodes").iterdir()
    return file


def imported(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("node", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_installed_node_sets_the_folder_of_a_copy_of_the_tokenizer(installed, tmp_path):
    node = imported(installed)
    assert INPUT == node.EMBEDDING_KEY
    assert node.NODE_CLASS_MAPPINGS.keys() == node.NODE_DISPLAY_NAME_MAPPINGS.keys()
    # The attributes of ComfyUI's WanT5Tokenizer; the test below runs the real one.
    inner = SimpleNamespace(embedding_key=INPUT, embedding_directory=None, tokenizer=object())
    outer = SimpleNamespace(clip_name=INPUT, clip="clip_umt5xxl", clip_umt5xxl=inner)
    enabled = node.with_embeddings(outer, (str(tmp_path),))
    assert enabled.clip_umt5xxl.embedding_directory == [str(tmp_path)]
    assert enabled.clip_umt5xxl.tokenizer is inner.tokenizer and enabled.clip_name == INPUT
    assert outer.clip_umt5xxl is inner and inner.embedding_directory is None
    other = SimpleNamespace(clip_l=SimpleNamespace(embedding_key="clip_l"))
    with pytest.raises(ValueError, match="not a tokenizer for UMT5-XXL; connect the text enc"):
        node.with_embeddings(other, [])


def test_the_node_is_updated_and_goes_into_comfyuis_folder_only(installed, tmp_path, capsys):
    text = installed.read_bytes()
    installed.write_text("an older version")
    assert main(["comfyui-node", str(tmp_path)]) == 0
    assert installed.read_bytes() == text
    assert main(["comfyui-node", str(installed.parent)]) == 1
    assert "has no folder custom_nodes; give the folder of ComfyUI" in capsys.readouterr().err
    assert [path.name for path in installed.parent.iterdir()] == ["onewan_embeddings.py"]


def test_a_real_comfyui_encodes_prompts_with_the_embedding(installed, shared, tmp_path):
    """ComfyUI's tokenizer and text encoder, with the weights and the vectors that onewan wrote."""
    comfyui = os.environ.get("COMFYUI")
    if not comfyui:
        pytest.skip("needs a ComfyUI checkout: make test COMFYUI=PATH")
    official = shared / "golden" / "t2v-A14B"
    convert_model(official, tmp_path / "single", "single")
    [weights] = (tmp_path / "single").glob("umt5_xxl_*.safetensors")
    weights.rename(tmp_path / "text_encoder.safetensors")
    model = WanModelLoader().load(
        official, dtype=torch.float32, components=["text_encoder", "tokenizer"]
    )
    _, encoder = model.prompt_encoder()
    vectors = torch.randn(5, encoder.config.d_model, generator=torch.Generator().manual_seed(0))
    fox = WanModelEmbedding(
        placeholder="<fox>", name="fox", uuid="1", vectors=nn.Parameter(vectors)
    )
    WanModelSaver().save_embedding(fox, tmp_path / "models" / "embeddings" / "fox.safetensors")
    model.add_embedding(fox)
    sizes = ("d_model", "d_ff", "d_kv", "num_heads", "num_layers", "vocab_size")
    request = {
        "config": {name: getattr(encoder.config, name) for name in sizes},
        "prompts": list(PROMPTS.values()),
    }
    (tmp_path / "request.json").write_text(json.dumps(request), encoding="utf-8")
    python = os.environ.get("COMFYUI_PYTHON") or sys.executable
    subprocess.run([python, ENCODE_PROMPTS, comfyui, installed, tmp_path], check=True)

    outputs = load_file(tmp_path / "outputs.safetensors")
    for number, prompt in enumerate(PROMPTS):
        want = model.encode_prompt(prompt).detach()
        got = outputs[f"node.{number}"]
        torch.testing.assert_close(got[: len(want)], want, rtol=1e-5, atol=1e-5)
        assert not got[len(want) :].any()
        # Without the node ComfyUI encodes the words; should it find embeddings one day, the node
        # and its documentation can go.
        changes = "<fox>" in prompt
        assert torch.equal(outputs[f"plain.{number}"], got) is not changes
