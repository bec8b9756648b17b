"""Draws a few short captioned clips of moving shapes, in several containers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from onewan.media import write_video

SIZE = (320, 256)
_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scene:
    file: str
    fps: float
    shape: str
    color: tuple[int, int, int]
    background: tuple[int, int, int]
    caption: str


# Containers and frame rates differ, as in a folder of real clips, so that the demonstration
# resamples in time and crops.
_SCENES = (
    _Scene(
        file="red_square.mp4",
        fps=30,
        shape="square",
        color=(214, 48, 49),
        background=(24, 28, 40),
        caption="a red square moves slowly across a dark background",
    ),
    _Scene(
        file="blue_circle.webm",
        fps=24,
        shape="circle",
        color=(9, 132, 227),
        background=(245, 240, 225),
        caption="a small blue circle bounces up and down, the camera is still",
    ),
    _Scene(
        file="green_triangle.mov",
        fps=25,
        shape="triangle",
        color=(0, 184, 148),
        background=(60, 20, 60),
        caption="a green triangle turns around its centre while the light fades",
    ),
    _Scene(
        file="yellow_circle.mp4",
        fps=16,
        shape="circle",
        color=(253, 203, 110),
        background=(20, 60, 90),
        caption="a yellow circle crosses a blue field",
    ),
    _Scene(
        file="still_square.png",
        fps=1,
        shape="square",
        color=(250, 250, 250),
        background=(120, 60, 40),
        caption="a white square on a brown ground",
    ),
)


def write_clips(folder: Path) -> list[Path]:
    """Write the clips and their captions into `folder`; returns the media files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for scene in _SCENES:
        path = folder / scene.file
        if path.suffix == ".png":
            # A quarter of the way: at phase 0 the shape is close to the left side.
            Image.fromarray(_draw(scene, 0.25)).save(path)
        else:
            count = round(_SECONDS * scene.fps)
            frames = np.stack([_draw(scene, i / count) for i in range(count)])
            write_video(path, frames, scene.fps)
        path.with_suffix(".txt").write_text(f"{scene.caption}\n", encoding="utf-8")
        files.append(path)
    return files


def _draw(scene: _Scene, phase: float) -> np.ndarray:
    """Frame [H, W, 3], uint8 RGB, of a scene at `phase` in [0, 1) of its duration."""
    width, height = SIZE
    # The captions name these movements, so that text and video belong together.
    fade = 1 - 0.5 * phase if scene.shape == "triangle" else 1.0
    background = tuple(round(c * fade) for c in scene.background)
    image = Image.new("RGB", SIZE, background)
    draw = ImageDraw.Draw(image)
    x, y, r = width * (0.2 + 0.6 * phase), height / 2, height / 5
    if scene.shape == "circle":
        # |sin| has two arches in a period: the circle bounces twice.
        y = height * (0.75 - 0.5 * abs(math.sin(2 * math.pi * phase)))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=scene.color)
    else:
        # A corner at 45 degrees makes the sides of the square horizontal and vertical.
        is_square = scene.shape == "square"
        corners, angle = (4, math.pi / 4) if is_square else (3, 2 * math.pi * phase)
        if not is_square:
            x = width / 2
        angles = [angle + 2 * math.pi * k / corners for k in range(corners)]
        draw.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for a in angles], scene.color)
    return np.asarray(image)
