"""`Cadence`: when a run validates, saves, exports and samples. Pure: no files, no clock."""

from __future__ import annotations

from dataclasses import dataclass

from onewan.config.schema import ResolvedRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """Which actions are due at a step, in the order in which they are done."""

    validate: bool
    save: bool
    """Save the training state."""
    export: bool
    """Write the trained weights for other programs."""
    sample: bool
    """Generate the sample videos."""
    full_sample: bool = False
    """Generate those without distilled LoRAs too, where the others have them."""

    @property
    def anything(self) -> bool:
        """Whether any action is due."""
        return self.validate or self.save or self.export or self.sample or self.full_sample


@dataclass(frozen=True, slots=True, kw_only=True)
class StillDue:
    """How often each action will be due, by the number of steps alone."""

    validations: int
    saves: int
    """Of the state; the weights are exported as often."""
    samples: int
    full_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cadence:
    """The settings that decide when an action is due. An interval of 0 means the last step only."""

    steps: int
    """The last step, at which everything is due."""
    save_every: int
    save_minutes: float | None
    """The state is also saved when this time has passed since it was last saved."""
    validates: bool
    """Whether there are validation clips."""
    validate_every: int
    videos: int
    """Number of prompts."""
    sample_every: int
    sample_at_start: bool
    full_sample_every: int | None = None
    """None: there are none besides the others."""

    @classmethod
    def of(cls, config: ResolvedRun) -> Cadence:
        distilled = config.sample.distilled
        return cls(
            steps=config.train.steps,
            save_every=config.train.save_every,
            save_minutes=config.train.save_every_minutes,
            validates=config.validation.clips > 0,
            validate_every=config.validation.every,
            videos=len(config.sample.prompts),
            sample_every=config.sample.every,
            sample_at_start=config.sample.at_start,
            full_sample_every=None if distilled is None else distilled.full_every,
        )

    @property
    def samples(self) -> bool:
        """Whether there are prompts."""
        return self.videos > 0

    def still_due(self, step: int) -> StillDue:
        """The actions of `step`, at least 1, and of all later ones."""

        def times(every: int | None, *, wanted: bool) -> int:
            if every is None or not wanted or step > self.steps:
                return 0
            if every == 0:
                return 1
            return self.steps // every - (step - 1) // every + (self.steps % every > 0)

        return StillDue(
            validations=times(self.validate_every, wanted=self.validates),
            saves=times(self.save_every, wanted=True),
            samples=times(self.sample_every, wanted=self.samples),
            full_samples=times(self.full_sample_every, wanted=self.samples),
        )

    def at(self, step: int) -> Due:
        """Actions that are due because of the number of completed steps alone."""
        full = self.full_sample_every
        if step == 0:
            # A new run has nothing to save, but the base model's loss and videos to compare with.
            return Due(
                validate=self.validates,
                save=False,
                export=False,
                sample=self.samples and self.sample_at_start,
                full_sample=self.samples and self.sample_at_start and full is not None,
            )
        save = self._divides(self.save_every, step)
        return Due(
            validate=self.validates and self._divides(self.validate_every, step),
            save=save,
            export=save,
            sample=self.samples and self._divides(self.sample_every, step),
            full_sample=self.samples and full is not None and self._divides(full, step),
        )

    def after(
        self,
        step: int,
        *,
        seconds_since_save: float,
        save_requested: bool = False,
        sample_requested: bool = False,
        export_requested: bool = False,
    ) -> Due:
        """Actions that are due after `step` steps, by time and by the user's requests too.

        One set of videos answers both a request and an interval that ends at the same step.
        """
        due = self.at(step)
        save = due.save or save_requested
        limit = self.save_minutes
        timed = limit is not None and seconds_since_save >= 60 * limit
        return Due(
            validate=due.validate,
            save=save or timed,
            # A timed save only protects against losing work.
            export=save or export_requested,
            sample=due.sample or (self.samples and sample_requested),
            full_sample=due.full_sample,
        )

    def _divides(self, every: int, step: int) -> bool:
        return step == self.steps or (every > 0 and step % every == 0)
