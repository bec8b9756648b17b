"""How training starts: anew, from a state, or not at all; and which state it continues from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.runs import SMALL_SAMPLE, RunFile, layout_of, recorder, write_run_file

from onewan.checkpoint.store import MANIFEST
from onewan.config.schema import ResolvedRun
from onewan.errors import CheckpointError
from onewan.files import file_digest
from onewan.media.probe import probe
from onewan.runs.layout import RunLayout
from onewan.runs.log import ListenerSink, RunLog
from onewan.train.resume import Resume
from onewan.train.run import Run
from onewan.train.saving import StateSaver
from onewan.train.setup import WanModelSetup
from onewan.train.trainer import WanTrainer

# ----------------------------------------------------------------------------- starting or resuming


def folder_content(config: ResolvedRun) -> dict[str, bytes]:
    root = layout_of(config).root
    return {str(p): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_resume_with_nothing_to_resume_is_refused_and_names_similar_runs(
    run_file: RunFile,
) -> None:
    WanTrainer(run_file("ti2v-5b", "train.steps=1", name="portrait")).fit()
    typo = run_file("ti2v-5b", "train.steps=1", name="portrat")
    with pytest.raises(CheckpointError) as refusal:
        WanTrainer(typo, resume=True).fit()
    message = str(refusal.value)
    assert message.startswith(f"{layout_of(typo).root}: there is no run of this name")
    assert "can be resumed: portrait." in message and "without --resume" in message
    assert not layout_of(typo).root.exists()
    # A run that has saved no state yet is not started again under the name of resuming either.
    layout_of(typo).create()
    layout_of(typo).resolved.touch()
    with pytest.raises(CheckpointError, match="has no saved state in state/"):
        WanTrainer(typo, resume=True).fit()


def test_resume_auto_does_whichever_is_possible(run_file: RunFile) -> None:
    config = run_file("ti2v-5b", "train.steps=1")
    events: list[dict[str, Any]] = []
    WanTrainer(config, listen=recorder(events), resume="auto").fit()
    (note,) = [e["text"] for e in events if e["event"] == "note"]
    assert "has no saved state; starting at step 0" in note
    longer = run_file("ti2v-5b", "train.steps=2")
    WanTrainer(longer, listen=recorder(events), resume="auto").fit()
    assert [e["step"] for e in events if e["event"] == "resumed"] == [1]


def test_a_finished_run_says_how_it_goes_on(run_file: RunFile) -> None:
    config = run_file("ti2v-5b", "train.steps=2")
    WanTrainer(config).fit()
    events: list[dict[str, Any]] = []
    WanTrainer(config, listen=recorder(events), resume=True).fit()
    notes = [e["text"] for e in events if e["event"] == "note"]
    assert notes == [
        "nothing is left to train: all 2 steps are done; a larger train.steps continues, such as "
        "train.steps=4"
    ]
    assert not [e for e in events if e["event"] == "step"]
    events.clear()
    longer = run_file("ti2v-5b", "train.steps=3")
    WanTrainer(longer, listen=recorder(events), resume=True).fit()
    assert not any("nothing is left" in e["text"] for e in events if e["event"] == "note")
    with pytest.raises(CheckpointError, match=r"--resume, .* --again, .*output\.name"):
        WanTrainer(config).fit()


@pytest.mark.parametrize(
    ("kept", "left"),
    [
        ("weights", "exported weights (the newest of step 1)"),
        ("samples", "sample videos (the newest of step 1)"),
        ("events.jsonl", "events (a state of step 1 was saved)"),
    ],
)
@pytest.mark.parametrize("resume", [False, True, "auto"])
def test_results_whose_states_are_gone_are_not_overwritten(
    trained: ResolvedRun, kept: str, left: str, resume: Resume
) -> None:
    for path in layout_of(trained).root.iterdir():
        if path.name != kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = folder_content(trained)
    with pytest.raises(CheckpointError) as refusal:
        WanTrainer(trained, resume=resume).fit()
    assert left in str(refusal.value) and "output.name" in str(refusal.value)
    assert folder_content(trained) == before


def test_a_run_that_ended_before_its_first_state_is_started_again(run_file: RunFile) -> None:
    """It has its files, events and videos, but nothing that could be lost. Its videos may be of
    other settings, so they are made again."""
    small = [f"sample.{key}={value}" for key, value in SMALL_SAMPLE.items()]
    config = run_file("ti2v-5b", "train.steps=1", "sample.every=1", *small)
    layout = layout_of(config)
    layout.samples(1).mkdir(parents=True)
    (layout.samples(1) / "0.mp4").write_bytes(b"of an earlier start")
    layout.events.write_text('{"event": "started"}\n', encoding="utf-8")
    WanTrainer(config, resume="auto").fit()
    assert layout.saved_steps() == [1]
    assert probe(layout.samples(1) / "0.mp4").width == 64


@pytest.fixture(scope="module")
def trained_once(
    workshop: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ResolvedRun, Path]:
    """A run of one step with a state, weights, and what could be a video; and a copy of it."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_run_file(workshop, folder, "ti2v-5b", "train.steps=1")
    WanTrainer(config).fit()
    layout = layout_of(config)
    layout.samples(1).mkdir()
    (layout.samples(1) / "0.mp4").write_bytes(b"video")
    return config, Path(shutil.copytree(layout.root, folder / "copy"))


