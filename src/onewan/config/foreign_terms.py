"""What other trainers call the settings of a run file: one table, for messages and for the docs.

The names are those of ai-toolkit, of musubi-tuner, sd-scripts and diffusers (whose options are
flags of a command line), of diffusion-pipe and of OneTrainer (with onewan's add-on), as their
source code has them in November 2026. docs/coming-from.md is written from this table by
``scripts/write_coming_from.py``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from onewan.config.fields import leaves
from onewan.documents import KeyPath, Node, get_path, is_list, is_mapping

TABLE = "docs/coming-from.md"
"""The page for readers, in onewan's repository."""

TRAINERS: Mapping[str, str] = {
    "ai_toolkit": "ai-toolkit",
    "flags": "musubi-tuner, sd-scripts, diffusers",
    "diffusion_pipe": "diffusion-pipe",
    "onetrainer": "OneTrainer",
}
"""Columns of the table: the attribute of `Term`, and the programs."""


@dataclass(frozen=True, slots=True)
class Term:
    """One setting of the run file, and its names elsewhere.

    Names are separated by spaces and dotted as in the other program's file, with ``[]`` for the
    items of a list: ``datasets[].folder_path``. Flags stand without their dashes.
    """

    field: str
    """The run file's field, in which ``*`` is any item of a list; "" if there is none."""
    remark: str = ""
    """What differs in meaning or unit; without a field, why there is none."""
    ai_toolkit: str = ""
    flags: str = ""
    diffusion_pipe: str = ""
    onetrainer: str = ""

    def names(self, trainer: str = "") -> list[str]:
        """The names of one trainer (a key of `TRAINERS`), or of all."""
        columns = [trainer] if trainer else list(TRAINERS)
        return [name for column in columns for name in getattr(self, column).split()]


def terms_at(path: KeyPath) -> list[Term]:
    """The settings that a field at `path`, which the run file does not have, may stand for.

    Those whose whole name this is in another program's file come first; else those with the same
    last part, and among them those of the section that `path` lies in.
    """
    name = _name(path)
    last = name.rpartition(".")[2].removesuffix("[]")
    if found := _by_name()[0].get(name):
        return found
    alike = _by_name()[1].get(last, [])
    section = _name(path[:-1]).replace("[]", ".*")
    here = [term for term in alike if term.field.rpartition(".")[0] == section]
    # A name such as `steps` means something else in each section.
    return here or ([] if last in _own_names() else alike)


def is_foreign_section(path: KeyPath) -> bool:
    """Whether other programs have a section or a list of this name."""
    name = _name(path)
    return name.startswith("config") or any(
        full.removeprefix(name).startswith((".", "[].")) and full.startswith(name)
        for full in _by_name()[0]
    )


def foreign_leaves(value: Node, path: KeyPath) -> Iterator[tuple[KeyPath, list[Term]]]:
    """The settings within `value`, a part of another program's file at `path`, that the table has.

    A section that the table names as a whole is one setting.
    """
    children: Iterator[tuple[str | int, Node]] = iter(())
    if is_mapping(value):
        children = iter(value.items())
    elif is_list(value):
        children = iter(enumerate(value))
    for part, inner in children:
        at = (*path, part)
        has_parts = is_mapping(inner) or is_list(inner)
        if has_parts and is_foreign_section(at):
            yield from foreign_leaves(inner, at)
        elif terms := _by_name()[0].get(_name(at)):
            yield at, terms


def program_of(data: Node) -> str | None:
    """The program whose whole configuration `data` is; None if it may be a run file."""
    if is_list(get_path(data, ("config", "process"))):
        return "ai-toolkit"
    if is_mapping(data) and {"training_method", "model_type"} <= data.keys():
        return "OneTrainer"
    return None


def _name(path: KeyPath) -> str:
    """`path` as the table has it; what lies around all settings of ai-toolkit is left out."""
    name = "".join("[]" if isinstance(part, int) else f".{part}" for part in path)
    return name.removeprefix(".").removeprefix("config.process[].")


@cache
def _own_names() -> set[str]:
    """The last parts of the names of all fields."""
    return {leaf.rpartition(".")[2] for leaf in leaves()}


@cache
def _by_name() -> tuple[Mapping[str, list[Term]], Mapping[str, list[Term]]]:
    """The terms by whole name, and by the last part of it."""
    whole: dict[str, list[Term]] = defaultdict(list)
    last: dict[str, list[Term]] = defaultdict(list)
    for term in (term for terms in TERMS.values() for term in terms):
        for name in dict.fromkeys(term.names()):
            for found, key in ((whole, name), (last, name.rpartition(".")[2])):
                if term not in found[key]:
                    found[key].append(term)
    return whole, last


