"""OneTrainer's model settings -> `model`."""

from __future__ import annotations

from typing import Any, Literal

from onewan.importing.table import OMIT, Condition, Context, Row, copied
from onewan.onetrainer.settings import SettingError

_IS_WAN = Condition(lambda c: c.is_wan, "a file of another model")


def experts(context: Context) -> Literal["both", "high", "low"]:
    """The experts that are trained; "both" where there is only one."""
    high, low = _trained(context)
    if context["training_method"] == "EMBEDDING" or high == low or not context.has_two_experts:
        return "both"
    return "high" if high else "low"


def _trained(context: Context) -> tuple[bool, bool]:
    """Whether the high-noise and the low-noise expert train."""
    low = context["transformer_2.train"] and context["transformer_2.include"]
    return bool(context["transformer.train"]), bool(low)


def _variant(_: Any, context: Context) -> str:
    return context.variant.name


def _base_model(value: Any, context: Context) -> str:
    if context.is_wan:
        return context.resolved_if_local(value)
    variant = context.variant
    context.notice(
        "model_type",
        f"is {context['model_type']}; the run file trains {variant.title} from "
        f"{variant.repository} instead",
    )
    return variant.repository


def _override(value: Any, context: Context) -> Any:
    return context.resolved_if_local(value) if value else OMIT


def _experts(_: Any, context: Context) -> Any:
    if context["training_method"] != "EMBEDDING" and not any(_trained(context)):
        raise SettingError("is off, and so is transformer_2.train; turn one of them on")
    chosen = experts(context)
    return OMIT if chosen == "both" else chosen


def _dtype(value: Any, context: Context) -> Any:
    if value == "FLOAT_32":
        return "float32"
    if value not in ("BFLOAT_16", "FLOAT_16"):
        raise SettingError(f"is {value}; only FLOAT_32 and BFLOAT_16 can be imported")
    if value == "FLOAT_16" and context.is_given("train_dtype"):
        context.notice("train_dtype", "is FLOAT_16, in which Wan overflows; bfloat16 is used")
    return OMIT


def _device(value: Any, context: Context) -> Any:
    # OneTrainer's default is the device of the machine that wrote the config, so it says nothing.
    return str(value) if context.is_given("train_device") and value != "cuda" else OMIT


ROWS = (
    Row("model_type", "model.variant", None, _variant),
    Row(
        "base_model_name", "model.path", "stable-diffusion-v1-5/stable-diffusion-v1-5", _base_model
    ),
    Row("transformer.model_name", "model.transformer", "", _override, _IS_WAN),
    Row("transformer_2.model_name", "model.transformer_2", "", _override, _IS_WAN),
    Row("vae.model_name", "model.vae", "", _override, _IS_WAN),
    Row("transformer.train", "model.experts", True, _experts),
    Row("transformer_2.train", "model.experts", True),
    Row("transformer_2.include", "model.experts", True),
    Row("train_dtype", "model.dtype", "FLOAT_16", _dtype),
    Row("train_device", "model.device", "cpu", _device),
    Row("wan_boundary", "model.boundary", None, copied()),
)
