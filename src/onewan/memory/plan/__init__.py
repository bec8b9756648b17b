"""The plan of a run: the bytes that each of its phases needs, the settings that fit, and the time.

Arithmetic on the run file, the sizes of the clips and the headers of the model's files: no weights
are loaded, and neither torch nor diffusers is imported, so that ``onewan plan`` answers at once.
"""

from onewan.memory.plan.bucket import Bucket
from onewan.memory.plan.free_space import ARCHIVES, CACHE, free_bytes, full_disks
from onewan.memory.plan.machine import MACHINE_SIZE, Machine, find_machine, machine_of
from onewan.memory.plan.make import check_plan, disk_space, limited, make_plan, trained_counts
from onewan.memory.plan.processes import divided, of_each_process
from onewan.memory.plan.result import (
    BucketPlan,
    PhaseBytes,
    Plan,
    Processes,
    RunTime,
    StepTime,
)
from onewan.memory.plan.settings import Settings
from onewan.memory.plan.sharing import Sharing
from onewan.memory.plan.smallest import smallest_machine
from onewan.memory.plan.stored import StoredModel, read_stored_model

__all__ = [
    "ARCHIVES",
    "CACHE",
    "MACHINE_SIZE",
    "Bucket",
    "BucketPlan",
    "Machine",
    "PhaseBytes",
    "Plan",
    "Processes",
    "RunTime",
    "Settings",
    "Sharing",
    "StepTime",
    "StoredModel",
    "check_plan",
    "disk_space",
    "divided",
    "find_machine",
    "free_bytes",
    "full_disks",
    "limited",
    "machine_of",
    "make_plan",
    "of_each_process",
    "read_stored_model",
    "smallest_machine",
    "trained_counts",
]
