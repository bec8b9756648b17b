"""The names of all files and folders in a run folder.

Hides the layout of a run folder. Never reads or writes a file in it; `create` makes the folders.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onewan.config.load import RESOLVED_NAME

STEP_DIGITS = 6
"""Steps in names are zero-padded to this width, so that they sort; longer ones are not cut."""

# No leading zeros beyond that width, so that each step has exactly one name.
STEP_NAME = re.compile(rf"[0-9]{{{STEP_DIGITS}}}|[1-9][0-9]{{{STEP_DIGITS},}}")


def step_name(step: int) -> str:
    return f"{step:0{STEP_DIGITS}d}"


@dataclass(frozen=True, slots=True)
class RunLayout:
    """The paths of one run."""

    root: Path

    @property
    def name(self) -> str:
        """The run's name, `output.name`, which its folder has."""
        return Path(os.path.abspath(self.root)).name  # of the present folder too, "."

    @property
    def run_file(self) -> Path:
        """The run file as the user wrote it."""
        return self.root / "run.yaml"

    @property
    def resolved(self) -> Path:
        """The config that the run uses, with all defaults filled in."""
        return self.root / RESOLVED_NAME

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def clips(self) -> Path:
        """The clips that are trained on, one JSON object a line (`onewan.data.clip_list`)."""
        return self.root / "clips.jsonl"

    @property
    def report(self) -> Path:
        """The page about the run (`onewan.report`)."""
        return self.root / "report.html"

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    def rank_log(self, rank: int) -> Path:
        """The log of a process other than the first one, in a run of several."""
        return self.root / "logs" / f"rank_{rank}.txt"

    @property
    def output(self) -> Path:
        """What the newest trainer that was started by the queue printed (`onewan.runs.queue`)."""
        return self.root / "output.txt"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def wandb(self) -> Path:
        """The id of the run on W&B, and wandb's own files."""
        return self.root / "wandb"

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
    def manual_samples_dir(self) -> Path:
        """The videos that ``onewan sample`` makes from the run's weights."""
        return self.samples_dir / "manual"

    @property
    def control_dir(self) -> Path:
        """Requests to the running trainer; see `onewan.runs.control`."""
        return self.root / "control"

    @property
    def lock(self) -> Path:
        """Locked by the process that trains the run (`onewan.locks`)."""
        return self.root / ".lock"

    def written_folders(self) -> list[Path]:
        """The existing folders in which an interrupted trainer, or a command that sends it an
        order, can leave temporary files."""
        folders = [self.root, self.states_dir, self.weights_dir, self.control_dir]
        folders += self.samples_dir.glob("*")
        return [folder for folder in folders if folder.is_dir()]

    def state(self, step: int) -> Path:
        """The folder of the training state after `step` steps."""
        return self.states_dir / step_name(step)

    def weights(
        self,
        step: int | Literal["best"],
        suffix: str = "",
        fmt: str | None = None,
        ext: str = ".safetensors",
    ) -> Path:
        """The exported weights of one expert after `step` steps: ``NAME_NNNNNN_high_noise...``, or
        those with the lowest validation loss: ``NAME_best_high_noise...``.

        The run's name comes first, so that files of several runs can share a folder of LoRAs.
        `suffix` is the expert's `file_suffix`; `fmt` is set if the run exports several formats.
        """
        end = f"{suffix}{f'_{fmt}' if fmt else ''}{ext}"
        return self.weights_dir / f"{self.name}_{step if step == 'best' else step_name(step)}{end}"

    def exported(self) -> dict[int, list[Path]]:
        """The files in `weights_dir` by the step after which they were exported, ascending."""
        # Folders too: a fully fine-tuned transformer is exported for diffusers as one.
        found: dict[int, list[Path]] = {}
        for path in sorted(self.weights_dir.glob("*")):
            if (step := self._exported_step(path.name)) is not None:
                found.setdefault(step, []).append(path)
        return dict(sorted(found.items()))

    def _exported_step(self, file_name: str) -> int | None:
        """The step in the name of an exported file; None if the name has none, as those of the best
        weights."""
        own = re.match(rf"{re.escape(self.name)}_({STEP_NAME.pattern})(?:[_.]|$)", file_name)
        if own is not None:
            return int(own[1])
        # The folder was renamed since: the last number of a step follows the run's former name,
        # which may contain such numbers too.
        steps = re.findall(rf"(?:^|_)({STEP_NAME.pattern})(?=[_.]|$)(?!_best(?:[_.]|$))", file_name)
        return int(steps[-1]) if steps and not file_name.startswith(".") else None

    def samples(self, step: int) -> Path:
        """The folder of the videos made after `step` steps."""
        return self.samples_dir / step_name(step)

    def sampled_steps(self) -> list[int]:
        """Steps that have a folder of videos with something in it, ascending."""
        return [step for step in _steps_in(self.samples_dir) if any(self.samples(step).iterdir())]

    def create(self) -> None:
        """Create the run's folders; existing ones are kept."""
        for folder in (self.states_dir, self.weights_dir, self.samples_dir, self.control_dir):
            folder.mkdir(parents=True, exist_ok=True)

    def saved_steps(self) -> list[int]:
        """Steps with a complete training state, ascending.

        A state is renamed to its final name when it is complete; any other name is unfinished.
        """
        return _steps_in(self.states_dir)


def _steps_in(folder: Path) -> list[int]:
    """The steps of the folders in `folder` that are named by one, ascending."""
    if not folder.is_dir():
        return []
    names = (f.name for f in folder.iterdir() if f.is_dir())
    return sorted(int(name) for name in names if re.fullmatch(STEP_NAME, name))


def displayed(path: Path) -> Path:
    """`path` as a user would type it: relative to the current folder if it is inside it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def unused(root: Path) -> Path:
    """`root`, or the first of NAME-2, NAME-3, ... that does not exist."""
    free, number = root, 1
    while free.exists():
        number += 1
        free = root.with_name(f"{root.name}-{number}")
    return free
