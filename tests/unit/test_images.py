"""Images: color profiles, formats, animations."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from onewan.errors import DataError
from onewan.media import Fit, keyframe_near, probe, probe_header, read_frames, read_image

COLORS = np.array(
    [(200, 40, 40), (40, 200, 40), (40, 40, 200), (224, 172, 140), (255, 255, 255), (0, 0, 0)],
    np.uint8,
)
"""sRGB, inside of Display P3 and AdobeRGB."""

Chromaticities = tuple[tuple[float, float], ...]
P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
"""Chromaticities of Display P3 (SMPTE EG 432-1)."""
SRGB = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
D65, D50 = (0.3127, 0.3290), np.array([0.9642, 1.0, 0.8249])


def xyz(chromaticities: Chromaticities) -> np.ndarray:
    """Linear RGB -> CIE XYZ relative to D65."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in chromaticities]).T
    white = np.array([D65[0] / D65[1], 1, (1 - sum(D65)) / D65[1]])
    return columns * np.linalg.solve(columns, white)


def profile(chromaticities: Chromaticities, gamma: float) -> bytes:
    """An ICC profile (version 2) of an RGB display with these primaries, D65 and a gamma."""
    bradford = np.array(
        [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
    )
    matrix = xyz(chromaticities)
    ratio = (bradford @ D50) / (bradford @ matrix.sum(axis=1))
    adapted = np.linalg.inv(bradford) @ np.diag(ratio) @ bradford @ matrix

    def fixed(values: np.ndarray) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78) + bytes(1)
    tags = [(b"desc", text), (b"wtpt", b"XYZ " + bytes(4) + fixed(D50))]
    for index, letter in enumerate(b"rgb"):
        tags.append((bytes([letter]) + b"XYZ", b"XYZ " + bytes(4) + fixed(adapted[:, index])))
        tags.append((bytes([letter]) + b"TRC", curve))
    offset, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, value in tags:
        padded = value + bytes(-len(value) % 4)
        table += struct.pack(">4sII", name, offset + len(data), len(value))
        data += padded
    header = bytearray(128)
    size, version = offset + len(data), 0x02100000
    struct.pack_into(">I4sI4s4s4s", header, 0, size, b"", version, b"mntr", b"RGB ", b"XYZ ")
    header[36:40] = b"acsp"
    header[68:80] = fixed(D50)
    return bytes(header) + struct.pack(">I", len(tags)) + table + data


def coded(colors: np.ndarray, chromaticities: Chromaticities, gamma: float) -> np.ndarray:
    """sRGB colors as the numbers of another color space."""
    srgb = colors / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    other = linear @ (np.linalg.inv(xyz(chromaticities)) @ xyz(SRGB)).T
    return np.round(np.clip(other, 0, 1) ** (1 / gamma) * 255).astype(np.uint8)


def stripes(colors: np.ndarray) -> np.ndarray:
    """[32, 16 n, ...]: each of `colors` as a stripe of 16 columns."""
    return colors.repeat(16, axis=0)[None].repeat(32, axis=0)


def middles(pixels: np.ndarray) -> np.ndarray:
    return pixels[16, 8::16].astype(int)


# --- Color profiles ------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "jpg", "avif"])
@pytest.mark.parametrize(("chromaticities", "gamma"), [(P3, 2.2), (SRGB, 1.8), (P3, 1.0)])
def test_colors_are_converted_to_srgb_by_the_profile(
    tmp_path: Path, suffix: str, chromaticities: Chromaticities, gamma: float
) -> None:
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = tmp_path / f"a.{suffix}"
    image = Image.fromarray(stripes(coded(COLORS, chromaticities, gamma)))
    options = {
        "webp": {"lossless": True},
        "jpg": {"quality": 100, "subsampling": 0},
        "avif": {"quality": 100, "subsampling": "4:4:4"},
    }
    image.save(path, icc_profile=profile(chromaticities, gamma), **options.get(suffix, {}))
    assert probe(path).notes == ()
    # Dark values of a linear image are a few steps of 255 only, and AVIF rounds in YUV.
    tolerance = 12 if gamma == 1 else 8 if suffix == "avif" else 3
    assert np.abs(middles(read_image(path)) - COLORS).max() <= tolerance
    assert np.abs(middles(read_frames(path, [0.0], Fit(96, 32))[0]) - COLORS).max() <= tolerance


