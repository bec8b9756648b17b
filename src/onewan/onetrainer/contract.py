"""What the add-on stands on in OneTrainer, and whether a checkout has it.

`contract.json` holds names and signatures as they were at the commit that the add-on was made for;
``scripts/take_onetrainer_contract.py`` takes it from a checkout, by the list `REQUIRED_NAMES`.
Both read source files and import nothing, so a checkout can be checked without its environment,
and without torch.
"""

from __future__ import annotations

import ast
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from onewan.onetrainer.bootstrap import KNOWN_COMMIT, TOUCHED

SETUP_METHODS = (
    "__init__",
    "create_parameters",
    "setup_optimizations",
    "setup_model",
    "setup_train_device",
    "predict",
    "calculate_loss",
    "after_optimizer_step",
    "stop_embedding_training_elapsed",
    "prior_model",
    "_create_model_part_parameters",
    "_setup_model_part_requires_grad",
    "_setup_model_part",
    "_set_attention_backend",
)

MODEL_TYPES = tuple(f"ModelType.{name}" for name in ("HUNYUAN_VIDEO", "model_parts"))

_USED: dict[str, tuple[str, ...]] = {
    "modules.util.factory": ("get", "register", "import_dir"),
    "modules.util.create": (
        "create_model_loader",
        "create_model_saver",
        "create_model_setup",
        "create_model_sampler",
        "create_data_loader",
        "create_optimizer",
    ),
    "modules.util.enum.ModelType": MODEL_TYPES,
    "modules.util.enum.ModelFormat": ("ModelFormat.SAFETENSORS", "ModelFormat.INTERNAL"),
    "modules.util.enum.DataType": ("DataType.torch_dtype", "DataType.is_quantized"),
    "modules.util.enum.FileType": ("FileType.IMAGE", "FileType.VIDEO"),
    "modules.util.enum.LossScaler": ("LossScaler.get_scale",),
    "modules.util.config.BaseConfig": ("BaseConfig.to_dict", "BaseConfig.from_dict"),
    "modules.util.config.TrainConfig": (
        "QuantizationConfig",
        *(
            f"TrainConfig.{name}"
            for name in (
                "transformer",
                "text_encoder",
                "vae",
                "train_any_embedding",
                "train_any_output_embedding",
                "all_embedding_configs",
                "embedding",
                "additional_embeddings",
                "embedding_learning_rate",
                "preserve_embedding_norm",
                "bundle_additional_embeddings",
                "training_method",
                "optimizer",
                "concepts",
                "concept_file_name",
                "cache_dir",
                "latent_caching",
                "resolution",
                "frames",
                "aspect_ratio_bucketing",
                "batch_size",
                "gradient_accumulation_steps",
                "multi_gpu",
                "train_dtype",
                "fallback_train_dtype",
                "attention_mechanism",
                "compile",
                "debug_mode",
                "dropout_probability",
                "layer_filter",
                "layer_filter_regex",
                "lora_rank",
                "lora_alpha",
                "lora_weight_dtype",
                "mse_strength",
                "mae_strength",
                "log_cosh_strength",
                "huber_strength",
                "huber_delta",
                "loss_weight_fn",
                "loss_weight_strength",
                "loss_scaler",
                "masked_training",
                "unmasked_weight",
                "masked_prior_preservation_weight",
                "custom_conditioning_image",
                "offset_noise_weight",
                "perturbation_noise_weight",
                "min_noising_strength",
                "max_noising_strength",
                "timestep_distribution",
                "noising_weight",
                "noising_bias",
                "timestep_shift",
                "dynamic_timestep_shifting",
                "validation",
            )
        ),
        *(
            f"TrainModelPartConfig.{name}"
            for name in (
                "model_name",
                "include",
                "train",
                "learning_rate",
                "weight_dtype",
                "dropout_probability",
                "stop_training_after",
            )
        ),
    ),
    "modules.util.config.SampleConfig": tuple(
        f"SampleConfig.{name}"
        for name in (
            "prompt",
            "negative_prompt",
            "width",
            "height",
            "frames",
            "seed",
            "random_seed",
            "diffusion_steps",
            "cfg_scale",
            "base_image_path",
        )
    ),
    "modules.util.config.ConceptConfig": ("ConceptConfig.default_values",),
    "modules.util.ModelNames": ("ModelNames.__init__", "ModelNames.all_embedding"),
    "modules.util.ModelWeightDtypes": ("ModelWeightDtypes.__init__",),
    "modules.util.ModuleFilter": (
        "ModuleFilter.create",
        "ModuleFilter.matches",
        "ModuleFilter.was_used",
    ),
    "modules.util.NamedParameterGroup": (
        "NamedParameterGroup.__init__",
        "NamedParameterGroupCollection.add_group",
    ),
    "modules.util.TrainProgress": ("TrainProgress.global_step",),
    "modules.util.checkpointing_util": ("enable_checkpointing",),
    "modules.util.multi_gpu_util": ("world_size", "rank"),
    "modules.util.optimizer_util": ("init_model_parameters",),
    "modules.util.path_util": ("safe_filename",),
    "modules.util.quantization_util": ("replace_linear_with_quantized_layers",),
    "modules.util.torch_util": ("state_dict_has_prefix",),
    "modules.model.BaseModel": tuple(
        f"BaseModel.{name}"
        for name in (
            "__init__",
            "materialize",
            "evict",
            "materialize_only",
            "_move_part",
            "eval",
            "adapters",
        )
    ),
    "modules.modelLoader.BaseModelLoader": ("BaseModelLoader.load",),
    "modules.modelLoader.GenericFineTuneModelLoader": ("make_fine_tune_model_loader",),
    "modules.modelLoader.GenericLoRAModelLoader": ("make_lora_model_loader",),
    "modules.modelLoader.GenericEmbeddingModelLoader": ("make_embedding_model_loader",),
    "modules.modelSaver.BaseModelSaver": ("BaseModelSaver.save",),
    "modules.modelSaver.GenericFineTuneModelSaver": ("make_fine_tune_model_saver",),
    "modules.modelSaver.GenericLoRAModelSaver": ("make_lora_model_saver",),
    "modules.modelSaver.GenericEmbeddingModelSaver": ("make_embedding_model_saver",),
    "modules.modelSaver.mixin.LoRASaverMixin": (
        "LoRASaverMixin._save",
        "LoRASaverMixin._save_internal",
        "LoRASaverMixin._get_state_dict",
    ),
    "modules.modelSaver.mixin.DtypeModelSaverMixin": (
        "DtypeModelSaverMixin._create_safetensors_header",
    ),
    "modules.modelSetup.BaseModelSetup": tuple(f"BaseModelSetup.{m}" for m in SETUP_METHODS),
    "modules.modelSetup.mixin.ModelSetupText2ImageMixin": (
        "ModelSetupText2ImageMixin.prepare_text_caching",
    ),
    "modules.module.LoRAModule": tuple(
        f"LoRAModuleWrapper.{name}"
        for name in (
            "__init__",
            "load_state_dict",
            "state_dict",
            "set_dropout",
            "to",
            "hook_to_module",
        )
    ),
    "modules.dataLoader.BaseDataLoader": (
        "BaseDataLoader.__init__",
        "BaseDataLoader._create_dataset",
    ),
    "modules.dataLoader.mixin.DataLoaderText2ImageMixin": tuple(
        f"DataLoaderText2ImageMixin.{name}"
        for name in (
            "_enumerate_input_modules",
            "_load_input_modules",
            "_mask_augmentation_modules",
            "_aspect_bucketing_in",
            "_crop_modules",
            "_augmentation_modules",
            "_preparation_modules",
            "_cache_modules",
            "_output_modules",
            "_debug_modules",
            "_cache_modules_from_names",
            "_output_modules_from_out_names",
            "_create_dataset",
        )
    ),
    "modules.modelSampler.BaseModelSampler": (
        "BaseModelSampler.__init__",
        "BaseModelSampler.sample",
        "BaseModelSampler.save_sampler_output",
        "ModelSamplerOutput.__init__",
    ),
    **{
        f"modules.util.ui.{kit}_components": (
            "label",
            "entry",
            "path_entry",
            "options",
            "options_kv",
            "switch",
            "section_frame",
        )
        for kit in ("pyside6", "ctk")
    },
}


