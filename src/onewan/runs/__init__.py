"""The run folder: the interface between the trainer and the programs that watch or control it."""
