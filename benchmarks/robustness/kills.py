"""Kills onewan's commands at random moments (SIGKILL), starts them again, compares the results.

Each case prepares a folder, starts one command, kills it, and starts the same command again as a
user would: with ``--resume`` once there is a state, with ``--force`` where it was given. In half of
the cases the second start is killed too. When the command has finished, the case ends in

    ok          the results equal those of an undisturbed command, and nothing is left behind
    different   a result is missing, unexpected, or has other tensors, losses or bytes
    incomplete  after a kill, a result under its final name is not what it is at the end
    leftover    a temporary file, a lock or a folder that was moved aside is left
    gone        between two starts, what ``--force`` replaces is neither the old nor the new model
    status      a start ended with another exit status than 0
    traceback   its output contains a traceback
    hang        a start took longer than `MAX_SECONDS`

Everything but `ok` is a failure, after which the script exits with status 1. Half of the kills come
at a random time, half right before a random file operation (only on systems with `os.fork`). The
models are tiny, with random weights.

    python benchmarks/robustness/kills.py --count 500 --out kills.json

Finished cases are appended to ``OUT.cases.jsonl`` and are not run again by the next start with the
same `--out` and `--seed`. ``--case N`` runs case N alone and shows its output; ``--keep FOLDER``
keeps its files. ``--only cache`` takes all cases from one command; its cases have other numbers
than those of all commands, so it needs another `--out`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Before torch is imported, here and in the processes that are started.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")

import torch
from harness import FinishedCase, finished_cases
from PIL import Image

# The commands' own modules are imported here, so that a forked process starts at once.
from onewan.cli import caption, commands, convert, main  # noqa: F401
from onewan.demo.clips import write_clips
from onewan.demo.tiny_model import write_tiny_model
from onewan.files import REPLACED_PREFIX, TEMPORARY_PREFIX
from onewan.runs.event_file import read_events
from onewan.runs.layout import RunLayout

CAN_FORK = hasattr(os, "fork")
MAX_SECONDS = 120.0
"""Far longer than any command takes on a busy machine."""

_FILE_EVENTS = frozenset(
    [
        *("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.utime"),
        *("shutil.rmtree", "ctypes.dlsym", "fcntl.flock", "os.link", "os.symlink"),
    ]
)
"""Python's audit events at which a process can be killed; ``ctypes.dlsym`` comes before two folders
are exchanged."""

_RUN_FILE = """\
model: {{path: {folder}/model, variant: t2v-a14b, dtype: float32}}
wan_config: {{max_frames: 5}}
video_data:
  sources: [{{path: {folder}/clips}}]
  resolution: 4096
  cache_dir: {folder}/cache
method: {{kind: lora, rank: 4}}
optimizer: {{lr: 0.005}}
train: {{steps: 3, save_every: 1, switch_expert_every: 1}}
validation: {{clips: 0}}
sample: {{prompts: [a circle], every: 2, width: 32, height: 32, frames: 1, steps: 1}}
logging: {{tensorboard: false}}
output: {{name: run, formats: [comfyui, kohya]}}
"""
_FINE_TUNE = [
    "method={kind: fine_tune, weights: kahan}",
    "model.dtype=bfloat16",
    "optimizer.lr=0.001",
    "output.formats=[diffusers, comfyui]",
    "output.keep_last=2",
    "sample={prompts: [], every: 0}",
    "train.steps=2",
]

Results = dict[str, str]
"""A digest of each result by its name."""


# --------------------------------------------------------------------------------------- operations


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A command that is killed, in a folder of its own."""

    name: str
    arguments: Callable[[Path, Path], list[str]]
    """(shared folder, own folder) -> the command that a user would give now."""
    results: Callable[[Path], Results]
    old: str = ""
    """A model of the shared folder that is at ``out`` before, and is replaced."""
    own: str = ""
    """A folder of the shared folder that the own folder has a copy of before."""


