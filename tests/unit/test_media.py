"""onewan.media compared with independent full decodes, on real clips and on tiny generated ones."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from onewan import media
from onewan.errors import DataError
from onewan.media import Fit, keyframe_near, probe, read_frames, read_image, write_video

WIDTH, HEIGHT, SQUARE = 160, 64, 16
OPEN_GOP = {"x264-params": "open-gop=1:keyint=30:min-keyint=30:scenecut=0:bframes=4:b-pyramid=2"}
CLOSED_GOP = {"x264-params": "keyint=40:bframes=3"}


def numbered(number: int) -> np.ndarray:
    """A picture that shows its number in ten black or white squares, over a moving texture."""
    texture = np.random.default_rng(0).integers(0, 255, (8, 20, 3), np.uint8)
    pixels = np.roll(texture.repeat(8, 0).repeat(8, 1), number * 3, axis=1)
    for bit in range(10):
        pixels[:SQUARE, bit * SQUARE : (bit + 1) * SQUARE] = 255 * (number >> bit & 1)
    return pixels


def number_of(pixels: np.ndarray) -> int:
    squares = (pixels[4:12, b * SQUARE + 4 : (b + 1) * SQUARE - 4].mean() for b in range(10))
    return sum(int(mean > 128) << bit for bit, mean in enumerate(squares))


class Pipe(io.RawIOBase):
    """A file without seeking, for which a muxer writes no index."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        return self._file.write(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def make(
    path: Path,
    times: list[float],
    *,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    piped: bool = False,
    tick: Fraction = Fraction(1, 1000),
    gop: int | None = None,
) -> Path:
    """A clip of numbered frames, number k shown at ``times[k]``."""
    target = Pipe(path) if piped else str(path)
    form = {"mkv": "matroska", "ts": "mpegts", "mpg": "mpeg"}.get(path.suffix[1:], path.suffix[1:])
    with av.open(target, "w", format=form) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = tick
        if gop:
            stream.codec_context.gop_size = gop
            stream.codec_context.max_b_frames = 2
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            frame.pts, frame.time_base = round(time / tick), tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if piped:
        target.close()
    return path


def steady(frames: int, start: float = 0.0) -> list[float]:
    return [start + k / 25 for k in range(frames)]


def every_frame(path: Path) -> list[tuple[float, np.ndarray]]:
    """Time and pixels of all frames by a plain decode, without seeking or threads."""
    # The exact conversion, so that frames which hardly differ can be distinguished.
    flags = 0x2 | 0x40000 | 0x2000  # SWS_BILINEAR, SWS_ACCURATE_RND, SWS_FULL_CHR_H_INT
    with av.open(str(path)) as container:
        return [
            (
                frame.time,
                frame.to_ndarray(
                    format="rgb24",
                    interpolation=flags,
                    dst_colorspace=0,  # RGB; PyAV 16 ignores the frame's matrix if they are equal
                    src_color_range=frame.color_range,
                ),
            )
            for frame in container.decode(video=0)
        ]


def nearest(times: list[float], wanted: float) -> int:
    return min(range(len(times)), key=lambda k: (round(abs(times[k] - wanted), 6), times[k]))


def identify(pixels: np.ndarray, frames: list[tuple[float, np.ndarray]], near: float) -> float:
    """Time of the frame that `pixels` shows; of several that are equal, the one nearest `near`."""
    equal = [time for time, candidate in frames if np.array_equal(pixels, candidate)]
    assert equal, "not a frame of this file"
    return min(equal, key=lambda time: abs(time - near))


def good_and_odd(clips: Path) -> list[Path]:
    return sorted(p for d in ("good", "odd") for p in (clips / d).iterdir() if p.suffix != ".txt")


# --- The right frames ----------------------------------------------------------------------------

