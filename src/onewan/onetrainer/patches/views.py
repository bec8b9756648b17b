"""Wan 2.2 in OneTrainer's windows.

The base classes of the views are patched, from which both toolkits inherit. The controllers that
import `modules.util.create` are not imported: if the window is the entry point, one of them is the
module that is importing the add-on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from onewan.onetrainer.patches.configs import added_fields
from onewan.onetrainer.patches.patch import TITLE, Former, Patch, is_wan, wan_member

_EXPERTS = (("transformer", "High-Noise Transformer"), ("transformer_2", "Low-Noise Transformer"))


class _PatchedComponents:
    """A toolkit's widget functions, each called through `through(function, *args, **kwargs)`."""

    def __init__(self, components: Any, through: Callable[..., Any]) -> None:
        self._components = components
        self._through = through

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._components, name)
        if not callable(found):
            return found
        return lambda *args, **kwargs: self._through(found, *args, **kwargs)


@contextmanager
def _components_called(view: Any, through: Callable[..., Any]) -> Iterator[None]:
    """Within it, the view makes its widgets through `through`."""
    components = view.components
    view.components = _PatchedComponents(components, through)
    try:
        yield
    finally:
        view.components = components


class TopBar(Patch):
    """The list of model types of the main window."""

    module = "modules.ui.TopBarController"
    target = "TopBarController.get_model_types"

    def replacement(self, former: Former, controller: Any) -> Any:
        return [*former(controller), (TITLE, wan_member())]


