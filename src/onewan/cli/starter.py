"""The run file that `onewan init` prints: a short commented text with values to start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onewan.variants import VARIANTS, VariantName

_STARTER = """\
# yaml-language-server: $schema=onewan.schema.json
# (completion and checks in your editor, after: onewan schema > onewan.schema.json)
#
# A LoRA for {title}. A field that is omitted has its default value.
# Encode the clips with `onewan cache`, then start with `onewan train`.
schema_version: 1

model:
  path: {repository}  # or a local folder in the diffusers or official layout
  # Each component can be a file of its own (vae and text_encoder too), from ComfyUI or GGUF:
{components}{text_encoder}  variant: {name}
{experts}
wan_config:
  max_frames: {frames}  # 4n+1; {frames} at {fps} fps are {seconds:.1f} s; fewer need less memory

video_data:
  sources:
    - path: clips  # contains fox.mp4 (or fox.png), its caption fox.txt, and so on{first_frame}
  supported_formats: [mp4, avi, mov, webm, mkv]
  max_duration: 6.0  # seconds; enough for max_frames
  # Sides are multiples of {multiple}. Default: each clip's own aspect ratio, at the area of 480p.
  {resolution}

method:
  kind: lora  # or dora, loha, lokr, oft; fine_tune; embedding
  rank: 32  # a higher rank can learn more, and needs more memory and disk space

optimizer:
  lr: 1e-4

train:
  steps: 2000{steps}
  save_every: 500

# validation: {{share: 0.1, every: 250}}  # measures the loss on a tenth of the clips, held out

sample:
  width: {width}  # the official {size} takes longer
  height: {height}
{samples}
{memory}
output:
  dir: runs  # the run's folder is runs/NAME, after the name of this file
"""

_COMPONENTS: Mapping[VariantName, tuple[str, ...]] = {
    "t2v-a14b": (
        "transformer: wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
        "transformer_2: wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
    ),
    "i2v-a14b": (
        "transformer: wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors",
        "transformer_2: wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors",
    ),
    "ti2v-5b": ("transformer: wan2.2_ti2v_5B_fp16.safetensors",),
}
"""Names of ComfyUI's repackaged files on the Hugging Face hub."""

_SAMPLES = """\
  every: 500
  prompts:
    - prompt: a red fox runs through fresh snow, the camera follows
{image}"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StarterValues:
    """What a starter file has for a device with a certain amount of memory."""

    vram: str
    """As the user wrote it."""
    frames: int
    resolution: int | None = None
    """Pixels of a frame; None is the default, the area of 480p."""
    weights: str = "as_stored"
    text_encoder: str | None = None
    sample_size: tuple[int, int] = (832, 480)


def starter(variant: VariantName, values: StarterValues | None = None) -> str:
    """A short commented run file with values worth starting with, for `onewan init`. `values` are
    those that depend on the device's memory; None: the official ones."""
    facts = VARIANTS[variant]
    values = values or StarterValues(vram="", frames=facts.frames)
    has_two_experts = len(facts.experts) == 2
    # For TI2V-5B an image is optional, so its line is commented out and the prompt is not.
    samples = _SAMPLES.format(image="      # image: first_frame.png  # starts the video from it")
    if not facts.takes_image:
        samples = _SAMPLES.format(image="").rstrip()
    elif facts.needs_image:
        # Commented out, since a run file that names a missing image can't be loaded.
        section = _SAMPLES.format(image="      image: first_frame.png")
        samples = "\n".join(
            ["  # Sample videos start from an image; put one beside this file, then uncomment."]
            + [f"  #{line[1:]}" for line in section.splitlines()]
        )
    first_frame = (
        "\n      # the conditioning image of a clip is its own first frame"
        if facts.needs_image
        else ""
    )
    return _STARTER.format(
        title=facts.title,
        repository=facts.repository,
        name=facts.name,
        components="".join(f"  # {c}\n" for c in _COMPONENTS[facts.name]),
        text_encoder=""
        if values.text_encoder is None
        else f"{_TEXT_ENCODER}  text_encoder: {values.text_encoder}\n",
        resolution='# resolution: ["832x480"]'
        if values.resolution is None
        else f"resolution: {values.resolution}",
        memory=_memory_section(values) if values.vram else "",
        width=values.sample_size[0],
        height=values.sample_size[1],
        experts="  experts: both  # or high (layout and motion), or low (detail)\n"
        if has_two_experts
        else "",
        frames=values.frames,
        fps=facts.fps,
        seconds=values.frames / facts.fps,
        first_frame=first_frame,
        multiple=facts.size_multiple,
        steps="  # for both experts together, half for each" if has_two_experts else "",
        size="x".join(map(str, facts.sample_size)),
        samples=samples,
    )


_TEXT_ENCODER = """\
  # In fp8 it fits on this device. It is in split_files/text_encoders of the Hugging Face repository
  # Comfy-Org/Wan_2.2_ComfyUI_Repackaged; put it beside this file.
"""


def _memory_section(values: StarterValues) -> str:
    weights = ""
    if values.weights != "as_stored":
        weights = f"  weights: {values.weights}  # of the frozen blocks, packed while loading\n"
    return (
        "\nmemory:  # `onewan plan` shows what a run needs, and how its blocks are streamed\n"
        f"  vram: {values.vram}\n{weights}"
    )
