"""Reading OneTrainer's files: the config, the lists that it names, and the variant it is for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onewan.errors import ConfigError, OnewanError
from onewan.importing.table import Context, Entry, Outcome
from onewan.variants import VARIANTS, Variant, VariantName, variant_of

VERSION = 11
"""The version of OneTrainer's config that is imported."""

MODEL_TYPES = ("WAN_2_2", "HUNYUAN_VIDEO")
CONCEPT_FILE = ("concept_file_name", "training_concepts/concepts.json")
SAMPLE_FILE = ("sample_definition_file_name", "training_samples/samples.json")
"""The key that names a file, and OneTrainer's default."""


def unsupported(config: Mapping[str, Any], *, is_preset: bool) -> str | None:
    """Why the config can't be imported. A preset may have no version: OneTrainer itself loads
    presets without migrating them."""
    version = config.get("__version", VERSION if is_preset else 0)
    if version != VERSION:
        remedy = (
            "update onewan"
            if isinstance(version, int) and version > VERSION
            else "open and save it in OneTrainer first"
        )
        return f"__version: is {version}, and only version {VERSION} is imported; {remedy}"
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        return (
            f"model_type: is {model_type}; only configs of {' and '.join(MODEL_TYPES)} are imported"
        )
    return None


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ConfigError(str(path), [f"is not valid JSON: {error}"]) from error
    except OSError as error:
        raise ConfigError(str(path), [f"can't be read ({error.strerror})"]) from error


def checkout_above(path: Path) -> Path:
    for folder in path.resolve().parents:
        if (folder / "modules" / "util" / "enum" / "ModelType.py").is_file():
            return folder
    return path.resolve().parent


def read_list(context: Context, key: str, named_by: tuple[str, str]) -> list[dict[str, Any]]:
    """Concepts or samples: those in the config, or those of the file that it names."""
    file_key, default = named_by
    named = context.given.get(file_key, default)
    file = context.resolve(named)
    items, note = context.given.get(key), f"read from {file}"
    if items is not None:
        note = f"not read, since the config itself has {key}"
    elif file.is_file():
        items = read_json(file)
    elif named == default:
        context.notices.append(f"no {key}: {file} does not exist")
    else:
        context.problem(
            file_key,
            f"is {named!r}, and {file} does not exist; copy it there, or give OneTrainer's folder "
            "with --root",
        )
    outcome: Outcome = "carried" if file_key in context.given else "defaulted"
    context.entries[file_key] = Entry(file_key, named, outcome, note)
    return checked_objects(context, key, items)


def checked_objects(context: Context, key: str, items: Any) -> list[dict[str, Any]]:
    if items is None:
        return []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        context.problem(key, "is not a list of objects")
        return []
    return items


def variant_for(
    config: Mapping[str, Any], context: Context, requested: VariantName | None, path: Path
) -> Variant:
    """The requested variant, or the one that the base model's name or files determine."""
    if requested is not None:
        return VARIANTS[requested]
    base = str(context["base_model_name"])
    if config["model_type"] == "WAN_2_2":
        # Local folders are usually named after the repository: Wan2.2-T2V-A14B.
        plain = re.sub(r"[^a-z0-9]", "", base.lower())
        for name, variant in VARIANTS.items():
            if name.replace("-", "") in plain:
                return variant
        if (found := _variant_of_files(context.resolve(base))) is not None:
            return found
    raise ConfigError(
        str(path),
        [
            f"base_model_name: is {base!r}, which does not determine the variant of Wan 2.2; give "
            f"it with --variant {', '.join(VARIANTS)}"
        ],
    )


def _variant_of_files(folder: Path) -> Variant | None:
    file = folder / "transformer" / "config.json"
    if not file.is_file():
        return None
    try:
        return variant_of(json.loads(file.read_text(encoding="utf-8")), str(file))
    except (ValueError, OnewanError):
        return None
