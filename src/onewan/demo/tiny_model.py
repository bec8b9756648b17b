"""Writes a tiny Wan 2.2 model: the architecture of each variant, with random weights.

For the demonstration and the tests. It is a complete diffusers folder that `WanModelLoader` and
``WanPipeline.from_pretrained`` read. Only widths and depths are smaller than the real ones, and the
tokenizer is trained on a few sentences. The videos that it generates are noise.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from tokenizers import SentencePieceUnigramTokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from onewan.model.load import official_scheduler
from onewan.model.transformer import WanTransformer
from onewan.seeds import derive_seed
from onewan.variants import VARIANTS, Variant, VariantName

_TEXT_WIDTH = 64
_CORPUS = (
    "a red square moves slowly across a dark background",
    "a small blue circle bounces up and down, the camera is still",
    "the quick brown fox jumps over the lazy dog by the river",
    "a green triangle turns around its centre while the light fades",
    "two shapes cross each other on a bright field; slow motion, close view",
    "pack my box with five dozen liquor jugs, said the wizard quietly",
)


def write_tiny_model(
    folder: Path,
    variant: VariantName,
    *,
    seed: int = 0,
    width: int = 128,
    layers: int = 4,
    pixels_BCFHW: Tensor | None = None,
) -> Path:
    """Write a tiny model of `variant` to `folder` in the diffusers layout; returns `folder`.

    The transformers have `layers` blocks of `width` channels in heads of 32. A random VAE's latents
    have an arbitrary scale; if `pixels_BCFHW` ([-1, 1]) are given, its ``latents_mean`` and
    ``latents_std`` are measured on them, so that normalized latents are roughly standard normal,
    as those of the real VAE are.
    """
    facts = VARIANTS[variant]
    # diffusers and transformers initialize from the global generator; its state is restored.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "tiny model", variant))
        for expert in facts.experts:
            _transformer(facts, width, layers).save_pretrained(folder / expert.component)
        _vae(facts, pixels_BCFHW).save_pretrained(folder / "vae")
        vocabulary = _write_tokenizer(folder / "tokenizer")
        _text_encoder(vocabulary).save_pretrained(folder / "text_encoder")
    official_scheduler(facts).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(
        json.dumps(_model_index(facts), indent=2), encoding="utf-8"
    )
    return folder


def _transformer(facts: Variant, width: int, layers: int) -> WanTransformer:
    transformer = WanTransformer(
        num_attention_heads=width // 32,
        attention_head_dim=32,
        in_channels=facts.in_channels,
        out_channels=facts.latent_channels,
        text_dim=_TEXT_WIDTH,
        ffn_dim=width * 4,
        num_layers=layers,
    )
    if facts.reference_channels is not None:
        transformer.add_ref_conv(facts.reference_channels)
    return transformer


def _vae(facts: Variant, pixels_BCFHW: Tensor | None) -> AutoencoderKLWan:
    # The defaults of the class are those of the Wan 2.1 VAE, the means and deviations included.
    if facts.spatial_compression == 8:
        vae = AutoencoderKLWan(base_dim=8)
    else:
        vae = AutoencoderKLWan(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=facts.latent_channels,
            is_residual=True,
            # This VAE works on patches of 2 x 2 pixels with 3 channels each.
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
            latents_mean=[0.0] * facts.latent_channels,
            latents_std=[1.0] * facts.latent_channels,
        )
    if pixels_BCFHW is not None:
        with torch.no_grad():
            latents = vae.encode(pixels_BCFHW, return_dict=False)[0].mode()
        vae.register_to_config(
            latents_mean=latents.mean(dim=(0, 2, 3, 4)).tolist(),
            latents_std=latents.std(dim=(0, 2, 3, 4)).tolist(),
        )
    return vae


def _text_encoder(vocabulary: int) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=_TEXT_WIDTH,
            d_kv=16,
            num_heads=4,
            d_ff=128,
            num_layers=2,
            feed_forward_proj="gated-gelu",
        )
    )


def _write_tokenizer(folder: Path) -> int:
    """A SentencePiece unigram tokenizer, as UMT5 has one; returns the size of its vocabulary."""
    tokenizer = SentencePieceUnigramTokenizer()
    tokenizer.train_from_iterator(
        _CORPUS,
        vocab_size=200,
        # In this order, since UMT5Config expects padding as token 0 and the end as token 1.
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    end = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", end)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,  # transformers takes the inner object only
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,  # that of the Wan models' captions
    ).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def _model_index(facts: Variant) -> dict[str, object]:
    """The content of model_index.json, from which diffusers constructs the pipeline."""
    index: dict[str, object] = {
        "_class_name": facts.pipeline,
        "_diffusers_version": "0.42.1",
        "boundary_ratio": facts.boundary,
        "expand_timesteps": facts.has_clean_first_frame,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer_2": [None, None],  # diffusers' form for a component that a model does not have
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    for expert in facts.experts:
        index[expert.component] = ["diffusers", "WanTransformer3DModel"]
    # These two are parameters of that pipeline, which Wan 2.1 used and Wan 2.2 does not.
    if facts.pipeline == "WanImageToVideoPipeline":
        index |= {"image_encoder": [None, None], "image_processor": [None, None]}
    return index
