"""The fields of the run file: types, defaults, bounds and documentation.

The string under each field is its documentation, also in the JSON schema (`onewan schema`), which
editors use for completion. `resolve` replaces null by the variant's value where a field says so;
`rules` has the rules between fields.
"""

# Sections are immutable, so a subclass may narrow the type of a field and take its default away.
# pyright: reportIncompatibleVariableOverride=false, reportGeneralTypeIssues=false

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from onewan.arithmetic.byte_sizes import AMOUNT, as_byte_size
from onewan.arithmetic.lr_schedule import LrSchedule
from onewan.config.clips import (
    ResolvedVideoData,
    ResolvedWanTrainConfig,
    SourceSection,
    VideoDataSection,
    WanTrainConfig,
)
from onewan.config.former_fields import with_present_fields
from onewan.config.method import EmbeddingSection, LoraMethod, Method, ResolvedEmbedding
from onewan.config.objective import (
    ConditionSharesSection,
    LossSection,
    Timesteps,
    UniformTimesteps,
)
from onewan.config.optimizer import AdamWOptimizer, ConstantSchedule, Optimizer, Schedule
from onewan.config.parallel import ParallelSection
from onewan.config.section import Distinct, Float, Int, Positive, Section, Several, Share
from onewan.dtypes import WeightDtype, WeightStorage
from onewan.variants import VARIANTS, ExpertName, Variant, VariantName

SCHEMA_VERSION = 1

COMPONENTS = ("transformer", "transformer_2", "vae", "text_encoder", "tokenizer")
"""Fields of the model section that name one component each."""

# Without an escaped quotation mark, which JavaScript's regular expressions of Unicode text refuse.
_FOLDER_NAME = r'^[^/\\:*?"<>|.\x00-\x1f\x7f][^/\\:*?"<>|\x00-\x1f\x7f]*$'
_ByteSize = Annotated[
    str, AfterValidator(as_byte_size), WithJsonSchema({"type": "string", "pattern": AMOUNT})
]
# The multiple is for the JSON schema alone: `rules` knows the variant's.
_SampleSide = Annotated[Int, Field(ge=16, json_schema_extra={"multipleOf": 16})]


class ModelSection(Section):
    path: str | None = None
    """The base model: a folder in the diffusers or the official layout, or the name of a repository
    on the Hugging Face hub such as Wan-AI/Wan2.2-T2V-A14B-Diffusers. The fields below override
    single components; where they name all, leave this out."""
    transformer: str | None = None
    """The high-noise expert, or the transformer of TI2V-5B: a file (safetensors in any known
    key format, also fp8_scaled, or GGUF), a folder, or a whole model or hub repository."""
    transformer_2: str | None = None
    """The low-noise expert of T2V-A14B and I2V-A14B; same forms as `transformer`."""
    vae: str | None = None
    """The VAE (the 2.1 VAE for A14B, the 2.2 VAE for TI2V-5B); same forms as `transformer`."""
    text_encoder: str | None = None
    """The UMT5 text encoder; same forms as `transformer`."""
    tokenizer: str | None = None
    """The tokenizer: a folder or google/umt5-xxl. ComfyUI's text encoder files contain it."""
    variant: VariantName
    """The Wan 2.2 variant; checked against the weights."""
    check_file_names: bool = True
    """Refuse a file for the high-noise expert if its name says low noise, and the reverse. The
    weights of the two have the same names and shapes."""
    experts: Literal["both", "high", "low"] = "both"
    """Experts to train. T2V-A14B and I2V-A14B have two: `high` denoises the noisy first part of
    sampling (layout and motion), `low` the rest (detail). TI2V-5B has one: keep `both`."""
    boundary: Annotated[Float, Field(gt=0, lt=1)] | None = None
    """Timestep in (0, 1) at and above which the high-noise expert is used, in training and
    sampling; null is the variant's own (0.875 or 0.9), which other base models may not have."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the frozen weights and of matrix products. Adapters, the residual stream, the
    time embedding and the loss are always float32."""
    device: str = "auto"
    """`auto` (the accelerator that PyTorch finds, else the CPU), or any device by PyTorch's name:
    `cpu`, `cuda` (also ROCm), `cuda:1`, `xpu`, `mps`."""

    def facts(self) -> Variant:
        """The variant, with the boundary that was given."""
        return VARIANTS[self.variant].with_boundary(self.boundary)

    def sources(self) -> dict[str, str]:
        """The paths that are given, by ``path`` and component name, for `WanModelLoader`."""
        given = {name: getattr(self, name) for name in ("path", *COMPONENTS)}
        return {name: value for name, value in given.items() if value is not None}

    def source_of(self, component: Literal["transformer", "transformer_2"]) -> str:
        """The path that a transformer is loaded from, as given."""
        given = self.sources()
        return given.get(component) or given.get("path") or ""


