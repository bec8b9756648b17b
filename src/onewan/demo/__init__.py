"""The demonstration: a tiny model, a few clips and a run file, and a real run on them.

Nothing in it is special: it is an ordinary run file, trained by the ordinary trainer. Only the
model is tiny, with random weights, so that the run takes a minute without a GPU.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from onewan.config.load import load_run
from onewan.demo.clips import write_clips
from onewan.demo.tiny_model import write_tiny_model
from onewan.errors import DataError
from onewan.media import VIDEO_SUFFIXES, Fit, probe, read_frames
from onewan.report.page import reporting
from onewan.runs.layout import RunLayout, displayed
from onewan.runs.log import Listener
from onewan.train.run import run_folder, with_unused_name
from onewan.train.trainer import WanTrainer
from onewan.variants import VARIANTS, Variant, VariantName

_RUN_FILE = """\
# The demonstration's run file; `onewan init FILE --variant {variant}` writes one for real.
# "real:" is followed by the value for a real run.
model:
  path: model              # a tiny {title} with random weights; real: {repository}
  variant: {variant}
  dtype: float32           # real: bfloat16

wan_config:
  max_frames: 17           # 4n+1 frames; real: {frames}

video_data:
  sources:
    - path: clips          # the caption of each video is in NAME.txt beside it
  resolution: {area}         # training area in pixels; real: omitted, for 480p

method:
  kind: lora
  rank: 32

optimizer:
  lr: 1.0e-2               # high, for random weights; real: 1e-4

train:
  steps: {steps}
  batch_size: 2
  save_every: {half}
  seed: 42

sample:
  prompts:
{prompt}
  width: {side}
  height: {side}
  frames: 17
  steps: 8                 # real: these four omitted, for values that suit the training clips
  at_start: false          # real: omitted, to compare with videos of the base model

output:
  dir: runs
  formats: [comfyui, diffusers]
"""
_PROMPT = "a red square moves slowly across a dark background"


def run_demo(
    folder: Path, variant: VariantName, listen: Listener, print_line: Callable[[str], None]
) -> None:
    """Make what `prepare_demo` makes, and train.

    `listen` is called with the run's events, `print_line` with each line to print. A second call
    with the same folder trains again, as another run. DataError if `folder` has the demonstration
    of another variant.
    """
    print_line(f"onewan demo: trains a tiny {VARIANTS[variant].title} on clips of moving shapes")
    run_file = prepare_demo(folder, variant, print_line)
    print_line("")
    print_line(f"$ onewan train {_quoted(run_file)}")
    # In a second demonstration the run is NAME-2: the results of the first one are kept.
    config = with_unused_name(load_run(run_file))
    with reporting(listen, print_line) as listen_and_report:
        text = run_file.read_text(encoding="utf-8")
        WanTrainer(config, run_file=text, listen=listen_and_report).fit()
    for line in _closing_lines(RunLayout(displayed(run_folder(config))), run_file, variant):
        print_line(line)


def prepare_demo(folder: Path, variant: VariantName, print_line: Callable[[str], None]) -> Path:
    """Make a model, clips and a run file in `folder`, unless they exist; returns the run file.

    DataError if `folder` has the demonstration of another variant.
    """
    run_file = folder / "run.yaml"
    if run_file.is_file() and f"variant: {variant}" not in run_file.read_text(encoding="utf-8"):
        raise DataError(
            f"{run_file}: is the demonstration of another variant; give another --dir for {variant}"
        )
    # The run file is written last, so if it exists, the model and the clips are complete too.
    if not run_file.is_file():
        write_demo(folder, variant, print_line)
    return run_file


def write_demo(folder: Path, variant: VariantName, print_line: Callable[[str], None]) -> Path:
    """Make the model, the clips and the run file in `folder`; returns the run file."""
    facts = VARIANTS[variant]
    clips, model, run_file = folder / "clips", folder / "model", folder / "run.yaml"
    files = write_clips(clips)
    print_line(f"{clips}: {len(files)} captioned clips ({', '.join(f.name for f in files)})")
    write_tiny_model(model, variant, pixels_BCFHW=_sample_pixels(files))
    print_line(f"{model}: the architecture of {facts.title}, a tiny width, random weights")
    run_file.write_text(run_file_text(variant), encoding="utf-8")
    print_line(f"{run_file}: the run file")
    return run_file


def run_file_text(variant: VariantName) -> str:
    """The demonstration's run file, in YAML."""
    facts = VARIANTS[variant]
    prompt = f"    - prompt: {_PROMPT}"
    if facts.needs_image:
        prompt += "\n      image: clips/still_square.png   # the video's first frame"
    side = _side(facts)
    return _RUN_FILE.format(
        variant=variant,
        title=facts.title,
        repository=facts.repository,
        frames=facts.frames,
        area=side * side,
        side=side,
        steps=100 * len(facts.experts),
        half=50 * len(facts.experts),
        prompt=prompt,
    )


