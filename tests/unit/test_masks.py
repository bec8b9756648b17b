"""Loss masks: cropped and scaled like their clips, white is 1, black 0, unusable ones reported."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageDraw
from support.clips import planner

from onewan.data.clip import Clip, ClipSource
from onewan.data.companions import Companion
from onewan.data.decode import decode
from onewan.data.index import index_clips
from onewan.data.masks import latent_mask
from onewan.data.report import DatasetReport
from onewan.errors import DataError
from onewan.media import write_video

SIZE = (112, 64)
TRAIN = (48, 64)
"""Another aspect ratio than that of `SIZE`, so that clips are cropped."""


def moving(frames: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A disc that moves across a dark background and gets brighter: uint8 [F, H, W, 3]."""
    out = []
    for k in range(frames):
        image = Image.new("RGB", size, (10, 40, 5))
        x, y = size[0] * (0.2 + 0.6 * k / max(1, frames - 1)), size[1] / 2
        level = 100 + 4 * (k % 38)
        ImageDraw.Draw(image).ellipse((x - 20, y - 20, x + 20, y + 20), fill=(level, 255, level))
        out.append(np.asarray(image))
    return np.stack(out)


def flat(frames: int, levels: int | np.ndarray, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Frames of a single gray level each."""
    levels = np.broadcast_to(np.asarray(levels, np.uint8), frames)
    pixels = np.broadcast_to(levels[:, None, None, None], (frames, size[1], size[0], 3))
    return np.ascontiguousarray(pixels)


def write_clip(path: Path, pixels: np.ndarray | None = None, fps: float = 16) -> Path:
    write_video(path, moving(32) if pixels is None else pixels, fps)
    path.with_suffix(".txt").write_text("a test", encoding="utf-8")
    return path


def index(folder: Path, *, use_masks: bool = True, **settings: object) -> DatasetReport:
    sized = planner(resolutions=(f"{TRAIN[0]}x{TRAIN[1]}",), **settings)
    return index_clips([ClipSource(path=folder)], sized, use_masks=use_masks)


def only(report: DatasetReport) -> Clip:
    assert not report.problems
    (clip,) = report.clips
    return clip


def values(clip: Clip) -> np.ndarray:
    assert clip.mask
    return latent_mask(
        clip.mask, fps=clip.fps, frames=clip.frames, size=clip.size, spatial=8, temporal=4
    )


def averaged_per_cell(frames: np.ndarray) -> np.ndarray:
    """[1, F, h, w] of pixels uint8 [4n+1, H, W, 3], in float64, latent cell by latent cell."""
    gray = frames.astype(np.float64) @ [0.299, 0.587, 0.114] / 255
    count, height, width = gray.shape
    groups = [[0], *([4 * k - 3, 4 * k - 2, 4 * k - 1, 4 * k] for k in range(1, count // 4 + 1))]
    return np.array(
        [
            [
                [gray[group, y : y + 8, x : x + 8].mean() for x in range(0, width, 8)]
                for y in range(0, height, 8)
            ]
            for group in groups
        ]
    )[None]


def delay_timestamps(path: Path, seconds: float) -> Path:
    """Rewrite the file `path` with all timestamps `seconds` later; returns `path`."""
    out = path.with_name(f"delayed{path.suffix}")
    with av.open(str(path)) as source, av.open(str(out), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.pts is None or packet.dts is None:
                continue
            offset = round(seconds / packet.time_base)
            packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
            packet.stream = copy
            target.mux(packet)
    return out.replace(path)


# --- Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SIZE, (64, 112), (80, 106)])
def test_a_mask_is_transformed_exactly_like_its_clip(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    """With one file as clip and mask: crop, scaling, span and order of frames agree."""
    path = write_clip(tmp_path / "a.mp4", moving(40, shape))
    (tmp_path / "a.mask.mp4").write_bytes(path.read_bytes())
    clip = only(index(tmp_path))
    assert clip.start > 0.5 and clip.size == TRAIN
    got = values(clip)
    assert got.dtype == np.float32 and got.shape == (1, 5, 8, 6)
    assert len(np.unique(got)) > 50
    np.testing.assert_allclose(got, averaged_per_cell(decode(clip).frames), rtol=0, atol=1e-7)


@pytest.mark.parametrize("clip_later", [0.0, 1.5])
@pytest.mark.parametrize("mask_later", [0.0, 0.75])
def test_clip_and_mask_may_begin_at_different_times(
    tmp_path: Path, clip_later: float, mask_later: float
) -> None:
    path = write_clip(tmp_path / "a.webm", moving(40))
    mask = tmp_path / "a.mask.webm"
    mask.write_bytes(path.read_bytes())
    for file, seconds in ((path, clip_later), (mask, mask_later)):
        if seconds:
            delay_timestamps(file, seconds)
    clip = only(index(tmp_path))
    assert clip.mask and clip.start - clip.mask.start == pytest.approx(clip_later - mask_later)
    np.testing.assert_allclose(
        values(clip), averaged_per_cell(decode(clip).frames), rtol=0, atol=1e-7
    )


def test_one_image_is_the_mask_of_all_frames(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4")
    picture = np.random.default_rng(3).integers(0, 256, (TRAIN[1], TRAIN[0], 3), np.uint8)
    mask = Companion(path=tmp_path / "a.mask.png", start=0.0, is_image=True)
    Image.fromarray(picture).save(mask.path)
    for frames in (1, 17):
        got = latent_mask(mask, fps=16, frames=frames, size=TRAIN, spatial=8, temporal=4)
        assert got.shape == (1, (frames + 3) // 4, 8, 6)
        same = np.broadcast_to(picture, (frames, *picture.shape))
        np.testing.assert_allclose(got, averaged_per_cell(same), rtol=0, atol=1e-7)


def test_latent_cells_follow_the_compression_of_the_vae(tmp_path: Path) -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:16, 32:48] = 255
    mask = Companion(path=tmp_path / "a.mask.png", start=0.0, is_image=True)
    Image.fromarray(picture).save(mask.path)
    got = latent_mask(mask, fps=24, frames=5, size=(64, 64), spatial=16, temporal=4)
    assert got.shape == (1, 2, 4, 4)
    assert np.argwhere(got).tolist() == [[0, 0, 0, 2], [0, 1, 0, 2]] and got.max() == 1


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "mp4", "mov", "webm", "avi"])
@pytest.mark.parametrize(("level", "value"), [(255, 1.0), (0, 0.0)])
def test_white_is_one_and_black_is_zero_in_every_format(
    tmp_path: Path, kind: str, level: int, value: float
) -> None:
    """Exactly, after each codec, cropping and scaling."""
    write_clip(tmp_path / "a.mp4")
    mask = tmp_path / f"a.mask.{kind}"
    if kind in ("png", "jpg", "webp"):
        Image.new("L", (150, 86), level).save(mask)
    else:
        write_video(mask, flat(32, level, (150, 86)), 16)
    assert (values(only(index(tmp_path))) == value).all()


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4")
    Image.new("RGBA", SIZE, (0, 0, 0, 0)).save(tmp_path / "a.mask.png")
    assert (values(only(index(tmp_path))) == 1).all()


@pytest.mark.parametrize(("fps", "frames"), [(8, 9), (16, 17), (32, 33)])
def test_a_mask_video_may_have_another_frame_rate(tmp_path: Path, fps: int, frames: int) -> None:
    """White from half a second on, which is pixel frame 8 of the clip at any rate of the mask."""
    write_clip(tmp_path / "a.mp4", moving(17))
    levels = np.where(np.arange(frames) / fps >= 0.5, 255, 0)
    write_video(tmp_path / "a.mask.mp4", flat(frames, levels), fps)
    got = values(only(index(tmp_path)))[0, :, 4, 3]
    # At 8 fps frame 7 (7/16 s) is midway between two of the mask, and the earlier one is taken.
    assert got == pytest.approx([0, 0, 0.25, 1, 1], abs=0.02)


# --- Pairing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clip", "mask"),
    [
        ("a.mp4", "a.mask.png"),
        ("a.mp4", "a.MASK.PNG"),
        ("a.webm", "a.mask.mp4"),
        ("part 1.take.2.mp4", "part 1.take.2.mask.jpg"),
    ],
)
def test_a_mask_is_found_by_name(tmp_path: Path, clip: str, mask: str) -> None:
    write_clip(tmp_path / clip)
    write_clip(tmp_path / "b.mp4")
    if mask.endswith("mp4"):
        write_video(tmp_path / mask, moving(32), 16)
    else:
        Image.new("L", SIZE).save(tmp_path / mask)
    report = index(tmp_path)
    assert not report.problems and not report.warnings
    found = {each.name: each.mask and each.mask.path for each in report.clips}
    assert found == {clip: tmp_path / mask, "b.mp4": None}
    assert "  with a mask: 1 clip" in report.lines()


def test_an_image_can_have_a_mask(tmp_path: Path) -> None:
    Image.new("RGB", SIZE, "red").save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("red")
    Image.new("L", SIZE, 255).save(tmp_path / "a.mask.png")
    assert values(only(index(tmp_path))).shape == (1, 1, 8, 6)


def test_masks_without_a_clip_are_warned_about(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4")
    write_clip(tmp_path / "sub.mp4")
    (tmp_path / "sub").mkdir()
    for name in ("b.mask.png", "sub/a.mask.png"):
        Image.new("L", SIZE).save(tmp_path / name)
    (tmp_path / "b.mask.txt").write_text("a caption")
    report = index(tmp_path)
    assert [clip.mask for clip in report.clips] == [None, None]
    found = {(str(w.path.relative_to(tmp_path)), w.text) for w in report.warnings if w.path}
    lonely = "mask without a video or image of its name; unused"
    assert found == {
        ("b.mask.png", lonely),
        (str(Path("sub/a.mask.png")), lonely),
        ("b.mask.txt", "caption file without a video or image of its name; unused"),
    }


def test_masks_are_counted_if_they_are_switched_off(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4")
    Image.new("L", SIZE).save(tmp_path / "a.mask.png")
    report = index(tmp_path, use_masks=False)
    assert only(report).mask is None
    assert [(warning.path, warning.text) for warning in report.warnings] == [
        (None, f"1 mask file is not used (video_data.masks is false): {tmp_path}")
    ]
    (tmp_path / "b.mask.mp4").write_bytes(b"")
    report = index(tmp_path, use_masks=False)
    assert [clip.name for clip in report.clips] == ["a.mp4"] and not report.problems
    assert "2 mask files are not used (video_data.masks is false)" in str(report)


# --- Masks that can't be used --------------------------------------------------------------------


def _video(frames: int, size: tuple[int, int] = SIZE, fps: float = 16):
    return lambda path: write_video(path, flat(frames, 255, size), fps)


def _image(size: tuple[int, int]):
    return lambda path: Image.new("L", size, 255).save(path, format="png")


def _truncated_image(path: Path) -> None:
    Image.fromarray(moving(1)[0]).save(path)
    path.write_bytes(path.read_bytes()[:100])


def _bytes(content: bytes):
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("names", "write", "reason"),
    [
        (
            ["a.mask.mp4"],
            _video(23),
            "its mask a.mask.mp4 is too short (its last frame is at 1.38 s, the clip's at 1.44 s); "
            "make it as long as the clip",
        ),
        (
            ["a.mask.png"],
            _image((64, 112)),
            "its mask a.mask.png has another aspect ratio (shown 64x112, the clip 112x64); make it "
            "112x64, or of the same aspect ratio",
        ),
        (["a.mask.png"], _image((112, 66)), "its mask a.mask.png has another aspect ratio"),
        (["a.mask.mp4"], _video(32, (64, 64)), "its mask a.mask.mp4 has another aspect ratio"),
        (
            ["a.mask.mp4", "a.mask.png"],
            _bytes(b""),
            "has 2 masks (a.mask.mp4, a.mask.png); keep one",
        ),
        (
            ["a.mask.mkv"],
            _bytes(b"any"),
            "mkv of its mask a.mask.mkv is not among video_data.supported_formats (mp4, avi, mov, "
            "webm); add mkv there to use it",
        ),
        (
            ["a.mask.tga"],
            _bytes(b"any"),
            "its mask a.mask.tga is neither an image (apng, avif, bmp, heic, heif, hif, jfif, jpe, "
            "jpeg, jpg, png, tif, tiff, webp) nor a video; save it as one of them",
        ),
        (
            ["a.mask.mp4"],
            _bytes(b"no video"),
            "its mask a.mask.mp4 is not a video that FFmpeg can read",
        ),
        (
            ["a.mask.png"],
            _truncated_image,
            "its mask a.mask.png is not an image that can be read (image file is truncated",
        ),
        (["a.mask.webm"], _bytes(b""), "its mask a.mask.webm is empty (0 bytes)"),
    ],
)
def test_a_clip_whose_mask_is_wrong_is_left_out(tmp_path: Path, names, write, reason: str) -> None:
    """Training it without its mask would teach what the mask hides."""
    path = write_clip(tmp_path / "a.mp4")  # its 17 frames begin with frame 7, at 0.44 s
    write_clip(tmp_path / "b.mp4")
    for name in names:
        write(tmp_path / name)
    report = index(tmp_path)
    assert [clip.name for clip in report.clips] == ["b.mp4"]
    (problem,) = report.problems
    assert problem.path == path and problem.reason.startswith(reason)
    assert "; " in problem.reason and str(tmp_path) not in problem.reason


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.mask.mp4", _video(24)),  # as long as needed
        ("a.mask.webm", _video(24)),  # whose times are rounded
        ("a.mask.mp4", _video(12, fps=8)),  # its last frame is shown for half an interval more
        ("a.mask.png", _image((223, 128))),  # off by a pixel
    ],
)
def test_masks_at_the_limits_are_accepted(tmp_path: Path, name: str, write) -> None:
    write_clip(tmp_path / "a.mp4")
    write(tmp_path / name)
    assert (values(only(index(tmp_path))) == 1).all()


def test_a_mask_of_an_added_video_format_is_used(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4")
    write_video(tmp_path / "x.mp4", flat(32, 255), 16)
    (tmp_path / "x.mp4").rename(tmp_path / "a.mask.m4v")
    assert index(tmp_path).problems
    assert (values(only(index(tmp_path, video_formats=("mp4", "m4v")))) == 1).all()


def test_a_mask_has_the_aspect_ratio_that_a_player_shows(tmp_path: Path, clips: Path) -> None:
    """The pixels of this clip are not square: stored as 176x144, shown as 193x144."""
    (tmp_path / "a.webm").write_bytes((clips / "good" / "man_in_car.webm").read_bytes())
    (tmp_path / "a.txt").write_text("a man")
    _image((176, 144))(tmp_path / "a.mask.png")
    (problem,) = index(tmp_path).problems
    assert "(shown 176x144, the clip 193x144); make it 193x144" in problem.reason
    _image((193, 144))(tmp_path / "a.mask.png")
    assert (values(only(index(tmp_path))) == 1).all()


def test_damage_within_a_mask_is_an_error_that_names_the_mask(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4")
    noise = np.random.default_rng(3).integers(0, 256, (32, SIZE[1], SIZE[0], 3), np.uint8)
    write_video(tmp_path / "a.mask.avi", noise, 16)
    content = bytearray((tmp_path / "a.mask.avi").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 500] = bytes(500)
    (tmp_path / "a.mask.avi").write_bytes(content)
    clip = only(index(tmp_path))
    with pytest.raises(DataError, match=r"a\.mask\.avi: is damaged near"):
        values(clip)


def test_an_animated_image_is_a_mask_over_time(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", np.zeros((17, 64, 96, 3), np.uint8), 16)
    (tmp_path / "a.txt").write_text("a")
    frames = [Image.new("RGB", (96, 64), "white" if k < 9 else "black") for k in range(17)]
    for k, frame in enumerate(frames):
        frame.putpixel((k, 0), (128, 128, 128))  # or equal frames would be joined
    durations = [62, 63] * 8 + [62]
    frames[0].save(
        tmp_path / "a.mask.webp",
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        lossless=True,
    )
    clip = only(index(tmp_path))
    assert clip.mask and not clip.mask.is_image
    assert values(clip).mean(axis=(0, 2, 3)).round(2).tolist() == [1, 1, 1, 0, 0]
