"""The plan: bytes of phases, chosen settings, times, what is refused, and what is suggested."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cards
import numpy as np
import pytest
from safetensors.numpy import save_file

from onewan.arithmetic.byte_sizes import parse_bytes
from onewan.arithmetic.flops import TransformerSize, forward_flops
from onewan.cli import main
from onewan.cli.plan import plan_of
from onewan.config.load import load_run
from onewan.config.schema import ResolvedRun
from onewan.data.buckets import clip_planner, clip_sources, expected_buckets
from onewan.data.expert_clips import batches_per_epoch, clips_by_expert
from onewan.data.index import index_clips
from onewan.errors import ConfigError, MemoryPlanError
from onewan.media import write_video
from onewan.memory.plan import (
    Bucket,
    Machine,
    Plan,
    RunTime,
    check_plan,
    find_machine,
    limited,
    machine_of,
    make_plan,
)
from onewan.memory.plan.machine import CARDS
from onewan.memory.plan.stored import StoredModel, read_stored_model
from onewan.variants import VARIANTS

GB = 10**9
LARGE = Bucket(frames=81, width=832, height=480)
MEDIUM = Bucket(frames=33, width=832, height=480)
SMALL = Bucket(frames=17, width=256, height=256)


def run_file(folder: Path, variant: str, *overrides: str) -> ResolvedRun:
    """A resolved run on a model that is not on this machine."""
    file = folder / "run.yaml"
    file.write_text(f"model: {{path: Owner/Model, variant: {variant}}}\n", encoding="utf-8")
    return load_run(file, ["validation.clips=0", *overrides])


def machine(vram: str, ram: str = "256GB") -> Machine:
    return find_machine(parse_bytes(vram), parse_bytes(ram))


@pytest.fixture
def plan(tmp_path: Path):
    """`plan("t2v-a14b", "24GB", LARGE, "method.rank=8", ...)` is a plan of such a run."""

    def build(variant: str, vram: str, bucket: Bucket, *overrides: str, ram: str = "256GB") -> Plan:
        return make_plan(run_file(tmp_path, variant, *overrides), [bucket], machine(vram, ram))

    return build


# ------------------------------------------------------------------------------------------ bytes


def test_phases_have_the_bytes_that_were_counted_on_the_real_sizes(plan) -> None:
    """Block inputs and weights of A14B at 81x480x832, as in README.md; UMT5 and the VAE."""
    found = plan(
        "t2v-a14b", "400GB", LARGE, "memory.keep_attention=no", "memory.offload_inputs=false"
    )
    training = found.worst.training.device
    assert training["resident blocks"] == pytest.approx(28.1 * GB, rel=0.01)
    assert training["kept for the backward pass"] == 40 * 4 * 5120 * 32_760
    # Both experts' adapters of rank 32 and AdamW: 153 million weights each.
    assert training["optimizer state"] == pytest.approx(2 * 1.227 * GB, rel=0.01)
    assert training["gradients"] == pytest.approx(0.613 * GB, rel=0.01)
    captions, clips = found.other_phases[:2]
    assert captions.device["text encoder"] == pytest.approx(11.36 * GB, rel=0.01)
    assert clips.device_bytes == pytest.approx(6.5 * GB, rel=0.02)
    assert found.worst.training.pinned["weights of blocks"] == pytest.approx(56.2 * GB, rel=0.01)


def test_the_parts_of_a_phase_add_up_to_its_peak(plan) -> None:
    found = plan("t2v-a14b", "24GB", LARGE, "sample.prompts=[a]", "train.ema={}")
    assert len(found.phases) == 5
    for phase in found.phases:
        assert phase.device_bytes == sum(phase.device.values())
        assert phase.host_bytes == sum(phase.pinned.values()) + sum(phase.pageable.values())
    assert found.peak.device_bytes == max(phase.device_bytes for phase in found.phases)


@pytest.mark.parametrize(
    ("weights", "gigabytes"), [("bf16", 56.2), ("fp8", 28.1), ("int8", 28.1), ("nf4", 15.8)]
)
def test_packed_weights_take_less_host_memory(plan, weights: str, gigabytes: float) -> None:
    found = plan("t2v-a14b", "24GB", SMALL, f"memory.weights={weights}", "memory.resident_blocks=0")
    host = found.worst.training.pinned["weights of blocks"]
    assert host == pytest.approx(gigabytes * GB, rel=0.01)


def test_what_goes_to_host_memory_is_gone_from_the_device(plan) -> None:
    here = plan(
        "t2v-a14b", "400GB", MEDIUM, "memory={offload_inputs: false, keep_attention: device}"
    )
    away = plan("t2v-a14b", "400GB", MEDIUM, "memory={offload_inputs: true, keep_attention: host}")
    kept = here.worst.training.device["kept for the backward pass"]
    moved = away.worst.training.pinned["kept for the backward pass"]
    assert moved == kept
    assert "kept for the backward pass" not in away.worst.training.device
    assert away.worst.time.bytes_to_host == moved


def test_averages_and_idle_optimizer_state_are_where_the_settings_say(plan) -> None:
    on_device = plan("t2v-a14b", "400GB", SMALL, "train.ema={offload: false}").worst.training
    on_host = plan("t2v-a14b", "400GB", SMALL, "train.ema={}").worst.training
    assert on_device.device["averages"] == on_host.pinned["averages"] > 1.2 * GB
    assert "averages" not in on_host.device


def test_a_step_copies_two_loads_of_each_streamed_block_but_those_in_the_ring(plan) -> None:
    found = plan("t2v-a14b", "400GB", SMALL, "memory.resident_blocks=15")
    block = 0.7028 * GB
    assert found.worst.time.weights_to_device == pytest.approx(2 * (25 - 2) * block, rel=0.001)
    nothing = plan("t2v-a14b", "400GB", SMALL, "memory.resident_blocks=40")
    assert nothing.worst.time.bytes_to_device == 0


def test_a_file_that_is_not_here_is_as_large_as_its_name_says(tmp_path: Path) -> None:
    """Whoever has ComfyUI's files in mind may ask before downloading them."""

    def stored(*overrides: str) -> StoredModel:
        return read_stored_model(run_file(tmp_path, "t2v-a14b", *overrides))

    plain = stored()
    named = stored(
        "model.transformer=models/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
        "model.text_encoder=models/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    )
    assert named.experts["high"].all_bytes == pytest.approx(14.6 * GB, rel=0.01)
    assert named.experts["low"] == plain.experts["low"]
    assert named.text_encoder == pytest.approx(6.74 * GB, rel=0.01)
    assert "fp8, by the file's name" in named.notes[0] and "bfloat16" in named.notes[1]
    assert stored("model.transformer=a_fp8.gguf", "memory.weights=bf16").experts == plain.experts


# ------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize(
    ("variant", "bucket", "method", "petaflop"),
    [
        ("t2v-a14b", LARGE, "lora", 6.374),
        ("t2v-a14b", SMALL, "lora", 0.107),
        ("t2v-a14b", LARGE, "fine_tune", 7.160),
        ("ti2v-5b", Bucket(frames=121, width=1280, height=704), "lora", 1.970),
    ],
)
def test_the_work_of_a_step_is_that_of_the_formula(
    plan, variant: str, bucket: Bucket, method: str, petaflop: float
) -> None:
    """Values of an exact count with PyTorch's FlopCounter, adapters apart (1 % per pass)."""
    settings = ("memory.keep_attention=no", f"method={{kind: {method}}}")
    found = plan(variant, "900GB", bucket, *settings)
    assert found.worst.time.flops == pytest.approx(petaflop * 1e15, rel=0.035)


