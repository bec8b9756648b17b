"""`onewan init`: writes a run file to start from."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from onewan.cli.arguments import STANDARD_OUTPUT
from onewan.cli.output import complain, say, write, write_file, write_json
from onewan.errors import ConfigError
from onewan.presets.run_files import HEADINGS, RunFile, cells, matching
from onewan.presets.starter import COMFYUI_FILES, StarterRequest
from onewan.runs.layout import displayed

_COMMON_NAMES = ("config", "onewan", "run", "train", "training")
"""Names of run files that say nothing; their run is named after their folder."""
_NOT_IN_NAMES = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f]')
_HUB = "https://huggingface.co/Comfy-Org/Wan_2.2_ComfyUI_Repackaged"


def init(options: argparse.Namespace) -> int:
    """Write the run file that `options` describe, and say what comes next; or list those there
    are."""
    if options.list:
        rows = matching(options.variant, options.method, options.vram)
        _show_list(rows, as_json=options.json)
        return 0
    file = None if options.file in (None, STANDARD_OUTPUT) else Path(options.file)
    shown = "run.yaml" if file is None else str(file)
    request = StarterRequest(
        variant=options.variant or "t2v-a14b",
        method=options.method or "lora",
        purpose=options.purpose,
        name=None if file is None else run_name(file),
        file=f'"{shown}"' if " " in shown else shown,
    )
    _check(request, file, force=options.force)
    folder = Path.cwd() if file is None else Path(os.path.abspath(file)).parent
    from onewan.presets.made import make

    made = make(request, folder, models=options.models, vram=options.vram, ram=options.ram)
    lines = list[str]()
    if options.models is not None:
        lines += [*_about_models(made.request), *made.notes]
    if file is None:
        write(made.text)
        for line in lines:
            complain(line)
        return 0
    write_file(file, made.text)
    for line in (f"{file}: written", *lines, *_next_lines(made.request, file)):
        say(line)
    return 0


def run_name(file: Path) -> str:
    """The name of the run of a run file: the file's, or its folder's where that says more."""
    path = Path(os.path.abspath(file))
    stem = path.parent.name if path.stem.lower() in _COMMON_NAMES else path.stem
    return _NOT_IN_NAMES.sub("_", stem).lstrip(".") or "run"


def _check(request: StarterRequest, file: Path | None, *, force: bool) -> None:
    """ConfigError for what can't be asked for, before anything is searched."""
    problems = list[str]()
    if problem := request.problem():
        problems.append(f"--purpose {request.purpose}: {problem}")
    if file is not None:
        if file.suffix.lower() == ".json":
            problems.append(f"{file}: a run file with comments is YAML; end its name in .yaml")
        if file.is_dir():
            problems.append(f"{file}: is a folder; give the name of a file in it")
        elif os.path.lexists(file) and not force:
            problems.append(f"{file}: exists already; give another name, or --force to replace it")
        elif not file.absolute().parent.is_dir():
            problems.append(f"{file}: there is no folder {file.parent}; make it first")
    if problems:
        raise ConfigError("onewan init", problems)


def _about_models(request: StarterRequest) -> list[str]:
    lines = [f"{name}: {displayed(path)}" for name, path in request.models.items()]
    files = COMFYUI_FILES[request.variant]
    lines += [
        f"{name}: not found; expected {request.models_folder}/{files[name]}"
        for name in request.missing_files
    ]
    if request.missing_files:
        lines.append(
            "What was not found is downloaded by the first run, unless the run file names it "
            f"(ComfyUI's files: split_files of {_HUB})"
        )
    return lines


def _next_lines(request: StarterRequest, file: Path) -> list[str]:
    values = request.values
    clips = displayed(Path(os.path.abspath(file)).parent / "clips")
    material = request.recipe.material or "your clips"
    size = "480p" if values.area is None else "{0}x{0}".format(round(values.area**0.5))
    count = "photos" if values.frames == 1 else f"clips of up to {values.frames} frames"
    memory = f", which fit {values.vram}" if values.vram else ""
    return [
        f"trains on {count} at the area of {size}{memory}; {request.steps} steps",
        f"Put these, with their captions, into {clips}: {material}. Then:",
        f"  onewan plan {request.file}     says what it needs, and how long it takes",
        f"  onewan cache {request.file}    checks the clips, and encodes them once",
        f"  onewan train {request.file}",
        "For completion in an editor: onewan schema onewan.schema.json, beside the run file",
    ]


def _show_list(rows: Sequence[RunFile], *, as_json: bool) -> None:
    if as_json:
        write_json({"run_files": [{"file": row.file, **asdict(row)} for row in rows]})
        return
    for line in _table(rows):
        say(line)
    say()
    say("Time is that of a step by arithmetic, and host what all of the run takes of host memory.")
    say("Such a file for your clips: onewan init dog.yaml --variant V --method M --vram 24GB")


def _table(rows: Sequence[RunFile]) -> Iterator[str]:
    """`rows` as lines in columns."""
    lines = [HEADINGS, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip()