class EmaSection(Section):
    decay: Annotated[Float, Field(gt=0, lt=1)] = 0.999
    """Decay rate of the average per step of an expert, in (0, 1); smaller in the first steps."""
    offload: bool = True
    """Keep the averages in CPU memory; false: on the device, beside the weights."""


class ExpertSettings(Section):
    steps: Int | None = Field(default=None, ge=1)
    """Optimizer steps of this expert; set for both, they replace `train.steps` and its division."""
    lr: Positive | None = None
    """Learning rate; null is `optimizer.lr`."""
    rank: Int | None = Field(default=None, ge=1)
    """Rank of its adapter; null is `method.rank`."""
    alpha: Positive | None = None
    """Alpha of its adapter; null is `method.alpha`, or this rank if it is set."""


class PerExpertSection(Section):
    high: ExpertSettings = ExpertSettings()
    """The high-noise expert."""
    low: ExpertSettings = ExpertSettings()
    """The low-noise expert."""


class ValidationSection(Section):
    """Loss on fixed clips with fixed noise and timesteps: deterministic for given weights."""

    sources: Annotated[tuple[SourceSection, ...], Several] = ()
    """Folders with validation clips, which are not trained on; same forms as the training ones."""
    share: Annotated[Float, Field(ge=0, lt=1)] | None = None
    """Fraction of the training clips to hold out instead, in [0, 1), chosen by their content and
    the seed. null: a tenth where there are 20 clips or more. Without held-out clips, the loss is
    measured on training clips."""
    every: Int = Field(default=250, ge=0)
    """Steps between validations; 0 validates before the first and after the last step only."""
    clips: Int = Field(default=4, ge=0)
    """Number of clips to validate on; 0 turns validation off."""
    timesteps: Int = Field(default=4, ge=1)
    """Timesteps per clip, at equally spaced quantiles of each expert's density."""


class TrainSection(Section):
    steps: Int = Field(default=2000, ge=1)
    """Optimizer steps of the run, of both experts together."""
    epochs: Int | None = Field(default=None, ge=1)
    """Instead of `steps`: how often each trained expert goes through all of its clips. The number
    of steps follows from them, with their repeats, the batch size and the accumulation."""
    batch_size: Int = Field(default=1, ge=1)
    """Clips per forward pass."""
    accumulation: Int = Field(default=1, ge=1)
    """Gradient accumulation: forward passes per optimizer step."""
    seed: Int = Field(default=42, ge=0)
    """Seed of everything random; a resumed run draws the same values as an uninterrupted one."""
    schedule: Schedule = ConstantSchedule()
    """Learning-rate schedule between warm-up and cooldown: a name, or kind and its options."""
    warmup_steps: Int = Field(default=0, ge=0)
    """Linear learning-rate warm-up, in optimizer steps of each expert."""
    cooldown_steps: Int = Field(default=0, ge=0)
    """Linear decay of the learning rate to 0, over the last optimizer steps of each expert."""
    max_grad_norm: Positive | None = 1.0
    """Gradient clipping: maximum norm of the gradient; null turns it off."""
    high_expert_share: Literal["equal", "density"] | Annotated[Float, Field(ge=0, le=1)] = "equal"
    """Fraction of the steps that train the high-noise expert when both are trained: a number,
    `equal` (one half) or `density` (the probability of its timesteps)."""
    switch_expert_every: Int = Field(default=10, ge=1)
    """Steps of one expert before the run may switch to the other, which moves their weights."""
    caption_dropout: Share = 0.0
    """Probability of replacing a caption by the empty one, for classifier-free guidance."""
    preservation_weight: Positive = 1.0
    """Weight of the loss that keeps the base model's predictions for the `class_word` of a source,
    beside the loss of its clips."""
    condition_shares: ConditionSharesSection | None = None
    """I2V-A14B and TI2V-5B: shares of the samples that are given the first frame of their clip, the
    first and the last (`both`), the `last` one or `none`, such as {first: 0.5, both: 0.5}. null is
    {first: 1} for I2V-A14B and {first: 0.2, none: 0.8} for TI2V-5B."""
    first_frame_noise: tuple[Float, Annotated[Float, Field(ge=0)]] | None = None
    """TI2V-5B only: mean and standard deviation of the logarithm of the noise level in the first
    frame that is given, such as [-3.5, 0.5] (about 0.03); null keeps it clean, as in sampling."""
    noise_offset: Float = Field(default=0.0, ge=0)
    """Offset noise: strength of noise constant over each channel, for dark or bright videos."""
    input_perturbation: Float = Field(default=0.0, ge=0)
    """Strength of additional noise in the noisy sample that is not in the target."""
    timesteps: Timesteps = UniformTimesteps()
    """Distribution of the timesteps: a name, or distribution and its options."""
    loss: LossSection = LossSection()
    """Loss function and weights."""
    ema: EmaSection | None = None
    """Exponential moving average of the weights, validated and exported too; {} turns it on."""
    save_every: Int = Field(default=250, ge=1)
    """Steps between checkpoints (training state and exported weights); the last is always saved."""
    save_every_minutes: Positive | None = None
    """Also save the training state when this many minutes have passed since the last save."""
    keep_last: Int = Field(default=2, ge=1)
    """Number of newest training states to keep; see `output.keep_last` for exported weights."""
    keep_every: Int | None = Field(default=None, ge=1)
    """Keep every training state whose step is a multiple of this permanently."""
    keep_best: bool = False
    """Also save and keep the training state with the lowest mean validation loss of the experts."""

    def lr_schedule(self) -> LrSchedule:
        return LrSchedule(
            **self.schedule.model_dump(),
            warmup_steps=self.warmup_steps,
            cooldown_steps=self.cooldown_steps,
        )


