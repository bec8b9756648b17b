"""The options of the command sample; imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from onewan.cli.arguments import VARIANT_NAMES, Commands, add_command, lora_with_weight
from onewan.cli.heavy_imports import heavy_imports
from onewan.cli.run_parsers import add_memory_option
from onewan.dtypes import WeightStorage

_DETAILS = """SOURCE is the
folder of a run, whose model, newest weights, embeddings, sizes and prompts are used; a run
file, for its base model and settings; or a model: a folder, or a repository on the hub.
Without SOURCE, or in place of parts of it, --transformer and others name single files, as in
a run file. What will be written is printed, and checked, before a model is loaded.

  onewan sample runs/NAME
  onewan sample runs/NAME --prompt "a fox in snow" --weights best --out fox.mp4
  onewan sample Wan-AI/Wan2.2-T2V-A14B-Diffusers --prompt "a fox" --out fox.mp4 \\
      --lora fox_high_noise.safetensors:0.8 fox_low_noise.safetensors:0.8

With LoRAs that are distilled for a few steps (lightx2v), over everything else: 4 steps without
guidance, which take a tenth of the time. A run with sample.distilled has its own; --full leaves
them out:

  onewan sample runs/NAME --distilled high_noise_model.safetensors low_noise_model.safetensors"""


def add_sample(commands: Commands) -> None:
    parser = add_command(
        commands,
        "sample",
        "generate videos with the weights of a run, or with a model and LoRAs",
        _DETAILS,
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        nargs="?",
        help="the folder of a run, a run file, the folder of a model, or its name on the hub",
    )
    _add_what(parser)
    _add_weights(parser)
    _add_components(parser)
    _add_settings(parser)

    def run(options: argparse.Namespace) -> int:
        with heavy_imports():
            from onewan.cli.sampling import sample

        return sample(options)

    parser.set_defaults(command=run)


def _add_what(parser: argparse.ArgumentParser) -> None:
    """The prompts and the files."""
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        default=[],
        help="what the video shows; several times for several videos (default: the run's prompts)",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        type=Path,
        help="a text file with a prompt on each line; lines that begin with # are skipped",
    )
    parser.add_argument(
        "--out",
        metavar="PATH",
        type=Path,
        help="FILE.mp4, FILE.webm, of which several videos become FILE-0.mp4, FILE-1.mp4, ...; or "
        "a folder, for 0.mp4, 1.mp4, ... (default: samples/manual in the folder of the run)",
    )
    parser.add_argument("--force", action="store_true", help="replace videos that exist")
    parser.add_argument("--image", type=Path, help="the first frame (not for T2V-A14B)")
    parser.add_argument("--last-image", type=Path, help="the last frame (not for T2V-A14B)")
    parser.add_argument("--control", type=Path, help="the control video (Fun-Control)")
    parser.add_argument("--reference", type=Path, help="the reference image (Fun-Control)")
    parser.add_argument(
        "--negative-prompt",
        metavar="TEXT",
        help="what the video must not show (default: the run's, or the official one)",
    )


def _add_weights(parser: argparse.ArgumentParser) -> None:
    """What was trained."""
    parser.add_argument(
        "--weights",
        metavar="WHICH",
        type=_weights,
        help="which of the run's weights: newest, best, a step, or none for the base model "
        "(default: newest)",
    )
    parser.add_argument(
        "--ema", action="store_true", help="the moving average of the run's weights"
    )
    parser.add_argument(
        "--lora",
        metavar="FILE[:WEIGHT]",
        type=lora_with_weight,
        nargs="+",
        action="extend",
        default=[],
        help="LoRA, DoRA, LoHa, LoKr or OFT files, one for each expert, and their weight "
        "(default: 1); of the folder of a run, the newest. The weight multiplies what the file "
        "adds to the model",
    )
    parser.add_argument(
        "--distilled",
        metavar="FILE[:WEIGHT]",
        type=lora_with_weight,
        nargs="+",
        help="the distilled LoRAs of the high-noise and of the low-noise expert, or that of "
        "TI2V-5B, laid over everything else; the defaults are then 4 steps, guidance 1 and shift 5 "
        "(default: the run's, if it has some)",
    )
    parser.add_argument(
        "--full", action="store_true", help="without the run's distilled LoRAs, in all steps"
    )
    parser.add_argument(
        "--embedding",
        metavar="FILE",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        help="embedding files; the prompt contains their placeholders",
    )


def _add_components(parser: argparse.ArgumentParser) -> None:
    """Single parts of the model, and how they are kept."""
    for option, text in (
        ("--transformer", "the high-noise expert, or the transformer of TI2V-5B"),
        ("--transformer-2", "the low-noise expert"),
        ("--vae", "the VAE"),
        ("--text-encoder", "the text encoder"),
        ("--tokenizer", "the tokenizer, if the text encoder's file has none"),
    ):
        parser.add_argument(option, metavar="PATH", help=f"{text}: a file, folder or repository")
    parser.add_argument("--variant", choices=VARIANT_NAMES, help="checked against the files")
    parser.add_argument(
        "--boundary",
        type=float,
        help="timestep t at which the low-noise expert takes over (default: the model's own)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="precision of the transformers (default: the run's, or bfloat16)",
    )
    parser.add_argument(
        "--storage",
        choices=get_args(WeightStorage),
        help="storage of the transformers' weights in memory, as memory.weights in a run file "
        "(default: the run's, or as_stored)",
    )
    parser.add_argument("--device", help="auto, cpu, cuda:1, ... (default: the run's, or auto)")
    add_memory_option(
        parser, "--vram", "device memory to use at most, such as 16GB (default: all of it)"
    )


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Size, length, solver and noise."""
    for option, kind, text in (
        ("--width", int, "pixels"),
        ("--height", int, "pixels"),
        ("--frames", int, "number of frames, 4n+1"),
        ("--steps", int, "denoising steps"),
        ("--fps", float, "frame rate of the file"),
        ("--shift", float, "timestep shift"),
    ):
        default = "the run's, or the model's own"
        parser.add_argument(option, type=kind, help=f"{text} (default: {default})")
    parser.add_argument(
        "--guidance",
        type=float,
        nargs="+",
        metavar="G",
        help="guidance scale: one value, or HIGH LOW for two experts; 1 is none and takes half the "
        "time (default: the run's, or the model's own)",
    )
    parser.add_argument("--seed", type=int, help="seed of the noise (default: the run's, or 0)")


def _weights(text: str) -> int | str:
    if text in ("newest", "best", "none"):
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not newest, best, none or a step such as 2000"
        ) from None