def _required_names() -> dict[str, tuple[str, ...]]:
    merged: dict[str, list[str]] = {}
    for table in (TOUCHED, _USED):
        for module, names in table.items():
            merged.setdefault(module, []).extend(names)
    return {module: tuple(dict.fromkeys(names)) for module, names in sorted(merged.items())}


REQUIRED_NAMES = _required_names()
"""Functions, classes, and what is in them, by module: all that the overlay patches, overrides,
calls or reads. Names of enum tables that Python itself makes are not looked for."""

_OF_PYTHON = ("_member_names_", "_member_map_", "_value2member_map_")


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Something that a checkout lacks."""

    file: str
    name: str
    """As the add-on calls it, such as ``TrainConfig.model_names``."""
    text: str

    def __str__(self) -> str:
        return f"{self.file}: {self.name}: {self.text}"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What came of a check."""

    problems: tuple[Mismatch, ...]
    names: int
    """How many names were looked for."""
    files: int


@lru_cache(maxsize=1)
def contract() -> dict[str, Any]:
    """What was taken: ``commit``, ``date`` and, under ``modules``, a fact for each name."""
    text = files("onewan.onetrainer").joinpath("contract.json").read_text(encoding="utf-8")
    return json.loads(text)


def check(root: Path) -> CheckResult:
    """Whether the checkout at `root` has all that the add-on relies on."""
    known: dict[str, dict[str, Any]] = contract()["modules"]
    found = [problem for name, facts in known.items() for problem in _missing(root, name, facts)]
    return CheckResult(tuple(found), sum(map(len, known.values())), len(known))


