"""The demonstration: a tiny model, a few clips and a run file, and a real run on them.

Nothing in it is special: the run file is an ordinary one, and the run is the trainer's own. Only
the model is small and random, so that it takes a minute without a GPU.
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
from onewan.runs.layout import RunLayout, unused
from onewan.train.run import run_folder
from onewan.train.trainer import Listener, WanTrainer
from onewan.variants import VARIANTS, VariantName

_RUN_FILE = """\
# The demonstration's run file. `onewan init --variant {variant}` prints one for real training.
model:
  path: model              # a tiny {title} with random weights; really: {repository}
  variant: {variant}
  dtype: float32           # really: bfloat16

wan_config:
  max_frames: 17           # 4n+1 frames; really: {frames}

video_data:
  sources:
    - path: clips          # each video has its caption beside it, in NAME.txt
  resolution: {area}         # training area in pixels; really: leave it out for 480p

method:
  kind: lora
  rank: 32

optimizer:
  lr: 1.0e-2               # a random model needs much; really: 1e-4

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
  steps: 8                 # really: leave these four out for the official values

output:
  dir: runs
  formats: [comfyui, diffusers]
"""
_PROMPT = "a red square moves slowly across a dark background"


def run_demo(
    folder: Path, variant: VariantName, listen: Listener, say: Callable[[str], None]
) -> None:
    """Make model, clips and run file in `folder` where they are not there yet, and train.

    `listen` is told the run's events, `say` prints a line. Running it again in the same folder
    trains again, as another run.
    """
    facts = VARIANTS[variant]
    clips, model, run_file = folder / "clips", folder / "model", folder / "run.yaml"
    if run_file.is_file() and f"variant: {variant}" not in run_file.read_text(encoding="utf-8"):
        raise DataError(
            f"{run_file}: demonstrates another variant; choose another --dir for {variant}"
        )
    say(f"onewan demo: a tiny {facts.title} is trained on clips of moving shapes, in {folder}")
    if not run_file.is_file():
        files = write_clips(clips)
        say(f"made {len(files)} captioned clips: {', '.join(f.name for f in files)}")
        write_tiny_model(model, variant, pixels_BCFHW=_pixels(files))
        say(f"made a model with the architecture of {facts.title} and random weights: {model}")
        run_file.write_text(_run_file(variant), encoding="utf-8")
        say(f"made a run file: {run_file}")
    layout = RunLayout(unused(run_folder(load_run(run_file))))
    say(f"\n$ onewan train {_quoted(run_file)}")
    config = load_run(run_file, [f"output.name={layout.root.name}"])
    WanTrainer(config, run_file=run_file.read_text(encoding="utf-8"), listen=listen).fit()
    for line in _closing(layout, run_file, variant):
        say(line)


def _run_file(variant: VariantName) -> str:
    facts = VARIANTS[variant]
    prompt = f"    - prompt: {_PROMPT}"
    if facts.needs_image:
        prompt += "\n      image: clips/still_square.png   # the video's first frame"
    side = 6 * facts.size_multiple
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


def _pixels(files: list[Path]) -> Tensor:
    """Five frames of each video, [B, 3, 5, H, W] in [-1, 1], to measure the VAE's scale on."""
    videos = [f for f in files if f.suffix[1:] in VIDEO_SUFFIXES]
    fit = Fit(width=128, height=128)
    starts = [probe(f).start for f in videos]
    frames = [
        read_frames(f, [start + i / 5 for i in range(5)], fit)
        for f, start in zip(videos, starts, strict=True)
    ]
    return torch.from_numpy(np.stack(frames)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def _closing(layout: RunLayout, run_file: Path, variant: VariantName) -> list[str]:
    facts = VARIANTS[variant]
    loras = sorted(layout.weights_dir.glob("*_comfyui.safetensors"))[-len(facts.experts) :]
    model = _quoted(run_file.parent / "model")
    side = 6 * facts.size_multiple
    image = (
        f" --image {_quoted(run_file.parent / 'clips' / 'still_square.png')}"
        if facts.needs_image
        else ""
    )
    return [
        "",
        f"What this made, in {layout.root}:",
        *(f"  LoRA for ComfyUI: {path.relative_to(layout.root)}" for path in loras),
        "  the same for diffusers beside it (..._diffusers.safetensors)",
        *(
            f"  sample video: {path.relative_to(layout.root)} (a random model makes noise)"
            for path in sorted(layout.samples_dir.rglob("*.mp4"))
        ),
        "  every step and number: events.jsonl",
        f"  curves: tensorboard --logdir {_quoted(layout.root)}",
        "",
        *_where_the_command_is(),
        "Next, on this tiny model:",
        f"  onewan train {_quoted(layout.root)} --resume train.steps=300    # goes on",
        f"  onewan sample {model} --prompt 'a blue circle' --out video.mp4 --dtype float32 \\",
        f"      --width {side} --height {side} --frames 17 --steps 8{image} \\",
        f"      --lora {' '.join(map(_quoted, loras))}",
        "Next, with real weights and clips (README.md says what GPU that takes):",
        f"  onewan init --variant {variant} > run.yaml    # then set video_data.sources in it",
        "  onewan cache run.yaml",
        "  onewan train run.yaml",
    ]


def _where_the_command_is() -> list[str]:
    """How to call `onewan` by its name, where it is not on the path (as after `make demo`)."""
    if shutil.which("onewan"):
        return []
    scripts = Path(sys.executable).parent
    here = Path.cwd()
    scripts = scripts.relative_to(here) if scripts.is_relative_to(here) else scripts
    activate = f"{scripts}\\activate" if os.name == "nt" else f". {scripts}/activate"
    return [f"The command onewan is in {scripts}; this puts it on your path:", f"  {activate}", ""]


def _quoted(path: Path) -> str:
    """`path` as one word of a command, in the shells of Linux and of Windows."""
    return f'"{path}"' if " " in str(path) else str(path)
