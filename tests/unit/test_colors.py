"""Colors and shapes of videos, against the formulas of the standards.

Clips are made of flat patches, whose samples are computed here from the standards' luma
coefficients, encoded without loss (AV1: nearly), and tagged.
"""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.filter import Graph
from av.video.plane import VideoPlane

from onewan.errors import DataError
from onewan.media import Fit, probe, probe_header, read_frames

COLORS = np.array(
    [
        [(200, 40, 40), (40, 200, 40), (40, 40, 200), (224, 172, 140)],
        [(255, 255, 255), (0, 0, 0), (128, 128, 128), (30, 90, 160)],
    ],
    np.float64,
)
"""Gamma-encoded R'G'B' of 4x2 patches."""

LUMA = {"601": (0.299, 0.114), "709": (0.2126, 0.0722), "2020": (0.2627, 0.0593)}
"""Luma coefficients of red and blue: ITU-R BT.601-7, BT.709-6 and BT.2020-2."""
MATRIX = {"601": 6, "709": 1, "2020": 9, None: 2}
"""Matrix coefficients by ITU-T H.273, table 4; 2 is unspecified."""
LOSSLESS = {
    "libx264": {"qp": "0", "preset": "ultrafast"},
    "libx265": {"x265-params": "lossless=1:log-level=none", "preset": "ultrafast"},
    "libvpx-vp9": {"lossless": "1", "cpu-used": "8", "deadline": "realtime"},
    "libsvtav1": {"crf": "1", "preset": "10"},
    "libvpx": {"crf": "4", "b": "20000000", "cpu-used": "8"},
}


def yuv(rgb: np.ndarray, standard: str, *, full: bool, bits: int) -> list[np.ndarray]:
    """Y, Cb and Cr of R'G'B' from 0 to 1, by BT.601, BT.709 or BT.2020 and ITU-T H.273, (20) ff."""
    red, blue = LUMA[standard]
    r, g, b = np.moveaxis(rgb, -1, 0)
    y = red * r + (1 - red - blue) * g + blue * b
    cb, cr = (b - y) / (2 * (1 - blue)), (r - y) / (2 * (1 - red))
    unit = 2 ** (bits - 8)
    if full:
        top = 2**bits - 1
        planes = [y * top, cb * top + 128 * unit, cr * top + 128 * unit]
    else:
        planes = [(219 * y + 16) * unit, (224 * cb + 128) * unit, (224 * cr + 128) * unit]
    return [np.clip(np.round(p), 0, 2**bits - 1) for p in planes]