def take(root: Path) -> dict[str, dict[str, Any]]:
    """The facts of `REQUIRED_NAMES` in the checkout at `root`; KeyError for a missing name."""
    taken: dict[str, dict[str, Any]] = {}
    for module, names in REQUIRED_NAMES.items():
        have = _facts(root / _file(module))
        wanted = [n for n in names if n.rpartition(".")[2] not in _OF_PYTHON]
        owners = {n.partition(".")[0] for n in wanted}
        taken[module] = {n: have[source_name(n)] for n in sorted({*wanted, *owners})}
    return taken


def _missing(root: Path, module: str, facts: Mapping[str, Any]) -> Iterator[Mismatch]:
    file = _file(module)
    path = root / file
    try:
        have = _facts(path)
    except OSError:
        for name in facts:
            yield Mismatch(file, name, "the file is not there")
        return
    except SyntaxError as error:
        yield Mismatch(file, module, f"is no Python that can be read (line {error.lineno})")
        return
    for name, fact in facts.items():
        plain = source_name(name)
        if plain not in have:
            near = difflib.get_close_matches(plain, have, n=1, cutoff=0.75)
            hint = f"; there is {near[0]}" if near else ""
            yield Mismatch(file, name, f"is not there{hint}")
        elif text := _differs(fact, have[plain]):
            yield Mismatch(file, name, text)


def _differs(fact: Mapping[str, Any], have: Mapping[str, Any]) -> str | None:
    """What keeps the add-on from using what is there as what it knew."""
    if fact["kind"] != have["kind"]:
        return f"is a {have['kind']} and was a {fact['kind']}"
    if fact["kind"] != "function":
        return None
    old, new = fact["parameters"], have["parameters"]
    names = [p["name"] for p in new]
    gone = [p["name"] for p in old if p["name"] not in names]
    if gone:
        return f"takes no {', '.join(gone)} any more; it takes {', '.join(names)}"
    known = {p["name"] for p in old}
    more = [
        p["name"]
        for p in new
        if p["name"] not in known and p["kind"] == "plain" and not p["default"]
    ]
    if more:
        return f"wants {', '.join(more)} too"
    order = [p["name"] for p in old if p["kind"] == "plain"]
    if order != [n for n in names if n in order]:
        return f"takes its arguments in another order: {', '.join(names)}"
    return None


# ------------------------------------------------------------------------------------------ sources


def _file(module: str) -> str:
    return module.replace(".", "/") + ".py"


def source_name(name: str) -> str:
    """``View._View__make`` as the source has it, ``View.__make``."""
    owner, dot, member = name.partition(".")
    return f"{owner}{dot}{member.removeprefix(f'_{owner}')}" if f"_{owner}__" in member else name


def _facts(path: Path) -> dict[str, dict[str, Any]]:
    """All names that the source file `path` defines, and those within its classes."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return dict(_of_body(tree.body, ""))


def _of_body(body: Sequence[ast.stmt], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield prefix + node.name, {"kind": "function", "parameters": _parameters(node)}
                if prefix and node.name == "__init__":
                    yield from _set_on_self(node, prefix)
            case ast.ClassDef():
                bases = [ast.unparse(base) for base in node.bases]
                yield prefix + node.name, {"kind": "class", "bases": bases}
                yield from _of_body(node.body, f"{prefix}{node.name}.")
            case ast.Assign(targets=targets):
                for target in targets:
                    if isinstance(target, ast.Name):
                        yield prefix + target.id, {"kind": "value"}
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield prefix + name, {"kind": "value"}
            case ast.If() | ast.Try():
                yield from _of_body(node.body, prefix)
            case _:
                pass


def _set_on_self(node: ast.AST, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for inner in ast.walk(node):
        targets = inner.targets if isinstance(inner, ast.Assign) else []
        for target in targets:
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                yield prefix + target.attr, {"kind": "value"}


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[dict[str, Any]]:
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args]
    without = len(plain) - len(arguments.defaults)
    found = [
        {"name": a.arg, "kind": "plain", "default": place >= without}
        for place, a in enumerate(plain)
    ]
    if arguments.vararg:
        found.append({"name": arguments.vararg.arg, "kind": "rest", "default": True})
    found += [
        {"name": a.arg, "kind": "named", "default": default is not None}
        for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg:
        found.append({"name": arguments.kwarg.arg, "kind": "more", "default": True})
    return found


__all__ = ["KNOWN_COMMIT", "REQUIRED_NAMES", "CheckResult", "Mismatch", "check", "contract", "take"]
