"""OneTrainer's keys: what they are called in a run file, and why some have no place there."""

from __future__ import annotations

OTHER_MODELS = "a part of other models"
INTERFACE = "of OneTrainer's own program"
NOT_HERE: tuple[tuple[str, str], ...] = (
    (
        r"(unet|prior|unconditional_transformer|text_encoder_[234]|effnet_encoder|decoder\w*)\..*",
        OTHER_MODELS,
    ),
    (
        r"text_encoder_[234]?_?(layer_skip|sequence_length)",
        "Wan always takes 512 tokens of the last layer",
    ),
    (r".*__version", "the version of a form"),
    (r"cloud(\..*)?", "cloud runs, with their secrets, are not carried"),
    (r"secrets(\..*)?", "secrets are not carried"),
    (
        r"(tensorboard_\w+|debug_\w+|huggingface_cache_dir|offline_mode|include_train_config|prevent_overwrites|samples_to_tensorboard)",
        INTERFACE,
    ),
    (
        r"(multi_gpu|device_indexes|gradient_reduce_precision|fused_gradient_reduce|async_gradient_reduce\w*)",
        "onewan trains on one device so far",
    ),
    (r"(model_type|training_method|peft_type)", "told by model.variant and method"),
    (r"quantization\..*", "quantisation is that of the files; onewan keeps fp8 and GGUF packed"),
    (
        r"(async_offloading|compile|temp_device|fallback_train_dtype|enable_autocast_cache|attention_mechanism)",
        "onewan decides that by itself",
    ),
    (
        r"(force_circular_padding|rescale_noise_scheduler_to_zero_terminal_snr|force_v_prediction|force_epsilon_prediction|vb_loss_strength|generalized_offset_noise)",
        "of other models' objectives",
    ),
    (
        r"text_encoder\.(train|learning_rate|weight_dtype|stop_training_after\w*|attention_mask|guidance_scale|gradient_checkpointing|offload_fraction|activation_offloading|train_embedding|include|model_name)",
        "the text encoder itself does not train, and has the precision of the model",
    ),
    (
        r"(transformer|transformer_2|vae)\.(weight_dtype|attention_mask|guidance_scale|train_embedding|dropout_probability|offload_fraction|activation_offloading|include|train|learning_rate|gradient_checkpointing|stop_training_after\w*)",
        "has no counterpart for this part",
    ),
    (
        r"(clear_cache_before_training|only_cache|dataloader_threads)",
        "the cache is keyed by content; `onewan cache` fills it",
    ),
    (r"optimizer_defaults(\..*)?", "settings of optimizers that are not chosen"),
    (
        r"(sample_image_format|sample_audio_format|sample_video_format|sample_skip_first|save_skip_first|save_filename_prefix|rolling_backup|backup_before_save|non_ema_sampling|continue_last_backup)",
        "runs are kept and gone on with in onewan's own way (docs/training.md)",
    ),
    (
        r"(learning_rate_scaler|loss_scaler)",
        "onewan's loss is the mean over a step's clips, which needs no scaling",
    ),
    (r"custom_learning_rate_scheduler", "schedules are those of train.schedule"),
    (
        r"(unmasked_probability|normalize_masked_area_loss|masked_prior_preservation_weight|custom_conditioning_image)",
        "has no counterpart; the loss is always normalised over what counts",
    ),
    (
        r"(layer_filter_preset|lora_weight_dtype|embedding_weight_dtype|bundle_additional_embeddings|preserve_embedding_norm|lora_decompose_\w+|oft_block_share|oft_scaled|lokr_\w+)",
        "has no counterpart",
    ),
    (r"ema_update_step_interval", "the average is taken at each step"),
    (r"ema_decay", "of an average that is off"),
    (r"embedding\..*", "of the training method EMBEDDING"),
    (r"oft_block_size", "of the adapter OFT_2"),
    (r"scheduler_params", "of a custom schedule"),
    (
        r"concepts\.\d+\.(name|seed|concept_stats.*|image_variations|text_variations)",
        "clips are named by their files, and draws keyed by train.seed",
    ),
    (r"concepts\.\d+\.image\..*", "has no counterpart; clips are cropped around their centre"),
    (r"concepts\.\d+\.text\..*", "has no counterpart; captions are taken as they are"),
    (
        r"samples\.\d+\.(noise_scheduler|length|text_encoder_\w+|transformer_attention_mask|force_last_timestep|sample_inpainting|mask_image_path)",
        "of other models",
    ),
    (
        r"(embedding|additional_embeddings\.\d+)\.(uuid|stop_training_after\w*)",
        "has no counterpart",
    ),
    (r"optimizer\..*", "has no counterpart in this optimizer"),
)

