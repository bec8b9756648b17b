"""OneTrainer's model settings -> `model`."""

from __future__ import annotations

from typing import Any, Literal

from onewan.documents import format_value
from onewan.importing.table import OMIT, Condition, Context, Row, copied
from onewan.onetrainer.settings import SettingError


def experts(context: Context) -> Literal["both", "high", "low"]:
    """The experts that are trained; "both" where there is only one."""
    high, low = _is_trained(context)
    if context["training_method"] == "EMBEDDING" or high == low or not context.has_two_experts:
        return "both"
    return "high" if high else "low"


def _is_trained(context: Context) -> tuple[bool, bool]:
    """For the high-noise and the low-noise expert."""
    low = context["transformer_2.train"] and context["transformer_2.include"]
    return bool(context["transformer.train"]), bool(low)


def _experts(_: Any, context: Context) -> Any:
    if context["training_method"] != "EMBEDDING" and not any(_is_trained(context)):
        raise SettingError("is off, and so is transformer_2.train; turn one of them on")
    chosen = experts(context)
    return OMIT if chosen == "both" else chosen


def _path_or_repository(value: Any, context: Context) -> Any:
    """The path if it exists, else the value, which may name a Hugging Face repository."""
    path = context.resolve(value)
    return (str(path) if path.exists() else str(value)) if value else OMIT


def _base_model(value: Any, context: Context) -> str:
    if _IS_WAN.holds(context):
        return _path_or_repository(value, context)
    kind, variant = context["model_type"], context.variant
    instead = f"the run file trains {variant.title} from {variant.repository} instead"
    context.notice(f"is {kind}; {instead}", "model_type")
    return variant.repository


def _dtype(value: Any, context: Context) -> Any:
    if value == "FLOAT_32":
        return "float32"
    if value not in ("BFLOAT_16", "FLOAT_16"):
        raise SettingError(f"is {format_value(value)}; only FLOAT_32 and BFLOAT_16 can be imported")
    if value == "FLOAT_16" and context.is_given():
        context.notice("is FLOAT_16, in which Wan overflows; bfloat16 is used")
    return OMIT


def _device(value: Any, context: Context) -> Any:
    # OneTrainer's default is the device of the machine that wrote the config, so it says nothing.
    return str(value) if context.is_given() and value != "cuda" else OMIT


_IS_WAN = Condition(lambda c: c["model_type"] == "WAN_2_2", "a file of another model")
_DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"

ROWS = (
    Row("model_type", "model.variant", None, lambda _, c: c.variant.name),
    Row("base_model_name", "model.path", _DEFAULT_MODEL, _base_model),
    Row("transformer.model_name", "model.transformer", "", _path_or_repository, _IS_WAN),
    Row("transformer_2.model_name", "model.transformer_2", "", _path_or_repository, _IS_WAN),
    Row("vae.model_name", "model.vae", "", _path_or_repository, _IS_WAN),
    Row("transformer.train", "model.experts", True, _experts),
    Row("transformer_2.train", "model.experts", True),
    Row("transformer_2.include", "model.experts", True),
    Row("train_dtype", "model.dtype", "FLOAT_16", _dtype),
    Row("train_device", "model.device", "cpu", _device),
    Row("wan_boundary", "model.boundary", None, copied()),
)
