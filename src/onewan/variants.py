"""The facts of each Wan 2.2 variant, in one frozen table without torch.

Sources: the official repository (Wan-Video/Wan2.2 at 42bf4cf, ``wan/configs``) and the
configurations that diffusers' converter writes; for Wan2.2-Fun, VideoX-Fun (aigc-apps/VideoX-Fun at
804a425, ``config/wan2.2/wan_civitai_i2v.yaml`` and ``examples/wan2.2_fun``). A test compares every
value with them. Trainers
that spread these facts over flags, user interfaces or subclasses got the boundary and the order of
the experts wrong, hence one table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal

from onewan.errors import CheckpointError

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"  # noqa: RUF001
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"  # noqa: RUF001
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)
"""The official negative prompt (``wan/configs/shared_config.py``), used if the user gives none."""

TEXT_LENGTH = 512
"""Text tokens that the transformer attends to. Shorter prompts are padded with zero vectors."""

TEXT_WIDTH = 4096
"""Width of the text encoder's output, which every Wan transformer takes (``text_dim``)."""

TIME_FREQUENCIES = 256
"""Sinusoidal features of the timestep, from which the time embedding starts (``freq_dim``)."""

NUM_TRAIN_TIMESTEPS = 1000
"""The transformer's timestep input is this times the noise level t in [0, 1]."""

PATCH_SIZE = (1, 2, 2)
"""Latent cells (frames, rows, columns) that one token of every Wan transformer covers."""

# fmt: off
TI2V_5B_LATENTS_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
TI2V_5B_LATENTS_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on
"""Mean and standard deviation of the 48 latent channels of the Wan 2.2 VAE
(``wan/modules/vae2_2.py``), by which latents are normalized. Those of the Wan 2.1 VAE, which the
A14B variants use, are diffusers' defaults."""

VariantName = Literal["t2v-a14b", "i2v-a14b", "ti2v-5b", "fun-inp-a14b", "fun-control-a14b"]
ExpertName = Literal["high", "low", "single"]
ConditionName = Literal[
    "text", "first_frame_channels", "first_frame_clean", "fun_inp_channels", "fun_control_channels"
]
PipelineName = Literal["WanPipeline", "WanImageToVideoPipeline"]


