"""What it means to continue a run to more steps than it was made for, or with other settings."""

from __future__ import annotations

from dataclasses import dataclass

from onewan.arithmetic.expert_schedule import ExpertSchedule
from onewan.config.load import changed_fields, file_data
from onewan.config.resolve import expert_schedule_of, steps_per_expert, trained_experts
from onewan.config.schema import ResolvedRun
from onewan.document_edits import inline
from onewan.documents import get_path, key_path
from onewan.errors import OnewanError
from onewan.variants import ExpertName


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """A run continued to a number of steps, by ``onewan train RUN --resume``."""

    steps: int
    overrides: tuple[str, ...]
    """What the command line has to give."""
    inexact: tuple[str, ...]
    """Why the result differs from that of a run that was made for as many steps, in sentences;
    empty if it is the same, bit for bit. Then the command needs ``--allow-change``."""

    @property
    def options(self) -> tuple[str, ...]:
        """Options of ``onewan train``."""
        return ("--resume", "--allow-change") if self.inexact else ("--resume",)


def continuation(config: ResolvedRun, done: int, steps: int) -> Continuation:
    """The run of `config`, whose newest state is that of step `done`, continued to `steps` steps.

    OnewanError if there is nothing to continue to.
    """
    if steps <= done:
        raise OnewanError(
            f"train.steps: must be more than {done:,}, which are done already, got {steps:,}"
        )
    counts = steps_per_expert(config)
    overrides, changed = [f"train.steps={steps}"], {"steps": steps}
    longer = config
    if counts is not None and len(trained_experts(config)) > 1:
        high = round(steps * counts[0] / sum(counts))
        shares = {"high": high, "low": steps - high}
        overrides += [f"per_expert.{name}.steps={count}" for name, count in shares.items()]
        experts = {
            name: getattr(config.per_expert, name).model_copy(update={"steps": count})
            for name, count in shares.items()
        }
        sections = config.per_expert.model_copy(update=experts)
        longer = longer.model_copy(update={"per_expert": sections})
    longer = longer.model_copy(update={"train": config.train.model_copy(update=changed)})
    before, after = expert_schedule_of(config), expert_schedule_of(longer)
    return Continuation(
        steps=steps,
        overrides=tuple(overrides),
        inexact=tuple(
            sentence
            for sentence in (
                lr_depends_on_steps(config) and _rates(config, longer, done),
                _experts(before, after, done),
            )
            if sentence
        ),
    )


def overrides_for(old: ResolvedRun, new: ResolvedRun) -> list[str]:
    """The overrides with which ``onewan train`` continues a run of the settings `old` with the
    settings `new`. A list that differs is given as a whole."""
    values = file_data(new)
    fields: dict[str, None] = {}
    for name, _, _ in changed_fields(old, new):
        parts = name.split(".")
        item = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
        fields[".".join(parts[:item])] = None
    return [f"{name}={inline(get_path(values, key_path(name)))}" for name in fields]


def lr_depends_on_steps(config: ResolvedRun) -> bool:
    """Whether the learning rate of a step depends on the number of steps of the run."""
    return config.train.schedule.kind != "constant" or bool(config.train.cooldown_steps)


def _rates(config: ResolvedRun, longer: ResolvedRun, done: int) -> str:
    """What the longer schedule means for the learning rate."""
    parts = list[str]()
    for expert in trained_experts(config):
        last = _factor(config, expert.name, max(0, done - 1))
        following = _factor(longer, expert.name, done)
        of = f" of the {expert.name} expert" if len(trained_experts(config)) > 1 else ""
        parts.append(f"from {100 * last:.3g} % to {100 * following:.3g} % of its full value{of}")
    kind = config.train.schedule.kind
    how = f"follows the schedule {kind}" if kind != "constant" else "has a cooldown at the end"
    return (
        f"The learning rate {how}, which depends on the number of steps: the steps so far had the "
        f"rates of a run of {config.train.steps:,} steps, and the next ones have those of a run of "
        f"{longer.train.steps:,}. It changes {' and '.join(parts)}."
    )


def _factor(config: ResolvedRun, expert: ExpertName, step: int) -> float:
    schedule, total = expert_schedule_of(config), config.train.steps
    own, all_own = schedule.steps_before(step, expert), schedule.steps_before(total, expert)
    return config.train.lr_schedule().factor(min(own, all_own - 1), all_own)


def _experts(before: ExpertSchedule, after: ExpertSchedule, done: int) -> str:
    if all(before.expert_at(step) == after.expert_at(step) for step in range(done)):
        return ""
    return (
        "The experts take turns by their numbers of steps, so a run of more steps would have "
        "trained them in another order so far."
    )