class PromptSection(Section):
    shorthand = "prompt"

    prompt: str
    """The prompt."""
    negative_prompt: str | None = None
    """Negative prompt; null is `sample.negative_prompt`."""
    image: Path | None = None
    """Image file for the first frame, for all variants but T2V-A14B."""
    last_image: Path | None = None
    """Image file for the last frame, with or without a first one; I2V-A14B needs one of the two."""
    control: Path | None = None
    """Control video, for Fun-Control: frames are taken at `sample.fps` from its beginning."""
    reference: Path | None = None
    """Reference image file, for Fun-Control."""
    seed: Int | None = None
    """Seed of the noise; null is `sample.seed`."""


class DistilledSection(Section):
    """LoRAs that are distilled for a few steps, laid over what is trained while it is sampled."""

    high: Path | None = None
    """The distilled LoRA of the high-noise expert."""
    low: Path | None = None
    """The distilled LoRA of the low-noise expert."""
    single: Path | None = None
    """The distilled LoRA of TI2V-5B, which has one transformer."""
    strength: Positive = 1.0
    """Multiplies what the files add; early files without alpha need 0.125."""
    steps: Int = Field(default=4, ge=1)
    """Denoising steps that the LoRAs were distilled for."""
    guidance: Annotated[Float, Field(ge=1)] = 1.0
    """Guidance scale of all experts; 1 is none, for which the LoRAs were distilled."""
    shift: Positive = 5.0
    """Timestep shift of the solver, Euler's method: with 4 steps, 5 gives the time steps 1000,
    937.5, 833.3 and 625."""
    full_every: Int | None = Field(default=None, ge=0)
    """Steps between samples without the LoRAs, by `sample.steps`, `shift` and `guidance`, besides;
    0: after the last step only; null: none."""

    def files(self) -> dict[ExpertName, Path]:
        """The files that are given, by expert."""
        given: dict[ExpertName, Path | None] = {
            "high": self.high,
            "low": self.low,
            "single": self.single,
        }
        return {name: path for name, path in given.items() if path is not None}


