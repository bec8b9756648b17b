"""Values to start from by what is to be learned: what people who trained Wan report, as data.

`onewan init --purpose` writes them into a run file, and docs/recipes.md has them as a table. Each
value is one that a source of its row gives, or lies in the range that its sources give. They are
experience of others with other trainers, not measurements of onewan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from onewan.arithmetic.buckets import floor_to_4n_plus_1

PurposeName = Literal["character", "style", "motion", "photos"]

PURPOSES: tuple[PurposeName, ...] = get_args(PurposeName)

TRIGGER_WORD = "ohwx"
"""A word that means nothing to the model, which stands for what is learned."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a recipe's values come from."""

    name: str
    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Values to start from for one purpose."""

    title: str
    """What is learned, behind "a LoRA of"; "" for no particular purpose."""
    material: str
    """Number and kind of clips."""
    seconds: float
    """Length of a training clip; 0 for photos."""
    side: int
    """Side of the square with the area of a training clip, pixels."""
    shortens_last: bool = False
    """Whether a small device gets smaller clips before shorter ones: what is learned needs their
    length."""
    steps: int
    """Optimizer steps of each expert."""
    rank: int
    lr: str = "1e-4"
    """Learning rate of adapters, as it is written in a run file."""
    high_lr: str | None = None
    """That of the high-noise expert, where it differs."""
    captions: str
    """What the captions should say."""
    prompt: str
    """A prompt for sample videos, with `TRIGGER_WORD`."""
    initial_text: str
    """Words for what is learned, from which an embedding starts."""
    sources: tuple[Source, ...]

    def frames(self, fps: int) -> int:
        """Frames of a training clip at `fps`, 4n+1."""
        return floor_to_4n_plus_1(round(self.seconds * fps) + 1)


_AI_TOOLKIT = Source(
    "ai-toolkit, example for Wan 2.2 14B on 24 GB",
    "https://github.com/ostris/ai-toolkit/blob/main/config/examples/train_lora_wan22_14b_24gb.yaml",
)
_AI_TOOLKIT_GUIDE = Source(
    "a guide to ai-toolkit",
    "https://github.com/artokun/comfyui-mcp/blob/main/plugin/skills/ai-toolkit-trainer/SKILL.md",
)
_DIFFUSION_PIPE_DATA = Source(
    "diffusion-pipe, example of a data set",
    "https://github.com/tdrussell/diffusion-pipe/blob/main/examples/dataset.toml",
)
_MUSUBI_ADVICE = Source(
    "musubi-tuner issue 275", "https://github.com/kohya-ss/musubi-tuner/issues/275"
)
_MUSUBI_DISCUSSION = Source(
    "musubi-tuner discussion 455", "https://github.com/kohya-ss/musubi-tuner/discussions/455"
)

RECIPES: Mapping[PurposeName, Recipe] = {
    "character": Recipe(
        title="a character",
        material="15 to 40 clips of 2 to 5 seconds, varied in pose, clothes, place, light and "
        "distance; photos may be among them",
        seconds=2.0,
        side=512,
        steps=1500,
        rank=16,
        captions="Describe what may change: pose, expression, clothes, place, light, camera. Leave "
        "out what belongs to the character itself, such as the face and the hair, so that the "
        "trigger word stands for it.",
        prompt=f"{TRIGGER_WORD} walks along a beach at sunset, waves roll in, the camera follows",
        initial_text="a person",
        sources=(_AI_TOOLKIT, _AI_TOOLKIT_GUIDE, _MUSUBI_DISCUSSION, _DIFFUSION_PIPE_DATA),
    ),
    "style": Recipe(
        title="a style",
        material="50 clips of 2 to 5 seconds or more, with many subjects in the same style; photos "
        "may be among them",
        seconds=2.0,
        side=512,
        steps=2000,
        rank=32,
        captions="Describe all that is to be seen: subjects, what they do, place, light. Say "
        "nothing of the style, so that the trigger word stands for it.",
        prompt=f"{TRIGGER_WORD}, a woman rides a bicycle through a market street in the rain",
        initial_text="a style",
        sources=(
            _AI_TOOLKIT,
            _AI_TOOLKIT_GUIDE,
            _DIFFUSION_PIPE_DATA,
            Source("a style from 240 clips and 120 images", "https://civitai.com/models/1404755"),
        ),
    ),
    "motion": Recipe(
        title="a motion",
        material="20 to 50 clips of up to 5 seconds, each with the whole motion from its beginning "
        "to its end, by different subjects in different places",
        seconds=5.0,
        side=384,
        shortens_last=True,
        steps=1500,
        rank=32,
        captions="Describe the motion or the movement of the camera in the same words each time, "
        "behind the trigger word, and who does it and where in words of their own.",
        prompt=f"{TRIGGER_WORD}, a man in a red jacket on a bridge, seen from the side",
        initial_text="a movement",
        sources=(
            _AI_TOOLKIT,
            _MUSUBI_ADVICE,
            Source("musubi-tuner issue 621", "https://github.com/kohya-ss/musubi-tuner/issues/621"),
            Source("musubi-tuner issue 170", "https://github.com/kohya-ss/musubi-tuner/issues/170"),
            Source(
                "diffusion-pipe issue 131", "https://github.com/tdrussell/diffusion-pipe/issues/131"
            ),
        ),
    ),
    "photos": Recipe(
        title="a subject in photos",
        material="20 to 50 photos, varied in pose, clothes, place, light and distance",
        seconds=0.0,
        side=768,
        steps=2000,
        rank=16,
        high_lr="3e-5",
        captions="Describe what may change: pose, expression, clothes, place, light, camera. Leave "
        "out what belongs to the subject itself, so that the trigger word stands for it.",
        prompt=f"{TRIGGER_WORD} walks along a beach at sunset, waves roll in, the camera follows",
        initial_text="a person",
        sources=(
            _AI_TOOLKIT,
            _AI_TOOLKIT_GUIDE,
            _MUSUBI_DISCUSSION,
            Source(
                "diffusion-pipe issue 372", "https://github.com/tdrussell/diffusion-pipe/issues/372"
            ),
        ),
    ),
}
