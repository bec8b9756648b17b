"""How onewan, a bare loop and other trainers read the same files and run the same VAE.

Each function here calls a trainer's own code from a checkout, which must be on `sys.path`; nothing
of it is copied. `benchmarks/peers_data.py` runs each in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from decode import bare
from torch import Tensor

from onewan.media import Fit, probe, read_frames
from onewan.media.kinds import SWS_SCALING

FPS = 16
Place = Literal["head", "middle"]


@dataclass(frozen=True, slots=True)
class Request:
    """Some frames of a video at `FPS`."""

    path: Path
    frames: int
    place: Place
    """From the video's beginning or its middle on."""
    size: tuple[int, int]
    """(width, height)"""
    source_fps: float
    """The rate of the file, for trainers that have it typed in."""

    def times(self) -> list[float]:
        info = probe(self.path)
        span = (self.frames - 1) / FPS
        start = info.start if self.place == "head" else (info.start + info.last - span) / 2
        return [start + k / FPS for k in range(self.frames)]


Reader = Callable[[Request], np.ndarray]
"""Frames of a request, uint8 [F, H, W, 3]."""


def onewan(request: Request) -> np.ndarray:
    return read_frames(request.path, request.times(), Fit(*request.size))


def bare_pyav(request: Request) -> np.ndarray:
    """The shortest correct loop with the same filter, as PyAV's documentation would have it."""
    info = probe(request.path)
    cover = Fit(*request.size).cover(info.width, info.height)
    rows = slice(cover.top, cover.top + request.size[1])
    columns = slice(cover.left, cover.left + request.size[0])

    def rgb(frame: Any) -> np.ndarray:
        pixels = frame.to_ndarray(
            format="rgb24", width=cover.width, height=cover.height, interpolation=SWS_SCALING
        )
        return pixels[rows, columns]

    return bare(request.path, request.times(), rgb)


def musubi(request: Request, *, extraction: str, rate_given: bool) -> np.ndarray:
    """What musubi-tuner's `cache_latents` would encode; of "uniform" the middle one of three."""
    from musubi_tuner.dataset.image_video_dataset import VideoDataset  # pyright: ignore

    dataset = VideoDataset(
        resolution=request.size,
        caption_extension=".txt",
        batch_size=1,
        num_repeats=1,
        enable_bucket=True,
        bucket_no_upscale=False,
        frame_extraction=extraction,
        frame_sample=3,
        target_frames=[request.frames],
        source_fps=request.source_fps if rate_given else None,
        video_directory=str(request.path.parent),
        architecture="wan",
    )
    batches = [batch for _, batch in dataset.retrieve_latent_cache_batches(num_workers=1)]
    items = [item for batch in batches for item in batch]
    return items[len(items) // 2].content


def diffusion_pipe(request: Request) -> np.ndarray:
    import utils.common  # pyright: ignore  # noqa: F401  (first, as its train.py does)
    from models.base import PreprocessMediaFile  # pyright: ignore

    mode = "single_middle" if request.place == "middle" else "single_beginning"
    preprocess = PreprocessMediaFile({"video_clip_mode": mode}, support_video=True, framerate=FPS)
    spec, bucket = (None, request.path), (*request.size, request.frames)
    ((video, _, _),) = preprocess(spec, None, bucket)
    return (video.permute(1, 2, 3, 0).numpy() * 255).round().astype(np.uint8)


def diffsynth(request: Request, *, fixed_rate: bool) -> np.ndarray:
    """`fixed_rate` is an option of its Python interface that its command line does not have."""
    from diffsynth.core.data.unified_dataset import UnifiedDataset  # pyright: ignore

    width, height = request.size
    operator = UnifiedDataset.default_video_operator(
        width=width,
        height=height,
        num_frames=request.frames,
        frame_rate=FPS,
        fix_frame_rate=fixed_rate,
    )
    return np.stack([np.asarray(frame) for frame in operator(str(request.path))])


# --- The VAE -------------------------------------------------------------------------------------

Encoder = Callable[[Tensor], Tensor]
"""Latents of pixels [1, 3, F, H, W] from -1 to 1, by a VAE with random weights."""


def onewan_vae(dtype: torch.dtype) -> Encoder:
    from diffusers import AutoencoderKLWan

    from onewan.model.vae import encode_video

    vae = AutoencoderKLWan()

    def encode(pixels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return encode_video(vae, pixels)

    return encode


def musubi_vae(dtype: torch.dtype) -> Encoder:
    from musubi_tuner.wan.modules.vae import WanVAE_  # pyright: ignore

    return _official_vae(WanVAE_, dtype)


def diffusion_pipe_vae(dtype: torch.dtype) -> Encoder:
    from models.wan.vae2_1 import WanVAE_  # pyright: ignore

    return _official_vae(WanVAE_, dtype)


def diffsynth_vae(dtype: torch.dtype) -> Encoder:
    from diffsynth.models.wan_video_vae import VideoVAE_  # pyright: ignore

    return _official_vae(VideoVAE_, dtype)


def _official_vae(build: Callable[..., Any], dtype: torch.dtype) -> Encoder:
    """The class of Wan's own code, of which the trainers have a version each."""
    vae = build(
        dim=96,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        dropout=0.0,
    )
    vae = vae.eval().requires_grad_(False).to(dtype)
    scale = [torch.zeros(16, dtype=dtype), torch.ones(16, dtype=dtype)]
    return lambda pixels: vae.encode(pixels.to(dtype), scale)