def fill(plane: VideoPlane, values: np.ndarray, bits: int) -> None:
    """Writes `values`, one line of samples in each row, into a plane of a frame."""
    dtype = np.dtype("<u2" if bits > 8 else "u1")
    padded = np.zeros((plane.height, plane.line_size // dtype.itemsize), dtype)
    padded[:, : values.shape[1]] = values
    plane.update(padded.tobytes())


def make(
    path: Path,
    rgb: np.ndarray,
    standard: str,
    *,
    full: bool = False,
    bits: int = 8,
    codec: str = "libx264",
    tags: tuple[int, int, int, int] | None = None,
    size: tuple[int, int] = (256, 128),
    aspect: Fraction | None = None,
    frames: int = 3,
    interlaced: bool = False,
) -> Path:
    """A clip of flat patches `rgb` [rows, columns, 3], from 0 to 1, at 10 fps.

    `tags` are matrix, range, primaries and transfer function; by default matrix and range.
    """
    tags = tags or (MATRIX[standard], 2 if full else 1, 2, 2)
    width, height = size
    planes = yuv(rgb, standard, full=full, bits=bits)
    form = "yuv420p" if bits == 8 else f"yuv420p{bits}le"
    with av.open(str(path), "w") as container:
        flags = {"x264-params": "tff=1"} if interlaced else {}
        stream = container.add_stream(codec, rate=10, options=LOSSLESS[codec] | flags)
        stream.width, stream.height, stream.pix_fmt = width, height, form
        context = stream.codec_context
        context.colorspace, context.color_range = tags[:2]
        context.color_primaries, context.color_trc = tags[2:]
        if aspect:
            stream.sample_aspect_ratio = aspect
        for number in range(frames):
            frame = av.VideoFrame(width, height, form)
            frame.colorspace, frame.color_range = tags[:2]
            for plane, values in zip(frame.planes, planes, strict=True):
                rows, columns = values.shape
                large = values.repeat(plane.height // rows, 0).repeat(plane.width // columns, 1)
                fill(plane, large, bits)
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def patches(pixels: np.ndarray, rows: int = 2, columns: int = 4) -> np.ndarray:
    """The mean color of the middle of each patch [rows, columns, 3]."""
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    grid = pixels.reshape(rows, height, columns, width, 3)
    middle = grid[:, height // 4 : -(height // 4), :, width // 4 : -(width // 4)]
    return middle.mean(axis=(1, 3))


# --- Matrix and range ----------------------------------------------------------------------------

CODECS = {
    ("mp4", 8): "libx264",
    ("mp4", 10): "libx265",
    ("webm", 8): "libvpx-vp9",
    ("webm", 10): "libsvtav1",  # the libvpx in PyAV's wheels writes 8 bits only
    ("mov", 8): "libx264",
    ("mov", 10): "libx264",
}


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("suffix", ["mp4", "webm", "mov"])
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("standard", LUMA)
def test_colors_are_those_that_the_tags_say(
    tmp_path: Path, standard: str, full: bool, suffix: str, bits: int
) -> None:
    codec = CODECS[suffix, bits]
    path = make(tmp_path / f"a.{suffix}", COLORS / 255, standard, full=full, bits=bits, codec=codec)
    assert probe(path).notes == () == probe_header(path).notes
    pixels = read_frames(path, [0.0])[0]
    assert np.abs(patches(pixels) - COLORS).max() <= 2
    assert np.abs(pixels.mean(axis=(0, 1)) - COLORS.mean(axis=(0, 1))).max() <= 2
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert np.abs(pixels[row, column] - COLORS[row, column]).max() <= 2
    fitted = read_frames(path, [0.0], Fit(128, 64))[0]
    assert np.abs(patches(fitted) - COLORS).max() <= 2


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("standard", ["601", "709"])
def test_vp8_has_the_colors_that_its_container_says(
    tmp_path: Path, standard: str, full: bool
) -> None:
    path = make(tmp_path / "a.webm", COLORS / 255, standard, full=full, codec="libvpx")
    assert probe(path).notes == () == probe_header(path).notes
    assert np.abs(patches(read_frames(path, [0.0])[0]) - COLORS).max() <= 2


@pytest.mark.parametrize(
    ("size", "standard", "name"),
    [
        ((640, 480), "601", "BT.601"),
        ((1264, 704), "601", "BT.601"),
        ((1280, 720), "709", "BT.709"),
        ((720, 1280), "709", "BT.709"),
        ((1280, 544), "709", "BT.709"),
    ],
)
def test_a_video_without_tags_is_read_by_its_size(
    tmp_path: Path, size: tuple[int, int], standard: str, name: str
) -> None:
    path = make(tmp_path / "a.mp4", COLORS / 255, standard, tags=(2, 0, 2, 2), size=size, frames=1)
    note = f"colors without tags, read as {name} (by the size)"
    assert probe(path).notes == (note,) == probe_header(path).notes
    assert np.abs(patches(read_frames(path, [0.0])[0]) - COLORS).max() <= 2


def test_primaries_decide_where_the_matrix_is_not_tagged(tmp_path: Path) -> None:
    for number, (standard, primaries) in enumerate([("709", 1), ("601", 6), ("601", 5)]):
        path = make(tmp_path / f"{number}.mp4", COLORS / 255, standard, tags=(2, 1, primaries, 2))
        assert probe(path).notes == ()
        assert np.abs(patches(read_frames(path, [0.0])[0]) - COLORS).max() <= 2


def test_gray_and_rgb_videos_need_no_matrix(tmp_path: Path) -> None:
    for form in ("gray", "bgr0"):
        path = tmp_path / f"{form}.mkv"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("ffv1", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 32, form
            pixels = np.full((32, 64, 3), 90, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=form)
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        assert probe(path).notes == ()
        assert np.abs(read_frames(path, [0.0])[0].astype(int) - 90).max() <= 1


def test_codings_that_ffmpeg_converts_wrongly_are_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", COLORS / 255, "709", tags=(14, 1, 9, 14))
    for read in (probe, probe_header, lambda path: read_frames(path, [0.0])):
        with pytest.raises(DataError, match="its colors are coded as ICtCp, which is not read"):
            read(path)


def test_dolby_vision_without_a_compatible_layer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"strict": "unofficial"}) as container:
        stream = container.add_stream("libx265", rate=10, options=LOSSLESS["libx265"])
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p10le"
        stream.codec_context.codec_tag = "dvh1"
        container.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p10le")))
        container.mux(stream.encode(None))
    for read in (probe, probe_header, lambda path: read_frames(path, [0.0])):
        with pytest.raises(DataError, match="its colors are coded as Dolby Vision of profile 5"):
            read(path)


def test_what_is_not_converted_is_said(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", COLORS / 255, "709", tags=(1, 1, 1, 8))
    note = "linear transfer function, which is not converted"
    assert probe(path).notes == (note,) == probe_header(path).notes


# --- Wide primaries ------------------------------------------------------------------------------

TO_2020 = np.array(
    [
        [0.6274039, 0.3292830, 0.0433131],
        [0.0690973, 0.9195404, 0.0113623],
        [0.0163914, 0.0880133, 0.8955953],
    ]
)
"""Linear RGB of BT.709 in the primaries of BT.2020 (ITU-R BT.2087-0)."""
TO_P3 = np.array(
    [
        [0.8224622, 0.1775380, 0.0000000],
        [0.0331942, 0.9668058, 0.0000000],
        [0.0170826, 0.0723975, 0.9105199],
    ]
)
"""Linear RGB of BT.709 in those of Display P3, of which CSS Color Module Level 4 has the parts."""


@pytest.mark.parametrize("fit", [None, Fit(128, 64)], ids=["stored", "scaled"])
@pytest.mark.parametrize(
    ("tags", "to_wide", "gamma", "name"),
    [
        ((9, 1, 9, 14), TO_2020, 2.4, "BT.2020"),
        ((9, 1, 9, 4), TO_2020, 2.2, "BT.2020"),
        ((1, 1, 12, 1), TO_P3, 2.4, "Display P3"),
        ((1, 2, 12, 13), TO_P3, None, "Display P3"),
    ],
)
def test_sdr_of_wide_primaries_has_the_colors_of_bt_709(
    tmp_path: Path,
    tags: tuple[int, int, int, int],
    to_wide: np.ndarray,
    gamma: float | None,
    name: str,
    fit: Fit | None,
) -> None:
    signal = COLORS / 255
    if gamma is None:  # sRGB
        wide = to_srgb(linear(signal) @ to_wide.T)
    else:
        wide = (signal**gamma @ to_wide.T) ** (1 / gamma)
    standard = {9: "2020", 1: "709"}[tags[0]]
    path = make(
        tmp_path / "a.mp4", wide, standard, full=tags[1] == 2, bits=10, codec="libx265", tags=tags
    )
    note = f"SDR with {name} primaries, brought to those of BT.709"
    assert probe(path).notes == (note,) == probe_header(path).notes
    assert np.abs(patches(read_frames(path, [0.0], fit)[0]) - COLORS).max() <= 2


def color_grid() -> np.ndarray:
    """64 colors in 8 rows and columns, R'G'B' from 0 to 1."""
    steps = np.array([20, 110, 190, 250]) / 255
    return np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(8, 8, 3)


def test_sdr_of_bt_2020_agrees_with_ffmpegs_own_conversion(tmp_path: Path) -> None:
    wide = (color_grid() ** 2.2 @ TO_2020.T) ** (1 / 2.2)
    path = make(tmp_path / "a.mp4", wide, "2020", bits=10, codec="libx265", tags=(9, 1, 9, 4))
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 10)
    )
    options = (
        "ispace=bt2020ncl:iprimaries=bt2020:itrc=gamma22:irange=tv:"
        "space=bt709:primaries=bt709:trc=gamma22:range=tv:format=yuv420p10"
    )
    graph.link_nodes(source, graph.add("colorspace", options), graph.add("buffersink")).configure()
    graph.push(frame)
    converted = graph.pull()
    assert isinstance(converted, av.VideoFrame)
    luma, blueness, redness = (
        np.frombuffer(memoryview(plane), "<u2").reshape(plane.height, -1)[:, : plane.width] / 4
        for plane in converted.planes
    )
    y = (luma - 16) / 219
    cb, cr = ((c.repeat(2, 0).repeat(2, 1) - 128) / 224 for c in (blueness, redness))
    red, blue = LUMA["709"]
    r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
    g = (y - red * r - blue * b) / (1 - red - blue)
    theirs = patches(np.stack([r, g, b], axis=-1) * 255, 8, 8)
    ours = patches(read_frames(path, [0.0])[0], 8, 8)
    assert np.abs(ours - theirs).max() <= 2
    # Near black, a step of the source's 10 bits is several of the result's 8.
    assert np.abs(ours - color_grid() * 255).max() <= 5


def test_colors_outside_of_bt_709_are_clipped(tmp_path: Path) -> None:
    path = make(
        tmp_path / "a.mp4", color_grid(), "2020", bits=10, codec="libx265", tags=(9, 1, 9, 14)
    )
    light = color_grid() ** 2.4 @ np.linalg.inv(TO_2020).T
    assert light.min() < -0.1 and light.max() > 1.1
    expected = np.clip(light, 0, 1) ** (1 / 2.4) * 255
    assert np.abs(patches(read_frames(path, [0.0])[0], 8, 8) - expected).max() <= 2


def test_transparent_video_of_wide_primaries_is_laid_over_the_background(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "bgra"
        stream.codec_context.color_primaries, stream.codec_context.color_trc = 12, 1
        pixels = np.zeros((32, 64, 4), np.uint8)
        wide = ((np.array([40, 200, 40]) / 255) ** 2.4 @ TO_P3.T) ** (1 / 2.4)
        pixels[:, :32] = [*np.round(wide[::-1] * 255), 255]
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="bgra")))
        container.mux(stream.encode(None))
    left, right = patches(read_frames(path, [0.0], None, (10, 20, 30))[0], 1, 2)[0]
    assert np.abs(left - [40, 200, 40]).max() <= 2
    assert right.tolist() == [10, 20, 30]


