"""Exports the weights of a saved state for other programs, without training or data.

Adapters and embeddings are read from the state alone, and of the base model only headers. Where the
files depend on the base model's weights (full fine-tuning, DoRA, OFT) these are loaded into host
memory, one expert at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import WanTransformer3DModel
from pydantic import ValidationError

from onewan.config.changes import in_force
from onewan.config.method import DoraMethod, EmbeddingMethod, FineTuneMethod, OftMethod
from onewan.config.resolve import expert_schedule_of, trained_experts
from onewan.config.schema import ResolvedRun
from onewan.dtypes import torch_dtype
from onewan.errors import CheckpointError
from onewan.formats.lora_files import AdapterFile
from onewan.formats.weights import open_component
from onewan.model.load import WanModelLoader
from onewan.model.meta_init import module_on_meta
from onewan.model.sources import locate
from onewan.runs.layout import RunLayout
from onewan.train.export import Exportable, ExportedFile, exported_files
from onewan.train.optimizers.builders import is_schedule_free
from onewan.train.saved_state import StateFacts, read_facts
from onewan.train.state import Trainable, TrainedExpert, TrainState
from onewan.train.trainable_files import saved_averages, saved_optimizer, saved_weights
from onewan.train.trainable_setup import (
    attach_saved_expert,
    initial_adapters,
    saved_embeddings,
)
from onewan.variants import Expert, ExpertName


def state_to_export(layout: RunLayout, step: int | None) -> int:
    """The step of the state to export: `step`, or None for the newest. CheckpointError, which says
    what there is, if there is none."""
    steps = layout.saved_steps()
    if not steps:
        raise CheckpointError(f"{layout.root}: has no saved state to export")
    if step is None:
        return steps[-1]
    if step not in steps:
        raise CheckpointError(
            f"{layout.states_dir}: has no state of step {step}; it has those of steps "
            f"{', '.join(map(str, steps))}"
        )
    return step


def export_state(
    present: ResolvedRun, layout: RunLayout, step: int, folder: Path, *, format_in_name: bool
) -> Iterator[ExportedFile]:
    """The files of the state of `step`, to be written one after the other into `folder`.

    `present` has the base model and the output section that are used; all other settings are those
    of the state. CheckpointError if the state or the model can't be read, or do not fit each other.
    """
    state = layout.state(step)
    facts = read_facts(state)
    config = _config(facts, present, state)
    initial = initial_adapters(config)
    embeddings = _embeddings(config, state)
    found = _clips(layout)
    experts = () if isinstance(config.method, EmbeddingMethod) else trained_experts(config)
    # One at a time: a whole transformer is in memory, if it is one that was fine-tuned.
    for expert in (*experts, None):
        trained = None if expert is None else _expert(config, expert, initial, state)
        exportable = Exportable(
            config=config,
            variant=config.model.facts(),
            state=TrainState(
                experts={} if trained is None else {trained.expert.name: trained},
                embeddings=embeddings if expert is None else None,
                step=step,
                best_weights=dict(facts.best_weights),
            ),
            schedule=expert_schedule_of(config),
            dataset_digest=facts.dataset,
            clips=found.get("clips"),
            resolution=found.get("resolution"),
        )
        for file in exported_files(exportable, layout, format_in_name=format_in_name):
            yield replace(file, path=folder / file.path.name)


def _config(facts: StateFacts, present: ResolvedRun, state: Path) -> ResolvedRun:
    try:
        recorded = ResolvedRun.model_validate(facts.config)
    except ValidationError:
        version = facts.versions.get("onewan", "not recorded")
        raise CheckpointError(
            f"{state}: has settings that this version of onewan does not read; export it with the "
            f"version that saved it, which is {version}"
        ) from None
    own = {"model": present.model, "output": present.output}
    return in_force(recorded, facts.step).model_copy(update=own)


def _expert(
    config: ResolvedRun, expert: Expert, initial: Mapping[ExpertName, AdapterFile], state: Path
) -> TrainedExpert:
    file = state / f"{expert.name}.safetensors"
    weights = saved_weights(state, expert.name, None)
    # What is not a plain product of factors is written with the help of the base model's weights.
    needs_base = isinstance(config.method, FineTuneMethod | DoraMethod | OftMethod) or bool(initial)
    transformer = _transformer(config, expert, loaded=needs_base)
    trained = attach_saved_expert(config, transformer, expert, initial.get(expert.name), weights)
    assert trained.trainable is not None
    trained.trainable.weights.write(weights, str(file))
    _restore_averages(config, trained.trainable, state)
    return trained


def _transformer(config: ResolvedRun, expert: Expert, *, loaded: bool) -> WanTransformer3DModel:
    """The expert's base model, without weights unless `loaded`."""
    section = config.model
    if loaded:
        model = WanModelLoader().load(
            section.sources(),
            section.variant,
            torch_dtype(section.dtype),
            "cpu",
            {expert.component},
            weights=config.memory.weights,
            check_file_names=section.check_file_names,
            boundary=section.boundary,
        )
        return model.expert(expert)
    sources = locate(section.sources(), {expert.component})
    sources.require({expert.component}, section.facts())
    transformer = module_on_meta(open_component(sources.paths[expert.component]))
    assert isinstance(transformer, WanTransformer3DModel)
    return transformer


def _embeddings(config: ResolvedRun, state: Path) -> Trainable | None:
    if not any(section.train for section in config.embeddings):
        return None
    file = state / "embeddings.safetensors"
    weights = saved_weights(state, "embeddings", None)
    trainable = saved_embeddings(config, weights)
    trainable.weights.write(weights, str(file))
    _restore_averages(config, trainable, state)
    return trainable


def _restore_averages(config: ResolvedRun, trainable: Trainable, state: Path) -> None:
    """The moving average, and what a schedule-free optimizer averages from."""
    if trainable.ema is not None:
        averages = saved_averages(state, trainable.name, None, required=True)
        trainable.ema.load_state_dict(averages or {})
    if is_schedule_free(config.optimizer):
        saved = saved_optimizer(state, trainable.name, None)
        try:
            trainable.optimizer.load_state_dict(saved.weights)
        except ValueError as error:
            raise CheckpointError(f"{state}: {error}") from error


def _clips(layout: RunLayout) -> dict[str, Any]:
    """Number and largest size of the training clips, as far as the run's list of them tells."""
    found: dict[str, Any] = {}
    sizes: list[tuple[int, int]] = []
    try:
        with layout.clips.open(encoding="utf-8") as file:
            for entry in map(json.loads, file):
                if entry["line"] == "counts":
                    found["clips"] = entry["clips"]
                elif entry["line"] == "clip" and not entry["held_out"]:
                    sizes.append((entry["width"], entry["height"]))
    except (OSError, ValueError, KeyError, TypeError):
        return found  # of another version, or cut off
    return found | ({"resolution": max(sizes)} if sizes else {})
