"""The member `ModelType.WAN_2_2`, with its components, training methods and formats."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from onewan.onetrainer.patches.patch import NAME, Patch, is_wan

COMPONENTS = ("transformer", "transformer_2", "text_encoder", "vae")

_TRAINING_METHODS = ("FINE_TUNE", "LORA", "EMBEDDING")
_LORA_FORMATS = ("DIFFUSERS_LORA", "KOHYA_LORA", "ORIGINAL_LORA", "COMFY_LORA")
_MODEL_FORMATS = ("DIFFUSERS", "ORIGINAL_TRANSFORMER")


class ModelTypeMember(Patch):
    """An enum can't be extended by its own means; lookup, iteration, match and pickle use the
    tables that are changed here (measured with Python 3.10 to 3.13)."""

    module = "modules.util.enum.ModelType"
    uses: ClassVar[Mapping[str, tuple[str, ...]]] = {
        module: (
            "_MODEL_PARTS",
            "ModelType._member_names_",
            "ModelType._member_map_",
            "ModelType._value2member_map_",
            "ModelType.is_flow_matching",
            "ModelType.is_video_model",
            "ModelType.supported_training_methods",
            "ModelType.supported_lora_formats",
            "ModelType.supported_full_model_formats",
        ),
        "modules.util.enum.ModelFormat": tuple(
            f"ModelFormat.{name}" for name in (*_MODEL_FORMATS, *_LORA_FORMATS)
        ),
        "modules.util.enum.TrainingMethod": tuple(
            f"TrainingMethod.{name}" for name in _TRAINING_METHODS
        ),
    }

    def apply(self) -> None:
        model_type = self._module.ModelType
        member = object.__new__(model_type)
        member._name_ = member._value_ = NAME
        member.__objclass__ = model_type
        member._sort_order_ = len(model_type._member_names_)
        model_type._member_names_.append(NAME)
        self._undo.append(lambda: model_type._member_names_.remove(NAME))
        self._set_item(model_type._member_map_, NAME, member)
        self._set_item(model_type._value2member_map_, NAME, member)
        self._set(model_type, NAME, member)
        self._set(model_type, "is_wan", is_wan)
        self._set_item(self._module._MODEL_PARTS, member, COMPONENTS)
        for name, answer in _answers().items():
            self._wrap(model_type, name, _answering(answer))


def _answers() -> dict[str, Any]:
    """What the methods of `ModelType` return for Wan."""
    formats = importlib.import_module("modules.util.enum.ModelFormat").ModelFormat
    methods = importlib.import_module("modules.util.enum.TrainingMethod").TrainingMethod
    return {
        "is_flow_matching": True,
        "is_video_model": True,
        "supported_training_methods": tuple(getattr(methods, name) for name in _TRAINING_METHODS),
        "supported_lora_formats": [getattr(formats, name) for name in _LORA_FORMATS],
        "supported_full_model_formats": [getattr(formats, name) for name in _MODEL_FORMATS],
    }


def _answering(answer: Any) -> Callable[..., Any]:
    return lambda former, member: answer if is_wan(member) else former(member)