# --- HDR -----------------------------------------------------------------------------------------

WHITE = 203.0
"""SDR white in HDR, cd/m2 (ITU-R BT.2408)."""


def linear(srgb: np.ndarray) -> np.ndarray:
    """Linear light of sRGB values from 0 to 1 (IEC 61966-2-1)."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def to_srgb(light: np.ndarray) -> np.ndarray:
    """The inverse of `linear`."""
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def pq(light: np.ndarray) -> np.ndarray:
    """PQ's signal for light in cd/m2 (SMPTE ST 2084, inverse EOTF)."""
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    power = (np.maximum(light, 0) / 10000) ** m1
    return ((c1 + c2 * power) / (1 + c3 * power)) ** m2


def hlg(light: np.ndarray) -> np.ndarray:
    """HLG's signal for light in cd/m2 on a display of 1000 cd/m2 (ITU-R BT.2100-2, table 5)."""
    display = light / 1000
    luminance = np.maximum(display @ [0.2627, 0.6780, 0.0593], 1e-9)[..., None]
    scene = np.maximum(display * luminance ** ((1 - 1.2) / 1.2), 0)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    logarithmic = a * np.log(np.maximum(12 * scene - b, 1e-9)) + c
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), logarithmic)


SIGNALS = {"PQ": (pq, 16), "HLG": (hlg, 18)}


