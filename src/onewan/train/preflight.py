"""Checks before encoding: what the run file and the headers of its files can tell.

Encoding a data set can take hours. A layer that the model does not have, an adapter or an embedding
of another model, a package that is not installed, or a folder that can't be written would otherwise
be reported after it, by the code that needs them. The checks call that code, with a transformer
without memory and an optimizer of one small weight, so that rules and messages are the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from onewan.arithmetic.sample_request import given_files
from onewan.config.method import DoraMethod, EmbeddingMethod, LoraMethod
from onewan.config.schema import ResolvedRun
from onewan.data.buckets import clip_sources
from onewan.data.sources.read import label_of, source_problem
from onewan.errors import CheckpointError, ConfigError
from onewan.formats.configs import read_json
from onewan.formats.lora_files import AdapterFile
from onewan.formats.model_folder import ComponentDescription, ComponentName, raise_problems
from onewan.formats.weights import open_component
from onewan.model.device_fit import check_dtypes
from onewan.model.load import describe_model
from onewan.model.meta_init import module_on_meta, transformer_on_meta
from onewan.model.sources import Sources, is_here
from onewan.sample.distilled import check_distilled
from onewan.sample.given_files import unreadable_files
from onewan.train.attention import check_attention
from onewan.train.optimizers.builders import build_optimizer
from onewan.train.optimizers.parameters import library_group
from onewan.train.state import TrainableName
from onewan.train.token_sharing import check_heads
from onewan.train.trainable_setup import check_expert, embedding_from_file, expert_settings
from onewan.train.wandb_sink import check_wandb
from onewan.variants import Expert, ExpertName


def check_before_encoding(
    config: ResolvedRun,
    sources: Sources,
    needed: Collection[ComponentName],
    initial: Mapping[ExpertName, AdapterFile],
    distilled: Mapping[ExpertName, AdapterFile],
    device: torch.device,
    sequence: int = 1,
) -> None:
    """ConfigError with all problems, or CheckpointError if only files of the model are wrong.

    `sources` are the files of the model, of which the components `needed` are used; `initial` are
    the adapters to initialize from, `distilled` those to sample with, `device` is the run's, and
    `sequence` the number of processes that share the tokens of a clip. No weights are read, and
    nothing is downloaded: of a model on the hub, whose transformers may not be here yet, only
    layers are checked.
    """
    problems, of_files = _collected(
        lambda: _check_folders(config),
        lambda: _check_samples(config),
        lambda: check_optimizer(config, device),
        lambda: check_wandb(config),
        lambda: _check_model(config, sources, needed, device),
    )
    if not of_files:  # another model has other layers and widths, which would be reported too
        more, of_files = _collected(
            lambda: _check_embeddings(config, sources.paths.get("text_encoder")),
            lambda: _check_experts(config, sources, initial),
            lambda: _check_distilled(config, sources, distilled),
            lambda: _check_attention(config, sources, device),
            lambda: _check_sharing(config, sources, sequence),
        )
        problems += more
    _raise(problems, of_files)


def _collected(*checks: Callable[[], object]) -> tuple[list[str], list[str]]:
    """The different problems of the run file that `checks` raise, and those of files."""
    problems, of_files = list[str](), list[str]()
    for check in checks:
        try:
            check()
        except ConfigError as error:  # noqa: PERF203  (a few checks, once)
            problems += error.problems
        except CheckpointError as error:
            of_files += error.details or [error.message]
    return list(dict.fromkeys(problems)), list(dict.fromkeys(of_files))


def _check_folders(config: ResolvedRun) -> None:
    folders = {"output.dir": config.output.dir}
    if config.video_data.cache:
        folders["video_data.cache_dir"] = config.video_data.cache_dir
    problems = [f"{field}: {why}" for field, path in folders.items() if (why := _unwritable(path))]
    sections = {"video_data": config.video_data, "validation": config.validation}
    for section, values in sections.items():
        for index, source in enumerate(clip_sources(values.sources, config)):
            field = f"{section}.sources.{index}.path"
            if why := source_problem(source, "it"):
                problems.append(f"{field}: {label_of(source.path)} {why}")
    _raise(problems)


def _check_samples(config: ResolvedRun) -> None:
    """The files that samples are given can be read, and control videos are long enough."""
    sample = config.sample
    _raise(
        [
            f"sample.prompts.{index}.{name}: {why}"
            for index, prompt in enumerate(sample.prompts)
            for name, why in unreadable_files(
                given_files(prompt), sample.frames, sample.fps
            ).items()
        ]
    )


def _unwritable(folder: Path) -> str | None:
    """Why no file can be written in `folder`, which need not exist; None if files can."""
    found = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not found.is_dir():
        return f"{folder} can't be a folder, since {found} is a file; give another folder"
    if not os.access(found, os.W_OK | os.X_OK):
        return (
            f"{folder} can't be created or written to; change the permissions of {found}, or give "
            "another folder"
        )
    return None


def check_optimizer(config: ResolvedRun, device: torch.device) -> None:
    """That its package is installed, and that it takes its settings and the learning rates."""
    for trainable, rates in _learning_rates(config).items():
        weights = [nn.Parameter(torch.zeros(8, 8, device=device)) for _ in rates]
        groups = zip(weights, rates, strict=True)
        build_optimizer([library_group([w], lr, trainable) for w, lr in groups], config.optimizer)


def _learning_rates(config: ResolvedRun) -> dict[TrainableName, list[float]]:
    """The rates of the groups of each trainable."""
    method, common = config.method, config.optimizer.lr
    found: dict[TrainableName, list[float]] = {}
    if not isinstance(method, EmbeddingMethod):
        is_lora = isinstance(method, LoraMethod | DoraMethod)
        factors = {1.0, method.lora_plus_ratio if is_lora else 1.0}
        for expert in config.model.facts().selected(config.model.experts):
            lr = expert_settings(config, expert.name).lr or common
            found[expert.name] = [lr * factor for factor in sorted(factors)]
    if trained := [e for e in config.embeddings if e.train]:
        found["embeddings"] = [e.lr or common for e in trained]
    return found


def _check_model(
    config: ResolvedRun,
    sources: Sources,
    needed: Collection[ComponentName],
    device: torch.device,
) -> None:
    """That the files fit each other and the variant, and that the device has their dtypes."""
    section, described = config.model, dict[ComponentName, ComponentDescription]()
    if all(is_here(given) for given in section.sources().values()):
        _, found = describe_model(
            sources,
            section.variant,
            needed,
            check_file_names=section.check_file_names,
            boundary=section.boundary,
        )
        described |= found
    check_dtypes(device, section.dtype, config.memory.weights, described, needed)


def _check_experts(
    config: ResolvedRun, sources: Sources, initial: Mapping[ExpertName, AdapterFile]
) -> None:
    """That the method finds its layers, and that initial adapters fit them."""
    checks = [
        partial(check_expert, config, transformer, expert, initial.get(expert.name))
        for expert in config.model.facts().selected(config.model.experts)
        if (transformer := _transformer(config, sources, expert))
    ]
    _raise(*_collected(*checks))  # both experts have the same layers, hence the same problems


def _check_distilled(
    config: ResolvedRun, sources: Sources, distilled: Mapping[ExpertName, AdapterFile]
) -> None:
    """That distilled LoRAs fit the transformers that are sampled."""
    checks = [
        partial(check_distilled, transformer, distilled[expert.name])
        for expert in config.model.facts().experts
        if expert.name in distilled and (transformer := _transformer(config, sources, expert))
    ]
    _raise(*_collected(*checks))


def _transformer(
    config: ResolvedRun, sources: Sources, expert: Expert
) -> WanTransformer3DModel | None:
    """The transformer of `expert` without memory: that of the variant if none of its files are
    here. None if only its configuration is, and that is not diffusers'."""
    path = sources.paths.get(expert.component)
    if path is None:
        return transformer_on_meta(config.model.facts().transformer_config)
    if is_here(config.model.source_of(expert.component)):
        module = module_on_meta(open_component(path))
        assert isinstance(module, WanTransformer3DModel)
        return module
    if not (path / "config.json").is_file():
        return None
    settings = read_json(path / "config.json")
    return transformer_on_meta(settings) if "num_attention_heads" in settings else None


