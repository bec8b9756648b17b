"""`Machine`: device memory, rates and host memory that a plan is made for."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from onewan.arithmetic.byte_sizes import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What one model of graphics card attains."""

    name: str
    """As its maker's tools name it, or a part of that."""
    flops: float
    """Bfloat16 FLOP/s that a training step attains in matrix products and attention."""
    bus: float
    """Bytes/s of a copy between pinned host memory and the card, in each direction."""


PCIE_3, PCIE_4, PCIE_5 = 12e9, 25e9, 50e9
"""Bytes/s that a copy attains over 16 lanes."""

CARDS = (
    Card(name="RTX 3090", flops=58e12, bus=PCIE_4),
    Card(name="RTX 4090", flops=140e12, bus=PCIE_4),
    Card(name="RTX 5090", flops=185e12, bus=PCIE_5),
    Card(name="L40S", flops=120e12, bus=PCIE_4),
    Card(name="H100", flops=550e12, bus=PCIE_5),
    Card(name="H200", flops=550e12, bus=PCIE_5),
)
"""Rates that published training runs reach on these cards: 80 to 90 % of the peak with float32
accumulation on consumer cards, 55 % on an H100, a third on an L40S."""

_BY_MEMORY = ((20, "RTX 3090"), (28, "RTX 4090"), (40, "RTX 5090"), (64, "L40S"))
"""(gigabytes, card): the card whose rates are assumed for a device with less memory than that."""
_LARGEST = "H100"

_NO_CARD = "no graphics card was found, so 24 GB are assumed; memory.vram gives another amount"

MACHINE_SIZE = 8
"""Devices of a machine, where it is not known."""

_CONTEXT = 500_000_000
"""Bytes that the driver's context and its libraries take of a card."""
_RESERVE = 0.05
"""Share of the device that is left free: the allocator can't fill the last gaps between blocks, and
a full card makes Windows move memory to the host without a message."""
_HOST_RESERVE = 0.1
"""Share of the host's memory that is left to the system and to other programs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The device and the host that a plan is made for."""

    name: str
    """Of the card, for messages."""
    vram: int
    """Bytes of device memory that the run may use."""
    ram: int
    """Bytes of host memory that the run may use, or one of its processes (`of_each_process`)."""
    flops: float
    """Attainable bfloat16 FLOP/s."""
    bus: float
    """Bytes/s of a copy between host and device, in each direction."""
    context: int = _CONTEXT
    """Bytes of the device that the driver takes."""
    processes: int = 1
    """Processes of the run that share the host, of which this is what one has."""
    ranks: int = 1
    """Processes of the whole run, which may be on several machines."""
    machine_size: int = MACHINE_SIZE
    """How many of them each machine has, among which `parallel.weights: sharded_per_machine`
    shards weights."""
    notes: tuple[str, ...] = ()
    """What was assumed, for the user."""

    @property
    def device_budget(self) -> int:
        """Bytes that the tensors of a run may have on the device at their peak."""
        return int(self.vram * (1 - _RESERVE)) - self.context

    @property
    def host_budget(self) -> int:
        """Bytes that a run may have in host memory at its peak."""
        return int(self.ram * (1 - _HOST_RESERVE))


def find_machine(vram: int | None = None, ram: int | None = None) -> Machine:
    """The machine with the given amounts of memory in bytes; None stands for this machine's.

    The name and the memory of an NVIDIA card come from its driver's ``nvidia-smi``. Without one,
    24 GB are assumed. Rates are those of `CARDS`; for a card that is not in it, those of the card
    of about its memory. `notes` say what was assumed.
    """
    notes = list[str]()
    found = None if vram is not None else _first_card()
    if found is not None:
        return machine_of(*found, ram)
    notes = () if vram is not None else (_NO_CARD,)
    machine = machine_of("", 24 * 10**9 if vram is None else vram, ram)
    return replace(machine, notes=(*notes, *machine.notes))


def machine_of(name: str, vram: int, ram: int | None = None) -> Machine:
    """The machine with a card of that `name` and `vram` bytes of memory, and with `ram` bytes of
    host memory; None is this machine's. `notes` say which rates were assumed."""
    card = next((card for card in CARDS if card.name in name), None)
    notes = ()
    if card is None:
        card = card_for_memory(vram)
        notes = (
            f"rates are those of an {card.name} ({card.flops / 1e12:.0f} TFLOP/s, "
            f"{card.bus / 1e9:.0f} GB/s between host and device), assumed for "
            f"{format_bytes(vram)} of device memory",
        )
    return Machine(
        name=name or f"a device of {format_bytes(vram)}",
        vram=vram,
        ram=ram if ram is not None else host_memory(),
        flops=card.flops,
        bus=card.bus,
        notes=notes,
    )


def card_for_memory(vram: int) -> Card:
    """The card whose rates are assumed for a device of `vram` bytes."""
    name = next((card for limit, card in _BY_MEMORY if vram < limit * 10**9), _LARGEST)
    return next(card for card in CARDS if card.name == name)


def host_memory() -> int:
    """Bytes of this machine's memory, or of the limit of the container that this process is in."""
    total = psutil.virtual_memory().total
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(file).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        if text.isdecimal():
            total = min(total, int(text))
    return total


def _first_card() -> tuple[str, int] | None:
    """(name, bytes of memory) of the first NVIDIA card; None if there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True)
        name, _, mebibytes = done.stdout.splitlines()[0].rpartition(",")
        return name.strip(), int(mebibytes) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None  # a driver that does not answer: the plan says that no card was found
