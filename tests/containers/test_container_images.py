"""What the images are built from, and what compose starts: linted and checked without an engine.

`scripts/check_containers.py` builds and runs them, which takes root and a quarter of an hour.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from ruamel.yaml import YAML

from onewan.cli import parse

ROOT = Path(__file__).parents[2]
FILES = {name: ROOT / "containers" / f"{name}.Dockerfile" for name in ("cuda", "rocm")}
both = pytest.mark.parametrize("name", FILES)


def stages(name: str) -> list[list[tuple[str, str]]]:
    """The (instruction, arguments) of each stage; those before the first FROM are left out."""
    text = FILES[name].read_text(encoding="utf-8")
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    found: list[list[tuple[str, str]]] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, _, arguments = line.partition(" ")
        if instruction == "FROM":
            found.append([])
        if found:
            found[-1].append((instruction, arguments.strip()))
    return found


def arguments(stage: list[tuple[str, str]], instruction: str) -> list[str]:
    return [rest for name, rest in stage if name == instruction]


@both
def test_hadolint_finds_nothing(name: str) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        message = "needs hadolint, which `make setup` installs where it exists"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    command = [hadolint, "--failure-threshold", "style", str(FILES[name])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_two_files_differ_in_the_accelerator_only() -> None:
    cuda, rocm = (FILES[name].read_text(encoding="utf-8").splitlines() for name in FILES)
    changed = [line for line in difflib.ndiff(cuda, rocm) if line[:2] in ("- ", "+ ")]
    instructions = [line for line in changed if not line[2:].startswith("#")]
    description = [line for line in instructions if "image.description" in line]
    index = [line for line in instructions if line not in description]
    assert [line[0] for line in description] == ["-", "+"]
    assert "CUDA" in description[0] and "ROCm" in description[1]
    # Without an index, pip takes the build for CUDA.
    assert len(index) == 1 and index[0].startswith('+ RUN test -n "$TORCH_INDEX"')


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps a file out: the last line that matches it, or a folder that it is
    in, decides (https://docs.docker.com/build/concepts/context/#dockerignore-files).
    """
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    places = [path, *(str(folder) for folder in PurePosixPath(path).parents)]
    ignored = False
    for pattern in (line for line in lines if line and not line.startswith("#")):
        parts = re.escape(pattern.removeprefix("!"))
        expression = parts.replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(expression, place) for place in places):
            ignored = not pattern.startswith("!")
    return ignored


@both
def test_everything_that_is_copied_is_there_and_not_ignored(name: str) -> None:
    build, final = stages(name)
    ours = [word for rest in arguments(build, "COPY") for word in rest.split()[:-1]]
    packed = {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "docs", "src"}
    assert packed == set(ours)
    files = [
        path.relative_to(ROOT).as_posix()
        for source in ours
        for path in [
            ROOT / source,
            *(ROOT / source).rglob("*.py"),
            *(ROOT / source).rglob("*.json"),
            *(ROOT / source).glob("*.md"),
        ]
        if path.is_file() and "__pycache__" not in path.parts
    ]
    assert len(files) > 100
    assert [path for path in files if is_ignored(path)] == []
    # The final stage takes nothing of the repository itself.
    assert all(rest.startswith("--from=build ") for rest in arguments(final, "COPY"))


@pytest.mark.parametrize(
    "path",
    [
        *("models/a.safetensors", "runs/run/events.jsonl", "clips/a.mp4", "run.yaml", ".env"),
        *(".git/config", ".venv/bin/python", "demo/run.yaml", "src/onewan/__pycache__/a.pyc"),
    ],
)
def test_clips_models_runs_and_secrets_stay_out_of_images(path: str) -> None:
    assert is_ignored(path)


@both
def test_the_environment_is_made_and_used_at_one_place(name: str) -> None:
    """Scripts of a virtual environment have its path in them."""
    build, final = stages(name)
    commands = " ".join(arguments(build, "RUN"))
    assert "python -m venv /opt/onewan" in commands
    assert "pip install --constraint constraints.txt" in commands
    assert arguments(final, "COPY") == ["--from=build /opt/onewan /opt/onewan"]
    for stage in (build, final):
        assert any("PATH=/opt/onewan/bin:$PATH" in rest for rest in arguments(stage, "ENV"))
    assert arguments(build, "FROM") == ["${PYTHON_IMAGE} AS build"]
    assert arguments(final, "FROM") == ["${PYTHON_IMAGE}"]