GAPS = [t + (7 if k >= 100 else 0) + (11 if k > 110 else 0) for k, t in enumerate(steady(160))]
FAST_VP9 = {"deadline": "realtime", "cpu-used": "8", "crf": "20", "b": "0"}
MADE: dict[str, Callable[[Path], Path]] = {
    "closed.mp4": lambda p: make(p, steady(160), options=CLOSED_GOP),
    "open.mp4": lambda p: make(p, steady(200), options=OPEN_GOP),
    "open.mkv": lambda p: make(p, steady(200), options=OPEN_GOP),
    "open.ts": lambda p: make(p, steady(160, 30.0), options=OPEN_GOP),
    "one_key.ts": lambda p: make(p, steady(160, 30.0)),
    "late.mp4": lambda p: make(p, steady(160, 3.0), options=CLOSED_GOP),
    "late.mkv": lambda p: make(p, steady(160, 3.0), options=CLOSED_GOP),
    "gaps.mp4": lambda p: make(p, GAPS, options=CLOSED_GOP),
    "gaps.mkv": lambda p: make(p, GAPS, options=CLOSED_GOP),
    "piped.mkv": lambda p: make(p, steady(160), options=CLOSED_GOP, piped=True),
    "vp9.webm": lambda p: make(p, steady(160), codec="libvpx-vp9", options=FAST_VP9),
    "mpeg2.mpg": lambda p: make(
        p, steady(160), codec="mpeg2video", options={"b": "2M"}, tick=Fraction(1, 25), gop=12
    ),
    "mpeg4.avi": lambda p: make(
        p, steady(160), codec="mpeg4", options={"b": "2M"}, tick=Fraction(1, 25), gop=12
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_frames_are_the_nearest_of_a_full_decode(tmp_path: Path, name: str) -> None:
    path = MADE[name](tmp_path / name)
    frames = every_frame(path)
    times = [time for time, _ in frames]
    info = probe(path)
    assert (info.start, info.last) == pytest.approx((times[0], times[-1]), abs=1e-6)
    rng = np.random.default_rng(1)
    for count in (1, 5, 17, 17, 17):
        start = rng.uniform(info.start, info.last - (count - 1) / 16)
        wanted = [start + k / 16 for k in range(count)]
        expected = [number_of(frames[nearest(times, t)][1]) for t in wanted]
        assert [number_of(f) for f in read_frames(path, wanted)] == expected


def test_frames_of_h264_in_avi_are_in_order(tmp_path: Path) -> None:
    # FFmpeg itself gives these frames timestamps that are out of order, so no full decode to trust.
    path = make(tmp_path / "b.avi", steady(160), options=CLOSED_GOP, tick=Fraction(1, 25))
    start = probe(path).start
    for first in (0, 3, 77, 120):
        wanted = [start + (first + k) / 25 for k in range(17)]
        found = [number_of(f) for f in read_frames(path, wanted)]
        assert found == list(range(first, first + 17))


def test_a_tie_goes_to_the_earlier_frame(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", [0.0, 0.5, 1.0], options={"bf": "0"})
    assert [number_of(f) for f in read_frames(path, [0.25, 0.26, 0.75, 0.76])] == [0, 1, 1, 2]


def test_times_outside_the_file_give_its_first_or_last_frame(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", steady(10))
    assert [number_of(f) for f in read_frames(path, [-1.0, 0.0, 0.36, 9.0])] == [0, 0, 9, 9]


@pytest.mark.parametrize("times", [[], [1.0, 0.5]])
def test_times_that_are_empty_or_not_ascending_are_an_error(
    tmp_path: Path, times: list[float]
) -> None:
    with pytest.raises(ValueError, match="ascending"):
        read_frames(tmp_path / "a.mp4", times)


@pytest.mark.parametrize("name", ["variable_frame_rate.mkv", "fps60.mp4"])
def test_frames_are_within_half_a_frame_of_their_times(clips: Path, name: str) -> None:
    path = clips / "odd" / name
    frames = every_frame(path)
    times = [time for time, _ in frames]
    info = probe(path)
    wanted = [info.start + k / 16 for k in range(info.frames_at(16))]
    for instant, pixels in zip(wanted, read_frames(path, wanted), strict=True):
        shown = identify(pixels, frames, instant)
        index = times.index(shown)
        around = times[max(0, index - 1) : index + 2]
        half = max(max(np.diff(around)), 1 / 16) / 2
        assert abs(shown - instant) <= half + 1e-6


def test_a_span_of_a_long_clip_equals_a_full_decode(clips: Path) -> None:
    path = clips / "odd" / "long_gop_with_cuts.mp4"
    frames = every_frame(path)
    times = [time for time, _ in frames]
    for start in (0.0, 1.19, 4.3, 7.5, 8.9):
        wanted = [start + k / 16 for k in range(17)]
        expected = [times[nearest(times, t)] for t in wanted]
        found = read_frames(path, wanted)
        assert [identify(f, frames, t) for f, t in zip(found, wanted, strict=True)] == expected


def test_frames_at_counts_the_times_that_have_a_frame(clips: Path) -> None:
    for path in good_and_odd(clips):
        times = [time for time, _ in every_frame(path)]
        info = probe(path)
        for fps in (8, 16, 24):
            interval = max(np.diff(times)) if len(times) > 1 else 0.0
            half = max(interval, 1 / fps) / 2
            have = 0
            while (
                times[nearest(times, times[0] + have / fps)] > times[0] + have / fps - half - 1e-9
            ):
                have += 1
            count = info.frames_at(fps)
            # Never a time without a frame, and none left unused except for rounding at the end.
            assert have - 1 <= count <= have, f"{path.name} at {fps} fps"


def test_keyframe_near_finds_the_nearest_key_frame(tmp_path: Path) -> None:
    fixed = {"x264-params": "keyint=25:min-keyint=25:scenecut=0"}
    path = make(tmp_path / "a.mp4", steady(150), options=fixed)
    assert [keyframe_near(path, t) for t in (0.0, 0.4, 0.6, 2.9, 3.0, 99.0)] == pytest.approx(
        [0.0, 0.0, 1.0, 3.0, 3.0, 5.0]
    )


# --- All kinds of files --------------------------------------------------------------------------


def test_all_good_and_odd_clips_are_read_to_their_end(clips: Path) -> None:
    for path in good_and_odd(clips):
        info = probe(path)
        times = [info.start + k / 16 for k in range(info.frames_at(16))]
        frames = read_frames(path, times)
        assert frames.shape == (len(times), info.height, info.width, 3)
        assert frames.dtype == np.uint8
        assert frames.std() > 10, f"{path.name} is blank"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("audio_only.mp4", "has no video, only audio streams"),
        ("corrupt_middle.mp4", "is damaged near 0.00 s"),
        ("decompression_bomb.png", "claims more pixels"),
        ("empty.mp4", r"is empty \(0 bytes\)"),
        ("one_byte.webm", "is not a video that FFmpeg can read"),
        ("text.mp4", "is not a video that FFmpeg can read"),
        ("truncated_no_index.mp4", "is cut off: its header promises 586568 bytes and it has 60000"),
    ],
)
def test_bad_clips_give_an_error_with_path_and_reason(
    clips: Path, capfd: pytest.CaptureFixture[str], name: str, reason: str
) -> None:
    path = clips / "bad" / name
    with pytest.raises(DataError, match=reason) as caught:
        probe(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "; " in text, "says what to do"
    assert "\n" not in text
    if name != "empty.mp4":
        with pytest.raises(DataError, match=f"^{path}: "):
            read_frames(path, [0.0, 0.5])
    assert capfd.readouterr() == ("", ""), "FFmpeg prints nothing"


def test_the_test_above_covers_every_bad_clip(clips: Path) -> None:
    assert len([p for p in (clips / "bad").iterdir() if p.suffix != ".txt"]) == 7


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "no.mp4", tmp_path / "no.png", tmp_path):
        with pytest.raises(DataError, match="is not a file"):
            probe(path)
    with pytest.raises(DataError, match="No such file"):
        read_frames(tmp_path / "no.mp4", [0.0])


def test_damage_is_an_error_only_where_it_is_decoded(tmp_path: Path) -> None:
    fixed = {"x264-params": "keyint=25:min-keyint=25:scenecut=0:bframes=2"}
    path = make(tmp_path / "a.mp4", steady(150), options=fixed)
    with av.open(str(path)) as container:
        packets = {
            round(packet.pts * packet.time_base * 25): (packet.pos, packet.size)
            for packet in container.demux(video=0)
            if packet.size
        }
    position, size = packets[60]
    data = bytearray(path.read_bytes())
    data[position + 8 : position + size] = bytes(b ^ 0x5A for b in data[position + 8 :][: size - 8])
    path.write_bytes(data)

    probe(path)  # looks at the first frame only
    before = read_frames(path, [k / 25 for k in range(40)])
    assert [number_of(f) for f in before] == list(range(40))
    after = read_frames(path, [k / 25 for k in range(75, 100)])
    assert [number_of(f) for f in after] == list(range(75, 100))
    for span in (
        range(55, 65),
        range(65, 72),
    ):  # the second is predicted from it
        with pytest.raises(DataError, match=r"is damaged near 2\.\d+ s"):
            read_frames(path, [k / 25 for k in span])


def test_damaged_pictures_are_rarely_returned(tmp_path: Path) -> None:
    """Decoders conceal most damage, unless they are configured not to.

    Some damage can't be detected: flipped bits may encode another valid picture.
    """
    sound = tmp_path / "sound.mp4"
    # In its own process: x264 writes other bytes the second time, so that the same positions would
    # damage other things.
    code = f"from test_media import *; make(Path({str(sound)!r}), steady(100), options=CLOSED_GOP)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)
    clean = read_frames(sound, steady(100))
    data = sound.read_bytes()
    first, last = data.index(b"mdat") + 700, data.index(b"moov")  # after x264's own text
    rng = np.random.default_rng(3)
    found = missed = 0
    for _ in range(20):
        broken = bytearray(data)
        for position in rng.integers(first, last, 3):
            broken[position] ^= int(rng.integers(1, 256))
        path = tmp_path / "broken.mp4"
        path.write_bytes(broken)
        for start in range(0, 100, 10):
            try:
                frames = read_frames(path, steady(10, start / 25))
            except DataError:
                found += 1
                continue
            difference = np.abs(frames.astype(np.int16) - clean[start : start + 10])
            missed += difference.mean(axis=(1, 2, 3)).max() > 2
    # 112 and 4 here; 65 and 40 with decoders that conceal damage.
    assert found > 90
    assert missed < found / 8


def test_a_truncated_file_is_reported(tmp_path: Path) -> None:
    complete = tmp_path / "complete.mp4"
    write_video(complete, np.stack([numbered(k) for k in range(200)]), 25)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(complete.read_bytes()[: complete.stat().st_size * 6 // 10])
    with pytest.raises(DataError, match="is cut off: its header promises"):
        probe(cut)


def test_a_recording_that_starts_between_key_frames_can_be_read(tmp_path: Path) -> None:
    path = make(tmp_path / "a.ts", steady(160), options=CLOSED_GOP)
    data = path.read_bytes()
    path.write_bytes(data[len(data) // 188 // 3 * 188 :])
    info = probe(path)
    found = read_frames(path, [info.start + k / 25 for k in range(17)])
    numbers = [number_of(f) for f in found]
    assert numbers == list(range(numbers[0], numbers[0] + 17))


@pytest.mark.parametrize("name", ["12:30 at noon.mp4", "é 日本.mp4", "100%d.mp4", "UPPER.MP4"])
def test_any_file_name_can_be_read_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if sys.platform == "win32" and ":" in name:
        pytest.skip("Windows has no such names")
    monkeypatch.chdir(tmp_path)
    for path in (Path(name), tmp_path / name):
        write_video(path, np.stack([numbered(k) for k in range(5)]), 16)
        assert [number_of(f) for f in read_frames(path, [0.0, 0.25])] == [0, 4]


# --- Orientation, pixel aspect, colors -----------------------------------------------------------


def test_a_rotated_clip_is_read_upright(clips: Path) -> None:
    path = clips / "odd" / "rotated_90.mp4"
    info = probe(path)
    assert (info.width, info.height, info.rotation) == (144, 176, 90)
    stored = every_frame(path)[0][1]
    upright = read_frames(path, [info.start])[0]
    # FFmpeg's documentation: "rotates the frame counterclockwise", as numpy's rot90 does.
    assert np.abs(upright.astype(np.int16) - np.rot90(stored)).mean() < 4


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((1, 0, 0, 1), lambda a: a),
        ((0, 1, -1, 0), lambda a: np.rot90(a, -1)),
        ((-1, 0, 0, -1), lambda a: np.rot90(a, 2)),
        ((0, -1, 1, 0), lambda a: np.rot90(a, 1)),
        ((-1, 0, 0, 1), lambda a: a[:, ::-1]),  # a front camera
        ((1, 0, 0, -1), lambda a: a[::-1]),
        ((0, 1, 1, 0), lambda a: a.swapaxes(0, 1)),
    ],
)
def test_every_display_matrix_is_applied(
    tmp_path: Path, matrix: tuple[int, ...], expected: Callable[[np.ndarray], np.ndarray]
) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, np.stack([numbered(5)] * 3), 16)
    stored = read_frames(path, [0.0])[0]
    a, b, c, d = (v * 65536 for v in matrix)
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    data = path.read_bytes()
    start = data.index(identity, data.index(b"tkhd"))
    turned = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data[:start] + turned + data[start + len(turned) :])
    assert np.array_equal(read_frames(path, [0.0])[0], expected(stored))
    info = probe(path)
    assert (info.height, info.width) == expected(stored).shape[:2]


@pytest.mark.parametrize("matrix", [Colorspace.ITU601, Colorspace.ITU709])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv420p10le", "yuv444p"])
def test_tagged_matrix_and_range_are_applied(
    tmp_path: Path, matrix: Colorspace, full: bool, pixel_format: str
) -> None:
    colors = [(200, 40, 90), (30, 180, 60), (20, 60, 210), (128, 128, 128)]
    pixels = np.repeat(np.array([colors], np.uint8).repeat(32, 0), 16, axis=1)
    value = ColorRange.JPEG if full else ColorRange.MPEG
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, pixel_format
        # Tags are AVCOL_SPC_BT709 (1) and AVCOL_SPC_SMPTE170M (6), not swscale's own values.
        stream.codec_context.colorspace = 1 if matrix == Colorspace.ITU709 else 6
        stream.codec_context.color_range = value
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
            format=pixel_format, dst_colorspace=matrix, dst_color_range=value
        )
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    found = read_frames(path, [0.0])[0]
    for number, color in enumerate(colors):
        middle = found[8:24, number * 16 + 4 : number * 16 + 12].reshape(-1, 3).mean(0)
        assert np.abs(middle - color).max() < 3.5, (color, middle)


def test_colors_are_not_biased(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, np.full((1, 64, 64, 3), 100, np.uint8), 16)
    assert read_frames(path, [0.0]).mean() == pytest.approx(100, abs=0.51)


# --- Images --------------------------------------------------------------------------------------


def test_an_image_is_read_for_every_time(clips: Path) -> None:
    path = clips / "good" / "rabbit_portrait.png"
    info = probe(path)
    assert (info.kind, info.width, info.height, info.frames_at(16)) == ("image", 960, 540, 1)
    assert np.array_equal(read_frames(path, [0.0])[0], np.asarray(Image.open(path).convert("RGB")))
    assert read_frames(path, [0.0], Fit(64, 32)).shape == (1, 32, 64, 3)
    assert keyframe_near(path, 3.0) == 0.0


def test_an_image_is_rotated_by_its_exif(tmp_path: Path) -> None:
    image = Image.fromarray(numbered(9))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    info = probe(tmp_path / "a.png")
    assert (info.width, info.height) == (HEIGHT, WIDTH)
    assert np.array_equal(read_image(tmp_path / "a.png"), np.rot90(numbered(9), -1))


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    for name in ("a.png", "a.webp"):
        image.save(tmp_path / name, lossless=True)
        pixels = read_image(tmp_path / name)
        assert pixels[0, 0].tolist() == [255, 0, 0]
        assert pixels[4, 4].tolist() == [255, 255, 255]


def test_sixteen_bit_gray_is_scaled(tmp_path: Path) -> None:
    grey = np.full((8, 8), 32896, np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == 128).all()


def test_a_truncated_image_is_reported(tmp_path: Path, clips: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes((clips / "good" / "rabbit_portrait.png").read_bytes()[:50_000])
    for read in (probe, read_image):
        with pytest.raises(DataError, match="is not an image that can be read"):
            read(path)


# --- Writing -------------------------------------------------------------------------------------


def blocks(frames: int) -> np.ndarray:
    """Smooth colored frames, whose colors survive 4:2:0."""
    out = np.empty((frames, 64, 96, 3), np.uint8)
    for number, frame in enumerate(out):
        frame[:, :48] = (200 - number, 40, 90)
        frame[:, 48:] = (30, 60 + number, 220)
    return out


@pytest.mark.parametrize("suffix", ["mp4", "mov", "webm", "avi"])
@pytest.mark.parametrize("fps", [16, 24, 12.5, 30000 / 1001])
def test_a_written_video_reads_back_the_same(tmp_path: Path, suffix: str, fps: float) -> None:
    path = tmp_path / f"a.{suffix}"
    written = blocks(17)
    write_video(path, written, fps)
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "no temporary file is left"
    info = probe(path)
    assert (info.width, info.height, info.frames_at(fps)) == (96, 64, 17)
    assert 1 / info.frame_interval == pytest.approx(fps, rel=1e-4)
    found = read_frames(path, [info.start + k / fps for k in range(17)])
    difference = np.abs(found.astype(np.int16) - written)[:, :, np.r_[4:40, 56:92]]
    assert difference.mean() < 2
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        assert len(frames) == 17
        if suffix != "avi":  # has no tags
            assert (frames[0].colorspace, frames[0].color_range) == (1, ColorRange.MPEG)
        assert frames[0].format.name == "yuv420p"
        if suffix == "mp4":
            assert container.streams.video[0].average_rate == Fraction(fps).limit_denominator(1001)


def test_the_index_of_an_mp4_comes_first(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", blocks(5), 16)
    data = (tmp_path / "a.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_videos_that_can_not_be_written_are_errors(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, frames, reason in (
        (tmp_path / "a.mp4", np.zeros((1, 64, 63, 3), np.uint8), "63x64, a side is odd"),
        (tmp_path / "a.mkv", blocks(1), "videos of this kind can't be written; name it .mp4"),
        (tmp_path / "file" / "a.mp4", blocks(1), "can't be written"),
    ):
        with pytest.raises(DataError, match=reason):
            write_video(path, frames, 16)
    with pytest.raises(ValueError, match="uint8"):
        write_video(tmp_path / "a.mp4", np.zeros((1, 64, 64, 3)), 16)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.mkdir()
    with pytest.raises(DataError, match="can't be written"):
        write_video(path, blocks(2), 16)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


# --- The module ----------------------------------------------------------------------------------


def test_media_does_not_import_torch() -> None:
    check = "import sys, onewan.media; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_image_and_video_suffixes_do_not_overlap() -> None:
    assert not media.VIDEO_SUFFIXES & media.IMAGE_SUFFIXES
    assert {"mp4", "avi", "mov", "webm", "mkv", "gif", "m4v", "wmv", "flv", "ts"} <= (
        media.VIDEO_SUFFIXES
    )


def test_files_are_closed_after_reading(tmp_path: Path) -> None:
    """All files are closed, also after an error (Windows refuses to delete open ones)."""
    path = make(tmp_path / "a.mp4", steady(30))
    probe(path)
    read_frames(path, [0.2])
    keyframe_near(path, 0.2)
    if sys.platform == "linux":
        links = [entry for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
        assert not [link for link in links if str(tmp_path) in str(link.readlink())]
    shutil.rmtree(tmp_path)