def make_hdr(path: Path, light: np.ndarray, transfer: str, *, full: bool = False) -> Path:
    """Patches of `light`, linear RGB of BT.709 relative to SDR white, as HDR."""
    signal, tag = SIGNALS[transfer]
    rgb = signal(light @ TO_2020.T * WHITE)
    tags = (9, 2 if full else 1, 9, tag)
    return make(path, rgb, "2020", full=full, bits=10, codec="libx265", tags=tags)


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("transfer", SIGNALS)
def test_hdr_is_brought_to_sdr(tmp_path: Path, transfer: str, full: bool) -> None:
    path = make_hdr(tmp_path / "a.mp4", linear(COLORS / 255), transfer, full=full)
    note = f"HDR ({transfer}) brought to SDR"
    assert probe(path).notes == (note,) == probe_header(path).notes
    for fit in (None, Fit(128, 64)):
        found = patches(read_frames(path, [0.0], fit)[0])
        # Without white, which the curve for highlights makes 253.
        assert np.abs(found - COLORS).reshape(8, 3)[[0, 1, 2, 3, 5, 6, 7]].max() <= 2
        assert found[1, 0].min() >= 252, "SDR white is white"


@pytest.mark.parametrize("transfer", SIGNALS)
def test_highlights_of_hdr_keep_their_hue_and_order(tmp_path: Path, transfer: str) -> None:
    row = linear(np.array([(255, 128, 64), (255, 128, 64), (255, 255, 255), (255, 255, 255)]) / 255)
    light = np.stack(
        [row * np.array([0.9, 1, 1, 1])[:, None], row * np.array([2, 4, 2, 4])[:, None]]
    )
    (orange, white_orange, white, _), (brighter, brightest, *whites) = patches(
        read_frames(make_hdr(tmp_path / "a.mp4", light, transfer), [0.0])[0]
    )
    assert np.abs(orange - np.array([243, 122, 61])).max() <= 3, "below the knee, as in SDR"
    assert np.abs(white_orange - np.array([253, 127, 63])).max() <= 3
    for bright in (brighter, brightest):
        assert np.abs(bright - np.array([255, 128, 64])).max() <= 3
    assert white.min() >= 252
    assert min(bright.min() for bright in whites) >= 254


