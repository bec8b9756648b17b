"""`onewan sample`: from a run's folder, a run file, a model and single components."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.distilled import write_distilled
from support.runs import METHODS, SMALL_SAMPLE, RunFile, layout_of

import onewan.sample.generate
from onewan.cli import main
from onewan.config.load import dump_run
from onewan.config.schema import ResolvedRun
from onewan.media import probe, read_frames, write_video
from onewan.train.trainer import WanTrainer

# With the official shift, both of two steps would be those of the high expert.
SIZE = ["--width", "64", "--height", "64", "--frames", "5", "--steps", "2", "--shift", "1"]
SAMPLE = [f"sample.{name}={value}" for name, value in {**SMALL_SAMPLE, "shift": 1}.items()]


PIXELS: dict[Path, np.ndarray] = {}
"""Frames that were written, by file."""


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the frames that are written: the encoder does not give the same bits for the same
    frames each time, so videos are compared before it."""
    PIXELS.clear()

    def record(path: Path, frames: np.ndarray, fps: float) -> None:
        write_video(path, frames, fps)
        PIXELS[path.resolve()] = frames.astype(int)

    monkeypatch.setattr(onewan.sample.generate, "write_video", record)


def frames(path: Path) -> np.ndarray:
    """The frames that were written to a video, which has as many of this size; as integers, which
    can be subtracted."""
    pixels, info = PIXELS[path.resolve()], probe(path)
    decoded = read_frames(path, [info.start + n / 16 for n in range(info.frames_at(16))])
    assert decoded.shape == pixels.shape
    assert np.abs(decoded - pixels).mean() < 30  # of noise; colors are halved in 4:2:0
    return pixels


def same(one: Path, other: Path) -> bool:
    return np.array_equal(frames(one), frames(other))


def sampled(*arguments: str | Path) -> int:
    return main(["sample", *map(str, arguments)])


@pytest.fixture
def trained(run_file: RunFile) -> ResolvedRun:
    """A run of a few large steps, with samples of the base model and of the last step."""
    config = run_file(
        "t2v-a14b",
        *SAMPLE,
        "sample.prompts=[a red square, {prompt: a circle, seed: 7}]",
        "sample.at_start=true",
        "optimizer.lr=0.1",
        "train.steps=4",
        "output.dtype=float32",
        "output.formats=[kohya, comfyui]",
    )
    WanTrainer(config).fit()
    return config


