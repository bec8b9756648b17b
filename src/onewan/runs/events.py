"""What can happen in a run: one frozen dataclass for each kind of event.

An event is one JSON object on a line of ``events.jsonl``: ``event`` (the kind), ``time`` (UTC, ISO
8601), and the fields of its class. Within one `SCHEMA_VERSION`, which `Started` contains, kinds and
fields are only added, so readers ignore those that they don't know. This module only declares
events: `onewan.runs.log` delivers them, `onewan.runs.event_file` writes and reads them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

SCHEMA_VERSION = 1
"""Raised when a field is removed or changes its meaning."""

HEARTBEAT_SECONDS = 30.0
"""A trainer that is alive writes a line at least once in this many seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base class of all events."""

    kind: ClassVar[str]
    """Value of ``event`` in the file."""

    def fields(self) -> dict[str, Any]:
        """Name and value of each field, in the order of declaration."""
        # Not `dataclasses.asdict`, which would copy every list of an event.
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressEvent(Event):
    """`done` of `total` items of one activity; frequent, so the event file has only some of them.

    There is always one for the first and one for the last item.
    """

    done: int
    total: int

    @property
    def activity(self) -> str:
        """Separates the first item of one activity from the last one of another."""
        return self.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Event):
    """First event of a process that trains: of a new run, or of one that is resumed."""

    kind: ClassVar[str] = "started"
    run: Path
    """The run's folder."""
    steps: int | None
    """Step at which the run ends; null if it follows from `train.epochs` and the clips, until
    `DataReady`."""
    schema_version: int = SCHEMA_VERSION
    pid: int = field(default_factory=os.getpid)
    hostname: str = field(default_factory=socket.gethostname)
    heartbeat_seconds: float = HEARTBEAT_SECONDS
    """If the last line is much older, and does not say that the run ended, the process is dead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment(Event):
    """What the process runs on."""

    kind: ClassVar[str] = "environment"
    system: str
    """Operating system and processor."""
    device: str
    """Name of the device that the run trains on."""
    device_memory: int | None
    """Bytes; null if the device does not say it."""
    packages: Mapping[str, str]
    """Versions of Python, onewan and the packages on which results depend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes(Event):
    """The processes that train the run together; not of a run of one. All lists are by rank."""

    kind: ClassVar[str] = "processes"
    hostnames: Sequence[str]
    pids: Sequence[int]
    devices: Sequence[str]
    """PyTorch's names, such as "cuda:1"."""
    experts: Sequence[Sequence[str]]
    """Those that each process trains."""
    clocks_ahead: Sequence[float]
    """Seconds by which the clock of each machine is ahead of the first one's, to within the time
    that a message takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat(Event):
    """Written only to the file, when there was no other event for `HEARTBEAT_SECONDS`."""

    kind: ClassVar[str] = "heartbeat"
    pid: int = field(default_factory=os.getpid)
    hostname: str = field(default_factory=socket.gethostname)


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding(ProgressEvent):
    """Clips, masks or captions are checked or encoded before the first step."""

    kind: ClassVar[str] = "encoding"
    what: str
    """The activity, such as "encoding clips"."""

    @property
    def activity(self) -> str:
        return self.what


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReady(Event):
    """Every clip that can be used is encoded."""

    kind: ClassVar[str] = "data"
    clips: int
    """Clips to train on."""
    encoded: int
    """Cache entries that had to be encoded."""
    report: Sequence[str]
    """Lines about the clips, and about files that can't be used."""
    steps: int
    """Step at which the run ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed(Event):
    """A saved state was loaded."""

    kind: ClassVar[str] = "resumed"
    step: int
    state: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Note(Event):
    """Something worth knowing that needs no action."""

    kind: ClassVar[str] = "note"
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned(Event):
    """Something that may make the run differ from what the user wants; the run continues."""

    kind: ClassVar[str] = "warning"
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionChosen(Event):
    """The attention backend of this process; a resumed run has the same."""

    kind: ClassVar[str] = "attention"
    backend: str
    """Its name in the run file (`memory.attention`)."""
    milliseconds: Mapping[str, float]
    """Of a forward and a backward pass over the tokens of the run's largest clip, by backend, the
    fastest first. Empty if nothing was measured: on the CPU, with a backend given by name, in a
    resumed run, and where only one can be used."""
    unusable: Mapping[str, str]
    """Why others can't be used, by backend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlanned(Event):
    """The memory plan of this process (`onewan plan`); none on a CPU."""

    kind: ClassVar[str] = "plan"
    device_peak: int
    """Bytes at the highest peak of all phases on the device."""
    device_memory: int
    """Bytes that the device has, or that `memory.vram` allows."""
    host_peak: int
    """Bytes at the highest peak in host memory."""
    phase: str
    """The phase with the highest peak on the device."""
    plan: Mapping[str, object]
    """The whole plan, as ``onewan plan --json`` prints it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview(Event):
    """What the run does from its first to its last step; known before the first one."""

    kind: ClassVar[str] = "overview"
    steps: Mapping[str, int]
    """Steps that train each expert."""
    clips: int
    """Clips to train on."""
    expert_clips: Mapping[str, int]
    """Those of them that each expert trains: all, but for sources with timesteps of their own."""
    seen: Mapping[str, float]
    """How often each expert goes through its clips."""
    parameters: Mapping[str, int]
    """Trainable parameters of each expert, or of "embeddings"."""
    disk: Mapping[str, int]
    """Bytes of the files that the run writes, by what they are, by the plan."""
    step_seconds: float | None
    """Predicted time of a step on average, by arithmetic; null on a CPU."""
    run_seconds: float | None
    """The same for the whole run, with sample videos and validations."""
    weights: Path
    """The folder that weights are exported to."""
    samples: Path | None
    """The folder of sample videos; null if the run makes none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryMeasured(Event):
    """The largest batch went through forward and backward pass once, before the first step."""

    kind: ClassVar[str] = "memory"
    bucket: str
    """Frames x height x width."""
    planned: int
    """Bytes on the device at the peak of a training step, by the plan."""
    measured: int | None
    """Bytes on the device at the peak of the two passes; null if the device has no statistics. A
    new run has no optimizer state yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone(Event):
    """One optimizer step of one expert."""

    kind: ClassVar[str] = "step"
    step: int
    """Steps done so far, this one included."""
    expert: str
    loss: float
    """Mean over the clips of the step."""
    grad_norm: float
    """Before clipping."""
    lr: float
    t: Sequence[float]
    """Timestep of each clip, in [0, 1]."""
    seconds: float
    memory_allocated: int | None = None
    """Bytes of device memory in use after the step; null if the device has no such statistics."""
    memory_peak: int | None = None
    """Peak of the bytes in use since the process started."""
    step_memory_peak: int | None = None
    """Peak of the bytes in use during the step."""
    bytes_to_device: int | None = None
    """Bytes of streamed weights and offloaded activations that were copied to the device; null on a
    CPU."""
    bytes_to_host: int | None = None
    """Bytes of activations, and of weights that are trained by streamed blocks, that were copied to
    host memory; null on a CPU."""
    tokens_per_second: float | None = None
    """Tokens of all clips of the step per second."""
    tflops: float | None = None
    """10^12 floating-point operations per second, of the model's forward and backward passes alone:
    what gradient checkpointing computes again does not count."""
    preservation_loss: float | None = None
    """What is added to the loss for predictions of the base model that are kept (`class_word` of a
    source), with its weight; null if none is kept."""
    embeddings_lr: float | None = None
    """Learning rate of embeddings that are trained beside another method; null if there are
    none."""
    mfu: float | None = None
    """Model FLOPs utilisation, from 0 to 1: `tflops` as a share of what the device reached in
    matrix products at the start; null on a CPU."""
    seconds_left: float | None = None
    """Until the end of the run, by the measured steps of each expert, validations, checkpoints and
    sample videos."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated(Event):
    """An expert's loss on the validation clips."""

    kind: ClassVar[str] = "validation"
    step: int
    expert: str
    loss: float
    ema: float | None
    """Loss with the moving average of the weights; null if there is none."""
    base: float | None
    """Loss of the base model, measured at step 0; null if it was not measured."""
    held_out: bool
    """Whether the clips are held out from training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BestSoFar(Event):
    """The mean validation loss of all experts is the lowest of the run so far."""

    kind: ClassVar[str] = "best"
    step: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved(Event):
    """A training state is complete on disk."""

    kind: ClassVar[str] = "saved"
    step: int
    state: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported(Event):
    """A file of trained weights for other programs is complete on disk."""

    kind: ClassVar[str] = "exported"
    step: int
    expert: str
    """Name of the expert, or "embeddings"."""
    file: Path
    best_loss: float | None = None
    """Validation loss, if the file is that of the best weights so far; null for all others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BestWeights(Event):
    """At the end of a run that validates: a file with the weights of the lowest validation loss."""

    kind: ClassVar[str] = "best_weights"
    expert: str
    """Name of the expert, or "embeddings"."""
    file: Path
    step: int
    """The step of which its weights are."""
    loss: float
    base: float | None
    """Loss of the base model; null if it was not measured."""
    held_out: bool
    """Whether the clips are held out from training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling(ProgressEvent):
    """Denoising steps of sample video `number`."""

    kind: ClassVar[str] = "sampling"
    step: int
    number: int

    @property
    def activity(self) -> str:
        return f"sampling {self.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled(Event):
    """A sample video is complete on disk."""

    kind: ClassVar[str] = "sampled"
    step: int
    file: Path
    prompt: str
    distilled: bool = False
    """Whether it was sampled in a few steps with distilled LoRAs."""
    requested: bool = False
    """Whether its prompt was given while the run trained (``onewan sample-now --prompt``)."""
    seed: int | None = None
    """Seed of its noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingChanged(Event):
    """A setting has another value from the next step on."""

    kind: ClassVar[str] = "settings"
    step: int
    """Steps that were done before."""
    name: str
    """Dotted name of the field of the run file."""
    old: Any
    new: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected(Event):
    """A request to the trainer is not followed."""

    kind: ClassVar[str] = "rejected"
    step: int
    request: str
    """What was requested: "settings", or "sample" for a video of a prompt."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped(Event):
    """The run was stopped on request; its state is saved."""

    kind: ClassVar[str] = "stopped"
    step: int
    """Step of the saved state; 0 if the run was stopped before its first step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Event):
    """The run ended with an error; states saved before are kept."""

    kind: ClassVar[str] = "failed"
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Event):
    """All steps are done."""

    kind: ClassVar[str] = "finished"
    step: int
    run: Path


ENDS = (Stopped.kind, Failed.kind, Finished.kind)
"""Kinds of the last event of a process that ended and was not killed."""


def event_of(line: Mapping[str, Any]) -> Event | None:
    """The event that a line of the file is about; None if its kind is that of a later version, or
    if a field is missing. Values are as the file has them, which may be damaged."""
    kind = _kinds().get(str(line.get("event")))
    if kind is None:
        return None
    values = {item.name: line[item.name] for item in fields(kind) if item.name in line}
    for item in fields(kind):
        if item.name in values and "Path" in str(item.type) and values[item.name] is not None:
            values[item.name] = Path(str(values[item.name]))
    try:
        return kind(**values)
    except TypeError:
        return None


@cache
def _kinds() -> dict[str, type[Event]]:
    # Not `__subclasses__`, which also has the classes that were replaced for their slots.
    found = [each for each in globals().values() if isinstance(each, type) and "kind" in vars(each)]
    return {each.kind: each for each in found if issubclass(each, Event)}
