"""Streamed training steps: bytes moved against the minimum, and predicted slowdown by machine.

A small transformer with as many blocks as the real one trains on the CPU through `BlockStream` and
`CheckpointedBlocks`, which count what they copy and record in which order they queue copies and
computations. Then `schedule_replay` predicts the time of the same schedule for the real sizes of
T2V-A14B, on several cards and buses, relative to a step without any copies.

    python benchmarks/streaming.py [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from figures import Chart, Figure, Value, add_output_options, as_case, measured_here, save
from schedule_replay import Durations, Entry, Part, hidden_share, slowdown
from tables import tables_of
from torch import Tensor

from onewan.adapters.adapter_config import adapter_config_for
from onewan.adapters.lora import attach_adapter
from onewan.arithmetic.flops import FLASH_BACKWARD, TransformerSize, block_flops, training_flops
from onewan.config.method import LoraMethod
from onewan.demo.tiny_model import write_tiny_model
from onewan.memory.activations import KeptActivations
from onewan.memory.block_order import streamed_blocks
from onewan.memory.block_runner import CheckpointedBlocks
from onewan.memory.block_weights import BlockWeights
from onewan.memory.host_memory import HostMemory
from onewan.memory.streaming import BlockStream, Pass, StreamEvent
from onewan.model.forward import predict_velocity
from onewan.model.load import WanModelLoader
from onewan.variants import VARIANTS

BLOCKS = 40
RING = 2
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------ recording


class Recorder:
    """Collects the schedule of a `BlockStream` and of the store of kept tensors."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._used = -1
        self._computed = False
        self._part: Part = "all"

    def stream(self, event: StreamEvent) -> None:
        """An entry of the stream of weights."""
        if event.kind == "use":
            self._used, self._computed, self._part = event.block, False, "all"
        if event.kind == "done":
            self.compute(event.block, backward=event.current is Pass.BACKWARD)
        self.entries.append(Entry(event.kind, event.block, event.buffer))

    def kept(self, kind: Any, block: int) -> None:
        """An entry of the store."""
        self.entries.append(Entry(kind, block))

    def compute(self, block: int, *, backward: bool = False) -> None:
        """The kernels of a block are queued; told once or twice for each use of it."""
        if not self._computed:
            self.entries.append(Entry("compute", block, backward=backward, part=self._part))
        self._computed = True

    def fetch(self, block: int) -> None:
        """The kept tensors of `block` are asked for: by that block itself, or while the one behind
        it is differentiated."""
        if block != self._used:
            self.entries.append(Entry("compute", self._used, backward=True, part="first"))
            self._part = "rest"

    def step(self) -> None:
        self.entries.append(Entry("step"))


class RecordedActivations(KeptActivations):
    """The store of kept tensors, which tells the recorder what it copies. One batch at a time."""

    def __init__(self, recorder: Recorder, host: HostMemory) -> None:
        super().__init__(CPU, lambda size: host.allocate(size).tensor)
        self._recorder = recorder

    def put(self, key: Hashable, tensors: Sequence[Tensor], leave: Sequence[bool]) -> None:
        self._recorder.compute(block_of(key))  # the kernels are queued when their tensors are kept
        if any(leave):
            self._recorder.kept("leave", block_of(key))
        super().put(key, tensors, leave)

    def prefetch(self, key: Hashable) -> None:
        self._recorder.fetch(block_of(key))
        before = self.bytes_to_device
        super().prefetch(key)
        if self.bytes_to_device > before:
            self._recorder.kept("fetch", block_of(key))

    def take(self, key: Hashable) -> list[Tensor]:
        tensors = super().take(key)
        self._recorder.kept("take", block_of(key))
        return tensors

    def _drop(self, key: Hashable) -> None:
        super()._drop(key)
        self._recorder.kept("drop", block_of(key))


