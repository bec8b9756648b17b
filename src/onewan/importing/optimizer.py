"""OneTrainer's optimizer and learning rates -> `optimizer` and `per_expert.low.lr`."""

from __future__ import annotations

import math
from typing import Any

from onewan.documents import format_value
from onewan.importing.table import OMIT, Condition, Context, Row, copied

_OPTIMIZERS = {
    "ADAMW": ("adamw", "beta1 beta2 eps weight_decay"),
    "ADAMW_8BIT": ("adamw_8bit", "beta1 beta2 eps weight_decay is_paged"),
    "SCHEDULE_FREE_ADAMW": ("adamw_schedule_free", "beta1 beta2 eps weight_decay"),
    "ADAFACTOR": ("adafactor", "decay_rate clip_threshold scale_parameter weight_decay"),
    "PRODIGY": (
        "prodigy",
        "beta1 beta2 eps weight_decay d0 d_coef safeguard_warmup use_bias_correction",
    ),
    "PRODIGY_PLUS_SCHEDULE_FREE": (
        "prodigy_plus_schedule_free",
        "beta1 beta2 weight_decay d0 d_coef factored",
    ),
    "LION": ("lion", "beta1 beta2 weight_decay"),
    "MUON": ("muon", "momentum nesterov ns_steps weight_decay"),
    "CAME": ("came", "beta1 beta2 beta3 weight_decay clip_threshold"),
    "SGD": ("sgd", "momentum nesterov weight_decay"),
}
"""onewan's name, and OneTrainer's keys of the settings that onewan takes."""


def _counterpart(context: Context) -> tuple[str, list[str]]:
    """onewan's name, and OneTrainer's keys of its settings; AdamW for an unknown optimizer."""
    name, keys = _OPTIMIZERS.get(str(context["optimizer.optimizer"]), _OPTIMIZERS["ADAMW"])
    return name, keys.split()


def _name(value: Any, context: Context) -> str:
    name, _ = _counterpart(context)
    if value not in _OPTIMIZERS:
        context.notice(
            f"is {format_value(value)}, which onewan does not import; {name} is used, so check "
            "optimizer.lr"
        )
    return name


def _betas(_: Any, context: Context) -> Any:
    keys = [key for key in _counterpart(context)[1] if key.startswith("beta")]
    betas = [context[f"optimizer.{key}"] for key in keys]
    return OMIT if None in betas else betas


def _setting(key: str, field: str, default: Any = None) -> Row:
    """The row of a setting that some optimizers have; `betas` is a field of three keys."""
    convert = {"beta1": _betas, "beta2": None, "beta3": None}.get(key, copied())
    is_taken = Condition(
        lambda context: key in _counterpart(context)[1], "not a setting of this optimizer in onewan"
    )
    return Row(f"optimizer.{key}", f"optimizer.{field}", default, convert, is_taken)


def _rate(part: str, context: Context) -> float:
    """OneTrainer multiplies the learning rate by the square root of what the scaler names."""
    own, scaler = context[f"{part}.learning_rate"], str(context["learning_rate_scaler"])
    batch, accumulation = context["batch_size"], context["gradient_accumulation_steps"]
    factor = {"BATCH": batch, "GLOBAL_BATCH": batch, "GRADIENT_ACCUMULATION": accumulation}.get(
        scaler, batch * accumulation if "BOTH" in scaler else 1
    )
    return float(context["learning_rate"] if own is None else own) * math.sqrt(factor)


def _low_rate(_: Any, context: Context) -> Any:
    rate = _rate("transformer_2", context)
    return OMIT if rate == _rate("transformer", context) else rate


_HAS_TWO_EXPERTS = Condition(lambda c: c.has_two_experts, "the model has one expert")

ROWS = (
    Row("optimizer.optimizer", "optimizer.name", "ADAMW", _name),
    _setting("eps", "eps"),
    _setting("weight_decay", "weight_decay"),
    _setting("is_paged", "paged", False),
    _setting("decay_rate", "decay_rate"),
    _setting("clip_threshold", "clip_threshold"),
    _setting("scale_parameter", "scale_parameter", False),
    _setting("d0", "d0"),
    _setting("d_coef", "d_coef"),
    _setting("safeguard_warmup", "safeguard_warmup", False),
    _setting("use_bias_correction", "bias_correction", False),
    _setting("factored", "factored", True),
    _setting("momentum", "momentum"),
    _setting("nesterov", "nesterov", False),
    _setting("ns_steps", "ns_steps"),
    _setting("beta1", "betas"),
    _setting("beta2", "betas"),
    _setting("beta3", "betas"),
    Row("learning_rate", "optimizer.lr", 3e-6, lambda _, c: _rate("transformer", c)),
    Row("transformer.learning_rate", "optimizer.lr", None),
    Row("transformer_2.learning_rate", "per_expert.low.lr", None, _low_rate, _HAS_TWO_EXPERTS),
    Row("learning_rate_scaler", "optimizer.lr", "NONE"),
)
