"""A process of a run that is killed, hangs, fails or is stopped, and a machine that can't be
reached: the others end with a line about it, and the run can be continued."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from support.disturbed import (
    CONTINUES,
    ENDS_WITHIN,
    HOST,
    Disturbed,
    assert_states_whole,
    killed_line,
    slow_steps,
)
from support.equal_runs import Trainer
from support.rank_processes import Torchrun, count, wait_for
from support.runs import RunFile

from onewan.errors import DataError
from onewan.parallel import connection, meeting
from onewan.train.steps import Steps

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc of Linux are used"),
]

SETTINGS = [
    "train.steps=8",
    "train.save_every=2",
    "train.switch_expert_every=1",
    "train.keep_last=1",
    "validation={clips: 1, every: 2}",
    "wan_config.max_frames=1",
]


@pytest.fixture
def trainer(run_file: RunFile, tmp_path: Path) -> Trainer:
    return Trainer(run_file=run_file, folder=tmp_path, variant="t2v-a14b", settings=SETTINGS)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_at_any_moment(trainer: Trainer, killed: int) -> None:
    draw = random.Random(killed)
    kinds = ["encoding", "started", "validation", "step", "saved", "exported"]
    run = Disturbed.of(trainer, f"video_data.cache_dir={trainer.folder / 'empty'}")
    for kind in kinds:
        before = count(run.layout, kind)
        with run.start(before=slow_steps, resume=True) as processes:
            run.wait_for(kind, before, processes)
            time.sleep(draw.uniform(0, 0.05))
            processes.signal(killed, signal.SIGKILL)
            assert processes.status(1 - killed, ENDS_WITHIN) == 1, kind
            (line,) = processes.lines(1 - killed)
        assert line == killed_line(killed, 1 - killed)
        assert_states_whole(run.layout)
    run.finish()


def test_a_process_that_hangs_ends_the_others(trainer: Trainer) -> None:
    run = Disturbed.of(trainer, "train.steps=1000", "train.accumulation=3")
    with run.start(3, before=slow_steps) as processes:
        run.wait_for("step", 1, processes)
        processes.signal(1, signal.SIGSTOP)
        assert [processes.status(rank, ENDS_WITHIN) for rank in (0, 2)] == [1, 1]
        for rank in (0, 2):
            assert processes.lines(rank) == [
                f"onewan: rank 1 on {HOST} has given no sign of life for 15 s: it hangs or was "
                f"killed, or its machine can't be reached, so rank {rank} on {HOST} ends; "
                f"{CONTINUES}"
            ]
    assert "rank 1" in run.layout.log.read_text("utf-8").splitlines()[-1]
    assert count(run.layout, "failed") == 1


def _hang(rank: int) -> None:
    def hang(*given: object) -> None:
        del given
        threading.Event().wait()

    if rank == 1:
        Steps._train = hang  # pyright: ignore[reportAttributeAccessIssue]


def test_a_process_in_which_nothing_happens_ends_all(trainer: Trainer) -> None:
    """Its signs of life go on, since a thread gives them."""
    run = Disturbed.of(trainer, "parallel.timeout_minutes=0.1")
    with run.start(before=_hang) as processes:
        assert [processes.status(rank, 60) for rank in (0, 1)] == [1, 1]
        for rank, ends in ((0, f", so rank 0 on {HOST} ends"), (1, "")):
            (line,) = processes.lines(rank)
            assert line.startswith(
                f"onewan: rank 1 on {HOST} hangs: nothing has happened for 0.1 minutes "
                "(parallel.timeout_minutes) at threading.py:"
            )
            assert line.endswith(f"{ends}; {CONTINUES}")


def _fail(rank: int, error: Exception) -> None:
    def fail(*given: object) -> None:
        del given
        raise error

    if rank == 1:
        Steps._train = fail  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("error", "own", "status"),
    [
        (DataError("b.mp4: can't be read"), "onewan: b.mp4: can't be read", 1),
        (RuntimeError("a defect"), "onewan: ", 70),
    ],
)
def test_the_error_of_a_process_is_what_the_others_name(
    trainer: Trainer, error: Exception, own: str, status: int
) -> None:
    with Disturbed.of(trainer).start(before=functools.partial(_fail, error=error)) as processes:
        assert processes.status(0, ENDS_WITHIN) == 1
        assert processes.status(1, ENDS_WITHIN) == status
        assert processes.lines(0) == [
            f"onewan: rank 1 on {HOST} failed: {error}, so rank 0 on {HOST} ends; {CONTINUES}"
        ]
        assert processes.lines(1)[0].startswith(own)


@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_any_process_saves_on_all(trainer: Trainer, asked: int) -> None:
    run = Disturbed.of(trainer)
    with run.start(before=slow_steps) as processes:
        run.wait_for("step", 2, processes)
        processes.signal(asked, signal.SIGTERM)
        assert [processes.status(rank, ENDS_WITHIN) for rank in (0, 1)] == [130, 130]
        assert [processes.lines(rank) for rank in (0, 1)] == [[], []]
    saved = max(run.layout.saved_steps())
    for log in (run.layout.log, run.layout.rank_log(1)):
        assert f"stopped; the state of step {saved} is saved" in log.read_text("utf-8")
    run.finish()


@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_while_clips_are_encoded_ends_all(trainer: Trainer, asked: int) -> None:
    run = Disturbed.of(trainer, f"video_data.cache_dir={trainer.folder / 'empty'}")
    with run.start() as processes:
        run.wait_for("encoding", 0, processes)
        processes.signal(asked, signal.SIGTERM)
        assert [processes.status(rank, ENDS_WITHIN) for rank in (0, 1)] == [130, 130]
        assert [processes.lines(rank) for rank in (0, 1)] == [[], []]


def _impatient(rank: int) -> None:
    del rank
    connection.MEETING_SECONDS = 2.0


def _elsewhere(rank: int) -> None:
    _impatient(rank)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])


def _without_agent(rank: int) -> None:
    """The first process makes the store, as where torchrun does not start the processes."""
    del rank
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"


@pytest.mark.parametrize(
    ("before", "problem"),
    [
        (_elsewhere, "can't reach each other at 127.0.0.1:"),
        (_impatient, "not all 2 processes of the run have started: rank 1 did not within 2 s"),
        (_without_agent, "is used by another program on this machine"),
    ],
)
def test_processes_that_do_not_find_each_other_say_where(
    trainer: Trainer, before: Callable[[int], object], problem: str
) -> None:
    run = Disturbed.of(trainer)
    with run.start(1, before=functools.partial(_prepared, before=before)) as started:
        assert started.status(0, ENDS_WITHIN) == 1
        (line,) = started.lines(0)
    assert problem in line
    assert not run.layout.root.exists()


def _prepared(rank: int, before: Callable[[int], object]) -> None:
    os.environ["WORLD_SIZE"] = "2"
    before(rank)


def _killed_at(rank: int, killed: int, moment: str) -> None:
    """The process `killed` is killed instead of what it does first in its connection."""

    def die(*given: object, **named: object) -> None:
        del given, named
        os.kill(os.getpid(), signal.SIGKILL)

    connection.MEETING_SECONDS = 5.0
    if rank == killed:
        owner = meeting.Meeting if moment in {"__init__", "complete"} else dist
        setattr(owner, moment, die)


@pytest.mark.parametrize(
    ("moment", "killed"),
    [
        ("__init__", 1),
        ("complete", 0),
        ("init_process_group", 0),
        ("init_process_group", 1),
        ("new_group", 1),
    ],
)
def test_a_process_that_is_killed_before_all_are_connected_ends_the_others(
    trainer: Trainer, moment: str, killed: int
) -> None:
    before = functools.partial(_killed_at, killed=killed, moment=moment)
    with Disturbed.of(trainer).start(before=before) as processes:
        assert processes.status(1 - killed, ENDS_WITHIN) == 1
        (line,) = processes.lines(1 - killed)
    # Nobody knows more of a process that has not come, or of a first one that answers nobody.
    if moment in {"__init__", "complete"}:
        assert f"of the run have started: rank {killed} did not within 5 s" in line
    else:
        assert line == killed_line(killed, 1 - killed)


def test_torchrun_starts_a_run_again_that_continues(trainer: Trainer) -> None:
    """After the first process was killed and after the last one was; torchrun keeps its store."""
    longer = ["train.steps=80", "train.save_every=10", "validation={clips: 0, share: 0}"]
    disturbed = Disturbed.of(trainer, *longer)
    options = ["--nproc-per-node=2", "--max-restarts=2", "--rdzv-backend=c10d"]
    options += ["--rdzv-endpoint=localhost:0"]
    with Torchrun(trainer.folder / "out.txt", options, disturbed.continued) as run:
        for killed in (0, 1):
            disturbed.wait_for("saved", killed, run)
            os.kill(run.ranks()[killed], signal.SIGKILL)
            disturbed.wait_for("started", killed + 1, run)
        assert run.process.wait(60) == 0, run.text
        assert len(run.lines()) == 2, run.text
    assert count(disturbed.layout, "resumed") == 2
    disturbed.assert_as_undisturbed()


ADDRESSES = {"a": "10.213.77.1", "b": "10.213.77.2"}
"""Of two machines, on the link between them."""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Callable[[str], list[str]]]:
    """Two network namespaces with a link between them, `onewan-a` and `onewan-b`; the command
    that runs one on a machine."""
    name = f"onewan{os.getpid()}"
    (tmp_path / "hosts").write_text(
        "".join(f"{address} machine-{end}\n" for end, address in ADDRESSES.items())
    )
    try:
        for end in ADDRESSES:
            _ip("netns", "add", f"{name}-{end}")
        link = ["link", "add", "toa", "netns", f"{name}-a", "type", "veth"]
        _ip(*link, "peer", "name", "tob", "netns", f"{name}-b")
        for end, address in ADDRESSES.items():
            _ip("-n", f"{name}-{end}", "addr", "add", f"{address}/24", "dev", f"to{end}")
            for device in ("lo", f"to{end}"):
                _ip("-n", f"{name}-{end}", "link", "set", device, "up")

        def inside(end: str) -> list[str]:
            script = (
                f"hostname machine-{end} && mount --bind {tmp_path / 'hosts'} /etc/hosts && "
                f'GLOO_SOCKET_IFNAME=to{end} exec "$@"'
            )
            namespace = ["ip", "netns", "exec", f"{name}-{end}"]
            return [*namespace, "unshare", "--uts", "--mount", "sh", "-c", script, "sh"]

        subprocess.run([*inside("a"), "true"], check=True, capture_output=True)
        yield inside
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", "") or error
        pytest.skip(f"network namespaces can't be made here: {why}")
    finally:
        for end in ADDRESSES:
            with contextlib.suppress(FileNotFoundError, subprocess.CalledProcessError):
                _ip("netns", "delete", f"{name}-{end}")


def test_a_machine_that_can_not_be_reached_ends_all(
    trainer: Trainer, machines: Callable[[str], list[str]]
) -> None:
    """Also the process on the machine without the store, through which the others are watched."""
    longer = ["train.steps=1000", "train.save_every=10", "validation={clips: 0, share: 0}"]
    disturbed = Disturbed.of(trainer, *longer)
    where = f"--rdzv-endpoint={ADDRESSES['a']}:29417"
    options = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", where]

    def start(stack: contextlib.ExitStack, end: str, command: list[str]) -> Torchrun:
        own = [*options, f"--local-addr={ADDRESSES[end]}"]
        printed = trainer.folder / f"{end}.txt"
        return stack.enter_context(Torchrun(printed, own, command, inside=machines(end)))

    with contextlib.ExitStack() as stack:
        a, b = (start(stack, end, disturbed.command) for end in ADDRESSES)
        disturbed.wait_for("saved", 1, a)
        cut = [*machines("b"), "ip", "link", "set", "tob", "down"]
        subprocess.run(cut, check=True, capture_output=True)
        wait_for(lambda: a.lines() and b.lines(), ENDS_WITHIN, "the lines of both")
        (at_a,), (at_b,) = a.lines(), b.lines()
    first_is_a = "rank 0 on machine-a ends" in at_a
    assert f"so rank {0 if first_is_a else 1} on machine-a ends; {CONTINUES}" in at_a
    assert "on machine-b has given no sign of life for 15 s" in at_a
    assert "on machine-a ended or can't be reached: the store of the run, which is there" in at_b
    assert_states_whole(disturbed.layout)

    heal = [*machines("b"), "ip", "link", "set", "tob", "up"]
    subprocess.run(heal, check=True, capture_output=True)
    saved = max(disturbed.layout.saved_steps())
    with contextlib.ExitStack() as stack:
        command = [*disturbed.continued, f"train.steps={saved + 4}"]
        a, b = (start(stack, end, [*command, "--allow-change"]) for end in ADDRESSES)
        assert [a.process.wait(90), b.process.wait(90)] == [0, 0], a.text + b.text
    assert f"resumed after step {saved}" in a.text + b.text