def test_the_reference_image_in_display_p3(clips: Path) -> None:
    folder = clips / "field"
    if not folder.exists():
        pytest.skip("these clips have no field folder")
    found = read_image(folder / "p3.jpg").astype(int)
    assert np.abs(found - read_image(folder / "srgb_untagged.png")).max() <= 1


def test_an_srgb_profile_changes_nothing(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=srgb)
    assert np.array_equal(read_image(tmp_path / "a.png"), pixels)


def test_the_profile_of_transparent_and_of_palette_images_is_applied(tmp_path: Path) -> None:
    coded_colors = stripes(coded(COLORS, P3, 2.2))
    alpha = np.full((*coded_colors.shape[:2], 1), 255, np.uint8)
    alpha[:, -16:] = 0
    image = Image.fromarray(np.concatenate([coded_colors, alpha], axis=2))
    image.save(tmp_path / "a.png", icc_profile=profile(P3, 2.2))
    found = middles(read_image(tmp_path / "a.png", background=(10, 20, 30)))
    assert np.abs(found[:-1] - COLORS[:-1]).max() <= 3
    assert found[-1].tolist() == [10, 20, 30], "the background is not a color of the image"
    palette = image.convert("RGB").quantize(8)
    palette.save(tmp_path / "p.png", icc_profile=profile(P3, 2.2))
    assert np.abs(middles(read_image(tmp_path / "p.png")) - COLORS).max() <= 3


def test_gray_with_an_rgb_profile(tmp_path: Path) -> None:
    for name, dtype, value in (("8.png", np.uint8, 128), ("16.png", np.uint16, 32896)):
        image = Image.fromarray(np.full((8, 8), value, dtype))
        image.save(tmp_path / name, icc_profile=profile(SRGB, 1.0))
        found = read_image(tmp_path / name)
        assert np.abs(found.astype(int) - 188).max() <= 1  # sRGB of half of white's light
        assert probe(tmp_path / name).notes == ()


def test_a_profile_that_can_not_be_used_is_said(tmp_path: Path) -> None:
    pixels = stripes(COLORS)
    for name, data in (("broken", b"no profile"), ("cut", profile(P3, 2.2)[:200])):
        path = tmp_path / f"{name}.png"
        Image.fromarray(pixels).save(path, icc_profile=data)
        (note,) = probe(path).notes
        assert note.startswith("color profile that can't be used (")
        assert note.endswith("): its colors are taken for sRGB")
        assert np.array_equal(read_image(path), pixels)


def test_cmyk_without_a_profile_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(stripes(COLORS)).convert("CMYK").save(path, quality=100, subsampling=0)
    assert probe(path).notes == ("CMYK without a color profile: its colors are approximate",)
    assert np.abs(middles(read_image(path)) - COLORS).max() <= 3


def with_chunk(path: Path, name: bytes, content: bytes, image: Image.Image | None = None) -> None:
    """Writes `image`, or a small black one, as PNG with another chunk behind its header."""
    stream = io.BytesIO()
    (image or Image.new("RGB", (32, 32))).save(stream, "PNG")
    data, chunk = stream.getvalue(), name + content
    chunk = struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(data[:33] + chunk + data[33:])


def test_a_gamma_that_is_not_applied_is_said(tmp_path: Path) -> None:
    for gamma, notes in (
        (45455, ()),
        (100000, ("gamma of 1 (gAMA), which is not applied: read as sRGB",)),
    ):
        path = tmp_path / f"{gamma}.png"
        with_chunk(path, b"gAMA", struct.pack(">I", gamma))
        assert probe(path).notes == notes


