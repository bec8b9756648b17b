"""Adds `ModelType.WAN_2_2` with the first of OneTrainer's enums that is imported, so that a module
of the add-on can be imported before all others; `modules.util.wan_addon` adds the rest."""

import contextlib
import importlib

with contextlib.suppress(Exception):  # `wan_addon.join` prints why
    importlib.import_module("onewan.onetrainer.patches").add_member()
