"""What the model is asked about a clip: a template for each purpose, or the user's own text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

TemplateName = Literal["general", "character", "style", "motion"]

TEMPLATE_NAMES: tuple[TemplateName, ...] = get_args(TemplateName)

_MATERIAL, _TRIGGER_WORD = "{material}", "{trigger_word}"

_ANSWER = (
    "Say only what can be seen. Answer with the caption alone: one paragraph of 30 to 120 words in "
    "English, without a heading, a list or quotation marks."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """The text of a request. `{material}` stands for what is shown, such as "8 frames of a video
    of 5.1 seconds, in their order", and `{trigger_word}` for the trigger word."""

    text: str
    trigger: str = ""
    """What is added behind `text` where there is a trigger word."""

    def request(self, material: str, trigger_word: str) -> str:
        """The text about `material`; `trigger_word` is empty if there is none."""
        parts = [self.text, self.trigger] if trigger_word and self.trigger else [self.text]
        filled = " ".join(parts).replace(_MATERIAL, material)
        return filled.replace(_TRIGGER_WORD, trigger_word)

    @property
    def needs_trigger_word(self) -> bool:
        """Whether the text makes no sense without a trigger word."""
        return _TRIGGER_WORD in self.text


# What should not be learned is described; what all clips have in common beyond their captions is
# learned with the trigger word (docs/recipes.md).
TEMPLATES: Mapping[TemplateName, Template] = {
    "general": Template(
        text="You see {material}. Write a caption with which a text-to-video model is trained. "
        "Describe who or what is to be seen, what happens from the beginning to the end, the "
        "place, the light, and how the camera moves, or that it stands still. " + _ANSWER,
        trigger="The main subject is called {trigger_word}; use that name for it.",
    ),
    "character": Template(
        text="You see {material}. Write a caption with which a text-to-video model is trained to "
        "show this character. Describe what may change: what the character does, pose, facial "
        "expression, clothes, the place, the light, and how the camera moves, or that it stands "
        "still. Leave out what always belongs to the character, such as the face, the eyes, the "
        "hair, the age and the build. " + _ANSWER,
        trigger="The character is called {trigger_word}; use that name, and no other words for who "
        "it is.",
    ),
    "style": Template(
        text="You see {material}. Write a caption with which a text-to-video model is trained to "
        "show this style. Describe all that is to be seen: subjects, what they do, the place, the "
        "time of day, and how the camera moves, or that it stands still. Say nothing of the style: "
        "neither the medium and technique nor the artist, the colors as a whole or the mood. "
        + _ANSWER,
        trigger="Begin the caption with {trigger_word} and a comma.",
    ),
    "motion": Template(
        text="You see {material}. Write a caption with which a text-to-video model is trained to "
        "show this motion or movement of the camera. Describe in detail who or what is to be seen, "
        "what they look like, the place and the light. Name the motion itself only once, in a few "
        "plain words, without its details. " + _ANSWER,
        trigger="Begin the caption with {trigger_word} and a comma: that stands for the motion.",
    ),
}


def material(frames: int, seconds: float) -> str:
    """What is shown, for `{material}`: `frames` pictures from a video of so many seconds; 0 seconds
    is an image."""
    if not seconds:
        return "an image"
    if frames == 1:
        return f"the middle frame of a video of {seconds:.1f} seconds"
    return f"{frames} frames of a video of {seconds:.1f} seconds, in their order"
