"""Adds the model type `WAN_2_2` to a running OneTrainer, without a change to its files.

`extended` is entered by the first of the installed files that OneTrainer imports; it applies
`PATCHES` in their order. OneTrainer's modules are imported only then, so this package can be read
and checked without them. `fields.json` has the fields that the add-on adds to configs and windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from onewan.onetrainer.contract import contract, native_members
from onewan.onetrainer.patches.configs import SampleConfigFields, TrainConfigFields
from onewan.onetrainer.patches.model_type import ModelTypeMember
from onewan.onetrainer.patches.patch import Patch, model_types
from onewan.onetrainer.patches.views import (
    ConvertTool,
    LoraTab,
    ModelTab,
    Presets,
    SampleFrame,
    TopBar,
    TrainingTab,
)

PATCHES: tuple[type[Patch], ...] = (
    ModelTypeMember,
    TrainConfigFields,
    SampleConfigFields,
    TopBar,
    Presets,
    ConvertTool,
    ModelTab,
    TrainingTab,
    LoraTab,
    SampleFrame,
)


class UnsupportedError(RuntimeError):
    """This OneTrainer does not have something that the add-on needs, or has Wan 2.2 itself."""


_early: list[Patch] = []
"""`ModelTypeMember`, if it was applied before the others."""


def add_member() -> None:
    """Add `ModelType.WAN_2_2` alone, with the first of OneTrainer's enums that is imported.

    The other patches change modules that may be importing that enum. `extended` applies them, or
    takes the member back. Nothing happens in a OneTrainer that has Wan 2.2 itself.
    """
    patch = ModelTypeMember()
    if not native_members(model_types()) and not patch.missing():
        patch.apply()
        _early.append(patch)


@contextmanager
def extended() -> Iterator[None]:
    """Within it, all patches are applied; they stay applied unless the block raises.

    UnsupportedError if a name is missing or this OneTrainer has Wan 2.2 itself. If a patch or the
    block fails, OneTrainer is as it was without the add-on.
    """
    patches = [*_early, *(patch() for patch in PATCHES[len(_early) :])]
    try:
        _require_support(patches)
        for patch in patches[len(_early) :]:
            patch.apply()
        yield
    except BaseException:
        # One that was not applied has nothing to take back.
        for patch in reversed(patches):
            patch.roll_back()
        _early.clear()
        raise


def _require_support(patches: Sequence[Patch]) -> None:
    native = native_members(model_types())
    if native and not _early:
        raise UnsupportedError(
            f"this OneTrainer has Wan 2.2 itself (ModelType.{native[0]}); remove the add-on with "
            "`onewan onetrainer uninstall`"
        )
    if missing := [name for patch in patches for name in patch.missing()]:
        raise UnsupportedError(
            f"this OneTrainer has no {', '.join(missing)}. The add-on supports commit "
            f"{contract()['commit'][:8]} and later ones with the same names; run "
            "`onewan onetrainer check` on it, and update onewan or go back to that commit"
        )
