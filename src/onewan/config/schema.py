"""The run file: every choice a user can make, its default, its bounds, and what it means.

The string under each field is its documentation; pydantic carries it into the JSON schema
(`onewan schema`), from which editors complete and the reference page is made. A field that is null
by default takes the variant's own value; `onewan.config.rules` fills it in, and has the rules that
span sections or need facts about the variant. Nothing here imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

from pydantic import Field, field_validator

from onewan.arithmetic.lr_schedule import LrSchedule
from onewan.config.method import EmbeddingSection, LoraMethod, Method, ResolvedEmbedding
from onewan.config.objective import LossSection, Timesteps, UniformTimesteps
from onewan.config.optimizer import AdamWOptimizer, ConstantSchedule, Optimizer, Schedule
from onewan.config.section import Distinct, Float, Int, Positive, Section, Share, Size
from onewan.dtypes import WeightDtype
from onewan.variants import VARIANTS, Variant, VariantName

SCHEMA_VERSION = 1

COMPONENTS = ("transformer", "transformer_2", "vae", "text_encoder", "tokenizer")
"""Fields of the model section that give one component."""


class ModelSection(Section):
    path: str | None = None
    """The base model: a folder in the diffusers or the official layout, or the name of a repository
    on the Hugging Face hub such as Wan-AI/Wan2.2-T2V-A14B-Diffusers. Components that are given by
    themselves, below, come from there; with all of them, leave this out."""
    transformer: str | None = None
    """The high-noise expert, or the transformer of TI2V-5B: a file (safetensors of any program, in
    fp8_scaled too, or GGUF), a folder, or a whole model or hub repository to take it from."""
    transformer_2: str | None = None
    """The low-noise expert of T2V-A14B and I2V-A14B; given as `transformer` is."""
    vae: str | None = None
    """The VAE (the 2.1 VAE for A14B, the 2.2 VAE for TI2V-5B); given as `transformer` is."""
    text_encoder: str | None = None
    """The UMT5 text encoder; given as `transformer` is."""
    tokenizer: str | None = None
    """The tokenizer: its folder, or the hub name google/umt5-xxl. ComfyUI's files of the text
    encoder carry it and need none."""
    variant: VariantName
    """Which Wan 2.2 model it is; checked against the weights."""
    check_file_names: bool = True
    """Refuse a file as the high-noise expert if its name says low noise, and the reverse; the
    weights themselves do not tell."""
    quantized: Literal["keep", "dequantize"] = "keep"
    """How to hold weights that a file has in fp8 or GGUF. `keep`: linear layers stay quantized in
    memory and are dequantized at each use. `dequantize`: all are dequantized once when loading,
    which is faster and needs the memory of an unquantized model. The results are the same."""
    experts: Literal["both", "high", "low"] = "both"
    """Which experts train. T2V-A14B and I2V-A14B have two: `high` serves the noisy start of
    sampling (layout and motion), `low` the rest (detail). TI2V-5B has one: leave `both`."""
    boundary: Annotated[Float, Field(gt=0, lt=1)] | None = None
    """Noise level from which on the high-noise expert serves, in training and samples; null is the
    variant's own (0.875 for T2V-A14B, 0.9 for I2V-A14B). For base models that were trained with
    another one."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the frozen weights and of matrix products. Adapters, the residual stream, the
    time embedding and the loss are float32 in either case."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:[0-9]+)?|mps|xpu(:[0-9]+)?)$")
    """`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, `mps`, `xpu`, `xpu:1`. ROCm builds
    of PyTorch say cuda."""

    def facts(self) -> Variant:
        """The variant, with the boundary that was given."""
        return VARIANTS[self.variant].with_boundary(self.boundary)

    def sources(self) -> dict[str, str]:
        """What was given, ``path`` and components, as `WanModelLoader` takes it."""
        given = {name: getattr(self, name) for name in ("path", *COMPONENTS)}
        return {name: value for name, value in given.items() if value is not None}

    def source_of(self, component: Literal["transformer", "transformer_2"]) -> str:
        """Where a transformer comes from, as it was given."""
        given = self.sources()
        return given.get(component) or given.get("path") or ""


