"""Curves and sample videos on Weights & Biases, in its offline mode."""

from __future__ import annotations

import json
import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from support.runs import SMALL_SAMPLE, RunFile, layout_of, recorder

from onewan.config.load import dump_run, load_run
from onewan.errors import ConfigError
from onewan.runs.events import Event, StepDone
from onewan.train.trainer import WanTrainer

pytest.importorskip("wandb", reason="needs onewan[wandb]")


@pytest.fixture(autouse=True)
def _no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may use the account of whoever runs it."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def history(folder: Path) -> list[dict[str, Any]]:
    """The records in the files of offline runs, in the order of their start."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    wandb.teardown()  # its service may still be writing
    found: list[dict[str, Any]] = []
    for file in sorted(folder.glob("offline-run-*/*.wandb")):
        store = DataStore()
        store.open_for_scan(str(file))
        while (data := store.scan_data()) is not None:
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                found.append(
                    {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
                )
    return found


def test_a_resumed_run_continues_the_same_run_of_wandb(
    run_file: RunFile, capfd: pytest.CaptureFixture[str]
) -> None:
    small = [f"sample.{key}={value}" for key, value in SMALL_SAMPLE.items()]
    chosen = ["validation.clips=1", "logging.wandb={mode: offline, project: foxes}", *small]
    events: list[dict[str, Any]] = []
    first = run_file("ti2v-5b", "train.steps=2", *chosen)
    WanTrainer(first, listen=recorder(events)).fit()
    longer = run_file("ti2v-5b", "train.steps=3", *chosen)
    WanTrainer(longer, resume=True).fit()
    folder = layout_of(first).wandb
    own_id = (folder / "id.txt").read_text(encoding="utf-8").strip()
    runs = sorted(path.name for path in folder.glob("offline-run-*"))
    # W&B numbers folders of the same second.
    assert len(runs) >= 1 and all(re.search(rf"-{own_id}(-\d+)?$", name) for name in runs)
    records = history(folder)
    losses = {r["step"]: r["loss/single"] for r in records if "loss/single" in r}
    trained = {e["step"]: e["loss"] for e in events if e["event"] == "step"}
    assert sorted(losses) == [1, 2, 3]
    assert {step: losses[step] for step in trained} == pytest.approx(trained)
    percent = [r for r in records if "validation_percent_against_base/single" in r]
    assert [r["step"] for r in percent] == [0, 2, 3]
    videos = [r for r in records if r.get("samples/0._type") == "video-file"]
    assert [(v["step"], v["samples/0.caption"]) for v in videos] == [(2, "a"), (3, "a")]
    (note,) = [e["text"] for e in events if e["event"] == "note"]
    assert "W&B: offline" in note and "wandb sync" in note
    assert "wandb" not in capfd.readouterr().err  # it prints nothing of its own


def test_true_is_the_section_with_its_defaults(run_file: RunFile, tmp_path: Path) -> None:
    config = run_file("ti2v-5b", "logging.wandb=true")
    assert config.logging.wandb is not None and config.logging.wandb.project == "onewan"
    assert run_file("ti2v-5b", "logging.wandb=false").logging.wandb is None
    dumped = tmp_path / "again.yaml"
    dumped.write_text(dump_run(config), encoding="utf-8")
    assert load_run(dumped) == config


def test_a_missing_account_or_package_is_refused_before_anything_is_written(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_file("ti2v-5b", "train.steps=1", "logging.wandb=true")
    with pytest.raises(ConfigError, match=r"logging\.wandb: no W&B account .* `wandb login`"):
        WanTrainer(config).fit()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"logging\.wandb: needs the package wandb .*pip install"):
        WanTrainer(config).fit()
    assert not layout_of(config).root.exists()


def test_a_server_that_is_not_reached_does_not_end_the_run(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the port "discard"
    events: list[dict[str, Any]] = []
    record = recorder(events)

    def listen(event: Event) -> None:
        record(event)
        if isinstance(event, StepDone):  # training itself waits for no answer
            for thread in threading.enumerate():
                if thread.name == "onewan-wandb":
                    thread.join(20)

    config = run_file("ti2v-5b", "train.steps=2", "logging.wandb=true")
    WanTrainer(config, listen=listen).fit()
    warnings = [e["text"] for e in events if e["event"] == "warning"]
    assert len(warnings) == 1 and warnings[0].startswith(
        "W&B: failed (http://127.0.0.1:9 can't be reached: "
    )
    assert events[-1]["event"] == "finished"