def test_kept_attention_outputs_save_a_seventh_of_a_step(plan) -> None:
    recomputed = plan("t2v-a14b", "900GB", LARGE, "memory.keep_attention=no").worst.time
    kept = plan("t2v-a14b", "900GB", LARGE).worst.time
    assert kept.flops / recomputed.flops == pytest.approx(1 - 0.138, abs=0.005)
    assert kept.model_flops == recomputed.model_flops


def test_streaming_is_free_at_video_sizes_and_not_at_small_ones(plan) -> None:
    """Slowdown with all blocks of A14B streamed, as computed by hand for a 4090 with PCIe 4."""
    settings = "resident_blocks: 0, keep_attention: no, offload_inputs: true"

    def slowdown(bucket: Bucket, weights: str) -> float:
        memory = f"memory={{{settings}, weights: {weights}}}"
        return plan("t2v-a14b", "24GB", bucket, memory).worst.time.slowdown

    assert slowdown(MEDIUM, "bf16") < 1.02
    assert slowdown(SMALL, "bf16") == pytest.approx(2.98, rel=0.06)
    assert slowdown(SMALL, "fp8") == pytest.approx(1.50, rel=0.06)


def test_small_clips_keep_the_blocks_on_the_device_that_hide_the_copies_of_the_others(plan) -> None:
    found = plan("t2v-a14b", "24GB", SMALL, "memory.weights=fp8")
    assert found.fits
    assert found.worst.settings.resident_blocks >= 22
    assert found.worst.time.slowdown <= 1.15


