"""Named patches of a running OneTrainer, in the order in which they are applied.

`patch` knows how one is applied and taken back; `fields.json` holds the fields that the add-on adds
to OneTrainer's configs and windows.
"""

from __future__ import annotations

from onewan.onetrainer.patches.configs import SampleConfigFields, TrainConfigFields
from onewan.onetrainer.patches.model_type import ModelTypeMember
from onewan.onetrainer.patches.patch import Patch
from onewan.onetrainer.patches.views import (
    ConvertTool,
    ModelTab,
    SampleFrame,
    TopBar,
    TrainingTab,
)

PATCHES: tuple[type[Patch], ...] = (
    ModelTypeMember,
    TrainConfigFields,
    SampleConfigFields,
    TopBar,
    ConvertTool,
    ModelTab,
    TrainingTab,
    SampleFrame,
)
