"""Settings that change while a run trains, and what is ordered from its trainer.

A change is made at one step, whichever process comes to it: a run that was killed and resumed
before or after it, and a run that is repeated, compute the same, bit for bit.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import METHODS, SMALL_SAMPLE, RunFile, layout_of, outcome

from onewan.config.load import load_run
from onewan.config.schema import ResolvedRun
from onewan.errors import CheckpointError
from onewan.report.page import write_report
from onewan.runs.control import order, request
from onewan.runs.event_file import read_events
from onewan.runs.events import Event, StepDone
from onewan.train.resume import with_recorded_changes
from onewan.train.trainer import WanTrainer

SAMPLED = [f"sample.{name}={value}" for name, value in SMALL_SAMPLE.items()]


def after(steps: Mapping[int, Callable[[], object]]) -> Callable[[Event], None]:
    """A listener that calls each function once, after its step."""
    waiting = dict(steps)

    def listen(event: Event) -> None:
        if isinstance(event, StepDone) and event.step in waiting:
            waiting.pop(event.step)()

    return listen


def changing(config: ResolvedRun, **settings: Any) -> Callable[[], None]:
    """Orders `settings`, with two underscores for the dots of their names."""
    named = {name.replace("__", "."): value for name, value in settings.items()}
    return lambda: order(layout_of(config), "settings", named)


def kill() -> None:
    """Ends the run without a saved state, as nothing but a second Ctrl-C does in one process."""
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


def events_of(config: ResolvedRun, kind: str) -> list[Mapping[str, Any]]:
    return [e for e in read_events(layout_of(config).events) if e["event"] == kind]


def assert_equal_results(one: ResolvedRun, other: ResolvedRun) -> None:
    (tensors, steps), (others, other_steps) = outcome(one), outcome(other)
    # Steps that a killed process did are done again by the next one.
    assert {step[0]: step for step in steps} == {step[0]: step for step in other_steps}
    assert {step[0] for step in steps} == {1, 2, 3, 4, 5, 6}
    assert tensors.keys() == others.keys() and len(tensors) > 2
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        (
            ["method.lora_plus_ratio=4", "train.ema={}", "train.schedule=cosine"],
            {"optimizer__lr": 0.02, "train__max_grad_norm": 0.01, "train__ema__decay": 0.05},
        ),
        pytest.param(
            ["optimizer={name: adamw_schedule_free, lr: 0.01}"],
            {"optimizer__lr": 0.003},
            marks=pytest.mark.long,
        ),
        pytest.param([*METHODS["fine_tune"]], {"optimizer__lr": 0.004}, marks=pytest.mark.long),
        pytest.param(
            [*METHODS["embedding"], "train.max_grad_norm=null"],
            {"optimizer__lr": 0.004, "train__max_grad_norm": 0.01},
            marks=pytest.mark.long,
        ),
    ],
    ids=["lora", "schedule-free", "fine-tune", "embedding"],
)
@pytest.mark.parametrize("killed_at", [4, pytest.param(5, marks=pytest.mark.long)])
def test_a_change_is_made_at_its_step_by_each_process(
    run_file: RunFile,
    workshop: Path,
    settings: list[str],
    changes: dict[str, float],
    killed_at: int,
) -> None:
    """Killed after step 4 the run is resumed from the state of step 2, before the change; killed
    after step 5 from that of step 4, which has it."""
    clips = f"video_data.sources.0.path={workshop / 'named clips'}"  # with the placeholder
    saving = [clips, "train.save_every=2", "model.experts=high"]
    plain = run_file("t2v-a14b", *settings, *saving, name="plain")
    whole = run_file("t2v-a14b", *settings, *saving, name="whole")
    killed = run_file("t2v-a14b", *settings, *saving, name="killed")
    WanTrainer(plain).fit()
    WanTrainer(whole, listen=after({3: changing(whole, **changes)})).fit()
    listen = after({3: changing(killed, **changes), killed_at: kill})
    with pytest.raises(KeyboardInterrupt):
        WanTrainer(killed, listen=listen).fit()
    assert layout_of(killed).saved_steps()[-1] == (2 if killed_at == 4 else 4)
    WanTrainer(killed, resume=True).fit()

    assert_equal_results(whole, killed)
    names = [name.replace("__", ".") for name in changes]
    assert [(e["step"], e["name"]) for e in events_of(whole, "settings")] == [
        (3, name) for name in names
    ]
    with pytest.raises(AssertionError):  # the change does change something
        assert_equal_results(whole, plain)
    again = load_run(layout_of(whole).root, ["output.name=again"])
    WanTrainer(again).fit()
    assert_equal_results(whole, again)


def test_orders_that_change_no_training_change_no_result(run_file: RunFile) -> None:
    """A video of a prompt that has to be encoded first, an export, and what is rejected."""
    settings = ["method.dropout=0.2", "train.batch_size=2", "train.save_every=3", *SAMPLED]
    plain = run_file("t2v-a14b", *settings, name="plain")
    ordered = run_file("t2v-a14b", *settings, name="ordered")
    layout = layout_of(ordered)
    wanted = {"prompt": "a red square", "seed": 7, "frames": 1, "steps": 1, "negative_prompt": "x"}

    def orders() -> None:
        order(layout, "sample", wanted)
        order(layout, "sample", {"prompt": "a", "frames": 6})
        order(layout, "settings", {"train.seed": 1})
        order(layout, "settings", {"optimizer.lr": -1})
        order(layout, "settings", {"optimizer.lr": ordered.optimizer.lr})
        order(layout, "settings", {"train.ema.decay": 0.9})
        (layout.control_dir / f"settings-{0:020d}-00000000.json").write_text("{")

    WanTrainer(plain).fit()
    steps = after({2: orders, 4: lambda: request(layout, "export")})
    WanTrainer(ordered, listen=steps).fit()

    assert [file.name.split("_")[1] for file in layout.exported()[4]] == ["000004"] * 2
    for file in layout.exported()[4]:
        file.unlink()  # the other run has none
    assert_equal_results(plain, ordered)
    (sampled,) = [e for e in events_of(ordered, "sampled") if e["requested"]]
    assert (sampled["step"], sampled["prompt"], sampled["seed"]) == (2, "a red square", 7)
    assert sampled["file"] == str(layout.samples(2) / "requested-1.mp4")
    assert (layout.samples(2) / "requested-1.mp4").stat().st_size > 100
    rejected = [(e["step"], e["request"], e["reason"]) for e in events_of(ordered, "rejected")]
    assert [(step, name) for step, name, _ in rejected] == [(2, "settings")] * 5 + [(2, "sample")]
    for reason, part in zip(
        (text for *_, text in rejected),
        (
            "can't be read (line 1, column 2",
            "train.seed: can't change while a run trains",
            "optimizer.lr: must be more than 0, got -1",
            "have these values already",
            "train.ema.decay: can't change, since the run has no moving average",
            "frames: must be 4n+1, got 6",
        ),
        strict=True,
    ):
        assert part in reason
    assert not any(layout.control_dir.iterdir())


def test_when_to_save_and_what_to_sample_can_change(run_file: RunFile) -> None:
    config = run_file("t2v-a14b", "model.experts=high", "output.keep_last=null", *SAMPLED)
    change = changing(
        config,
        train__save_every=2,
        train__keep_last=1,
        sample__every=4,
        sample__prompts=[{"prompt": "a red square"}],
        output__keep_last=2,
    )
    WanTrainer(config, listen=after({2: change})).fit()
    layout = layout_of(config)
    assert [e["step"] for e in events_of(config, "saved")] == [2, 4, 6]
    assert layout.saved_steps() == [6] and [*layout.exported()] == [4, 6]
    assert [(e["step"], e["prompt"]) for e in events_of(config, "sampled")] == [
        (4, "a red square"),
        (6, "a red square"),
    ]
    old = {e["name"]: (e["old"], e["new"]) for e in events_of(config, "settings")}
    assert old["train.keep_last"] == (2, 1) and len(old) == 5
    assert load_run(layout.root).changes[0].step == 2
    page = write_report(layout.root).read_text(encoding="utf-8")
    assert "<td><code>train.keep_last</code>\n<td>2\n<td>1\n" in page


def test_a_resumed_run_has_its_changes_unless_the_command_line_gives_the_setting(
    run_file: RunFile,
) -> None:
    config = run_file("t2v-a14b", "model.experts=high", "train.steps=4", "train.save_every=3")
    change = changing(config, optimizer__lr=0.02)
    WanTrainer(config, listen=after({1: change})).fit()
    more = config.model_copy(update={"train": config.train.model_copy(update={"steps": 6})})
    WanTrainer(more, resume=True).fit()  # by the run file, which knows of no change
    assert [e["lr"] for e in events_of(config, "step")] == [0.005, *[0.02] * 5]

    folder = layout_of(config).root
    assert load_run(folder).changes == with_recorded_changes(config, []).changes
    overrides = ["optimizer.lr=0.001", "train.steps=7"]
    given = load_run(folder, overrides)
    assert given.changes == with_recorded_changes(given, overrides).changes == ()
    with pytest.raises(CheckpointError, match=r"optimizer.lr: was 0.02, is 0.001"):
        WanTrainer(given, resume=True, overrides=overrides).fit()
    WanTrainer(given, resume=True, allow_change=True, overrides=overrides).fit()
    assert events_of(config, "step")[-1]["lr"] == 0.001


def test_an_order_that_the_process_did_not_come_to_is_rejected_by_the_next_one(
    run_file: RunFile,
) -> None:
    config = run_file("t2v-a14b", "model.experts=high", "train.steps=2")
    WanTrainer(config).fit()
    changing(config, optimizer__lr=0.02)()
    more = config.model_copy(update={"train": config.train.model_copy(update={"steps": 3})})
    WanTrainer(more, resume=True).fit()
    (rejected,) = events_of(config, "rejected")
    assert "ended before it came to it" in rejected["reason"]
    assert [e["lr"] for e in events_of(config, "step")] == [0.005] * 3
