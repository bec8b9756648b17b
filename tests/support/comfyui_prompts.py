"""Run by ComfyUI's interpreter: encodes prompts with ComfyUI's own text encoder of Wan.

    python comfyui_prompts.py COMFYUI NODE FOLDER

FOLDER has text_encoder.safetensors, models/embeddings/ and request.json: the encoder's ``config``
and the ``prompts``. Writes outputs.safetensors: ``plain.N`` and ``node.N`` [tokens, width], the
conditioning of prompt N without and with the node in the file NODE.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

COMFYUI, NODE, FOLDER = map(Path, sys.argv[1:])
sys.path.insert(0, str(COMFYUI))
sys.argv = ["main.py", "--cpu", "--base-directory", str(FOLDER)]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.sd  # noqa: E402
import comfy.text_encoders.wan  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

request = json.loads((FOLDER / "request.json").read_text(encoding="utf-8"))
weights = load_file(FOLDER / "text_encoder.safetensors")
# As `comfy.sd.load_text_encoder_state_dicts` does for Wan, but for the sizes of the tiny encoder.
wan = SimpleNamespace(
    clip=comfy.text_encoders.wan.te(dtype_t5=torch.float32),
    tokenizer=comfy.text_encoders.wan.WanT5Tokenizer,
    params={},
)
clip = comfy.sd.CLIP(
    wan,
    embedding_directory=folder_paths.get_folder_paths("embeddings"),
    tokenizer_data={"spiece_model": weights.pop("spiece_model")},
    model_options={"umt5xxl_model_config": request["config"]},
)
missing, _ = clip.load_sd(weights)
assert set(missing) <= {"logit_scale"}, missing

spec = importlib.util.spec_from_file_location("node", NODE)
assert spec is not None and spec.loader is not None
node = importlib.util.module_from_spec(spec)
spec.loader.exec_module(node)
(enabled,) = node.NODE_CLASS_MAPPINGS["OnewanEmbeddings"]().enable(clip)

outputs = {}
for number, prompt in enumerate(request["prompts"]):
    # The node first: it must not change the text encoder that it was given.
    for name, encoder in (("node", enabled), ("plain", clip)):
        [[conditioning, _]] = encoder.encode_from_tokens_scheduled(encoder.tokenize(prompt))
        outputs[f"{name}.{number}"] = conditioning[0].contiguous()
save_file(outputs, FOLDER / "outputs.safetensors")
