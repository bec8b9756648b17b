"""Runs many seeded cases of hostile or damaged input, and counts what they end in.

A script of cases gives `run_cases` two functions. ``make(seed, folder)`` writes the files of a case
into an empty folder and returns the arguments of one call; ``run(arguments)`` makes the call in the
same process, like `onewan.cli.main`, and returns its exit status. Both are called in a worker
process that imports onewan once. The parent watches the worker and replaces it when it has to:

    ok         the exit status is 0, 1 or 2
    status     any other exit status, such as that of a defect
    exception  an exception left `run`
    traceback  the output contains a traceback
    control    the output contains control characters, which a terminal would obey
    long       the output is longer than `MAX_OUTPUT_BYTES`
    code       the input made a program start, an object unpickle, a connection open or a file
               appear at `canary`: code or commands in it were run
    memory     the memory grew by more than `MAX_MEMORY_MB` above that of the worker's start
    hang       the case took more than `--seconds`, also when it was tried again
    died       the worker ended, for example by a segmentation fault

Everything but `ok` is a failure, after which the script exits with status 1. ``--case N`` runs case
N alone and shows its arguments and its output. Finished cases are appended to ``OUT.cases.jsonl``
and are not run again by the next start with the same `--out` and `--seed`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

Make = Callable[[int, Path], Sequence[str]]
Run = Callable[[Sequence[str]], int]

MAX_MEMORY_MB = 500
MAX_OUTPUT_BYTES = 200_000
MAX_SECONDS_TO_MAKE = 120.0
"""Of `make` and of a worker's start, which are not measured."""

_CODE_EVENTS = {
    "os.system": "starts a program",
    "os.exec": "starts a program",
    "os.posix_spawn": "starts a program",
    "os.spawn": "starts a program",
    "os.startfile": "starts a program",
    "subprocess.Popen": "starts a program",
    "pickle.find_class": "unpickles",
    "socket.connect": "opens a connection",
    "socket.getaddrinfo": "opens a connection",
}
"""Audit events of Python that no case may raise."""
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufffe\uffff]")


@dataclass(frozen=True, kw_only=True)
class FinishedCase:
    """What one case of any script ended in."""

    case: int
    seed: int
    outcome: str
    seconds: float = 0.0
    detail: str = ""


Case = TypeVar("Case", bound=FinishedCase)


@dataclass(frozen=True, kw_only=True)
class Outcome(FinishedCase):
    """What a case of `run_cases` ended in."""

    status: int | None = None
    megabytes: float = 0.0
    """Peak memory above that of the worker's start."""


def canary(folder: Path) -> Path:
    """The file that hostile content in the case's `folder` may try to create."""
    return folder.parent / "canary"


