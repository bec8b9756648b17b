"""`Conditions`: what a model is given of a clip besides its caption, where that is a choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onewan.data.companions import Companion

ConditionChoice = Literal["first_frame", "random_frame"]
"""Which frame of a clip is its condition image if no file is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """The condition image and the control video of a clip; by default its first frame and none."""

    frame: int = 0
    """Index of the clip's own frame that is the condition image, if `image` is None."""
    image: Companion | None = None
    """The file that is the condition image."""
    control: Companion | None = None
    """The control video, with frames at the same instants as the clip's; None if it has none."""
    as_reference: bool = False
    """Whether the condition image is a reference image, and not what the sample starts from: that
    is the clip's first frame then (Fun-Control)."""

    @property
    def has_own_image(self) -> bool:
        """Whether the condition image is another one than the frame that a sample starts from."""
        return self.image is not None or self.frame != 0 or self.as_reference

    @property
    def starts_elsewhere(self) -> bool:
        """Whether samples start from another image than the clip's first frame."""
        return self.has_own_image and not self.as_reference

    @property
    def companions(self) -> tuple[Companion, ...]:
        """The files that these conditions are read from, besides the clip's own."""
        return tuple(each for each in (self.image, self.control) if each is not None)


FIRST_FRAME = Conditions()
"""The default conditions: the first frame as the condition image, and no control video."""
