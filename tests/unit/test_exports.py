"""Which exported weights of a run are complete, by the names in its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from onewan.config.load import load_run
from onewan.config.schema import ResolvedRun
from onewan.errors import CheckpointError
from onewan.runs.exports import choose_weights
from onewan.runs.layout import RunLayout


def run(folder: Path, variant: str = "t2v-a14b", *overrides: str) -> ResolvedRun:
    path = folder / "fox.yaml"
    path.write_text(f"model: {{path: model, variant: {variant}}}\n", encoding="utf-8")
    return load_run(path, overrides)


def layout_with(folder: Path, *names: str) -> RunLayout:
    layout = RunLayout(folder / "fox")
    layout.create()
    for name in names:
        (layout.weights_dir / name).touch()
    return layout


def test_the_newest_complete_step_a_named_one_and_the_best_are_found(tmp_path: Path) -> None:
    layout = layout_with(
        tmp_path,
        *(
            f"fox_{step}_{e}_noise.safetensors"
            for step in ("000010", "best")
            for e in ("high", "low")
        ),
        *(f"former_name_000020_{e}_noise.safetensors" for e in ("high", "low")),
        "fox_000030_high_noise.safetensors",  # the trainer is writing the other one
    )
    config = run(tmp_path)
    newest = choose_weights(config, layout, "newest")
    assert (newest.label, newest.short_label) == ("step 20", "000020")
    assert {n: p.name for n, p in newest.experts.items()} == {
        "high": "former_name_000020_high_noise.safetensors",
        "low": "former_name_000020_low_noise.safetensors",
    }
    assert choose_weights(config, layout, 10).short_label == "000010"
    best = choose_weights(config, layout, "best")
    assert best.files["low"].name == "fox_best_low_noise.safetensors"
    with pytest.raises(CheckpointError, match=r"no weights of step 30; it has those of 10, 20, be"):
        choose_weights(config, layout, 30)
    only_high = run(tmp_path, "t2v-a14b", "model.experts=high")
    assert list(choose_weights(only_high, layout, "newest").files) == ["high"]


def test_formats_averages_embeddings_and_folders_have_their_own_names(tmp_path: Path) -> None:
    layout = layout_with(
        tmp_path,
        "fox_000010_kohya.safetensors",
        "fox_000010_ema_kohya.safetensors",
        "fox_000010_word.safetensors",
        "fox_000010_word_ema.safetensors",
        "fox_000020",
    )
    config = run(
        tmp_path,
        "ti2v-5b",
        "output.formats=[comfyui, kohya]",
        "embeddings=[{placeholder: <word>, initial_text: a}]",
        "train.ema={}",
    )
    plain, averaged = (choose_weights(config, layout, "newest", averaged=a) for a in (False, True))
    assert [p.name for p in plain.files.values()] == [
        "fox_000010_kohya.safetensors",
        "fox_000010_word.safetensors",
    ]
    assert [p.name for p in averaged.files.values()] == [
        "fox_000010_ema_kohya.safetensors",
        "fox_000010_word_ema.safetensors",
    ]
    tuned = run(tmp_path, "ti2v-5b", "method={kind: fine_tune}", "output.formats=[diffusers]")
    assert choose_weights(tuned, layout, "newest").files["single"].name == "fox_000020"
    with pytest.raises(CheckpointError, match=r"fox: has no moving average .*leave --ema out"):
        choose_weights(tuned, layout, "newest", averaged=True)


def test_a_run_without_weights_says_so(tmp_path: Path) -> None:
    layout = layout_with(tmp_path, "fox_000010_high_noise.safetensors")
    with pytest.raises(CheckpointError, match=r"no complete exported weights yet.*--weights none"):
        choose_weights(run(tmp_path), layout, "best")