def _side(facts: Variant) -> int:
    """Side of the square videos, pixels."""
    # 6 x 6 tokens in each latent frame, few enough to train on a CPU.
    return 6 * facts.size_multiple


def _sample_pixels(files: list[Path]) -> Tensor:
    """Five frames of each video, [B, 3, 5, H, W] in [-1, 1], to measure the VAE's latents on."""
    videos = [f for f in files if f.suffix[1:] in VIDEO_SUFFIXES]
    fit = Fit(width=128, height=128)
    starts = [probe(f).start for f in videos]
    frames = [
        read_frames(f, [start + i / 5 for i in range(5)], fit)
        for f, start in zip(videos, starts, strict=True)
    ]
    return torch.from_numpy(np.stack(frames)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def _closing_lines(layout: RunLayout, run_file: Path, variant: VariantName) -> list[str]:
    facts = VARIANTS[variant]
    exported = list(layout.exported().values())[-1]
    loras = [path for path in exported if path.name.endswith("_comfyui.safetensors")]
    steps = 100 * len(facts.experts) + 100
    image = (
        f" --image {_quoted(run_file.parent / 'clips' / 'still_square.png')}"
        if facts.needs_image
        else ""
    )
    return [
        "",
        f"Results in {layout.root}:",
        *(f"  {path.relative_to(layout.root)}   a LoRA for ComfyUI" for path in loras),
        "  weights/..._diffusers.safetensors   the same LoRAs for diffusers",
        *(
            f"  {path.relative_to(layout.root)}   a sample video (noise, as the weights are random)"
            for path in sorted(layout.samples_dir.rglob("*.mp4"))
        ),
        "  report.html   a page about the run, to open in a browser",
        "  events.jsonl   loss, learning rate and time of every step",
        f"  tensorboard/   curves: tensorboard --logdir {_quoted(layout.root)}",
        "",
        *_activation_hint(),
        "Next, on this tiny model:",
        f"  onewan train {_quoted(layout.root)} --resume train.steps={steps}    # 100 more steps",
        f'  onewan sample {_quoted(layout.root)} --prompt "a blue circle" --out video.mp4{image}',
        "Next, with real weights and clips (docs/start.md tells the whole way):",
        f"  onewan init run.yaml --variant {variant}    # then edit video_data.sources in it",
        "  onewan cache run.yaml",
        "  onewan train run.yaml",
    ]


def _activation_hint() -> list[str]:
    """How to put the command `onewan` on the path, where it isn't (as after `make demo`)."""
    if shutil.which("onewan"):
        return []
    # Relative to the current folder, as the user would type it.
    scripts = displayed(Path(sys.executable).parent)
    activate = f"{scripts}\\activate" if os.name == "nt" else f". {scripts}/activate"
    return [f"The command onewan is in {scripts}; to put it on your path:", f"  {activate}", ""]


def _quoted(path: Path) -> str:
    """`path` as one argument of a command, for the shells of Linux and Windows."""
    # Not `shlex.quote`, whose single quotes cmd.exe takes for part of the name.
    return f'"{path}"' if " " in str(path) else str(path)