def _train(shared: Path, folder: Path, overrides: Sequence[str]) -> list[str]:
    saved = RunLayout(folder / "runs" / "run").saved_steps()
    resume = ["--resume"] if saved else []
    return ["train", str(shared / "run.yaml"), f"output.dir={folder / 'runs'}", *overrides, *resume]


def _results_of_run(folder: Path) -> Results:
    layout = RunLayout(folder / "runs" / "run")
    found = digests(folder, layout.states_dir, layout.weights_dir, layout.samples_dir)
    # A step after the last state is done again, with the same numbers.
    for event in read_events(layout.events):
        if event["event"] == "step":
            values = json.dumps(
                [event[name] for name in ("expert", "loss", "grad_norm", "lr", "t")]
            )
            found[f"step {event['step']} {values}"] = "done"
    return found


def _operations() -> list[Operation]:
    def converted(name: str, source: str, to: str, out: str = "out", old: str = "") -> Operation:
        def arguments(shared: Path, folder: Path) -> list[str]:
            force = ["--force"] if old else []
            return ["convert", str(shared / source), str(folder / out), "--to", to, *force]

        return Operation(name=name, arguments=arguments, results=digests, old=old)

    def merged(shared: Path, folder: Path) -> list[str]:
        loras = [str(path) for path in sorted((shared / "loras").iterdir())]
        return ["merge", str(shared / "model"), *loras, str(folder / "out")]

    def cached(shared: Path, folder: Path) -> list[str]:
        return ["cache", str(shared / "run.yaml"), f"video_data.cache_dir={folder / 'cache'}"]

    def captioned(shared: Path, folder: Path) -> list[str]:
        server = (shared / "server").read_text("utf-8")
        settings = ["video_data.resolution=64", "--server", server]
        return ["caption", str(folder / "captionless"), *settings]

    lora = "loras/run_000003_high_noise_comfyui.safetensors"
    return [
        Operation(
            name="cache", arguments=cached, results=lambda folder: digests(folder, folder / "cache")
        ),
        Operation(
            name="train",
            arguments=lambda shared, folder: _train(shared, folder, []),
            results=_results_of_run,
        ),
        Operation(
            name="export",
            arguments=lambda shared, folder: _train(shared, folder, _FINE_TUNE),
            results=_results_of_run,
        ),
        Operation(name="merge", arguments=merged, results=digests),
        converted("convert to files", "model", "single"),
        converted("convert to an official folder", "model", "official"),
        converted("convert over a model", "model", "diffusers", old="old"),
        converted("convert an expert", "model/transformer", "single", "out.safetensors"),
        converted("convert a LoRA", lora, "kohya", "out.safetensors"),
        Operation(name="caption", arguments=captioned, results=digests, own="captionless"),
    ]


def _chosen(only: str | None) -> list[Operation]:
    """All operations, or the one of this name."""
    operations = [o for o in _operations() if only in (None, o.name)]
    if not operations:
        names = ", ".join(o.name for o in _operations())
        raise SystemExit(f"--only {only}: is no command that is killed; these are: {names}")
    return operations


# ------------------------------------------------------------------------------------------ results


def digests(folder: Path, *parts: Path) -> Results:
    """A digest of the content of each file in a case's folder, or in `parts` of it, by path.

    Left out are `leftovers`, the date in a header, the path of the case's folder, and files that
    only list others: a state's manifest and what the cache remembers of media files.
    """
    found: Results = {}
    for path in (path for part in parts or (folder,) for path in sorted(part.rglob("*"))):
        name = path.relative_to(folder)
        listing = path.name in ("digests.jsonl", "probes.jsonl", "manifest.json", "output")
        if path.is_file() and not listing and not any(map(_is_leftover, name.parts)):
            found[name.as_posix()] = _digest(path, folder)
    return found


def _digest(path: Path, folder: Path) -> str:
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        length = int.from_bytes(data[:8], "little")
        with contextlib.suppress(ValueError):  # an incomplete file
            header = json.loads(data[8 : 8 + length])
            header.get("__metadata__", {}).pop("modelspec.date", None)
            data = json.dumps(header, sort_keys=True).encode() + data[8 + length :]
    elif path.suffix == ".json":
        data = data.replace(json.dumps(str(folder))[1:-1].encode(), b"FOLDER")
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def leftovers(folder: Path) -> list[str]:
    """Temporary files, folders that were moved aside, and locks."""
    return [
        path.relative_to(folder).as_posix()
        for path in folder.rglob(".*")
        if _is_leftover(path.name)
    ]