class ConvertTool(Patch):
    """The list of model types of the convert tool, which stands in the code of its view."""

    module = "modules.ui.BaseConvertModelUIView"
    target = "BaseConvertModelUIView.build_content"

    def replacement(self, former: Former, view: Any, *args: Any, **kwargs: Any) -> Any:
        with _components_called(view, self._with_wan):
            return former(view, *args, **kwargs)

    def _with_wan(self, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # options_kv(master, row, column, values, ui_state, variable)
        if len(args) > 5 and args[5] == "model_type":
            args = (*args[:3], [*args[3], (TITLE, wan_member())], *args[4:])
        return make(*args, **kwargs)


class ModelTab(Patch):
    """A row for each expert: another source of its weights, and its data type."""

    module = "modules.ui.BaseModelTabView"
    target = "BaseModelTabView._BaseModelTabView__create_base_components"
    uses: ClassVar[Mapping[str, tuple[str, ...]]] = {
        module: ("BaseModelTabView._BaseModelTabView__create_dtype_options",)
    }

    def replacement(
        self, former: Former, view: Any, frame: Any, row: int, *args: Any, **has: Any
    ) -> int:
        controller, state = args
        if is_wan(controller.train_config.model_type):
            # The stock view has a row for one transformer; Wan has two.
            compressed = has.get("include_compressed", False)
            for component, title in _EXPERTS:
                _expert_row(view, frame, row, state, component, title, compressed)
                row += 1
            has["has_transformer"] = False  # everything else is the stock view's
        return former(view, frame, row, *args, **has)


def _expert_row(
    view: Any, frame: Any, row: int, state: Any, component: str, title: str, compressed: bool
) -> None:
    make = view.components
    tooltip = (
        f"A file, folder or Hugging Face repository for the {title.lower()} instead of the base "
        "model's: safetensors, GGUF, fp8, or a folder in the diffusers or official layout"
    )
    make.label(frame, row, 0, f"Override {title}", tooltip=tooltip)
    make.path_entry(frame, row, 1, state, f"{component}.model_name", mode="file")
    tooltip = f"The {title.lower()}'s weight data type"
    make.label(frame, row, 3, f"{title} Data Type", tooltip=tooltip)
    options = view._BaseModelTabView__create_dtype_options(
        include_a8=True, include_compressed=compressed
    )
    make.options_kv(frame, row, 4, options, state, f"{component}.weight_dtype")


_FRAME = "_BaseTrainingTabView__create_{}_frame"
# fmt: off
_FRAMES = (
    "base", "base2", "text_encoder", "embedding", "transformer", "noise", "masked", "loss", "layer",
)
# fmt: on


class TrainingTab(Patch):
    """The training tab for Wan: stock frames, one frame for each expert, and Wan's own."""

    module = "modules.ui.BaseTrainingTabView"
    target = "BaseTrainingTabView.build"
    uses: ClassVar[Mapping[str, tuple[str, ...]]] = {
        module: tuple(f"BaseTrainingTabView.{_FRAME.format(frame)}" for frame in _FRAMES)
    }

    def replacement(self, former: Former, view: Any, *args: Any) -> None:
        left, middle, right, controller, state = args
        if not is_wan(controller.config.model_type):
            former(view, *args)
            return

        def frame(kind: str, *args: Any, **kwargs: Any) -> None:
            getattr(view, _FRAME.format(kind))(*args, **kwargs)

        frame("base", left, 0, controller, state)
        frame("text_encoder", left, 1, state, supports_clip_skip=False, supports_training=False)
        frame("embedding", left, 2, state)
        frame("base2", middle, 0, controller, state, video_training_enabled=True)
        for number, (component, title) in enumerate(_EXPERTS):
            with _components_called(view, _renaming(component, title)):
                frame("transformer", middle, 1 + number, state, supports_force_attention_mask=False)
        frame("noise", middle, 3, state, supports_dynamic_timestep_shifting=True)
        _wan_frame(view.components, right, state)
        frame("masked", right, 1, state)
        frame("loss", right, 2, controller, state)
        frame("layer", right, 3, controller, state)


def _renaming(component: str, title: str) -> Callable[..., Any]:
    """Makes the widgets of the stock transformer frame for one expert: its fields and labels."""

    def renamed(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value.startswith("transformer."):
            return f"{component}.{value.removeprefix('transformer.')}"
        return value.replace("Transformer", title)

    def make(widget: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        named = {key: renamed(value) for key, value in kwargs.items()}
        return widget(*map(renamed, args), **named)

    return make


def _wan_frame(make: Any, master: Any, state: Any) -> None:
    frame = make.section_frame(master, 0)
    for row, field in enumerate(added_fields()["train"]):
        make.label(frame, row, 0, field["label"], tooltip=field["tooltip"])
        _widget(make, frame, (row, 1), state, field)


def _widget(make: Any, frame: Any, place: tuple[int, int], state: Any, field: Any) -> None:
    if "choices" in field:
        make.options(frame, *place, field["choices"], state, field["name"])
    elif field["type"] == "bool":
        make.switch(frame, *place, state, field["name"])
    else:
        make.entry(frame, *place, state, field["name"])


class SampleFrame(Patch):
    """A sample's start image, and the fields that the add-on adds."""

    module = "modules.ui.BaseSampleFrameView"
    target = "BaseSampleFrameView.build_content"

    # The rows above it are filled by the stock view, with those of a video model at most.
    _FIRST_FREE_ROW = 7

    def replacement(self, former: Former, view: Any, *args: Any) -> Any:
        _, frame, state, controller, _, include_settings = args
        result = former(view, *args)
        if not (is_wan(controller.model_type) and include_settings):
            return result
        make, row = view.components, self._FIRST_FREE_ROW
        tooltip = "The first frame. I2V-A14B needs one, TI2V-5B can take one"
        make.label(frame, row, 0, "start image:", tooltip=tooltip)
        kind = {"mode": "file", "allow_model_files": False, "allow_image_files": True}
        make.path_entry(frame, row, 1, state, "base_image_path", **kind)
        for number, field in enumerate(added_fields()["sample"], start=1):
            line, column = row + number // 2, 2 * (number % 2)  # two fields in a row
            make.label(frame, line, column, field["label"], tooltip=field["tooltip"])
            _widget(make, frame, (line, column + 1), state, field)
        return result
