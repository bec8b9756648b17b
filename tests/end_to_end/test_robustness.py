"""The harness of `benchmarks/robustness` finds what it looks for, and its scripts of cases run.

Only a few cases of each script run here; thousands of them take minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.long

FOLDER = Path(__file__).parents[2] / "benchmarks" / "robustness"

CASES = '''
"""One case of each kind."""
import os, subprocess, sys, time, pickle
from harness import canary, run_cases

def make(seed, folder):
    return [str(seed), str(canary(folder))]

def run(arguments):
    number, canary = arguments
    def one(): return 1
    def two(): sys.exit(2)
    def wrong_status(): return 3
    def escapes(): raise KeyError("x")
    def prints(): print("Traceback (most recent call last):"); return 0
    def control(): print("name\\x1b[2J"); return 0
    def long(): print("x" * 300_000); return 0
    def program(): subprocess.run([sys.executable, "-c", ""]); return 0
    def unpickles(): pickle.loads(b"cos\\nsystem\\n."); return 0
    def canary_file(): open(canary, "w").close(); return 0
    def memory(): bytearray(600_000_000)[:] = b"x" * 600_000_000; return 0
    def hangs(): time.sleep(60)
    def dies(): os._exit(9)
    return [one, two, wrong_status, escapes, prints, control, long, program, unpickles,
            canary_file, memory, hangs, dies, one][int(number)]()

if __name__ == "__main__":
    run_cases(__doc__, make, run)
'''
EXPECTED = [
    *("ok", "ok", "status", "exception", "traceback", "control", "long"),
    *("code", "code", "code", "memory", "hang", "died", "ok"),
]


def result_of(script: Path, out: Path, *arguments: str) -> dict[str, Any]:
    """The result that a script of cases writes to `out`."""
    done = subprocess.run(
        [sys.executable, str(script), "--out", str(out), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert out.is_file(), done.stderr
    return json.loads(out.read_text(encoding="utf-8"))


def test_each_kind_of_failure_is_found_and_finished_cases_are_not_repeated(tmp_path: Path) -> None:
    script, out = tmp_path / "cases.py", tmp_path / "out.json"
    script.write_text(CASES, encoding="utf-8")
    result = result_of(script, out, "--count", str(len(EXPECTED)), "--seconds", "3")
    log = tmp_path / "out.json.cases.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [line["outcome"] for line in lines] == EXPECTED
    assert result["failures"] == len(EXPECTED) - EXPECTED.count("ok")

    again = result_of(script, out, "--count", str(len(EXPECTED)), "--seconds", "3")
    assert again == result
    assert len(log.read_text(encoding="utf-8").splitlines()) == len(EXPECTED)


@pytest.mark.skipif(sys.platform == "win32", reason="the cases have FIFOs and other POSIX files")
@pytest.mark.parametrize("script", ["run_files.py", "clips.py", "checkpoints.py"])
def test_the_first_cases_of_each_script_end_well(script: str, tmp_path: Path) -> None:
    result = result_of(FOLDER / script, tmp_path / "out.json", "--count", "12")
    assert result["cases"] == 12
    assert result["failing"] == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each start would load torch again")
def test_the_first_killed_command_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    result = result_of(FOLDER / "kills.py", tmp_path / "out.json", "--count", "1")
    assert result["kills"] >= 1 and result["outcomes"] == {"ok": 1}, result["failing"]
