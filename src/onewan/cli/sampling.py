"""The command `onewan sample`, imported only when it runs.

Everything that can be checked without the model's weights is checked first: options, prompts, the
names of the videos, images, headers of the model's files, and LoRAs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from onewan.adapters.lora import apply_lora
from onewan.adapters.overlay import Overlay
from onewan.arithmetic.sample_request import file_errors, given_files, request_errors
from onewan.checkpoint.saver import expert_of
from onewan.cli.output import say
from onewan.cli.progress import Progress
from onewan.cli.sample_distilled import (
    Distilled,
    distilled_problems,
    distilled_section,
    read_distilled_options,
)
from onewan.cli.sample_source import SampleSource, lora_files, sample_source
from onewan.cli.sample_videos import (
    output_problems,
    read_prompts,
    unused_video_paths,
    video_paths,
)
from onewan.config.schema import PromptSection
from onewan.devices import resolve_device
from onewan.dtypes import torch_dtype
from onewan.errors import ConfigError, MemoryPlanError
from onewan.formats.lora_files import AdapterFile, read_adapters
from onewan.memory.device import limit_memory
from onewan.model.device_fit import check_dtypes
from onewan.model.embedding import WanModelEmbedding
from onewan.model.load import WanModelLoader, describe_model
from onewan.model.sources import ENCODERS, PipelineComponent, locate
from onewan.model.text import mentions
from onewan.model.wan import WanModel
from onewan.runs.layout import displayed
from onewan.sample.distilled import distilled_overlays
from onewan.sample.generate import SampleRequest, WanModelSampler
from onewan.sample.given_files import unreadable_files
from onewan.sample.streaming import sampling_residency
from onewan.variants import NEGATIVE_PROMPT, VARIANTS, Expert, ExpertName, Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lora:
    """An adapter that is applied to one expert."""

    file: AdapterFile
    expert: Expert
    strength: float


def sample(options: argparse.Namespace) -> int:
    source = sample_source(options)
    # Before loading, so that a device which does not exist is reported at once.
    device = resolve_device(source.device)
    limit = limit_memory(device, options.vram)
    known = None if source.variant is None else VARIANTS[source.variant]
    # Headers of files that are here are read at once, so that all problems can be reported
    # together; a model on the hub is not downloaded for options that are wrong.
    if known is None and source.is_local:
        known = _described(source, device)
    videos = _videos(options, source, known)
    variant = _described(source, device)
    if known is None:
        videos = _videos(options, source, variant)
    loras = list(_loras(options, source, variant))
    distilled = read_distilled_options(options, source, variant)
    for line in _plan_lines(source, variant, videos, loras, distilled):
        say(line)
    model = _load(source, variant, loras)
    overlays = _overlays(model, distilled)
    # Before sampling: a placeholder without vectors would be encoded as ordinary words.
    for path, placeholder in _embeddings(options, source):
        say(_add_embedding(model, path, placeholder, [request for _, request in videos]))
    beside = max((overlay.nbytes for overlay in overlays.values()), default=0)
    residency = sampling_residency(model, device, limit, beside=beside)
    sampler = WanModelSampler(model, residency=residency, distilled=overlays)
    try:
        _sample_all(sampler, videos)
    except torch.OutOfMemoryError as error:
        raise MemoryPlanError(
            f"sample: not enough memory on the device ({str(error).splitlines()[0]}); give a "
            "smaller --width and --height, fewer --frames, or --storage fp8 or nf4"
        ) from error
    return 0


def _sample_all(sampler: WanModelSampler, videos: Sequence[tuple[Path, SampleRequest]]) -> None:
    with Progress() as progress:
        for number, (path, request) in enumerate(videos):
            activity = "sampling" if len(videos) == 1 else f"sampling video {number}"
            sampler.sample_to(path, request, on_step=partial(progress.advance, activity))
            progress.line(f"{displayed(path)}: {_size(request)}, {request.fps:g} fps")


# ----------------------------------------------------------------------- what is made, and checked


def _videos(
    options: argparse.Namespace, source: SampleSource, variant: Variant | None
) -> list[tuple[Path, SampleRequest]]:
    """The files to write and what they show. ConfigError with every problem of the options; those
    that depend on the variant are found only if it is known."""
    problems: list[str] = []
    template = _template(options, source, variant or VARIANTS["t2v-a14b"])
    prompts = _prompts(options, source)
    if not prompts:
        problems.append("--prompt: is missing; give one or several, or a file with --prompts FILE")
    paths = _paths(options, source, max(1, len(prompts)))
    if paths is None:
        problems.append("--out: is missing; give FILE.mp4, FILE.webm or a folder")
    else:
        problems += output_problems(paths, force=options.force)
    requests = [_request(template, entry) for entry in prompts]
    problems += _file_problems(requests, variant)
    problems += distilled_problems(options, source, variant)
    if variant is not None:
        problems += [
            f"--{name}: {error}"
            for name, error in request_errors(
                variant,
                width=template.width,
                height=template.height,
                frames=template.frames,
                steps=template.steps,
                guidance=template.guidance,
            )
        ]
    if problems or paths is None:
        raise ConfigError("sample", problems)
    return list(zip(paths, requests, strict=True))


def _template(options: argparse.Namespace, source: SampleSource, variant: Variant) -> SampleRequest:
    """A request with everything but the prompt: by the options, else by the run, else by the
    variant's official values."""
    if source.config is not None:
        run = source.config.sample
        template = SampleRequest(
            prompt="",
            negative_prompt=run.negative_prompt,
            image=None,
            last_image=None,
            width=run.width,
            height=run.height,
            frames=run.frames,
            steps=run.steps,
            guidance=run.guidance,
            shift=run.shift,
            seed=run.seed,
            fps=run.fps,
        )
    else:
        template = SampleRequest(
            prompt="",
            negative_prompt=NEGATIVE_PROMPT,
            image=None,
            last_image=None,
            width=variant.sample_size[0],
            height=variant.sample_size[1],
            frames=variant.frames,
            steps=variant.sampling_steps,
            guidance=tuple(expert.guidance_scale for expert in variant.experts),
            shift=variant.flow_shift,
            seed=0,
            fps=variant.fps,
        )
    if (few := distilled_section(options, source)) is not None:
        template = template.in_few_steps(few.steps, few.guidance, few.shift)
    # Not `value or default`: 0 and "" are values that the user may have given.
    names = ("width", "height", "frames", "steps", "shift", "fps")
    given = {n: value for n in names if (value := getattr(options, n)) is not None}
    if options.guidance is not None:
        one_for_all = len(options.guidance) == 1
        count = len(variant.experts) if one_for_all else 1
        given["guidance"] = tuple(options.guidance * count)
    return replace(template, **given)