class SampleSection(Section):
    prompts: Annotated[tuple[PromptSection, ...], Several] = ()
    """Prompts of sample videos: one, or a list, each a text or a mapping."""
    every: Int = Field(default=250, ge=0)
    """Steps between sample videos; 0 samples after the last step only."""
    at_start: bool = True
    """Also sample before the first step, with the base model."""
    seed: Int = 0
    """Seed of the noise."""
    format: Literal["mp4", "webm"] = "mp4"
    """Format of the video files: mp4 (H.264) or webm (VP9)."""
    width: _SampleSide | None = None
    """Width in pixels, a multiple of 16, or 32 for TI2V-5B; null is that of the first
    training size in the shape of 16:9."""
    height: _SampleSide | None = None
    """Height in pixels, a multiple of 16, or 32 for TI2V-5B; null is that of the first
    training size in the shape of 16:9."""
    frames: Int | None = Field(default=None, ge=1)
    """Number of frames, 4n+1; null: as many as cost no more than fifty training steps, from those
    of a training clip up to the official 81 or 121."""
    fps: Positive | None = None
    """Frames per second of the written file; null is the variant's own rate."""
    steps: Int | None = Field(default=None, ge=1)
    """Denoising steps; null is 25 (the official number is 40, or 50)."""
    shift: Positive | None = None
    """Timestep shift of the solver; null is the official one."""
    guidance: tuple[Float, ...] | None = None
    """Guidance scale of each expert, [high, low], or [scale] for TI2V-5B; null is the official."""
    negative_prompt: str | None = None
    """Negative prompt of all samples; null is the official one, "" is none."""
    distilled: DistilledSection | None = None
    """Sample in a few steps with LoRAs that are distilled for it, at a tenth of the price; null:
    with the model as it is trained."""


class ResolvedSample(SampleSection):
    width: int
    height: int
    frames: int
    fps: float
    steps: int
    shift: float
    guidance: tuple[float, ...]
    negative_prompt: str


class OutputSection(Section):
    dir: Path = Path("runs")
    """The folder that holds the runs."""
    formats: Annotated[
        tuple[Literal["comfyui", "no_alpha", "diffusers", "kohya"], ...],
        Field(min_length=1),
        Distinct,
    ] = ("comfyui",)
    """Key formats of exported files. LoRA: `comfyui` is read by ComfyUI, diffusers, musubi-tuner
    and DiffSynth-Studio; `no_alpha`, the same with alpha / rank multiplied into the weights, by
    these, ai-toolkit and diffusion-pipe; `diffusers` by diffusers only; `kohya` (of musubi-tuner)
    by ComfyUI, diffusers and musubi-tuner. Fine-tuned experts: `comfyui` is one file, `diffusers`
    a folder."""
    dtype: WeightDtype | None = "bfloat16"
    """Data type of exported files; null is that of the trained weights. States keep float32."""
    keep_last: Int | None = Field(default=4, ge=1)
    """Number of newest exports to keep; null keeps all. The best by validation are kept too, as
    NAME_best_..."""
    name: str | None = Field(default=None, pattern=_FOLDER_NAME)
    """Name of the run and of its folder; null is the name of the run file."""


class ResolvedOutput(OutputSection):
    name: str


AttentionName = Literal[
    "auto",
    "flash",
    "efficient",
    "cudnn",
    "overrideable",
    "math",
    "flash_attn",
    "flash_attn_3",
    "xformers",
]


def _with_backward_pass(value: object) -> object:
    if isinstance(value, str) and value.lower().startswith("sage"):
        raise ValueError(
            "SageAttention has no backward pass, so nothing can be trained with it; choose auto"
        )
    return value


class MemorySection(Section):
    """What is kept on the device or in host memory, and what is computed again. Settings that are
    null follow from the plan (`onewan plan`)."""

    gradient_checkpointing: bool = True
    """Gradient checkpointing per block: a third more compute, a tenth of the activation memory."""
    offload_inactive_expert: bool = True
    """Keep the expert that is not being trained in CPU memory."""
    weights: WeightStorage = "as_stored"
    """Storage of the matrices in the transformers' blocks, in memory: as in the file (`as_stored`:
    fp8 and GGUF stay packed), not packed (`bf16`: in `model.dtype`, whichever that is), or packed
    while loading (`fp8`, `int8` or `nf4`). Packed ones are expanded just before each use."""
    resident_blocks: Int | None = Field(default=None, ge=0)
    """Transformer blocks whose weights stay on the device; those of the others are streamed from
    host memory, ahead of their use. null: as many as fit, for each bucket."""
    offload_inputs: bool | None = None
    """Keep the inputs of the blocks, which gradient checkpointing stores, in host memory."""
    keep_attention: Literal["no", "device", "host"] | None = None
    """Keep the outputs of attention for the backward pass instead of computing them again, on the
    device or in host memory; each block is then differentiated in parts, with a lower peak."""
    feed_forward_chunks: Int | None = Field(default=None, ge=1)
    """Chunks of tokens in which a block's feed-forward layer is computed in training."""
    compile: bool = False
    """Compile the blocks with `torch.compile`."""
    attention: Annotated[AttentionName, BeforeValidator(_with_backward_pass)] = "auto"
    """Attention backend: PyTorch's `flash`, `efficient`, `cudnn`, `overrideable` or `math`, or that
    of a package. `auto`: the fastest, measured at the start of the run; a resumed run keeps it."""
    host_weights: Literal["pinned", "pageable", "mapped"] | None = None
    """The host's copy of streamed weights: in pinned (page-locked) memory, which copies fastest; in
    pageable memory, copied through a small pinned buffer; or `mapped`: read from the model's file
    each time, which needs no memory but what the system uses to cache the file. null: pinned where
    that works, else pageable."""
    vram: _ByteSize | None = None
    """Device memory that the run may use, such as 24GB or 24GiB; null is what the device has."""
    ram: _ByteSize | None = None
    """Host memory that the run may use, such as 64GB or 64GiB; null is what the machine has.
    Several processes of a run on one machine share it in equal parts."""