def test_the_reference_colors_of_hdr(clips: Path) -> None:
    path = clips / "field" / "hdr_pq.mp4"
    if not path.exists():
        pytest.skip("these clips have no field folder")
    assert np.abs(patches(read_frames(path, [0.0])[0]) - COLORS).max() <= 4


# --- Shape ---------------------------------------------------------------------------------------


def rotate(path: Path, degrees: int) -> Path:
    """Writes the matrix of a rotation (counterclockwise, as shown) into an MP4's track header."""
    data = bytearray(path.read_bytes())
    position = data.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes of fields
    one = 1 << 16
    a, b, c, d = {90: (0, -one, one, 0), 180: (-one, 0, 0, -one), 270: (0, one, -one, 0)}[degrees]
    struct.pack_into(">9i", data, position, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("aspect", [Fraction(4, 3), Fraction(16, 11), Fraction(8, 9)])
def test_the_sample_aspect_ratio_is_applied(tmp_path: Path, suffix: str, aspect: Fraction) -> None:
    path = make(tmp_path / f"a.{suffix}", COLORS / 255, "709", size=(192, 128), aspect=aspect)
    info = probe(path)
    shown = 192 * aspect
    assert abs(info.shown_size[0] - shown) <= 1
    assert info.shown_size[1] == 128
    fitted = read_frames(path, [0.0], Fit(round(shown), 128))[0]
    assert np.abs(patches(fitted[:, : round(shown) // 4 * 4]) - COLORS).max() <= 2
    # The border between the second and the third column, 4:4 of the width as shown.
    border = np.abs(np.diff(fitted[32, :, 1].astype(int))).argmax() + 1
    expected = [round(shown * k / 4) for k in (1, 2, 3)]
    assert min(abs(border - place) for place in expected) <= 1


@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("aspect", [Fraction(1), Fraction(4, 3)])
def test_rotation_is_applied(tmp_path: Path, degrees: int, aspect: Fraction) -> None:
    path = make(tmp_path / "a.mp4", COLORS / 255, "709", size=(192, 128), aspect=aspect)
    rotate(path, degrees)
    upright = np.rot90(COLORS, degrees // 90)
    shown = (round(192 * aspect), 128) if degrees == 180 else (round(128 / aspect), 192)
    info = probe(path)
    assert max(abs(a - b) for a, b in zip(info.shown_size, shown, strict=True)) <= 1
    pixels = read_frames(path, [0.0], Fit(*shown))[0]
    assert pixels.shape[:2] == shown[::-1]
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert np.abs(pixels[row, column] - upright[row, column]).max() <= 2


# --- Interlaced video ----------------------------------------------------------------------------


def make_interlaced(path: Path, frames: int = 20) -> Path:
    """A white bar on black that moves 4 pixels a field, in frames of two fields, at 25 fps; each
    frame also shows its number in five squares at the bottom."""
    with av.open(str(path), "w") as container:
        options = {"qp": "0", "preset": "ultrafast", "x264-params": "tff=1"}
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 256, 128, "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_range = 1, 1
        for number in range(frames):
            gray = np.zeros((128, 256, 3), np.uint8)
            for field in (0, 1):
                left = 4 * (2 * number + field)
                # The bottom field is first: PyAV can't set the flag by which FFmpeg tells x264 that
                # the top one is, whatever x264's own option says.
                gray[1 - field : 96 : 2, left : left + 16] = 255
            for bit in range(5):
                gray[96:, 32 * bit : 32 * bit + 32] = 255 * (number >> bit & 1)
            frame = av.VideoFrame.from_ndarray(gray, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=1, dst_color_range=1)
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def shown_number(pixels: np.ndarray) -> int:
    squares = (pixels[104:120, 32 * b + 8 : 32 * b + 24].mean() for b in range(5))
    return sum(int(mean > 128) << bit for bit, mean in enumerate(squares))


def test_interlaced_frames_are_deinterlaced_and_keep_their_times(tmp_path: Path) -> None:
    path = make_interlaced(tmp_path / "a.mp4")
    info = probe(path)
    assert info.interlaced
    assert info.notes == ()
    assert info.last == pytest.approx(19 / 25)
    for first, count in ((0, 20), (7, 5), (17, 3), (19, 1)):
        numbers = list(range(first, first + count))
        frames = read_frames(path, [number / 25 for number in numbers])
        assert [shown_number(frame) for frame in frames] == numbers
        for number, frame in zip(numbers, frames, strict=True):
            bar = frame[16:80, :, 1].astype(int)
            # Odd and even lines of the stored frame are 4 pixels apart.
            combs = np.abs(bar[1:-1] - (bar[:-2] + bar[2:]) / 2).mean()
            assert combs < 1, f"frame {number} is woven"
            assert abs(np.median(bar.argmax(axis=1)) - 8 * number) <= 2
    # At 16 fps, the frames nearest to the wanted times.
    wanted = [k / 16 for k in range(12)]
    found = [shown_number(frame) for frame in read_frames(path, wanted)]
    assert found == [int(np.ceil(time * 25 - 0.5)) for time in wanted]


def test_the_top_field_is_taken_where_it_is_first(clips: Path) -> None:
    path = clips / "field" / "int_h264.mp4"
    if not path.exists():
        pytest.skip("these clips have no field folder")
    with av.open(str(path)) as container:
        stored = next(f for f in container.decode(video=0) if f.time >= 1)
        woven = stored.to_ndarray(format="gray")[16:100]
    shown = read_frames(path, [1.0])[0, 16:100, :, 1]
    bars = [np.median((lines > 128).argmax(axis=1)) for lines in (shown, woven[::2], woven[1::2])]
    assert abs(bars[0] - bars[1]) <= 1
    assert abs(bars[2] - bars[1]) == 4


def test_interlaced_video_is_turned_as_its_metadata_say(tmp_path: Path) -> None:
    path = make_interlaced(tmp_path / "a.mp4")
    upright = read_frames(path, [0.2])[0]
    assert np.array_equal(read_frames(rotate(path, 90), [0.2])[0], np.rot90(upright))


def test_the_colors_of_interlaced_video_are_those_of_its_tags(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mkv", COLORS / 255, "709", full=True, interlaced=True)
    assert probe(path).interlaced
    assert np.abs(patches(read_frames(path, [0.1])[0]) - COLORS).max() <= 2


# --- Transparency --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "suffix", "form"),
    [
        ("libvpx", "webm", "yuva420p"),
        ("libvpx-vp9", "webm", "yuva420p"),
        ("libvpx-vp9", "mkv", "yuva420p"),
        ("prores_ks", "mov", "yuva444p10le"),
        ("png", "mov", "rgba"),
    ],
)
def test_transparent_parts_lie_over_the_background(
    tmp_path: Path, codec: str, suffix: str, form: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    red = np.full((64, 128, 4), (200, 40, 40, 255), np.uint8)
    red[:, 64:, 3] = 0
    opaque, bits = red[..., :3] / 255, 10 if "10" in form else 8
    planes = [*yuv(opaque, "709", full=False, bits=bits), red[..., 3] / 255 * (2**bits - 1)]
    fast = {"auto-alt-ref": "0", "cpu-used": "8", "deadline": "realtime", "crf": "4"}
    options = fast if codec.startswith("libvpx") else {}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 128, 64, form
        if suffix != "mov":
            stream.metadata["alpha_mode"] = "1"
        stream.codec_context.colorspace, stream.codec_context.color_range = 1, 1
        for number in range(3):
            frame = av.VideoFrame(128, 64, form)
            if form == "rgba":
                planes = [red.reshape(64, 512)]
            for plane, values in zip(frame.planes, planes, strict=True):
                fill(plane, values[:: 64 // plane.height, :: 128 // plane.width], bits)
            frame.colorspace, frame.color_range = 1, 1
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    info = probe(path)
    assert info.has_alpha
    assert info.last == pytest.approx(0.2, abs=2e-3)
    for background in ((255, 255, 255), (0, 90, 180)):
        for pixels in read_frames(path, [0.0, 0.1, 0.2], Fit(64, 32), background):
            assert np.abs(pixels[16, 12].astype(int) - (200, 40, 40)).max() <= 4
            assert np.abs(pixels[16, -12].astype(int) - background).max() <= 1
    assert not np.array_equal(
        read_frames(path, [0.0]), read_frames(path, [0.0], background=(0, 0, 0))
    )
    assert np.array_equal(
        read_frames(path, [0.0]), read_frames(path, [0.0], background=(255, 255, 255))
    ), "white by default"


def test_files_without_transparency_have_none(clips: Path) -> None:
    for name in ("rabbit_stretches.mp4", "man_in_car.webm", "rabbit_portrait.png"):
        assert not probe(clips / "good" / name).has_alpha