def _prompts(options: argparse.Namespace, source: SampleSource) -> list[PromptSection]:
    """The prompts of the options, or those of the run; options replace what they have of their
    own."""
    texts = list(options.prompt)
    if options.prompts is not None:
        texts += read_prompts(options.prompts)
    entries = [PromptSection(prompt=text) for text in texts]
    if not entries and source.config is not None:
        entries = list(source.config.sample.prompts)
    names = ("negative_prompt", "image", "last_image", "control", "reference", "seed")
    given = {n: value for n in names if (value := getattr(options, n)) is not None}
    return [entry.model_copy(update=given) for entry in entries]


def _request(template: SampleRequest, entry: PromptSection) -> SampleRequest:
    own = {n: v for n in ("negative_prompt", "seed") if (v := getattr(entry, n)) is not None}
    return replace(template, prompt=entry.prompt, **given_files(entry), **own)


def _paths(options: argparse.Namespace, source: SampleSource, count: int) -> list[Path] | None:
    """The videos to write; None if nothing says where."""
    format = "mp4" if source.config is None else source.config.sample.format
    if options.out is not None:
        return video_paths(options.out, count, format)
    if source.layout is None:
        return None
    label = "base" if source.weights is None else source.weights.short_label
    if options.ema:
        label += "-ema"
    if distilled_section(options, source) is not None:
        label += "-distilled"
    return unused_video_paths(source.layout, label, count, format)


def _file_problems(requests: Sequence[SampleRequest], variant: Variant | None) -> Iterator[str]:
    problems: list[str] = []
    for request in requests:
        given = given_files(request)
        errors = dict[str, str]()
        if variant is not None:
            errors = dict(file_errors(variant, given, request.frames))
        errors = {**unreadable_files(given, request.frames, request.fps), **errors}
        problems += [f"--{field.replace('_', '-')}: {error}" for field, error in errors.items()]
    yield from dict.fromkeys(problems)  # of several prompts, once


# --------------------------------------------------------------------------------- model and LoRAs


def _needed(variant: Variant) -> set[PipelineComponent]:
    return {*(expert.component for expert in variant.experts), *ENCODERS, "scheduler"}


def _described(source: SampleSource, device: torch.device) -> Variant:
    """The variant of the model, by headers; CheckpointError for files that do not fit each other
    and for components that are missing, ConfigError for dtypes that `device` has not."""
    sources = locate(source.components)
    variant, described = describe_model(
        sources,
        source.variant,
        None,
        check_file_names=source.check_file_names,
        boundary=source.boundary,
    )
    sources.require(_needed(variant), variant)
    check_dtypes(device, source.dtype, source.storage, described, _needed(variant))
    return variant


