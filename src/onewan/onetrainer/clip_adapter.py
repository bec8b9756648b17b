"""Files of OneTrainer's concepts -> clips -> pixels, the way `onewan` reads them.

OneTrainer's own video loader ignores the frame rate, drops the first frame and repeats the last one
of short clips; here frames are 1/fps apart by their timestamps, their number is 4n+1, and a file
that can't be read is skipped with a reason.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onewan.data.clip import Clip, ClipPlanner, ClipSource
from onewan.data.clip_notes import clip_notes
from onewan.data.companions import clip_stem, role_of
from onewan.data.encode import ENCODING_VERSION
from onewan.data.masks import MASK_VERSION, pixel_mask
from onewan.data.sources.item import SourceItem
from onewan.errors import DataError
from onewan.files import append_lines
from onewan.media import Fit, extension, read_frames
from onewan.model.conditioning import Conditioning, ConditionPart, ConditionPixels
from onewan.model.wan import WanModel
from onewan.onetrainer import settings
from onewan.variants import Variant


@dataclass(frozen=True, slots=True)
class ConceptPlanner:
    """Plans the clips of a config's concepts."""

    config: Any
    variant: Variant

    def plan(self, path: str, concept: Mapping[str, Any]) -> tuple[Clip, list[str]]:
        """The clip of the file `path` of `concept`, and warnings about it; DataError if it can't be
        used."""
        image = concept["image"]
        override = image["enable_resolution_override"]
        planner = ClipPlanner(
            seed=settings.SEED,
            fps=float(self.config.wan_target_fps or self.variant.fps),
            max_frames=settings.frames_of(self.config),
            max_duration=self.config.wan_max_duration,
            frame_strategy=self.config.wan_frame_strategy,
            min_resolution=settings.min_resolution_of(self.config),
            max_resolution=settings.max_resolution_of(self.config),
            video_formats=settings.formats_of(self.config),
            resolutions=settings.resolutions_of(
                image["resolution_override"] if override else self.config.resolution,
                self.config.aspect_ratio_bucketing,
                self.variant.size_multiple,
            ),
            size_multiple=self.variant.size_multiple,
            temporal_compression=self.variant.temporal_compression,
        )
        file = Path(path)
        masks = mask_candidates(file) if self.config.masked_training else []
        item = SourceItem(path=file, name=file.name, masks=tuple(masks))
        try:
            # One, since each strategy that OneTrainer offers takes one span.
            (clip,) = planner.plan(item, ClipSource(path=file.parent), ("",))
        except DataError as error:
            raise DataError(settings.with_onetrainers_names(str(error))) from error
        return clip, [
            settings.with_onetrainers_names(note.text) for note in clip_notes(planner, [clip])
        ]


def mask_candidates(path: Path) -> list[Path]:
    """The files beside a clip that could be its mask."""
    label = f"{path.stem}{settings.MASK_LABEL}"
    return [
        file
        for file in sorted(path.parent.glob("*"))
        if (role_of(file) == "mask" and clip_stem(file).name == path.stem)
        or (file.stem == label and extension(file) != "txt")
    ]


def crop_of(clip: Clip, draw: random.Random | None) -> Fit:
    """How a clip is cropped: around its center, or at a random position from `draw`."""
    across, down = (0.5, 0.5) if draw is None else (draw.random(), draw.random())
    return Fit(*clip.size, across=across, down=down)


def read_pixels(clip: Clip, fit: Fit) -> Tensor:
    """[3, F, H, W] float32 from 0 to 1; DataError for a damaged file."""
    frames = read_frames(clip.path, clip.times(), fit)
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 255


def mask_of(clip: Clip, fit: Fit) -> Tensor:
    """[1, F, H, W] float32 from 0 to 1: the loss mask; ones for a clip without one."""
    if clip.mask is None:
        return torch.ones(1, clip.frames, fit.height, fit.width)
    values: np.ndarray = pixel_mask(clip.mask, fps=clip.fps, frames=clip.frames, fit=fit)
    return torch.from_numpy(values)


