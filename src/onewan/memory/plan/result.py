"""What a plan says: bytes per phase, settings and time of each bucket, and what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.memory.plan.bucket import Bucket
from onewan.memory.plan.machine import Machine
from onewan.memory.plan.settings import Settings
from onewan.memory.plan.shapes import VaeShape
from onewan.memory.plan.sharing import ALONE, Sharing
from onewan.variants import ExpertName


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseBytes:
    """The bytes that one phase of a run has at its peak, by what they are for."""

    phase: str
    """Such as "training" or "sampling: decoding"."""
    device: Mapping[str, int]
    """What is on the device. The values add up to the phase's peak."""
    pinned: Mapping[str, int]
    """What is in host memory that the device copies from and to (page-locked where possible)."""
    pageable: Mapping[str, int]
    """What else is in host memory."""

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def pinned_bytes(self) -> int:
        return sum(self.pinned.values())

    @property
    def host_bytes(self) -> int:
        return self.pinned_bytes + sum(self.pageable.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Work and predicted time of one optimizer step, by arithmetic."""

    seconds: float
    resident_seconds: float
    """The same with the same recomputation, and nothing copied."""
    flops: float
    """With recomputation."""
    model_flops: float
    """Without recomputation."""
    bytes_to_device: float
    bytes_to_host: float
    weights_to_device: float
    """Of the bytes to the device, those of streamed weights."""

    @property
    def slowdown(self) -> float:
        """How many times as long a step takes as one that copies nothing."""
        return self.seconds / self.resident_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTime:
    """Predicted time of a whole run, by arithmetic. Loading, encoding, decoding of sample videos
    and checkpoints are not in it."""

    steps: int
    expert_steps: Mapping[ExpertName, int]
    """Of each trained expert."""
    step: float
    """Seconds of an optimizer step, on average over the clips."""
    samples: int
    """Sample videos of the whole run."""
    sample: float
    """Seconds of one sample video, at the run file's size, frames and steps."""
    full_samples: int
    """Sample videos without distilled LoRAs, where the others have them."""
    full_sample: float
    """Seconds of one of these."""
    validations: int
    validation: float
    """Seconds of one validation, of all experts."""

    @property
    def total(self) -> float:
        """Seconds of the run."""
        return (
            self.steps * self.step
            + self.samples * self.sample
            + self.full_samples * self.full_sample
            + self.validations * self.validation
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """What several processes on one machine give a run, each with a device of its own. By
    arithmetic."""

    count: int
    division: str
    """What each of them does, for the user."""
    side_by_side: bool
    """Whether two experts are trained at the same time."""
    steps: int
    """Of the run."""
    unpaired_steps: int
    """Those of one expert, of two that are trained at the same time, while the other one waits."""
    parts: int
    """In how many parts a step's clips are shared."""
    sequence: int
    """How many processes share the tokens of a clip."""
    clips: int
    """Of a step."""
    clips_of_each: int
    """Of a step, that the process with most of them has."""
    step: float
    """Seconds of an optimizer step, with what processes wait for each other."""
    summing: float
    """Seconds of it for the sums of gradients, which are sent at the rate of the bus."""
    gradient_bytes: int
    """That each process has to sum with others in a step, whole."""
    waiting: float
    """Seconds of it in which nothing is computed, until weights of blocks are gathered and their
    gradients are summed, where weights are sharded."""
    weight_bytes: float
    """That each process sends for these in a step."""
    exchanging: float
    """Seconds of it for what processes exchange that share the tokens of a clip."""
    token_bytes: float
    """That each process sends for that in a step."""
    total: float
    """Seconds of the whole run, as `RunTime.total`."""
    alone: float | None
    """The same with one process, which has all of the host's memory; None if it does not fit on
    one device."""
    host_bytes: int
    """Of host memory at the peak, of all processes together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketPlan:
    """The settings for the clips of one bucket, and what a training step then needs."""

    bucket: Bucket
    tokens: int
    """Of one clip."""
    settings: Settings
    training: PhaseBytes
    time: StepTime


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run needs, and the settings that it trains with."""

    machine: Machine
    buckets: tuple[BucketPlan, ...]
    """Those that do not fit first, then those with most tokens."""
    other_phases: tuple[PhaseBytes, ...]
    """Encoding, validation and sampling."""
    layers: int
    """Blocks of an expert."""
    sampling_resident_blocks: int
    """Blocks of an expert that stay on the device while videos are sampled."""
    disk: Mapping[str, int]
    """Bytes of the files that the run writes."""
    run_time: RunTime
    vae: VaeShape
    suggestions: tuple[Suggestion, ...]
    """Changes of the run file that make it fit, or make it faster; the cheapest first."""
    notes: tuple[str, ...] = ()
    """What was assumed."""
    clips: int = 0
    """Number of clips, by the headers of their files; 0: there are none yet, or it is not known."""
    processes: Processes | None = None
    """What several processes give, of which the rest is the plan of one; None: there is one."""
    sharing: Sharing = ALONE
    """What a process has of the weights and of a clip."""
    enough: int | None = None
    """Of a run that does not fit: how many processes would have the memory for it, if that is
    known."""

    @property
    def enough_text(self) -> str:
        """The same, for the user."""
        return (
            f"{self.enough} processes, with such a device and {format_bytes(self.machine.ram)} of "
            "host memory each, have the memory for it: the weights of blocks are sharded among "
            "those that train the same expert"
        )

    @property
    def worst(self) -> BucketPlan:
        """The bucket whose clips need most, which training runs first."""
        return self.buckets[0]

    @property
    def phases(self) -> tuple[PhaseBytes, ...]:
        """All phases, training as that of the worst bucket."""
        return (*self.other_phases, self.worst.training)

    @property
    def peak(self) -> PhaseBytes:
        """The phase with the highest peak on the device."""
        trainings = (bucket.training for bucket in self.buckets)
        return max((*self.other_phases, *trainings), key=lambda phase: phase.device_bytes)

    @property
    def host_peak(self) -> PhaseBytes:
        """The phase with the highest peak in host memory."""
        trainings = (bucket.training for bucket in self.buckets)
        return max((*self.other_phases, *trainings), key=lambda phase: phase.host_bytes)

    @property
    def fits(self) -> bool:
        return not self.problems()

    def for_bucket(self, bucket: Bucket) -> BucketPlan:
        """The plan for clips of `bucket`; KeyError for one that the plan was not made for."""
        for found in self.buckets:
            if found.bucket == bucket:
                return found
        raise KeyError(f"the plan has no bucket {bucket}")

    def encoding_strips(self, bucket: Bucket) -> int:
        """In how many strips the VAE encodes clips of `bucket`, which need not be one of the
        plan's."""
        return encoding_strips(self.vae, self.machine, bucket)

    def problems(self) -> list[str]:
        """A line for each phase that needs more device memory than there is, with by how much, and
        one for the host memory."""
        machine, lines = self.machine, list[str]()
        for phase in self.phases:
            over = phase.device_bytes - machine.device_budget
            if over > 0:
                lines.append(
                    f"{phase.phase} needs {format_bytes(phase.device_bytes)} of device memory, "
                    f"{format_bytes(over)} more than the {format_bytes(machine.device_budget)} "
                    f"that a run may use of {format_bytes(machine.vram)}"
                )
        phase = self.host_peak
        over = phase.host_bytes - machine.host_budget
        if over > 0:
            count = machine.processes
            user = "a run may use of" if count == 1 else f"each of {count} processes may use of its"
            lines.append(
                f"{phase.phase} needs {format_bytes(phase.host_bytes)} of host memory, "
                f"{format_bytes(over)} more than the {format_bytes(machine.host_budget)} that "
                f"{user} {format_bytes(machine.ram)}"
            )
        return lines

    def as_data(self) -> dict[str, Any]:
        """The plan as plain data, for ``--json`` and for the run's events."""
        worst = self.worst.bucket
        return {
            "fits": self.fits,
            "problems": self.problems(),
            "machine": {
                **asdict(self.machine),
                "device_budget": self.machine.device_budget,
                "host_budget": self.machine.host_budget,
            },
            "device_peak": self.peak.device_bytes,
            "host_peak": self.host_peak.host_bytes,
            "worst_bucket": asdict(worst),
            "buckets": [
                {
                    **asdict(bucket.bucket),
                    "tokens": bucket.tokens,
                    "settings": asdict(bucket.settings),
                    "device_peak": bucket.training.device_bytes,
                    "time": {**asdict(bucket.time), "slowdown": bucket.time.slowdown},
                }
                for bucket in self.buckets
            ],
            "phases": [
                {
                    "phase": phase.phase,
                    "device": dict(phase.device),
                    "pinned": dict(phase.pinned),
                    "pageable": dict(phase.pageable),
                    "device_bytes": phase.device_bytes,
                    "host_bytes": phase.host_bytes,
                }
                for phase in self.phases
            ],
            "clips": self.clips,
            "layers": self.layers,
            "sampling_resident_blocks": self.sampling_resident_blocks,
            "disk": dict(self.disk),
            "run_time": {**asdict(self.run_time), "total": self.run_time.total},
            "processes": None if self.processes is None else asdict(self.processes),
            "suggestions": [asdict(suggestion) for suggestion in self.suggestions],
            "notes": list(self.notes),
            "sharing": asdict(self.sharing),
            "enough": self.enough,
        }


def encoding_strips(vae: VaeShape, machine: Machine, bucket: Bucket) -> int:
    """The fewest strips in which clips of `bucket` are encoded on `machine`."""
    return vae.strips(bucket, machine.device_budget - 4 * vae.weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """A change of the run file."""

    change: tuple[str, ...]
    """Overrides, such as "memory.weights=fp8"; all of them together."""
    text: str
    """What it is, for the user."""
    device_saved: int
    """Bytes by which the highest peak on the device falls."""
    host_saved: int
    seconds: float
    """Of a step of the worst bucket with it."""
    fits: bool
    """Whether the run fits with it."""