def test_a_run_is_sampled_as_in_training(
    trained: ResolvedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its prompts, seeds and sizes: the same frames, of the newest weights and of the base model.
    What was made before is not replaced."""
    layout = layout_of(trained)
    assert sampled(layout.root) == 0
    out = capsys.readouterr().out
    before_loading = out.partition("sampling")[0]
    manual = layout.manual_samples_dir
    for number in (0, 1):
        assert (
            f"{number}.mp4 will be: 5 frames, 64x64, 2 steps, seed {7 * number}" in before_loading
        )
        assert same(manual / f"000004-{number}.mp4", layout.samples(4) / f"{number}.mp4")
    assert "weights of step 4" in before_loading and "000004_low_noise_kohya" in before_loading
    assert not same(manual / "000004-0.mp4", manual / "000004-1.mp4")
    assert sampled(layout.root, "--weights", "none") == 0
    assert same(manual / "base-1.mp4", layout.samples(0) / "1.mp4")
    assert not same(manual / "base-1.mp4", manual / "000004-1.mp4")
    assert sampled(layout.root, "--prompt", "a circle", "--seed", "7") == 0
    assert same(manual / "000004-2.mp4", layout.samples(4) / "1.mp4")
    assert sampled(layout.root, "--weights", "2", "--out", tmp_path) == 1
    assert "no weights of step 2; it has those of 4" in capsys.readouterr().err
    assert layout.sampled_steps() == [0, 4]  # the folder is none of a step


def test_the_base_model_comes_from_a_run_file_a_folder_or_components(
    trained: ResolvedRun, workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = layout_of(trained).samples(0) / "0.mp4"
    run_yaml = tmp_path / "own.yaml"
    run_yaml.write_text(dump_run(trained), encoding="utf-8")
    assert sampled(run_yaml, "--out", tmp_path / "file") == 0
    assert f"onewan sample {layout_of(trained).root}" in capsys.readouterr().out
    assert same(tmp_path / "file" / "0.mp4", base)
    prompt = ["--prompt", "a red square", *SIZE, "--dtype", "float32"]
    folder = workshop / "t2v-a14b"
    assert sampled(folder, *prompt, "--out", tmp_path / "folder.mp4") == 0
    assert same(tmp_path / "folder.mp4", base)
    parts = {name: folder / name for name in ("transformer", "vae", "text_encoder", "tokenizer")}
    options = [w for name, p in parts.items() for w in (f"--{name.replace('_', '-')}", str(p))]
    assert sampled(*options, *prompt, "--out", tmp_path / "parts.mp4") == 1
    assert "has no transformer_2" in capsys.readouterr().err
    options += ["--transformer-2", str(folder / "transformer_2")]
    assert sampled(*options, *prompt, "--out", tmp_path / "parts.mp4") == 0
    assert same(tmp_path / "parts.mp4", base)
    # One component in place of the run's.
    other = layout_of(trained).root
    shutil.copytree(folder / "transformer", tmp_path / "other")
    swapped = ["--transformer-2", str(tmp_path / "other"), "--weights", "none"]
    assert sampled(other, *swapped, "--out", tmp_path / "swapped") == 0
    assert not same(tmp_path / "swapped" / "0.mp4", base)


def test_a_lora_has_a_strength_as_in_merge(
    trained: ResolvedRun, workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout, model = layout_of(trained), workshop / "t2v-a14b"
    prompt = ["--prompt", "a red square", *SIZE, "--dtype", "float32"]
    loras = sorted(layout.weights_dir.glob("*_comfyui.safetensors"))
    for strength, name in ((0, "zero"), (0.5, "half"), (1, "one")):
        files = [f"{path}:{strength}" for path in loras]
        assert sampled(model, *prompt, "--out", tmp_path / f"{name}.mp4", "--lora", *files) == 0
    assert "applied to the low expert at strength 0.5" in capsys.readouterr().out
    assert same(tmp_path / "zero.mp4", layout.samples(0) / "0.mp4")
    assert same(tmp_path / "one.mp4", layout.samples(4) / "0.mp4")
    merged = tmp_path / "merged"
    assert main(["merge", str(model), *(f"{path}:0.5" for path in loras), str(merged)]) == 0
    assert sampled(merged, *prompt, "--out", tmp_path / "merged.mp4") == 0
    half = frames(tmp_path / "half.mp4")
    assert np.abs(half - frames(tmp_path / "merged.mp4")).mean() < 0.1
    assert np.abs(half - frames(tmp_path / "one.mp4")).mean() > 0.5
    # The folder of a run, and that of its weights, stand for its newest LoRAs.
    for number, folder in enumerate((layout.root, layout.weights_dir)):
        out = tmp_path / f"folder{number}.mp4"
        assert sampled(model, *prompt, "--out", out, "--lora", folder) == 0
        assert same(out, tmp_path / "one.mp4")
    # Of one expert only: the other one stays as it is, which is said.
    assert sampled(model, *prompt, "--out", tmp_path / "high.mp4", "--lora", loras[0]) == 0
    assert "no LoRA for the low expert" in capsys.readouterr().out


def test_distilled_loras_are_those_of_the_options_or_of_the_run(
    run_file: RunFile, workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The videos are those of training; --full leaves the LoRAs out."""
    files = write_distilled(workshop / "t2v-a14b", tmp_path / "distilled", form="differences")
    high, low = str(files["high"]), str(files["low"])
    config = run_file(
        "t2v-a14b",
        *SAMPLE,
        "sample.prompts=[a red square]",
        "sample.at_start=true",
        f"sample.distilled={{high: {high}, low: {low}, full_every: 0}}",
        "train.steps=2",
        "output.dtype=float32",
    )
    WanTrainer(config).fit()
    layout = layout_of(config)
    assert sampled(layout.root) == 0
    out = capsys.readouterr().out
    before_loading = out.partition("sampling")[0]
    assert f"distilled LoRA of the high expert: {high}" in before_loading
    assert "000002-distilled-0.mp4 will be: 5 frames, 64x64, 4 distilled steps" in before_loading
    assert out.count("has no alpha") == 2
    manual = layout.manual_samples_dir
    assert same(manual / "000002-distilled-0.mp4", layout.samples(2) / "0-distilled.mp4")
    assert sampled(layout.root, "--full") == 0
    assert same(manual / "000002-0.mp4", layout.samples(2) / "0.mp4")
    assert "0-distilled" not in capsys.readouterr().out
    size = [*SIZE[:6], "--dtype", "float32", "--prompt", "a red square", "--out"]
    base = [workshop / "t2v-a14b", *size]
    assert sampled(*base, tmp_path / "a.mp4", "--distilled", high, low) == 0
    assert same(tmp_path / "a.mp4", layout.samples(0) / "0-distilled.mp4")
    weights = [f"{high}:0.5", f"{low}:0.5"]
    assert sampled(*base, tmp_path / "b.mp4", "--distilled", *weights, "--steps", "3") == 0
    assert not same(tmp_path / "b.mp4", tmp_path / "a.mp4")
    capsys.readouterr()
    for options, problem in (
        (["--distilled", high], "--distilled: t2v-a14b needs two files, HIGH LOW, got 1"),
        (["--distilled", high, "x"], "--distilled: there is no file x"),
        (["--distilled", low, high], "is named as that of the low one; swap the two"),
        (["--distilled", high, low, "--full"], "--full: is without distilled LoRAs"),
        (["--full"], "--full: there are no distilled LoRAs to leave out"),
    ):
        assert sampled(*base, tmp_path / "c.mp4", *options) == 1
        assert problem in capsys.readouterr().err
    assert not (tmp_path / "c.mp4").exists()


def test_every_problem_is_reported_before_anything_is_loaded(
    workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = workshop / "t2v-a14b"
    wrong = ["--width", "33", "--frames", "6", "--guidance", "0.5", "--image", tmp_path / "x.png"]
    wrong += ["--last-image", tmp_path / "y.png", "--control", tmp_path / "z.mp4"]
    wrong += ["--reference", tmp_path / "y.png"]
    assert sampled(model, "--out", tmp_path / "v.txt") == 1
    out, err = capsys.readouterr()
    assert "--prompt: is missing" in err and "v.txt: videos of this kind can't be written" in err
    assert sampled(model, "--prompt", "a", "--out", tmp_path / "v.mp4", *wrong) == 1
    out, err = capsys.readouterr()
    files = ("--image", "--last-image", "--control", "--reference")
    for field in ("--width", "--frames", "--guidance", *files):
        assert f"  {field}: " in err
    assert out == "" and not (tmp_path / "v.mp4").exists()
    (tmp_path / "v.mp4").write_bytes(b"mine")
    (tmp_path / "d.mp4").mkdir()
    (tmp_path / "file").touch()
    for name, problem in (
        ("v.mp4", "exists already; add --force to replace it"),
        ("file/v.mp4", "file is not a folder"),
        ("x" * 250 + ".mp4", "File name too long"),
        (f"{'x' * 300}/v.mp4", "File name too long"),
    ):
        assert sampled(model, "--prompt", "a", "--out", tmp_path / name) == 1
        out, err = capsys.readouterr()
        assert problem in err and out == "", err
    assert sampled(model, "--prompt", "a") == 1
    assert "--out: is missing" in capsys.readouterr().err
    assert sampled("--out", tmp_path / "w.mp4", "--prompt", "a") == 1
    assert "nothing to sample with" in capsys.readouterr().err
    assert sampled(model, "--weights", "best", "--ema", "--out", "w.mp4") == 1
    err = capsys.readouterr().err
    assert "--weights: needs the folder of a run" in err and "--ema: needs" in err
    assert (tmp_path / "v.mp4").read_bytes() == b"mine"
    small = [*SIZE, "--dtype", "float32"]
    assert sampled(model, "--prompt", "a", *small, "--out", tmp_path / "v.mp4", "--force") == 0
    assert len(frames(tmp_path / "v.mp4")) == 5


def test_several_prompts_become_several_videos(
    workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a file as PowerShell writes it, with a byte order mark and the line ends of Windows."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(
        "\ufeff# mine\r\na red square\r\n\r\n  ein grüner Kreis\r\n".encode("utf-16-le")
    )
    base = [workshop / "t2v-a14b", *SIZE, "--dtype", "float32", "--guidance", "1"]
    assert sampled(*base, "--prompts", prompts, "--out", tmp_path / "v.webm") == 0
    assert "seed 0: ein grüner Kreis" in capsys.readouterr().out
    names = sorted(path.name for path in tmp_path.glob("*.webm"))
    assert names == ["v-0.webm", "v-1.webm"]
    assert probe(tmp_path / "v-1.webm").codec == "vp9"
    twice = ["--prompt", "a red square", "--prompt", "ein grüner Kreis"]
    assert sampled(*base, *twice, "--out", tmp_path / "new folder") == 0
    assert (tmp_path / "new folder" / "1.mp4").is_file()
    prompts.write_text("# nothing\n", encoding="utf-8")
    assert sampled(*base, "--prompts", prompts, "--out", tmp_path / "w.mp4") == 1
    assert "prompts.txt" in (err := capsys.readouterr().err) and "holds no prompt" in err


@pytest.mark.parametrize("method", ["dora", "fine_tune", "embedding"])
def test_a_run_of_each_method_is_sampled_as_in_training(
    run_file: RunFile, workshop: Path, method: str
) -> None:
    """Adapters that are merged for sampling, whole transformers, and vectors of a placeholder."""
    clips = (workshop / "named clips").as_posix()
    config = run_file(
        "t2v-a14b",
        *METHODS[method],
        *SAMPLE,
        f"video_data.sources=[{{path: {clips}}}]",
        "sample.prompts=[a <shape>]",
        "sample.at_start=true",
        "train.steps=2",
        "train.switch_expert_every=1",
    )
    WanTrainer(config).fit()
    layout = layout_of(config)
    assert sampled(layout.root) == 0
    ours, base, last = (
        frames(layout.samples_dir / name)
        for name in ("manual/000002-0.mp4", "000000/0.mp4", "000002/0.mp4")
    )
    difference = np.abs(ours - last).mean()
    assert difference <= 0.05 * np.abs(base - last).mean(), difference
    assert np.abs(base - last).mean() > 0


def test_the_moving_average_is_sampled_on_request(
    run_file: RunFile, workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_file(
        "t2v-a14b", *SAMPLE, "train.steps=4", "train.ema={decay: 0.5}", "optimizer.lr=0.1"
    )
    WanTrainer(config).fit()
    layout = layout_of(config)
    assert sampled(layout.root) == 0 and sampled(layout.root, "--ema") == 0
    assert "000004_high_noise_ema" in capsys.readouterr().out
    manual = layout.manual_samples_dir
    assert not same(manual / "000004-0.mp4", manual / "000004-ema-0.mp4")
    averages = sorted(layout.weights_dir.glob("*_ema.safetensors"))
    prompt = ["--prompt", "a", *SIZE, "--dtype", "float32", "--out", tmp_path / "v.mp4"]
    assert sampled(workshop / "t2v-a14b", *prompt, "--lora", *averages) == 0
    assert same(tmp_path / "v.mp4", manual / "000004-ema-0.mp4")