def run_cases(description: str | None, make: Make, run: Run) -> None:
    """The command line of a script of cases; ends the process with its exit status."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000, help="number of cases (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other cases")
    parser.add_argument("--out", type=Path, help="the JSON file to write the result to")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="a longer case is a hang (default: 5)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="number of workers (default: 1)")
    parser.add_argument(
        "--case", type=int, metavar="N", help="run case N alone and show its output"
    )
    parser.add_argument("--keep", type=Path, help="with --case: a new folder for the case's files")
    options = parser.parse_args()
    first = options.seed * 1_000_000_000  # the seeds of the cases are those from here on
    # Inherited by the workers: no network, one thread, the same order of sets.
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", PYTHONHASHSEED="0")
    os.environ.update(CUDA_VISIBLE_DEVICES="")
    if options.case is not None:
        sys.exit(_show(make, run, first + options.case, options.case, options.keep))
    outcomes = _run_all(make, run, options, first)
    result = _summary(outcomes, options)
    text = json.dumps(result, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    sys.exit(1 if result["failures"] else 0)


def _run_all(make: Make, run: Run, options: argparse.Namespace, first: int) -> list[Outcome]:
    log = None if options.out is None else options.out.with_name(f"{options.out.name}.cases.jsonl")
    done = {} if log is None else finished_cases(log, first, options.count, Outcome)
    numbers = iter([number for number in range(options.count) if number not in done])
    lock = threading.Lock()
    started = time.monotonic()

    def next_number() -> int | None:
        with lock:
            return next(numbers, None)

    def finish(outcome: Outcome) -> None:
        with lock:
            done[outcome.case] = outcome
            if log is not None:
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(outcome)) + "\n")
            if outcome.outcome != "ok":
                print(f"case {outcome.case}: {outcome.outcome}: {outcome.detail}", file=sys.stderr)
            if len(done) % 500 == 0:
                seconds = time.monotonic() - started
                print(f"{len(done)}/{options.count}, {seconds:.0f} s", file=sys.stderr)

    def work() -> None:
        with tempfile.TemporaryDirectory(prefix="onewan-cases-") as folder:
            worker = _Worker(make, run, Path(folder), options.seconds)
            try:
                for number in iter(next_number, None):
                    outcome = worker.outcome(number, first + number)
                    # Tried again, since a busy machine makes any case slow.
                    if outcome.outcome == "hang":
                        outcome = worker.outcome(number, first + number)
                    finish(outcome)
            finally:
                worker.stop()

    threads = [threading.Thread(target=work) for _ in range(options.jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [done[number] for number in sorted(done)]


def finished_cases(log: Path, first: int, count: int, kind: type[Case]) -> dict[int, Case]:
    """The cases in `log`, each a line of JSON with the fields of `kind`, that have the seeds of
    this call: `first` + case."""
    done: dict[int, Case] = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else []:
        try:
            outcome = kind(**json.loads(line))
        except (ValueError, TypeError):  # the last line of a killed process
            continue
        if outcome.case < count and outcome.seed == first + outcome.case:
            done[outcome.case] = outcome
    return done


def _summary(outcomes: Sequence[Outcome], options: argparse.Namespace) -> dict[str, Any]:
    def shown(some: Sequence[Outcome]) -> list[dict[str, Any]]:
        return [asdict(outcome) for outcome in some]

    failures = [outcome for outcome in outcomes if outcome.outcome != "ok"]
    slowest = sorted(outcomes, key=lambda outcome: -outcome.seconds)[:5]
    largest = sorted(outcomes, key=lambda outcome: -outcome.megabytes)[:5]
    return {
        "script": Path(sys.argv[0]).name,
        "seed": options.seed,
        "cases": len(outcomes),
        "outcomes": dict(Counter(outcome.outcome for outcome in outcomes).most_common()),
        "statuses": dict(Counter(str(outcome.status) for outcome in outcomes).most_common()),
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 1),
        "slowest": shown(slowest),
        "most_memory": shown(largest),
        "failures": len(failures),
        "failing": shown(failures[:100]),
        "reproduce": f"python {Path(sys.argv[0]).name} --seed {options.seed} --case N",
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def _show(make: Make, run: Run, seed: int, number: int, keep: Path | None) -> int:
    """Run one case in this process, with its output on the terminal."""
    with tempfile.TemporaryDirectory(prefix="onewan-case-") as temporary:
        folder = keep or Path(temporary, "case")
        folder.mkdir(parents=True)
        arguments = make(seed, folder)
        print(f"case {number}, seed {seed}, in {folder}:")
        print(json.dumps([argument[:500] for argument in arguments]))
        started = time.monotonic()
        status = run(arguments)
        print(f"status {status}, {time.monotonic() - started:.2f} s")
        return status


class _Worker:
    """A process that runs cases one by one; started when needed, killed when a case hangs."""

    def __init__(self, make: Make, run: Run, folder: Path, max_seconds: float) -> None:
        self._functions = make, run
        self._folder = folder
        self._max_seconds = max_seconds
        self._process: Any = None
        self._connection: Any = None  # its class differs between systems
        self._start_bytes = 0

    def outcome(self, number: int, seed: int) -> Outcome:
        """Run one case."""
        folder = self._folder / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        canary(folder).unlink(missing_ok=True)
        (self._folder / "output").write_bytes(b"")
        connection = self._started()
        connection.send((seed, str(folder)))
        started = time.monotonic()
        deadline, peak = started + MAX_SECONDS_TO_MAKE, 0
        kind, answer = "", {}
        while not kind:
            if connection.poll(0.05):
                try:
                    message = connection.recv()
                except EOFError:
                    kind = "died"
                    break
                if message == "made":
                    started = time.monotonic()
                    deadline = started + self._max_seconds
                else:
                    kind, answer = "answered", message
                    peak = max(peak, message["peak_bytes"] - self._start_bytes)
            elif time.monotonic() > deadline:
                kind = "hang"
            else:
                peak = max(peak, self._memory())
                if peak > MAX_MEMORY_MB * 1e6:
                    kind = "memory"
        seconds = time.monotonic() - started
        if kind == "answered":
            kind, detail = self._judged(answer, peak, canary(folder).exists())
        else:
            detail = self._end()
        return Outcome(
            case=number,
            seed=seed,
            outcome=kind,
            status=answer.get("status"),
            seconds=round(seconds, 3),
            megabytes=round(peak / 1e6, 1),
            detail=detail,
        )

    def stop(self) -> None:
        if self._process is not None:
            self._end()

    def _judged(self, answer: dict[str, Any], peak: int, has_canary: bool) -> tuple[str, str]:
        """(outcome, detail) of a case whose call has returned."""
        output = self._output()
        if answer["code"] or has_canary:
            return "code", ", ".join(answer["code"]) or "created the canary file"
        if peak > MAX_MEMORY_MB * 1e6:
            return "memory", output[:500]
        if answer["exception"]:
            return "exception", answer["exception"]
        if "Traceback (most recent call last)" in output:
            return "traceback", output[-2000:]
        if answer["status"] not in (0, 1, 2):
            return "status", f"{answer['status']}: {output[-2000:]}"
        if found := _CONTROL.search(output):
            return "control", repr(output[max(0, found.start() - 100) : found.end() + 100])
        if len(output) > MAX_OUTPUT_BYTES:
            return "long", f"{len(output)} characters: {output[:500]}"
        return "ok", ""

    def _started(self) -> Any:
        """The connection to the worker, which is started if there is none."""
        if self._connection is None:
            context = multiprocessing.get_context("spawn")
            self._connection, other = context.Pipe()
            arguments = (other, self._folder, *self._functions)
            self._process = context.Process(target=_work, args=arguments, daemon=True)
            self._process.start()
            other.close()
            if not self._connection.poll(MAX_SECONDS_TO_MAKE):
                raise RuntimeError("the worker does not start")
            self._start_bytes = self._connection.recv()
        return self._connection

    def _memory(self) -> int:
        """Bytes of resident memory above those of the worker's start."""
        try:
            return psutil.Process(self._process.pid).memory_info().rss - self._start_bytes
        except psutil.NoSuchProcess:
            return 0

    def _end(self) -> str:
        """Kill the worker; returns its exit code and the end of its output."""
        self._process.join(0.2)
        code = self._process.exitcode
        self._process.kill()
        self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._connection = self._process = None
        return f"exit code {code}: {self._output()[-2000:]}"

    def _output(self) -> str:
        with (self._folder / "output").open("rb") as file:
            return file.read(MAX_OUTPUT_BYTES + 1).decode("utf-8", "backslashreplace")