def test_the_time_of_a_run_is_that_of_its_passes(plan) -> None:
    """On a card that holds everything, a pass takes its work over the card's rate."""
    size = {"width": LARGE.width, "height": LARGE.height, "frames": LARGE.frames, "steps": 20}
    options = ", ".join(f"{name}: {value}" for name, value in size.items())

    def run_time(sample: str) -> RunTime:
        validation = "validation={clips: 3, timesteps: 2, every: 40}"
        settings = ("train.steps=100", validation, f"sample={{{sample}, {options}}}")
        return plan("t2v-a14b", "400GB", LARGE, "memory.keep_attention=no", *settings).run_time

    time = run_time("prompts: [a, b], every: 50, at_start: true")
    variant = VARIANTS["t2v-a14b"]
    work = forward_flops(TransformerSize.of_variant(variant), LARGE.tokens(variant)).total
    one_pass = work / 550e12
    assert time.sample == pytest.approx(2 * 20 * one_pass, rel=0.015)
    assert time.validation == pytest.approx(2 * 3 * 2 * one_pass, rel=0.015)
    # Samples before the first step and after 50 and 100; validation after 0, 40, 80 and 100.
    assert (time.samples, time.validations) == (2 * 3, 4)
    assert time.expert_steps == {"high": 50, "low": 50}
    assert time.total == pytest.approx(100 * time.step + 6 * time.sample + 4 * time.validation)
    kept = plan(
        "t2v-a14b",
        "400GB",
        LARGE,
        *("memory.keep_attention=no", "train.batch_size=1", "train.accumulation=2"),
        "video_data.sources=[{path: a, trigger_word: ohwx, class_word: dog}]",
    )
    # A second forward and backward pass, and one without gradients.
    expected = 2 * kept.worst.time.seconds + 2 * one_pass
    assert kept.run_time.step == pytest.approx(expected, rel=0.015)
    unguided = run_time("prompts: [a], every: 0, at_start: false, guidance: [1, 1]")
    assert unguided.samples == 1
    assert unguided.sample == pytest.approx(time.sample / 2)


# --------------------------------------------------------------------------------------- settings


def test_a_device_that_holds_everything_streams_nothing(plan) -> None:
    settings = plan("ti2v-5b", "80GB", LARGE).worst.settings
    assert settings.resident_blocks == 30
    assert not settings.offload_inputs and settings.keep_attention == "device"
    assert settings.feed_forward_chunks == 1 and not settings.park_idle


def test_less_memory_never_makes_a_step_faster(plan) -> None:
    seconds = [
        # The rates of the devices differ, so that only the work is compared.
        plan("t2v-a14b", vram, MEDIUM).worst.time.flops
        for vram in ("160GB", "80GB", "48GB", "32GB", "24GB", "16GB")
    ]
    assert seconds == sorted(seconds)


