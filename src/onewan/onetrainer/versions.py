"""Configs of older OneTrainers -> the form of version 11, step by step as OneTrainer does it.

Each step takes a config of its version to the next; a file that says no version is of version 0.
Steps that only concern other models' parts are carried out too, so that no key turns up unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

LATEST = 11

Config = dict[str, Any]

_PARTS_OF_1 = {
    "unet": ("train", "stop", "learning_rate", "weight_dtype"),
    "prior": ("train", "stop", "learning_rate", "weight_dtype", "model_name"),
    "text_encoder": ("train", "stop", "learning_rate", "weight_dtype"),
    "text_encoder_2": ("train", "stop", "learning_rate", "weight_dtype"),
    "vae": ("model_name", "weight_dtype"),
    "effnet_encoder": ("model_name", "weight_dtype"),
    "decoder": ("model_name", "weight_dtype"),
    "decoder_text_encoder": ("weight_dtype",),
    "decoder_vqgan": ("weight_dtype",),
}
_PARTS = (*_PARTS_OF_1, "transformer", "text_encoder_3", "text_encoder_4")


def brought_up_to_date(config: Config) -> Config:
    """`config` as version 11 has it; itself if it is newer."""
    config = deepcopy(config)
    for step in _STEPS[max(0, int(config.get("__version", 0))) :]:
        config = step(config)
    return {**config, "__version": max(LATEST, int(config.get("__version", 0)))}


def _nest_optimizer(config: Config) -> Config:
    """0: everything of the optimizer stood at the top, ``optimizer_beta1`` and so on."""
    own = {k: v for k, v in config.items() if k.startswith("optimizer")}
    rest = {k: v for k, v in config.items() if k not in own}
    if "optimizer" not in own:
        return rest
    inner = {k.removeprefix("optimizer_"): v for k, v in own.items()}
    return {**rest, "optimizer": inner, "optimizer_defaults": {inner["optimizer"]: deepcopy(inner)}}


def _nest_parts(config: Config) -> Config:
    """1: so did everything of the parts, ``train_unet``, ``unet_weight_dtype``, and of the one
    embedding."""
    moved: dict[str, tuple[str, str]] = {}
    for part, kinds in _PARTS_OF_1.items():
        for kind in kinds:
            old = {"train": f"train_{part}", "stop": f"train_{part}_epochs"}.get(
                kind, f"{part}_{kind}"
            )
            moved[old] = (part, "stop_training_after" if kind == "stop" else kind)
    parts: Config = {part: {} for part in _PARTS_OF_1}
    embedding: Config = {}
    rest: Config = {}
    for key, value in config.items():
        if key in moved:
            part, field = moved[key]
            parts[part][field] = value
            if field == "stop_training_after":
                parts[part]["stop_training_after_unit"] = "EPOCH"
        elif key == "embedding_model_names":
            embedding |= {"model_name": value[0]} if value else {}
        elif key in ("token_count", "initial_embedding_text"):
            embedding[key] = value
        else:
            rest[key] = value
    return {**parts, "embeddings": [embedding], **rest}


def _weigh_losses(config: Config) -> Config:
    """2: min-SNR was a number of its own; 0 was off."""
    gamma = config.pop("min_snr_gamma", 0.0)
    if gamma:
        return {**config, "loss_weight_fn": "MIN_SNR_GAMMA", "loss_weight_strength": gamma}
    if str(config.get("model_type", "")).startswith(("WUERSTCHEN", "STABLE_CASCADE")):
        return {**config, "loss_weight_fn": "P2", "loss_weight_strength": 1.0}
    return config


def _name_distribution(config: Config) -> Config:
    """3: a noising weight meant the sigmoid, with a bias around 0.5."""
    weight, bias = config.pop("noising_weight", 0.0), config.pop("noising_bias", 0.5)
    name, bias = ("SIGMOID", bias - 0.5) if weight else ("UNIFORM", 0.0)
    drawn = {"timestep_distribution": name, "noising_weight": weight, "noising_bias": bias}
    return {**config, **drawn}


def _word_checkpointing(config: Config) -> Config:
    """4: gradient checkpointing was on or off."""
    return {
        **config,
        "gradient_checkpointing": "ON" if config.get("gradient_checkpointing", True) else "OFF",
    }


def _renamed(*pairs: tuple[str, str]) -> Callable[[Config], Config]:
    def step(config: Config) -> Config:
        names = dict(pairs)
        return {names.get(key, key): value for key, value in config.items()}

    return step


def _full_preset(config: Config) -> Config:
    """6: the preset of layers could be nothing."""
    if config.get("lora_layer_preset", "") is None:
        config["lora_layer_preset"] = "full"
    return config


def _transformer_for_prior(config: Config) -> Config:
    """8: the transformers of all but two models were called prior."""
    others = ("STABLE_CASCADE_1", "WUERSTCHEN_2")
    if config.get("model_type") not in others and "prior" in config:
        return {**config, "transformer": config["prior"]}
    return config


def _own_weight_types(config: Config) -> Config:
    """9: a part without a weight data type had that of all."""
    common = config.pop("weight_dtype", None)
    for part in _PARTS:
        held = config.get(part)
        if isinstance(held, dict) and held.get("weight_dtype") == "NONE":
            if common is None:
                held.pop("weight_dtype")
            else:
                held["weight_dtype"] = common
    return config


def _own_offloading(config: Config) -> Config:
    """10: checkpointing and offloading were those of all parts; one output format had all names."""
    checkpointing = config.pop("gradient_checkpointing", "ON")
    activations = config.pop("enable_activation_offloading", True)
    fraction = config.pop("layer_offload_fraction", 0.0)
    config["async_offloading"] = config.pop("enable_async_offloading", True)
    offloaded = checkpointing == "CPU_OFFLOADED"
    for part in _PARTS:
        if isinstance(config.get(part), dict):
            config[part]["gradient_checkpointing"] = checkpointing != "OFF"
            config[part]["activation_offloading"] = offloaded and activations
            config[part]["offload_fraction"] = fraction if offloaded else 0.0
    if config.get("output_model_format") == "SAFETENSORS":
        method = config.get("training_method")
        formats = {"LORA": "LEGACY_LORA", "EMBEDDING": "SAFETENSORS"}
        config["output_model_format"] = formats.get(str(method), "LEGACY_SAFETENSORS")
    return config


_STEPS: tuple[Callable[[Config], Config], ...] = (
    _nest_optimizer,
    _nest_parts,
    _weigh_losses,
    _name_distribution,
    _word_checkpointing,
    _renamed(("save_after", "save_every"), ("save_after_unit", "save_every_unit")),
    _full_preset,
    _renamed(
        ("lora_layers", "layer_filter"),
        ("lora_layer_preset", "layer_filter_preset"),
        ("lora_layers_regex", "layer_filter_regex"),
    ),
    _transformer_for_prior,
    _own_weight_types,
    _own_offloading,
)
