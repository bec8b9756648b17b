"""The command `onewan comfyui-node`: gives ComfyUI what it lacks for embeddings of Wan."""

from __future__ import annotations

import argparse
from pathlib import Path

from onewan.cli.arguments import Commands, add_command
from onewan.cli.output import say

_DETAILS = """ComfyUI
does not find embeddings for Wan by itself: it takes embedding:NAME for words. Writes one file into
ComfyUI's custom_nodes, or updates it. Then restart ComfyUI, put the embedding files into
models/embeddings, and connect the node Wan Embeddings (onewan) between Load CLIP and the prompts.

  onewan comfyui-node ~/ComfyUI"""


def add_comfyui_node(commands: Commands) -> None:
    parser = add_command(
        commands,
        "comfyui-node",
        "add the node to ComfyUI that reads embeddings (textual inversion) for Wan",
        _DETAILS,
    )
    parser.add_argument("folder", metavar="COMFYUI", type=Path, help="ComfyUI's folder")

    def run(options: argparse.Namespace) -> int:
        from importlib.resources import files

        from onewan.errors import OnewanError
        from onewan.files import replacing

        nodes = options.folder / "custom_nodes"
        if not nodes.is_dir():
            raise OnewanError(
                f"{options.folder}: has no folder custom_nodes; give the folder of ComfyUI"
            )
        name = "onewan_embeddings.py"
        source = files("onewan") / "resources" / "comfyui" / name
        with replacing(nodes / name) as temporary:
            temporary.write_bytes(source.read_bytes())
        say(f"{nodes / name}: written; restart ComfyUI and connect Wan Embeddings (onewan)")
        return 0

    parser.set_defaults(command=run)