@both
def test_the_user_is_not_root_and_owns_the_volumes(name: str) -> None:
    final = stages(name)[1]
    assert arguments(final, "USER") == ["${UID}:${GID}"]
    assert {"UID=1000", "GID=1000"} <= set(arguments(final, "ARG"))
    volumes = YAML(typ="safe").load(arguments(final, "VOLUME")[0])
    made = next(rest for rest in arguments(final, "RUN") if "useradd" in rest)
    words = shlex.split(made.rpartition("install --directory")[2])
    assert words == ["--owner", "onewan", "--group", "onewan", *volumes]
    assert arguments(final, "WORKDIR")[0] in volumes
    for setting in shlex.split(arguments(final, "ENV")[0]):
        variable, _, value = setting.partition("=")
        if variable.endswith(("HOME", "DIR")):  # places that are written to
            assert value.startswith("/cache"), setting


@both
def test_an_image_is_the_command_onewan(name: str) -> None:
    final = stages(name)[1]
    entry, default = (
        YAML(typ="safe").load(arguments(final, instruction)[0])
        for instruction in ("ENTRYPOINT", "CMD")
    )
    assert entry == ["onewan"]
    with pytest.raises(SystemExit) as end:
        parse(default)
    assert end.value.code == 0


def compose() -> dict[str, Any]:
    return YAML(typ="safe").load((ROOT / "compose.yaml").read_text(encoding="utf-8"))


def test_the_compose_file_follows_its_specification() -> None:
    checker = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    command = [*checker, str(ROOT / "compose.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@both
def test_compose_builds_the_image_and_mounts_its_volumes(name: str) -> None:
    service = compose()["services"][name]
    final = stages(name)[1]
    known = {rest.partition("=")[0] for stage in stages(name) for rest in arguments(stage, "ARG")}
    assert (ROOT / service["build"]["dockerfile"]) == FILES[name]
    assert service["build"]["args"].keys() <= known
    mounted = {volume.rpartition(":")[2] for volume in service["volumes"]}
    assert mounted == set(YAML(typ="safe").load(arguments(final, "VOLUME")[0]))
    assert service["profiles"] == [name]  # so that `docker compose up` does not start both
    (secret,) = service["secrets"]
    assert service["environment"]["HF_TOKEN_PATH"] == f"/run/secrets/{secret}"


def test_each_service_has_its_gpu() -> None:
    services = compose()["services"]
    (device,) = services["cuda"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
    assert "devices" not in services["cuda"]
    assert services["rocm"]["devices"] == ["/dev/kfd", "/dev/dri"]
    assert "deploy" not in services["rocm"]


def test_the_hub_reads_the_token_from_the_file_and_goes_without_by_default(
    tmp_path: Path,
) -> None:
    default = re.fullmatch(r"\$\{HF_TOKEN_FILE:-(.+)\}", compose()["secrets"]["hf_token"]["file"])
    assert default
    assert default[1] == "/dev/null"  # a file of a secret has to exist
    token = tmp_path / "token"
    token.write_text("hf_example\n", encoding="utf-8")
    code = """
import sys
from huggingface_hub import constants, get_token
print(get_token())
constants.HF_TOKEN_PATH = sys.argv[1]
print(get_token())
"""
    others = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", code, default[1]],
        env={**others, "HF_TOKEN_PATH": str(token)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["hf_example", "None"]


def test_the_public_host_builds_both() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    job = YAML(typ="safe").load(text)["jobs"]["containers"]
    assert job["strategy"]["matrix"]["accelerator"] == list(FILES)
    commands = [step["run"].strip() for step in job["steps"] if "run" in step]
    assert commands[0].startswith("docker build --file containers/${{ matrix.accelerator }}.Docker")
    for command in commands[1:]:
        words = shlex.split(command)
        assert words[:4] == ["docker", "run", "--rm", "onewan"]
        parse(words[4:])
