"""Real clips, good, odd and bad, through OneTrainer's data pipeline."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.clips import clip as make_clip
from support.onetrainer_configs import with_defaults
from support.onetrainer_runs import Lab, concept_of, config_of

from onewan.data.decode import decode
from onewan.data.encode import encode_frames
from onewan.demo.clips import write_clips
from onewan.errors import DataError
from onewan.model.load import WanModelLoader
from onewan.onetrainer import clip_adapter
from onewan.onetrainer.clip_adapter import (
    ConceptPlanner,
    DecodeCheckCache,
    cache_digest,
    crop_of,
    latent_mask_of,
    mask_of,
)
from onewan.variants import VARIANTS

SHARED = Path(__file__).parents[3] / "shared" / "clips"


@pytest.fixture
def everything(tmp_path: Path) -> Path:
    """All clips, those that can't be read too."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/clips")
    folder = tmp_path / "clips"
    for kind in ("good", "odd", "bad"):
        shutil.copytree(SHARED / kind, folder, dirs_exist_ok=True)
    return folder


@pytest.mark.parametrize("caching", [True, False])
def test_latents_equal_those_of_onewan_and_bad_files_are_skipped(
    lab: Lab, tiny, everything, tmp_path, monkeypatch, caching
):
    """Every clip, decoded and encoded by two threads; bad files are named."""
    latents = tmp_path / "latents"
    latents.mkdir()
    monkeypatch.setenv("RECORDER_LATENTS", str(latents))
    config = config_of(
        tmp_path,
        tiny("t2v-a14b"),
        everything,
        epochs=1,
        frames="9",
        latent_caching=caching,
        dataloader_threads=2,
        samples=[],
        sample_after_unit="NEVER",
    )
    done = lab.train(tmp_path, config)
    assert done.code == 0, done.log[-4000:]
    media = [p for p in everything.iterdir() if p.suffix != ".txt"]
    bad = {p.name for p in (SHARED / "bad").iterdir() if p.suffix != ".txt"}
    for name in bad:
        assert f"skipped: {everything / name}" in done.log, name
    read = {p.name.removesuffix(".pt"): torch.load(p, weights_only=True) for p in latents.iterdir()}
    assert read.keys() == {p.name for p in media} - bad
    assert len(read) == 16

    model = WanModelLoader().load(tiny("t2v-a14b"), "t2v-a14b")
    planner = ConceptPlanner(namespace(config), VARIANTS["t2v-a14b"])
    concept = with_defaults("concept", concept_of(everything))
    lengths = set()
    for name, found in read.items():
        clip, _ = planner.plan(str(everything / name), concept)
        lengths.add(clip.frames)
        assert torch.equal(
            encode_frames(model, decode(clip).frames, "float32", with_condition=False)["latents"],
            found,
        ), name
    assert {1, 9} <= lengths  # pictures and the clip of one frame, beside whole clips


def namespace(config: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(**with_defaults("train", config))


def test_a_changed_file_or_setting_uses_another_cache(tmp_path: Path):
    folder = tmp_path / "clips"
    write_clips(folder)
    concept = with_defaults("concept", concept_of(folder))

    def keys(*inputs: str) -> tuple[str, str]:
        return cache_digest("image", [concept], inputs), cache_digest("text", [concept], inputs)

    first = keys("a")
    assert keys("a") == first
    assert all(new != old for new, old in zip(keys("b"), first, strict=True))
    caption = next(folder.glob("*.txt"))
    caption.write_text("another caption", "utf-8")
    second = keys("a")
    assert second[0] == first[0] and second[1] != first[1]
    clip = next(p for p in folder.iterdir() if p.suffix != ".txt")
    clip.write_bytes(clip.read_bytes() + b" ")
    assert keys("a")[0] != first[0]
    off = {**concept, "enabled": False}
    assert cache_digest("image", [off], ["a"]) == cache_digest("image", [], ["a"])


def test_a_mask_over_time_is_averaged_for_each_latent_frame():
    """One latent frame stands for the first frame, and for four of the others each."""
    mask = torch.zeros(1, 9, 32, 32)
    mask[:, 1:5] = 1
    mask[:, 5] = 1
    mask[:, 0, :8, :8] = 1
    found = latent_mask_of(mask, VARIANTS["t2v-a14b"])
    assert found.shape == (1, 3, 4, 4)
    assert found[0, 0].sum() == 1 and found[0, 0, 0, 0] == 1
    assert (found[0, 1] == 1).all() and (found[0, 2] == 0.25).all()
    assert (latent_mask_of(torch.ones(1, 1, 32, 32), VARIANTS["t2v-a14b"]) == 1).all()


def test_masks_are_found_under_both_names(tmp_path: Path):
    from PIL import Image

    folder = tmp_path / "clips"
    write_clips(folder)
    config = namespace({"masked_training": True, "resolution": "64", "frames": "5", "train": {}})
    planner = ConceptPlanner(config, VARIANTS["t2v-a14b"])
    concept = with_defaults("concept", {"path": str(folder)})
    first, second = sorted(p for p in folder.iterdir() if p.suffix in (".mp4", ".webm"))[:2]
    for clip, suffix in ((first, "-masklabel.png"), (second, ".mask.png")):
        found, _ = planner.plan(str(clip), concept)
        assert found.mask is None
        assert (mask_of(found, crop_of(found, None)) == 1).all()
        width, height = found.source_size
        Image.new("L", (width, height), 0).save(clip.with_name(clip.stem + suffix))
        found, _ = planner.plan(str(clip), concept)
        assert found.mask is not None
        assert (mask_of(found, crop_of(found, None)) == 0).all()


def test_processes_keep_each_others_decode_checks(tmp_path: Path, monkeypatch):
    write_clips(tmp_path)
    good = next(tmp_path.glob("*.mp4"))
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(good.read_bytes()[:200])
    file = tmp_path / "cache" / "read.jsonl"
    first, second = DecodeCheckCache(file), DecodeCheckCache(file)  # both before either saves
    first.check(make_clip(str(good)))
    with pytest.raises(DataError, match=re.escape(str(bad))) as reason:
        second.check(make_clip(str(bad)))
    second.save()
    first.save()
    with file.open("a") as lines:
        lines.write('["cut off')  # by a kill
    monkeypatch.setattr(clip_adapter, "read_frames", None)  # a second check would fail
    third = DecodeCheckCache(file)
    third.check(make_clip(str(good)))
    with pytest.raises(DataError, match=re.escape(str(reason.value))):
        third.check(make_clip(str(bad)))
