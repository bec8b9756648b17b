"""Variants of clips: what is drawn, what changes in pixels and masks, and what is encoded."""

from __future__ import annotations

import colorsys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onewan.data.augment import Augmentation, Variation
from onewan.data.augmented import with_variants
from onewan.data.clip import Clip, ClipSource
from onewan.data.decode import decode, frames_at
from onewan.data.entry_keys import EntryKeys
from onewan.data.index import index_clips
from onewan.data.masks import latent_mask
from onewan.data.validation_split import split_validation_clips
from onewan.media import write_video
from onewan.variants import VARIANTS
from tests.support.clips import clip, planner

SIZE = (64, 48)
NOTHING = {"flip": 0, "crop": 0, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}


def augmentation(**values: float) -> Augmentation:
    return Augmentation(**{**NOTHING, "variants": 3, **values})  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video that is white on its left and has a red bar at the top, with a mask like it."""
    folder = tmp_path_factory.mktemp("augmented")
    picture = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    picture[:, :24] = 255
    picture[:8, 32:] = (200, 30, 30)
    write_video(folder / "a.mp4", np.stack([picture] * 9), fps=16)
    (folder / "a.txt").write_text("a caption", encoding="utf-8")
    Image.fromarray(picture).save(folder / "a.mask.png")
    return folder / "a.mp4"


def clip_of(video: Path, **settings: object) -> Clip:
    source = ClipSource(path=video.parent, **settings)  # pyright: ignore[reportArgumentType]
    chooser = planner(max_frames=9, resolutions=("64x48",))
    (found,) = index_clips([source], chooser, use_masks=True).clips
    return found


# --- What is drawn -------------------------------------------------------------------------------


def test_variants_depend_on_the_seed_and_the_content() -> None:
    ranges = augmentation(flip=0.5, crop=0.2, brightness=0.1, contrast=0.1, hue=0.02)
    found = ranges.variations(7, "content")
    assert len(set(found)) == 3
    assert ranges.variations(7, "content") == found
    assert ranges.variations(8, "content") != found != ranges.variations(7, "other")
    # More variants, or another range, leave the others as they are.
    assert replace(ranges, variants=5).variations(7, "content")[:3] == found
    wider = replace(ranges, contrast=0.2).variations(7, "content")
    assert [replace(each, contrast=1.0) for each in wider] == [
        replace(each, contrast=1.0) for each in found
    ]


def test_variants_keep_within_their_ranges() -> None:
    ranges = augmentation(
        flip=0.3, crop=0.2, brightness=0.1, contrast=0.2, saturation=0.3, hue=0.05, variants=1
    )
    found = [each for n in range(400) for each in ranges.variations(7, str(n))]
    assert 0.2 < np.mean([each.mirrored for each in found]) < 0.4
    for name, low, high in (
        ("kept", 0.8, 1.0),
        ("left", 0.0, 1.0),
        ("top", 0.0, 1.0),
        ("brightness", 0.9, 1.1),
        ("contrast", 0.8, 1.2),
        ("saturation", 0.7, 1.3),
        ("hue", -0.05, 0.05),
    ):
        values = [getattr(each, name) for each in found]
        margin = (high - low) / 20
        assert low <= min(values) < low + margin, name
        assert high - margin < max(values) <= high, name


def test_a_variant_that_changes_nothing_is_none() -> None:
    assert augmentation(flip=1, variants=4).variations(7, "a") == (Variation(mirrored=True),)
    found = [len(augmentation(flip=0.5, variants=1).variations(7, str(n))) for n in range(100)]
    assert 30 < sum(found) < 70


# --- What changes --------------------------------------------------------------------------------


def test_all_frames_are_mirrored_and_so_is_the_mask(video: Path) -> None:
    plain = clip_of(video)
    mirrored = replace(plain, variation=Variation(mirrored=True))
    before, after = decode(plain).frames, decode(mirrored).frames
    assert np.array_equal(after, before[:, :, ::-1]) and after.flags.c_contiguous
    assert plain.mask is not None
    masks = [
        latent_mask(
            plain.mask,
            fps=16,
            frames=9,
            size=SIZE,
            spatial=8,
            temporal=4,
            variation=each.variation,
        )
        for each in (plain, mirrored)
    ]
    assert np.array_equal(masks[1], masks[0][..., ::-1])
    assert not np.array_equal(masks[0], masks[1])


def test_a_crop_shows_the_same_part_in_frames_and_mask(video: Path) -> None:
    plain = clip_of(video)
    # Half of the width and height, at the bottom right: nothing of the white and the red is left.
    corner = replace(plain, variation=Variation(kept=0.5, left=1.0, top=1.0))
    frames = decode(corner).frames
    assert frames.shape == (9, 48, 64, 3) and frames[:, 4:, 4:].max() < 40
    top_left = replace(plain, variation=Variation(kept=0.5, left=0.0, top=0.0))
    frames = decode(top_left).frames
    assert frames[:, :, :44].min() > 215 and frames[:, 20:, 52:].max() < 40  # white to 24 of 32
    assert plain.mask is not None
    mask = latent_mask(
        plain.mask, fps=16, frames=9, size=SIZE, spatial=8, temporal=4, variation=top_left.variation
    )
    assert mask[..., :5].min() > 0.95 and mask[..., 7:].max() < 0.3


@pytest.mark.parametrize("hue", [0.0, 1 / 3, 0.02])
@pytest.mark.parametrize("saturation", [0.0, 0.7, 1.0])
def test_colors_change_as_their_names_say(hue: float, saturation: float) -> None:
    draw = np.random.default_rng(2)
    frames = draw.integers(60, 190, (2, 8, 8, 3), np.uint8)
    variation = Variation(brightness=1.1, contrast=0.8, saturation=saturation, hue=hue)
    changed = variation.applied(frames, (8, 8))
    assert changed.dtype == np.uint8 and changed.shape == frames.shape
    # Luma is left alone by hue and saturation, and scaled by brightness and contrast.
    luma = np.array([0.213, 0.715, 0.072])
    expected = (frames @ luma * 1.1 - 127.5) * 0.8 + 127.5
    assert np.abs(changed @ luma - expected).max() < 1.5
    if not saturation:
        assert np.ptp(changed, axis=-1).max() <= 1
    elif hue == 1 / 3:
        # Red turns to green, as a rotation of the hue does.
        red = np.full((1, 1, 1, 3), (190, 60, 60), np.uint8)
        found, *_ = colorsys.rgb_to_hsv(*(variation.applied(red, (1, 1))[0, 0, 0] / 255))
        assert 0.2 < found < 0.45


def test_colors_of_all_frames_change_alike() -> None:
    """Also if the frames differ in brightness: a contrast around their means would flicker."""
    dark, light = np.full((4, 4, 3), 30, np.uint8), np.full((4, 4, 3), 220, np.uint8)
    dark[0, 0] = light[0, 0] = (120, 90, 60)
    changed = Variation(contrast=1.3).applied(np.stack([dark, light]), (4, 4))
    assert np.array_equal(changed[0, 0, 0], changed[1, 0, 0])


# --- In a data set -------------------------------------------------------------------------------


def test_variants_are_alternatives_to_their_clip(video: Path) -> None:
    plain = clip_of(video, augmentation=augmentation(flip=1.0, brightness=0.1, variants=2))
    found = with_variants([plain], {video: "content"}, 7)
    assert [(each.take, each.takes) for each in found] == [(0, 3), (1, 3), (2, 3)]
    assert [each.name for each in found] == ["a.mp4", "a.mp4, variant 1", "a.mp4, variant 2"]
    assert found[0].variation is None and all(each.variation for each in found[1:])
    assert with_variants([plain], {video: "content"}, 7) == found
    other = clip("b")
    assert with_variants([other], {}, 7) == (other,)
    # Each of the random spans has its variants, and stays one place in an epoch.
    spans = [replace(plain, take=k, takes=2, start=k / 16) for k in range(2)]
    six = with_variants(spans, {video: "content"}, 7)
    assert [each.take for each in six] == list(range(6))
    assert [each.variation is None for each in six] == [True, True, False, False, False, False]


def test_validation_has_no_variants(video: Path) -> None:
    plain = clip_of(video, augmentation=augmentation(flip=1.0))
    copies = [replace(plain, path=Path(name), name=name) for name in ("a", "b")]
    content = {each.path: each.name for each in copies}
    clips = with_variants(copies, content, 7)
    training, (held_out,) = split_validation_clips(clips, 0.5, 7, content)
    assert held_out.variation is None and len(training) == 2


def test_a_variant_has_its_own_entries_in_the_cache(video: Path, tmp_path: Path) -> None:
    vae = tmp_path / "vae.safetensors"
    vae.write_bytes(b"weights")
    paths = {"vae": vae}
    plain = clip_of(video)
    assert plain.mask is not None
    digests = {video: "content", plain.mask.path: "mask"}
    keys = EntryKeys(
        variant=VARIANTS["t2v-a14b"],
        component_paths=paths,  # pyright: ignore[reportArgumentType]
        text_dtype="bfloat16",
        digests=digests,
    )
    variants = [
        replace(plain, variation=each)
        for each in (None, Variation(mirrored=True), Variation(hue=0.01), Variation(hue=0.02))
    ]
    assert len({keys.video(each) for each in variants}) == 4
    assert len({keys.mask(each, plain.mask) for each in variants[:2]}) == 2
    assert len({keys.preview(each) for each in variants}) == 4


def test_previews_show_the_variant(video: Path) -> None:
    plain = clip_of(video)
    mirrored = replace(plain, variation=Variation(mirrored=True))
    times = plain.times()[:1]
    assert np.array_equal(frames_at(mirrored, times), frames_at(plain, times)[:, :, ::-1])
