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
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from onewan.documents import decode_text, format_value, to_yaml
from onewan.errors import ConfigError, one_line
from onewan.files import read_input
from onewan.importing import data, method, model, optimizer, output, train
from onewan.importing.table import (
    Context,
    Entry,
    Outcome,
    Row,
    convert,
    exists,
    flatten,
)
from onewan.onetrainer.patches.configs import CONFIG_VERSION
from onewan.onetrainer.settings import variant_of_base_model
from onewan.variants import VARIANTS, Variant, VariantName

VERSION = CONFIG_VERSION
"""The version of OneTrainer's config that is imported."""

MODEL_TYPES = ("WAN_2_2", "HUNYUAN_VIDEO")

SECRETS = ("secrets", "huggingface_token", "cloud")
"""Keys whose values are neither read nor shown."""

_CONVERTED = model.ROWS + data.ROWS + method.ROWS + optimizer.ROWS + train.ROWS + output.ROWS
ROWS: tuple[Row, ...] = (*_CONVERTED, method.EMBEDDING_RATE)
"""All keys of the config itself that become fields, in the order of the run file."""

MARK = "# Made by onewan from the OneTrainer config"
"""How a run file begins that was made from a config."""

_MAX_BYTES = 32 * 1024 * 1024
"""Of a config, or of a list of concepts, which may have thousands with all of their settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A run file, and the account of how each key was imported."""

    document: dict[str, Any]
    entries: tuple[Entry, ...]
    notices: tuple[str, ...]
    """What the user should look at."""

    @property
    def summary(self) -> str:
        """How many keys there are of each outcome."""
        counts = Counter(entry.outcome for entry in self.entries)
        return ", ".join(f"{count} {outcome}" for outcome, count in counts.items())


def looks_like_onetrainer(path: Path) -> bool:
    """Whether the file is a config of OneTrainer rather than a run file."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    try:
        config = json.loads(decode_text(read_input(path, _MAX_BYTES)))
    except (OSError, ValueError, RecursionError):  # said where it is read as a run file
        return False
    marks = {"training_method", "base_model_name", "model_type", "__version"}
    return isinstance(config, dict) and "model" not in config and not marks.isdisjoint(config)


def import_config(
    path: Path,
    *,
    variant: VariantName | None = None,
    root: Path | None = None,
    may_read: Callable[[Path], object] = lambda _: None,
) -> Imported:
    """The run file that the OneTrainer config `path` means.

    `variant` is needed where neither the base model's name nor its files determine it. Relative
    paths are relative to `root`, OneTrainer's folder; without it, to the nearest folder above
    `path` that is a checkout, or else to the config's own. `may_read` is called with each other
    file that the config names, before it is read, and raises to refuse it. ConfigError with all
    problems at once.
    """
    config = _read_json(path)
    if problems := _why_unusable(config, path):
        raise ConfigError(str(path), problems)
    if root is not None and not root.is_dir():
        raise ConfigError("--root", [f"{root}: is not a folder; give OneTrainer's folder"])
    if root is None:
        folders = path.resolve().parents
        checkouts = (f for f in folders if (f / "modules/util/enum/ModelType.py").is_file())
        root = next(checkouts, folders[0])
    document: dict[str, Any] = {}
    context = Context(
        given=config,
        rows={row.key: row for row in ROWS},
        variant=VARIANTS[variant or "t2v-a14b"],  # replaced below if none is given
        root=root.resolve(),
        may_read=may_read,
    )
    if not context.has_wrong_values():
        if variant is None:
            context = replace(context, variant=_variant_of_base_model(context, path))
        document = _document(context)
    if context.problems:
        found = [f"{one_line(key)}: {text}" for key, text in context.problems.items()]
        raise ConfigError(str(path), found)
    return Imported(
        document=document,
        entries=tuple(sorted(context.entries.values(), key=lambda entry: entry.key)),
        notices=tuple(dict.fromkeys(context.notices)),
    )


def run_file_text(imported: Imported, name: str) -> str:
    """The run file of `imported` in YAML, with its notices as comments; `name` is that of the
    config."""
    notices = [f"# Check: {one_line(notice)}" for notice in imported.notices]
    return "\n".join([f"{MARK} {one_line(name)}.", *notices, to_yaml(imported.document)])


def _read_json(path: Path) -> Any:
    try:
        text = decode_text(read_input(path, _MAX_BYTES))
    except ValueError as error:
        raise ConfigError(str(path), [str(error)]) from None
    except OSError as error:
        raise ConfigError(str(path), [f"can't be read ({error.strerror})"]) from error
    try:
        return json.loads(text)
    except RecursionError:
        raise ConfigError(str(path), ["is nested too deeply for a config"]) from None
    except ValueError as error:
        raise ConfigError(str(path), [f"is not valid JSON: {error}"]) from error


def _why_unusable(config: Any, path: Path) -> list[str]:
    if not isinstance(config, dict):
        return ["is not a OneTrainer config: it holds no JSON object"]
    # OneTrainer loads presets without migrating them, and no config of Wan is older than this.
    is_current = path.name.startswith("#") or config.get("model_type") == "WAN_2_2"
    version = config.get("__version", VERSION if is_current else 0)
    if version != VERSION:
        is_newer = isinstance(version, int) and version > VERSION
        remedy = "update onewan" if is_newer else "open and save it in OneTrainer first"
        return [
            f"__version: is {format_value(version)}, and only version {VERSION} is imported; "
            f"{remedy}"
        ]
    if (kind := config.get("model_type")) not in MODEL_TYPES:
        return [
            f"model_type: is {format_value(kind)}; only configs of {' and '.join(MODEL_TYPES)} are "
            "imported"
        ]
    return [
        f"{one_line(key)}: is {value}; give a finite number"
        for key, value in flatten(config)
        if isinstance(value, float) and not math.isfinite(value)
    ]


def _variant_of_base_model(context: Context, path: Path) -> Variant:
    """The variant that the base model's name or files determine."""
    base = str(context["base_model_name"])
    if context["model_type"] == "WAN_2_2" and (
        found := variant_of_base_model(base, context.resolve(base))
    ):
        return found
    problem = (
        f"base_model_name: is {format_value(base)}, which does not determine the variant of Wan "
        f"2.2; give it with --variant {', '.join(VARIANTS)}"
    )
    raise ConfigError(str(path), [problem])


