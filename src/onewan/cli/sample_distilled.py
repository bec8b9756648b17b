"""The distilled LoRAs that `onewan sample` uses: those of ``--distilled``, or else the run's."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from onewan.cli.sample_source import SampleSource
from onewan.config.schema import DistilledSection
from onewan.errors import ConfigError
from onewan.formats.lora_files import AdapterFile
from onewan.sample.distilled import read_distilled
from onewan.variants import ExpertName, Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class Distilled:
    """Distilled LoRAs, read and ready to be laid over a model."""

    files: Mapping[ExpertName, AdapterFile]
    strengths: Mapping[ExpertName, float]


def distilled_section(options: argparse.Namespace, source: SampleSource) -> DistilledSection | None:
    """Steps, guidance and shift of distilled LoRAs; None if there are none."""
    if options.distilled:
        return DistilledSection()
    if options.full or source.config is None:
        return None
    return source.config.sample.distilled


def distilled_problems(
    options: argparse.Namespace, source: SampleSource, variant: Variant | None
) -> Iterator[str]:
    """What is wrong with the options, one line each; some is found only if the variant is known."""
    of_run = None if source.config is None else source.config.sample.distilled
    if options.full and options.distilled:
        yield "--full: is without distilled LoRAs, and --distilled gives some; leave one out"
    elif options.full and of_run is None:
        yield "--full: there are no distilled LoRAs to leave out; leave it out"
    given = options.distilled or []
    if variant is not None and given and len(given) != len(variant.experts):
        wanted = "two files, HIGH LOW," if len(variant.experts) == 2 else "one file"
        yield f"--distilled: {variant.name} needs {wanted} got {len(given)}"
    yield from (f"--distilled: there is no file {path}" for path, _ in given if not path.is_file())


def read_distilled_options(
    options: argparse.Namespace, source: SampleSource, variant: Variant
) -> Distilled | None:
    """The LoRAs, by expert; None if there are none. CheckpointError for files that can't be used,
    ConfigError as from `distilled_problems`."""
    if problems := list(distilled_problems(options, source, variant)):
        raise ConfigError("sample", problems)
    section = distilled_section(options, source)
    if section is None:
        return None
    files: dict[ExpertName, Path] = section.files()
    strengths = dict.fromkeys(files, section.strength)
    for expert, (path, strength) in zip(variant.experts, options.distilled or [], strict=False):
        files[expert.name], strengths[expert.name] = path, strength
    found = read_distilled(files, check_file_names=source.check_file_names)
    return Distilled(files=found, strengths=strengths)