def test_given_settings_are_kept_and_judged(plan) -> None:
    given = "memory={resident_blocks: 30, offload_inputs: false, feed_forward_chunks: 2}"
    found = plan("t2v-a14b", "24GB", LARGE, given)
    settings = found.worst.settings
    assert settings.resident_blocks == 30 and settings.feed_forward_chunks == 2
    assert not settings.offload_inputs and not found.fits


def test_each_bucket_has_settings_of_its_own(tmp_path: Path) -> None:
    config = run_file(tmp_path, "t2v-a14b")
    found = make_plan(config, [SMALL, LARGE, MEDIUM], machine("24GB"))
    assert found.for_bucket(SMALL).settings.resident_blocks > (
        found.for_bucket(LARGE).settings.resident_blocks
    )
    # The small clips fill the device with blocks, and so have as high a peak.
    assert [bucket.bucket for bucket in found.buckets] == [LARGE, MEDIUM, SMALL]
    assert found.worst.bucket == LARGE
    peaks = [bucket.training.device_bytes for bucket in found.buckets]
    assert found.peak.device_bytes == max(peaks)
    with pytest.raises(KeyError, match="no bucket 5x64x64"):
        found.for_bucket(Bucket(frames=5, width=64, height=64))


@pytest.mark.parametrize("vram", ["16GB", "24GB", "32GB", "48GB", "80GB"])
@pytest.mark.parametrize("variant", ["t2v-a14b", "ti2v-5b"])
def test_a_plan_that_fits_is_within_its_budget(plan, variant: str, vram: str) -> None:
    found = plan(variant, vram, MEDIUM)
    assert found.fits
    assert found.peak.device_bytes <= found.machine.device_budget < parse_bytes(vram)
    assert found.host_peak.host_bytes <= found.machine.host_budget
    check_plan(found)


# ------------------------------------------------------------------------- what is refused, advice


def test_a_run_that_does_not_fit_is_refused_with_what_helps(plan) -> None:
    found = plan("t2v-a14b", "16GB", LARGE, "memory.resident_blocks=20")
    with pytest.raises(MemoryPlanError) as error:
        check_plan(found)
    text = str(error.value)
    assert "training needs" in text and "more than the 14.7 GB" in text
    assert "leave memory.resident_blocks to the plan" in text
    assert "memory.resident_blocks=null" in text
    assert "resident blocks 14.1 GB" in text