def _is_leftover(name: str) -> bool:
    return name.startswith((TEMPORARY_PREFIX, REPLACED_PREFIX, ".lock"))


# ---------------------------------------------------------------------------------------- processes


class Command:
    """A running command: a fork of this process, or a new one where a system can't fork."""

    def __init__(self, arguments: Sequence[str], output: Path, kill_before: int | None) -> None:
        """`kill_before` is the number of the file operation before which it kills itself; with -1
        it only counts them, into the last line of its output."""
        self._status: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        if not CAN_FORK:
            with output.open("ab") as file:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "onewan", *arguments], stdout=file, stderr=file
                )
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            _run_forked(arguments, output, kill_before)

    def wait(self, seconds: float) -> int | None:
        """The exit status (negative: the signal); None if it still runs after `seconds`."""
        deadline = time.monotonic() + seconds
        while self._poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        return self._poll()

    def kill(self) -> None:
        if self._poll() is None:
            if self._process is not None:
                self._process.kill()
            else:
                os.kill(self._pid, signal.SIGKILL)
            self.wait(MAX_SECONDS)

    def _poll(self) -> int | None:
        if self._status is None and self._process is not None:
            self._status = self._process.poll()
        elif self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status


def _run_forked(arguments: Sequence[str], output: Path, kill_before: int | None) -> None:
    """Run the command in this process, a fork, and end it."""
    status = 70
    try:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        done = 0

        def audit(event: str, _: tuple[Any, ...]) -> None:
            nonlocal done
            if event in _FILE_EVENTS:
                if done == kill_before:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1

        if kill_before is not None:
            sys.addaudithook(audit)
        status = main(arguments)
        print(f"\n{done}")
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


# -------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """What a command does without a kill."""

    results: Results
    seconds: float
    file_operations: int