@pytest.fixture
def trained(trained_once: tuple[ResolvedRun, Path]) -> ResolvedRun:
    config, copy = trained_once
    root = layout_of(config).root
    shutil.rmtree(root)
    shutil.copytree(copy, root)
    return config


@pytest.mark.parametrize(
    ("settings", "is_refused"),
    [
        (["train={accumulation: 2, caption_dropout: 0.5}"], True),
        (["train.accumulation=2"], True),  # some clips have several captions
        # Each clip has one caption, so nothing is drawn.
        (["train.accumulation=2", "video_data.captions=whole"], False),
        (["train.caption_dropout=0.5"], False),  # both ways are the same
    ],
)
def test_a_state_with_other_draws_of_captions_is_continued_only_if_allowed(
    run_file: RunFile, settings: list[str], is_refused: bool
) -> None:
    config = run_file("ti2v-5b", *settings, "train.steps=1")
    WanTrainer(config).fit()
    state = layout_of(config).state(1)
    set_fact(caption_draws=None)(state)
    write_manifest(state)
    longer = run_file("ti2v-5b", *settings, "train.steps=2")
    if is_refused:
        with pytest.raises(CheckpointError) as refusal:
            WanTrainer(longer, resume=True).fit()
        (line,) = refusal.value.details
        assert line.startswith("captions: an earlier version of onewan drew them by the sample's")
    WanTrainer(longer, resume=True, allow_change=is_refused).fit()
    assert layout_of(config).saved_steps() == [1, 2]


# ---------------------------------------------------------------------------------- damaged content


def write_manifest(state: Path) -> None:
    """A manifest that lists the files as they are now."""
    files = [path for path in state.iterdir() if path.name != MANIFEST]
    manifest = {p.name: {"bytes": p.stat().st_size, "blake2b": file_digest(p)} for p in files}
    (state / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def set_fact(**changes: Any) -> Callable[[Path], None]:
    """Change fields of state.json."""

    def change(state: Path) -> None:
        file = state / "state.json"
        facts = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(facts | changes), encoding="utf-8")

    return change


def set_text(name: str, text: bytes) -> Callable[[Path], None]:
    def change(state: Path) -> None:
        (state / name).write_bytes(text)

    return change


def without(name: str) -> Callable[[Path], None]:
    return lambda state: (state / name).unlink()


def set_tensor(name: str, tensor: torch.Tensor | None) -> Callable[[Path], None]:
    """Replace the first tensor of a file, or delete it."""

    def change(state: Path) -> None:
        file = state / name
        tensors = {key: value.clone() for key, value in load_file(file).items()}
        first = min(tensors)
        if tensor is None:
            del tensors[first]
        else:
            tensors[first] = tensor.expand(tensors[first].shape) if tensor.ndim == 0 else tensor
        save_file({key: value.contiguous() for key, value in tensors.items()}, file)

    return change


def set_optimizer(*path: str, value: Any) -> Callable[[Path], None]:
    """Replace what `path` leads to in the optimizer's file; "*" is the first weight."""

    def change(state: Path) -> None:
        file = state / "single_optimizer.pt"
        content = torch.load(file, weights_only=True)
        node = content
        for key in path[:-1]:
            node = node[min(node) if key == "*" else key]
        if path:
            node[min(node) if path[-1] == "*" else path[-1]] = value
        torch.save(content if path else value, file)

    return change


def truncated(name: str) -> Callable[[Path], None]:
    def change(state: Path) -> None:
        (state / name).write_bytes((state / name).read_bytes()[:-100])

    return change