class WanTrainConfig(Section):
    """The `wan_config` section: how video becomes training samples for Wan."""

    max_frames: Int = Field(default=16, ge=1)
    """Most frames of one training clip, rounded down to 4n+1 (16 becomes 13), the only lengths
    that the VAE takes. Shorter clips train with the frames they have."""
    frame_sample_strategy: Literal["uniform", "random", "keyframe"] = "uniform"
    """Where in a longer file the frames are taken. `uniform`: from the middle; `random`: at a
    random place, fixed by the seed; `keyframe`: from the key frame nearest to the middle. Frames
    are always 1/target_fps apart; time is never stretched."""
    temporal_consistency_weight: Float = Field(default=1.0, ge=0)
    """Weight of each frame's deviation from the clip's mean error. 1.0 is the plain loss, exactly;
    more punishes flicker and wrong motion, less favours appearance."""
    transformer_layers_to_train: (
        Annotated[tuple[Annotated[Int, Field(ge=0)], ...], Field(min_length=1), Distinct] | None
    ) = None
    """Numbers of the transformer blocks to train, e.g. [0, 1, 2]; null is all."""
    use_temporal_attention: bool = True
    """false: each latent frame attends to itself alone (for style and character training)."""
    spatial_compression_ratio: Int = 8
    """A fact of the variant's VAE (8, or 16 for TI2V-5B); if given, it must agree."""
    temporal_compression_ratio: Int = 4
    """A fact of the variant's VAE (4); if given, it must agree."""


class SourceSection(Section):
    path: Path
    """A folder. Each video or image NAME.ext in it (and in its subfolders) is a clip if NAME.txt
    lies beside it; each line of NAME.txt is one caption, several are alternatives."""
    repeats: Int = Field(default=1, ge=1)
    """How often each of its clips comes in one pass over the data."""
    loss_weight: Positive = 1.0
    """What the loss of each of its clips is multiplied with."""
    target: Literal["data", "base"] = "data"
    """What its clips teach. `data`: what they show. `base`: what the untrained model makes of them
    (prior preservation), to keep what it knows; needs an adapter, which can be switched off."""


