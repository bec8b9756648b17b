"""`ClipTimesteps`: at which timesteps a clip is trained, and with which loss weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Literal

from onewan.arithmetic.timestep_density import TimestepDensity
from onewan.arithmetic.timestep_weighting import TimestepWeighting, has_weight
from onewan.variants import Expert


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipTimesteps:
    """What a source says of the timesteps of its clips; by default, nothing.

    A timestep t is the noise level in [0, 1], after the shift. An expert trains a clip at the part
    of its own range that is within the clip's, and draws from the run's density truncated to that
    part.
    """

    t_min: float = 0.0
    """Lowest timestep (inclusive)."""
    t_max: float = 1.0
    """Highest timestep (exclusive, except for 1.0)."""
    weighting: TimestepWeighting | None = None
    """Loss weight by timestep; None is the run's."""

    def part_of(self, expert: Expert) -> Expert | None:
        """`expert` with the part of its range at which it trains the clip; None if there is none,
        and the clip is not among those of `expert`."""
        low, high = max(self.t_min, expert.t_min), min(self.t_max, expert.t_max)
        return replace(expert, t_min=low, t_max=high) if low < high else None

    def key(self) -> list[object]:
        """Everything that the training of a clip depends on, as plain data."""
        weighting = self.weighting
        shape = None if weighting is None else [type(weighting).__name__, *astuple(weighting)]
        return [self.t_min, self.t_max, shape]


ALL_TIMESTEPS = ClipTimesteps()
"""Those of a clip whose source says nothing of them."""


def timestep_problems(
    timesteps: ClipTimesteps,
    density: TimestepDensity,
    weighting: TimestepWeighting | None,
    experts: Sequence[Expert],
) -> Iterator[tuple[Literal["timesteps", "weighting"], str]]:
    """Why clips with `timesteps` can't be trained by `experts`: the source's field, and a text.

    `density` is that of the clips, and `weighting` that of the run.
    """
    parts = [part for expert in experts if (part := timesteps.part_of(expert))]
    if not parts:
        trained = " and ".join(f"{e.t_min:g} to {e.t_max:g} ({e.name})" for e in experts)
        yield (
            "timesteps",
            f"no timestep of {timesteps.t_min:g} to {timesteps.t_max:g} is trained; the range of "
            f"the trained expert{'s' if len(experts) > 1 else ''} is {trained}; give another "
            "range, or take the source out",
        )
    for part in parts:
        where = f"from {part.t_min:g} to {part.t_max:g}, where the {part.name} expert trains them"
        if not density.reaches(part):
            yield (
                "timesteps",
                f"with shift {density.shift:.4g}, train.timesteps draws nothing {where}; give a "
                "wider range, or another distribution or shift",
            )
        elif timesteps.weighting is not None and not has_weight(timesteps.weighting, density, part):
            yield "weighting", f"is 0 {where}; give it weight there"
        elif weighting is not None and not has_weight(weighting, density, part):
            yield (
                "timesteps",
                f"train.loss.weighting is 0 {where}; give the source another range, or a weighting "
                "of its own",
            )
