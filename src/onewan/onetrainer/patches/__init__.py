"""Adds the model type `WAN_2_2` to a running OneTrainer, without a change to its files.

`extend` is called by the first of the installed files that OneTrainer imports; it applies `PATCHES`
in their order. OneTrainer's modules are imported only then, so this package can be read and checked
without them. `fields.json` has the fields that the add-on adds to configs and windows.
"""

from __future__ import annotations

from typing import Any

from onewan.onetrainer.contract import contract
from onewan.onetrainer.patches.configs import SampleConfigFields, TrainConfigFields
from onewan.onetrainer.patches.model_type import ModelTypeMember
from onewan.onetrainer.patches.patch import Patch, wan_member
from onewan.onetrainer.patches.views import ConvertTool, ModelTab, SampleFrame, TopBar, TrainingTab

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


class UnsupportedError(RuntimeError):
    """This OneTrainer does not have something that the add-on needs."""


def extend() -> Any:
    """Apply all patches, once; returns the member of `ModelType`.

    UnsupportedError, before anything is changed, if a name is missing. A patch that fails leaves
    OneTrainer as it was: it and those before it are rolled back.
    """
    patches = [patch() for patch in PATCHES]
    if missing := [name for patch in patches for name in patch.missing()]:
        raise UnsupportedError(
            f"this OneTrainer has no {', '.join(missing)}. The add-on supports commit "
            f"{contract()['commit'][:8]} and later ones with the same names; run "
            "`onewan onetrainer check` on it, and update onewan or go back to that commit"
        )
    if (member := wan_member()) is not None:
        return member
    try:
        for patch in patches:
            patch.apply()
    except BaseException:
        # One that was not applied has nothing to take back.
        for patch in reversed(patches):
            patch.roll_back()
        raise
    return wan_member()
