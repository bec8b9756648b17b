"""`Pass`: what the blocks of a transformer are used for."""

from __future__ import annotations

from enum import Enum


class Pass(Enum):
    """What the blocks are used for, which decides the block that is needed next."""

    TRAIN_FORWARD = "forward"
    """From the first block to the last; the backward pass follows."""
    BACKWARD = "backward"
    """From the last block to the first; a forward pass follows."""
    INFERENCE = "inference"
    """From the first block to the last; another pass from the first one follows."""
