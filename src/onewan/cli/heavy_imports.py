"""How the commands import torch, diffusers and transformers, which takes seconds."""

from __future__ import annotations

import gc
import sys
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def heavy_imports() -> Generator[None]:
    """The block imports torch, diffusers and transformers, the first time in this process.

    The garbage collector is off inside. It would look through the million objects of these packages
    again and again, a sixth of the time, and find nothing: modules, classes and functions live as
    long as the process. For the same reason it ignores these objects afterwards. Their progress
    bars for loading are off, since they would interleave with onewan's own.
    """
    pauses = "torch" not in sys.modules and gc.isenabled()
    if pauses:
        gc.disable()
    try:
        yield

        import diffusers
        import transformers

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    finally:
        if pauses:
            gc.freeze()
            gc.enable()
