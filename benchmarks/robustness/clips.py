"""Reads hostile and damaged clips the way `onewan cache` and `onewan train` do, without encoding.

Each case starts from a small sound media file: of many containers and codecs, drawn here, and real
ones from ``../shared/clips`` where that is. It flips bytes, cuts, fills with zeros, swaps, removes
or repeats parts, claims other sizes, dimensions, codecs and extensions, joins files, and uses the
result as a clip and sometimes as its mask. Every file must become a clip that decodes to its shape,
or a problem in the report that names it.

    python benchmarks/robustness/clips.py --count 3000 --out clips.json
"""

from __future__ import annotations

import contextlib
import random
import re
import tempfile
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from harness import run_cases
from PIL import Image

from onewan.cli.boundary import guarded
from onewan.data.clip import Clip, ClipPlanner, ClipSource
from onewan.data.decode import decode
from onewan.data.index import index_clips
from onewan.data.masks import latent_mask
from onewan.data.report import ClipProblem, DatasetReport
from onewan.errors import DataError
from onewan.media import VIDEO_SUFFIXES

# Looks for the program ffmpeg when it is imported, whatever the files are; so it is imported before
# programs that a case starts are noticed.
with contextlib.suppress(ImportError):
    import scenedetect  # noqa: F401  # pyright: ignore[reportMissingImports]

WIDTH, HEIGHT, FRAMES = 96, 64, 14
MAX_BASE_BYTES = 400_000
SHARED = Path(__file__).resolve().parents[3] / "shared" / "clips"
EXTENSIONS = (
    *("mp4", "mov", "webm", "mkv", "avi", "gif", "ts", "mpg", "flv", "wmv", "ogv", "m4v"),
    *("png", "jpg", "webp"),
)


def run(arguments: Sequence[str]) -> int:
    """Index a folder of clips and decode every frame that would be trained on."""
    folder, strategy = arguments

    def command() -> int:
        planner = ClipPlanner(
            seed=7,
            fps=16.0,
            max_frames=17,
            max_duration=10.0,
            frame_strategy=strategy,  # pyright: ignore[reportArgumentType]
            resolutions=(64 * 64,),
            min_resolution=(16, 16),
            max_resolution=(1024, 1024),
            video_formats=tuple(sorted(VIDEO_SUFFIXES)),
            size_multiple=16,
            temporal_compression=4,
        )
        report = index_clips([ClipSource(path=Path(folder))], planner, use_masks=True)
        problems = [problem for clip in report.clips if (problem := problem_of(clip))]
        assert len(report.clips) + len(report.problems) == 1, "the clip is lost"
        print(DatasetReport(clips=(), problems=(*report.problems, *problems), warnings=()))
        return 1 if report.problems or problems else 0

    return guarded(command)


