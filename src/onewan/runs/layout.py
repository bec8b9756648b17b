"""Names in a run folder, all of them in one place.

Hides how a run folder is laid out. Never reads or writes what lies in it; `create` makes the
folders, and that is all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from onewan.config.load import RESOLVED_NAME

STEP_DIGITS = 6
"""Steps in names are filled up to this width, so that they sort; longer ones just get longer."""

STEP_NAME = re.compile(rf"[0-9]{{{STEP_DIGITS}}}|[1-9][0-9]{{{STEP_DIGITS},}}")


def step_name(step: int) -> str:
    return f"{step:0{STEP_DIGITS}d}"


@dataclass(frozen=True, slots=True)
class RunLayout:
    """The paths of one run."""

    root: Path

    @property
    def run_file(self) -> Path:
        """The run file as it was given."""
        return self.root / "run.yaml"

    @property
    def resolved(self) -> Path:
        """The config as the run uses it, with nothing left open."""
        return self.root / RESOLVED_NAME

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def states_dir(self) -> Path:
        return self.root / "state"

    @property
    def weights_dir(self) -> Path:
        return self.root / "weights"

    @property
    def samples_dir(self) -> Path:
        return self.root / "samples"

    @property
    def control_dir(self) -> Path:
        """Where requests to the running trainer lie; see `onewan.runs.control`."""
        return self.root / "control"

    def state(self, step: int) -> Path:
        """The folder of the training state after `step` steps."""
        return self.states_dir / step_name(step)

    def weights(
        self, step: int, suffix: str = "", fmt: str | None = None, ext: str = ".safetensors"
    ) -> Path:
        """The exported weights of one expert after `step` steps.

        `suffix` is the expert's `file_suffix`; `fmt` is given where several formats are asked for.
        """
        return self.weights_dir / f"{step_name(step)}{suffix}{f'_{fmt}' if fmt else ''}{ext}"

    def exported(self) -> dict[int, list[Path]]:
        """What lies in `weights_dir`, by the steps after which it was exported, in rising order."""
        found: dict[int, list[Path]] = {}
        for path in sorted(self.weights_dir.glob("*")):
            if match := re.match(rf"({STEP_NAME.pattern})(?:[_.]|$)", path.name):
                found.setdefault(int(match[1]), []).append(path)
        return dict(sorted(found.items()))

    def samples(self, step: int) -> Path:
        """The folder of the videos made after `step` steps."""
        return self.samples_dir / step_name(step)

    def create(self) -> None:
        """Makes the run's folders, where they are not there yet."""
        for folder in (self.states_dir, self.weights_dir, self.samples_dir, self.control_dir):
            folder.mkdir(parents=True, exist_ok=True)

    def saved_steps(self) -> list[int]:
        """Steps with a finished training state, in rising order.

        A state gets its name by a rename when it is complete, so any other name is unfinished.
        """
        if not self.states_dir.is_dir():
            return []
        names = (f.name for f in self.states_dir.iterdir() if f.is_dir())
        return sorted(int(name) for name in names if re.fullmatch(STEP_NAME, name))


def unused(root: Path) -> Path:
    """`root`, or the first of NAME-2, NAME-3, ... that is not there yet."""
    free, number = root, 1
    while free.exists():
        number += 1
        free = root.with_name(f"{root.name}-{number}")
    return free
