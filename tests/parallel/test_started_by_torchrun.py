"""A run that torchrun itself starts, and one that it does not."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from support.equal_runs import Trainer, assert_equal, notes
from support.runs import RunFile, layout_of
from support.torchrun import torchrun

from onewan.devices import HOST
from onewan.errors import ConfigError
from onewan.parallel.ranks import Alone, is_started_by_torchrun, join
from onewan.runs.event_file import read_events


def test_torchrun_trains_both_experts_at_the_same_time(run_file: RunFile, tmp_path: Path) -> None:
    settings = ["train.steps=2", "train.switch_expert_every=1", "wan_config.max_frames=1"]
    trainer = Trainer(run_file=run_file, folder=tmp_path, variant="t2v-a14b", settings=settings)
    one = trainer.train("one")
    two = run_file("t2v-a14b", *settings, f"output.dir={tmp_path / 'two'}")
    done = torchrun(2, "train", str(layout_of(one).resolved), f"output.dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    assert "2 processes, both experts trained at the same time" in notes(two)
    assert_equal(one, two)
    (found,) = [e for e in read_events(layout_of(two).events) if e["event"] == "processes"]
    assert found["experts"] == [["high"], ["low"]]
    assert found["hostnames"] == [socket.gethostname()] * 2
    assert found["devices"] == ["cpu"] * 2
    assert len(set(found["pids"])) == 2
    assert found["clocks_ahead"][0] == 0 and abs(found["clocks_ahead"][1]) < 5
    assert "steps" in layout_of(two).rank_log(1).read_text("utf-8")


def test_one_process_connects_with_nothing(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where torchrun has started one process only."""
    monkeypatch.setitem(sys.modules, "onewan.parallel.connection", None)  # importing it fails
    settings = ["train.steps=1", "wan_config.max_frames=1"]
    trainer = Trainer(run_file=run_file, folder=tmp_path, variant="ti2v-5b", settings=settings)
    one = trainer.train("one")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    assert is_started_by_torchrun()
    assert_equal(one, trainer.train("again"))


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR: is missing"),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK: is 'zero', and should be a number"),
    ],
)
def test_an_environment_that_is_not_torchruns_is_refused(
    environment: dict[str, str], problem: str
) -> None:
    with pytest.raises(ConfigError) as error, join(HOST, 1.0, environment):
        pass
    assert problem in error.value.problems


def test_an_environment_without_torchrun_is_one_process() -> None:
    with join(HOST, 1.0, {"LOCAL_RANK": "0"}) as ranks:
        assert isinstance(ranks, Alone)
        assert ranks.gathered("mine") == ["mine"] and ranks.from_first("mine") == "mine"
