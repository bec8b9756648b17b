"""Scaling and cropping to a training size: the filter's values, place and shape of the crop."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from onewan.media import Fit, fit_image, probe, read_frames, read_image


def picture(width: int, height: int) -> np.ndarray:
    """Shapes of all sizes, of moderate colors: uint8 RGB [H, W, 3]."""
    rng = np.random.default_rng(1)
    layers = [
        np.array(
            Image.fromarray(
                rng.integers(70, 180, (-(-height // n), -(-width // n), 3), np.uint8)
            ).resize((width, height), Image.Resampling.BICUBIC)
        )
        for n in (3, 8, 40)
    ]
    return np.mean(layers, axis=0).round().astype(np.uint8)


def write_exactly(path: Path, pixels: np.ndarray, pixel_format: str = "yuv444p") -> None:
    """A video of one frame without losses but those of rounding, BT.709."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"qp": "0"})
        stream.height, stream.width = pixels.shape[:2]
        stream.pix_fmt = pixel_format
        stream.codec_context.colorspace = 1
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
            format=pixel_format, dst_colorspace=1, dst_color_range=1, interpolation=0x46002
        )
        frame.pts, frame.time_base = 0, Fraction(1, 16)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def scaled_exactly(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Pillow's Lanczos filter in 32-bit floating point."""
    channels = [
        Image.fromarray(channel.astype(np.float32)).resize(
            (width, height), Image.Resampling.LANCZOS
        )
        for channel in np.moveaxis(pixels, -1, 0)
    ]
    return np.clip(np.stack([np.array(channel) for channel in channels], axis=-1), 0, 255)


@pytest.mark.parametrize("size", [(192, 112), (240, 140), (480, 280), (720, 420), (96, 56)])
def test_frames_are_scaled_as_by_an_exact_lanczos_filter(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    write_exactly(tmp_path / "a.mp4", picture(480, 280))
    stored = read_frames(tmp_path / "a.mp4", [0.0])[0]
    found = read_frames(tmp_path / "a.mp4", [0.0], Fit(*size))[0]
    difference = found - scaled_exactly(stored, *size)
    assert np.abs(difference).mean() < 0.35  # rounding alone makes 0.25
    assert abs(difference.mean()) < 0.03
    assert np.abs(difference).max() < 4
    image = fit_image(stored, Fit(*size))
    assert np.abs(image - scaled_exactly(stored, *size)).max() < 1.5  # two passes, each rounded


@pytest.mark.parametrize("pixel_format", ["yuv444p", "yuv420p"])
@pytest.mark.parametrize(("across", "down"), [(0.5, 0.5), (0.0, 1.0), (0.3, 0.8)])
@pytest.mark.parametrize("size", [(64, 64), (96, 32), (300, 420)])
def test_video_and_image_are_cropped_alike(
    tmp_path: Path, size: tuple[int, int], across: float, down: float, pixel_format: str
) -> None:
    """A conditioning image or a mask lies over the frames to a hundredth of a pixel."""
    rows, columns = np.mgrid[0:140, 0:240]
    ramps = np.stack([60 + columns / 2, 60 + rows, np.full_like(rows, 128)], axis=-1)
    pixels = np.where(ramps > 120, ramps - 20, ramps).round().astype(np.uint8)
    write_exactly(tmp_path / "a.mp4", pixels, pixel_format)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    fit = Fit(*size, across=across, down=down)
    video = read_frames(tmp_path / "a.mp4", [0.0], fit)[0]
    image = read_image(tmp_path / "a.png", fit)
    assert video.shape == image.shape == (size[1], size[0], 3)
    # In the ramps, a level is two columns or one row of the source.
    assert np.abs(video.astype(float).mean((0, 1)) - image.mean((0, 1))).max() < 0.3


def test_a_size_is_covered_by_whole_pixels() -> None:
    cover = Fit(848, 480).cover(1280, 720)
    assert (cover.width, cover.height, cover.left, cover.top) == (853, 480, 2, 0)
    turned = Fit(480, 848, across=1.0, down=1.0).cover(720, 1280)
    assert (turned.width, turned.height, turned.left, turned.top) == (480, 853, 0, 5)
    wide = Fit(100, 100).cover(100, 100, pixel_aspect=2.0)
    assert (wide.width, wide.height, wide.left) == (200, 100, 50)
    same = Fit(33, 47).cover(33, 47)
    assert (same.width, same.height, same.left, same.top) == (33, 47, 0, 0)


def test_values_do_not_depend_on_the_processor(tmp_path: Path) -> None:
    """FFmpeg's code without SIMD gives the same bytes."""
    libraries = sorted(Path(av.__file__).parent.parent.glob("av.libs/libavutil*"))
    if not libraries:
        pytest.skip("only where PyAV's wheel has FFmpeg's libraries in av.libs")
    write_exactly(tmp_path / "a.mp4", picture(480, 280), "yuv420p")
    code = f"""
import ctypes, hashlib, sys
from onewan.media import Fit, read_frames
if sys.argv[1] == "plain":
    ctypes.CDLL({str(libraries[0])!r}).av_force_cpu_flags(0)
for size in (240, 140), (208, 120), (333, 301):
    print(hashlib.md5(read_frames({str(tmp_path / "a.mp4")!r}, [0.0], Fit(*size))).hexdigest())
"""
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code, kind], check=True, capture_output=True, text=True
        ).stdout
        for kind in ("plain", "simd")
    ]
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0].split())) == 3


def test_fit_covers_the_size_and_crops_around_the_center() -> None:
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[:, 50:150] = 255  # exactly what a square crop keeps
    fitted = fit_image(pixels, Fit(40, 40))
    assert fitted.shape == (40, 40, 3)
    assert fitted.min() > 250 or fitted[:, 3:-3].min() == 255
    wide = fit_image(pixels.swapaxes(0, 1), Fit(80, 20))
    assert wide.shape == (20, 80, 3)
    assert wide.min() == 255


def test_fit_does_not_alias() -> None:
    stripes = np.zeros((64, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(fit_image(stripes, Fit(100, 12)).astype(int) - 128).max() < 12


def test_fit_makes_pixels_square() -> None:
    # Stored 100x100, shown 200x100: a 2:1 target keeps all of it, a square one its middle half.
    pixels = np.zeros((100, 100, 3), np.uint8)
    pixels[:, 25:75] = 255
    assert fit_image(pixels, Fit(200, 100), pixel_aspect=2.0)[:, :40].max() == 0
    assert fit_image(pixels, Fit(50, 50), pixel_aspect=2.0)[:, 2:-2].min() > 250


@pytest.mark.parametrize(
    ("name", "shown", "aspect"),
    [
        ("rotated_90.mp4", (132, 176), 117 / 128),
        ("full_hd.mp4", (1920, 1080), 1.0),
        ("odd_size_175x143.mp4", (191, 143), 128 / 117),
    ],
)
def test_frames_are_fitted_upright_with_square_pixels(
    clips: Path, name: str, shown: tuple[int, int], aspect: float
) -> None:
    path = clips / "odd" / name
    assert probe(path).shown_size == shown
    frames = read_frames(path, [0.0, 0.5], Fit(64, 96))
    assert frames.shape == (2, 96, 64, 3)
    stored = read_frames(path, [0.0])[0]
    # The chroma of 4:2:0 is scaled from half the size, not by way of the whole: edges differ.
    assert np.abs(frames[0] - fit_image(stored, Fit(64, 96), aspect).astype(float)).mean() < 1
