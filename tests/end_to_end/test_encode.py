"""From a folder to entries: encoded once, and again only where something it depends on changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import RunFile
from safetensors.torch import load_file, save_file

from onewan.config.schema import RunConfig
from onewan.data.encode import Dataset, silent
from onewan.data.sample import decode
from onewan.errors import DataError
from onewan.train.setup import WanModelSetup


def prepared(config: RunConfig, *, verify: bool = False) -> tuple[Dataset, list[tuple[str, int]]]:
    """The data set, and how many captions and clips were encoded for it."""
    totals: dict[str, int] = {}
    data = WanModelSetup(config).dataset(
        [], lambda what, _done, total: totals.__setitem__(what, total), verify=verify
    )
    assert sum(n for what, n in totals.items() if what != "checking clips") == data.encoded
    return data, sorted(totals.items())


@pytest.fixture
def own(workshop: Path, tmp_path: Path) -> Path:
    """Clips of the test's own, to change."""
    shutil.copytree(workshop / "clips", tmp_path / "clips")
    return tmp_path


def settings(own: Path) -> list[str]:
    return [
        f"video_data.sources=[{{path: {(own / 'clips').as_posix()}}}]",
        f"video_data.cache_dir={own / 'cache'}",
    ]


def test_only_what_changed_is_encoded(run_file: RunFile, own: Path) -> None:
    config = run_file("t2v-a14b", *settings(own))
    first, totals = prepared(config)
    assert totals == [("encoding captions", 6), ("encoding clips", 5)]
    same, totals = prepared(config)
    assert totals == [] and same.digest == first.digest

    (own / "clips" / "red_square.txt").write_text("another caption", encoding="utf-8")
    changed, totals = prepared(config)
    assert totals == [("encoding captions", 1)] and changed.digest != first.digest

    (own / "clips" / "red_square.mp4").rename(own / "clips" / "renamed.mp4")
    (own / "clips" / "red_square.txt").rename(own / "clips" / "renamed.txt")
    assert prepared(config)[1] == []  # content decides, not the name

    shutil.copy(own / "clips" / "renamed.mp4", own / "clips" / "yellow_circle.avi")
    assert prepared(config)[1] == []  # the same content once more

    shorter = run_file("t2v-a14b", *settings(own), "wan_config.max_frames=5")
    assert prepared(shorter)[1] == [("encoding clips", 3)]  # not the image: one frame either way
    assert prepared(config)[1] == []  # and the longer ones are still there

    # I2V needs the condition beside the latents, so its entries are others.
    image = run_file("i2v-a14b", *settings(own))
    data, totals = prepared(image)
    assert ("encoding clips", 4) in totals  # five clips, two of which have the same content
    assert data.source.video(data.clips[0]).keys() == {"latents", "condition"}


def test_damaged_entries_are_found_and_encoded_again(run_file: RunFile, own: Path) -> None:
    config = run_file("t2v-a14b", *settings(own))
    data, _ = prepared(config)
    before = data.source.video(data.clips[0])["latents"].clone()
    entry = sorted((own / "cache" / "video").rglob("*.safetensors"))[0]
    tensors = {k: v + 1 for k, v in load_file(entry).items()}
    entry.unlink()
    save_file(tensors, entry)
    sorted((own / "cache" / "text").rglob("*.safetensors"))[0].write_bytes(b"cut off")
    assert prepared(config)[1] == []  # a quick start does not read the entries
    data, totals = prepared(config, verify=True)
    assert totals == [("encoding captions", 1), ("encoding clips", 1)]
    assert torch.equal(data.source.video(data.clips[0])["latents"], before)


def test_cached_and_live_entries_are_the_same(run_file: RunFile, own: Path) -> None:
    cached, _ = prepared(run_file("i2v-a14b", *settings(own)))
    live, totals = prepared(run_file("i2v-a14b", *settings(own), "video_data.cache=false"))
    assert totals == [("checking clips", 5)]
    for clip in cached.clips:
        a, b = cached.source.video(clip), live.source.video(clip)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        caption = clip.captions[0]
        assert torch.equal(cached.source.text(caption), live.source.text(caption))


def test_entries_are_what_the_model_encodes(run_file: RunFile, own: Path) -> None:
    config = run_file("ti2v-5b", *settings(own))
    data, _ = prepared(config)
    model = WanModelSetup(config)._load(("vae",))
    clip = next(c for c in data.clips if c.kind == "video")
    pixels = torch.from_numpy(decode(clip).frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    latents = data.source.video(clip)["latents"]
    assert torch.equal(latents, model.encode_video(pixels)[0])
    frames, (width, height) = clip.frames, clip.size
    assert latents.shape == (48, (frames - 1) // 4 + 1, height // 16, width // 16)
    with pytest.raises(ValueError, match="4n\\+1 frames"):
        model.encode_video(pixels[:, :, :4])


def test_clips_that_fail_to_decode_are_reported(run_file: RunFile, own: Path, clips: Path) -> None:
    for file in (clips / "bad").iterdir():
        shutil.copy(file, own / "clips" / file.name)
    for cache in ("true", "false"):
        config = run_file("t2v-a14b", *settings(own), f"video_data.cache={cache}")
        data = WanModelSetup(config).dataset([], silent)
        assert len(data.clips) == 5
        named = {problem.path.name for problem in data.report.problems}
        assert named == {f.name for f in (clips / "bad").iterdir() if f.suffix != ".txt"}


def test_no_clips(run_file: RunFile, own: Path) -> None:
    with pytest.raises(DataError, match=r"video_data\.sources: is empty"):
        prepared(run_file("t2v-a14b", "video_data.sources=[]"))
    (own / "nothing").mkdir()
    with pytest.raises(DataError, match="no clip can be used"):
        prepared(run_file("t2v-a14b", f"video_data.sources=[{{path: {own / 'nothing'}}}]"))
