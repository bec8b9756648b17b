"""The options of the commands on weight files: inspect, convert, merge."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from onewan.checkpoint.target_formats import LORA_FORMATS, MODEL_FORMATS
from onewan.cli.arguments import Commands, add_command, lora_with_weight
from onewan.cli.heavy_imports import heavy_imports
from onewan.dtypes import WeightDtype

_CONVERT_DETAILS = """SRC is the folder of a model
(diffusers, official, or single files), one of its components in any file format (safetensors,
shards, .pth, GGUF, fp8), or a LoRA of any trainer. SRC is not changed.

--to, for models:
{models}
--to, for LoRAs:
{loras}

  onewan convert wan2.2_t2v_high_noise_14B_fp16.safetensors high/ --to diffusers
  onewan convert Wan2.2-T2V-A14B wan22_fp8 --to fp8_scaled
  onewan convert style.safetensors style_kohya.safetensors --to kohya"""


def _rows(formats: Mapping[str, str]) -> str:
    """The formats with what they are for, as they stand in the help."""
    return "\n".join(
        textwrap.fill(
            f"  {name:<11} {text}", 93, subsequent_indent=" " * 14, break_on_hyphens=False
        )
        for name, text in formats.items()
    )


_MERGE_DETAILS = """DST has the same layout as BASE.

  onewan merge wan2.2_t2v_low_noise_14B_fp16.safetensors style_low.safetensors:0.8 \\
      merged_low.safetensors
  onewan merge Wan2.2-T2V-A14B style_high_noise.safetensors style_low_noise.safetensors merged

With a whole model, the header or the name of each LoRA decides which expert it is merged into."""


def add_inspect(commands: Commands) -> None:
    parser = add_command(
        commands,
        "inspect",
        "identify a weight file and the programs that read it, a run, or a video",
        "Reads only\nheaders, so it is fast for files of any size. Recognizes models in every "
        "layout and LoRAs\nof every trainer; of a run's folder it tells how far the run is.",
    )
    parser.add_argument("path", metavar="PATH", type=Path, help="a file or a folder")
    parser.add_argument(
        "--all", action="store_true", help="print all entries of a header, not the first five"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")

    def run(options: argparse.Namespace) -> int:
        from onewan.cli.inspecting import inspect_path

        return inspect_path(options.path, as_json=options.json, show_all=options.all)

    parser.set_defaults(command=run)


def add_convert(commands: Commands) -> None:
    parser = add_command(
        commands,
        "convert",
        "write a model or a LoRA in the format of another program",
        _CONVERT_DETAILS.format(models=_rows(MODEL_FORMATS), loras=_rows(LORA_FORMATS)),
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="a file or a folder")
    parser.add_argument(
        "destination",
        metavar="DST",
        type=Path,
        help="a folder for a whole model; for one component a folder (diffusers, official "
        "transformer), a .pth (official VAE or text encoder) or a .safetensors file",
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=tuple({**MODEL_FORMATS, **LORA_FORMATS}),
        help="see above",
    )
    _add_output(
        parser,
        "dtype of the weights (default: unchanged, and bfloat16 for quantized weights); with "
        "fp8_scaled, the dtype of the weights that are not fp8",
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        type=Path,
        help="the base model of a LoRA; required to convert DoRA and OFT to comfyui",
    )
    parser.add_argument(
        "--expert",
        choices=("high", "low"),
        help="which LoRA to convert if SRC holds those of both experts",
    )

    def run(options: argparse.Namespace) -> int:
        with heavy_imports():
            from onewan.cli.convert import convert

        return convert(
            options.source,
            options.destination,
            options.to,
            dtype=options.dtype,
            force=options.force,
            base=options.base,
            expert=options.expert,
        )

    parser.set_defaults(command=run)


def add_merge(commands: Commands) -> None:
    parser = add_command(
        commands,
        "merge",
        "write a model with LoRAs merged into its weights",
        _MERGE_DETAILS,
    )
    parser.add_argument(
        "base", metavar="BASE", type=Path, help="a transformer, or a whole model's folder"
    )
    parser.add_argument(
        "loras",
        metavar="LORA[:WEIGHT]",
        type=lora_with_weight,
        nargs="+",
        help="a LoRA, DoRA, LoHa, LoKr or OFT file and its weight (default: 1)",
    )
    parser.add_argument("destination", metavar="DST", type=Path, help="a new file or folder")
    _add_output(parser, "dtype of the weights (default: the same as in BASE)")
    parser.add_argument(
        "--any-expert",
        action="store_true",
        help="merge even if headers or names say that LORA and BASE belong to different experts",
    )

    def run(options: argparse.Namespace) -> int:
        with heavy_imports():
            from onewan.cli.convert import merge_loras

        return merge_loras(
            options.base,
            options.loras,
            options.destination,
            dtype=options.dtype,
            force=options.force,
            check_file_names=not options.any_expert,
        )

    parser.set_defaults(command=run)


def _add_output(parser: argparse.ArgumentParser, dtype_help: str) -> None:
    parser.add_argument("--dtype", choices=get_args(WeightDtype), help=dtype_help)
    parser.add_argument("--force", action="store_true", help="overwrite DST if it exists")
