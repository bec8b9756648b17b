"""OneTrainer's config, concepts and samples -> a run file, with an account of every key.

A key is carried (to a field of the run file), left at its default, not applicable (and why), or
unknown. Nothing is dropped without a word. What both mean is told by `onewan.onetrainer.settings`,
which the add-on trains by, so a run in OneTrainer and the imported one draw and count alike.
Secrets are neither read nor told.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

from onewan.config.schema import TrainSection, WanTrainConfig
from onewan.config.section import Section
from onewan.errors import ConfigError, OnewanError
from onewan.media import IMAGE_SUFFIXES, extension
from onewan.onetrainer import key_table, settings
from onewan.onetrainer.versions import LATEST, brought_up_to_date
from onewan.arithmetic.timestep_density import density_of
from onewan.variants import VARIANTS, Variant, VariantName

Outcome = Literal["carried", "defaulted", "not applicable", "unknown"]

SECRET = ("secrets", "huggingface_token", "cloud")
"""Keys that are neither read nor shown."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What became of one key."""

    key: str
    """Dotted, such as ``transformer.learning_rate`` or ``concepts.0.path``."""
    value: Any
    outcome: Outcome
    note: str = ""
    """The field of the run file, or why there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A run file, and how it came about."""

    document: dict[str, Any]
    entries: tuple[Entry, ...]
    notices: tuple[str, ...]
    """What the user should look at."""