def problem_of(clip: Clip) -> ClipProblem | None:
    """Why a clip or its mask can't be decoded."""
    width, height = clip.size
    try:
        assert decode(clip).frames.shape == (clip.frames, height, width, 3)
        if clip.mask is not None:
            values = latent_mask(
                clip.mask, fps=clip.fps, frames=clip.frames, size=clip.size, spatial=8, temporal=4
            )
            assert values.shape == (1, (clip.frames - 1) // 4 + 1, height // 8, width // 8)
    except DataError as error:
        return ClipProblem.from_error(clip.path, error)
    return None


# ------------------------------------------------------------------------------------ sound files

VIDEOS: Sequence[tuple[str, str, dict[str, str], dict[str, str]]] = (
    ("mp4", "libx264", {"bf": "2", "g": "6"}, {}),
    ("mp4", "libx264", {}, {"movflags": "+faststart"}),
    ("mp4", "libx264", {}, {"movflags": "+frag_keyframe+empty_moov"}),
    ("mp4", "libx265", {"x265-params": "log-level=none"}, {}),
    ("mp4", "libaom-av1", {"cpu-used": "8", "usage": "realtime"}, {}),
    ("mov", "mpeg4", {}, {}),
    ("mov", "prores_ks", {}, {}),
    ("mov", "png", {}, {}),
    ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}, {}),
    ("webm", "libvpx", {"deadline": "realtime"}, {}),
    ("mkv", "libx264", {"g": "5"}, {}),
    ("mkv", "ffv1", {}, {}),
    ("avi", "mpeg4", {}, {}),
    ("avi", "mjpeg", {}, {}),
    ("avi", "huffyuv", {}, {}),
    ("gif", "gif", {}, {}),
    ("ts", "mpeg2video", {}, {}),
    ("mpg", "mpeg1video", {}, {}),
    ("flv", "flv", {}, {}),
    ("wmv", "wmv2", {}, {}),
    ("ogv", "libtheora", {}, {}),
)
FORMATS = {"mkv": "matroska", "ts": "mpegts", "mpg": "mpeg", "wmv": "asf", "ogv": "ogg"}
PIXEL_FORMATS = {"gif": "rgb8", "png": "rgb24", "prores_ks": "yuv422p10le", "mjpeg": "yuvj420p"}
PIXEL_FORMATS |= {"huffyuv": "yuv422p", "ffv1": "yuv444p"}


