"""OneTrainer's training loop, noise and loss settings -> `train`, `memory` and `logging`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from onewan.config.section import Section
from onewan.documents import format_value
from onewan.importing.model import experts
from onewan.importing.table import OMIT, Condition, Context, Row, copied, mapped, setting
from onewan.onetrainer import settings

_SCHEDULES = ("constant", "linear", "cosine", "cosine_with_restarts", "rex")
_LOSSES = ("mse", "huber", "mae", "log_cosh")


def _total_steps(context: Context) -> int | None:
    """None if the clips could not be counted."""
    return int(context["epochs"]) * context.steps_per_epoch if context.clips else None


def _steps(value: Any, context: Context) -> Any:
    if (total := _total_steps(context)) is not None:
        return total
    context.notice(f"is {value}, and without clips to count the steps are unknown; set train.steps")
    return OMIT


def _schedule(value: Any, context: Context) -> Any:
    kind = str(value).lower().replace("with_hard_restarts", "with_restarts")
    if kind not in _SCHEDULES:
        context.notice(f"is {format_value(value)}, which onewan does not have; constant is used")
    if kind not in _SCHEDULES[1:]:
        return OMIT
    schedule: dict[str, Any] = {"kind": kind}
    if end := float(context["learning_rate_min_factor"]):
        schedule["end_factor"] = end
    if kind == "cosine_with_restarts":
        schedule["cycles"] = max(1, round(float(context["learning_rate_cycles"])))
    return schedule


def _warmup(value: Any, context: Context) -> Any:
    """OneTrainer's warm-up is micro-batches of the run, or up to 1 a share of it; onewan's is
    optimizer steps of each expert."""
    warmup, total = float(value), _total_steps(context)
    count = 2 if context.has_two_experts and experts(context) == "both" else 1
    is_share = 0 < warmup <= 1
    exact = warmup * (total or 0) if is_share else warmup / context["gradient_accumulation_steps"]
    own = round(exact / count)  # each expert warms up over its own steps
    if total is not None and own * count >= total:
        context.notice(
            f"{warmup:g} is not less than the {total} steps of the run; there is no warm-up"
        )
        return OMIT
    return own or OMIT


def _timesteps(_: Any, context: Context) -> Any:
    if "min_noising_strength" in context.problems:
        return OMIT
    timesteps = settings.timesteps_of(context.settings)
    density = settings.density_of_timesteps(timesteps, context.variant)
    low, high = context["min_noising_strength"], context["max_noising_strength"]
    for expert in context.variant.selected(experts(context)):
        if not density.mass(expert):
            context.problem(
                "max_noising_strength",
                f"is {high}, min_noising_strength is {low} and timestep_shift is "
                f"{context['timestep_shift']}, so the {expert.name} expert draws no timestep "
                f"({expert.t_min:g} to {expert.t_max:g}); change them, or turn off the training of "
                "that transformer",
            )
    return _differing(timesteps, tag="distribution")


def _weighting(_: Any, context: Context) -> Any:
    chosen = _differing(settings.weighting_of(context.settings), tag="kind")
    return OMIT if chosen == {"kind": "none"} else chosen


def _differing(section: Section, tag: str) -> dict[str, Any]:
    """What differs from the run file's defaults, and always the tag that selects the section."""
    differing = section.model_dump(mode="json", exclude_defaults=True)
    return {tag: getattr(section, tag), **differing}


def _losses(context: Context) -> list[str]:
    return [kind for kind in _LOSSES if context[f"{kind}_strength"]]


def _loss(_: Any, context: Context) -> Any:
    used = _losses(context)
    if used == ["huber"]:
        return "huber"
    if used != ["mse"]:
        given = ", ".join(f"{kind}_strength {context[f'{kind}_strength']:g}" for kind in used)
        context.notices.append(
            f"losses: {given or 'none'}; onewan takes one kind, mse or huber, and mse is used"
        )
    return OMIT


def _delta(value: Any, context: Context) -> Any:
    return value if _losses(context) == ["huber"] and value != 1 else OMIT


def _shares(value: Any, context: Context) -> Any:
    if not str(value).strip():
        return OMIT
    shares = settings.condition_shares_of(context.settings, context.variant)
    return {given: share for given, share in asdict(shares).items() if share}


_EMA = Condition(lambda c: c["ema"] != "OFF", "ema is off")
_TAKES_IMAGE = Condition(lambda c: c.variant.takes_image, "the model is given no frames")
_FIXED_SHIFT = Condition(
    lambda c: not c["dynamic_timestep_shifting"], "dynamic_timestep_shifting is on"
)
_STRENGTHS = setting(settings.check_noising_strengths)  # `_timesteps` has the values
_HIGH_SHARE = setting(settings.high_share_of, "equal")

ROWS = (
    Row("batch_size", "train.batch_size", 1, copied(1), least=1),
    Row("gradient_accumulation_steps", "train.accumulation", 1, copied(1), least=1),
    Row("epochs", "train.steps", 100, _steps, least=1),
    Row("learning_rate_scheduler", "train.schedule", "CONSTANT", _schedule),
    Row("learning_rate_min_factor", "train.schedule.end_factor", 0.0),
    Row("learning_rate_cycles", "train.schedule.cycles", 1.0),
    Row("learning_rate_warmup_steps", "train.warmup_steps", 200.0, _warmup),
    # Both null and 0 turn clipping off in OneTrainer.
    Row("clip_grad_norm", "train.max_grad_norm", 1.0, lambda v, _: OMIT if v == 1 else v or None),
    Row("text_encoder.dropout_probability", "train.caption_dropout", 0.0, copied(0.0)),
    Row("min_noising_strength", "train.timesteps", 0.0, _STRENGTHS),
    Row("max_noising_strength", "train.timesteps", 1.0),
    Row("timestep_distribution", "train.timesteps", "UNIFORM", _timesteps),
    Row("noising_weight", "train.timesteps", 0.0),
    Row("noising_bias", "train.timesteps", 0.0),
    Row("timestep_shift", "train.timesteps.shift", 1.0, None, _FIXED_SHIFT),
    Row("dynamic_timestep_shifting", "train.timesteps.shift_by_tokens", False),
    Row("loss_weight_fn", "train.loss.weighting", "CONSTANT", _weighting),
    Row("loss_weight_strength", "train.loss.weighting", 5.0),
    Row("unmasked_weight", "train.loss.unmasked_weight", 0.1, copied(0.1)),
    Row("mse_strength", "train.loss.kind", 1.0, _loss),
    *(Row(f"{kind}_strength", "train.loss.kind", 0.0) for kind in _LOSSES[1:]),
    Row("huber_delta", "train.loss.delta", 1.0, _delta),
    Row("wan_high_share", "train.high_expert_share", "equal", _HIGH_SHARE),
    Row("wan_expert_block", "train.switch_expert_every", 10, copied(10)),
    Row("wan_condition_shares", "train.condition_shares", "", _shares, _TAKES_IMAGE),
    Row("offset_noise_weight", "train.noise_offset", 0.0, copied(0.0)),
    Row("perturbation_noise_weight", "train.input_perturbation", 0.0, copied(0.0)),
    Row("ema_decay", "train.ema.decay", 0.999, copied(), _EMA),
    Row("ema", "train.ema.offload", "OFF", mapped(GPU=False)),
    Row("transformer.gradient_checkpointing", "memory.gradient_checkpointing", True, copied(True)),
    Row("transformer_2.gradient_checkpointing", "memory.gradient_checkpointing", True),
    Row("tensorboard", "logging.tensorboard", True, copied(True)),
)
