"""What a user sees of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

_PLAIN_SECONDS = 5.0
"""Without a terminal, a line of progress at most this often."""


class Progress:
    """Turns a run's events into a bar and lines. Give its `listen` to the trainer."""

    def __init__(self, *, terminal: bool | None = None) -> None:
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._bar: Any = None  # tqdm's own types say that a bar may count nothing
        self._what = ""
        self._steps = 0
        self._losses: dict[str, float] = {}
        self._last_line = 0.0

    def listen(self, event: Mapping[str, Any]) -> None:
        """Show one event; kinds that have nothing to show are passed over."""
        show = getattr(self, f"_on_{event['event']}", None)
        if show is not None:
            show(event)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def line(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def _advance(
        self, what: str, done: int, total: int, note: str = "", *, unit: str = "step"
    ) -> None:
        if self._terminal:
            if self._bar is None or self._what != what:
                self.close()
                self._bar = tqdm(
                    total=total, desc=what, unit=unit, initial=max(0, done - 1), leave=False
                )
                self._what = what
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if done == total or self._what != what or now - self._last_line >= _PLAIN_SECONDS:
            self._what, self._last_line = what, now
            self.line(f"{what} {done}/{total} {note}".rstrip())

    def _on_started(self, event: Mapping[str, Any]) -> None:
        self._steps = event["steps"]
        self.line(f"run {event['run']}")

    def _on_encoding(self, event: Mapping[str, Any]) -> None:
        self._advance(event["what"], event["done"], event["total"])

    def _on_writing(self, event: Mapping[str, Any]) -> None:
        done, total = event["done"], event["total"]
        megabytes = -(-total // 1_000_000)
        so_far = megabytes if done == total else min(done // 1_000_000, megabytes - 1)
        self._advance("writing", so_far, megabytes, "" if self._terminal else "MB", unit="MB")

    def _on_data(self, event: Mapping[str, Any]) -> None:
        self.close()
        for line in event["report"]:
            self.line(line)

    def _on_resumed(self, event: Mapping[str, Any]) -> None:
        self.line(f"resumed after step {event['step']}")

    def _on_step(self, event: Mapping[str, Any]) -> None:
        expert, loss = event["expert"], event["loss"]
        # A single loss says little: t and noise differ from step to step. Show a running mean.
        mean = self._losses.setdefault(expert, loss)
        self._losses[expert] = 0.9 * mean + 0.1 * loss
        losses = ", ".join(f"{name} {value:.4f}" for name, value in self._losses.items())
        left = (self._steps - event["step"]) * event["seconds"]
        note = f"{expert} expert, loss {losses}"
        if not self._terminal:
            note += f", {event['seconds']:.2f} s/step, {_duration(left)} left"
        self._advance("training", event["step"], self._steps, note)

    def _on_validation(self, event: Mapping[str, Any]) -> None:
        base, on = event["base"], "held-out clips" if event["held_out"] else "training clips"
        losses = [("loss", event["loss"]), ("of the moving average", event["ema"])]
        if event["step"] == 0 and base != event["loss"]:
            losses.append(("of the base model", base))
        shown = ", ".join(
            f"{what} {loss:.4f}{_change(loss, base, event['step'])}"
            for what, loss in losses
            if loss is not None
        )
        self.line(f"step {event['step']}: validation on {on}, {event['expert']} expert: {shown}")

    def _on_best(self, event: Mapping[str, Any]) -> None:
        self.line(f"step {event['step']}: the best validation loss so far, {event['loss']:.4f}")

    def _on_note(self, event: Mapping[str, Any]) -> None:
        self.line(f"note: {event['text']}")

    def _on_saved(self, event: Mapping[str, Any]) -> None:
        self.line(f"step {event['step']}: state saved in {event['state']}")

    def _on_exported(self, event: Mapping[str, Any]) -> None:
        whose = "embeddings" if event["expert"] == "embeddings" else f"the {event['expert']} expert"
        self.line(f"step {event['step']}: weights of {whose}: {event['file']}")

    def _on_sampling(self, event: Mapping[str, Any]) -> None:
        self._advance(f"sampling video {event['number']}", event["done"], event["total"])

    def _on_sampled(self, event: Mapping[str, Any]) -> None:
        self.line(f"step {event['step']}: sample video: {event['file']}")

    def _on_warning(self, event: Mapping[str, Any]) -> None:
        self.line(f"warning: {event['text']}")

    def _on_stopped(self, event: Mapping[str, Any]) -> None:
        self.close()
        step = event["step"]
        kept = f"the state of step {step} is saved" if step else "what was encoded is kept"
        self.line(f"stopped; {kept}, and --resume goes on from there")

    def _on_failed(self, _event: Mapping[str, Any]) -> None:
        self.close()

    def _on_finished(self, event: Mapping[str, Any]) -> None:
        self.close()
        self.line(f"done: {event['step']} steps, all results are in {event['run']}")


def _change(loss: float, base: float | None, step: int) -> str:
    """By how much `loss` is off the base model's."""
    if base is None or step == 0:
        return ""
    return f" ({100 * (loss / base - 1):+.1f} % against the base model)"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