# Rows are wrapped by hand, so that the table stays one that can be read.
# fmt: off
TERMS: Mapping[str, tuple[Term, ...]] = {
    "Model": (
        Term("model.path", "leave it out where each component is given as a file",
             ai_toolkit="model.name_or_path", flags="pretrained_model_name_or_path",
             diffusion_pipe="model.ckpt_path", onetrainer="base_model_name"),
        Term("model.variant", "t2v-a14b, i2v-a14b or ti2v-5b", ai_toolkit="model.arch",
             flags="task", diffusion_pipe="model.type", onetrainer="model_type"),
        Term("model.transformer", "the high-noise expert, or the transformer of TI2V-5B",
             flags="dit_high_noise", diffusion_pipe="model.transformer_path",
             onetrainer="transformer.model_name"),
        Term("model.transformer_2", "the low-noise expert; the high-noise one is model.transformer",
             flags="dit", onetrainer="transformer_2.model_name"),
        Term("model.vae", ai_toolkit="model.vae_path", flags="vae", diffusion_pipe="model.vae_path",
             onetrainer="vae.model_name"),
        Term("model.text_encoder",
             "a file in fp8 is read as it is; captions are encoded before the training",
             ai_toolkit="model.quantize_te model.qtype_te", flags="t5 fp8_t5",
             diffusion_pipe="model.llm_path"),
        Term("model.experts", "both, high or low",
             ai_toolkit="model.model_kwargs.train_high_noise model.model_kwargs.train_low_noise",
             onetrainer="transformer.train transformer_2.train"),
        Term("model.boundary",
             "a number from 0 to 1; each expert draws the timesteps on its side of it, and a "
             "source may have a range of its own (timesteps)",
             ai_toolkit="train.min_denoising_steps train.max_denoising_steps",
             flags="timestep_boundary min_timestep max_timestep",
             diffusion_pipe="model.min_t model.max_t", onetrainer="wan_boundary"),
        Term("model.dtype", "bfloat16 or float32", ai_toolkit="train.dtype model.dtype",
             flags="mixed_precision", diffusion_pipe="model.dtype", onetrainer="train_dtype"),
        Term("model.device", ai_toolkit="device", onetrainer="train_device"),
    ),
    "Clips and captions": (
        Term("video_data.sources", "one folder, or a list of folders with their settings",
             ai_toolkit="datasets",
             flags="datasets dataset_config train_data_dir instance_data_dir",
             diffusion_pipe="dataset directory", onetrainer="concepts concept_file_name"),
        Term("video_data.sources.*.path",
             ai_toolkit="datasets[].folder_path datasets[].dataset_path",
             flags="datasets[].video_directory datasets[].image_directory",
             diffusion_pipe="directory[].path", onetrainer="concepts[].path"),
        Term("video_data.sources.*.path", "the table itself: csv, jsonl or parquet",
             flags="datasets[].video_jsonl_file datasets[].image_jsonl_file"),
        Term("video_data.sources.*.recursive", "subfolders are read unless it is false",
             onetrainer="concepts[].include_subdirectories"),
        Term("video_data.sources.*.repeats", ai_toolkit="datasets[].num_repeats",
             flags="datasets[].num_repeats general.num_repeats",
             diffusion_pipe="directory[].num_repeats", onetrainer="concepts[].balancing"),
        Term("video_data.sources.*.loss_weight", ai_toolkit="datasets[].network_weight",
             onetrainer="concepts[].loss_weight"),
        Term("video_data.sources.*.target", "base is prior preservation, with clips of their own",
             ai_toolkit="datasets[].is_reg",
             flags="reg_data_dir class_data_dir with_prior_preservation",
             onetrainer="concepts[].type"),
        Term("", "the caption of NAME.mp4 is NAME.txt, beside it",
             ai_toolkit="datasets[].caption_ext",
             flags="caption_extension general.caption_extension datasets[].caption_extension"),
        Term("video_data.sources.*.trigger_word", "added in front of captions that lack it",
             ai_toolkit="trigger_word", flags="class_tokens instance_prompt"),
        Term("video_data.sources.*.class_word", "keeps the base model's prediction for that word",
             ai_toolkit="train.diff_output_preservation train.diff_output_preservation_class"),
        Term("train.preservation_weight", ai_toolkit="train.diff_output_preservation_multiplier"),
        Term("video_data.sources.*.caption_prefix",
             diffusion_pipe="caption_prefix directory[].caption_prefix"),
        Term("video_data.sources.*.shuffle_tags",
             "a number of orders, such as 8; each is encoded once",
             ai_toolkit="datasets[].shuffle_tokens", flags="shuffle_caption",
             diffusion_pipe="shuffle_tags cache_shuffle_num directory[].shuffle_tags",
             onetrainer="concepts[].text.enable_tag_shuffling"),
        Term("video_data.sources.*.keep_tags", ai_toolkit="datasets[].keep_tokens",
             flags="keep_tokens", onetrainer="concepts[].text.keep_tags_count"),
        Term("video_data.sources.*.caption_dropout",
             "train.caption_dropout is that of all sources",
             ai_toolkit="datasets[].caption_dropout_rate"),
        Term("train.caption_dropout", "of all sources",
             flags="caption_dropout_rate proportion_empty_prompts",
             diffusion_pipe="uncond_fraction", onetrainer="text_encoder.dropout_probability"),
        Term("wan_config.max_frames", "one number, 4n+1; a shorter file gives a shorter clip",
             ai_toolkit="datasets[].num_frames",
             flags="datasets[].max_frames max_num_frames",
             diffusion_pipe="frame_buckets", onetrainer="frames"),
        Term("wan_config.clip_lengths", "each video gives clips of each length that fits into it",
             flags="datasets[].target_frames"),
        Term("wan_config.frame_sample_strategy",
             "chunk is chunks, slide is sliding, full is head; single_beginning is head, "
             "single_middle is middle, multiple_overlapping is all",
             flags="datasets[].frame_extraction",
             diffusion_pipe="video_clip_mode", onetrainer="wan_frame_strategy"),
        Term("wan_config.clips_per_video", "of uniform; 1 is the middle of the video",
             flags="datasets[].frame_sample"),
        Term("wan_config.stride", "of sliding; in seconds, not in frames",
             flags="datasets[].frame_stride"),
        Term("video_data.target_fps",
             "of the training clips; the rate of a file is read from the file",
             ai_toolkit="datasets[].fps", flags="datasets[].source_fps", diffusion_pipe="framerate",
             onetrainer="wan_target_fps"),
        Term("video_data.resolution", "512 is the area of 512x512; [832, 480] is one exact size",
             ai_toolkit="datasets[].resolution",
             flags="resolution general.resolution datasets[].resolution",
             diffusion_pipe="resolutions size_buckets", onetrainer="resolution"),
        Term("", "each clip keeps its aspect ratio, at about the area of video_data.resolution",
             ai_toolkit="datasets[].buckets datasets[].bucket_tolerance",
             flags="enable_bucket general.enable_bucket datasets[].enable_bucket "
             "bucket_no_upscale general.bucket_no_upscale datasets[].bucket_no_upscale",
             diffusion_pipe="enable_ar_bucket min_ar max_ar num_ar_buckets ar_buckets"),
        Term("video_data.masks", "true; the mask of NAME.mp4 is NAME.mask.png or NAME.mask.mp4",
             ai_toolkit="datasets[].mask_path datasets[].alpha_mask",
             flags="masked_loss alpha_mask", diffusion_pipe="directory[].mask_path",
             onetrainer="masked_training"),
        Term("video_data.cache", "on by default, for clips and captions",
             ai_toolkit="datasets[].cache_latents datasets[].cache_latents_to_disk "
             "train.cache_text_embeddings",
             flags="cache_latents cache_latents_to_disk cache_text_encoder_outputs",
             onetrainer="latent_caching"),
        Term("video_data.cache_dir", "one folder for all sources",
             flags="datasets[].cache_directory", onetrainer="cache_dir"),
        Term("video_data.sources.*.augment.flip",
             "the probability that a variant of a clip is mirrored; each is encoded once",
             ai_toolkit="datasets[].flip_x", flags="flip_aug random_flip"),
        Term("video_data.sources.*.augment.hue",
             "brightness, contrast and saturation stand beside it; the same for all frames",
             flags="color_aug"),
        Term("", "clips are not turned upside down; see augment of a source for other changes",
             ai_toolkit="datasets[].flip_y datasets[].augments"),
    ),
    "What is trained": (
        Term("method.kind", "lora, dora, loha, lokr, oft, fine_tune or embedding",
             ai_toolkit="network.type", flags="network_module", diffusion_pipe="adapter.type",
             onetrainer="training_method peft_type"),
        Term("method.rank", ai_toolkit="network.linear network.rank",
             flags="network_dim rank lora_rank", diffusion_pipe="adapter.rank",
             onetrainer="lora_rank"),
        Term("method.alpha", "the rank by default", ai_toolkit="network.linear_alpha network.alpha",
             flags="network_alpha lora_alpha", diffusion_pipe="adapter.alpha",
             onetrainer="lora_alpha"),
        Term("method.dropout", ai_toolkit="network.dropout", flags="network_dropout lora_dropout",
             diffusion_pipe="adapter.dropout", onetrainer="dropout_probability"),
        Term("method.modules", "names of layers, or of groups of them",
             ai_toolkit="network.network_kwargs", flags="network_args target_modules lora_layers",
             onetrainer="layer_filter"),
        Term("method.factor", "of lokr", ai_toolkit="network.lokr_factor",
             diffusion_pipe="adapter.decompose_factor", onetrainer="lokr_decompose_factor"),
        Term("method.lora_plus_ratio", flags="loraplus_lr_ratio"),
        Term("method.init_from", "a file for each expert",
             ai_toolkit="network.pretrained_lora_path", flags="network_weights dim_from_weights",
             diffusion_pipe="adapter.init_from_existing", onetrainer="lora_model_name"),
        Term("", "adapters are trained in float32; output.dtype is that of the files",
             diffusion_pipe="adapter.dtype", onetrainer="lora_weight_dtype"),
        Term("", "linear layers are trained", ai_toolkit="network.conv network.conv_alpha",
             flags="conv_dim conv_alpha"),
        Term("", "the text encoder is not trained; model.experts chooses the transformers",
             ai_toolkit="train.train_unet train.train_text_encoder",
             flags="network_train_unet_only train_text_encoder text_encoder_lr"),
    ),
    "Optimizer and learning rate": (
        Term("optimizer.name", "such as adamw or adamw_8bit", ai_toolkit="train.optimizer",
             flags="optimizer_type use_8bit_adam", diffusion_pipe="optimizer.type",
             onetrainer="optimizer.optimizer"),
        Term("optimizer.lr", "per_expert.high.lr and per_expert.low.lr where the experts differ",
             ai_toolkit="train.lr train.unet_lr", flags="learning_rate lr unet_lr",
             diffusion_pipe="optimizer.lr force_constant_lr", onetrainer="learning_rate"),
        Term("optimizer.weight_decay", ai_toolkit="train.optimizer_params.weight_decay",
             flags="adam_weight_decay optimizer_args", diffusion_pipe="optimizer.weight_decay",
             onetrainer="optimizer.weight_decay"),
        Term("optimizer.betas", flags="adam_beta1 adam_beta2", diffusion_pipe="optimizer.betas"),
        Term("optimizer.eps", flags="adam_epsilon", diffusion_pipe="optimizer.eps"),
        Term("train.schedule.kind", ai_toolkit="train.lr_scheduler",
             flags="lr_scheduler lr_scheduler_type", diffusion_pipe="lr_scheduler",
             onetrainer="learning_rate_scheduler"),
        Term("train.schedule.cycles", flags="lr_scheduler_num_cycles lr_num_cycles",
             onetrainer="learning_rate_cycles"),
        Term("train.schedule.power", flags="lr_scheduler_power lr_power"),
        Term("train.warmup_steps", "steps of each expert",
             ai_toolkit="train.lr_scheduler_params.num_warmup_steps",
             flags="lr_warmup_steps warmup", diffusion_pipe="warmup_steps",
             onetrainer="learning_rate_warmup_steps"),
        Term("train.cooldown_steps", "steps of each expert", flags="lr_decay_steps"),
        Term("train.max_grad_norm", ai_toolkit="train.max_grad_norm", flags="max_grad_norm",
             diffusion_pipe="gradient_clipping", onetrainer="clip_grad_norm"),
    ),
    "Training": (
        Term("train.steps", "of both experts together; add up those of two separate trainings",
             ai_toolkit="train.steps", flags="max_train_steps",
             diffusion_pipe="max_steps"),
        Term("train.epochs", "of each expert; the steps follow from the clips",
             flags="max_train_epochs num_train_epochs", diffusion_pipe="epochs",
             onetrainer="epochs"),
        Term("train.batch_size", ai_toolkit="train.batch_size",
             flags="train_batch_size batch_size general.batch_size datasets[].batch_size",
             diffusion_pipe="micro_batch_size_per_gpu image_micro_batch_size_per_gpu",
             onetrainer="batch_size"),
        Term("train.accumulation",
             ai_toolkit="train.gradient_accumulation train.gradient_accumulation_steps",
             flags="gradient_accumulation_steps", diffusion_pipe="gradient_accumulation_steps",
             onetrainer="gradient_accumulation_steps"),
        Term("train.seed", ai_toolkit="train.seed", flags="seed"),
        Term("train.switch_expert_every", ai_toolkit="train.switch_boundary_every",
             onetrainer="wan_expert_block"),
        Term("train.ema", "{} turns it on", ai_toolkit="train.ema_config.use_ema", flags="use_ema"),
        Term("train.ema.decay", ai_toolkit="train.ema_config.ema_decay", flags="ema_decay",
             onetrainer="ema_decay"),
        Term("train.condition_shares",
             "{first: 1} is image to video always, the default of i2v-a14b",
             ai_toolkit="datasets[].do_i2v", flags="i2v", onetrainer="wan_condition_shares"),
    ),
    "Timesteps and loss": (
        Term("train.timesteps.distribution",
             "uniform is the linear of others, logit_normal their sigmoid and shift",
             ai_toolkit="train.timestep_type train.content_or_style", flags="timestep_sampling",
             diffusion_pipe="model.timestep_sample_method", onetrainer="timestep_distribution"),
        Term("train.timesteps.shift", "by default the variant's: 12 for t2v-a14b, 5 for the others",
             flags="discrete_flow_shift flow_shift", diffusion_pipe="model.shift",
             onetrainer="timestep_shift"),
        Term("train.timesteps.shift_by_tokens", diffusion_pipe="model.flux_shift",
             onetrainer="dynamic_timestep_shifting"),
        Term("train.timesteps.mean", "of logit_normal", flags="logit_mean"),
        Term("train.timesteps.std", "of logit_normal", flags="logit_std sigmoid_scale"),
        Term("train.timesteps.scale", "of mode", flags="mode_scale"),
        Term("train.timesteps.stratified", "true", flags="num_timestep_buckets"),
        Term("", "always so: an expert draws from the distribution within its own range",
             flags="preserve_distribution_shape"),
        Term("train.loss.kind", "mse or huber", ai_toolkit="train.loss_type", flags="loss_type",
             onetrainer="mse_strength"),
        Term("train.loss.delta", "of huber", flags="huber_c", diffusion_pipe="pseudo_huber_c",
             onetrainer="huber_delta"),
        Term("train.loss.weighting.kind", ai_toolkit="train.min_snr_gamma train.snr_gamma",
             flags="weighting_scheme min_snr_gamma snr_gamma", onetrainer="loss_weight_fn"),
        Term("train.noise_offset", ai_toolkit="train.noise_offset", flags="noise_offset",
             onetrainer="offset_noise_weight"),
        Term("train.input_perturbation", flags="ip_noise_gamma",
             onetrainer="perturbation_noise_weight"),
        Term("", "Wan is trained by flow matching, and sampled with the official solver",
             ai_toolkit="train.noise_scheduler sample.sampler", flags="noise_scheduler"),
    ),
    "Files": (
        Term("output.name", ai_toolkit="config.name", flags="output_name",
             onetrainer="output_model_destination"),
        Term("output.dir", "the folder that holds the runs", ai_toolkit="training_folder",
             flags="output_dir logging_dir", diffusion_pipe="output_dir",
             onetrainer="workspace_dir"),
        Term("output.formats", ai_toolkit="save.save_format", flags="save_model_as",
             onetrainer="output_model_format"),
        Term("output.dtype", ai_toolkit="save.dtype", flags="save_precision",
             diffusion_pipe="save_dtype", onetrainer="output_dtype"),
        Term("output.keep_last", "a number of exports, not of steps",
             ai_toolkit="save.max_step_saves_to_keep",
             flags="save_last_n_steps save_last_n_epochs"),
        Term("train.save_every", "in steps of both experts together, for states and exports",
             ai_toolkit="save.save_every",
             flags="save_every_n_steps save_every_n_epochs checkpointing_steps",
             diffusion_pipe="save_every_n_epochs save_every_n_steps checkpoint_every_n_epochs",
             onetrainer="save_every backup_after"),
        Term("train.save_every_minutes", diffusion_pipe="checkpoint_every_n_minutes"),
        Term("train.keep_last", "a number of states",
             flags="save_last_n_steps_state save_last_n_epochs_state checkpoints_total_limit",
             onetrainer="rolling_backup_count"),
        Term("", "the state is always saved; `onewan train RUN --resume` continues from it",
             flags="save_state resume resume_from_checkpoint",
             diffusion_pipe="resume_from_checkpoint", onetrainer="continue_last_backup"),
    ),
    "Validation and samples": (
        Term("validation.every", "in steps",
             diffusion_pipe="eval_every_n_epochs eval_every_n_steps", onetrainer="validate_after"),
        Term("validation.sources", diffusion_pipe="eval_datasets"),
        Term("sample.every", "in steps of both experts together", ai_toolkit="sample.sample_every",
             flags="sample_every_n_steps sample_every_n_epochs validation_steps validation_epochs",
             onetrainer="sample_after"),
        Term("sample.prompts", "without any, nothing is sampled",
             ai_toolkit="sample.samples train.disable_sampling",
             flags="sample_prompts validation_prompt validation_prompts", onetrainer="samples"),
        Term("sample.at_start", "true samples the base model too, before the first step",
             ai_toolkit="train.skip_first_sample", flags="sample_at_first"),
        Term("sample.frames", ai_toolkit="sample.num_frames"),
        Term("sample.steps", "denoising steps", ai_toolkit="sample.sample_steps"),
        Term("sample.guidance", "a list: [high, low], or one number for ti2v-5b",
             ai_toolkit="sample.guidance_scale"),
        Term("sample.negative_prompt", ai_toolkit="sample.neg"),
        Term("sample.distilled", "the LoRAs of samples: a file for each expert",
             ai_toolkit="model.inference_lora_path"),
        Term("sample.prompts.*.seed", "one for each prompt", ai_toolkit="sample.walk_seed"),
    ),
    "Memory, speed and logs": (
        Term("memory.weights",
             "fp8, int8 or nf4 pack the blocks; an fp8 or GGUF file is left as it is",
             ai_toolkit="model.quantize model.qtype", flags="fp8_base fp8_scaled",
             diffusion_pipe="model.transformer_dtype"),
        Term("memory.resident_blocks",
             "the blocks that stay on the device, not those that leave; chosen if left out",
             ai_toolkit="model.layer_offloading model.layer_offloading_transformer_percent",
             flags="blocks_to_swap", diffusion_pipe="blocks_to_swap",
             onetrainer="layer_offload_fraction"),
        Term("memory.offload_inactive_expert",
             "on by default; blocks are streamed where that is not enough",
             ai_toolkit="model.low_vram", flags="offload_inactive_dit lazy_loading"),
        Term("memory.gradient_checkpointing", "on by default",
             ai_toolkit="train.gradient_checkpointing", flags="gradient_checkpointing",
             diffusion_pipe="activation_checkpointing",
             onetrainer="transformer.gradient_checkpointing"),
        Term("memory.offload_inputs", flags="gradient_checkpointing_cpu_offload"),
        Term("memory.attention", "auto measures which is fastest",
             ai_toolkit="train.sdp train.xformers",
             flags="sdpa flash_attn flash3 xformers sage_attn split_attn attn_mode"),
        Term("memory.compile", ai_toolkit="model.compile", flags="compile",
             diffusion_pipe="compile"),
        Term("", "encoders are freed before the transformers are loaded",
             ai_toolkit="train.unload_text_encoder", flags="vae_cache_cpu vae_tiling vae_dtype"),
        Term("", "clips are cached, and the next step is read while one is trained",
             ai_toolkit="datasets[].num_workers",
             flags="max_data_loader_n_workers persistent_data_loader_workers "
             "dataloader_num_workers num_workers", diffusion_pipe="map_num_proc caching_batch_size",
             onetrainer="dataloader_threads"),
        Term("", "a run uses one device",
             diffusion_pipe="pipeline_stages partition_method partition_split"),
        Term("logging.tensorboard", "on by default; logging.wandb for W&B",
             flags="log_with report_to", onetrainer="tensorboard"),
        Term("logging.wandb", ai_toolkit="logging.use_wandb",
             diffusion_pipe="monitoring.enable_wandb"),
        Term("logging.wandb.project", ai_toolkit="logging.project_name",
             flags="log_tracker_name tracker_project_name",
             diffusion_pipe="monitoring.wandb_tracker_name"),
        Term("logging.wandb.name", ai_toolkit="logging.run_name",
             flags="wandb_run_name tracker_run_name",
             diffusion_pipe="monitoring.wandb_run_name"),
    ),
}
"""All terms by topic."""
# fmt: on
