"""Official checkpoints -> a diffusers layout on disk, for the tests against official outputs.

The renamings follow the official modules (``wan/modules/{t5,vae2_1,vae2_2}.py``). A loader for
official layouts is a feature of its own; these maps only bring the golden weights into the form
that onewan reads.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file
from transformers import UMT5Config, UMT5EncoderModel

from onewan.formats.names import to_diffusers
from onewan.model.load import official_scheduler
from onewan.variants import VARIANTS

FOLDERS = {"t2v-a14b": "t2v-A14B", "i2v-a14b": "i2v-A14B", "ti2v-5b": "ti2v-5B"}
PATCH = (1, 2, 2)

_RESIDUAL = {
    "residual.0.gamma": "norm1.gamma",
    "residual.2": "conv1",
    "residual.3.gamma": "norm2.gamma",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_VAE_ENDS = {
    "conv1": "conv_in",
    "head.0.gamma": "norm_out.gamma",
    "head.2": "conv_out",
    "middle.0": "mid_block.resnets.0",
    "middle.1": "mid_block.attentions.0",
    "middle.2": "mid_block.resnets.1",
}


def _swap_start(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        if name == old or name.startswith(old + "."):
            return new + name[len(old) :]
    return name


def vae_name(name: str) -> str:
    half, _, rest = name.partition(".")
    if half in ("conv1", "conv2"):
        return {"conv1": "quant_conv", "conv2": "post_quant_conv"}[half] + "." + rest
    if match := re.fullmatch(r"(down|up)samples\.(\d+)\.(?:down|up)samples\.(\d+)\.(.*)", rest):
        way, i, j, inner = match.groups()
        if inner.startswith(("resample", "time_conv")):
            return f"{half}.{way}_blocks.{i}.{way}sampler.{inner}"
        return f"{half}.{way}_blocks.{i}.resnets.{j}.{_swap_start(inner, _RESIDUAL)}"
    if match := re.fullmatch(r"downsamples\.(\d+)\.(.*)", rest):
        return f"{half}.down_blocks.{match[1]}.{_swap_start(match[2], _RESIDUAL)}"
    if match := re.fullmatch(r"upsamples\.(\d+)\.(.*)", rest):
        block, place = divmod(int(match[1]), 4)
        kind = "upsamplers.0" if place == 3 else f"resnets.{place}"
        return f"{half}.up_blocks.{block}.{kind}.{_swap_start(match[2], _RESIDUAL)}"
    renamed = _swap_start(rest, _VAE_ENDS)
    if match := re.fullmatch(r"(mid_block\.resnets\.\d)\.(.*)", renamed):
        renamed = f"{match[1]}.{_swap_start(match[2], _RESIDUAL)}"
    return f"{half}.{renamed}"


def t5_name(name: str) -> str:
    if name == "token_embedding.weight":
        return "shared.weight"
    if name == "norm.weight":
        return "encoder.final_layer_norm.weight"
    _, i, rest = name.split(".", 2)
    first, second = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
    table = {
        "norm1": f"{first}.layer_norm",
        "attn": f"{first}.SelfAttention",
        "pos_embedding.embedding": f"{first}.SelfAttention.relative_attention_bias",
        "norm2": f"{second}.layer_norm",
        "ffn.gate.0": f"{second}.DenseReluDense.wi_0",
        "ffn.fc1": f"{second}.DenseReluDense.wi_1",
        "ffn.fc2": f"{second}.DenseReluDense.wo",
    }
    return _swap_start(rest, table)


def _transformer(folder: Path) -> WanTransformer3DModel:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = {
        to_diffusers(name): tensor.float()
        for shard in sorted(folder.glob("diffusion_pytorch_model-*.safetensors"))
        for name, tensor in load_file(shard).items()
    }
    text_dim = weights["condition_embedder.text_embedder.linear_1.weight"].shape[1]
    model = WanTransformer3DModel(
        num_attention_heads=config["num_heads"],
        attention_head_dim=config["dim"] // config["num_heads"],
        in_channels=config["in_dim"],
        out_channels=config["out_dim"],
        ffn_dim=config["ffn_dim"],
        freq_dim=config["freq_dim"],
        num_layers=config["num_layers"],
        text_dim=text_dim,
        eps=config["eps"],
    )
    model.load_state_dict(weights, strict=True)
    return model


def _vae(path: Path) -> AutoencoderKLWan:
    weights = {
        vae_name(k): v for k, v in torch.load(path, weights_only=True, map_location="cpu").items()
    }
    base, z_dim = (
        weights["encoder.conv_in.weight"].shape[0],
        weights["post_quant_conv.weight"].shape[0],
    )
    if z_dim == 16:
        vae = AutoencoderKLWan(base_dim=base)
    else:
        vae = AutoencoderKLWan(
            base_dim=base,
            decoder_base_dim=weights["decoder.norm_out.gamma"].shape[0],
            z_dim=z_dim,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
            latents_mean=[0.1] * z_dim,
            latents_std=[2.0] * z_dim,
        )
    vae.load_state_dict(weights, strict=True)
    return vae


def _text_encoder(path: Path) -> UMT5EncoderModel:
    weights = {
        t5_name(k): v for k, v in torch.load(path, weights_only=True, map_location="cpu").items()
    }
    vocabulary, width = weights["shared.weight"].shape
    bias = weights["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    model = UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=width,
            num_heads=bias.shape[1],
            d_kv=width // bias.shape[1],
            relative_attention_num_buckets=bias.shape[0],
            d_ff=weights["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
            num_layers=sum(k.endswith("SelfAttention.q.weight") for k in weights),
            feed_forward_proj="gated-gelu",
        )
    )
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"encoder.embed_tokens.weight"}, (missing, unexpected)
    return model


def write_diffusers_layout(official: Path, variant: str, folder: Path) -> Path:
    """The golden checkpoint in `official` as a diffusers folder that `WanModelLoader` reads."""
    facts = VARIANTS[variant]
    if len(facts.experts) == 2:
        _transformer(official / "high_noise_model").save_pretrained(folder / "transformer")
        _transformer(official / "low_noise_model").save_pretrained(folder / "transformer_2")
        _vae(official / "Wan2.1_VAE.pth").save_pretrained(folder / "vae")
    else:
        _transformer(official).save_pretrained(folder / "transformer")
        _vae(official / "Wan2.2_VAE.pth").save_pretrained(folder / "vae")
    _text_encoder(official / "models_t5_umt5-xxl-enc-bf16.pth").save_pretrained(
        folder / "text_encoder"
    )
    shutil.copytree(official / "google" / "umt5-xxl", folder / "tokenizer")
    official_scheduler(facts).save_pretrained(folder / "scheduler")
    return folder
