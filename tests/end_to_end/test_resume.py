"""A run that is interrupted at any step and resumed equals an uninterrupted one, bit for bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.interrupted import leave_interrupted, locking
from support.runs import CLASS_WORD, SMALL_SAMPLE, RunFile, layout_of, outcome, recorder

from onewan import files
from onewan.checkpoint.store import DamagedStateError
from onewan.cli import main
from onewan.config.load import load_run
from onewan.config.schema import ResolvedRun
from onewan.errors import CheckpointError, Interrupted
from onewan.runs.control import request
from onewan.runs.event_file import read_events
from onewan.runs.events import Encoding, Event, Sampling, StepDone
from onewan.train import saving, validation
from onewan.train.resume import changes_since
from onewan.train.run import Run
from onewan.train.saved_state import StateFacts, read_facts
from onewan.train.setup import WanModelSetup
from onewan.train.trainer import WanTrainer
from onewan.train.validation import ClipLosses, clip_losses

pytestmark = pytest.mark.long


def send(what: str, config: ResolvedRun) -> Callable[[], None]:
    """What interrupts the run: a real signal to this process, or a request in the run folder."""
    if what == "request":
        return lambda: request(layout_of(config), "stop")
    number = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM}[what]
    return lambda: os.kill(os.getpid(), number)


def train_with_interruptions(config: ResolvedRun, interruptions: Mapping[int, str]) -> None:
    """Train to the end, stopping after each step in `interruptions` and resuming."""
    remaining = dict(interruptions)

    def listen(event: Event) -> None:
        if isinstance(event, StepDone) and event.step in remaining:
            send(remaining.pop(event.step), config)()

    for number in range(len(interruptions) + 1):
        run = WanTrainer(config, listen=listen, resume=number > 0)
        if remaining:
            with pytest.raises(Interrupted):
                run.fit()
        else:
            run.fit()


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("t2v-a14b", ["train.accumulation=2", "train.schedule=cosine", "train.warmup_steps=1"]),
        ("t2v-a14b", ["model.experts=high", "train.batch_size=2", "method.dropout=0.2"]),
        ("t2v-a14b", ["model.dtype=bfloat16", "train.high_expert_share=density"]),
        ("t2v-a14b", ["memory.weights=nf4", "method.kind=dora"]),
        ("t2v-a14b", [*CLASS_WORD, "method.dropout=0.2", "train.batch_size=2"]),
        ("i2v-a14b", ["train.accumulation=2", "video_data.cache=false"]),
        ("ti2v-5b", ["train.accumulation=2", "train.condition_shares={first: 0.5, none: 0.5}"]),
        ("ti2v-5b", ["video_data.cache=false", "memory.gradient_checkpointing=false"]),
    ],
)
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(
    run_file: RunFile, variant: str, settings: list[str]
) -> None:
    uninterrupted = run_file(variant, *settings, name="uninterrupted")
    interrupted = run_file(variant, *settings, name="interrupted")
    WanTrainer(uninterrupted).fit()
    train_with_interruptions(interrupted, {1: "SIGINT", 3: "request", 4: "SIGTERM"})
    tensors, steps = outcome(uninterrupted)
    again, steps_again = outcome(interrupted)
    assert steps == steps_again and len(steps) == 6
    assert tensors.keys() == again.keys() and len(tensors) > 20
    assert [name for name in tensors if not torch.equal(tensors[name], again[name])] == []


@pytest.mark.parametrize(
    ("settings", "within"),
    [
        (["optimizer={name: adamw_schedule_free, lr: 0.01}"], "trained"),
        (["train.ema={}", "optimizer.lr=0.01", "train.keep_best=true"], "ema"),
        (["optimizer={name: adamw_schedule_free, lr: 0.01}", "sample.every=2"], "sampling"),
    ],
)
def test_a_stop_while_averages_are_loaded_saves_the_trained_weights(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch, settings: list[str], within: str
) -> None:
    """Validation and sampling temporarily replace the trained weights by averages; a stop during
    that time must save the trained weights."""
    chosen = ["ti2v-5b", "validation={clips: 1, every: 2}", "train.steps=4", *settings]
    if within == "sampling":
        chosen += [f"sample.{k}={v}" for k, v in SMALL_SAMPLE.items()]
    uninterrupted, interrupted = (
        run_file(*chosen, name="uninterrupted"),
        run_file(*chosen, name="interrupted"),
    )
    WanTrainer(uninterrupted).fit()

    def listen(event: Event) -> None:
        if within == "sampling" and isinstance(event, Sampling):
            request(layout_of(interrupted), "stop")

    def validated(run: Run, name: Any, kind: Any, between: Callable[[], None]) -> ClipLosses:
        def stop() -> None:
            if kind == within and run.state.step == 2:
                request(layout_of(interrupted), "stop")
            between()

        return clip_losses(run, name, kind, stop)

    monkeypatch.setattr(validation, "clip_losses", validated)
    with pytest.raises(Interrupted):
        WanTrainer(interrupted, listen=listen).fit()
    monkeypatch.undo()
    assert layout_of(interrupted).saved_steps()[-1] == 2
    WanTrainer(interrupted, resume=True).fit()
    tensors, steps = outcome(uninterrupted)
    again, steps_again = outcome(interrupted)
    assert steps == steps_again
    assert tensors.keys() == again.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], again[name])] == []


@pytest.mark.parametrize(
    ("change", "allow"),
    [
        ("validation.timesteps=2", False),
        ("validation.share=0.3", True),
        ("train.save_every=9", False),
        ("optimizer.lr=0.001", True),
        ("optimizer.name=sgd", True),
        ("train.schedule=cosine", True),
        ("train.loss.kind=huber", True),
        ("train.seed=9", True),
    ],
)
def test_base_losses_are_kept_only_if_validation_is_unchanged(
    run_file: RunFile, change: str, allow: bool
) -> None:
    chosen = ["ti2v-5b", "validation={clips: 2, every: 2}"]
    first = run_file(*chosen, "train.steps=2", "train.keep_best=true")
    WanTrainer(first).fit()
    longer = run_file(*chosen, "train.steps=4", "train.keep_best=true", change)
    WanTrainer(longer, resume=True, allow_change=allow).fit()
    events = [e for e in read_events(layout_of(longer).events) if e["event"] == "validation"]
    before, after = events[0]["base"], events[-1]["base"]
    assert before is not None
    is_alike = change.startswith(("train.s", "optimizer")) and "seed" not in change
    assert after == (before if is_alike else None)


@pytest.mark.parametrize(
    ("settings", "free"),
    [([], True), (["train.schedule=cosine"], False), (["train.cooldown_steps=1"], False)],
)
def test_more_steps_are_refused_where_the_learning_rate_depends_on_them(
    run_file: RunFile, settings: list[str], free: bool
) -> None:
    WanTrainer(run_file("ti2v-5b", "train.steps=2", *settings)).fit()
    longer = WanTrainer(run_file("ti2v-5b", "train.steps=3", *settings), resume=True)
    if free:
        longer.fit()
    else:
        with pytest.raises(
            CheckpointError, match=r"train\.steps: was 2, is 3; the learning rate follows"
        ):
            longer.fit()


def test_missing_parts_of_a_state_are_reinitialized_only_if_allowed(run_file: RunFile) -> None:
    WanTrainer(run_file("ti2v-5b", "train.steps=2", "optimizer.lr=0.01")).fit()
    config = run_file("ti2v-5b", "optimizer.name=sgd", "train.ema={}", name="other")
    folder = layout_of(config).root.with_name("run") / "state" / "000002"
    run = WanModelSetup(config).build()
    facts = read_facts(folder)
    with pytest.raises(CheckpointError, match=r"single_ema\.safetensors: is missing"):
        run.state.load(folder, facts)
    average, optimizer = run.state.load(folder, facts, allow_change=True)
    assert average == ("single: the state has no moving average; it starts at the weights")
    assert optimizer.startswith("single: the optimizer is reset") and "adamw" in optimizer
    weights = run.state.experts["single"].method.read()
    averages = run.state.experts["single"].trainable.ema.state_dict()
    for name, tensor in averages.items():
        assert torch.equal(tensor, weights[name.replace(".default", "")])
    for trainable in run.state.trainables:
        trainable.ema = None
    with pytest.raises(CheckpointError, match="is of optimizer adamw, and this run's is sgd"):
        run.state.load(folder, facts)


def test_resuming_with_other_package_versions_gives_a_warning(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    WanTrainer(run_file("ti2v-5b", "train.steps=1")).fit()
    config = run_file("ti2v-5b", "train.steps=2")
    events: list[dict[str, Any]] = []
    monkeypatch.setattr(saving, "versions", lambda: {"torch": "9.9"})
    WanTrainer(config, listen=recorder(events), resume=True).fit()
    (warning,) = [e["text"] for e in events if e["event"] == "warning"]
    assert "(now 9.9)" in warning and "bit-exact results are not promised" in warning


def test_what_a_killed_trainer_left_is_deleted_at_the_next_start(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    WanTrainer(run_file("ti2v-5b", "train.steps=1")).fit()
    config = run_file("ti2v-5b", "train.steps=2")
    layout = layout_of(config)
    left = leave_interrupted(
        layout.run_file,
        layout.state(2),
        layout.weights(1),
        layout.samples(1) / "0.mp4",
        config.video_data.cache_dir / "video" / "ab" / "entry.safetensors",
    )
    with locking(layout.weights_dir / ".lock-run_000001.safetensors"):
        pass  # killed after the last export was complete
    monkeypatch.setattr(files, "LARGE_BYTES", 1)
    events: list[dict[str, Any]] = []
    WanTrainer(config, listen=recorder(events), resume=True).fit()
    assert not any(path.exists() for path in left)
    assert not [path for path in layout.root.rglob(".*") if path.is_file()], "not even a lock"
    note = next(e["text"] for e in events if e["event"] == "note")
    assert note == "deleted 4 temporary files of interrupted processes (0.00 GB)"
    (report,) = [e["report"] for e in events if e["event"] == "data"]
    assert any("deleted 1 temporary file of interrupted processes" in line for line in report)


def test_a_stop_while_encoding_loses_nothing(run_file: RunFile, tmp_path: Path) -> None:
    config = run_file("t2v-a14b", f"video_data.cache_dir={tmp_path / 'own cache'}", "train.steps=1")
    seen: list[dict[str, Any]] = []

    def listen(event: Event) -> None:
        recorder(seen)(event)
        if isinstance(event, Encoding) and event.what == "encoding clips":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        WanTrainer(config, listen=listen).fit()
    total = seen[-2]["total"]
    seen.clear()
    WanTrainer(config, listen=recorder(seen)).fit()
    clips = [e for e in seen if e.get("what") == "encoding clips"]
    assert len(clips) == total - 1


def test_a_damaged_state_falls_back_to_the_one_before(run_file: RunFile) -> None:
    config = run_file("t2v-a14b", "train.save_every=2", "train.keep_last=3")
    WanTrainer(config).fit()
    expected, steps = outcome(config)
    newest = layout_of(config).state(6)
    damaged = newest / "high.safetensors"
    content = damaged.read_bytes()
    damaged.unlink()  # not overwritten: the tensors read above are mapped to the old file
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    events: list[dict[str, Any]] = []
    WanTrainer(config, listen=recorder(events), resume=True).fit()
    warning = next(e["text"] for e in events if e["event"] == "warning")
    assert str(newest) in warning and "high.safetensors" in warning
    assert next(e for e in events if e["event"] == "resumed")["step"] == 4
    again, all_steps = outcome(config)
    assert all(torch.equal(expected[k], again[k]) for k in expected)
    assert all_steps[-2:] == steps[-2:]


def test_old_states_are_deleted_and_exports_are_kept(run_file: RunFile) -> None:
    kept = ("train.keep_last=2", "output.keep_last=null")
    config = run_file("ti2v-5b", "train.save_every=1", *kept)
    WanTrainer(config).fit()
    assert layout_of(config).saved_steps() == [5, 6]
    assert len(list(layout_of(config).weights_dir.iterdir())) == 6


def test_resume_refuses_changes_that_affect_results(run_file: RunFile) -> None:
    WanTrainer(run_file("t2v-a14b", "train.steps=2"), run_file="# as given\n").fit()
    with pytest.raises(CheckpointError, match="already holds a run"):
        WanTrainer(run_file("t2v-a14b", "train.steps=2")).fit()
    changed = run_file(
        "t2v-a14b",
        "train.steps=3",
        "optimizer.lr=0.1",
        "wan_config.max_frames=5",
        "memory.weights=int8",
        "memory.offload_inactive_expert=false",
    )
    with pytest.raises(CheckpointError) as refusal:
        WanTrainer(changed, resume=True).fit()
    for part in (
        "optimizer.lr: was 0.005, is 0.1",
        "wan_config.max_frames",
        "the data set",
        "memory.weights: was 'as_stored', is 'int8'",
    ):
        assert part in str(refusal.value)
    assert "memory.offload_inactive_expert" not in str(refusal.value)
    assert "train.steps" not in str(refusal.value)  # more steps change none of the earlier ones
    layout = layout_of(changed)
    assert "0.005" in layout.resolved.read_text(encoding="utf-8")  # a refusal changes nothing
    events: list[dict[str, Any]] = []
    WanTrainer(changed, listen=recorder(events), resume=True, allow_change=True).fit()
    assert any(e["event"] == "warning" and "optimizer.lr" in e["text"] for e in events)
    assert events[-1]["event"] == "finished" and events[-1]["step"] == 3
    assert "0.005" not in layout.resolved.read_text(encoding="utf-8")
    assert layout.run_file.read_text(encoding="utf-8") == "# as given\n"


def test_a_setting_of_the_command_line_that_is_left_out_on_resume_is_named(
    run_file: RunFile,
) -> None:
    """Also after the folder, which keeps it, was resumed; not where it is given again."""
    given = ["optimizer.lr=0.02", "output.keep_last=3"]
    chosen = run_file("ti2v-5b", "train.steps=1", *given)
    WanTrainer(chosen, overrides=given).fit()
    folder = layout_of(chosen).root
    WanTrainer(load_run(folder, ["train.steps=2"]), resume=True, overrides=["train.steps=2"]).fit()
    with pytest.raises(CheckpointError) as refusal:
        WanTrainer(run_file("ti2v-5b", "train.steps=3", given[1]), resume=True).fit()
    lines = str(refusal.value).splitlines()
    assert lines[1:] == [
        "  optimizer.lr: was 0.02 (given on the command line), is 0.005",
        "  the run's folder keeps what was given on the command line: "
        f"onewan train {folder} --resume; with the run file, give it again",
    ]
    events: list[dict[str, Any]] = []
    longer = run_file("ti2v-5b", "train.steps=3", given[0])
    WanTrainer(longer, listen=recorder(events), resume=True, overrides=["train.steps=3"]).fit()
    notes = [e["text"] for e in events if e["event"] == "note"]
    assert any("output.keep_last: was 3 (given on the command line), is 4" in n for n in notes)
    assert any("train.steps: was 2, is 3" in note for note in notes)  # given now
    again = run_file("ti2v-5b", "train.steps=4", "optimizer.lr=0.03")
    with pytest.raises(CheckpointError, match=r"optimizer\.lr: was 0\.02, is 0\.03$"):
        WanTrainer(again, resume=True, overrides=["optimizer.lr=0.03", "train.steps=4"]).fit()


def test_an_export_that_was_interrupted_is_done_on_resume(run_file: RunFile) -> None:
    """A run that was killed between saving its last state and exporting it still exports it."""
    config = run_file("t2v-a14b", "train.steps=2", "validation.clips=1")
    WanTrainer(config).fit()
    files = list(layout_of(config).weights_dir.glob("*_000002_*"))
    expected = {p.name: load_file(p) for p in files}
    for path in files:
        path.unlink()
    events: list[dict[str, Any]] = []
    WanTrainer(config, listen=recorder(events), resume=True).fit()
    assert [e["event"] for e in events].count("exported") == len(files) == 2
    for path in files:
        assert all(torch.equal(v, expected[path.name][k]) for k, v in load_file(path).items())
    assert not [e for e in events if e["event"] == "validation"]  # the state contains its results


def test_sampling_that_was_stopped_is_completed_on_resume(run_file: RunFile) -> None:
    size = [f"sample.{k}={v}" for k, v in {"width": 64, "height": 64, "frames": 5}.items()]
    config = run_file(
        "ti2v-5b", "train.steps=2", "sample.prompts=[one, two]", *size, "sample.steps=2"
    )

    def listen(event: Event) -> None:
        if isinstance(event, Sampling) and event.number == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        WanTrainer(config, listen=listen).fit()
    folder = layout_of(config).samples(2)
    assert [p.name for p in folder.iterdir()] == ["0.mp4"]
    events: list[dict[str, Any]] = []
    WanTrainer(config, listen=recorder(events), resume=True).fit()
    assert sorted(p.name for p in folder.iterdir()) == ["0.mp4", "1.mp4"]
    assert [e["prompt"] for e in events if e["event"] == "sampled"] == ["two"]


def test_a_state_of_a_version_with_other_fields_is_refused_and_names_them(
    run_file: RunFile,
) -> None:
    config = run_file("ti2v-5b")
    saved = config.model_dump(mode="json")
    saved["train"] |= {"expert_block": 2}
    facts = StateFacts(
        step=1, base_loss={}, validated=None, best=None, versions={}, config=saved, dataset=""
    )
    named = r"^state\.json: .*\(config\.train\.expert_block\).*version that saved it"
    with pytest.raises(CheckpointError, match=named) as refusal:
        changes_since(facts, config, "", {}, "state.json")
    # An older state would not help.
    assert not isinstance(refusal.value, DamagedStateError)


def test_changes_are_listed_on_resume(run_file: RunFile, tmp_path: Path) -> None:
    WanTrainer(run_file("t2v-a14b", "train.steps=2")).fit()
    harmless = run_file(
        "t2v-a14b",
        "train.steps=3",
        "train.keep_last=5",
        "output.dtype=bfloat16",
        f"video_data.cache_dir={tmp_path / 'elsewhere'}",
    )
    events: list[dict[str, Any]] = []
    WanTrainer(harmless, listen=recorder(events), resume=True).fit()
    notes = "\n".join(e["text"] for e in events if e["event"] == "note")
    for line in (
        "train.steps: was 2, is 3",
        "train.keep_last: was 2, is 5",
        "output.dtype: was nothing, is 'bfloat16'",
        f"is '{tmp_path / 'elsewhere'}'",
    ):
        assert line in notes
    assert "Path(" not in notes
    other = run_file("t2v-a14b", "train.steps=4", "optimizer={name: sgd, lr: 0.1}")
    with pytest.raises(CheckpointError, match=r"optimizer\.name: was 'adamw', is 'sgd'"):
        WanTrainer(other, resume=True).fit()
    events.clear()
    WanTrainer(other, listen=recorder(events), resume=True, allow_change=True).fit()
    warnings = [e["text"] for e in events if e["event"] == "warning"]
    assert any("high: the optimizer is reset" in text for text in warnings)
    assert events[-1]["event"] == "finished"


def test_save_every_minutes_saves_without_exporting(run_file: RunFile) -> None:
    config = run_file("ti2v-5b", "train.save_every_minutes=1e-6", "train.steps=3")
    events: list[dict[str, Any]] = []
    WanTrainer(config, listen=recorder(events)).fit()
    assert [e["step"] for e in events if e["event"] == "saved"] == [1, 2, 3]
    assert [e["step"] for e in events if e["event"] == "exported"] == [3]


def test_again_repeats_the_run_as_a_new_one(
    run_file: RunFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_file("ti2v-5b", "train.steps=2", "method.rank=3")
    WanTrainer(config).fit()
    folder = tmp_path / "runs" / "run"
    assert main(["train", str(folder), "--again"]) == 0
    assert str(folder.with_name("run-2")) in capsys.readouterr().out
    expected, steps = outcome(config)
    again, steps_again = outcome(load_run(folder.with_name("run-2")))
    assert steps == steps_again
    assert all(torch.equal(expected[name], again[name]) for name in expected)
    assert main(["train", str(tmp_path / "run.yaml"), "--again"]) == 1
    assert "takes the folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "optimizer",
    [
        "adafactor",
        "adamw_8bit",
        "adamw_low_bit",
        "adamw_schedule_free",
        "adam_mini",
        "came",
        "lion",
        "muon",
        "prodigy",
        "prodigy_plus_schedule_free",
        "sgd",
    ],
)
def test_every_optimizer_resumes_exactly(run_file: RunFile, optimizer: str) -> None:
    chosen = ["ti2v-5b", f"optimizer={{name: {optimizer}}}", "train.ema={}", "train.steps=4"]
    uninterrupted, interrupted = (
        run_file(*chosen, name="uninterrupted"),
        run_file(*chosen, name="interrupted"),
    )
    WanTrainer(uninterrupted).fit()
    train_with_interruptions(interrupted, {2: "request"})
    assert outcome(uninterrupted)[1] == outcome(interrupted)[1]
    states = [
        layout_of(config).state(4) / "single.safetensors" for config in (uninterrupted, interrupted)
    ]
    ours, theirs = (load_file(path) for path in states)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "schedule", ["linear", "cosine", "cosine_with_restarts", "rex", "polynomial"]
)
def test_every_schedule_resumes_exactly(run_file: RunFile, schedule: str) -> None:
    chosen = [
        "t2v-a14b",
        f"train.schedule={schedule}",
        "train.warmup_steps=1",
        "train.cooldown_steps=1",
        "per_expert={high: {steps: 3, lr: 0.01, rank: 2}, low: {steps: 5, rank: 6}}",
        "train.steps=8",
    ]
    uninterrupted, interrupted = (
        run_file(*chosen, name="uninterrupted"),
        run_file(*chosen, name="interrupted"),
    )
    WanTrainer(uninterrupted).fit()
    train_with_interruptions(interrupted, {1: "request", 4: "request"})
    expected, steps = outcome(uninterrupted)
    again, steps_again = outcome(interrupted)
    assert steps == steps_again
    assert all(torch.equal(expected[name], again[name]) for name in expected)
    assert [name for _, name, *_ in steps].count("high") == 3
    assert {len({lr for _, name, _, _, lr, _ in steps if name == e}) for e in ("high", "low")} != {
        1
    }
