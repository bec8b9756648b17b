"""What is shown of a clip is what the VAE gets; an edited caption alone is encoded anew."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.runs import RunFile
from test_encode import prepared
from torch import Tensor

from onewan.config.schema import ResolvedRun
from onewan.data.caption_places import CaptionStore, TextFile, origins
from onewan.data.clip import Clip
from onewan.data.clip_views import ClipViews, View, crop_of, view_frames, views_of
from onewan.data.probes import MediaProbes
from onewan.data.run_clips import clips_of_run, with_contents
from onewan.errors import DataError
from onewan.files import file_digest
from onewan.media import probe, read_frames, write_video
from onewan.model.wan import WanModel

FOOTAGE = {
    "good": ("rabbit_stretches", "rabbit_portrait", "trucks_from_above"),
    "odd": ("rotated_90", "variable_frame_rate", "hevc_10bit"),
    "field": ("int_h264", "p3"),
}


@pytest.fixture
def footage(clips: Path, tmp_path: Path) -> Path:
    """A folder of real clips: some that are read wrong easily, one with a mask."""
    folder = tmp_path / "footage"
    folder.mkdir()
    for place, names in FOOTAGE.items():
        for name in names:
            for path in (clips / place).glob(f"{name}.*"):
                shutil.copy(path, folder)
    mask = Image.new("L", probe(folder / "rabbit_stretches.mp4").shown_size)
    mask.paste(255, (0, 0, mask.width // 2, mask.height))
    mask.save(folder / "rabbit_stretches.mask.png")
    return folder


def clips_of(config: ResolvedRun) -> tuple[Clip, ...]:
    report = clips_of_run(config, MediaProbes())
    digests = {clip.path: file_digest(clip.path) for clip in report.clips}
    return with_contents(config, report, digests).clips


def test_the_frames_shown_are_those_the_vae_gets(
    footage: Path, run_file: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of spans, rates, crops, flips, colors, fields and rotations, pixel for pixel."""
    config = run_file(
        "t2v-a14b",
        f"video_data.sources=[{{path: {footage.as_posix()}, "
        "augment: {flip: 0.5, crop: 0.3, brightness: 0.1, variants: 2}}]",
        f"video_data.cache_dir={footage.parent / 'cache'}",
        "wan_config={max_frames: 9, frame_sample_strategy: uniform, clips_per_video: 2}",
        "video_data.supported_formats=[mp4, webm, mov, avi, mkv]",
        "video_data.min_resolution=[1, 1]",
        "video_data.masks=true",
    )
    encoded = list[bytes]()

    def recording(_: WanModel, pixels: Tensor) -> Tensor:
        encoded.append(pixels[0].permute(1, 2, 3, 0).contiguous().numpy().tobytes())
        frames, height, width = pixels.shape[2:]
        return torch.zeros(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)

    monkeypatch.setattr(WanModel, "encode_video", recording)
    prepared(config)
    clips = clips_of(config)
    shown = [
        # The VAE's range, as `onewan.data.encode` has it.
        torch.from_numpy(view_frames(clip, "trained", config.model.facts()))
        .float()
        .div_(127.5)
        .sub_(1)
        .numpy()
        .tobytes()
        for clip in clips
    ]
    assert len(encoded) > 20
    assert any(clip.variation and clip.variation.mirrored for clip in clips)
    assert sorted(set(shown)) == sorted(set(encoded))


def test_the_player_has_every_frame_at_the_rate_of_the_model(
    footage: Path, run_file: RunFile, tmp_path: Path
) -> None:
    config = run_file(
        "t2v-a14b",
        f"video_data.sources=[{{path: {footage.as_posix()}}}]",
        "video_data.target_fps=24",
    )
    clip = next(clip for clip in clips_of(config) if clip.path.stem == "trucks_from_above")
    variant = config.model.facts()
    file = ClipViews(tmp_path / "views").file(clip, "trained", variant)
    info = probe(file)
    assert (info.width, info.height) == clip.size
    assert round(1 / info.frame_interval) == variant.fps == 16
    played = read_frames(file, [info.start + k / 16 for k in range(clip.frames)])
    assert info.last - info.start == pytest.approx((clip.frames - 1) / 16)
    trained = view_frames(clip, "trained", variant)
    # H.264 at a quality at which a person sees no difference; each frame is at its place.
    error = np.abs(played[:, None].astype(int) - trained[None]).mean(axis=(2, 3, 4))
    assert error.diagonal().max() < 6
    assert (error.argmin(axis=1) == np.arange(clip.frames)).all()


