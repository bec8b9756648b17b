"""Fields that a run file of an earlier version has: they are read as what replaced them.

Saved states and the resolved files of runs contain all fields, so without this no run could be
resumed by a later version.
"""

from __future__ import annotations

from typing import Any


def with_present_fields(data: Any) -> Any:
    """The content of a run file with the present names of its fields; `data` is not changed."""
    train, model = _mapping(_mapping(data).get("train")), _mapping(_mapping(data).get("model"))
    # If both were written, the older one is reported as unknown.
    if "first_frame_probability" not in train or train.get("condition_shares") is not None:
        return data
    present = {name: value for name, value in train.items() if name != "first_frame_probability"}
    share = train["first_frame_probability"]
    # It was a fact of TI2V-5B alone; resolved files of other variants have it all the same.
    if model.get("variant") == "ti2v-5b":
        if isinstance(share, bool) or not isinstance(share, int | float):
            return data
        present["condition_shares"] = {"first": share, "none": 1 - share}
    return {**data, "train": present}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}  # pyright: ignore[reportUnknownVariableType]
