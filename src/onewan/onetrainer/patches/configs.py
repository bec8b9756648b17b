"""The add-on's fields in OneTrainer's configs; a config saves and shows what its tables name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from typing import Any, ClassVar

from onewan.onetrainer.patches.patch import NAME, Former, Patch, is_wan
from onewan.onetrainer.settings import SAMPLE_SIZE

CONFIG_VERSION = 11
"""The version of OneTrainer's config that the add-on was made for. No config of Wan is older, so
one without a version, such as a preset, has this one."""

_TYPES: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}


@lru_cache(maxsize=1)
def added_fields() -> Mapping[str, list[dict[str, Any]]]:
    """The fields of ``train`` and ``sample``: name, type, default (null: may be empty), and the
    label, tooltip and choices of the widget, the group that it stands in, when it has an effect
    (``only``), and what the field means where it is empty."""
    file = files("onewan.onetrainer.patches").joinpath("fields.json")
    return json.loads(file.read_text(encoding="utf-8"))


def _add_fields(config: Any, kind: str) -> Any:
    for field in added_fields()[kind]:
        default = field["default"]
        _add_field(config, field["name"], default, _TYPES[field["type"]], default is None)
    return config


def _add_field(config: Any, name: str, default: Any, kind: type, nullable: bool) -> None:
    setattr(config, name, default)
    config.types[name] = kind
    config.nullables[name] = nullable
    config.default_values[name] = default


class TrainConfigFields(Patch):
    """`transformer_2`, and the settings of Wan."""

    module = "modules.util.config.TrainConfig"
    uses: ClassVar[Mapping[str, tuple[str, ...]]] = {
        module: (
            "TrainConfig.default_values",
            "TrainConfig.weight_dtypes",
            "TrainConfig.model_names",
            "TrainModelPartConfig.default_values",
        ),
        "modules.util.config.BaseConfig": ("BaseConfig.from_dict",),
    }

    def apply(self) -> None:
        config_class = self._module.TrainConfig
        self._wrap(config_class, "default_values", self._default_values)
        self._wrap(config_class, "model_names", self._model_names)
        self._wrap(config_class, "weight_dtypes", self._weight_dtypes)
        self._wrap(config_class, "from_dict", self._from_dict)

    def _default_values(self, former: Former, *args: Any, **kwargs: Any) -> Any:
        config = former(*args, **kwargs)
        part = self._module.TrainModelPartConfig
        second = part.default_values()
        second.stop_training_after = 0  # as OneTrainer's first transformer has it
        _add_field(config, "transformer_2", second, part, False)
        return _add_fields(config, "train")

    def _from_dict(self, former: Former, config: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        # OneTrainer would migrate it from version 0, which fails.
        if data.get("model_type") == NAME:
            data = {"__version": CONFIG_VERSION, **data}
        return former(config, data, *args, **kwargs)

    def _model_names(self, former: Former, config: Any) -> Any:
        names = former(config)
        names.transformer_2_model = config.transformer_2.model_name
        names.include_transformer_2 = config.transformer_2.include
        names.wan_boundary = config.wan_boundary
        return names

    def _weight_dtypes(self, former: Former, config: Any) -> Any:
        dtypes = former(config)
        dtypes.transformer_2 = config.transformer_2.weight_dtype
        return dtypes


class SampleConfigFields(Patch):
    """Wan's sizes, and a frame rate, a second guidance scale and a format."""

    module = "modules.util.config.SampleConfig"
    uses: ClassVar[Mapping[str, tuple[str, ...]]] = {
        module: ("_get_model_defaults", "SampleConfig.default_values")
    }

    def apply(self) -> None:
        self._wrap(self._module, "_get_model_defaults", self._model_defaults)
        self._wrap(self._module.SampleConfig, "default_values", self._default_values)

    def _model_defaults(self, former: Former, model_type: Any) -> Any:
        if not is_wan(model_type):
            return former(model_type)
        width, height = SAMPLE_SIZE
        return {**former(None), "width": width, "height": height}

    def _default_values(self, former: Former, model_type: Any = None) -> Any:
        config = _add_fields(former(model_type), "sample")
        if is_wan(model_type):
            # Empty is the model's own: a sample is made before its variant is known.
            for name in ("frames", "diffusion_steps", "cfg_scale"):
                _add_field(config, name, None, config.types[name], True)
        return config
