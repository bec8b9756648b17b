"""OneTrainer's optimizer and learning rates -> `optimizer` and `per_expert.low.lr`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from onewan.importing.table import OMIT, Condition, Context, Row, copied

_OPTIMIZERS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "ADAMW": ("adamw", 2, ("eps", "weight_decay")),
    "ADAMW_8BIT": ("adamw_8bit", 2, ("eps", "weight_decay", "is_paged")),
    "SCHEDULE_FREE_ADAMW": ("adamw_schedule_free", 2, ("eps", "weight_decay")),
    "ADAFACTOR": (
        "adafactor",
        0,
        ("decay_rate", "clip_threshold", "scale_parameter", "weight_decay"),
    ),
    "PRODIGY": (
        "prodigy",
        2,
        ("eps", "weight_decay", "d0", "d_coef", "safeguard_warmup", "use_bias_correction"),
    ),
    "PRODIGY_PLUS_SCHEDULE_FREE": (
        "prodigy_plus_schedule_free",
        2,
        ("weight_decay", "d0", "d_coef", "factored"),
    ),
    "LION": ("lion", 2, ("weight_decay",)),
    "MUON": ("muon", 0, ("momentum", "nesterov", "ns_steps", "weight_decay")),
    "CAME": ("came", 3, ("weight_decay", "clip_threshold")),
    "SGD": ("sgd", 0, ("momentum", "nesterov", "weight_decay")),
}
"""onewan's name, the number of betas that it takes, and OneTrainer's keys of its other settings."""

_SETTINGS: tuple[tuple[str, str, Any], ...] = (
    ("eps", "eps", None),
    ("weight_decay", "weight_decay", None),
    ("is_paged", "paged", False),
    ("decay_rate", "decay_rate", None),
    ("clip_threshold", "clip_threshold", None),
    ("scale_parameter", "scale_parameter", False),
    ("d0", "d0", None),
    ("d_coef", "d_coef", None),
    ("safeguard_warmup", "safeguard_warmup", False),
    ("use_bias_correction", "bias_correction", False),
    ("factored", "factored", True),
    ("momentum", "momentum", None),
    ("nesterov", "nesterov", False),
    ("ns_steps", "ns_steps", None),
)
"""OneTrainer's key below ``optimizer``, onewan's field, OneTrainer's default."""


def _counterpart(context: Context) -> tuple[str, int, tuple[str, ...]]:
    return _OPTIMIZERS.get(str(context["optimizer.optimizer"]), _OPTIMIZERS["ADAMW"])


def _takes(holds: Callable[[Context], bool]) -> Condition:
    return Condition(holds, "not a setting of this optimizer in onewan")


def _name(value: Any, context: Context) -> str:
    name, _, _ = _counterpart(context)
    if value not in _OPTIMIZERS:
        context.notice(
            "optimizer.optimizer",
            f"is {value}, which onewan does not import; {name} is used, so check optimizer.lr",
        )
    return name


def _betas(_: Any, context: Context) -> Any:
    _, count, _ = _counterpart(context)
    betas = [context[f"optimizer.beta{number + 1}"] for number in range(count)]
    return betas if all(beta is not None for beta in betas) else OMIT


def _rate_scale(context: Context) -> float:
    """OneTrainer multiplies the learning rate by the square root of what the scaler names."""
    scaler = str(context["learning_rate_scaler"])
    batch, accumulation = context["batch_size"], context["gradient_accumulation_steps"]
    factor = {"BATCH": batch, "GLOBAL_BATCH": batch, "GRADIENT_ACCUMULATION": accumulation}.get(
        scaler, batch * accumulation if "BOTH" in scaler else 1
    )
    return math.sqrt(factor)


def _rate_of(part: str, context: Context) -> float:
    own = context[f"{part}.learning_rate"]
    return float(context["learning_rate"] if own is None else own)


def _rate(_: Any, context: Context) -> float:
    return _rate_of("transformer", context) * _rate_scale(context)


def _low_rate(_: Any, context: Context) -> Any:
    low = _rate_of("transformer_2", context)
    return OMIT if low == _rate_of("transformer", context) else low * _rate_scale(context)


ROWS = (
    Row("optimizer.optimizer", "optimizer.name", "ADAMW", _name),
    *(
        Row(
            f"optimizer.{theirs}",
            f"optimizer.{ours}",
            default,
            copied(),
            _takes(lambda context, theirs=theirs: theirs in _counterpart(context)[2]),
        )
        for theirs, ours, default in _SETTINGS
    ),
    Row(
        "optimizer.beta1", "optimizer.betas", None, _betas, _takes(lambda c: _counterpart(c)[1] > 0)
    ),
    Row("optimizer.beta2", "optimizer.betas", None, None, _takes(lambda c: _counterpart(c)[1] > 1)),
    Row("optimizer.beta3", "optimizer.betas", None, None, _takes(lambda c: _counterpart(c)[1] > 2)),
    Row("learning_rate", "optimizer.lr", 3e-6, _rate),
    Row("transformer.learning_rate", "optimizer.lr", None),
    Row(
        "transformer_2.learning_rate",
        "per_expert.low.lr",
        None,
        _low_rate,
        Condition(lambda c: c.has_two_experts, "the model has one expert"),
    ),
    Row("learning_rate_scaler", "optimizer.lr", "NONE"),
)