def _work(connection: Any, folder: Path, make: Make, run: Run) -> None:
    """The worker: announces its memory, then answers with the result of each case."""
    tempfile.tempdir = str(folder)
    # At the level of file descriptors, since FFmpeg and other libraries print too.
    handle = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    found: list[str] = []
    in_case = threading.Event()

    def audit(event: str, details: tuple[Any, ...]) -> None:
        if in_case.is_set() and event in _CODE_EVENTS and len(found) < 5:
            found.append(f"{_CODE_EVENTS[event]} ({event}: {str(details)[:200]})")

    sys.addaudithook(audit)
    connection.send(psutil.Process().memory_info().rss)
    for seed, case_folder in _received(connection):
        arguments = make(seed, Path(case_folder))
        _reset_peak()
        connection.send("made")
        status, exception = None, ""
        in_case.set()
        try:
            status = run(arguments)
        except SystemExit as end:  # wrong usage
            status = end.code if isinstance(end.code, int) else 1
        except BaseException as error:  # noqa: BLE001  (whatever escapes is what is looked for)
            exception = _described(error)
        in_case.clear()
        sys.stdout.flush()
        sys.stderr.flush()
        answer = {"status": status, "exception": exception, "code": list(found)}
        connection.send({**answer, "peak_bytes": _peak_bytes()})
        found.clear()


def _received(connection: Any) -> Iterator[tuple[int, str]]:
    with contextlib.suppress(EOFError):
        while True:
            yield connection.recv()


def _described(error: BaseException) -> str:
    """Class, message and the last places of an exception."""
    places = [
        f"{Path(frame.filename).name}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)[-6:]
    ]
    return f"{type(error).__name__}: {str(error)[:500]!r} ({' > '.join(places)})"


def _reset_peak() -> None:
    """Let the peak memory start from the present one (Linux; elsewhere it is that of the run)."""
    if os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    """Peak of resident memory since `_reset_peak`."""
    if os.path.exists("/proc/self/status"):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    return psutil.Process().memory_info().rss