def block_of(key: Hashable) -> int:
    """The block that a key of the store belongs to."""
    assert isinstance(key, tuple)
    return key[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What some training steps copied, and in which order."""

    entries: tuple[Entry, ...]
    loads: int
    """Blocks that a step copied to the device, after the first step."""
    least: int
    """The least number that a ring of this size allows."""
    bytes_to_device: int
    block_bytes: int
    misses: int
    """Blocks that were not there when they were needed, after the first step."""
    losses: tuple[float, ...]


class TinyRun:
    """T2V-A14B with 40 small blocks, and a LoRA, whose blocks are streamed on the CPU."""

    def __init__(self, folder: Path) -> None:
        write_tiny_model(folder, "t2v-a14b", width=32, layers=BLOCKS)
        components = ("transformer", "transformer_2")
        model = WanModelLoader().load(folder, components=components)
        self.experts: list[Any] = [model.expert(expert) for expert in model.variant.experts]
        for number, transformer in enumerate(self.experts):
            transformer.requires_grad_(False)
            method = LoraMethod(kind="lora", rank=2)
            config = adapter_config_for(method, transformer, None)
            attach_adapter(transformer, config, 0, str(number))
        self.host = HostMemory(CPU)
        self.weights = [BlockWeights.take(t.blocks, self.host) for t in self.experts]

    def record(
        self, *, resident: int, offload: bool, switches: bool = False, steps: int = 3
    ) -> Recording:
        """Train `steps` steps; with `switches` each step trains the other expert than the last."""
        recorder = Recorder()
        stream = BlockStream(CPU, ring=RING, host=self.host, recorder=recorder.stream)
        store = RecordedActivations(recorder, self.host)
        losses: list[float] = []
        before: tuple[int, int, int] = (0, 0, 0)
        for step in range(steps):
            number = step % 2 if switches else 0
            stream.select(self.weights[number], resident)
            if switches:
                stream.announce(self.weights[1 - number])
            transformer = self.experts[number]
            transformer.block_runner = CheckpointedBlocks(
                blocks=transformer.blocks, weights=stream, store=store, offload_inputs=offload
            )
            losses.append(train_once(transformer))
            recorder.step()
            if step == 0:
                before = (stream.loads, stream.bytes_to_device, stream.misses)
        stream.close()
        streamed = len(streamed_blocks(BLOCKS, resident))
        return Recording(
            entries=tuple(recorder.entries),
            loads=(stream.loads - before[0]) // (steps - 1),
            # Two experts share nothing: the other one's first blocks are loaded too.
            least=2 * max(streamed - RING, 0) + (min(streamed, RING) + resident if switches else 0),
            bytes_to_device=(stream.bytes_to_device - before[1]) // (steps - 1),
            block_bytes=self.weights[0].size(0),
            misses=stream.misses - before[2],
            losses=tuple(losses),
        )


def train_once(transformer: Any) -> float:
    """One forward and backward pass; large enough for block inputs to leave the device."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 3, 32, 32, generator=generator)
    text = torch.randn(1, 512, transformer.config["text_dim"], generator=generator)
    transformer.train()
    loss = predict_velocity(transformer, latents, torch.tensor([0.5]), text).square().mean()
    loss.backward()
    return loss.item()


# ------------------------------------------------------------------------------------- predicting


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a card attains; rates as in `onewan.memory.plan.machine`."""

    name: str
    flops: float
    bus: float
    """Bytes/s in one direction."""


PCIE = {3: 12e9, 4: 25e9, 5: 50e9}
FLOPS = {"RTX 3090": 58e12, "RTX 4090": 140e12, "RTX 5090": 185e12, "H100": 550e12}
CARDS = tuple(
    Card(name=f"{name}, PCIe {generation}", flops=FLOPS[name], bus=PCIE[generation])
    for name, generation in (
        ("RTX 3090", 3), ("RTX 3090", 4), ("RTX 4090", 3), ("RTX 4090", 4),
        ("RTX 5090", 4), ("RTX 5090", 5), ("H100", 4), ("H100", 5),
    )
)  # fmt: skip
SIZES = {
    "17x256x256": 1_280,
    "1x1024x1024": 4_096,
    "33x384x672": 9_072,
    "33x480x832": 14_040,
    "81x480x832": 32_760,
    "81x720x1280": 75_600,
}
"""Frames x height x width of a clip, and its tokens."""
STORAGE = {"bf16": 2.0, "fp8": 1.0, "nf4": 0.516}
"""Bytes per weight of a linear layer; 4 bits with scales of blocks of 64, themselves quantized."""


def durations(card: Card, tokens: int, storage: str, *, keep_attention: bool = False) -> Durations:
    """Seconds of a block of T2V-A14B while a LoRA is trained with gradient checkpointing."""
    facts = VARIANTS["t2v-a14b"]
    size = TransformerSize.of_variant(facts)
    forward = block_flops(size, tokens)
    step = training_flops(forward, "adapter", attention_backward=FLASH_BACKWARD, recomputations=1)
    if keep_attention:
        step -= forward.attention
    width = size.width
    linears = 8 * width**2 + 2 * width * size.feed_forward
    kept = tokens * width * 4  # the block's input in float32
    if keep_attention:
        kept += 2 * tokens * width * 2  # the outputs of both attentions in bfloat16
    # The block is computed again up to the feed-forward layer, which is differentiated first; a
    # LoRA's weights have no gradient of their own size.
    again = 2 * tokens * width * (2 * width + 2 * size.feed_forward)
    if not keep_attention:
        again = forward.total
    first = again + 2 * tokens * 2 * width * size.feed_forward
    return Durations(
        forward=forward.total / card.flops,
        backward=(step - forward.total) / card.flops,
        load=linears * STORAGE[storage] / card.bus,
        kept=kept / card.bus,
        first=first / card.flops,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Seconds of a step relative to one whose weights and block inputs stay on the device."""

    card: str
    size: str
    storage: str
    resident: int
    both_experts: bool
    slowdown: float
    hidden: float
    """The share of the copies' time that does not make the step longer."""


@cache
def recorded(resident: int, *, switches: bool = False) -> Recording:
    """The schedule with offloaded block inputs and `resident` blocks that stay."""
    with tempfile.TemporaryDirectory() as name:
        run = TinyRun(Path(name))
        return run.record(resident=resident, offload=True, switches=switches)


def predict(
    card: Card, size: str, storage: str, resident: int, *, both_experts: bool = False
) -> Prediction:
    """The replay of the recorded schedule; with `both_experts` every step changes the expert."""
    times = durations(card, SIZES[size], storage)
    recording = recorded(resident, switches=both_experts)
    return Prediction(
        card=card.name,
        size=size,
        storage=storage,
        resident=resident,
        both_experts=both_experts,
        slowdown=slowdown(recording.entries, times),
        hidden=hidden_share(recording.entries, times),
    )


ROWS = (
    ("bf16", 0, False), ("bf16", 0, True), ("bf16", 30, False), ("fp8", 0, False),
    ("fp8", 20, False), ("fp8", 20, True), ("nf4", 0, False),
)  # fmt: skip
"""Storage, resident blocks, whether every step changes the expert."""


def figure_of(predictions: Sequence[Prediction]) -> Figure:
    """The predictions, without the rows that have no visible slowdown on any card."""
    values: list[Value] = []
    for size, tokens in SIZES.items():
        for storage, resident, both in ROWS:
            key = (size, storage, resident, both)
            found = [
                p for p in predictions if (p.size, p.storage, p.resident, p.both_experts) == key
            ]
            if all(f"{p.slowdown:.2f}" == "1.00" for p in found):
                continue
            case = as_case(
                size=size,
                tokens=tokens,
                weights=f"{storage}, expert changes" if both else storage,
                blocks=f"{resident} of {BLOCKS} resident",
            )
            values += [
                Value(
                    case=case | {"machine": p.card},
                    measure="step / one without copies",
                    unit="",
                    repeats=(p.slowdown,),
                )
                for p in found
            ]
    return measured_here(
        name="streaming",
        title="Steps with streamed blocks, predicted from the recorded schedule",
        measured=(
            "The order of copies and computations is recorded from steps of a small T2V-A14B with "
            f"{BLOCKS} blocks, and replayed with the durations of T2V-A14B on each machine: rates "
            "of cards that published runs reach, and 12, 25 and 50 GB/s for 16 lanes of PCIe 3, 4 "
            "and 5. It is arithmetic: none of these machines has run it. Rows that would be 1.00 "
            "everywhere are left out."
        ),
        values=values,
        charts=[
            Chart(
                measure="step / one without copies",
                title=f"Duration of a step with streamed blocks, relative to one without copies: "
                f"{card} (predicted)",
                only=as_case(machine=card),
            )
            for card in ("RTX 4090, PCIe 4", "RTX 5090, PCIe 5")
        ],
        across="machine",
    )


def loads_are_least() -> bool:
    """Print how many blocks a step of the small model loads; returns whether it is no more than it
    must, and whether every block was there in time."""
    good = True
    for resident in (0, 20, 38):
        for switches in (False, True):
            r = recorded(resident, switches=switches)
            print(
                f"{resident:2} resident, {'two experts' if switches else 'one expert '}: "
                f"{r.loads} blocks loaded per step, at least {r.least}; {r.misses} waits for one",
                flush=True,
            )
            good = good and r.loads == r.least and not r.misses
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_output_options(parser)
    options = parser.parse_args()
    good = loads_are_least()
    predictions = [
        predict(card, size, storage, resident, both_experts=both)
        for size in SIZES
        for storage, resident, both in ROWS
        for card in CARDS
    ]
    figure = figure_of(predictions)
    for table in tables_of(figure):
        print(table.markdown())
    save(figure, options)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