def _document(context: Context) -> dict[str, Any]:
    """The run file; entries, notices and problems are collected in `context`."""
    concepts = _listed(context, "concepts", "concept_file_name")
    sampled = _listed(context, "samples", "sample_definition_file_name")
    embedded = _objects(context, "additional_embeddings")
    # The schedule needs the number of steps, which needs the clips of all concepts.
    training, held_out, clips = data.sources(concepts, context)
    context = replace(context, clips=clips)
    document = convert(_CONVERTED, context)
    document.setdefault("video_data", {})["sources"] = training
    if held_out and context.given.get("validation"):
        document.setdefault("validation", {})["sources"] = held_out
    if embeddings := method.embeddings(embedded, context):
        document["embeddings"] = embeddings
    # An interval without prompts would be refused by the run file's rules.
    every = document.pop("sample", {}).get("every")
    document["sample"] = output.samples(sampled, context)
    if every and document["sample"]["prompts"]:
        document["sample"]["every"] = every
    _account_for_the_rest({**context.given, "concepts": concepts, "samples": sampled}, context)
    return document


def _listed(context: Context, key: str, file_key: str) -> list[dict[str, Any]]:
    """Concepts or samples: those in the config, or those of the file that it names."""
    default = f"training_{key}/{key}.json"
    named = context.given.get(file_key, default)
    file = context.resolve(named)
    items, note = context.given.get(key), f"read from {file}"
    if items is not None:
        note = f"not read, since the config itself has {key}"
    elif exists(file):
        context.may_read(file)
        items = _read_json(file)
    elif named == default:
        context.notices.append(f"no {key}: {file} does not exist")
    else:
        context.problem(
            file_key,
            f"is {format_value(named)}, and {file} does not exist; copy it there, or give "
            "OneTrainer's folder with --root",
        )
    outcome: Outcome = "carried" if file_key in context.given else "defaulted"
    context.entries[file_key] = Entry(file_key, named, outcome, note)
    return _objects(context, key, items)


def _objects(context: Context, key: str, items: Any = None) -> list[dict[str, Any]]:
    """The items of a list, by default of the one in the config itself."""
    items = context.given.get(key) if items is None else items
    if items is None:
        return []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        context.problem(key, "is not a list of objects")
        return []
    return items


def _account_for_the_rest(given: Mapping[str, Any], context: Context) -> None:
    """Add entries for the given keys that no row has."""
    text = files("onewan.importing").joinpath("no_counterpart.json").read_text(encoding="utf-8")
    reasons: list[tuple[str, str]] = json.loads(text)  # (regular expression for keys, reason)
    for key, value in flatten(given):
        if key.split(".")[0] in SECRETS:
            note = "secrets and cloud settings are not imported"
            context.entries[key] = Entry(key, None, "not applicable", note)
        elif key not in context.entries:
            reason = next((why for keys, why in reasons if re.fullmatch(keys, key)), None)
            outcome: Outcome = "not applicable" if reason else "unknown"
            note = reason or f"not a key of OneTrainer's version {VERSION}"
            context.entries[key] = Entry(key, value, outcome, note)


__all__ = ["Entry", "Imported", "Outcome", "import_config", "looks_like_onetrainer"]
