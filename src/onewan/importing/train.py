"""OneTrainer's training loop, noise and loss settings -> `train`, `memory` and `logging`."""

from __future__ import annotations

from typing import Any

from onewan.config.section import Section
from onewan.importing.intervals import minutes, steps
from onewan.importing.model import experts
from onewan.importing.table import OMIT, Condition, Context, Row, copied
from onewan.onetrainer import settings

_SCHEDULES = {
    "CONSTANT": "constant",
    "LINEAR": "linear",
    "COSINE": "cosine",
    "COSINE_WITH_RESTARTS": "cosine_with_restarts",
    "COSINE_WITH_HARD_RESTARTS": "cosine_with_restarts",
    "REX": "rex",
}
_LOSSES = ("mse", "huber", "mae", "log_cosh")

_EMA = Condition(lambda c: c["ema"] != "OFF", "ema is off")


# ---------------------------------------------------------------------------------- steps and rates


def _total_steps(context: Context) -> int | None:
    """None if the clips could not be counted."""
    return int(context["epochs"]) * context.steps_per_epoch if context.clips else None


def _steps(value: Any, context: Context) -> Any:
    if (total := _total_steps(context)) is not None:
        return total
    context.notice(
        "epochs", f"is {value}, and without clips to count the steps are unknown; set train.steps"
    )
    return OMIT


def _schedule(value: Any, context: Context) -> Any:
    kind = _SCHEDULES.get(str(value))
    if kind is None:
        context.notice(
            "learning_rate_scheduler", f"is {value}, which onewan does not have; constant is used"
        )
    if kind in (None, "constant"):
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
            "learning_rate_warmup_steps",
            f"{warmup:g} is not less than the {total} steps of the run; there is no warm-up",
        )
        return OMIT
    return own or OMIT


def _max_grad_norm(value: Any, _: Context) -> Any:
    # Both null and 0 turn clipping off in OneTrainer.
    return OMIT if value == 1.0 else value or None


# --------------------------------------------------------------------------------- noise and losses


def _strengths(_: Any, context: Context) -> Any:
    settings.check_noising_strengths(context.settings)
    return OMIT  # `_timesteps` has them


def _timesteps(_: Any, context: Context) -> Any:
    if "min_noising_strength" in context.problems:
        return OMIT
    timesteps = settings.timesteps_of(context.settings)
    density = settings.density_of_timesteps(timesteps, context.variant)
    for expert in context.variant.selected(experts(context)):
        if not density.mass(expert):
            context.problem(
                "max_noising_strength",
                f"is {context['max_noising_strength']}, min_noising_strength is "
                f"{context['min_noising_strength']} and timestep_shift is "
                f"{context['timestep_shift']}, so the {expert.name} expert draws no timestep "
                f"({expert.t_min:g} to {expert.t_max:g}); change them, or turn off the training of "
                "that transformer",
            )
    return _differing(timesteps, tag="distribution")


def _weighting(_: Any, context: Context) -> Any:
    weighting = settings.weighting_of(context.settings)
    chosen = _differing(weighting, tag="kind")
    return OMIT if chosen == {"kind": "none"} else chosen


def _differing(section: Section, tag: str) -> dict[str, Any]:
    """What differs from the run file's defaults, and always the tag that selects the section."""
    return {
        tag: getattr(section, tag),
        **section.model_dump(mode="json", exclude_defaults=True),
    }


def _loss(_: Any, context: Context) -> Any:
    used = [kind for kind in _LOSSES if context[f"{kind}_strength"]]
    if used == ["huber"]:
        return "huber"
    if used != ["mse"]:
        given = ", ".join(f"{kind}_strength {context[f'{kind}_strength']:g}" for kind in used)
        context.notices.append(
            f"losses: {given or 'none'}; onewan takes one kind, mse or huber, and mse is used"
        )
    return OMIT


def _delta(value: Any, context: Context) -> Any:
    is_huber = [k for k in _LOSSES if context[f"{k}_strength"]] == ["huber"]
    return value if is_huber and value != 1 else OMIT


def _high_share(_: Any, context: Context) -> Any:
    share = settings.high_share_of(context.settings)
    return OMIT if share == "equal" else share


def _shift_is_fixed(context: Context) -> bool:
    return not context["dynamic_timestep_shifting"]


# ------------------------------------------------------------------------------------------- saving


def _save_every(_: Any, context: Context) -> Any:
    return steps(context, "backup_after") or OMIT


def _save_minutes(_: Any, context: Context) -> Any:
    found = minutes(context, "backup_after")
    return OMIT if found is None else found


ROWS = (
    Row("batch_size", "train.batch_size", 1, copied(1)),
    Row("gradient_accumulation_steps", "train.accumulation", 1, copied(1)),
    Row("epochs", "train.steps", 100, _steps),
    Row("learning_rate_scheduler", "train.schedule", "CONSTANT", _schedule),
    Row("learning_rate_min_factor", "train.schedule.end_factor", 0.0),
    Row("learning_rate_cycles", "train.schedule.cycles", 1.0),
    Row("learning_rate_warmup_steps", "train.warmup_steps", 200.0, _warmup),
    Row("clip_grad_norm", "train.max_grad_norm", 1.0, _max_grad_norm),
    Row("text_encoder.dropout_probability", "train.caption_dropout", 0.0, copied(0.0)),
    Row("min_noising_strength", "train.timesteps", 0.0, _strengths),
    Row("max_noising_strength", "train.timesteps", 1.0),
    Row("timestep_distribution", "train.timesteps", "UNIFORM", _timesteps),
    Row("noising_weight", "train.timesteps", 0.0),
    Row("noising_bias", "train.timesteps", 0.0),
    Row(
        "timestep_shift",
        "train.timesteps.shift",
        1.0,
        None,
        Condition(_shift_is_fixed, "dynamic_timestep_shifting is on"),
    ),
    Row("dynamic_timestep_shifting", "train.timesteps.shift_by_tokens", False),
    Row("loss_weight_fn", "train.loss.weighting", "CONSTANT", _weighting),
    Row("loss_weight_strength", "train.loss.weighting", 5.0),
    Row("unmasked_weight", "train.loss.unmasked_weight", 0.1, copied(0.1)),
    Row("mse_strength", "train.loss.kind", 1.0, _loss),
    *(Row(f"{kind}_strength", "train.loss.kind", 0.0) for kind in _LOSSES[1:]),
    Row("huber_delta", "train.loss.delta", 1.0, _delta),
    Row("wan_high_share", "train.high_expert_share", "equal", _high_share),
    Row("wan_expert_block", "train.switch_expert_every", 10, copied(10)),
    Row("wan_first_frame_probability", "train.first_frame_probability", 0.2, copied(0.2)),
    Row("offset_noise_weight", "train.noise_offset", 0.0, copied(0.0)),
    Row("perturbation_noise_weight", "train.input_perturbation", 0.0, copied(0.0)),
    Row("ema_decay", "train.ema.decay", 0.999, copied(), _EMA),
    Row("ema", "train.ema.offload", "OFF", lambda value, _: False if value == "GPU" else OMIT),
    Row("transformer.gradient_checkpointing", "memory.gradient_checkpointing", True, copied(True)),
    Row("transformer_2.gradient_checkpointing", "memory.gradient_checkpointing", True),
    Row("tensorboard", "logging.tensorboard", True, copied(True)),
    Row("backup_after", "train.save_every", 30, _save_every),
    Row("backup_after_unit", "train.save_every_minutes", "MINUTE", _save_minutes),
    Row("rolling_backup_count", "train.keep_last", 3, copied(2)),
)
