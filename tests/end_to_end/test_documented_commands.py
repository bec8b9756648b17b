"""Every command that the documentation shows, run in a folder where what it names is tiny.

The commands of a page run in its order, in a copy of `sandbox`. What `onewan init` writes is made
small before the next command reads it. `NOT_RUN` in `support.documented` lists the programs that
are not run, with the reason; of make, pip, python and torchrun, what they name is looked up.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from support.documented import (
    CHECKED,
    LANGUAGES,
    NOT_RUN,
    PAGES,
    ROOT,
    Command,
    block_commands,
    blocks,
    inline_commands,
)
from support.onetrainer_stub import write_checkout, write_packages
from support.other_program_files import as_gguf
from torch.distributed.run import get_args_parser

from onewan.cli import main, parse
from onewan.cli.parser import _parser
from onewan.demo.clips import write_clips
from onewan.demo.tiny_model import write_tiny_model
from onewan.formats.weights import open_component
from onewan.presets.starter import COMFYUI_FILES

SMALL = """
wan_config: {max_frames: 5}
video_data: {sources: clips, resolution: [64, 48], min_resolution: [32, 32]}
method: {kind: lora, rank: 2}
train: {steps: 2, save_every: 500, switch_expert_every: 1}
validation: {clips: 1, timesteps: 1}
sample: {width: 64, height: 48, frames: 5, steps: 1, prompts: [a fox], at_start: false}
"""
"""The settings of every run file but its model, so that a run takes a second."""
MODEL = "model: {path: model, variant: t2v-a14b, dtype: float32}\n"
RUN_FILES = ("surf.yaml", "mira.yaml", "dog.yaml", "run.yaml")
ADDED: Mapping[str, list[str]] = {
    "caption": ["--dry-run"],  # there is no server
    "sample Wan-AI/Wan2.2-T2V-A14B-Diffusers": [
        *("--width", "64", "--height", "48", "--frames", "5", "--steps", "1"),
    ],
    "train config.json": ["output.name=imported"],
}
"""Arguments that are added to commands that begin so."""
ELSEWHERE = {"demo": "test_demo_and_readme.py", "serve": "tests/web/test_serve.py"}
"""Commands that another test runs, since they take a minute or do not end by themselves."""
STATUS: Mapping[str, tuple[int, ...]] = {
    "doctor": (0, 1),  # 1 where the machine that runs the test lacks something
}
"""Exit statuses that are not errors, other than 0."""


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the pages name: models in several formats, clips, run files."""
    folder = tmp_path_factory.mktemp("sandbox")
    model = write_tiny_model(folder / "model", "t2v-a14b", width=128, layers=1)
    shutil.copytree(model, folder / "Wan-AI" / "Wan2.2-T2V-A14B-Diffusers")
    for name, file in COMFYUI_FILES["t2v-a14b"].items():
        (source,) = (model / name).glob("*.safetensors")
        target = folder / "ComfyUI" / "models" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    write_clips(folder / "clips")
    for name in RUN_FILES:
        (folder / name).write_text(MODEL + SMALL, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["convert", "model", "Wan2.2-T2V-A14B", "--to", "official"]) == 0
        high = open_component(Path("Wan2.2-T2V-A14B/high_noise_model"))
        as_gguf({name: high.read(name) for name in high.entries}, Path("high_noise.gguf"))
        assert main(["train", "run.yaml", "output.name=style", "output.dir=earlier"]) == 0
    for expert in ("high", "low"):
        lora = folder / f"earlier/style/weights/style_000002_{expert}_noise.safetensors"
        for name in (f"style_{expert}_noise", f"style_002000_{expert}_noise"):
            shutil.copy(lora, folder / f"{name}.safetensors")
    shutil.copy(folder / "style_high_noise.safetensors", folder / "style.safetensors")
    checkout = folder / "OneTrainer"
    checkout.mkdir()
    write_checkout(checkout)
    write_packages(checkout / "venv/lib/python3.11/site-packages")
    config = {
        **{"__version": 11, "model_type": "WAN_2_2", "training_method": "LORA"},
        **{"base_model_name": "model", "train_dtype": "FLOAT_32", "train_device": "cpu"},
        **{"output_model_format": "COMFY_LORA", "output_model_destination": "out.safetensors"},
        **{"workspace_dir": "workspace", "cache_dir": "cache", "resolution": "64", "frames": "5"},
        **{"concepts": [{"path": "clips"}], "samples": [], "epochs": 1, "lora_rank": 2},
    }
    for name in ("config.json", "#preset.json"):
        (folder / name).write_text(json.dumps(config), encoding="utf-8")
    return folder


