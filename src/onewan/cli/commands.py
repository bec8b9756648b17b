"""The commands demo, cache, train and sample; imported only when one of them runs.

Importing torch, diffusers and transformers takes seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import transformers

from onewan.adapters.lora import apply_lora
from onewan.checkpoint.saver import expert_of
from onewan.cli.importing import run_file_of
from onewan.cli.output import complain, say
from onewan.cli.progress import Progress
from onewan.config.load import load_run
from onewan.demo import run_demo
from onewan.documents import decode_text
from onewan.dtypes import torch_dtype
from onewan.errors import ConfigError
from onewan.formats.lora_files import read_adapters
from onewan.memory.device import limit_memory, resolve_device
from onewan.model.embedding import WanModelEmbedding
from onewan.model.load import WanModelLoader
from onewan.model.text import mentions
from onewan.model.wan import WanModel
from onewan.runs.layout import displayed
from onewan.sample.generate import SampleRequest, WanModelSampler
from onewan.sample.streaming import sampling_residency
from onewan.train.resume import Resume
from onewan.train.run import sample_requests, with_unused_name
from onewan.train.setup import WanModelSetup
from onewan.train.trainer import WanTrainer
from onewan.variants import NEGATIVE_PROMPT, Variant, VariantName

# Their progress bars for loading would interleave with ours.
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


def demo(folder: Path, variant: VariantName) -> int:
    with Progress() as progress:
        run_demo(folder, variant, progress.listen, progress.line)
    return 0


def cache(run: Path, overrides: Sequence[str], *, strict: bool, verify: bool) -> int:
    config = load_run(run_file_of(run), overrides)
    if not config.video_data.cache:
        raise ConfigError(
            str(run), ["video_data.cache: is false, so nothing is cached; set it to true"]
        )
    with Progress() as progress:
        # The prompts of sample videos are encoded too: training then needs no text encoder.
        data = WanModelSetup(config).dataset(
            sample_requests(config),
            lambda what, done, total: progress.advance(what, done, total, unit="item"),
            verify=verify,
        )
    # After the display is closed: unusable files are listed below its bar, not between updates.
    for line in data.report.lines():
        progress.line(line)
    folder = displayed(config.video_data.cache_dir)
    progress.line(f"cache {folder}: {data.encoded} entries encoded now")
    if strict and data.report.problems:
        count = len(data.report.problems)
        complain(f"onewan: {count} files can't be used (an error with --strict)")
        return 1
    return 0


def train(
    run: Path,
    overrides: Sequence[str],
    *,
    resume: Resume,
    again: bool,
    allow_change: bool,
) -> int:
    if again and not run.is_dir():
        raise ConfigError(
            str(run), ["is not a folder; --again takes the folder of a run, such as runs/NAME"]
        )
    run = run_file_of(run)
    config = load_run(run, overrides)
    # The first run stays as it is, so that the two can be compared.
    if again:
        config = with_unused_name(config)
    with Progress() as progress:
        WanTrainer(
            config,
            # Python writes line breaks as the system has them, and would double those of Windows.
            run_file=decode_text(run.read_bytes()).replace("\r\n", "\n") if run.is_file() else None,
            listen=progress.listen,
            resume=resume,
            allow_change=allow_change,
            overrides=overrides,
        ).fit()
    return 0


def sample(options: argparse.Namespace) -> int:
    # First, so that a device which does not exist is reported before minutes of loading.
    device = resolve_device(options.device)
    limit_memory(device)
    model = WanModelLoader().load(
        options.model, dtype=torch_dtype(options.dtype), boundary=options.boundary
    )
    for notice in model.notices:
        say(notice)
    for path in options.lora:
        for lora in read_adapters(path):
            expert = expert_of(path, lora.metadata, model.variant, lora.expert)
            name = str(path).replace(".", "_")  # PEFT takes no dots in an adapter's name
            apply_lora(model.expert(expert), lora.modules, name)
            for notice in lora.notices:
                say(f"note: {notice}")
            say(f"{path}: applied to the {expert.name} expert")
    request = _request(options, model.variant)
    # Before sampling: a placeholder without vectors would be encoded as ordinary words.
    for path in options.embedding:
        say(_add_embedding(model, path, request))
    with Progress() as progress:
        WanModelSampler(model, residency=sampling_residency(model, device)).sample_to(
            options.out,
            request,
            on_step=partial(progress.advance, "sampling"),
        )
    say(
        f"{options.out}: {request.frames} frames, {request.width}x{request.height}, "
        f"{request.fps:g} fps"
    )
    return 0


def _add_embedding(model: WanModel, path: Path, request: SampleRequest) -> str:
    """Add the embedding in `path` to `model`; returns a line about it for the user."""
    _, text_encoder = model.prompt_encoder()
    embedding = WanModelEmbedding.from_file(path, width=text_encoder.config.d_model)
    model.add_embedding(embedding)
    placeholder, count = embedding.placeholder, len(embedding.vectors)
    line = f"{path}: {placeholder} is replaced by {count} vector{'s' if count > 1 else ''}"
    prompts = (request.prompt, request.negative_prompt)
    if not any(mentions(prompt, placeholder) for prompt in prompts):
        line += f"; no prompt contains {placeholder}, so the embedding has no effect"
    return line


def _request(options: argparse.Namespace, variant: Variant) -> SampleRequest:
    """The sample request of the options, with the variant's official values as defaults."""

    # Not `value or official`: 0 and "" are values that the user may have given.
    def or_official(value: object, official: object) -> Any:
        return official if value is None else value

    return SampleRequest(
        prompt=options.prompt,
        negative_prompt=or_official(options.negative_prompt, NEGATIVE_PROMPT),
        image=options.image,
        width=or_official(options.width, variant.sample_size[0]),
        height=or_official(options.height, variant.sample_size[1]),
        frames=or_official(options.frames, variant.frames),
        steps=or_official(options.steps, variant.sampling_steps),
        guidance=tuple(
            or_official(options.guidance, [expert.guidance_scale for expert in variant.experts])
        ),
        shift=or_official(options.shift, variant.flow_shift),
        seed=options.seed,
        fps=or_official(options.fps, variant.fps),
    )