def looks_like_onetrainer(path: Path) -> bool:
    """Whether the file is a config of OneTrainer, and no run file."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError:
        return False
    return (
        isinstance(data, dict)
        and "model" not in data
        and bool({"training_method", "base_model_name", "model_type", "__version"} & data.keys())
    )


def import_config(
    path: Path, *, variant: VariantName | None = None, root: Path | None = None
) -> Imported:
    """The run file that the OneTrainer config `path` means.

    `variant` is needed where neither the base model's name nor its files tell it. Relative paths
    are relative to `root`, OneTrainer's folder; without it, to the nearest folder above `path` that
    is one, or else to the config's own. ConfigError with all that is wrong.
    """
    data = _json(path)
    if not isinstance(data, dict):
        raise ConfigError(str(path), ["is no OneTrainer config: not an object in braces"])
    preset = path.name.startswith("#")
    given = data if preset else brought_up_to_date(data)
    if (version := int(given.get("__version", LATEST))) > LATEST:
        raise ConfigError(
            str(path), [f"__version: is {version}, and up to {LATEST} is known; update onewan"]
        )
    return _Importer(path, given, variant, root or _root_of(path)).run()


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ConfigError(str(path), [f"is no JSON that can be read: {error}"]) from error
    except OSError as error:
        raise ConfigError(str(path), [f"can't be read ({error.strerror})"]) from error


def _root_of(path: Path) -> Path:
    for folder in path.resolve().parents:
        if (folder / "modules" / "util" / "enum" / "ModelType.py").is_file():
            return folder
    return path.resolve().parent


@lru_cache(maxsize=1)
def _defaults() -> dict[str, Any]:
    text = files("onewan.onetrainer").joinpath("defaults.json").read_text(encoding="utf-8")
    return json.loads(text)


# ------------------------------------------------------------------------------------ the importer


@dataclass
class _Importer:
    """One import. Keys are taken by `get`, which notes where they go; what nobody took is accounted
    for at the end."""

    path: Path
    given: dict[str, Any]
    asked: VariantName | None
    root: Path
    out: dict[str, Any] = field(default_factory=dict)
    taken: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def run(self) -> Imported:
        self.config = _merged(_defaults()["train"], self.given)
        self.concepts = self._listed("concepts", "concept_file_name", "concept")
        self.samples = self._listed("samples", "sample_definition_file_name", "sample")
        self._finite()
        self._model()
        self._faults()
        self._data()
        self._method()
        self._optimizer()
        self._training()
        self._validation()
        self._samples()
        self._output()
        if self.problems:
            raise ConfigError(str(self.path), self.problems)
        return Imported(
            document=self.out,
            entries=tuple(self._account()),
            notices=tuple(dict.fromkeys(self.notices)),
        )

    # ----------------------------------------------------------------------------- reading

    def get(self, key: str, to: str) -> Any:
        """The value of a dotted key, which becomes, or has a part in, the field `to`."""
        self.taken[key] = to
        node: Any = self.config
        for part in key.split("."):
            node = node[int(part)] if isinstance(node, list) else node.get(part)
        return node

    def put(self, place: str, value: Any) -> None:
        """Set a field of the run file."""
        node = self.out
        *above, last = place.split(".")
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value

    def carry(self, key: str, place: str, default: Any = None) -> Any:
        """Take `key` to the field `place`, unless its value is what the field has anyway."""
        value = self.get(key, place)
        if value is not None and value != default:
            self.put(place, value)
        return value

    def _listed(self, inline: str, file_key: str, kind: str) -> list[dict[str, Any]]:
        """Concepts or samples: those in the config, or those of the file that it names."""
        found = self.config.get(inline)
        if found is None:
            named = self.config.get(file_key)
            file = self._resolved(named)
            default = _defaults()["train"][file_key]
            if not file.is_file():
                if self.given.get(file_key) not in (None, default):
                    self.problems.append(
                        f"{file_key}: is {named!r}, and {file} is not there; copy it there, or "
                        f"give "
                        "OneTrainer's folder by --root"
                    )
                else:
                    self.notices.append(f"no {inline}: {file} is not there")
                found = []
            else:
                found = _json(file)
            self.taken[file_key] = f"read: {file}"
        else:
            self.taken[file_key] = f"not read, since the config has {inline} itself"
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            self.problems.append(f"{inline}: is no list of objects")
            found = []
        merged = [_merged(_defaults()[kind], item) for item in found]
        self.config[inline] = merged
        self.given = {**self.given, inline: found}
        return merged

    def _resolved(self, value: Any) -> Path:
        path = Path(str(value).replace("\\", "/") if not Path(str(value)).exists() else str(value))
        return path if path.is_absolute() else (self.root / path)

    def _faults(self) -> None:
        """What can be followed neither there nor here, in the add-on's words."""
        told = list(settings.setting_errors(_namespace(self.config), self.variant))
        self.problems += [fault for fault in told if fault.startswith(key_table.SHARED)]
        if not self.problems:
            train = settings.train_section(_namespace(self.config))
            density = density_of(train.timesteps, self.variant.flow_shift)
            for expert in self.variant.selected(self.out["model"].get("experts", "both")):
                if not density.mass(expert):
                    self.problems.append(
                        f"max_noising_strength: is {self.config['max_noising_strength']}, "
                        f"min_noising_strength {self.config['min_noising_strength']} and "
                        f"timestep_shift "
                        f"{self.config['timestep_shift']}, which leaves the {expert.name} expert "
                        f"no noise "
                        f"level ({expert.t_min:g} to {expert.t_max:g}); change them, or turn off "
                        f"the "
                        "training of that transformer"
                    )

    def _finite(self) -> None:
        for key, value in _flat(self.given):
            if isinstance(value, float) and not math.isfinite(value):
                self.problems.append(f"{key}: is {value}; give a finite number")

    # ------------------------------------------------------------------------------- model

    def _model(self) -> None:
        base = str(self.get("base_model_name", "model.path"))
        is_wan = self.config["model_type"] == "WAN_2_2"
        self.taken["model_type"] = "model.variant"
        self.variant = self._variant(base)
        self.put("model.variant", self.variant.name)
        local = self._resolved(base)
        if not is_wan and self.config["model_type"]:
            base = self.variant.repository
            self.notices.append(
                f"model_type: is {self.config['model_type']}; the run file trains "
                f"{self.variant.title} "
                f"from {base}"
            )
        self.put("model.path", str(local) if is_wan and local.exists() else base)
        for part, place in (
            ("transformer", "transformer"),
            ("transformer_2", "transformer_2"),
            ("vae", "vae"),
        ):
            override = self.get(f"{part}.model_name", f"model.{place}")
            if override and is_wan:
                there = self._resolved(override)
                self.put(f"model.{place}", str(there) if there.exists() else override)
        high = bool(self.get("transformer.train", "model.experts"))
        low = bool(self.get("transformer_2.train", "model.experts")) and bool(
            self.get("transformer_2.include", "model.experts")
        )
        method = self.config["training_method"]
        if len(self.variant.experts) > 1 and method != "EMBEDDING" and high != low:
            self.put("model.experts", "high" if high else "low")
        elif method != "EMBEDDING" and not (high or low):
            self.problems.append(
                "transformer.train: is off, and so is transformer_2.train; turn one of them on"
            )
        dtype = self.get("train_dtype", "model.dtype")
        if dtype == "FLOAT_32":
            self.put("model.dtype", "float32")
        elif dtype not in ("BFLOAT_16", "FLOAT_16"):
            self.problems.append(f"train_dtype: is {dtype}; FLOAT_32 and BFLOAT_16 can be carried")
        elif dtype == "FLOAT_16" and "train_dtype" in self.given:
            self.notices.append(
                "train_dtype: is FLOAT_16, in which Wan overflows; bfloat16 is used"
            )
        device = str(self.get("train_device", "model.device"))
        if "train_device" in self.given and device != "cuda":
            self.put("model.device", device)
        self.carry("wan_boundary", "model.boundary")

    def _variant(self, base: str) -> Variant:
        if self.asked is not None:
            return VARIANTS[self.asked]
        if self.config["model_type"] == "WAN_2_2":
            plain = re.sub(r"[^a-z0-9]", "", base.lower())
            for name, variant in VARIANTS.items():
                if name.replace("-", "") in plain:
                    return variant
            if (found := _variant_in(self._resolved(base))) is not None:
                return found
        raise ConfigError(
            str(self.path),
            [
                f"base_model_name: is {base!r}, which does not tell the variant of Wan 2.2; give "
                f"it "
                f"by --variant {', '.join(VARIANTS)}"
            ],
        )

    # -------------------------------------------------------------------------------- data

    def _data(self) -> None:
        namespace = _namespace(self.config)
        wan: dict[str, str] = {
            "frames": "wan_config.max_frames",
            "wan_frame_strategy": "wan_config.frame_sample_strategy",
            "wan_temporal_consistency_weight": "wan_config.temporal_consistency_weight",
            "wan_layers": "wan_config.transformer_layers_to_train",
            "wan_use_temporal_attention": "wan_config.use_temporal_attention",
        }
        self.taken |= wan
        self._section(
            "wan_config",
            lambda: settings.wan_config(namespace),
            WanTrainConfig,
            keep=("max_frames",),
        )
        self.carry("wan_target_fps", "video_data.target_fps")
        self.carry("wan_max_duration", "video_data.max_duration", 10.0)
        self.carry("masked_training", "video_data.masks", False)
        self.carry("latent_caching", "video_data.cache", True)
        self.put(
            "video_data.cache_dir",
            str(self._resolved(self.get("cache_dir", "video_data.cache_dir"))),
        )
        self.put("video_data.min_resolution", list(settings.MIN_RESOLUTION))
        self.put("video_data.max_resolution", list(settings.MAX_RESOLUTION))
        self.put("video_data.supported_formats", list(settings.VIDEO_FORMATS))
        self.taken |= dict.fromkeys(
            ("resolution", "aspect_ratio_bucketing"), "video_data.resolution"
        )
        if not any(problem.startswith("resolution:") for problem in self.problems):
            sizes = settings.resolutions_of(
                self.config["resolution"],
                self.config["aspect_ratio_bucketing"],
                self.variant.size_multiple,
            )
            self.put("video_data.resolution", list(sizes))
        training, held = [], []
        self.clips = 0
        for number, concept in enumerate(self.concepts):
            source = self._source(number, concept)
            if source is None:
                continue
            (held if concept["type"] == "VALIDATION" else training).append(source)
        self.put("video_data.sources", training)
        self.held = held

    def _source(self, number: int, concept: dict[str, Any]) -> dict[str, Any] | None:
        here = f"concepts.{number}"
        is_held = concept["type"] == "VALIDATION"
        place = "validation.sources" if is_held else "video_data.sources"
        if not self.get(f"{here}.enabled", place):
            return None
        folder = self._resolved(self.get(f"{here}.path", place))
        source: dict[str, Any] = {"path": str(folder)}
        kind = self.get(f"{here}.type", f"{place}, target")
        if kind == "PRIOR_PREDICTION":
            source["target"] = "base"
        weight = self.get(f"{here}.loss_weight", f"{place}, loss_weight")
        if weight != 1:
            source["loss_weight"] = weight
        count = _clips_in(folder, bool(self.get(f"{here}.include_subdirectories", place)))
        if count is None:
            self.notices.append(f"{here}.path: {folder} is not there, so its clips are not counted")
        elif _clips_in(folder, True) != count:
            self.notices.append(
                f"{here}.include_subdirectories: is off, and {folder} has clips in folders below, "
                "which onewan takes too; move them away"
            )
        repeats = self._repeats(here, concept, count or 0, place)
        if repeats > 1:
            source["repeats"] = repeats
        if not is_held:
            self.clips += (count or 0) * repeats
        for switch, value in {**concept["image"], **concept["text"]}.items():
            if switch.startswith("enable_") and value is True and switch != "enable_crop_jitter":
                self.notices.append(f"{here}: {switch} is on, which onewan does not do")
        if concept["text"]["prompt_source"] != "sample":
            self.notices.append(
                f"{here}.text.prompt_source: is {concept['text']['prompt_source']!r}; onewan reads "
                "the caption beside each file, NAME.txt"
            )
        return source

    def _repeats(self, here: str, concept: dict[str, Any], count: int, place: str) -> int:
        balancing = float(self.get(f"{here}.balancing", f"{place}, repeats"))
        strategy = self.get(f"{here}.balancing_strategy", f"{place}, repeats")
        exact = balancing / count if strategy == "SAMPLES" and count else balancing
        if strategy == "SAMPLES" and not count:
            exact = 1.0
        repeats = max(1, round(exact))
        if repeats != exact:
            self.notices.append(
                f"{here}.balancing: {concept['balancing']:g} ({strategy}) is {exact:g} times each "
                f"clip; onewan repeats whole times, so {repeats}"
            )
        return repeats

    # ------------------------------------------------------------------------------ method

    def _method(self) -> None:
        method = self.get("training_method", "method.kind")
        if method == "FINE_TUNE":
            self.put("method.kind", "fine_tune")
            self._modules({"": "all"})
            if self.get("transformer.weight_dtype", "method.weights") == "FLOAT_32":
                self.put("method.weights", "float32")
        elif method == "EMBEDDING":
            self.put("method.kind", "embedding")
        elif method == "LORA":
            self._adapter()
        else:
            self.problems.append(
                f"training_method: is {method}; LORA, FINE_TUNE and EMBEDDING can be carried"
            )
        if method == "EMBEDDING":
            self._embedding("embedding", self.config["embedding"])
        for number, extra in enumerate(self.config.get("additional_embeddings") or []):
            self.config["additional_embeddings"][number] = _merged(_defaults()["embedding"], extra)
            self._embedding(f"additional_embeddings.{number}", extra)

    def _adapter(self) -> None:
        peft = self.get("peft_type", "method.kind")
        kind = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr", "OFT_2": "oft"}.get(peft)
        if kind is None:
            self.problems.append(f"peft_type: is {peft}; LORA, LOHA, LOKR and OFT_2 can be carried")
            return
        if kind == "lora" and self.get("lora_decompose", "method.kind"):
            kind = "dora"
        self.put("method.kind", kind)
        if kind == "oft":
            self.put("method.block_size", self.get("oft_block_size", "method.block_size"))
        else:
            rank_key = "lokr_dim" if kind == "lokr" else "lora_rank"
            self.put("method.rank", int(self.get(rank_key, "method.rank")))
            self.put("method.alpha", float(self.get("lora_alpha", "method.alpha")))
        if kind == "lokr":
            self.carry("lokr_decompose_factor", "method.factor", -1)
            self.carry("lokr_decompose_both", "method.decompose_both", False)
        if kind in ("lora", "dora"):
            self.carry("dropout_probability", "method.dropout", 0.0)
        self._modules({"": "all_linears", "blocks": "blocks.*"})
        start = self.get("lora_model_name", "method.init_from")
        if start:
            self.put("method.init_from", [str(self._resolved(start))])
        if len(self.variant.experts) > 1 and kind != "oft":
            self.carry("wan_low_lora_rank", "per_expert.low.rank")
            self.carry("wan_low_lora_alpha", "per_expert.low.alpha")

    def _modules(self, special: Mapping[str, str]) -> None:
        """OneTrainer's filters are parts of names; onewan's are groups and patterns."""
        text = str(self.get("layer_filter", "method.modules"))
        if self.get("layer_filter_regex", "method.modules") and text.strip():
            self.notices.append(
                f"layer_filter: {text!r} is a regular expression; onewan takes groups and "
                f"patterns, "
                "so all layers are trained; set method.modules"
            )
            text = ""
        chosen: list[str] = []
        for part in text.split(","):
            name = part.strip()
            chosen.append(special.get(name) or key_table.LAYERS.get(name) or f"*{name}*")
        self.put("method.modules", chosen)

    def _embedding(self, key: str, config: dict[str, Any]) -> None:
        section: dict[str, Any] = {}
        for theirs, ours, default in (
            ("placeholder", "placeholder", None),
            ("token_count", "token_count", None),
            ("initial_embedding_text", "initial_text", "*"),
            ("is_output_embedding", "is_output_embedding", False),
        ):
            value = self.get(f"{key}.{theirs}", f"embeddings, {ours}")
            if value is not None and value != default:
                section[ours] = value
        name = self.get(f"{key}.model_name", "embeddings, init_from")
        if name:
            section["init_from"] = str(self._resolved(name))
            section.pop("initial_text", None)
            section.pop("token_count", None)
        if not self.get(f"{key}.train", "embeddings, train") and key != "embedding":
            section["train"] = False
        rate = self.get("embedding_learning_rate", "embeddings, lr")
        if rate is not None:
            section["lr"] = rate
        self.out.setdefault("embeddings", []).append(section)

    # --------------------------------------------------------------------------- optimizer

    def _optimizer(self) -> None:
        chosen = str(self.get("optimizer.optimizer", "optimizer.name"))
        if chosen not in key_table.OPTIMIZERS:
            nearest = key_table.NEAREST.get(chosen, "ADAMW")
            self.notices.append(
                f"optimizer.optimizer: is {chosen}, which onewan does not have; "
                f"{key_table.OPTIMIZERS[nearest][0]} is the nearest and is used"
            )
            chosen = nearest
        name, fields = key_table.OPTIMIZERS[chosen]
        self.put("optimizer.name", name)
        held = self.config["optimizer"]
        for theirs, ours in fields.items():
            value = self.get(f"optimizer.{theirs}", f"optimizer.{ours}")
            if value is not None:
                self.put(f"optimizer.{ours}", value)
        if name in key_table.BETAS:
            betas = [f"beta{i + 1}" for i in range(key_table.BETAS[name])]
            if all(held.get(beta) is not None for beta in betas):
                self.put(
                    "optimizer.betas",
                    [self.get(f"optimizer.{beta}", "optimizer.betas") for beta in betas],
                )
        base = self.get("learning_rate", "optimizer.lr")
        high = self.get("transformer.learning_rate", "optimizer.lr")
        low = self.get("transformer_2.learning_rate", "per_expert.low.lr")
        scale = self._rate_scale()
        self.put("optimizer.lr", float(base if high is None else high) * scale)
        if len(self.variant.experts) > 1 and (base if low is None else low) != (
            base if high is None else high
        ):
            self.put("per_expert.low.lr", float(base if low is None else low) * scale)

    def _rate_scale(self) -> float:
        """What the learning rate was multiplied with: a root of the batch."""
        scaler = self.get("learning_rate_scaler", "optimizer.lr")
        batch, steps = self.config["batch_size"], self.config["gradient_accumulation_steps"]
        factors = {"BATCH": batch, "GLOBAL_BATCH": batch, "GRADIENT_ACCUMULATION": steps}
        factor = factors.get(scaler, batch * steps if "BOTH" in str(scaler) else 1)
        return math.sqrt(factor)

    # ---------------------------------------------------------------------------- training

    def _training(self) -> None:
        config = self.config
        self.carry("batch_size", "train.batch_size", 1)
        accumulation = int(self.carry("gradient_accumulation_steps", "train.accumulation", 1))
        self.per_epoch = max(1, self.clips // (config["batch_size"] * accumulation))
        epochs = int(self.get("epochs", "train.steps"))
        if self.clips:
            self.put("train.steps", epochs * self.per_epoch)
        else:
            self.notices.append(
                f"epochs: is {epochs}, and without clips to count the steps are not known; set "
                "train.steps"
            )
        self._schedule(epochs * self.per_epoch if self.clips else None)
        limit = self.get("clip_grad_norm", "train.max_grad_norm")
        if limit != 1.0:
            self.put("train.max_grad_norm", limit or None)
        self.carry("text_encoder.dropout_probability", "train.caption_dropout", 0.0)
        self._objective()
        if self.get("ema", "train.ema") != "OFF":
            self.put("train.ema.decay", self.get("ema_decay", "train.ema.decay"))
            if config["ema"] == "GPU":
                self.put("train.ema.offload", False)
        checkpointing = self.get(
            "transformer.gradient_checkpointing", "memory.gradient_checkpointing"
        )
        self.taken["transformer_2.gradient_checkpointing"] = "memory.gradient_checkpointing"
        if not checkpointing:
            self.put("memory.gradient_checkpointing", False)
        self.carry("tensorboard", "logging.tensorboard", True)
        saved = self._every("backup_after", "train.save_every")
        if isinstance(saved, float):
            self.put("train.save_every_minutes", saved)
        elif saved:
            self.put("train.save_every", saved)
        self.carry("rolling_backup_count", "train.keep_last", 2)

    def _schedule(self, total: int | None) -> None:
        chosen = self.get("learning_rate_scheduler", "train.schedule")
        kind = key_table.SCHEDULES.get(str(chosen))
        if kind is None:
            self.notices.append(
                f"learning_rate_scheduler: is {chosen}, which onewan does not have; constant is "
                f"used"
            )
            kind = "constant"
        schedule: dict[str, Any] = {"kind": kind}
        end = float(self.get("learning_rate_min_factor", "train.schedule.end_factor"))
        if end and kind != "constant":
            schedule["end_factor"] = end
        cycles = float(self.get("learning_rate_cycles", "train.schedule.cycles"))
        if kind == "cosine_with_restarts":
            schedule["cycles"] = max(1, round(cycles))
        if kind != "constant":
            self.put("train.schedule", schedule)
        warmup = float(self.get("learning_rate_warmup_steps", "train.warmup_steps"))
        experts = 2 if len(self.variant.experts) > 1 and "experts" not in self.out["model"] else 1
        # Of the run there, of each expert here; and a share of it, if it is at most 1.
        steps = (
            warmup * (total or 0)
            if 0 < warmup <= 1
            else warmup / self.config["gradient_accumulation_steps"]
        )
        own = round(steps / experts)
        if total is not None and own * experts >= total:
            self.notices.append(
                f"learning_rate_warmup_steps: {warmup:g} are not fewer than the {total} steps of "
                f"the "
                "run; there is no warm-up"
            )
            own = 0
        if own:
            self.put("train.warmup_steps", own)

    def _objective(self) -> None:
        namespace = _namespace(self.config)
        places = {
            "timestep_distribution": "train.timesteps",
            "noising_weight": "train.timesteps",
            "noising_bias": "train.timesteps",
            "min_noising_strength": "train.timesteps",
            "max_noising_strength": "train.timesteps",
            "timestep_shift": "train.timesteps.shift",
            "dynamic_timestep_shifting": "train.timesteps.shift_by_tokens",
            "loss_weight_fn": "train.loss.weighting",
            "loss_weight_strength": "train.loss.weighting",
            "unmasked_weight": "train.loss.unmasked_weight",
            "wan_high_share": "train.high_expert_share",
            "wan_expert_block": "train.switch_expert_every",
            "wan_first_frame_probability": "train.first_frame_probability",
            "offset_noise_weight": "train.noise_offset",
            "perturbation_noise_weight": "train.input_perturbation",
            "mse_strength": "train.loss.kind",
            "huber_strength": "train.loss.kind",
            "huber_delta": "train.loss.delta",
            "mae_strength": "train.loss.kind",
            "log_cosh_strength": "train.loss.kind",
        }
        self.taken |= places
        self._section(
            "train",
            lambda: settings.train_section(namespace),
            TrainSection,
            leave=("batch_size", "accumulation", "seed"),
        )
        config = self.config
        strengths = {k: config[f"{k}_strength"] for k in ("mse", "huber", "mae", "log_cosh")}
        used = [kind for kind, strength in strengths.items() if strength]
        if used == ["huber"]:
            self.put("train.loss.kind", "huber")
            if config["huber_delta"] != 1:
                self.put("train.loss.delta", config["huber_delta"])
        elif used != ["mse"]:
            self.notices.append(
                f"losses: {', '.join(f'{k}_strength {strengths[k]:g}' for k in used) or 'none'}; "
                f"onewan "
                "takes one kind, mse or huber, and mse is used"
            )

    def _section(
        self,
        name: str,
        make: Any,
        kind: type[Section],
        *,
        keep: tuple[str, ...] = (),
        leave: tuple[str, ...] = (),
    ) -> None:
        """Put what differs from the run file's defaults."""
        try:
            section: Section = make()
        except (ValueError, OnewanError) as error:
            if not self.problems:  # else it is what was told already, in better words
                self.problems.append(f"{name}: {' '.join(str(error).split())}")
            return
        differing = section.model_dump(mode="json", exclude_defaults=True)
        differing |= {key: getattr(section, key) for key in keep}
        for key in kind.model_fields:
            if key in differing and key not in leave:
                self.put(f"{name}.{key}", _complete(section, key, differing[key]))

    # ------------------------------------------------------------- validation, samples, output

    def _validation(self) -> None:
        wanted = self.get("validation", "validation")
        every = self._every("validate_after", "validation.every")
        self.carry("wan_validation_levels", "validation.timesteps", 4)
        if not wanted:
            self.put("validation.clips", 0)
            return
        if self.held:
            self.put("validation.sources", self.held)
        if isinstance(every, int) and every:
            self.put("validation.every", every)

    def _samples(self) -> None:
        prompts: list[dict[str, Any]] = []
        common: dict[str, set[Any]] = {}
        for number, sample in enumerate(self.samples):
            here = f"samples.{number}"
            if not self.get(f"{here}.enabled", "sample.prompts"):
                continue
            prompt: dict[str, Any] = {"prompt": self.get(f"{here}.prompt", "sample.prompts")}
            negative = self.get(f"{here}.negative_prompt", "sample.prompts, negative_prompt")
            prompt["negative_prompt"] = negative or ""
            image = self.get(f"{here}.base_image_path", "sample.prompts, image")
            if image:
                prompt["image"] = str(self._resolved(image))
            if not self.get(f"{here}.random_seed", "sample.prompts, seed"):
                prompt["seed"] = self.get(f"{here}.seed", "sample.prompts, seed")
            prompts.append(prompt)
            for key, value in self._sampling(here, sample).items():
                common.setdefault(key, set()).add(value)
        self.put("sample.prompts", prompts)
        for key, values in common.items():
            chosen = sorted(values, key=str)[0]
            if len(values) > 1:
                self.notices.append(
                    f"samples: {key} differs between them "
                    f"({', '.join(map(str, sorted(values, key=str)))}); "
                    f"a run file has one for all, {chosen}"
                )
            self.put(f"sample.{key}", list(chosen) if isinstance(chosen, tuple) else chosen)
        every = self._every("sample_after", "sample.every")
        if isinstance(every, int) and every and prompts:
            self.put("sample.every", every)

    def _sampling(self, here: str, sample: dict[str, Any]) -> dict[str, Any]:
        multiple, temporal = self.variant.size_multiple, self.variant.temporal_compression
        sizes = {
            name: max(1, round(self.get(f"{here}.{name}", f"sample.{name}") / multiple)) * multiple
            for name in ("width", "height")
        }
        frames = (
            max(0, round((self.get(f"{here}.frames", "sample.frames") - 1) / temporal)) * temporal
            + 1
        )
        high = max(1.0, float(self.get(f"{here}.cfg_scale", "sample.guidance")))
        low = self.get(f"{here}.wan_low_cfg_scale", "sample.guidance")
        scales = (high, high if low is None else max(1.0, float(low)))
        found = {
            **sizes,
            "frames": frames,
            "steps": self.get(f"{here}.diffusion_steps", "sample.steps"),
            "guidance": scales[: len(self.variant.experts)],
        }
        fps = self.get(f"{here}.wan_fps", "sample.fps")
        if fps:
            found["fps"] = fps
        if self.get(f"{here}.wan_format", "sample.format") == "webm":
            found["format"] = "webm"
        return found

    def _every(self, key: str, place: str) -> int | float | None:
        """Steps, or minutes as a float where a clock is meant; None for never."""
        value, unit = self.get(key, place), self.get(f"{key}_unit", place)
        match str(unit):
            case "EPOCH":
                return max(1, round(value * self.per_epoch))
            case "STEP":
                return max(1, round(value / self.config["gradient_accumulation_steps"]))
            case "NEVER":
                return None
            case "ALWAYS":
                return 1
            case clock:
                minutes = float(value) * {"SECOND": 1 / 60, "MINUTE": 1, "HOUR": 60}[clock]
                if place != "train.save_every" and key in self.given:
                    self.notices.append(
                        f"{key}: {value:g} {clock.lower()}s; onewan counts steps, set {place}"
                    )
                return minutes

    def _output(self) -> None:
        workspace = self._resolved(self.get("workspace_dir", "output.dir"))
        self.put("output.dir", str(workspace))
        destination = Path(str(self.get("output_model_destination", "output.name")))
        name = re.sub(r'[/\\:*?"<>|]', "_", destination.stem).lstrip(".")
        if name:
            self.put("output.name", name)
        chosen = self.get("output_model_format", "output.formats")
        form = key_table.FORMATS.get(str(chosen))
        if form is None:
            self.notices.append(f"output_model_format: is {chosen}; comfyui is used")
            form = "comfyui"
        self.put("output.formats", [form])
        dtype = key_table.DTYPES.get(str(self.get("output_dtype", "output.dtype")))
        if dtype is not None and "output_dtype" in self.given:
            self.put("output.dtype", dtype)
        saved = self._every("save_every", "train.save_every")
        if isinstance(saved, int) and saved and self.config["save_every"]:
            self.put("train.save_every", saved)

    # ----------------------------------------------------------------------------- account

    def _account(self) -> Iterable[Entry]:
        """Every key that there is, given or not, once."""
        given = dict(_flat(self.given))
        known = dict(_flat(self.config))
        for key in sorted({*given, *known}):
            if key.split(".")[0] in SECRET:
                if key in given:
                    yield Entry(
                        key, None, "not applicable", "secrets and cloud settings are not carried"
                    )
                continue
            value = known.get(key, given.get(key))
            is_given = key in given
            if key in self.taken:
                yield Entry(key, value, "carried" if is_given else "defaulted", self.taken[key])
            elif key in key_table.FORMER:
                yield Entry(
                    key, value, "not applicable", "of older versions; OneTrainer itself ignores it"
                )
            elif not self._is_known(key):
                yield Entry(key, value, "unknown", "no key of OneTrainer up to version 11")
            else:
                yield Entry(key, value, "not applicable" if is_given else "defaulted", _why(key))

    def _is_known(self, key: str) -> bool:
        parts = key.split(".")
        table: Any = {
            "concepts": _defaults()["concept"],
            "samples": _defaults()["sample"],
            "additional_embeddings": _defaults()["embedding"],
        }.get(parts[0], _defaults()["train"])
        if key in key_table.LISTS:
            return True
        if parts[0] in ("concepts", "samples", "additional_embeddings") and len(parts) > 1:
            parts = parts[2:]
        for part in parts:
            if not isinstance(table, dict) or part not in table:
                return parts[0] in ("optimizer_defaults", "concept_stats", "embeddings")
            table = table[part]
            if parts[0] in ("optimizer_defaults", "concept_stats"):
                return True
        return True


def _why(key: str) -> str:
    for pattern, reason in key_table.NOT_HERE:
        if re.fullmatch(pattern, key):
            return reason
    return "onewan has no such setting"


def _complete(section: Section, key: str, value: Any) -> Any:
    """A member of a union needs its kind, also where that is its default."""
    held = getattr(section, key)
    for tag in ("distribution", "kind"):
        if isinstance(held, Section) and tag in type(held).model_fields and isinstance(value, dict):
            value = {tag: getattr(held, tag), **value}
    if isinstance(held, Section) and isinstance(value, dict):
        value = {k: _complete(held, k, v) for k, v in value.items()}
    return value


def _merged(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` over `defaults`, mappings within each other too."""
    out = {**defaults}
    for key, value in given.items():
        held = out.get(key)
        out[key] = (
            _merged(cast("dict[str, Any]", held), cast("dict[str, Any]", value))
            if isinstance(held, dict) and isinstance(value, dict)
            else value
        )
    return out


def _namespace(config: Mapping[str, Any]) -> SimpleNamespace:
    """A config by attributes, as `settings` reads it."""
    return SimpleNamespace(
        **{
            k: _namespace(v) if isinstance(v, dict) and k.isidentifier() else v
            for k, v in config.items()
            if k.isidentifier()
        }
    )


def _flat(node: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(node, dict) and (node or not prefix):
        for key, value in cast("dict[str, Any]", node).items():
            yield from _flat(value, f"{prefix}{key}.")
    elif isinstance(node, list) and node:
        for number, value in enumerate(cast("list[Any]", node)):
            yield from _flat(value, f"{prefix}{number}.")
    else:
        yield prefix[:-1], node


def _clips_in(folder: Path, below: bool) -> int | None:
    if not folder.is_dir():
        return None
    found = folder.rglob("*") if below else folder.glob("*")
    kinds = {*settings.VIDEO_FORMATS, *IMAGE_SUFFIXES}
    return sum(
        p.is_file() and extension(p) in kinds and not settings.is_mask_file(str(p)) for p in found
    )


def _variant_in(folder: Path) -> Variant | None:
    """What the configuration of a local model says."""
    from onewan.variants import variant_of

    file = folder / "transformer" / "config.json"
    if not file.is_file():
        return None
    try:
        return variant_of(json.loads(file.read_text(encoding="utf-8")), str(file))
    except (ValueError, OnewanError):
        return None