# --- Formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["bmp", "jfif", "jpe", "tif", "tiff", "avif", "heic", "heif"])
def test_images_of_all_kinds_are_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    options: dict[str, object] = {"format": "JPEG"} if suffix in {"jfif", "jpe"} else {}
    if suffix in {"heic", "heif"}:
        pytest.importorskip("pillow_heif").register_heif_opener()
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    Image.fromarray(stripes(COLORS)).save(path, quality=95, **options)
    info = probe(path)
    assert (info.kind, info.width, info.height, info.notes) == ("image", 96, 32, ())
    assert np.abs(middles(read_image(path)) - COLORS).max() <= 12


def test_heic_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if not installed
    path = tmp_path / "a.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    for read in (probe, probe_header, read_image):
        with pytest.raises(DataError) as caught:
            read(path)
        assert str(caught.value) == (
            f"{path}: heic needs the package pillow-heif; install it with "
            '`pip install "onewan[heic]"`, or convert the file to png'
        )


def test_pages_of_a_tiff_are_said(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    pages = [Image.fromarray(stripes(COLORS)), Image.new("RGB", (96, 32))]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    info = probe(path)
    assert info.kind == "image"
    assert info.notes == ("2 pages, of which the first is used",)
    assert np.array_equal(read_image(path), stripes(COLORS))


@pytest.mark.parametrize(
    ("dtype", "reason"), [(np.float32, "32-bit floating point"), (np.int32, "32-bit integers")]
)
def test_tiffs_of_32_bits_are_refused(tmp_path: Path, dtype: type, reason: str) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(np.ones((8, 8), dtype)).save(path)
    for read in (probe, read_image):
        with pytest.raises(DataError, match=f"has pixels of {reason}, which are not read; convert"):
            read(path)


def in_p3() -> np.ndarray:
    """`COLORS` as Display P3 has them, with the transfer function of sRGB."""
    srgb = COLORS / 255
    light = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    light = np.clip(light @ (np.linalg.inv(xyz(P3)) @ xyz(SRGB)).T, 0, 1)
    wide = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(wide * 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "chunk"),
    [
        (b"cICP", bytes([12, 13, 0, 1])),
        (b"cHRM", struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_images_with_tags_for_wide_primaries_are_brought_to_srgb(
    tmp_path: Path, mode: str, name: bytes, chunk: bytes
) -> None:
    path = tmp_path / "a.png"
    with_chunk(path, name, chunk, Image.fromarray(stripes(in_p3())).convert(mode))
    assert probe(path).notes == ()
    assert np.abs(middles(read_image(path)) - COLORS).max() <= 2
    # The chromaticities of sRGB are written by many programs.
    srgb = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
    with_chunk(path, b"cHRM", srgb, Image.fromarray(stripes(COLORS)))
    assert np.array_equal(middles(read_image(path)), COLORS)


def test_hdr_images_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with_chunk(path, b"cICP", bytes([9, 16, 0, 1]))  # BT.2020, PQ, RGB, full range
    for read in (probe, read_image):
        with pytest.raises(DataError, match=r"is an HDR image \(PQ\), which is not read; convert"):
            read(path)


def test_hdr_heic_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    path = tmp_path / "a.hif"
    Image.new("RGB", (64, 64)).save(path, "HEIF", color_primaries=9, transfer_characteristics=18)
    with pytest.raises(DataError, match=r"is an HDR image \(HLG\), which is not read; convert"):
        probe(path)


# --- Animations ----------------------------------------------------------------------------------

DURATIONS = [100, 50, 300, 62, 200]
"""ms"""
STARTS = [0.0, 0.1, 0.15, 0.45, 0.512]


def make_animation(path: Path, frames: int = 5) -> Path:
    """Frames in gray, 50 levels apart, with different durations."""
    images = [Image.new("RGB", (64, 32), (50 * k,) * 3) for k in range(frames)]
    images[0].putpixel((0, 0), (255, 0, 0))
    options = {"lossless": True} if path.suffix == ".webp" else {}
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=DURATIONS[:frames], **options
    )
    return path


@pytest.mark.parametrize("suffix", ["webp", "png", "apng", "avif", "gif"])
def test_animated_images_are_videos_with_their_own_frame_times(tmp_path: Path, suffix: str) -> None:
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = make_animation(tmp_path / f"a.{suffix}")
    # GIF counts hundredths of a second.
    starts = [0.0, 0.1, 0.15, 0.45, 0.51] if suffix == "gif" else STARTS
    info = probe(path)
    assert (info.kind, info.width, info.height, info.start) == ("video", 64, 32, 0.0)
    assert info.last == pytest.approx(starts[-1])
    assert probe_header(path).kind == "video"
    wanted = [0.0, 0.04, 0.06, 0.1, 0.12, 0.13, 0.29, 0.31, 0.47, 0.5, 9.0]
    nearest = [min(range(5), key=lambda k: (abs(starts[k] - t), k)) for t in wanted]
    frames = read_frames(path, wanted, Fit(32, 16))
    assert np.round(frames[:, 8, 16, 1] / 50).tolist() == nearest
    assert keyframe_near(path, 0.2) in ([0.0] if suffix == "gif" else [0.15])


@pytest.mark.parametrize("suffix", ["webp", "png", "gif"])
def test_free_parts_of_animations_lie_over_the_background(tmp_path: Path, suffix: str) -> None:
    images = [Image.new("RGBA", (64, 32)) for _ in range(3)]
    for number, image in enumerate(images):
        image.paste((255, 0, 0, 255), (16 * number, 8, 16 * number + 16, 24))
    path = tmp_path / f"a.{suffix}"
    dispose = {"webp": {"lossless": True}, "png": {"disposal": 1}, "gif": {"disposal": 2}}
    images[0].save(path, save_all=True, append_images=images[1:], duration=100, **dispose[suffix])
    assert probe(path).has_alpha
    frames = read_frames(path, [0.0, 0.1, 0.2], background=(0, 255, 0))
    for number, frame in enumerate(frames):
        expected = np.full((32, 64, 3), (0, 255, 0))
        expected[8:24, 16 * number : 16 * number + 16] = (255, 0, 0)
        assert np.array_equal(frame, expected)


def test_an_animated_webp_without_free_parts_is_opaque(tmp_path: Path) -> None:
    assert not probe(make_animation(tmp_path / "a.webp")).has_alpha


@pytest.mark.parametrize("suffix", ["webp", "png", "gif"])
def test_an_animation_of_one_frame_is_a_still_image(tmp_path: Path, suffix: str) -> None:
    path = make_animation(tmp_path / f"a.{suffix}", frames=1)
    assert probe(path).kind == probe_header(path).kind == "image"
    assert probe(path).frames_at(16) == 1
    assert (read_frames(path, [0.0, 1.0])[:, 5, 5] == 0).all()


def test_the_default_image_of_a_png_is_no_frame(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=[100, 100], default_image=True
    )
    assert probe(path).last == pytest.approx(0.1)
    assert read_frames(path, [0.0, 0.1])[:, 0, 0].tolist() == [[0, 255, 0], [0, 0, 255]]


def test_the_reference_animation(clips: Path) -> None:
    path = clips / "field" / "anim.webp"
    if not path.exists():
        pytest.skip("these clips have no field folder")
    info = probe(path)
    assert (info.kind, info.frames_at(16)) == ("video", 34)


def test_damaged_animations_are_reported(tmp_path: Path) -> None:
    for suffix in ("webp", "png"):
        path = make_animation(tmp_path / f"a.{suffix}")
        path.write_bytes(path.read_bytes()[: -len(path.read_bytes()) // 3])
        for read in (probe, lambda path: read_frames(path, [0.0, 0.6])):
            with pytest.raises(DataError, match=f"^{path}: "):
                read(path)
