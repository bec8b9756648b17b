"""From folders to encoded clips: each entry is encoded once, and again only if an input changes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.clips import clip as make_clip
from support.runs import RunFile, layout_of, outcome

from onewan.config.schema import ResolvedRun
from onewan.data.clip import Clip
from onewan.data.companions import Companion
from onewan.data.dataset import Dataset
from onewan.data.decode import decode
from onewan.data.encode import no_progress
from onewan.data.entry_keys import EntryKeys
from onewan.data.masks import latent_mask
from onewan.errors import ConfigError, DataError
from onewan.media import write_video
from onewan.model.sources import PipelineComponent
from onewan.runs.events import Event, StepDone
from onewan.train.setup import WanModelSetup
from onewan.train.trainer import WanTrainer
from onewan.variants import VARIANTS


def prepared(config: ResolvedRun, *, verify: bool = False) -> tuple[Dataset, list[tuple[str, int]]]:
    """The data set, and the number of items of each activity that its progress reported."""
    totals: dict[str, int] = {}
    data = WanModelSetup(config).dataset(
        [], lambda what, _done, total: totals.__setitem__(what, total), verify=verify
    )
    assert sum(n for what, n in totals.items() if what != "checking clips") == data.encoded
    return data, sorted(totals.items())


@pytest.fixture
def own(workshop: Path, tmp_path: Path) -> Path:
    """A folder with a copy of the clips, which the test may change."""
    shutil.copytree(workshop / "clips", tmp_path / "clips")
    return tmp_path


def settings(own: Path) -> list[str]:
    return [
        f"video_data.sources=[{{path: {(own / 'clips').as_posix()}}}]",
        f"video_data.cache_dir={own / 'cache'}",
    ]


def test_only_entries_with_changed_inputs_are_encoded(run_file: RunFile, own: Path) -> None:
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

    shutil.copy(own / "clips" / "renamed.mp4", own / "clips" / "yellow_circle.mp4")
    assert prepared(config)[1] == []  # the same content once more

    shorter = run_file("t2v-a14b", *settings(own), "wan_config.max_frames=5")
    assert prepared(shorter)[1] == [("encoding clips", 3)]  # not the image: one frame either way
    assert prepared(config)[1] == []  # the longer ones are still in the cache

    # I2V needs the condition besides the latents, so it has entries of its own.
    image = run_file("i2v-a14b", *settings(own))
    data, totals = prepared(image)
    assert ("encoding clips", 4) in totals  # five clips, two of which have the same content
    assert data.source.video(data.clips[0], "first").keys() == {"latents", "condition"}


def test_damaged_entries_are_found_and_encoded_again(run_file: RunFile, own: Path) -> None:
    config = run_file("t2v-a14b", *settings(own))
    data, _ = prepared(config)
    before = data.source.video(data.clips[0], "first")["latents"].clone()
    entry = sorted((own / "cache" / "video").rglob("*.safetensors"))[0]
    tensors = {k: v + 1 for k, v in load_file(entry).items()}
    entry.unlink()
    save_file(tensors, entry)
    sorted((own / "cache" / "text").rglob("*.safetensors"))[0].write_bytes(b"truncated")
    assert prepared(config)[1] == []  # without verify, entries are not read
    data, totals = prepared(config, verify=True)
    assert totals == [("encoding captions", 1), ("encoding clips", 1)]
    assert torch.equal(data.source.video(data.clips[0], "first")["latents"], before)


def test_a_replaced_file_is_encoded_again_by_verifying(run_file: RunFile, own: Path) -> None:
    config = run_file("t2v-a14b", *settings(own))
    data, _ = prepared(config)
    clip = next(clip for clip in data.clips if clip.name == "still_square.png")
    before = data.source.video(clip, "first")["latents"]
    stat = clip.path.stat()
    pixels = np.asarray(Image.open(clip.path).convert("RGB"))
    Image.fromarray(255 - pixels).save(clip.path)
    with clip.path.open("ab") as file:  # the same size
        file.write(bytes(stat.st_size - clip.path.stat().st_size))
    os.utime(clip.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert clip.path.stat().st_size == stat.st_size
    assert prepared(config)[1] == []
    data, totals = prepared(config, verify=True)
    assert totals == [("encoding clips", 1)]
    assert "still_square.png: has other content than before" in str(data.report)
    assert not torch.equal(data.source.video(clip, "first")["latents"], before)
    assert "has other content" not in str(prepared(config, verify=True)[0].report)


def test_a_damaged_entry_stops_training_with_the_state_saved(run_file: RunFile, own: Path) -> None:
    """Encoded again, it gives the same result as without the damage."""
    if sys.platform == "linux":  # a name that is not Unicode does not matter
        for file in (own / "clips").glob("red_square.*"):
            os.rename(file, os.fsencode(own / "clips") + b"/r\xe9d" + os.fsencode(file.suffix))
    # One worker, which reads one step ahead.
    chosen = [*settings(own), "train.steps=12", "video_data.workers=1"]
    expected = run_file("ti2v-5b", *chosen, name="expected")
    WanTrainer(expected).fit()
    damaged = run_file("ti2v-5b", *chosen, name="damaged")
    entries = sorted((own / "cache" / "video").rglob("*.safetensors"))

    def damage(event: Event) -> None:
        # Entries that are read only once are not read after the first epoch.
        if isinstance(event, StepDone) and event.step == 1:
            for entry in entries:
                data = bytearray(entry.read_bytes())
                data[-1] ^= 1
                entry.write_bytes(data)

    with pytest.raises(DataError, match="this cache entry is damaged"):
        WanTrainer(damaged, listen=damage).fit()
    assert 1 <= layout_of(damaged).saved_steps()[-1] < 12
    missing = sum(not entry.exists() for entry in entries)
    assert missing == 1  # the one that was to be read
    prepared(damaged, verify=True)  # for the others
    WanTrainer(damaged, resume=True).fit()
    tensors, steps = outcome(expected)
    again, steps_again = outcome(damaged)
    assert steps == steps_again and len(steps) == 12
    assert [name for name in tensors if not torch.equal(tensors[name], again[name])] == []


def test_a_damaged_mask_is_encoded_again_at_the_start(run_file: RunFile, own: Path) -> None:
    draw_mask(own / "clips" / "red_square.mask.png")
    config = run_file("t2v-a14b", *masks_on(own))
    prepared(config)
    (entry,) = (own / "cache" / "mask").rglob("*.safetensors")
    data = bytearray(entry.read_bytes())
    data[-1] ^= 1
    entry.write_bytes(data)
    assert prepared(config)[1] == [("encoding masks", 1)]
    assert prepared(config)[1] == []


def test_entries_that_another_process_encodes_meanwhile_are_not_encoded_again(
    run_file: RunFile, own: Path
) -> None:
    complete, _ = prepared(run_file("t2v-a14b", *settings(own)))
    (own / "cache").rename(own / "complete")
    reported = list[tuple[str, int, int]]()

    def progress(activity: str, done: int, total: int) -> None:
        reported.append((activity, done, total))
        if len(reported) == 1:  # the other process finishes after our first caption
            shutil.copytree(own / "complete", own / "cache", dirs_exist_ok=True)

    data = WanModelSetup(run_file("t2v-a14b", *settings(own))).dataset([], progress)
    assert data.encoded == 1 and data.digest == complete.digest
    assert reported == [("encoding captions", n, 6) for n in range(1, 7)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a new process would load torch again")
def test_two_processes_that_encode_at_the_same_time_share_the_cache(
    run_file: RunFile, own: Path
) -> None:
    config = run_file("t2v-a14b", *settings(own))
    fork = multiprocessing.get_context("fork")
    encode = WanModelSetup(config).dataset
    processes = [fork.Process(target=encode, args=[[], no_progress]) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert prepared(config, verify=True)[0].encoded == 0
    assert not list((own / "cache").rglob(".*"))


def test_online_encoding_gives_the_same_tensors_as_the_cache(run_file: RunFile, own: Path) -> None:
    cached, _ = prepared(run_file("i2v-a14b", *settings(own)))
    online, totals = prepared(run_file("i2v-a14b", *settings(own), "video_data.cache=false"))
    assert totals == [("checking clips", 5)]
    for clip in cached.clips:
        a, b = cached.source.video(clip, "first"), online.source.video(clip, "first")
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        caption = clip.captions[0]
        assert torch.equal(cached.source.text(caption), online.source.text(caption))


def test_entries_are_what_the_model_encodes(run_file: RunFile, own: Path) -> None:
    config = run_file("ti2v-5b", *settings(own))
    data, _ = prepared(config)
    model = WanModelSetup(config).load_encoders(("vae",))
    clip = next(c for c in data.clips if c.kind == "video")
    pixels = torch.from_numpy(decode(clip).frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    latents = data.source.video(clip, "first")["latents"]
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
        data = WanModelSetup(config).dataset([], no_progress)
        assert len(data.clips) == 5
        named = {problem.path.name for problem in data.report.problems}
        assert named == {f.name for f in (clips / "bad").iterdir() if f.suffix != ".txt"}


def test_a_data_set_without_clips_is_an_error(run_file: RunFile, own: Path) -> None:
    with pytest.raises(DataError, match=r"video_data\.sources: is empty"):
        prepared(run_file("t2v-a14b", "video_data.sources=[]"))
    (own / "nothing").mkdir()
    with pytest.raises(DataError, match="no clip can be used"):
        prepared(run_file("t2v-a14b", f"video_data.sources=[{{path: {own / 'nothing'}}}]"))


# --- Masks ---------------------------------------------------------------------------------------


def draw_mask(path: Path, level: int = 255) -> None:
    """The left half in `level`, the other half black."""
    picture = np.zeros((256, 320), np.uint8)
    picture[:, :160] = level
    Image.fromarray(picture).save(path)


def masks_on(own: Path) -> list[str]:
    return [*settings(own), "video_data.masks=true"]


def named(data: Dataset, name: str) -> Clip:
    return next(clip for clip in data.clips if clip.name == name)


def test_a_mask_has_a_cache_entry_of_its_own(run_file: RunFile, own: Path) -> None:
    config = run_file("t2v-a14b", *masks_on(own))
    before, _ = prepared(config)
    draw_mask(own / "clips" / "red_square.mask.png")
    data, totals = prepared(config)
    assert totals == [("encoding masks", 1)] and data.digest != before.digest
    clip = named(data, "red_square.mp4")
    entry = data.source.video(clip, "first")
    assert entry.keys() == {"latents", "mask"} and clip.mask
    assert entry["mask"].shape == (1, *entry["latents"].shape[1:])
    assert entry["mask"].dtype == torch.float32
    expected = latent_mask(
        clip.mask, fps=clip.fps, frames=clip.frames, size=clip.size, spatial=8, temporal=4
    )
    assert np.array_equal(entry["mask"].numpy(), expected)
    assert entry["mask"][..., 0].eq(1).all() and entry["mask"][..., -1].eq(0).all()
    assert data.source.video(named(data, "blue_circle.webm"), "first").keys() == {"latents"}

    draw_mask(own / "clips" / "red_square.mask.png", level=128)
    changed, totals = prepared(config)
    assert totals == [("encoding masks", 1)] and changed.digest != data.digest  # no video again
    now = changed.source.video(named(changed, "red_square.mp4"), "first")
    assert torch.equal(now["latents"], entry["latents"])
    assert now["mask"][..., 0].eq(np.float32(128 / 255)).all()

    online, _ = prepared(run_file("t2v-a14b", *masks_on(own), "video_data.cache=false"))
    online_entry = online.source.video(named(online, "red_square.mp4"), "first")
    assert online_entry.keys() == now.keys() and all(
        torch.equal(online_entry[k], now[k]) for k in now
    )
    assert online.digest == changed.digest

    off, totals = prepared(run_file("t2v-a14b", *settings(own)))
    assert totals == [] and off.digest == before.digest
    assert off.source.video(named(off, "red_square.mp4"), "first").keys() == {"latents"}

    for entry_file in (own / "cache" / "mask").rglob("*.safetensors"):
        tensors = {k: v + 1 for k, v in load_file(entry_file).items()}
        entry_file.unlink()
        save_file(tensors, entry_file)
    repaired, totals = prepared(config, verify=True)
    assert totals == [("encoding masks", 1)]
    assert torch.equal(
        repaired.source.video(named(repaired, "red_square.mp4"), "first")["mask"], now["mask"]
    )


def test_masks_with_a_single_value_give_a_warning(run_file: RunFile, own: Path) -> None:
    Image.new("L", (320, 256), 0).save(own / "clips" / "red_square.mask.png")
    Image.new("L", (320, 256), 255).save(own / "clips" / "blue_circle.mask.png")
    draw_mask(own / "clips" / "green_triangle.mask.png", level=1)
    for cache in ("true", "true", "false"):
        data, _ = prepared(run_file("t2v-a14b", *masks_on(own), f"video_data.cache={cache}"))
        notes = {
            n.path.name: n.text for n in data.report.warnings if n.path and "mask" in n.path.name
        }
        assert notes.keys() == {"red_square.mask.png", "blue_circle.mask.png"}
        assert "entirely black" in notes["red_square.mask.png"]
        assert "entirely white (or transparent)" in notes["blue_circle.mask.png"]


def damaged(path: Path) -> None:
    """A video that is damaged in the middle, which reading its headers does not find."""
    noise = np.random.default_rng(3).integers(0, 256, (32, 64, 80, 3), np.uint8)
    write_video(path, noise, 16)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 500] = bytes(500)
    path.write_bytes(content)


@pytest.mark.parametrize("cache", ["true", "false"])
def test_damaged_files_and_their_copies_are_each_reported_by_name(
    run_file: RunFile, own: Path, cache: str
) -> None:
    """So that none of them fails later, in a training step."""
    folder = own / "clips"
    for name in ("red_square.mask.avi", "bad.avi"):
        damaged(folder / name)
    (folder / "bad.txt").write_text("bad")
    for old, new in (("red_square", "red_copy"), ("bad", "worse")):
        for file in sorted(folder.glob(f"{old}.*")):
            shutil.copy(file, folder / file.name.replace(old, new))
    source = f"{{path: {folder.as_posix()}}}"
    config = run_file(
        "t2v-a14b",
        *masks_on(own),
        f"video_data.sources=[{source}, {source}]",
        f"video_data.cache={cache}",
        "video_data.min_resolution=[64,64]",
    )
    for _ in range(2):
        data = WanModelSetup(config).dataset([], no_progress)
        reasons = {p.path.name: p.reason for p in data.report.problems}
        assert len(data.report.problems) == 4  # each once, though in two sources
        assert reasons.keys() == {"red_square.mp4", "red_copy.mp4", "bad.avi", "worse.avi"}
        assert reasons["red_square.mp4"].startswith("its mask red_square.mask.avi is damaged near")
        assert reasons["red_copy.mp4"].startswith("its mask red_copy.mask.avi is damaged near")
        assert reasons["worse.avi"].startswith("is damaged near")
        assert len(data.clips) == 2 * 4
        for clip in data.clips:
            data.source.video(clip, "first")


# --- Captions ------------------------------------------------------------------------------------


def test_caption_dropout_encodes_the_empty_caption(run_file: RunFile, own: Path) -> None:
    data, totals = prepared(run_file("t2v-a14b", *settings(own)))
    assert ("encoding captions", 6) in totals
    with pytest.raises(DataError, match="can't be read"):
        data.source.text("")
    config = run_file("t2v-a14b", *settings(own), "train.caption_dropout=0.1")
    data, totals = prepared(config)
    assert totals == [("encoding captions", 1)]
    model = WanModelSetup(config).load_encoders(("text_encoder", "tokenizer"))
    assert torch.equal(data.source.text(""), model.encode_prompt("").cpu())


def test_a_source_completes_shuffles_and_drops_its_captions(run_file: RunFile, own: Path) -> None:
    folder = (own / "clips").as_posix()

    def run(settings_of_source: str) -> ResolvedRun:
        source = f"video_data.sources=[{{path: {folder}, {settings_of_source}}}]"
        return run_file("t2v-a14b", *settings(own), source)

    for file in (own / "clips").glob("*.txt"):
        file.write_text("red, square, moving, black ground", encoding="utf-8")
    plain, totals = prepared(run("repeats: 1"))
    assert ("encoding captions", 1) in totals
    data, totals = prepared(run("trigger_word: ohwx, shuffle_tags: 4, keep_tags: 1"))
    captions = set(data.clips[0].captions)
    assert totals == [("encoding captions", len(captions))] and 1 < len(captions) <= 4
    assert all(caption.startswith("ohwx, red, ") for caption in captions)
    for caption in captions:
        assert data.source.text(caption).ndim == 2
    assert data.digest != plain.digest
    # Nothing but the empty text is missing, and a run that has begun must not change unnoticed.
    dropped, totals = prepared(
        run("trigger_word: ohwx, shuffle_tags: 4, keep_tags: 1, caption_dropout: 0.1")
    )
    assert totals == [("encoding captions", 1)] and dropped.digest != data.digest
    assert dropped.source.text("").ndim == 2


@pytest.mark.parametrize("cache", ["true", "false"])
def test_no_caption_is_encoded_if_the_training_step_encodes_them(
    run_file: RunFile, own: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[PipelineComponent] = []
    load = WanModelSetup.load_encoders

    def watched(setup: WanModelSetup, components: Collection[PipelineComponent]):
        loaded.extend(components)
        return load(setup, components)

    monkeypatch.setattr(WanModelSetup, "load_encoders", watched)
    for caption in (own / "clips").glob("*.txt"):
        caption.write_text("a <fox>")
    config = run_file(
        "t2v-a14b",
        *settings(own),
        f"video_data.cache={cache}",
        "train.caption_dropout=0.1",
        "embeddings=[{placeholder: <fox>}]",
    )
    data, _ = prepared(config)
    assert loaded == ["vae"] and not (own / "cache" / "text").exists()
    assert data.source.video(data.clips[0], "first")["latents"].ndim == 4


# --- Validation split ----------------------------------------------------------------------------


def test_unusable_files_that_were_named_before_are_counted(run_file: RunFile, own: Path) -> None:
    config = run_file("t2v-a14b", *settings(own))
    (own / "clips" / "cut.mp4").write_bytes(b"no video")
    (own / "clips" / "cut.txt").touch()
    first, _ = prepared(config)
    named = [line for line in first.report.lines() if "cut.mp4: " in line]
    assert len(named) == 1 and first.report.lines(repeat=False) == first.report.lines()
    again, _ = prepared(config)
    assert again.report.lines() == first.report.lines()  # `onewan cache` lists them every time
    count = (
        "1 file can't be used, as before (listed by `onewan cache` and in "
        f"{own / 'cache' / 'unusable_files.txt'})"
    )
    shown = again.report.lines(repeat=False)
    assert count in shown and named[0] not in shown and "left out" in shown[0]
    (own / "clips" / "lonely.mp4").touch()
    more = prepared(config)[0].report.lines(repeat=False)
    assert "1 file can't be used:" in more and count in more
    assert any("lonely.mp4: has no caption" in line for line in more)
    assert not any("cut.mp4" in line for line in more)


def test_clips_of_validation_sources_are_held_out_of_training(run_file: RunFile, own: Path) -> None:
    (own / "val").mkdir()
    for name in ("red_square.mp4", "still_square.png"):
        shutil.copy(own / "clips" / name, own / "val" / f"val_{name}")
        (own / "val" / f"val_{name}").with_suffix(".txt").write_text(f"first {name}\nsecond")
    value = f"validation.sources=[{{path: {(own / 'val').as_posix()}}}]"
    plain, _ = prepared(run_file("t2v-a14b", *settings(own)))
    data, totals = prepared(run_file("t2v-a14b", *settings(own), value))
    # The clips have the same content as before; of new captions, the first of each is needed.
    assert totals == [("encoding captions", 2)] and data.digest != plain.digest
    assert {clip.name for clip in data.validation_clips} == {
        "val_red_square.mp4",
        "val_still_square.png",
    }
    assert len(data.clips) == 3
    for clip in data.validation_clips:
        assert data.source.video(clip, "first").keys() == {"latents"}
        assert data.source.text(clip.captions[0]).ndim == 2
    reasons = {p.path: p.reason for p in data.report.problems}
    assert reasons.keys() == {own / "clips" / n for n in ("red_square.mp4", "still_square.png")}
    assert "is in validation.sources too (as val_red_square.mp4)" in str(data.report)
    assert "held out for validation: 2 clips" in str(data.report)

    everything = f"validation.sources=[{{path: {(own / 'clips').as_posix()}}}]"
    (own / "clips" / "lonely.mp4").touch()
    with pytest.raises(DataError, match="no clip can be used") as caught:
        prepared(run_file("t2v-a14b", *settings(own), everything))
    assert str(caught.value).count("is in validation.sources too") == 1
    assert " and 4 others like it" in str(caught.value)
    listed = (own / "cache" / "unusable_files.txt").read_text(encoding="utf-8")
    assert listed.count("is in validation.sources too") == 5
    # It is in both sources, but reported once.
    assert str(caught.value).count("lonely.mp4: has no caption") == 1
    (own / "empty").mkdir()
    empty = f"validation.sources=[{{path: {(own / 'empty').as_posix()}}}]"
    with pytest.raises(DataError, match=r"no clip of validation\.sources can be used"):
        prepared(run_file("t2v-a14b", *settings(own), empty))
    nowhere = f"validation.sources=[{{path: {(own / 'nowhere').as_posix()}}}]"
    with pytest.raises(ConfigError, match=r"validation\.sources\.0\.path: .* is not a folder"):
        prepared(run_file("t2v-a14b", *settings(own), nowhere))


def test_validation_share_holds_out_files_by_content(run_file: RunFile, own: Path) -> None:
    config = run_file("t2v-a14b", *settings(own), "validation.share=0.4")
    data, _ = prepared(config)
    assert (len(data.clips), len(data.validation_clips)) == (3, 2)
    assert not {c.path for c in data.clips} & {c.path for c in data.validation_clips}
    (own / "clips" / data.validation_clips[0].name).rename(
        (own / "clips" / "zzz").with_suffix(data.validation_clips[0].path.suffix)
    )
    data.validation_clips[0].path.with_suffix(".txt").rename(own / "clips" / "zzz.txt")
    again, totals = prepared(config)
    assert totals == [] and {c.path.stem for c in again.validation_clips} == {
        "zzz",
        data.validation_clips[1].path.stem,
    }
    base = f"video_data.sources=[{{path: {(own / 'clips').as_posix()}, target: base}}]"
    data, _ = prepared(run_file("t2v-a14b", *settings(own), base, "validation.share=0.4"))
    assert (len(data.clips), data.validation_clips) == (5, ())
    assert "validation.share holds out no clip" in str(data.report)


def test_settings_of_a_source_change_the_data_set_digest_but_no_entry(
    run_file: RunFile, own: Path
) -> None:
    """A resumed run notices the change by the digest."""
    digests = set()
    of_class = ", trigger_word: a, class_word: the"
    for more in ("", ", loss_weight: 2", ", target: base", ", repeats: 2", of_class):
        source = f"video_data.sources=[{{path: {(own / 'clips').as_posix()}{more}}}]"
        data, totals = prepared(run_file("t2v-a14b", *settings(own), source))
        # With another word, captions are encoded beside those that are there.
        assert bool(totals) == (not digests or more == of_class)
        digests.add(data.digest)
    assert len(digests) == 5
    # This one changes the pixels of videos too, but not those of the image.
    source = f"video_data.sources=[{{path: {(own / 'clips').as_posix()}, interlaced: top_first}}]"
    data, totals = prepared(run_file("t2v-a14b", *settings(own), source))
    assert totals == [("encoding clips", 4)] and data.digest not in digests


# --- Cache keys ----------------------------------------------------------------------------------


def test_cache_keys_do_not_change_by_accident(tmp_path: Path) -> None:
    """Otherwise users with 100 GB of entries would have to encode them all again."""
    paths = {}
    for name in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(f"the {name}")
        paths[name] = tmp_path / name
    clip = make_clip("a.mp4", start=0.4375, frames=17, size=(832, 480), source_size=(1920, 1080))
    mask = Companion(path=tmp_path / "a.mask.png", start=0.0, is_image=True)
    content = {clip.path: "0" * 40, mask.path: "1" * 40}

    def keys(variant: str) -> tuple[EntryKeys, str]:
        entries = EntryKeys(
            variant=VARIANTS[variant],
            component_paths=paths,
            text_dtype="float32",
            digests=content,
        )
        return entries, entries.video(clip)

    t2v, t2v_key = keys("t2v-a14b")
    assert t2v_key == keys("ti2v-5b")[1] == "a5964ac90d2b8cfb968eb025d04452451fc38d94"
    assert keys("i2v-a14b")[1] == "ea1aa363766203264a950c717e28fdc593ba070c"
    assert t2v.text("a test") == "14f793cd60c25a0af866b253fedb0fca77e0dba2"
    mask_key = t2v.mask(clip, mask)
    assert mask_key == "8716df4d84b382636704fbcc5e697e4d6abfe50e"
    # The key of a clip does not depend on how it is trained on.
    for same in (
        {"mask": mask},
        {"loss_weight": 2.0},
        {"is_prior": True},
        {"repeats": 3},
        {"captions": ("another",)},
        {"name": "b.mp4"},
    ):
        assert t2v.video(replace(clip, **same)) == t2v_key
    gray = replace(clip, background=(128, 128, 128))
    assert t2v.video(gray) != t2v_key
    assert t2v.mask(gray, mask) == mask_key
    woven = [replace(clip, fields=order) for order in (None, "top_first", "bottom_first")]
    assert t2v.video(woven[0]) == t2v_key
    assert len({t2v.video(each) for each in woven}) == 3
    assert {t2v.mask(each, mask) for each in woven} == {mask_key}
    for other in ({"start": 0.5}, {"fps": 24.0}, {"frames": 13}, {"size": (480, 832)}):
        assert t2v.video(replace(clip, **other)) != t2v_key
        if "start" not in other:  # a mask has its own start
            assert t2v.mask(replace(clip, **other), mask) != mask_key
    assert t2v.mask(clip, replace(mask, start=0.5)) != mask_key
    assert keys("ti2v-5b")[0].mask(clip, mask) != mask_key  # latent cells of another size