@cache
def bases() -> list[tuple[str, bytes]]:
    """(extension, content) of sound files; those that this FFmpeg can't write are left out."""
    found: list[tuple[str, bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        for extension, codec, options, container_options in VIDEOS:
            path = Path(folder, f"base.{extension}")
            try:
                write(path, codec, options, container_options)
            except (av.FFmpegError, ValueError):
                continue
            found.append((extension, path.read_bytes()))
        image = Image.fromarray(picture(0))
        images: tuple[tuple[str, dict[str, Any]], ...] = (
            ("png", {}),
            ("png", {"mode": "RGBA"}),
            ("png", {"mode": "P"}),
            ("jpg", {}),
            ("jpg", {"progressive": True}),
            ("jpg", {"mode": "CMYK"}),
            ("webp", {}),
            ("webp", {"lossless": True, "mode": "RGBA"}),
            ("gif", {"save_all": True, "append_images": [Image.fromarray(picture(1))]}),
        )
        for extension, settings in images:
            options = dict(settings)
            path = Path(folder, f"base.{extension}")
            image.convert(str(options.pop("mode", "RGB"))).save(path, **options)
            found.append((extension, path.read_bytes()))
    real = [path for path in sorted(SHARED.glob("*/*")) if path.suffix.lower()[1:] in EXTENSIONS]
    small = [path for path in real if 0 < path.stat().st_size <= MAX_BASE_BYTES]
    return found + [(path.suffix.lower()[1:], path.read_bytes()) for path in small]


def picture(number: int) -> np.ndarray:
    """A moving texture."""
    coarse = np.random.default_rng(0).integers(0, 255, (8, 12, 3), np.uint8)
    return np.roll(coarse.repeat(8, 0).repeat(8, 1), number * 3, axis=1)


def write(
    path: Path, codec: str, options: dict[str, str], container_options: dict[str, str]
) -> None:
    form = FORMATS.get(path.suffix[1:], path.suffix[1:])
    with av.open(str(path), "w", format=form, container_options=container_options) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = WIDTH, HEIGHT  # pyright: ignore[reportAttributeAccessIssue]
        stream.pix_fmt = PIXEL_FORMATS.get(codec, "yuv420p")  # pyright: ignore
        for number in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            container.mux(stream.encode(frame))  # pyright: ignore
        container.mux(stream.encode(None))  # pyright: ignore


# ------------------------------------------------------------------------------------------ damage

Damage = Callable[[random.Random, bytearray], bytearray]


def position(rng: random.Random, data: bytearray) -> int:
    """Anywhere, but in half of the cases near the beginning or the end, where headers are."""
    end = max(1, len(data))
    where = rng.random()
    if where < 0.4:
        return rng.randrange(min(end, 2000))
    return rng.randrange(max(0, end - 3000), end) if where < 0.6 else rng.randrange(end)


def flip(rng: random.Random, data: bytearray) -> bytearray:
    for _ in range(rng.choice((1, 1, 2, 5, 30, 300))):
        data[position(rng, data)] ^= rng.randrange(1, 256)
    return data


def cut(rng: random.Random, data: bytearray) -> bytearray:
    length = rng.randrange(len(data)) if rng.random() < 0.7 else rng.randrange(min(len(data), 300))
    return data[:length] if rng.random() < 0.7 else data[length:]


def fill(rng: random.Random, data: bytearray) -> bytearray:
    start, length = position(rng, data), rng.choice((4, 16, 200, 5000, len(data)))
    length = min(length, len(data) - start)
    data[start : start + length] = rng.choice((b"\0", b"\xff", b"A")) * length
    return data


def scramble(rng: random.Random, data: bytearray) -> bytearray:
    start, length = position(rng, data), rng.choice((4, 16, 200, 5000))
    data[start : start + length] = rng.randbytes(length)
    return data


def remove(rng: random.Random, data: bytearray) -> bytearray:
    start = position(rng, data)
    del data[start : start + rng.choice((1, 4, 8, 100, 5000))]
    return data


def repeat(rng: random.Random, data: bytearray) -> bytearray:
    start, length = position(rng, data), rng.choice((1, 8, 100, 5000))
    piece = data[start : start + length] * rng.choice((1, 2, 50))
    return data[:start] + piece + data[start:]


NUMBERS = (0, 1, 2, 7, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x3FFFFFFF, 0x7FFFFFFF, 0x80000000)
NUMBERS += (0xFFFFFFF0, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)


def number(rng: random.Random, data: bytearray) -> bytearray:
    """Replace an integer somewhere by one that is rarely expected."""
    for _ in range(rng.choice((1, 1, 3))):
        start, size = position(rng, data), rng.choice((1, 2, 4, 4, 8))
        value = rng.choice(NUMBERS) % (1 << 8 * size)
        data[start : start + size] = value.to_bytes(size, rng.choice(("big", "little")))
    return data


def dimension(rng: random.Random, data: bytearray) -> bytearray:
    """Claim another width, height, number of frames or rate where the sound one is stored."""
    sought = rng.choice((WIDTH, HEIGHT, FRAMES, 25))
    size, order = rng.choice((1, 2, 2, 4)), rng.choice(("big", "little"))
    claimed = rng.choice((0, 1, 3, 4096, 11_000, 16_384, 30_000, 65_535, 2**31 - 1)) % 256**size
    old, new = sought.to_bytes(size, order), claimed.to_bytes(size, order)
    places = [match.start() for match in re.finditer(re.escape(old), data)]
    for start in rng.sample(places, min(len(places), rng.choice((1, 2, 20)))):
        data[start : start + size] = new
    return data


def parts(data: bytearray) -> list[tuple[int, int]]:
    """(start, end) of what looks like MP4 boxes, PNG chunks or RIFF chunks, also nested ones."""
    found: list[tuple[int, int]] = []
    for match in re.finditer(rb"[A-Za-z][A-Za-z0-9 ]{3}", data):
        start = match.start()
        before = int.from_bytes(data[max(0, start - 4) : start], "big")
        after = int.from_bytes(data[start + 4 : start + 8], "little")
        if 8 <= before <= len(data) - start + 4:
            found.append((start - 4, start - 4 + before))
        if 0 < after <= len(data) - start - 8:
            found.append((start, start + 8 + after))
    return found


def swap_parts(rng: random.Random, data: bytearray) -> bytearray:
    found = parts(data)
    if len(found) < 2:
        return flip(rng, data)
    (a, b), (c, d) = sorted(rng.sample(found, 2))
    if b > c:  # one is in the other
        return data[:a] + data[b:] if rng.random() < 0.5 else data[:b] + data[a:b] + data[b:]
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def size_of_part(rng: random.Random, data: bytearray) -> bytearray:
    for start, end in rng.sample(found := parts(data), min(len(found), rng.choice((1, 1, 4)))):
        is_box = int.from_bytes(data[start : start + 4], "big") == end - start
        claimed = rng.choice((*NUMBERS, end - start + 1, end - start - 1, end - start + 8))
        place, order = (start, "big") if is_box else (start + 4, "little")
        data[place : place + 4] = (claimed % 2**32).to_bytes(4, order)
    return data


def name_of_part(rng: random.Random, data: bytearray) -> bytearray:
    """Another codec or kind of part."""
    names = [match.start() for match in re.finditer(rb"[A-Za-z][A-Za-z0-9 ]{3}", data)]
    for start in rng.sample(names, min(len(names), rng.choice((1, 1, 3)))):
        other = rng.choice(names)
        unknown = bytes(rng.choice(b"abcxyzXYZ0 ") for _ in range(4))
        data[start : start + 4] = unknown if rng.random() < 0.5 else data[other : other + 4]
    return data


def codec(rng: random.Random, data: bytearray) -> bytearray:
    known = (b"avc1", b"hev1", b"av01", b"mp4v", b"apcn", b"FMP4", b"MJPG", b"HFYU", b"WMV2")
    known += (b"V_VP9", b"V_VP8", b"V_MPEG4/ISO/AVC", b"V_FFV1", b"png ", b"theora")
    other = rng.choice((*known, b"zvc1", b"hap1", b"FPS1", b"TSCC", b"cvid", b"VP60", b"\0\0\0\0"))
    for name in known:
        if name in data:
            return bytearray(data.replace(name, other[: len(name)].ljust(len(name))))
    return name_of_part(rng, data)


def join(rng: random.Random, data: bytearray) -> bytearray:
    other = rng.choice(bases())[1]
    return data + other if rng.random() < 0.5 else bytearray(other) + data


DAMAGES: Sequence[Damage] = (
    *(flip, flip, cut, cut, fill, scramble, remove, repeat, number, number, dimension, dimension),
    *(swap_parts, size_of_part, size_of_part, name_of_part, codec, join),
)


def with_checksums(data: bytearray) -> bytearray:
    """A PNG whose chunks have the right checksums, so that its damage is not found by them."""
    place = 8
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        end = place + 8 + length
        if end + 4 > len(data):
            break
        data[end : end + 4] = zlib.crc32(data[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return data


def make(seed: int, folder: Path) -> list[str]:
    """One damaged clip with its caption, in some cases with a damaged or sound mask."""
    rng = random.Random(seed)
    extension, content = rng.choice(bases())
    if rng.random() < 0.1:
        extension = rng.choice(EXTENSIONS)
    clips = folder / "clips"
    clips.mkdir()
    is_clip_sound = rng.random() < 0.1
    (clips / f"clip.{extension}").write_bytes(content if is_clip_sound else damaged(rng, content))
    caption = rng.choice((b"a test", b"", b"\xff\xfe", b"a\0b", rng.randbytes(40)))
    (clips / "clip.txt").write_bytes(b"a test" if rng.random() < 0.9 else caption)
    if is_clip_sound or rng.random() < 0.1:
        kind, content = rng.choice(bases())
        (clips / f"clip.mask.{kind}").write_bytes(damaged(rng, content))
    return [str(clips), rng.choice(("uniform", "random", "keyframe"))]


def damaged(rng: random.Random, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if data:
            data = rng.choice(DAMAGES)(rng, data)
    if data.startswith(b"\x89PNG") and rng.random() < 0.7:
        data = with_checksums(data)
    return bytes(data)


if __name__ == "__main__":
    run_cases(__doc__, make, run)
