"""A class word keeps the base model's predictions for it while the trigger word is trained."""

from __future__ import annotations

import torch
from support.runs import CLASS_WORD, RunFile, layout_of, recorder

from onewan.config.schema import ResolvedRun
from onewan.data.loader import StepBatches
from onewan.runs.event_file import read_events
from onewan.train.run import Run
from onewan.train.saved_state import read_facts
from onewan.train.setup import WanModelSetup
from onewan.train.step import NoisedInputs, predict
from onewan.train.trainer import WanTrainer

SETTINGS = ["train.steps=24", "train.save_every=24", "optimizer.lr=0.02", "method.rank=8"]


def trained(config: ResolvedRun) -> Run:
    """The run after its last step, with the texts of the class word in its batches."""
    WanTrainer(config).fit()
    run = WanModelSetup(config).build()
    folder = layout_of(config).state(24)
    run.state.load(folder, read_facts(folder))
    return run


def moved(run: Run) -> tuple[float, float]:
    """Mean squares of what training has changed of the velocity: for the captions, and for them
    with the class word."""
    expert = run.bring_expert("single")
    expert.transformer.eval()
    found = []
    for number, batch in enumerate(run.loader.validation_batches(run.dataset.clips, 99)):
        step = StepBatches(number=number, expert="single", batches=(batch,), global_size=1)
        sample = run.objective.add_noise(batch, step, expert.expert)
        for text in (batch.text, batch.preserved.text):
            inputs = [NoisedInputs(batch, sample, text)]
            with torch.no_grad():
                (after,) = predict(run, expert, inputs)
                with expert.base():
                    (before,) = predict(run, expert, inputs)
            found.append((after - before).square().mean())
    changes = torch.stack(found).view(-1, 2).mean(dim=0)
    return float(changes[0]), float(changes[1])


def test_predictions_for_the_class_word_stay_nearer_to_those_of_the_base_model(
    run_file: RunFile,
) -> None:
    off = run_file("ti2v-5b", *SETTINGS, *CLASS_WORD, "train.preservation_weight=1e-9", name="off")
    on = run_file("ti2v-5b", *SETTINGS, *CLASS_WORD, "train.preservation_weight=20", name="on")
    without, kept = moved(trained(off)), moved(trained(on))
    assert kept[1] < 0.3 * without[1]
    # What is kept is the prediction for the class word, more than that for the trigger word.
    assert kept[1] / without[1] < kept[0] / without[0]


def test_step_events_have_the_two_parts_of_the_loss(run_file: RunFile) -> None:
    events = list[dict[str, object]]()
    plain, kept = run_file("ti2v-5b", name="plain"), run_file("ti2v-5b", *CLASS_WORD, name="kept")
    WanTrainer(plain, listen=recorder(events)).fit()
    WanTrainer(kept).fit()
    without = [e for e in read_events(layout_of(plain).events) if e["event"] == "step"]
    beside = [e for e in read_events(layout_of(kept).events) if e["event"] == "step"]
    assert all(event["preservation_loss"] is None for event in without)
    # At the first step the adapter changes nothing yet.
    first, *others = (event["preservation_loss"] for event in beside)
    assert first == 0 and all(value > 0 for value in others)