class VideoDataFields(Section):
    sources: tuple[SourceSection, ...] = ()
    """Where the clips are."""
    supported_formats: tuple[str, ...] = ("mp4", "avi", "mov", "webm")
    """Extensions of video files to use; other video files are reported. Images (png, jpg, jpeg,
    webp) are always used, as clips of one frame."""
    max_duration: Positive = 10.0
    """Longest training clip in seconds. Longer files are used, but no clip spans more than this."""
    min_resolution: Size = (256, 256)
    """Width and height; smaller files are reported and left out."""
    max_resolution: Size = (1024, 1024)
    """Width and height of the largest training size. Larger files are scaled down and used."""
    masks: bool = False
    """Use the masks that lie beside clips: NAME.mask.png for all frames of NAME.mp4, or a video
    NAME.mask.mp4 of the same times. White counts in the loss, black as `train.loss.unmasked_weight`
    says, and what is transparent counts as white; a clip without a mask counts everywhere."""
    cache: bool = True
    """Encode each clip and caption once and keep the result on disk. false: encode anew at every
    step, with the VAE and the text encoder staying in memory."""
    cache_dir: Path = Path("cache")
    """Where the cache lies. Several runs can share one."""

    @field_validator("supported_formats")
    @classmethod
    def _lower(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(v.lower().lstrip(".") for v in value)


class VideoDataSection(VideoDataFields):
    target_fps: Positive | None = None
    """Frames per second of the training clips; null is the variant's own rate (16, or 24 for
    TI2V-5B), at which the model plays what it makes."""
    resolution: Int | str | tuple[Int | str, ...] | None = None
    """Training sizes, one or several: an area in pixels (399360: each clip keeps its own shape
    at about that area) or an exact size ("832x480", width x height). null: the area of 480p."""

    @field_validator("resolution")
    @classmethod
    def _sizes(
        cls, value: int | str | tuple[int | str, ...] | None
    ) -> tuple[int | str, ...] | None:
        if value is None:
            return None
        several = value if isinstance(value, tuple) else (value,)
        return tuple(_area_or_size(v) for v in several)


class ResolvedVideoData(VideoDataFields):
    target_fps: float
    resolution: tuple[int | str, ...]


def _area_or_size(value: int | str) -> int | str:
    """`value` as an area in pixels or as "WxH"; ValueError when it is neither."""
    text = str(value).lower().replace(" ", "")
    width, cross, height = text.partition("x")
    if width.isdecimal() and int(width) and not cross:
        return int(width)
    if width.isdecimal() and height.isdecimal() and int(width) and int(height):
        return text
    raise ValueError(f"{value!r} is neither an area in pixels (399360) nor a size ('832x480')")


class EmaSection(Section):
    decay: Annotated[Float, Field(gt=0, lt=1)] = 0.999
    """Share of the old average in the new one, at each step of an expert; less in the first."""
    offload: bool = True
    """Keep the averages in CPU memory; false: on the device, beside the weights."""


class ExpertSettings(Section):
    steps: Int | None = Field(default=None, ge=1)
    """Optimizer steps of this expert; given for both, they are `train.steps` and its division."""
    lr: Positive | None = None
    """Learning rate; null is `optimizer.lr`."""
    rank: Int | None = Field(default=None, ge=1)
    """Rank of its adapter; null is `method.rank`."""
    alpha: Positive | None = None
    """Alpha of its adapter; null is `method.alpha`, or its own rank if it has one."""


class PerExpertSection(Section):
    high: ExpertSettings = ExpertSettings()
    """The high-noise expert."""
    low: ExpertSettings = ExpertSettings()
    """The low-noise expert."""


class ValidationSection(Section):
    """Loss on fixed clips, fixed noise and fixed noise levels: the same for the same weights."""

    sources: tuple[SourceSection, ...] = ()
    """Clips held out of training, to validate on."""
    share: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Share of the training clips (that show data) to hold out instead, chosen by their content and
    the seed. One is always left to train. With neither, the loss is measured on clips that
    train."""
    every: Int = Field(default=0, ge=0)
    """Steps between measurements; 0 measures before the first and after the last step only."""
    clips: Int = Field(default=4, ge=0)
    """Clips to measure on; 0 turns it off."""
    timesteps: Int = Field(default=4, ge=1)
    """Noise levels for each clip, equally probable parts of each expert's range."""


class TrainSection(Section):
    steps: Int = Field(default=2000, ge=1)
    """Optimizer steps, of all experts together."""
    batch_size: Int = Field(default=1, ge=1)
    """Clips in one forward pass."""
    accumulation: Int = Field(default=1, ge=1)
    """Forward passes per optimizer step."""
    seed: Int = Field(default=42, ge=0)
    """Seed of everything random. Each draw is keyed by it, its purpose and its place in the run,
    so a resumed run draws what an uncut one would have drawn."""
    schedule: Schedule = ConstantSchedule()
    """Course of the learning rate between warm-up and cooldown: a name, or a mapping with kind and
    what that kind takes."""
    warmup_steps: Int = Field(default=0, ge=0)
    """Optimizer steps of each expert over which its learning rate rises from 0; with
    `cooldown_steps`, fewer than it gets of `steps`."""
    cooldown_steps: Int = Field(default=0, ge=0)
    """Last optimizer steps of each expert, over which its learning rate falls to 0."""
    max_grad_norm: Positive | None = 1.0
    """Gradients are scaled down to this norm; null leaves them."""
    high_expert_share: Literal["equal", "density"] | Annotated[Float, Field(ge=0, le=1)] = "equal"
    """Share of the steps that the high-noise expert gets when both train: `equal` is one half;
    `density` is the share of noise levels above the boundary under `timesteps`; or a number between
    0 and 1."""
    switch_expert_every: Int = Field(default=10, ge=1)
    """Steps for which one expert trains before the other may. Longer blocks move weights between
    host and GPU less often."""
    caption_dropout: Share = 0.0
    """Share of the samples that train with an empty caption, for guidance."""
    first_frame_probability: Share = 0.2
    """TI2V-5B only: share of samples whose first latent frame is given clean, which trains
    image-to-video; that frame does not count in the loss."""
    first_frame_noise: tuple[Float, Annotated[Float, Field(ge=0)]] | None = None
    """TI2V-5B only: mean and standard deviation of the logarithm of the noise level in a given
    first frame, such as [-3.5, 0.5] (about 0.03); null gives it clean, as sampling does."""
    noise_offset: Float = Field(default=0.0, ge=0)
    """Strength of noise that is the same for a whole channel, added to the noise; lets the model
    learn very dark and very bright."""
    input_perturbation: Float = Field(default=0.0, ge=0)
    """Strength of noise added to the noisy sample but not to its target."""
    timesteps: Timesteps = UniformTimesteps()
    """How noise levels are drawn."""
    loss: LossSection = LossSection()
    """How errors count."""
    ema: EmaSection | None = None
    """Keep an exponential moving average of what trains, validated and exported beside it; null
    keeps none, {} one with the defaults."""
    save_every: Int = Field(default=500, ge=1)
    """Steps between saved training states and exported weights. The last step is always saved."""
    save_every_minutes: Positive | None = None
    """Also save the training state when this many minutes have passed since the last one."""
    keep_last: Int = Field(default=2, ge=1)
    """How many of the newest training states to keep; older ones are deleted. Exported weights
    stay."""
    keep_every: Int | None = Field(default=None, ge=1)
    """Keep the states of all steps that divide by this for ever."""
    keep_best: bool = False
    """Keep the state with the lowest validation loss too, and save it when it is measured."""

    def lr_schedule(self) -> LrSchedule:
        return LrSchedule(
            **self.schedule.model_dump(),
            warmup_steps=self.warmup_steps,
            cooldown_steps=self.cooldown_steps,
        )


class PromptSection(Section):
    prompt: str
    """What to show."""
    negative_prompt: str | None = None
    """What to avoid; null takes `sample.negative_prompt`."""
    image: Path | None = None
    """The first frame; I2V-A14B needs one, TI2V-5B can take one."""
    seed: Int | None = None
    """Seed of the noise; null takes `sample.seed`."""


class SampleFields(Section):
    prompts: tuple[PromptSection, ...] = ()
    """Videos to make along the way: a text, or a mapping with prompt, image, seed, ..."""
    every: Int = Field(default=0, ge=0)
    """Steps between sample videos; 0 makes them after the last step only."""
    at_start: bool = False
    """Also make them before the first step, to see the base model."""
    seed: Int = 0
    """Seed of the noise."""
    format: Literal["mp4", "webm"] = "mp4"
    """mp4: H.264, plays everywhere. webm: VP9."""

    @field_validator("prompts", mode="before")
    @classmethod
    def _texts(cls, value: object) -> object:
        if isinstance(value, (list, tuple)):
            items = cast("list[object] | tuple[object, ...]", value)
            return [{"prompt": v} if isinstance(v, str) else v for v in items]
        return value


class SampleSection(SampleFields):
    width: Int | None = Field(default=None, ge=16)
    """Pixels; null is the variant's official size. A multiple of 16, or 32 for TI2V-5B."""
    height: Int | None = Field(default=None, ge=16)
    """Pixels; null is the variant's official size. A multiple of 16, or 32 for TI2V-5B."""
    frames: Int | None = Field(default=None, ge=1)
    """Frames, 4n+1; null is the variant's official number (81, or 121)."""
    fps: Positive | None = None
    """Frames per second of the written file; null is the variant's own rate."""
    steps: Int | None = Field(default=None, ge=1)
    """Denoising steps; null is the variant's official number (40, or 50)."""
    shift: Positive | None = None
    """Shift of the noise schedule; null is the variant's official one."""
    guidance: tuple[Float, ...] | None = None
    """Guidance scale of each expert, [high, low], or [one] for TI2V-5B; null is the official."""
    negative_prompt: str | None = None
    """What to avoid in all videos; null is the official negative prompt, "" is nothing."""


class ResolvedSample(SampleFields):
    width: int
    height: int
    frames: int
    fps: float
    steps: int
    shift: float
    guidance: tuple[float, ...]
    negative_prompt: str


class OutputFields(Section):
    dir: Path = Path("runs")
    """The folder that holds the runs."""
    formats: Annotated[
        tuple[Literal["comfyui", "diffusers", "kohya"], ...], Field(min_length=1), Distinct
    ] = ("comfyui",)
    """How exported files name things. LoRA: `comfyui` is read by ComfyUI, diffusers, musubi-tuner
    and DiffSynth-Studio alike; `diffusers` by diffusers alone; `kohya`, as musubi-tuner writes it,
    by ComfyUI, diffusers and musubi-tuner. Fine-tuned experts: `comfyui` is one file, `diffusers` a
    folder."""
    dtype: WeightDtype | None = None
    """Precision of exported files; null is what was trained, to the bit (adapters and embeddings
    are float32)."""
    keep_last: Int | None = Field(default=None, ge=1)
    """How many of the newest exports stay, beside the best one; null is all. A fine-tuned expert of
    A14B is 28 GB each time."""


class OutputSection(OutputFields):
    name: str | None = Field(default=None, pattern=r"^[^/\\:*?\"<>|.][^/\\:*?\"<>|]*$")
    """The run's name, and its folder's; null is the name of the run file."""


class ResolvedOutput(OutputFields):
    name: str


class MemorySection(Section):
    gradient_checkpointing: bool = True
    """Keep only each block's input for the backward pass and compute the rest again: a third more
    compute for a tenth of the memory."""
    offload_inactive_expert: bool = True
    """Keep the expert that is not training in host memory."""


class LoggingSection(Section):
    tensorboard: bool = True
    """Write curves for TensorBoard into the run's folder."""


class RunConfig(Section):
    """A whole run file."""

    schema_version: Int = Field(default=SCHEMA_VERSION, ge=1, le=SCHEMA_VERSION)
    """Version of the run file's format; a newer one than this onewan knows is refused."""
    model: ModelSection
    """The base model."""
    wan_config: WanTrainConfig = WanTrainConfig()
    """How video becomes training samples for Wan."""
    video_data: VideoDataSection = VideoDataSection()
    """The clips."""
    method: Method = LoraMethod()
    """What is trained."""
    embeddings: tuple[EmbeddingSection, ...] = ()
    """Placeholders in captions and prompts, and their vectors, which train beside any method."""
    per_expert: PerExpertSection = PerExpertSection()
    """What differs between the two experts."""
    optimizer: Optimizer = AdamWOptimizer()
    """How the weights move."""
    train: TrainSection = TrainSection()
    """The course of training."""
    validation: ValidationSection = ValidationSection()
    """Loss on fixed clips, fixed noise and fixed noise levels."""
    sample: SampleSection = SampleSection()
    """Videos made along the way."""
    output: OutputSection = OutputSection()
    """Where results go and in which form."""
    memory: MemorySection = MemorySection()
    """What is traded for memory."""
    logging: LoggingSection = LoggingSection()
    """What is recorded beside the run's own files."""


class ResolvedRun(Section):
    """A run file with every default filled in and all paths absolute; `load_run` returns it.

    Sections in which something may be null in the file have a type of their own here.
    """

    schema_version: int
    model: ModelSection
    wan_config: WanTrainConfig
    video_data: ResolvedVideoData
    method: Method
    embeddings: tuple[ResolvedEmbedding, ...]
    per_expert: PerExpertSection
    optimizer: Optimizer
    train: TrainSection
    validation: ValidationSection
    sample: ResolvedSample
    output: ResolvedOutput
    memory: MemorySection
    logging: LoggingSection