@dataclass(frozen=True, kw_only=True)
class Outcome(FinishedCase):
    """What the kills of one case ended in."""

    operation: str
    kills: int = 0
    moments: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Bench:
    """The shared folder, and what each command does undisturbed."""

    shared: Path
    operations: list[Operation]
    undisturbed: dict[str, Undisturbed] = field(default_factory=dict)

    def reference(self, operation: Operation) -> Undisturbed:
        """The undisturbed command, which runs when it is first needed."""
        if operation.name not in self.undisturbed:
            folder = self.shared.parent / f"undisturbed {operation.name}"
            self.prepare(operation, folder)
            started = time.monotonic()
            command = Command(operation.arguments(self.shared, folder), folder / "output", -1)
            status = command.wait(MAX_SECONDS)
            seconds = time.monotonic() - started
            output = (folder / "output").read_text("utf-8", "backslashreplace")
            if status != 0:
                raise RuntimeError(f"{operation.name}: undisturbed, status {status}: {output}")
            self.undisturbed[operation.name] = Undisturbed(
                results=operation.results(folder),
                seconds=seconds,
                file_operations=int(output.split()[-1]) if CAN_FORK else 0,
            )
            shutil.rmtree(folder)
        return self.undisturbed[operation.name]

    def prepare(self, operation: Operation, folder: Path) -> None:
        folder.mkdir(parents=True)
        if operation.old:
            shutil.copytree(self.shared / operation.old, folder / "out")
        if operation.own:
            shutil.copytree(self.shared / operation.own, folder / operation.own)

    def run(self, case: int, seed: int, folder: Path) -> Outcome:
        """Run one case in the new folder `folder`."""
        rng = random.Random(seed)
        operation = self.operations[case % len(self.operations)]
        expected = self.reference(operation)
        self.prepare(operation, folder)
        old = digests(folder) if operation.old else {}
        started, kills, moments = time.monotonic(), 0, list[str]()

        def ended(outcome: str, detail: str = "") -> Outcome:
            return Outcome(
                case=case,
                seed=seed,
                operation=operation.name,
                outcome=outcome,
                kills=kills,
                moments=tuple(moments),
                seconds=round(time.monotonic() - started, 2),
                detail=detail,
            )

        found: Results = {}
        for may_kill in (True, rng.random() < 0.5, False):
            status, output = self.start(operation, folder, rng if may_kill else None, moments)
            found = operation.results(folder)
            # The first start had finished but for its last file operations; the second one deleted
            # what it had left, and refuses to replace the result.
            if status == 1 and "add --force to replace it" in output and found == expected.results:
                break
            if problem := _problem(status, output, may_kill):
                return ended(problem, f"{status}: {output[-3000:]}")
            if old and found not in (old, expected.results):
                return ended("gone", ", ".join(sorted(os.listdir(folder))))
            wrong = [n for n in found if found[n] != expected.results.get(n, found[n])]
            if wrong and not old:
                return ended("incomplete", ", ".join(wrong)[:3000])
            if status == 0:  # perhaps before the moment came
                break
            kills += 1
        if left := leftovers(folder):
            return ended("leftover", ", ".join(left))
        if differing := sorted(set(found.items()) ^ set(expected.results.items())):
            names = dict.fromkeys(name for name, _ in differing)
            return ended("different", ", ".join(names)[:3000])
        return ended("ok")

    def start(
        self, operation: Operation, folder: Path, rng: random.Random | None, moments: list[str]
    ) -> tuple[int | None, str]:
        """Start the command as a user would now, and kill it at a moment that `rng` chooses, which
        is added to `moments`; returns the exit status (None or -SIGKILL: killed) and the output."""
        expected, kill_before, seconds = self.reference(operation), None, MAX_SECONDS
        if rng is not None and CAN_FORK and rng.random() < 0.5:
            kill_before = rng.randrange(expected.file_operations)
            moments.append(f"before file operation {kill_before}")
        elif rng is not None:
            seconds = rng.uniform(0, expected.seconds)
            moments.append(f"after {seconds:.3f} s")
        output = folder / "output"
        output.write_bytes(b"")
        command = Command(operation.arguments(self.shared, folder), output, kill_before)
        status = command.wait(seconds)
        command.kill()
        return status, output.read_text("utf-8", "backslashreplace")


def _problem(status: int | None, output: str, may_kill: bool) -> str:
    """What is wrong with one start; "" if nothing."""
    if "Traceback (most recent call last)" in output:
        return "traceback"
    if may_kill and status in (None, -9):
        return ""
    if status is None:
        return "hang"
    return "status" if status else ""


@contextlib.contextmanager
def captioning_server() -> Iterator[str]:
    """A server for captions in a process of its own, since this one forks; yields its address."""
    script = Path(__file__).with_name("chat_server.py")
    process = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def make_shared(folder: Path, server: str) -> None:
    """Two tiny models, clips with captions and without, a run file, a complete cache, the LoRAs of
    an undisturbed run, and the address of the server for captions."""
    (folder / "server").write_text(server, "utf-8")
    (folder / "captionless").mkdir()
    for number in range(12):
        color = (20 * number, 255 - 20 * number, 99)
        Image.new("RGB", (64, 64), color).save(folder / "captionless" / f"{number:02}.png")
    write_clips(folder / "all clips")
    (folder / "clips").mkdir()
    for number, media in enumerate(sorted((folder / "all clips").glob("*.mp4"))[:1]):
        for copy in range(3):
            name = f"clip{number}{copy}"
            # Files of different content: each is encoded.
            data = media.read_bytes() + b"\0\0\0\x08free" * copy
            (folder / "clips" / f"{name}{media.suffix}").write_bytes(data)
            (folder / "clips" / f"{name}.txt").write_text(f"a shape, number {copy}", "utf-8")
    write_tiny_model(folder / "model", "t2v-a14b", width=32, layers=1)
    write_tiny_model(folder / "old", "t2v-a14b", width=32, layers=1, seed=1)
    (folder / "run.yaml").write_text(_RUN_FILE.format(folder=folder.as_posix()), "utf-8")
    command = Command(
        ["train", str(folder / "run.yaml"), f"output.dir={folder}"], folder / "output", None
    )
    if command.wait(10 * MAX_SECONDS) != 0:
        raise RuntimeError((folder / "output").read_text("utf-8", "backslashreplace"))
    (folder / "loras").mkdir()
    for path in (folder / "run" / "weights").glob("run_000003*_comfyui.safetensors"):
        shutil.copy(path, folder / "loras")