def test_the_crop_is_where_the_trained_frames_are_in_the_original(
    footage: Path, run_file: RunFile
) -> None:
    config = run_file(
        "t2v-a14b",
        f"video_data.sources=[{{path: {footage.as_posix()}, include: ['trucks*', '*portrait*'], "
        "augment: {crop: 0.4, variants: 2}}]",
        "video_data.resolution=64x96",
        "video_data.min_resolution=[1, 1]",
    )
    clips = clips_of(config)
    assert any(clip.variation for clip in clips)
    for clip in clips:
        original = view_frames(clip, "original", config.model.facts())[0]
        height, width = original.shape[:2]
        left, top, across, down = crop_of(clip)
        box = (left * width, top * height, (left + across) * width, (top + down) * height)
        cut = Image.fromarray(original).resize(clip.size, Image.Resampling.BICUBIC, box=box)
        trained = view_frames(clip, "trained", config.model.facts())[0]
        away = Image.fromarray(original).resize(clip.size, Image.Resampling.BICUBIC)
        error, other = (np.abs(np.asarray(p, int) - trained).mean() for p in (cut, away))
        assert error < 6
        assert error < other / 2


def test_masks_and_conditions_are_shown(footage: Path, run_file: RunFile) -> None:
    Image.new("RGB", (64, 64), "red").save(footage / "rabbit_stretches.condition.png")
    write_video(footage / "rabbit_stretches.control.mp4", control_of(footage), 24)
    config = run_file(
        "fun-control-a14b",
        f"video_data.sources=[{{path: {footage.as_posix()}}}]",
        "video_data.masks=true",
        "video_data.min_resolution=[1, 1]",
    )
    variant = config.model.facts()
    clip = next(clip for clip in clips_of(config) if clip.path.stem == "rabbit_stretches")
    assert views_of(clip) == ("trained", "original", "mask", "control", "condition")
    masked, trained = (view_frames(clip, view, variant) for view in ("mask", "trained"))
    half = clip.size[0] // 2
    assert (masked[:, :, : half - 8] == trained[:, :, : half - 8]).all()
    assert (masked[:, :, half + 8 :] != trained[:, :, half + 8 :]).mean() > 0.9
    assert view_frames(clip, "control", variant).shape == trained.shape
    assert np.abs(view_frames(clip, "condition", variant)[0, 32, 32] - [255, 0, 0]).max() < 9
    without = replace(clip, mask=None)
    assert "mask" not in views_of(without)
    with pytest.raises(DataError, match="has no mask"):
        view_frames(without, "mask", variant)


def control_of(footage: Path) -> np.ndarray:
    info = probe(footage / "rabbit_stretches.mp4")
    frames = round((info.last - info.start) * 24) + 2
    return np.full((frames, info.height, info.width, 3), 90, np.uint8)


def test_views_are_kept_up_to_a_size_and_made_anew_for_another_file(
    footage: Path, run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_file("t2v-a14b", f"video_data.sources=[{{path: {footage.as_posix()}}}]")
    variant, clips = config.model.facts(), clips_of(config)
    made = list[tuple[str, View]]()

    def recording(clip: Clip, view: View, *given: object) -> np.ndarray:
        made.append((clip.name, view))
        return view_frames(clip, view, *given)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr("onewan.data.clip_views.view_frames", recording)
    views = ClipViews(tmp_path / "views")
    first = views.file(clips[0], "poster", variant)
    # An edited caption makes no picture anew.
    assert views.file(replace(clips[0], captions=("another",)), "poster", variant) == first
    assert made == [(clips[0].name, "poster")]
    clips[0].path.touch()
    assert views.file(clips[0], "poster", variant) != first
    posters = [views.file(clip, "poster", variant) for clip in clips]
    os.utime(posters[0], (0, 0))
    video = views.file(clips[0], "trained", variant)
    views.most_bytes = sum(file.stat().st_size for file in (*posters[1:], video))
    # One more makes room for itself: what was looked at longest ago goes.
    other = views.file(clips[1], "trained", variant)
    kept = set(views.folder.iterdir())
    assert other in kept
    assert posters[0] not in kept
    assert sum(file.stat().st_size for file in kept) <= views.most_bytes


def test_an_edited_caption_is_the_only_thing_encoded_anew(
    run_file: RunFile, workshop: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(workshop / "clips", tmp_path / "clips")
    config = run_file(
        "t2v-a14b",
        f"video_data.sources=[{{path: {folder.as_posix()}}}]",
        f"video_data.cache_dir={tmp_path / 'cache'}",
    )
    _, first = prepared(config)
    assert dict(first)["encoding clips"] > 1
    place = next(iter(origins(config).values())).place
    assert isinstance(place, TextFile)
    store = CaptionStore()
    store.write(place, "an edited caption", store.read(place).digest)
    data, again = prepared(config)
    assert dict(again) == {"encoding captions": 1}
    assert data.encoded == 1
