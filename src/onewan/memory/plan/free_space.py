"""Whether the disks have room for the files that a run writes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.config.schema import ResolvedRun
from onewan.files import total_bytes

CACHE = "cache of encoded clips"
"""Name of the cache's bytes in `Plan.disk`."""
ARCHIVES = "unpacked archives"
"""Name of the bytes of archives' members, which are in the cache's folder too."""


def free_bytes(folder: Path) -> int:
    """Bytes that are free on the disk of `folder`, which need not exist."""
    return shutil.disk_usage(_existing(folder)).free


def full_disks(config: ResolvedRun, disk: Mapping[str, int]) -> list[str]:
    """A line for each folder whose disk has less room than the run's files need there, by `disk`,
    the bytes of `Plan.disk`. What the folders hold already needs no further room."""
    of_cache = disk.get(CACHE, 0) + disk.get(ARCHIVES, 0)
    cache, output = config.video_data.cache_dir, config.output.dir / config.output.name
    needs = {
        "video_data.cache_dir": (cache, of_cache, "the cache takes"),
        "output.dir": (output, sum(disk.values()) - of_cache, "checkpoints and weights take"),
    }
    lines, taken = list[str](), dict[int, int]()
    for field, (folder, size, what) in needs.items():
        missing = max(0, size - (total_bytes(folder) if folder.is_dir() else 0))
        device = _existing(folder).stat().st_dev
        free = free_bytes(folder) - taken.get(device, 0)
        taken[device] = taken.get(device, 0) + missing
        if missing > free:
            lines.append(
                f"{field}: {what} {format_bytes(size)}, and {format_bytes(max(0, free))} are free "
                "on its disk; free some, or choose another folder"
            )
    return lines


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
