"""A tiny model of each variant and a few drawn clips, made once, and run files on them."""

from support.workshop import run_file, workshop

__all__ = ["run_file", "workshop"]