@pytest.mark.parametrize(
    ("vram", "ram", "overrides"),
    [
        ("16GB", "256GB", ["memory.resident_blocks=20"]),
        ("24GB", "64GB", []),
        ("24GB", "256GB", ["train.batch_size=3"]),
        ("12GB", "64GB", ["sample.prompts=[a]"]),
        ("24GB", "128GB", ["sample.prompts=[a]", "memory.offload_inactive_expert=false"]),
    ],
)
def test_every_suggestion_makes_it_fit(
    tmp_path: Path, vram: str, ram: str, overrides: list[str]
) -> None:
    config = run_file(tmp_path, "t2v-a14b", *overrides)
    found = make_plan(config, [LARGE], machine(vram, ram))
    assert not found.fits and found.suggestions
    smaller = [
        any(word.startswith(("model.experts", "wan_config", "video_data")) for word in s.change)
        for s in found.suggestions
    ]
    assert smaller == sorted(smaller)  # those that train on less come last
    for suggestion in found.suggestions:
        changed = run_file(tmp_path, "t2v-a14b", *overrides, *suggestion.change)
        bucket = LARGE
        if changed.wan_config.max_frames != config.wan_config.max_frames:
            bucket = replace(bucket, frames=changed.wan_config.max_frames)
        area = changed.video_data.resolution[0]
        if area != config.video_data.resolution[0]:
            assert isinstance(area, int)
            bucket = replace(bucket, width=416, height=int(area / 416) // 16 * 16)
        after = make_plan(changed, [bucket], machine(vram, ram), advice=False)
        text_encoder = [p for p in after.problems() if not p.startswith("encoding captions")]
        assert text_encoder == [], suggestion


def test_clips_are_encoded_in_as_few_strips_as_the_device_needs(plan) -> None:
    bucket = Bucket(frames=121, width=1280, height=704)
    strips = {vram: plan("ti2v-5b", vram, bucket) for vram in ("8GB", "12GB", "24GB")}
    assert [found.encoding_strips(bucket) for found in strips.values()] == [4, 2, 1]
    for found in strips.values():
        assert not [problem for problem in found.problems() if "encoding clips" in problem]
        assert found.encoding_strips(Bucket(frames=5, width=256, height=256)) == 1
        is_said = any("encoded in" in note and "strips" in note for note in found.notes)
        assert is_said == (found.encoding_strips(bucket) > 1)


def test_training_on_less_is_suggested_after_what_costs_only_time(plan) -> None:
    found = plan("t2v-a14b", "24GB", LARGE, "train.batch_size=3")
    changes = [suggestion.change[0] for suggestion in found.suggestions]
    assert changes[0] == "train.batch_size=1"
    assert changes[-1].startswith(("wan_config.max_frames=", "video_data.resolution="))


def test_the_low_expert_alone_is_suggested_unless_a_source_is_for_the_high_one(plan) -> None:
    def changes(source: str) -> list[str]:
        sources = f"video_data.sources=[{{path: a{source}}}, b]"
        fused = ["method={kind: fine_tune, fused_step: true}", "train.max_grad_norm=null"]
        found = plan("t2v-a14b", "24GB", LARGE, sources, *fused, ram="200GB")
        return [change for suggestion in found.suggestions for change in suggestion.change]

    assert "model.experts=low" in changes("")
    assert "model.experts=low" in changes(", timesteps: low")
    assert "model.experts=low" not in changes(", timesteps: high")


def test_a_plan_needs_a_bucket(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one bucket"):
        make_plan(run_file(tmp_path, "ti2v-5b"), [], machine("24GB"))


# ---------------------------------------------------------------------------------------- machine


def test_rates_are_those_of_the_card_with_about_that_memory() -> None:
    names = {"12GB": "RTX 3090", "24GB": "RTX 4090", "32GB": "RTX 5090", "48GB": "L40S"}
    for vram, name in {**names, "80GB": "H100", "141GB": "H100"}.items():
        card = next(card for card in CARDS if card.name == name)
        found = machine(vram)
        assert (found.flops, found.bus) == (card.flops, card.bus)
        assert any(name in note for note in found.notes)


def test_a_known_card_has_its_own_rates_whatever_its_memory() -> None:
    found = machine_of("NVIDIA GeForce RTX 4090 Laptop GPU", 16 * GB, 64 * GB)
    assert (found.flops, found.notes) == (140e12, ())
    assert found.device_budget < 0.95 * 16 * GB


def test_the_run_file_limits_a_machine_and_does_not_enlarge_it(tmp_path: Path) -> None:
    config = run_file(tmp_path, "ti2v-5b", "memory.vram=20GB", "memory.ram=512GB")
    found = limited(machine("24GB", "64GB"), config)
    assert (found.vram, found.ram) == (20 * GB, 64 * GB)


def test_an_amount_that_is_none_is_an_error_of_the_run_file(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"memory\.vram: must be an amount of memory such as 24GB"
    ):
        run_file(tmp_path, "ti2v-5b", "memory.vram=lots")


# ------------------------------------------------------------------------------------ the command


def write_clip(file: Path, frames: int, size: tuple[int, int]) -> None:
    write_video(file, np.zeros((frames, size[1], size[0], 3), np.uint8), fps=16)


@pytest.fixture
def clip_run(tmp_path: Path) -> Path:
    """A run file beside clips of two sizes."""
    folder = tmp_path / "clips"
    folder.mkdir()
    write_clip(folder / "long.mp4", frames=20, size=(320, 192))
    write_clip(folder / "short.mp4", frames=6, size=(192, 320))
    (folder / "damaged.mp4").write_bytes(b"not a video")
    for name in ("long", "short", "damaged"):
        (folder / f"{name}.txt").write_text("a caption", encoding="utf-8")
    write_clip(folder / "without caption.mp4", frames=20, size=(320, 192))
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {path: Owner/Model, variant: t2v-a14b}\n"
        "wan_config: {max_frames: 17}\n"
        "video_data: {sources: [{path: clips}], resolution: 61440, min_resolution: [64, 64],"
        " target_fps: 16}\n",
        encoding="utf-8",
    )
    return file


def test_buckets_are_those_of_the_clips(clip_run: Path) -> None:
    found = expected_buckets(load_run(clip_run))
    assert found.clips == {(17, (320, 192)): 1, (5, (192, 320)): 1}
    assert found.notes == ()


@pytest.mark.parametrize("speed", [1, 0.5])
@pytest.mark.parametrize(
    "strategy", ["uniform", "middle", "head", "random", "keyframe", "chunks", "sliding", "all"]
)
def test_buckets_are_those_that_training_takes(clip_run: Path, strategy: str, speed: float) -> None:
    folder = clip_run.parent / "clips"
    write_clip(folder / "film.mp4", frames=90, size=(320, 192))
    (folder / "film.txt").write_text("longer", encoding="utf-8")
    number = ", clips_per_video: 3" * (strategy in ("uniform", "random", "keyframe"))
    wan_config = f"{{clip_lengths: [9, 33], frame_sample_strategy: {strategy}{number}}}"
    source = f"{{path: {json.dumps(str(folder))}, repeats: 2, speed: {speed}}}"
    config = load_run(
        clip_run,
        [f"wan_config={wan_config}", f"video_data.sources=[{source}]", "train.batch_size=4"],
    )
    found = expected_buckets(config)
    clips = index_clips(
        clip_sources(config.video_data.sources, config), clip_planner(config), use_masks=False
    ).clips
    assert found.clips == Counter((clip.frames, clip.size) for clip in clips)
    assert found.batches_per_epoch == batches_per_epoch(
        clips_by_expert(config.model.facts().experts, clips), 4
    )


def test_changes_of_scene_that_are_not_known_yet_are_noted(clip_run: Path) -> None:
    overrides = ["wan_config={frame_sample_strategy: chunks, max_frames: 5, avoid_cuts: true}"]
    config = load_run(clip_run, overrides)
    (note,) = expected_buckets(config).notes
    assert note.startswith("videos that were not searched for changes of scene yet count as one")
    sources = clip_sources(config.video_data.sources, config)
    index_clips(sources, clip_planner(config), use_masks=False)
    assert expected_buckets(config).notes == ()


def test_the_disk_space_of_unpacked_archives_is_planned_and_that_of_copies_noted(
    clip_run: Path, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(clip_run.parent / "clips", "clips")
    sources = f"[{{path: {(tmp_path / 'a.tar').as_posix()}}}, {{path: 'memory://there/clips'}}]"
    config = load_run(clip_run, [f"video_data.sources={sources}"])
    found = plan_of(config)
    assert found.disk["unpacked archives"] == (tmp_path / "a.tar").stat().st_size
    assert any(
        "memory://there/clips, and the disk space of their copies, are not counted" in note
        for note in found.notes
    )
    assert "unpacked archives" not in plan_of(load_run(clip_run)).disk


def test_without_clips_common_shapes_are_assumed(clip_run: Path) -> None:
    found = expected_buckets(load_run(clip_run, ["video_data.sources=[]"]))
    assert {frames for frames, _ in found.clips} == {17}
    assert all(0.7 < w * h / 61440 <= 1.05 for _, (w, h) in found.clips)
    assert "there are no clips yet" in found.notes[0]


def test_the_command_prints_a_table(clip_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(clip_run), "--vram", "24GB", "--ram", "128GB"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "17x192x320 (frames x height x width)" in out
    for phase in ("encoding captions", "encoding clips", "training"):
        assert f"\n{phase} " in out
    assert "It fits: the highest peak is that of" in out
    assert "The whole run takes about " in out
    assert max(map(len, out.splitlines())) < 200


def test_the_command_prints_json_and_nothing_else(
    clip_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--vram", "2GB", "--ram", "8GB", "--json", "memory.resident_blocks=40"]
    assert main(["plan", str(clip_run), *words]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["fits"] is False and data["problems"]
    assert data["worst_bucket"] == {"frames": 17, "width": 320, "height": 192}
    assert data["buckets"][0]["settings"]["resident_blocks"] == 40
    peaks = [bucket["device_peak"] for bucket in data["buckets"]]
    peaks += [phase["device_bytes"] for phase in data["phases"]]
    assert data["device_peak"] == max(peaks)


def test_a_wrong_amount_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["plan", "run.yaml", "--vram", "24"])
    assert error.value.code == 2
    assert "must be an amount of memory such as 24GB" in capsys.readouterr().err


# ----------------------------------------------------------------------------- distilled previews


@pytest.fixture
def distilled(tmp_path: Path) -> list[str]:
    """Settings with two distilled LoRAs, of which the low one is the larger."""
    settings = ["sample.prompts=[a]", "sample.every=50", "train.steps=100", "validation.clips=1"]
    for expert, rank in (("high", 4), ("low", 8)):
        block, outside = "diffusion_model.blocks.0.ffn.0", "diffusion_model.time_projection.1"
        tensors = {
            f"{block}.lora_down.weight": np.zeros((rank, 100)),
            f"{block}.lora_up.weight": np.zeros((300, rank)),
            f"{block}.alpha": np.array(8.0),
            f"{block}.diff_b": np.zeros(300),
            f"{outside}.diff_b": np.zeros(700),
        }
        path = tmp_path / f"{expert}.safetensors"
        save_file(tensors, path)
        settings.append(f"sample.distilled.{expert}={path}")
    return settings


def test_distilled_loras_are_on_the_device_while_their_expert_samples(
    plan, distilled: list[str]
) -> None:
    found = plan("t2v-a14b", "400GB", LARGE, *distilled)
    of_rank = {rank: 2 * (400 * rank + 300) + 4 * 700 for rank in (4, 8)}
    phases = {phase.phase: phase for phase in found.phases}
    assert phases["sampling: denoising"].device["distilled LoRA"] == of_rank[8]
    for name in ("training", "validation", "sampling: denoising", "sampling: decoding"):
        assert phases[name].pageable["distilled LoRAs"] == of_rank[4] + of_rank[8], name
    assert "distilled LoRA" not in phases["training"].device
    without = [setting for setting in distilled if "distilled" not in setting]
    plain = plan("t2v-a14b", "400GB", LARGE, *without)
    assert not any("distilled LoRA" in phase.device for phase in plain.phases)


def test_a_preview_takes_a_tenth_of_the_time(plan, distilled: list[str]) -> None:
    size = [f"sample.{name}={value}" for name, value in (("width", 848), ("frames", 81))]
    both = [*distilled, *size, "sample.distilled.full_every=0", "sample.at_start=true"]
    time = plan("t2v-a14b", "400GB", LARGE, *both).run_time
    assert (time.samples, time.full_samples) == (3, 2)
    # 4 passes, instead of 25 for each of two prompts.
    assert time.sample == pytest.approx(4 / 50 * time.full_sample)
    rest = 100 * time.step + time.validations * time.validation
    assert time.total == pytest.approx(rest + 3 * time.sample + 2 * time.full_sample)
    guided = plan("t2v-a14b", "400GB", LARGE, *both, "sample.distilled.guidance=2").run_time
    assert guided.sample == pytest.approx(2 * time.sample)
    without = [setting for setting in both if "distilled" not in setting]
    plain = plan("t2v-a14b", "400GB", LARGE, *without).run_time
    assert plain.sample == pytest.approx(time.full_sample) and plain.full_samples == 0


# ------------------------------------------------------------------------------------------- docs


def test_the_tables_by_card_in_the_documentation_are_current() -> None:
    begin, end = f"<!-- {cards.TABLE}: begin -->\n", f"\n<!-- {cards.TABLE}: end -->"
    # `python benchmarks/cards.py` writes them.
    overviews = [(file, cards.overview()) for file in cards.OVERVIEWS]
    for file, table in [(cards.DOCUMENT, cards.document_part()), *overviews]:
        text = file.read_text(encoding="utf-8")
        assert text.partition(begin)[2].partition(end)[0] == table
