"""The run file: every choice a user can make, its default, its bounds, and what it means.

The string under each field is its documentation; pydantic carries it into the JSON schema
(`onewan schema`), from which editors complete and the reference page is made. A field that is null
by default takes the variant's own value; `onewan.config.rules` fills it in, and has the rules that
span sections or need facts about the variant. Nothing here imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from onewan.variants import VariantName

SCHEMA_VERSION = 1

COMPONENTS = ("transformer", "transformer_2", "vae", "text_encoder", "tokenizer")
"""Fields of the model section that give one component."""

# Strict, since `true` would count as 1 otherwise, and a text as the number it spells.
Int = Annotated[int, Field(strict=True)]
Float = Annotated[float, Field(strict=True)]
Size = tuple[Annotated[Int, Field(ge=1)], Annotated[Int, Field(ge=1)]]
Positive = Annotated[Float, Field(gt=0)]


class Section(BaseModel):
    """Base of all sections: no unknown keys, no changes after reading, documentation in place."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    # A validator of the field and not part of `Int`, from where it would keep the bounds of the
    # number out of the JSON schema.
    @field_validator("*", mode="before")
    @classmethod
    def _whole(cls, value: object) -> object:
        """2e3 is a float to YAML and a whole number to its writer, as 2.0 is to JSON's schema."""
        return int(value) if isinstance(value, float) and value.is_integer() else value


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
    check_names: bool = True
    """Refuse a file as the high-noise expert if its name says low noise, and the reverse; the
    weights themselves do not tell."""
    quantised: Literal["keep", "expand"] = "keep"
    """Weights that a file holds in fp8 or GGUF: `keep` leaves those of the linear layers as they
    are in memory and expands each at its use; `expand` does it once, for speed, at the memory of a
    model that is not quantised. The numbers are the same."""
    experts: Literal["both", "high", "low"] = "both"
    """Which experts train. T2V-A14B and I2V-A14B have two: `high` serves the noisy start of
    sampling (layout and motion), `low` the rest (detail). TI2V-5B has one: leave `both`."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the frozen weights and of matrix products. Adapters, the residual stream, the
    time embedding and the loss are float32 in either case."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:[0-9]+)?|mps|xpu(:[0-9]+)?)$")
    """`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, `mps`, `xpu`, `xpu:1`. ROCm builds
    of PyTorch say cuda."""

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
    transformer_layers_to_train: tuple[Annotated[Int, Field(ge=0)], ...] | None = None
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


class VideoDataSection(Section):
    sources: tuple[SourceSection, ...] = ()
    """Where the clips are."""
    supported_formats: tuple[str, ...] = ("mp4", "avi", "mov", "webm")
    """Extensions of video files to use; other video files are reported. Images (png, jpg, jpeg,
    webp) are always used, as clips of one frame."""
    target_fps: Positive | None = None
    """Frames per second of the training clips; null is the variant's own rate (16, or 24 for
    TI2V-5B), at which the model plays what it makes."""
    max_duration: Positive = 10.0
    """Longest training clip in seconds. Longer files are used, but no clip spans more than this."""
    min_resolution: Size = (256, 256)
    """Width and height; smaller files are reported and left out."""
    max_resolution: Size = (1024, 1024)
    """Width and height of the largest training size. Larger files are scaled down and used."""
    resolution: Int | str | tuple[Int | str, ...] | None = None
    """Training sizes, one or several: an area in pixels (399360: each clip keeps its own shape
    at about that area) or an exact size ("832x480", width x height). null: the area of 480p."""
    cache: bool = True
    """Encode each clip and caption once and keep the result on disk. false: encode anew at every
    step, with the VAE and the text encoder staying in memory."""
    cache_dir: Path = Path("cache")
    """Where the cache lies. Several runs can share one."""

    @field_validator("supported_formats")
    @classmethod
    def _lower(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(v.lower().lstrip(".") for v in value)

    @field_validator("resolution")
    @classmethod
    def _sizes(
        cls, value: int | str | tuple[int | str, ...] | None
    ) -> tuple[int | str, ...] | None:
        if value is None:
            return None
        several = value if isinstance(value, tuple) else (value,)
        return tuple(_area_or_size(v) for v in several)


def _area_or_size(value: int | str) -> int | str:
    """`value` as an area in pixels or as "WxH"; ValueError when it is neither."""
    text = str(value).lower().replace(" ", "")
    width, cross, height = text.partition("x")
    if width.isdecimal() and int(width) and not cross:
        return int(width)
    if width.isdecimal() and height.isdecimal() and int(width) and int(height):
        return text
    raise ValueError(f"{value!r} is neither an area in pixels (399360) nor a size ('832x480')")


class LoraMethod(Section):
    kind: Literal["lora"] = "lora"
    """What is trained: a low-rank adapter (LoRA) beside the frozen weights."""
    rank: Int = Field(default=32, ge=1)
    """Rank of the adapter: more holds more, and costs memory and disk."""
    alpha: Positive | None = None
    """The adapter counts alpha/rank times; null is the rank itself, so once."""
    dropout: Float = Field(default=0.0, ge=0, lt=1)
    """Probability with which an input of the adapter is dropped while training."""
    modules: tuple[Literal["self_attention", "cross_attention", "ffn"], ...] = Field(
        default=("self_attention", "cross_attention", "ffn"), min_length=1
    )
    """Which linear layers of each block get an adapter."""


class AdamWOptimizer(Section):
    name: Literal["adamw"] = "adamw"
    """The optimizer."""
    lr: Positive = 1e-4
    """Learning rate."""
    betas: tuple[
        Annotated[Float, Field(ge=0, lt=1)],
        Annotated[Float, Field(ge=0, lt=1)],
    ] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: Positive = 1e-8
    """Added to the denominator."""
    weight_decay: Float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""


class TimestepSection(Section):
    distribution: Literal["uniform", "logit_normal"] = "uniform"
    """Density of the noise level before the shift. Each expert draws from it truncated exactly to
    its own range after the shift."""
    mean: Float = 0.0
    """Mean of the normal under `logit_normal`."""
    std: Positive = 1.0
    """Standard deviation of the normal under `logit_normal`."""
    shift: Positive | None = None
    """Shift s of the noise level u: t = s*u / (1 + (s-1)*u). null is the variant's official one
    (12 for T2V-A14B, 5 for the others), under which training visits the levels of sampling."""


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
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up; linear and cosine end at 0."""
    warmup_steps: Int = Field(default=0, ge=0)
    """Optimizer steps of each expert over which its learning rate rises from 0; fewer than it gets
    of `steps`."""
    max_grad_norm: Positive | None = 1.0
    """Gradients are scaled down to this norm; null leaves them."""
    high_share: Literal["equal", "mass"] | Annotated[Float, Field(ge=0, le=1)] = "equal"
    """Share of the steps that the high-noise expert gets when both train: `equal` is one half;
    `mass` is the share of noise levels above the boundary under `timesteps`; or a number between
    0 and 1."""
    expert_block: Int = Field(default=10, ge=1)
    """Steps for which one expert trains before the other may. Longer blocks move weights between
    host and GPU less often."""
    first_frame_probability: Float = Field(default=0.2, ge=0, le=1)
    """TI2V-5B only: share of samples whose first latent frame is given clean, which trains
    image-to-video; that frame does not count in the loss."""
    timesteps: TimestepSection = TimestepSection()
    """How noise levels are drawn."""
    grid_every: Int = Field(default=0, ge=0)
    """Steps between measurements of the loss on a fixed grid of clips, noise and noise levels,
    comparable over the whole run; 0 measures before the first and after the last step only."""
    grid_clips: Int = Field(default=4, ge=0)
    """Clips in that grid; 0 turns it off."""
    save_every: Int = Field(default=500, ge=1)
    """Steps between saved training states and exported weights. The last step is always saved."""
    keep_states: Int = Field(default=2, ge=1)
    """How many training states to keep; older ones are deleted. Exported weights stay."""


class PromptSection(Section):
    prompt: str
    """What to show."""
    negative_prompt: str | None = None
    """What to avoid; null takes `sample.negative_prompt`."""
    image: Path | None = None
    """The first frame; I2V-A14B needs one, TI2V-5B can take one."""
    seed: Int | None = None
    """Seed of the noise; null takes `sample.seed`."""


class SampleSection(Section):
    prompts: tuple[PromptSection, ...] = ()
    """Videos to make along the way: a text, or a mapping with prompt, image, seed, ..."""
    every: Int = Field(default=0, ge=0)
    """Steps between sample videos; 0 makes them after the last step only."""
    at_start: bool = False
    """Also make them before the first step, to see the base model."""
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


class OutputSection(Section):
    dir: Path = Path("runs")
    """The folder that holds the runs."""
    name: str | None = Field(default=None, pattern=r"^[^/\\:*?\"<>|.][^/\\:*?\"<>|]*$")
    """The run's name, and its folder's; null is the name of the run file."""
    formats: tuple[Literal["comfyui", "diffusers", "kohya"], ...] = Field(
        default=("comfyui",), min_length=1
    )
    """How exported LoRA files name things. `comfyui` is read by ComfyUI, diffusers, musubi-tuner
    and DiffSynth-Studio alike; `diffusers` by diffusers alone; `kohya`, as musubi-tuner writes it,
    by ComfyUI, diffusers and musubi-tuner."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of exported files. float32 is what was trained, to the bit; the others halve it."""


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
    """Version of this file's form; older ones are brought up to date when read."""
    model: ModelSection
    """The base model."""
    wan_config: WanTrainConfig = WanTrainConfig()
    """How video becomes training samples for Wan."""
    video_data: VideoDataSection = VideoDataSection()
    """The clips."""
    method: Annotated[LoraMethod, Field(default_factory=LoraMethod)]
    """What is trained."""
    optimizer: Annotated[AdamWOptimizer, Field(default_factory=AdamWOptimizer)]
    """How the weights move."""
    train: TrainSection = TrainSection()
    """The course of training."""
    sample: SampleSection = SampleSection()
    """Videos made along the way."""
    output: OutputSection = OutputSection()
    """Where results go and in which form."""
    memory: MemorySection = MemorySection()
    """What is traded for memory."""
    logging: LoggingSection = LoggingSection()
    """What is recorded beside the run's own files."""

    @model_validator(mode="after")
    def _sample_interval_has_prompts(self) -> RunConfig:
        if self.sample.every and not self.sample.prompts:
            raise ValueError(
                f"sample.every: is {self.sample.every}, but sample.prompts is empty; "
                "give a prompt, or set sample.every to 0"
            )
        return self
