"""Fields that a run file of an earlier version has: they are read as what replaced them.

Saved states and the resolved files of runs contain all fields, so without this no run could be
resumed by a later version.
"""

from __future__ import annotations

from typing import Any


def with_present_fields(data: Any) -> Any:
    """The content of a run file with the present names of its fields; `data` is not changed."""
    train = data.get("train") if isinstance(data, dict) else None
    if not isinstance(train, dict) or "first_frame_probability" not in train:
        return data
    if train.get("condition_shares") is not None:
        return data  # both were written, and the older one is reported as unknown
    present = {name: value for name, value in train.items() if name != "first_frame_probability"}
    share, model = train["first_frame_probability"], data.get("model")
    # It was a fact of TI2V-5B alone; resolved files of other variants have it all the same.
    if isinstance(model, dict) and model.get("variant") == "ti2v-5b":
        if isinstance(share, bool) or not isinstance(share, int | float):
            return data
        present["condition_shares"] = {"first": share, "none": 1 - share}
    return {**data, "train": present}
