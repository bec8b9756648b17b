"""The plan of a run, as the command ``onewan plan`` makes it, and what a screen says of it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.arithmetic.durations import format_duration
from onewan.config.load import dump_run
from onewan.config.schema import ResolvedRun
from onewan.serving.commands import Commands


async def plan_of(config: ResolvedRun, commands: Commands) -> dict[str, Any]:
    """What ``onewan plan --json`` prints for a run. OnewanError if it can't be planned; if the
    caller is cancelled, the command ends."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(dump_run(config), encoding="utf-8")
        # The exit status is 1 for a run that does not fit.
        plan: dict[str, Any] = await commands.json_of(["plan", str(file), "--json"], status=(0, 1))
    return plan


def plan_facts(plan: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values of what matters most in a plan."""
    machine, time = plan["machine"], plan["run_time"]
    name, size = machine["name"], format_bytes(machine["vram"])
    yield "Device", name if size in name else f"{name}, {size}"  # one by its size has no other name
    budget = format_bytes(machine["device_budget"])
    yield "Device memory", f"{format_bytes(plan['device_peak'])} of {budget}"
    budget = format_bytes(machine["host_budget"])
    yield "Host memory", f"{format_bytes(plan['host_peak'])} of {budget}"
    yield "One step", format_duration(time["step"])
    yield "Whole run", f"about {format_duration(time['total'])}"
    experts = ", ".join(f"{name} {count:,}" for name, count in time["expert_steps"].items())
    yield "Steps", f"{time['steps']:,} ({experts})"
    yield "Clips", f"{plan['clips']:,}" if plan["clips"] else "none yet"
    yield "Disk", format_bytes(sum(plan["disk"].values()))