LISTS = ("concepts", "samples", "additional_embeddings")

SHARED = ("frames:", "resolution:", "wan_", "min_noising_strength:")
"""Faults of settings that mean the same there and here."""

FORMER = ("weight_dtype", "gradient_checkpointing", "layer_offload_fraction", "embeddings")
"""Keys that presets still carry though no version has them any more."""

OPTIMIZERS: dict[str, tuple[str, dict[str, str]]] = {
    "ADAMW": ("adamw", {"eps": "eps", "weight_decay": "weight_decay"}),
    "ADAMW_8BIT": (
        "adamw_8bit",
        {"eps": "eps", "weight_decay": "weight_decay", "is_paged": "paged"},
    ),
    "SCHEDULE_FREE_ADAMW": ("adamw_schedule_free", {"eps": "eps", "weight_decay": "weight_decay"}),
    "ADAFACTOR": (
        "adafactor",
        {
            "decay_rate": "decay_rate",
            "clip_threshold": "clip_threshold",
            "scale_parameter": "scale_parameter",
            "weight_decay": "weight_decay",
        },
    ),
    "PRODIGY": (
        "prodigy",
        {
            "eps": "eps",
            "weight_decay": "weight_decay",
            "d0": "d0",
            "d_coef": "d_coef",
            "safeguard_warmup": "safeguard_warmup",
            "use_bias_correction": "bias_correction",
        },
    ),
    "PRODIGY_PLUS_SCHEDULE_FREE": (
        "prodigy_plus_schedule_free",
        {"weight_decay": "weight_decay", "d0": "d0", "d_coef": "d_coef", "factored": "factored"},
    ),
    "LION": ("lion", {"weight_decay": "weight_decay"}),
    "MUON": (
        "muon",
        {
            "momentum": "momentum",
            "nesterov": "nesterov",
            "ns_steps": "ns_steps",
            "weight_decay": "weight_decay",
        },
    ),
    "CAME": ("came", {"weight_decay": "weight_decay", "clip_threshold": "clip_threshold"}),
    "SGD": (
        "sgd",
        {"momentum": "momentum", "nesterov": "nesterov", "weight_decay": "weight_decay"},
    ),
}
"""onewan's name, and where OneTrainer's settings go."""

NEAREST = {
    "ADAM": "ADAMW",
    "ADAM_8BIT": "ADAMW_8BIT",
    "ADAMW_ADV": "ADAMW",
    "LION_8BIT": "LION",
    "LION_ADV": "LION",
    "SGD_8BIT": "SGD",
    "PRODIGY_ADV": "PRODIGY",
    "CAME_8BIT": "CAME",
    "MUON_ADV": "MUON",
    "ADAMUON_ADV": "MUON",
}

BETAS = {
    "adamw": 2,
    "adamw_8bit": 2,
    "adamw_schedule_free": 2,
    "prodigy": 2,
    "lion": 2,
    "prodigy_plus_schedule_free": 2,
    "came": 3,
}

SCHEDULES = {
    "CONSTANT": "constant",
    "LINEAR": "linear",
    "COSINE": "cosine",
    "COSINE_WITH_RESTARTS": "cosine_with_restarts",
    "COSINE_WITH_HARD_RESTARTS": "cosine_with_restarts",
    "REX": "rex",
}

LAYERS = {
    "attn1": "self_attention",
    "attn2": "cross_attention",
    "attn": "attention",
    "ffn": "ffn",
    "ff.net": "ffn",
}

FORMATS = {
    "DIFFUSERS_LORA": "diffusers",
    "DIFFUSERS": "diffusers",
    "KOHYA_LORA": "kohya",
    "COMFY_LORA": "comfyui",
    "ORIGINAL_LORA": "comfyui",
    "LEGACY_LORA": "comfyui",
    "ORIGINAL_TRANSFORMER": "comfyui",
    "ORIGINAL_SINGLE_FILE": "comfyui",
    "COMFY_TRANSFORMER": "comfyui",
    "LEGACY_SAFETENSORS": "comfyui",
    "SAFETENSORS": "comfyui",
}

DTYPES = {"FLOAT_32": "float32", "BFLOAT_16": "bfloat16", "FLOAT_16": "float16"}
