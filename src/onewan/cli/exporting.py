"""The command export for a saved state, imported only when it runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.cli.heavy_imports import heavy_imports
from onewan.cli.output import say
from onewan.config.load import load_run
from onewan.files import total_bytes
from onewan.runs.layout import RunLayout, displayed
from onewan.runs.status import find_run


def export(
    run: Path,
    *,
    step: int | None,
    formats: Sequence[str],
    dtype: str | None,
    out: Path | None,
    force: bool,
) -> int:
    """Write the weights of a saved state of the run `run`, its folder or its name."""
    folder = find_run(run)
    overrides = [f"output.formats=[{', '.join(formats)}]"] if formats else []
    overrides += [] if dtype is None else [f"output.dtype={'null' if dtype == 'own' else dtype}"]
    config = load_run(folder, overrides)
    with heavy_imports():
        from onewan.train.state_export import export_state, state_to_export

    layout = RunLayout(folder)
    number = state_to_export(layout, step)
    destination = layout.weights_dir if out is None else out
    destination.mkdir(parents=True, exist_ok=True)
    # Beside the run's own files, which have none if there is one format.
    in_name = config.output.formats != load_run(folder).output.formats
    for file in export_state(config, layout, number, destination, format_in_name=in_name):
        if file.path.exists() and not force:
            say(f"{displayed(file.path)}: is there already; --force writes it anew")
            continue
        for notice in file.write(file.path):
            say(f"note: {file.path.name}: {notice}")
        size = format_bytes(total_bytes(file.path))
        say(f"step {number}: weights exported: {displayed(file.path)} ({size})")
    return 0
