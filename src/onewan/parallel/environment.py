"""What torchrun's environment says of this process and of those beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping


def is_started_by_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several, or of one, that torchrun has started."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def is_first_process(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process writes what people read: the only one, or torchrun's first."""
    return not is_started_by_torchrun(environment) or environment["RANK"] == "0"


def local_count(environment: Mapping[str, str] = os.environ) -> int:
    """The number of processes of the run on this machine, which share its cores
    and its host memory."""
    return int(environment.get("LOCAL_WORLD_SIZE", "1"))
