"""Write a tiny random HunyuanVideo in diffusers' layout: python write_tiny_hunyuan.py FOLDER

Run by OneTrainer's own interpreter, whose transformers names CLIP's weights in its way.
"""

import json
import os
import sys

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoTransformer3DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
)

out = sys.argv[1]
os.makedirs(out, exist_ok=True)
torch.manual_seed(0)
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())


def bpe(specials, texts, size):
    tok = Tokenizer(models.BPE(unk_token=specials[0]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=specials),
    )
    return tok


text = [
    "Describe the video by detailing the following aspects: The main content and theme of the "
    "video. color shape size"
] * 9
# 1. llama tokenizer
tok = bpe(["<unk>", "<s>", "</s>", "<pad>"], text, 300)
PreTrainedTokenizerFast(
    tokenizer_object=tok, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
).save_pretrained(f"{out}/tokenizer")
# 2. clip tokenizer
tok2 = bpe(["<|startoftext|>", "<|endoftext|>"], text, 300)
PreTrainedTokenizerFast(
    tokenizer_object=tok2,
    unk_token="<|endoftext|>",
    bos_token="<|startoftext|>",
    eos_token="<|endoftext|>",
    pad_token="<|endoftext|>",
    model_max_length=77,
).save_pretrained(f"{out}/tokenizer_2")
LlamaModel(
    LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=3,
    )
).save_pretrained(f"{out}/text_encoder")
CLIPTextModel(
    CLIPTextConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=16,
        max_position_embeddings=77,
        eos_token_id=1,
        bos_token_id=0,
        pad_token_id=1,
    )
).save_pretrained(f"{out}/text_encoder_2")
HunyuanVideoTransformer3DModel(
    in_channels=16,
    out_channels=16,
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=1,
    num_single_layers=1,
    num_refiner_layers=1,
    patch_size=2,
    patch_size_t=1,
    guidance_embeds=True,
    text_embed_dim=16,
    pooled_projection_dim=16,
    rope_axes_dim=(4, 4, 4),
).save_pretrained(f"{out}/transformer")
AutoencoderKLHunyuanVideo(
    in_channels=3,
    out_channels=3,
    latent_channels=16,
    block_out_channels=(4, 4, 4, 4),
    layers_per_block=1,
    norm_num_groups=2,
    spatial_compression_ratio=8,
    temporal_compression_ratio=4,
    down_block_types=("HunyuanVideoDownBlock3D",) * 4,
    up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    mid_block_add_attention=True,
).save_pretrained(f"{out}/vae")
FlowMatchEulerDiscreteScheduler(shift=7.0).save_pretrained(f"{out}/scheduler")
with open(f"{out}/model_index.json", "w") as file:
    json.dump(
        {
            "_class_name": "HunyuanVideoPipeline",
            "_diffusers_version": "0.42.0",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "LlamaModel"],
            "text_encoder_2": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "LlamaTokenizerFast"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "transformer": ["diffusers", "HunyuanVideoTransformer3DModel"],
            "vae": ["diffusers", "AutoencoderKLHunyuanVideo"],
        },
        file,
    )
