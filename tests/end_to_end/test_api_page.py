"""The examples of docs/api.md, run in the order of the page in the demonstration's folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from onewan.demo import run_file_text
from onewan.demo.clips import write_clips
from onewan.demo.tiny_model import write_tiny_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"


@pytest.mark.long
def test_the_examples_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_model(tmp_path / "model", "t2v-a14b")
    write_clips(tmp_path / "clips")
    (tmp_path / "run.yaml").write_text(run_file_text("t2v-a14b"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.M)
    assert len(examples) >= 5
    names: dict[str, Any] = {}
    printed: list[str] = []
    for number, example in enumerate(examples):
        exec(compile(example, f"{PAGE.name}, example {number + 1}", "exec"), names)
        printed.append(capsys.readouterr().out)
    # What the page says that they print, and what each is for.
    assert names["losses"].keys() == {"high", "low"}
    assert printed[1].split("\n")[0] == "[1, 2] [2]"
    assert printed[2] == "(5, 96, 96, 3) uint8\n" and "# (5, 96, 96, 3) uint8" in examples[2]
    assert re.fullmatch(r"\d+ layers of rank 32\n", printed[3])
    assert Path("style_kohya.safetensors").is_file()
    assert "LoRA" in printed[4]