def _loras(options: argparse.Namespace, source: SampleSource, variant: Variant) -> Iterator[_Lora]:
    """The adapters to apply: those of the run, then those of ``--lora``."""
    for name, path in source.adapters.items():
        (file,) = read_adapters(path)
        yield _Lora(file=file, expert=variant.expert(name), strength=1.0)
    for given, strength in options.lora:
        for path in lora_files(given):
            for file in read_adapters(path):
                expert = expert_of(path, file.metadata, variant, file.expert)
                yield _Lora(file=file, expert=expert, strength=strength)


def _plan_lines(
    source: SampleSource,
    variant: Variant,
    videos: Sequence[tuple[Path, SampleRequest]],
    loras: Sequence[_Lora],
    distilled: Distilled | None,
) -> Iterator[str]:
    """What will be made from what, before anything is loaded."""
    for notice in source.notices:
        yield f"note: {notice}"
    if source.layout is not None:
        weights = (
            "the base model" if source.weights is None else f"weights of {source.weights.label}"
        )
        yield f"{displayed(source.layout.root)}: {variant.title}, {weights}"
        parts = {} if source.weights is None else source.weights.files
        yield from (f"  {name}: {displayed(path)}" for name, path in parts.items())
    without = [e.name for e in variant.experts if not any(lora.expert == e for lora in loras)]
    if loras and without:
        yield f"note: no LoRA for the {without[0]} expert, which stays the base model"
    for name, file in ({} if distilled is None else distilled.files).items():
        which = "" if name == "single" else f" of the {name} expert"
        yield f"distilled LoRA{which}: {displayed(file.path)}"
    for path, request in videos:
        steps = (
            f"{request.steps} distilled steps" if request.distilled else f"{request.steps} steps"
        )
        yield (
            f"{displayed(path)} will be: {_size(request)}, {steps}, seed {request.seed}: "
            f"{request.prompt}"
        )


def _load(source: SampleSource, variant: Variant, loras: Sequence[_Lora]) -> WanModel:
    """The model with its adapters, in host memory."""
    model = WanModelLoader().load(
        source.components,
        variant.name,
        torch_dtype(source.dtype),
        components=_needed(variant),
        weights=source.storage,
        check_file_names=source.check_file_names,
        boundary=source.boundary,
    )
    for notice in model.notices:
        say(f"note: {notice}")
    for lora in loras:
        path = lora.file.path
        apply_lora(model.expert(lora.expert), lora.file.modules, str(path), lora.strength)
        for notice in lora.file.notices:
            say(f"note: {notice}")
        if path in source.adapters.values():
            continue  # named before
        strength = "" if lora.strength == 1 else f" at strength {lora.strength:g}"
        say(f"{displayed(path)}: applied to the {lora.expert.name} expert{strength}")
    return model


def _overlays(model: WanModel, distilled: Distilled | None) -> dict[ExpertName, Overlay]:
    if distilled is None:
        return {}
    overlays, notices = distilled_overlays(model, distilled.files, distilled.strengths)
    for notice in notices:
        say(f"note: {notice}")
    return overlays


# --------------------------------------------------------------------------------------- embeddings


def _embeddings(
    options: argparse.Namespace, source: SampleSource
) -> Iterator[tuple[Path, str | None]]:
    """(file, placeholder, None for the file's own) of each embedding: the run's, then those of
    ``--embedding``."""
    trained = {} if source.weights is None else source.weights.embeddings
    for section in () if source.config is None else source.config.embeddings:
        path = trained.get(section.name) or section.init_from
        if path is not None:
            yield path, section.placeholder
        else:
            say(f"note: {section.placeholder} has no vectors in the base model; it is plain text")
    yield from ((path, None) for path in options.embedding)


def _add_embedding(
    model: WanModel, path: Path, placeholder: str | None, requests: Sequence[SampleRequest]
) -> str:
    """Add the embedding in `path` to `model`; returns a line about it for the user."""
    _, text_encoder = model.prompt_encoder()
    width = text_encoder.config.d_model
    embedding = WanModelEmbedding.from_file(path, placeholder=placeholder, width=width)
    model.add_embedding(embedding)
    placeholder, count = embedding.placeholder, len(embedding.vectors)
    line = (
        f"{displayed(path)}: {placeholder} is replaced by {count} vector{'s' if count > 1 else ''}"
    )
    prompts = [text for r in requests for text in (r.prompt, r.negative_prompt)]
    if not any(mentions(prompt, placeholder) for prompt in prompts):
        line += f"; no prompt contains {placeholder}, so the embedding has no effect"
    return line


def _size(request: SampleRequest) -> str:
    return f"{request.frames} frames, {request.width}x{request.height}"
