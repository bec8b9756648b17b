"""`SampleMaker`: generates the sample videos of a run while it trains.

A video that fails does not end the run: its error is reported, and training goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from onewan.errors import Interrupted, OnewanError
from onewan.runs import events
from onewan.runs.layout import RunLayout
from onewan.runs.log import RunLog
from onewan.sample.generate import SampleRequest, WanModelSampler
from onewan.train.run import Run

log = logging.getLogger(__name__)


class SampleMaker:
    """Writes the videos of `samples/` in the run's folder, and reports it in `log`."""

    def __init__(
        self, layout: RunLayout, log: RunLog, stop_if_requested: Callable[[], None]
    ) -> None:
        """`stop_if_requested` is called after each denoising step, and may raise Interrupted."""
        self._layout = layout
        self._log = log
        self._stop_if_requested = stop_if_requested
        self.keep_existing = False
        """Whether videos that exist are kept: in a resumed run. A new run may find those of an
        earlier one that ended before its first saved state, and may have other settings."""

    def make(self, run: Run, requests: Iterable[SampleRequest]) -> None:
        """The videos of the run file's prompts at the present step, in their order."""
        for number, request in enumerate(requests):
            name = f"{number}-distilled" if request.distilled else f"{number}"
            path = self._path(run, name)
            if not (path.exists() and self.keep_existing):
                self._make(run, request, path, number, requested=False)

    def make_requested(self, run: Run, request: SampleRequest) -> None:
        """A video of another prompt, beside those of the run file."""
        number = len(run.samples)
        while (path := self._path(run, f"requested-{number}")).exists():
            number += 1
        self._make(run, request, path, number, requested=True)

    def _path(self, run: Run, name: str) -> Path:
        return self._layout.samples(run.state.step) / f"{name}.{run.config.sample.format}"

    def _make(
        self, run: Run, request: SampleRequest, path: Path, number: int, *, requested: bool
    ) -> None:
        sampler = WanModelSampler(run.model, residency=run.residency, distilled=run.distilled)
        run.memory.use_for_sampling()
        try:
            with ExitStack() as weights:
                # For a schedule-free optimizer, "trained" selects its average.
                for trainable in run.state.trainables:
                    weights.enter_context(trainable.using("trained"))
                sampler.sample_to(
                    path,
                    request,
                    # While embeddings are trained, the cached text would be outdated.
                    text=None if run.config.embeddings else run.prompt_text,
                    on_step=partial(self._on_step, run.state.step, number),
                )
        except Interrupted:
            raise
        except Exception as error:  # hours of training must not be lost to a failed preview
            if not isinstance(error, OnewanError):
                log.exception("sampling failed")
            self._log.warn(f"sampling '{request.prompt}' failed: {error}")
            return
        self._log.emit(
            events.Sampled(
                step=run.state.step,
                file=path,
                prompt=request.prompt,
                distilled=request.distilled,
                requested=requested,
                seed=request.seed,
            )
        )

    def _on_step(self, step: int, number: int, done: int, total: int) -> None:
        self._log.emit(events.Sampling(step=step, number=number, done=done, total=total))
        self._stop_if_requested()