class ModelType(Enum):
    """The model types that onewan trains, with the methods of OneTrainer's enum of this name."""

    WAN_2_2 = "WAN_2_2"

    def is_wan(self) -> bool:
        return self is ModelType.WAN_2_2

    def is_video_model(self) -> bool:
        return self.is_wan()

    def is_flow_matching(self) -> bool:
        return self.is_wan()


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """One transformer of a variant and the range of noise levels that it serves."""

    name: ExpertName
    component: Literal["transformer", "transformer_2"]
    """Its folder in the diffusers layout, and its field in `WanModel`."""
    t_min: float
    """Lowest noise level it serves (inclusive), in [0, 1], after shift."""
    t_max: float
    """Highest noise level it serves (exclusive, except for 1.0), in [0, 1], after shift."""
    guidance_scale: float
    """The official guidance scale while this expert serves."""
    file_suffix: str
    """Suffix of the names of this expert's weight files, as users of ComfyUI expect it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One Wan 2.2 checkpoint family."""

    name: VariantName
    title: str
    repository: str
    """The official diffusers repository on the hub."""
    condition: ConditionName
    """Which row of `onewan.model.conditioning` builds the transformer's inputs besides the text.

    ``first_frame_channels``: mask and image latents behind the noisy channels (I2V-A14B).
    ``first_frame_clean``: the first latent frame itself may be clean, at timestep 0 (TI2V-5B).
    ``fun_inp_channels``: as in I2V-A14B, and zeros without an image (Fun-InP).
    ``fun_control_channels``: the same behind the latents of a control video (Fun-Control).
    """
    takes_image: bool
    """Whether a sampled video may start from an image."""
    needs_image: bool
    """Whether it must."""
    first_frame_share: float
    """Share of the training samples that are given the first frame of their clip alone, by default.
    For TI2V-5B that of ``wan/utils/utils.py:172-199``."""
    takes_condition_image: bool
    """Whether the image that a sample starts from is an input of its own, so that in training it
    may be another one than the clip's first frame."""
    takes_control: bool
    """Whether the transformer is given a control video."""
    has_clean_first_frame: bool
    """Whether the first latent frame may be the conditioning frame, whose tokens get timestep 0
    (``expand_timesteps`` in diffusers)."""
    pipeline: PipelineName
    """The diffusers pipeline that the official repository names in its model_index.json."""
    experts: tuple[Expert, ...]
    boundary: float | None
    """Noise level at and above which the high-noise expert serves; None with one expert."""
    in_channels: int
    """Input channels of the transformer: the latents', then those of the condition."""
    latent_channels: int
    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    ffn_dim: int
    temporal_compression: int
    spatial_compression: int
    flow_shift: float
    """The official shift of the noise schedule. The files on the hub say 3.0 for A14B; inference
    with the official code uses 12 (T2V) and 5 (I2V)."""
    sampling_steps: int
    fps: int
    frames: int
    """Frames of an official sample."""
    sample_size: tuple[int, int]
    """(width, height) of an official sample."""
    training_area: int
    """Pixels (width times height) of the default training size, the 480p class."""
    reference_channels: int | None = None
    """Latent channels of the reference image that the transformer's `ref_conv` embeds; None if
    there is no such layer. It is what a clip's condition image is then, instead of the image that
    the sample starts from."""
    both_frames_share: float = 0.0
    """Share of the training samples that are given the first and the last frame, by default; what
    is left is given none."""

    @property
    def condition_channels(self) -> int:
        """Input channels behind the noisy latents: 20 for I2V-A14B and Fun-InP, 36 for Fun-Control,
        otherwise 0."""
        return self.in_channels - self.latent_channels

    @property
    def transformer_config(self) -> dict[str, int | None]:
        """The settings of diffusers' transformer that are not its defaults, and
        `reference_channels`."""
        return {
            "num_attention_heads": self.num_attention_heads,
            "attention_head_dim": self.attention_head_dim,
            "in_channels": self.in_channels,
            "out_channels": self.latent_channels,
            "text_dim": TEXT_WIDTH,
            "ffn_dim": self.ffn_dim,
            "num_layers": self.num_layers,
            "reference_channels": self.reference_channels,
        }

    @property
    def reference_frames(self) -> int:
        """Frames of tokens that the transformer has before those of the clip: 1 for Fun-Control,
        whether it is given a reference image or not, otherwise 0."""
        return 0 if self.reference_channels is None else 1

    @property
    def encoded_videos(self) -> int:
        """Videos that the VAE encodes for a clip: the clip, and what its condition consists of."""
        return 1 + self.condition_channels // self.latent_channels

    @property
    def size_multiple(self) -> int:
        """Sides of a video are multiples of this: the VAE's compression times the patch size."""
        return self.spatial_compression * PATCH_SIZE[-1]

    @property
    def named_areas(self) -> dict[str, int]:
        """Pixels of the official classes of sizes, by the names that a run file may use."""
        width, height = self.sample_size
        return {"480p": self.training_area} | dict.fromkeys(("720p", f"{height}p"), width * height)

    def expert(self, name: ExpertName) -> Expert:
        for expert in self.experts:
            if expert.name == name:
                return expert
        have = ", ".join(e.name for e in self.experts)
        raise KeyError(f"{self.name} has no expert {name!r}, only: {have}")

    def with_boundary(self, boundary: float | None) -> Variant:
        """A copy with another boundary between its experts; itself with None or one expert."""
        if boundary is None or self.boundary is None:
            return self
        high, low = self.experts
        experts = replace(high, t_min=boundary), replace(low, t_max=boundary)
        return replace(self, boundary=boundary, experts=experts)

    def selected(self, choice: Literal["both", "high", "low"]) -> tuple[Expert, ...]:
        """The experts that `model.experts` chooses: all for "both", otherwise the named one."""
        return self.experts if choice == "both" else (self.expert(choice),)


def _two_experts(
    boundary: float, guidance_high: float, guidance_low: float
) -> tuple[Expert, Expert]:
    # Official tuples are (low, high); diffusers' `transformer` is the high-noise expert
    # (scripts/convert_wan_to_diffusers.py:1171-1173).
    return (
        Expert(
            name="high",
            component="transformer",
            t_min=boundary,
            t_max=1.0,
            guidance_scale=guidance_high,
            file_suffix="_high_noise",
        ),
        Expert(
            name="low",
            component="transformer_2",
            t_min=0.0,
            t_max=boundary,
            guidance_scale=guidance_low,
            file_suffix="_low_noise",
        ),
    )