def _check_attention(config: ResolvedRun, sources: Sources, device: torch.device) -> None:
    """That the backend that is named can be used."""
    if config.memory.attention == "auto":
        return
    variant = config.model.facts()
    expert = variant.selected(config.model.experts)[0]
    transformer = _transformer(config, sources, expert)
    head_dim = transformer.config["attention_head_dim"] if transformer else None
    check_attention(config, device, head_dim or variant.attention_head_dim)


def _check_sharing(config: ResolvedRun, sources: Sources, sequence: int) -> None:
    """That processes which share tokens can share the attention heads of the model's own files."""
    if sequence > 1:
        for expert in config.model.facts().selected(config.model.experts):
            if transformer := _transformer(config, sources, expert):
                check_heads(transformer.config["num_attention_heads"], sequence)


def _check_embeddings(config: ResolvedRun, text_encoder: Path | None) -> None:
    files = [section for section in config.embeddings if section.init_from is not None]
    if files and text_encoder is not None:
        width = open_component(text_encoder).config["d_model"]
        checks = [partial(embedding_from_file, section, width) for section in files]
        _raise(*_collected(*checks))


def _raise(problems: Collection[str], of_files: Collection[str] = ()) -> None:
    if problems:
        raise ConfigError("run file", [*problems, *of_files])
    raise_problems(of_files)