STATE = ("weights", "*", "state")
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no object": (set_text("state.json", b"[]"), "state.json: "),
    "not JSON": (set_text("state.json", b"{"), "state.json: Invalid JSON"),
    "nested": (set_text("state.json", b"[" * 100_000), "state.json: Invalid JSON"),
    "not UTF-8": (set_text("state.json", b"\xff\xfe{}"), "state.json: Invalid JSON"),
    "missing": (without("state.json"), "manifest.json: does not list state.json"),
    "step of a string": (set_fact(step="4"), "state.json: step: Input should be a valid integer"),
    "other step": (set_fact(step=3), "state.json: step: is 3 in the folder of 000004"),
    "step of 400 digits": (set_fact(step=10**400), "state.json: step: "),
    "NaN": (set_fact(base_loss={"single": float("nan")}), "state.json: base_loss.single: "),
    "best of a list": (set_fact(best=[1]), "state.json: best: "),
    "later best": (set_fact(best={"step": 9, "loss": 1.0}), "best.step is 9, which is after step"),
    "no versions": (set_fact(versions=None), "state.json: versions: "),
    "odd config": (set_fact(config={"train": 5}), "state.json: has fields of the run file that"),
    "no tensors": (set_text("single.safetensors", b""), "single.safetensors: can't be read"),
    "cut off": (truncated("single.safetensors"), "single.safetensors: can't be read"),
    "missing tensor": (set_tensor("single.safetensors", None), "single.safetensors: does not fit"),
    "other shape": (
        set_tensor("single.safetensors", torch.zeros(3)),
        "single.safetensors: does not fit",
    ),
    "other dtype": (
        set_tensor("single.safetensors", torch.tensor(0.0, dtype=torch.float64)),
        "single.safetensors: 1 weights have another dtype",
    ),
    "NaN in weights": (
        set_tensor("single.safetensors", torch.tensor(float("nan"))),
        "has NaN or infinite values",
    ),
    "average of another shape": (
        set_tensor("single_ema.safetensors", torch.zeros(3)),
        "single_ema.safetensors: blocks.",
    ),
    "no pickle": (set_text("single_optimizer.pt", b"x"), "single_optimizer.pt: can't be read"),
    "cut-off pickle": (truncated("single_optimizer.pt"), "single_optimizer.pt: can't be read"),
    "a list": (set_optimizer(value=[]), "single_optimizer.pt: is not the state of an optimizer"),
    "no name": (set_optimizer("optimizer", value=5), "optimizer: is not a name"),
    "other optimizer": (set_optimizer("optimizer", value="sgd"), "is of optimizer sgd"),
    "an entry of a number": (set_optimizer("weights", "*", value=5), "is not an optimizer's entry"),
    "a shape of text": (set_optimizer("weights", "*", "shape", value="4"), "the state is of shape"),
    "no moments": (set_optimizer(*STATE, value={"step": torch.tensor(1.0)}), "exp_avg: is missing"),
    "moments of another shape": (
        set_optimizer(*STATE, "exp_avg", value=torch.zeros(3)),
        "state.exp_avg: is a tensor of shape (3,)",
    ),
    "moments of a number": (set_optimizer(*STATE, "exp_avg", value=3), "state.exp_avg: is of the"),
    "NaN counter": (
        set_optimizer(*STATE, "step", value=torch.tensor(float("nan"))),
        "state.step: has NaN",
    ),
    "negative counter": (
        set_optimizer(*STATE, "step", value=torch.tensor(-5.0)),
        "state.step: tensor(-5.) is not a number of steps",
    ),
    "other parameters": (
        set_optimizer("weights", "*", "group", value={"params": []}),
        "group: has the entry 'params'",
    ),
}


@pytest.fixture(scope="module")
def saved(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ResolvedRun, Run]:
    """A run with states of the steps 2 and 4, and the same run built to be resumed."""
    folder = tmp_path_factory.mktemp("saved")
    chosen = ("train.steps=4", "train.save_every=2", "train.ema={}")
    config = write_run_file(workshop, folder, "ti2v-5b", *chosen)
    WanTrainer(config).fit()
    return config, WanModelSetup(config).build()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_state_with_other_content_is_skipped_and_the_field_is_named(
    saved: tuple[ResolvedRun, Run], tmp_path: Path, damage: str
) -> None:
    """Its manifest fits, so that only reading the files finds it."""
    config, run = saved
    layout = RunLayout(tmp_path)
    shutil.copytree(layout_of(config).states_dir, layout.states_dir)
    change, problem = DAMAGE[damage]
    change(layout.state(4))
    write_manifest(layout.state(4))
    events: list[dict[str, Any]] = []
    log = RunLog(ListenerSink(recorder(events)))
    assert StateSaver(config, layout, log).restore(run, allow_change=False)
    (warning,) = [e["text"] for e in events if e["event"] == "warning"]
    assert warning.startswith(f"skipped a damaged state: {layout.state(4)}")
    assert problem in warning and len(warning.splitlines()) == 1
    assert [e["step"] for e in events if e["event"] == "resumed"] == [2]
    assert run.state.step == 2
    expected = load_file(layout.state(2) / "single.safetensors")
    weights = run.state.trainables[0].weights.read()
    assert all(torch.equal(expected[name], weights[name]) for name in expected)


def test_without_an_intact_state_the_error_names_each_problem(run_file: RunFile) -> None:
    config = run_file("ti2v-5b", "train.steps=2", "train.save_every=1")
    WanTrainer(config).fit()
    layout = layout_of(config)
    for step, change in ((1, set_fact(step=7)), (2, truncated("single.safetensors"))):
        change(layout.state(step))
        write_manifest(layout.state(step))
    with pytest.raises(CheckpointError) as refusal:
        WanTrainer(config, resume=True).fit()
    first, *others = str(refusal.value).splitlines()
    assert "no training state is intact" in first and "output.name" in first
    assert len(others) == 2 and "single.safetensors: can't be read" in others[0]
    assert "step: is 7 in the folder of 000001" in others[1]