_OFFICIAL: Mapping[VariantName, Variant] = {
    "t2v-a14b": Variant(
        name="t2v-a14b",
        title="Wan 2.2 T2V-A14B",
        repository="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        condition="text",
        takes_image=False,
        needs_image=False,
        first_frame_share=0.0,
        takes_condition_image=False,
        takes_control=False,
        has_clean_first_frame=False,
        pipeline="WanPipeline",
        experts=_two_experts(0.875, guidance_high=4.0, guidance_low=3.0),
        boundary=0.875,
        in_channels=16,
        latent_channels=16,
        num_layers=40,
        num_attention_heads=40,
        attention_head_dim=128,
        ffn_dim=13824,
        temporal_compression=4,
        spatial_compression=8,
        flow_shift=12.0,
        sampling_steps=40,
        fps=16,
        frames=81,
        sample_size=(1280, 720),
        training_area=480 * 832,
    ),
    "i2v-a14b": Variant(
        name="i2v-a14b",
        title="Wan 2.2 I2V-A14B",
        repository="Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        condition="first_frame_channels",
        takes_image=True,
        needs_image=True,
        first_frame_share=1.0,
        takes_condition_image=True,
        takes_control=False,
        has_clean_first_frame=False,
        pipeline="WanImageToVideoPipeline",
        experts=_two_experts(0.9, guidance_high=3.5, guidance_low=3.5),
        boundary=0.9,
        in_channels=36,
        latent_channels=16,
        num_layers=40,
        num_attention_heads=40,
        attention_head_dim=128,
        ffn_dim=13824,
        temporal_compression=4,
        spatial_compression=8,
        flow_shift=5.0,
        sampling_steps=40,
        fps=16,
        frames=81,
        sample_size=(1280, 720),
        training_area=480 * 832,
    ),
    "ti2v-5b": Variant(
        name="ti2v-5b",
        title="Wan 2.2 TI2V-5B",
        repository="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        condition="first_frame_clean",
        takes_image=True,
        needs_image=False,
        first_frame_share=0.2,
        takes_condition_image=False,
        takes_control=False,
        has_clean_first_frame=True,
        pipeline="WanPipeline",
        experts=(
            Expert(
                name="single",
                component="transformer",
                t_min=0.0,
                t_max=1.0,
                guidance_scale=5.0,
                file_suffix="",
            ),
        ),
        boundary=None,
        in_channels=48,
        latent_channels=48,
        num_layers=30,
        num_attention_heads=24,
        attention_head_dim=128,
        ffn_dim=14336,
        temporal_compression=4,
        spatial_compression=16,
        flow_shift=5.0,
        sampling_steps=50,
        fps=24,
        frames=121,
        sample_size=(1280, 704),
        training_area=480 * 832,
    ),
}

_FUN_INP = replace(
    _OFFICIAL["i2v-a14b"],
    name="fun-inp-a14b",
    title="Wan 2.2 Fun-InP-A14B",
    repository="alibaba-pai/Wan2.2-Fun-A14B-InP",
    condition="fun_inp_channels",
    needs_image=False,
    # As good as equal, as in VideoX-Fun's training (``videox_fun/data/utils.py:22``, the masks 1 to
    # 3, which are all of them that stand for given frames).
    first_frame_share=0.4,
    both_frames_share=0.3,
    experts=_two_experts(0.9, guidance_high=6.0, guidance_low=6.0),
    sampling_steps=50,
)

VARIANTS: Mapping[VariantName, Variant] = {
    **_OFFICIAL,
    "fun-inp-a14b": _FUN_INP,
    "fun-control-a14b": replace(
        _FUN_INP,
        name="fun-control-a14b",
        title="Wan 2.2 Fun-Control-A14B",
        repository="alibaba-pai/Wan2.2-Fun-A14B-Control",
        condition="fun_control_channels",
        in_channels=52,
        takes_control=True,
        reference_channels=16,
    ),
}
"""All variants by name. Those of Wan2.2-Fun are I2V-A14B's transformers, trained further by
Alibaba PAI with other inputs."""


def same_inputs(one: Variant, other: Variant) -> bool:
    """Whether the transformers of both have the same input layers, so that only their users know
    which of the two a file is."""
    return (one.in_channels, one.reference_channels) == (
        other.in_channels,
        other.reference_channels,
    )


def titles_by_inputs(variant: Variant) -> str:
    """The titles of all variants that a transformer with the inputs of `variant` may be of:
    "Wan 2.2 I2V-A14B or Fun-InP-A14B"."""
    first, *others = (v.title for v in VARIANTS.values() if same_inputs(v, variant))
    return " or ".join([first, *(title.removeprefix("Wan 2.2 ") for title in others)])


def variant_of(transformer_config: Mapping[str, object], where: str) -> Variant:
    """The variant that a diffusers transformer configuration belongs to.

    `where` names the file in the CheckpointError. Decided by the input channels alone, so that
    small test models are recognized. That does not distinguish variants with equal channels: a Wan
    2.1 T2V transformer has those of T2V-A14B, and the loader recognizes it by the missing second
    expert. Fun-InP has those of I2V-A14B, which is the answer, so it has to be named by the user
    (`same_inputs`).
    """
    if transformer_config.get("image_dim") is not None:
        raise CheckpointError(
            f"{where}: image_dim is {transformer_config['image_dim']}, so this is a Wan 2.1 "
            "image-to-video transformer with a CLIP branch; give a Wan 2.2 model"
        )
    channels = transformer_config.get("in_channels")
    reference = transformer_config.get("reference_channels")
    for variant in VARIANTS.values():
        if (variant.in_channels, variant.reference_channels) == (channels, reference):
            return variant
    known = ", ".join(f"{v.in_channels} ({v.name})" for v in VARIANTS.values())
    raise CheckpointError(
        f"{where}: in_channels is {channels}, but Wan 2.2 has {known}; give a Wan 2.2 model"
    )
