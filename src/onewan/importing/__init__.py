"""Run files from other trainers' configs, with an account of every key; today OneTrainer's.

Only version 11 of the config is read, of Wan 2.2 and, with notices, of HunyuanVideo. A key is
carried (to a field of the run file), left at its default, not applicable (with the reason), or
unknown; none is skipped silently. Each section has a table of keys in a file of its own; the
meaning of a value is decided in `onewan.onetrainer.settings`, which the add-on trains by, so a run
in OneTrainer and the imported one draw the same noise. Secrets are neither read nor shown.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from onewan.errors import ConfigError
from onewan.importing import (
    data,
    method,
    model,
    optimizer,
    output,
    train,
)
from onewan.importing.reading import (
    CONCEPT_FILE,
    SAMPLE_FILE,
    VERSION,
    checked_objects,
    checkout_above,
    read_json,
    read_list,
    unsupported,
    variant_for,
)
from onewan.importing.table import (
    Context,
    Entry,
    Outcome,
    Row,
    convert,
    flatten,
    merge,
    set_path,
)
from onewan.variants import VARIANTS, VariantName

SECRETS = ("secrets", "huggingface_token", "cloud")
"""Keys whose values are neither read nor shown."""

_SECTIONS = (model.ROWS, data.ROWS, method.ROWS, optimizer.ROWS, train.ROWS, output.ROWS)
ROWS: tuple[Row, ...] = (*(row for rows in _SECTIONS for row in rows), method.EMBEDDING_RATE)
"""All keys of the config itself that become fields, in the order of the run file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A run file, and the account of how each key was imported."""

    document: dict[str, Any]
    entries: tuple[Entry, ...]
    notices: tuple[str, ...]
    """What the user should look at."""


def looks_like_onetrainer(path: Path) -> bool:
    """Whether the file is a config of OneTrainer rather than a run file."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError:
        return False
    return (
        isinstance(config, dict)
        and "model" not in config
        and bool({"training_method", "base_model_name", "model_type", "__version"} & config.keys())
    )


def import_config(
    path: Path, *, variant: VariantName | None = None, root: Path | None = None
) -> Imported:
    """The run file that the OneTrainer config `path` means.

    `variant` is needed where neither the base model's name nor its files determine it. Relative
    paths are relative to `root`, OneTrainer's folder; without it, to the nearest folder above
    `path` that is a checkout, or else to the config's own. ConfigError with all problems at once.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise ConfigError(str(path), ["is not a OneTrainer config: it holds no JSON object"])
    if problem := unsupported(config, is_preset=path.name.startswith("#")):
        raise ConfigError(str(path), [problem])
    if infinite := [(k, v) for k, v in flatten(config) if v in (math.inf, -math.inf) or v != v]:
        problems = [f"{key}: is {value}; give a finite number" for key, value in infinite]
        raise ConfigError(str(path), problems)
    context = Context(
        given=config,
        rows={row.key: row for row in ROWS},
        variant=VARIANTS["t2v-a14b"],
        root=root or checkout_above(path),
    )
    context = replace(context, variant=variant_for(config, context, variant, path))
    document = _document(context)
    if context.problems:
        raise ConfigError(str(path), [f"{key}: {text}" for key, text in context.problems.items()])
    return Imported(
        document=document,
        entries=tuple(sorted(context.entries.values(), key=lambda entry: entry.key)),
        notices=tuple(dict.fromkeys(context.notices)),
    )


def _document(context: Context) -> dict[str, Any]:
    """The run file; entries, notices and problems are collected in `context`."""
    concepts = read_list(context, "concepts", CONCEPT_FILE)
    sampled = read_list(context, "samples", SAMPLE_FILE)
    listed = context.given.get("additional_embeddings")
    additional = checked_objects(context, "additional_embeddings", listed)
    sources = data.sources(concepts, context)
    # The schedule needs the number of steps, which needs the clips of all concepts.
    training = [source for source in sources if not source.is_validation]
    context = replace(context, clips=sum(source.clips for source in training))

    document: dict[str, Any] = {}
    for rows in _SECTIONS:
        merge(document, convert(rows, context))
    for field, value in data.FIXED_FIELDS.items():
        set_path(document, field, value)
    set_path(document, "video_data.sources", [source.fields for source in training])
    held_out = [source.fields for source in sources if source.is_validation]
    if held_out and context.given.get("validation"):
        set_path(document, "validation.sources", held_out)
    if embeddings := method.embeddings(additional, context):
        document["embeddings"] = embeddings
    # An interval without prompts would be refused by the run file's rules.
    every = document.pop("sample", {}).get("every")
    document["sample"] = output.samples(sampled, context)
    if every and document["sample"]["prompts"]:
        document["sample"]["every"] = every
    given = {**context.given, "concepts": concepts, "samples": sampled}
    for entry in _without_row(given, context):
        context.entries[entry.key] = entry
    return document


def _without_row(given: Mapping[str, Any], context: Context) -> Iterator[Entry]:
    """Entries of the given keys that no row has."""
    for key, value in flatten(given):
        if key.split(".")[0] in SECRETS:
            note = "secrets and cloud settings are not imported"
            yield Entry(key, None, "not applicable", note)
        elif key not in context.entries:
            reasons = (text for pattern, text in _no_counterpart() if re.fullmatch(pattern, key))
            if reason := next(reasons, None):
                yield Entry(key, value, "not applicable", reason)
            else:
                yield Entry(key, value, "unknown", f"not a key of OneTrainer's version {VERSION}")


@lru_cache(maxsize=1)
def _no_counterpart() -> list[tuple[str, str]]:
    """(regular expression for keys, reason); the first that matches is used."""
    file = files("onewan.importing").joinpath("no_counterpart.json")
    return json.loads(file.read_text(encoding="utf-8"))


__all__ = ["Entry", "Imported", "Outcome", "import_config", "looks_like_onetrainer"]
