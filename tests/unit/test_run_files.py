"""The run files in configs/: those that `onewan init` writes, each loaded, planned and tried."""

from __future__ import annotations

import json
import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onewan.cli import main
from onewan.cli.plan import plan_of
from onewan.config.load import load_run
from onewan.demo.clips import write_clips
from onewan.presets.run_files import (
    CARDS_GB,
    RunFile,
    as_listed,
    listed,
)
from onewan.train.dry_run import dry_run

ROOT = Path(__file__).resolve().parents[2]


def _script() -> Any:
    spec = spec_from_file_location("write_configs", ROOT / "scripts" / "write_configs.py")
    assert spec is not None and spec.loader is not None
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


CONFIGS = ROOT / "configs"
ROWS = listed()
write_configs = _script()
SAMPLE = [
    row
    for row in ROWS
    if (row.variant, row.method, row.card_gb)
    in (
        ("t2v-a14b", "lora", 24),
        ("fun-control-a14b", "embedding", 32),
        ("ti2v-5b", "fine_tune", 12),
    )
]
"""Tried with each change; all are in the long tests."""
each_long = [pytest.param(row, marks=[] if row in SAMPLE else pytest.mark.long) for row in ROWS]


def test_there_is_a_file_for_each_row_of_the_table() -> None:
    assert {row.file for row in ROWS} == {
        path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml")
    }
    order = list(write_configs.all_combinations())
    places = [order.index((row.variant, row.method, row.card_gb)) for row in ROWS]
    assert places == sorted(set(places)) and len(places) > 100
    assert {row.host_gb for row in ROWS} == set(write_configs.HOSTS_GB)
    assert (CONFIGS / "README.md").read_text(encoding="utf-8") == write_configs.readme(ROWS)


@pytest.mark.parametrize("row", each_long, ids=lambda row: row.file)
def test_each_is_what_init_writes_and_a_start_finds_no_problem_in_it(
    row: RunFile, tmp_path: Path, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python scripts/write_configs.py` writes them all."""
    path = CONFIGS / row.file
    again = write_configs.made(row.variant, row.method, row.card_gb)
    assert again == (row, path.read_text(encoding="utf-8"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**15))
    shutil.copytree(clips, tmp_path / "clips")
    copy = tmp_path / path.name
    copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    given = ["video_data.min_resolution=[16, 16]", f"memory.ram={row.host_gb}GB"]
    if load_run(copy).model.text_encoder:  # a file that is to be put beside the run file
        given.append("model.text_encoder=Comfy-Org/umt5_xxl_fp8_e4m3fn_scaled")
    config = load_run(copy, given)
    assert plan_of(config).fits
    found = dry_run(config)
    # Of an optimizer in a package that may not be installed here.
    assert [text for text in found.problems if "needs the package" not in text] == []
    assert found.plan is not None and found.overview is not None


def test_there_is_none_for_what_does_not_fit() -> None:
    assert write_configs.made("t2v-a14b", "fine_tune", 4) is None


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder)
    return folder


# -------------------------------------------------------------------------------- init --list


def test_init_lists_what_fits_which_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ROWS) + 4
    assert lines[0].split() == ["variant", "method", "card", "clips", "weights", "step", "host"]
    assert lines[1].startswith("t2v-a14b") and "lora" in lines[1] and "12 GB" in lines[1]
    assert max(map(len, lines)) <= 100
    # The largest card that is no larger than the device.
    chosen = ["--variant", "ti2v-5b", "--method", "lora", "--vram", "31GB"]
    assert main(["init", "--list", *chosen, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["run_files"]
    assert (found["file"], found["card_gb"]) == ("ti2v-5b/lora_24gb.yaml", 24)
    assert found["frames"] == 121 and 0 < found["device_bytes"] < 24e9
    assert main(["init", "--list", "--vram", "8GB"]) == 1
    assert "--vram: the smallest device with a run file has 12.0 GB" in capsys.readouterr().err


def test_a_refusal_names_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--method", "fine_tune", "--vram", "24GB", "--ram", "64GB"]
    assert main(["init", *given]) == 1
    err = capsys.readouterr().err
    assert "not even the smallest clips of t2v-a14b fit with fine_tune" in err
    assert "fine_tune of t2v-a14b fits a device of 12 GB with 128 GB of host memory" in err
    assert "with this memory these methods of t2v-a14b fit: lora, dora, loha, lokr, oft" in err


@pytest.mark.parametrize(
    "options", [["--json"], ["--list", "dog.yaml"], ["--list", "--ram", "1GB"]]
)
def test_options_that_do_not_belong_together_are_wrong_usage(options: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["init", *options])
    assert error.value.code == 2


def test_a_row_is_written_as_it_is_read() -> None:
    text = as_listed(ROWS[:2])
    assert [RunFile(**row) for row in json.loads(text)] == ROWS[:2]
    assert text.count("\n") == 4 and CARDS_GB[0] == ROWS[0].card_gb
