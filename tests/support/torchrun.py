"""Runs of several processes: by torchrun itself, and in processes that are started as it starts
them, but from one that has imported PyTorch already."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from onewan.config.load import load_run
from onewan.errors import Interrupted
from onewan.runs.control import order, request
from onewan.runs.events import Event, StepDone
from onewan.train.trainer import WanTrainer
from support.runs import layout_of, recorder

_T = TypeVar("_T")

MODULE = [sys.executable, "-m", "torch.distributed.run"]
"""torchrun, of the interpreter of the tests."""


def torchrun(
    processes: int, *arguments: str, seconds: float = 240
) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node PROCESSES -m onewan ARGUMENTS`, with what it printed."""
    # A port that is free, so that tests can run side by side.
    own = ["--nproc-per-node", str(processes), "--rdzv-backend", "c10d"]
    own += ["--rdzv-endpoint", "localhost:0"]
    return subprocess.run(
        [*MODULE, *own, "-m", "onewan", *arguments],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def together(
    processes: int, work: Callable[..., _T], *arguments: Any, seconds: float = 240
) -> list[_T]:
    """What `work(*arguments)` returns in each of so many processes, by rank.

    They have the environment that torchrun gives them, and its store, which is in this process. If
    one of them fails, or takes longer, an AssertionError has what each has to say.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context: Any = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    if sys.platform != "win32":
        context.set_forkserver_preload(["onewan.train.trainer"])
    started = []
    for rank in range(processes):
        receiver, sender = context.Pipe(duplex=False)
        environment = environment_of(rank, processes, store.port)
        process = context.Process(target=_run, args=(sender, environment, work, arguments))
        process.start()
        sender.close()
        started.append((process, receiver))
    until = time.monotonic() + seconds
    answers = list[tuple[str, Any]]()
    try:
        answers += [_answer(receiver, until) for _, receiver in started]
    finally:
        for process, _ in started:
            if len(answers) < processes or any(kind == "failed" for kind, _ in answers):
                process.kill()
            process.join()
    failed = {rank: text for rank, (kind, text) in enumerate(answers) if kind == "failed"}
    assert not failed, "\n".join(f"rank {rank}: {text}" for rank, text in failed.items())
    return [value for _, value in answers]


def _answer(receiver: Connection, until: float) -> tuple[str, Any]:
    """How a process has ended, and what it returns or why it failed."""
    try:
        if not receiver.poll(max(0, until - time.monotonic())):
            return "failed", "takes too long"
        return pickle.loads(receiver.recv_bytes())
    except EOFError:
        return "failed", "ended without an answer"


def environment_of(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun sets, as far as PyTorch and onewan read it."""
    return {
        **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
        **{name: str(processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _run(
    sender: Connection,
    environment: dict[str, str],
    work: Callable[..., Any],
    arguments: Sequence[Any],
) -> None:
    os.environ |= environment
    try:
        answer = "done", work(*arguments)
    except BaseException:  # noqa: BLE001  (for the test to report)
        answer = "failed", traceback.format_exc()
    # Plain pickle: that of multiprocessing leaves tensors in memory of a process that ends.
    sender.send_bytes(pickle.dumps(answer))


def train(
    run_yaml: Path,
    overrides: Sequence[str] = (),
    resume: bool = False,
    stop_after: int | None = None,
    change_after: tuple[int, dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Train a run file to its end, or until it has saved after the step `stop_after`, in this
    process or, with `together`, in several; what this process has heard of, which is nothing but in
    the first one. After the step of `change_after`, its settings are ordered."""
    config = load_run(run_yaml, list(overrides))
    heard: list[dict[str, Any]] = []

    def listen(event: Event) -> None:
        recorder(heard)(event)
        if isinstance(event, StepDone) and event.step == stop_after:
            request(layout_of(config), "stop")
        if isinstance(event, StepDone) and change_after and event.step == change_after[0]:
            order(layout_of(config), "settings", change_after[1])

    trainer = WanTrainer(config, listen=listen, resume=resume)
    try:
        trainer.fit()
    except Interrupted:
        assert stop_after is not None
    return heard
