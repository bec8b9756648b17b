"""Adds the model type `WAN_2_2` to a running OneTrainer, without a change to its files.

`extended` is entered by the first of the installed files that OneTrainer imports; it applies
`PATCHES` in their order. OneTrainer's modules are imported only then, so this package can be read
and checked without them. `fields.json` has the fields that the add-on adds to configs and windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from onewan.onetrainer.contract import contract, native_members
from onewan.onetrainer.patches.configs import SampleConfigFields, TrainConfigFields
from onewan.onetrainer.patches.model_type import ModelTypeMember
from onewan.onetrainer.patches.patch import Patch, model_types
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
    """This OneTrainer does not have something that the add-on needs, or has Wan 2.2 itself."""


@contextmanager
def extended() -> Iterator[None]:
    """Within it, all patches are applied; they stay applied unless the block raises.

    UnsupportedError, before anything is changed, if a name is missing or this OneTrainer has Wan
    2.2 itself. If a patch or the block fails, OneTrainer is as it was before.
    """
    if native := native_members(model_types()):
        raise UnsupportedError(
            f"this OneTrainer has Wan 2.2 itself (ModelType.{native[0]}); remove the add-on with "
            "`onewan onetrainer uninstall`"
        )
    patches = [patch() for patch in PATCHES]
    if missing := [name for patch in patches for name in patch.missing()]:
        raise UnsupportedError(
            f"this OneTrainer has no {', '.join(missing)}. The add-on supports commit "
            f"{contract()['commit'][:8]} and later ones with the same names; run "
            "`onewan onetrainer check` on it, and update onewan or go back to that commit"
        )
    try:
        for patch in patches:
            patch.apply()
        yield
    except BaseException:
        # One that was not applied has nothing to take back.
        for patch in reversed(patches):
            patch.roll_back()
        raise