def _as_section(value: object) -> object:
    return {} if value == "auto" else value


class WandbSection(Section):
    project: str = Field(default="onewan", min_length=1)
    """The project on W&B."""
    entity: str | None = None
    """User or team; null is the account's default."""
    name: str | None = None
    """Name of the run there; null is `output.name`."""
    mode: Literal["online", "offline"] = "online"
    """`offline`: only into the run's folder, from where `wandb sync` sends it later."""


def _as_wandb(value: object) -> object:
    if isinstance(value, bool):
        return {} if value else None
    return value


class LoggingSection(Section):
    tensorboard: bool = True
    """Write TensorBoard logs into the run's folder."""
    wandb: Annotated[
        WandbSection | None,
        BeforeValidator(_as_wandb, json_schema_input_type=WandbSection | bool | None),
    ] = None
    """Also send curves and sample videos to Weights & Biases: true, or its settings."""


class ChangeSection(Section):
    step: Int = Field(ge=0)
    """Steps that are done when the values come into force; 0 is before the first step."""
    settings: dict[str, Any]
    """New values by the dotted names of the fields, such as {optimizer.lr: 5e-5}."""


class RunConfig(Section):
    """A whole run file."""

    _former_fields = model_validator(mode="before")(with_present_fields)

    schema_version: Int = Field(default=SCHEMA_VERSION, ge=1, le=SCHEMA_VERSION)
    """Version of the run file's format; a newer one than this onewan knows is refused."""
    model: ModelSection
    """The base model."""
    wan_config: WanTrainConfig = WanTrainConfig()
    """Frames per clip, trained blocks and temporal behavior."""
    video_data: VideoDataSection = VideoDataSection()
    """Training clips."""
    method: Method = LoraMethod()
    """Training method."""
    embeddings: tuple[EmbeddingSection, ...] = ()
    """Textual-inversion embeddings, which can be trained together with any method."""
    per_expert: PerExpertSection = PerExpertSection()
    """Settings that differ between the two experts."""
    optimizer: Optimizer = AdamWOptimizer()
    """Optimizer."""
    train: TrainSection = TrainSection()
    """Training loop."""
    validation: ValidationSection = ValidationSection()
    """Validation loss."""
    sample: SampleSection = SampleSection()
    """Sample videos during training."""
    output: OutputSection = OutputSection()
    """Exported files."""
    memory: Annotated[
        MemorySection,
        BeforeValidator(_as_section, json_schema_input_type=MemorySection | Literal["auto"]),
    ] = MemorySection()
    """Memory: `auto`, or the settings that are not left to the plan."""
    parallel: Annotated[
        ParallelSection,
        BeforeValidator(_as_section, json_schema_input_type=ParallelSection | Literal["auto"]),
    ] = ParallelSection()
    """Several processes, on one machine or more: `auto`, or their settings."""
    logging: LoggingSection = LoggingSection()
    """Additional logs."""
    changes: tuple[ChangeSection, ...] = ()
    """Settings that change while the run trains, in the order of their steps; `onewan set` adds
    those that it makes."""


class ResolvedRun(RunConfig):
    """A run file with every default filled in and all paths absolute; `load_run` returns it."""

    wan_config: ResolvedWanTrainConfig
    video_data: ResolvedVideoData
    embeddings: tuple[ResolvedEmbedding, ...]
    sample: ResolvedSample
    output: ResolvedOutput