def latent_mask_of(mask_CFHW: Tensor, variant: Variant) -> Tensor:
    """[1, F', h, w]: the mean over the pixels and frames of each latent position
    (`onewan.data.masks.latent_mask`)."""
    spatial, temporal = variant.spatial_compression, variant.temporal_compression
    small = torch.nn.functional.avg_pool2d(mask_CFHW.float(), spatial)
    first, rest = small[:, :1], small[:, 1:]
    if rest.shape[1]:
        rest = rest.unflatten(1, (-1, temporal)).mean(dim=2)
    return torch.cat([first, rest], dim=1)


def condition_parts(conditioning: Conditioning) -> tuple[ConditionPart, ...]:
    """The parts of conditions that are cached: the same for all items, since OneTrainer's cache has
    the same tensors of each; so those of videos for images too."""
    return conditioning.all_parts(frames=2)


def encode_pixels(
    model: WanModel, pixels_CFHW: Tensor, conditioning: Conditioning
) -> dict[str, Tensor]:
    """``latent_image`` and the parts of `conditioning`, such as ``latent_condition``:
    [C, F', h, w], float32, on the CPU.

    Equal to what `onewan.data.encode.encode_frames` returns for the same frames.
    """
    assert model.vae is not None
    # Rounded to the file's 256 values, as onewan's own pixels are; color changes leave others.
    pixels = (pixels_CFHW * 255).round().clamp(0, 255).to(model.vae.device)[None] / 127.5 - 1
    found = {"image": model.encode_video(pixels)}
    given = ConditionPixels(shape=pixels.shape, image=pixels[:, :, 0], last=pixels[:, :, -1])
    for part in condition_parts(conditioning):
        found[part] = model.encode_part(part, given)
    return {f"latent_{name}": tensor[0].cpu() for name, tensor in found.items()}


def cache_digest(kind: str, concepts: Iterable[Mapping[str, Any]], inputs: Sequence[object]) -> str:
    """A digest of everything that determines the cache: `inputs`, and the concepts' files with
    their sizes and times. `kind` "text" includes caption files, "image" media and masks only.

    OneTrainer keys its cache by the concept's settings alone, and finds entries by their index in
    the list of files. With the digest in the folder's name, a cache of other files, of another size
    or of another model is never used.
    """
    digest = hashlib.sha256(
        json.dumps([ENCODING_VERSION, MASK_VERSION, *map(str, inputs)]).encode()
    )
    for concept in concepts:
        folder = Path(concept["path"])
        if not concept["enabled"] or not folder.is_dir():
            continue
        named = concept["text"].get("prompt_path") or ""
        extra = [Path(named)] if kind == "text" and named and Path(named).is_file() else []
        for file in [*sorted(folder.rglob("*")), *extra]:
            if not file.is_file() or (kind == "image" and extension(file) == "txt"):
                continue
            stat = file.stat()
            # Contents are not read: folders of videos are large, and editing changes the time.
            line = f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


class DecodeCheckCache:
    """Results of decoding clips completely, so that each is checked once and not at every start.

    Stored in a file of JSON arrays (key, reason or null), one per line; the key is the clip's path,
    size and time, and the span that is taken of it. Processes only append, so that several can
    share the file; a damaged line only means that one clip is checked again.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, str | None] = {}
        self._new_lines: list[str] = []
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):
                key, reason = json.loads(line)
                self._known[str(key)] = None if reason is None else str(reason)

    def check(self, clip: Clip) -> None:
        """DataError if the clip, or its mask, does not decode."""
        stat = clip.path.stat()
        span = (clip.start, clip.fps, clip.frames, clip.size, clip.mask and str(clip.mask.path))
        key = repr((str(clip.path), stat.st_size, stat.st_mtime_ns, ENCODING_VERSION, span))
        if key not in self._known:
            fit = crop_of(clip, None)
            self._known[key] = None
            try:
                read_frames(clip.path, clip.times(), fit)
                mask_of(clip, fit)
            except DataError as error:
                self._known[key] = str(error)
            self._new_lines.append(json.dumps([key, self._known[key]]))
        if (reason := self._known[key]) is not None:
            raise DataError(reason)

    def save(self) -> None:
        """Append the results that are new since the file was read."""
        if self._new_lines:
            append_lines(self._file, self._new_lines)
            self._new_lines.clear()
