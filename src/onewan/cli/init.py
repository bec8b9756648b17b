"""`onewan init`: writes a run file to start from."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import replace
from pathlib import Path

from onewan.cli.arguments import STANDARD_OUTPUT
from onewan.cli.output import complain, say, write, write_file
from onewan.cli.run_files import show_list
from onewan.cli.starter import COMFYUI_FILES, StarterRequest, starter
from onewan.errors import ConfigError
from onewan.runs.layout import displayed

_COMMON_NAMES = ("config", "onewan", "run", "train", "training")
"""Names of run files that say nothing; their run is named after their folder."""
_NOT_IN_NAMES = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f]')
_HUB = "https://huggingface.co/Comfy-Org/Wan_2.2_ComfyUI_Repackaged"


def init(options: argparse.Namespace) -> int:
    """Write the run file that `options` describe, and say what comes next; or list those there
    are."""
    if options.list:
        return show_list(
            variant=options.variant,
            method=options.method,
            vram=options.vram,
            as_json=options.json,
        )
    file = None if options.file in (None, STANDARD_OUTPUT) else Path(options.file)
    _check(options, file)
    shown = "run.yaml" if file is None else str(file)
    request = StarterRequest(
        variant=options.variant or "t2v-a14b",
        method=options.method or "lora",
        purpose=options.purpose,
        name=None if file is None else run_name(file),
        file=f'"{shown}"' if " " in shown else shown,
    )
    lines = list[str]()
    folder = Path.cwd() if file is None else Path(os.path.abspath(file)).parent
    if options.models is not None:
        from onewan.cli.model_files import find_model_files

        found = find_model_files(options.models, request.facts)
        request = replace(request, models=found.paths, models_folder=_from(folder, found.folder))
        lines += [*_about_models(request), *found.notes]
    if options.vram is not None:
        from onewan.cli.fitting import fitted

        values, _ = fitted(request, options.vram, options.ram)
        request = replace(request, fitted=values)
    paths = {name: Path(_from(folder, path)) for name, path in request.models.items()}
    text = starter(replace(request, models=paths))
    if file is None:
        write(text)
        for line in lines:
            complain(line)
        return 0
    write_file(file, text)
    for line in (f"{file}: written", *lines, *_next_lines(request, file)):
        say(line)
    return 0


def run_name(file: Path) -> str:
    """The name of the run of a run file: the file's, or its folder's where that says more."""
    path = Path(os.path.abspath(file))
    stem = path.parent.name if path.stem.lower() in _COMMON_NAMES else path.stem
    return _NOT_IN_NAMES.sub("_", stem).lstrip(".") or "run"


def _check(options: argparse.Namespace, file: Path | None) -> None:
    """ConfigError for what can't be asked for, before anything is searched."""
    problems = list[str]()
    if options.purpose == "photos" and options.variant == "i2v-a14b":
        problems.append(
            "--purpose photos: a photo teaches an image-to-video model nothing, since its only "
            "frame is given; use --variant t2v-a14b or ti2v-5b, or clips"
        )
    if file is not None:
        if file.suffix.lower() == ".json":
            problems.append(f"{file}: a run file with comments is YAML; end its name in .yaml")
        if file.is_dir():
            problems.append(f"{file}: is a folder; give the name of a file in it")
        elif os.path.lexists(file) and not options.force:
            problems.append(f"{file}: exists already; give another name, or --force to replace it")
        elif not file.absolute().parent.is_dir():
            problems.append(f"{file}: there is no folder {file.parent}; make it first")
    if problems:
        raise ConfigError("onewan init", problems)


def _from(folder: Path, path: Path) -> str:
    """`path` as a run file in `folder` names it: relative where it lies in there."""
    return (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()


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
