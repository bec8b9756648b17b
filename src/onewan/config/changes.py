"""Settings that may change while a run trains, and what is in force at a step.

A change belongs to the run's settings: `RunConfig.changes` says after which step a field gets which
value, so that a resumed or a repeated run has it at the same step. Only fields that neither decide
which data and noise a step gets nor what the model is made of may change.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

from onewan.config.schema import ChangeSection, RunConfig
from onewan.documents import get_path

CHANGEABLE: Mapping[str, str] = {
    "optimizer.lr": "learning rate",
    "per_expert.high.lr": "learning rate of the high-noise expert",
    "per_expert.low.lr": "learning rate of the low-noise expert",
    "train.max_grad_norm": "maximum norm of the gradient",
    "train.ema.decay": "decay rate of the moving average",
    "train.save_every": "steps between checkpoints",
    "train.save_every_minutes": "minutes between saved states",
    "train.keep_last": "number of newest states to keep",
    "train.keep_every": "step interval of states to keep for good",
    "train.keep_best": "keep the state with the lowest validation loss",
    "validation.every": "steps between validations",
    "sample.prompts": "prompts of sample videos",
    "sample.every": "steps between sample videos",
    "sample.seed": "seed of sample videos",
    "sample.width": "width of sample videos",
    "sample.height": "height of sample videos",
    "sample.frames": "frames of sample videos",
    "sample.fps": "frame rate of sample videos",
    "sample.steps": "denoising steps of sample videos",
    "sample.shift": "timestep shift of sample videos",
    "sample.guidance": "guidance scales of sample videos",
    "sample.negative_prompt": "negative prompt of sample videos",
    "output.keep_last": "number of newest exports to keep",
}
"""What each field is, by its dotted name. The learning rate, the gradient's limit and the decay of
the average change what later steps compute; the others only what the run writes and when."""


_Run = TypeVar("_Run", bound=RunConfig)


def in_force(config: _Run, step: int) -> _Run:
    """The settings once `step` steps are done, with all changes up to there and none in `changes`;
    with -1 those that the run began with."""
    changes = [change for change in joined(config.changes, ()) if change.step <= step]
    plain = config.model_copy(update={"changes": ()})
    if not changes:
        return plain
    data = plain.model_dump(mode="json")
    for change in changes:
        for name, value in change.settings.items():
            *section, last = name.split(".")
            get_path(data, tuple(section))[last] = value
    return type(config).model_validate(data)


def settings_at(config: _Run) -> list[_Run]:
    """All settings that a run has one after the other: those it begins with, and those after each
    of its changes."""
    steps = [change.step for change in joined(config.changes, ())]
    return [in_force(config, step) for step in dict.fromkeys([-1, *steps])]


def joined(
    given: Sequence[ChangeSection], recorded: Sequence[ChangeSection]
) -> tuple[ChangeSection, ...]:
    """Both lists as one, in the order of their steps, without what is in both."""
    more = [change for change in recorded if change not in given]
    return tuple(sorted([*given, *more], key=lambda change: change.step))


def without_changes_of(
    changes: Sequence[ChangeSection], names: Collection[str]
) -> tuple[ChangeSection, ...]:
    """`changes` without the values of the fields `names`, of fields in them, and of their
    sections."""
    kept = [
        change.model_copy(
            update={
                "settings": {
                    name: value
                    for name, value in change.settings.items()
                    if not any(_overlap(name, other) for other in names)
                }
            }
        )
        for change in changes
    ]
    return tuple(change for change in kept if change.settings)


def changeable_name(name: str) -> str | None:
    """The changeable field that `name` is, or lies in; None if it is none."""
    return next((field for field in CHANGEABLE if f"{name}.".startswith(f"{field}.")), None)


def fixed_reason(config: RunConfig, name: str) -> str | None:
    """Why the field `name` can't change while the run of `config` trains; None if it can."""
    if changeable_name(name) is None:
        return f"can't change while a run trains; fields that can are {', '.join(CHANGEABLE)}"
    if name.startswith("train.ema.") and config.train.ema is None:
        return (
            "can't change, since the run has no moving average (train.ema is null), and one can't "
            "begin in the middle of a run"
        )
    if name.startswith("sample.") and not config.sample.prompts:
        return (
            "can't change, since the run began without sample.prompts, so that nothing for sample "
            "videos is loaded"
        )
    return None


def _overlap(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")