# ------------------------------------------------------------------------------------- command line


def run_all(bench: Bench, options: argparse.Namespace, first: int) -> list[Outcome]:
    """All cases that are not in the log yet, one after the other."""
    log = None if options.out is None else options.out.with_name(f"{options.out.name}.cases.jsonl")
    done = {} if log is None else finished_cases(log, first, options.count, Outcome)
    for number in range(options.count):
        if number in done:
            continue
        if options.seconds is not None and time.monotonic() > options.seconds:
            break
        folder = bench.shared.parent / "case"
        outcome = bench.run(number, first + number, folder)
        shutil.rmtree(folder)
        done[number] = outcome
        if log is not None:
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
        if outcome.outcome != "ok":
            print(f"case {number}: {outcome.outcome}: {outcome.detail[:500]}", file=sys.stderr)
        if len(done) % 50 == 0:
            print(f"{len(done)}/{options.count}", file=sys.stderr)
    return [done[number] for number in sorted(done)]


def summary(outcomes: Sequence[Outcome], bench: Bench, seed: int) -> dict[str, Any]:
    failures = [asdict(outcome) for outcome in outcomes if outcome.outcome != "ok"]
    by_operation = {
        operation.name: sum(o.kills for o in outcomes if o.operation == operation.name)
        for operation in bench.operations
    }
    moments = [moment for outcome in outcomes for moment in outcome.moments]
    only = f" --only '{bench.operations[0].name}'" if len(bench.operations) == 1 else ""
    return {
        "script": Path(sys.argv[0]).name,
        "seed": seed,
        "cases": len(outcomes),
        "kills": sum(outcome.kills for outcome in outcomes),
        "kills_by_operation": by_operation,
        "kills_planned_before_a_file_operation": sum(m.startswith("before") for m in moments),
        "outcomes": dict(Counter(outcome.outcome for outcome in outcomes).most_common()),
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 1),
        "failures": len(failures),
        "failing": failures[:100],
        "reproduce": f"python {Path(sys.argv[0]).name} --seed {seed}{only} --case N",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100, help="number of cases (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other cases")
    parser.add_argument("--out", type=Path, help="the JSON file to write the result to")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes")
    parser.add_argument("--only", metavar="COMMAND", help="the one command that is killed")
    parser.add_argument("--case", type=int, metavar="N", help="run case N alone, show its output")
    parser.add_argument("--keep", type=Path, help="with --case: a new folder for its files")
    return parser.parse_args()


def run() -> int:
    """The command line; returns the exit status."""
    options = parsed()
    limit = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    options.seconds = limit
    first = options.seed * 1_000_000_000  # the seeds of the cases are those from here on
    with (
        tempfile.TemporaryDirectory(prefix="onewan-kills-") as temporary,
        captioning_server() as server,
    ):
        bench = Bench(shared=Path(temporary, "shared"), operations=_chosen(options.only))
        bench.shared.mkdir()
        make_shared(bench.shared, server)
        if options.case is not None:
            folder = options.keep or Path(temporary, "case")
            outcome = bench.run(options.case, first + options.case, folder)
            print((folder / "output").read_text("utf-8", "backslashreplace"))
            print(json.dumps(asdict(outcome), indent=2))
            return int(outcome.outcome != "ok")
        result = summary(run_all(bench, options, first), bench, options.seed)
    text = json.dumps(result, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    return int(bool(result["failures"]))


if __name__ == "__main__":
    sys.exit(run())