def with_commands() -> list[Path]:
    return [page for page in PAGES if any(c.program == "onewan" for c in block_commands(page))]


@pytest.mark.long
@pytest.mark.parametrize("page", with_commands(), ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_work_in_its_order(
    page: Path, sandbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "page"
    shutil.copytree(sandbox, folder)
    monkeypatch.chdir(folder)
    for command in block_commands(page):
        if command.program == "onewan" and command.words[1] not in ELSEWHERE:
            run(command)


def run(command: Command) -> None:
    """Run the command; AssertionError with what it printed if it fails."""
    words = command.words[1:]
    if words[0] == "init" and not words[1].startswith("-"):
        Path(words[1]).unlink(missing_ok=True)
    line = " ".join(words)
    words += [w for start, added in ADDED.items() if line.startswith(start) for w in added]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    allowed = STATUS.get(words[0], (0,))
    assert status in allowed, f"{command}\nexit status {status}\n{out.getvalue()}{err.getvalue()}"
    if command.output:
        Path(command.output).write_text(out.getvalue(), encoding="utf-8")
    if words[0] == "init" and not words[1].startswith("-"):
        make_small(Path(words[1]))


def make_small(run_file: Path) -> None:
    """Keep the model of a run file that `onewan init` wrote, and replace all other settings."""
    text = run_file.read_text(encoding="utf-8")
    model = text[text.index("model:") : text.index("wan_config:")]
    if "text_encoder:" in model:  # the tokenizer of the real file is within it
        model = model.replace("model:\n", "model:\n  tokenizer: model/tokenizer\n")
    run_file.write_text(model + SMALL, encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_exist(page: Path) -> None:
    for command in block_commands(page):
        assert command.program in CHECKED or command.program in NOT_RUN, command
        if command.program == "onewan":
            parse(command.words[1:])
        elif command.program == "torchrun":
            check_torchrun(command)
        elif command.program == "make":
            check_make(command)
        elif command.program == "pip":
            check_pip(command)
        elif command.program == "python" and command.words[1] != "-m":
            assert (ROOT / command.words[1]).is_file(), command
    for command in inline_commands(page):
        check_options(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_of_commands_are_marked_as_such(page: Path) -> None:
    for line, language, body in blocks(page):
        if language not in LANGUAGES:
            first = body.split()[0].removeprefix("$") if body.split() else ""
            assert first not in (*CHECKED, *NOT_RUN), f"{page.name}:{line}: the block needs `bash`"


def check_torchrun(command: Command) -> None:
    """It has its options, and starts a command of onewan."""
    options = get_args_parser().parse_args(command.words[1:])
    assert options.module and options.training_script == "onewan", command
    parse(options.training_script_args)


def check_make(command: Command) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    variables = re.findall(r"\$\((\w+)\)", (ROOT / "Makefile").read_text("utf-8"))
    for word in command.words[1:]:
        name, _, value = word.partition("=")
        assert name in (variables if value else targets), command


def check_pip(command: Command) -> None:
    """What is in brackets behind onewan or a folder is an extra of the package."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras = re.findall(r"^(\w+) = \[", section, re.MULTILINE)
    for given in re.findall(r"(?:onewan|\.)\[([\w,]+)\]", command.text):
        assert set(given.split(",")) <= set(extras), command


def check_options(command: Command) -> None:
    """The command exists and has the options that a sentence names; the rest may be left out."""
    words = command.text.split()[1:]
    options = options_of(_parser())
    names = [" ".join(words[:2]), words[0]]
    name = next((name for name in names if name in options), None)
    if name is None:
        assert words[0].startswith("-") or words[0].isupper() or words[0] == "...", command
        return
    for word in words:
        option = word.partition("=")[0].rstrip(",.;")
        if option.startswith("--") and option != "--":
            assert option in options[name], command


def options_of(parser: object, prefix: str = "") -> dict[str, set[str]]:
    """The options of each command, by the command's name."""
    found: dict[str, set[str]] = {}
    for action in vars(parser)["_actions"]:
        if hasattr(action, "choices") and isinstance(action.choices, dict):
            for name, inner in action.choices.items():
                strings = {s for a in vars(inner)["_actions"] for s in a.option_strings}
                found[f"{prefix}{name}"] = strings
                found |= options_of(inner, f"{prefix}{name} ")
    return found
