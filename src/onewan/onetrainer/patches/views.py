"""Wan 2.2 in OneTrainer's windows.

The base classes of the views are patched, from which both toolkits inherit. The controllers that
import `modules.util.create` are not imported: if the window is the entry point, one of them is the
module that is importing the add-on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from onewan.arithmetic.condition_shares import ConditionShares, default_shares
from onewan.onetrainer.patches.configs import added_fields
from onewan.onetrainer.patches.patch import TITLE, Former, Patch, is_wan, wan_member
from onewan.onetrainer.settings import WEIGHTINGS, variant_of_base_model
from onewan.variants import Variant

Field: TypeAlias = "Mapping[str, Any]"
"""A field of fields.json."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What the widgets are shown for, so that each has an effect."""

    variant: Variant | None
    """That of the base model; None if neither its name nor its files determine it."""
    method: str
    """FINE_TUNE, LORA or EMBEDDING."""

    @classmethod
    def of(cls, config: Any) -> Shown:
        """What a `TrainConfig` selects. The window has one; it is remembered for `of_window`."""
        global _window
        base = str(config.base_model_name or "")
        _window = cls(variant_of_base_model(base, Path(base)), config.training_method.name)
        return _window

    @classmethod
    def of_window(cls) -> Shown:
        """What the window's config selected last; samples are edited without it."""
        return _window

    @property
    def trains_layers(self) -> bool:
        return self.method != "EMBEDDING"

    def has(self, field: Field) -> bool:
        """Whether `field` has an effect; those of any variant while it is unknown."""
        match field.get("only"):
            case "two experts":
                return self.variant is None or len(self.variant.experts) > 1
            case "given frames":
                return self.variant is None or self.variant.takes_image
            case "layers":
                return self.trains_layers
            case _:
                return True

    def empty(self, field: Field) -> str:
        """What `field` means where it is empty; "" if it can't be."""
        return self.filled(field.get("empty", ""))

    def filled(self, text: str) -> str:
        """`text` with the variant's values."""
        if "{" not in text:
            return text
        if self.variant is None:
            return "the model's own"
        scales = [f"{expert.guidance_scale:g}" for expert in self.variant.experts]
        return text.format(
            boundary=self.variant.boundary,
            fps=self.variant.fps,
            frames=self.variant.frames,
            steps=self.variant.sampling_steps,
            guidance=" and ".join(dict.fromkeys(scales)),
            low_guidance=scales[-1],
            shares=_listed(default_shares(self.variant)),
        )


def _listed(shares: ConditionShares) -> str:
    """As `settings.condition_shares_of` reads them: "first 0.2, none 0.8"."""
    return ", ".join(f"{given} {getattr(shares, given):g}" for given in shares.used)


_window = Shown(None, "LORA")


def _experts(shown: Shown) -> tuple[tuple[str, str], ...]:
    """The component and the title of each transformer; both while the variant is unknown."""
    if shown.variant is not None and len(shown.variant.experts) == 1:
        return (("transformer", "Transformer"),)
    return ("transformer", "High-Noise Transformer"), ("transformer_2", "Low-Noise Transformer")


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


class Presets(Patch):
    """Wan's presets in the menu of the main window. Their folder is not the one in which OneTrainer
    looks, so that they are not offered where Wan is not available."""

    module = "modules.ui.TopBarController"
    target = "TopBarController.load_preset_tree"

    def replacement(
        self, former: Former, controller: Any, dir: str = "training_presets"
    ) -> list[tuple[str, Any]]:
        presets = former(controller, dir)
        if dir != "training_presets":  # a group
            return presets
        presets.append((TITLE, former(controller, "resources/wan_presets")))
        return sorted(presets, key=lambda preset: preset[0].lower())  # as OneTrainer sorts them


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
            for component, title in _experts(Shown.of(controller.train_config)):
                _expert_row(view, frame, row, state, component, title, compressed)
                row += 1
            has["has_transformer"] = False  # everything else is the stock view's
            # Wan's VAE always computes in float32.
            with _components_called(view, _without("VAE Data Type", "vae.weight_dtype")):
                return former(view, frame, row, *args, **has)
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
        shown = Shown.of(controller.config)
        _refresh_on_change(view, controller.config, state, shown)

        def frame(kind: str, *args: Any, without: tuple[str, ...] = (), **kwargs: Any) -> None:
            with _components_called(view, _without(*without)):
                getattr(view, _FRAME.format(kind))(*args, **kwargs)

        frame("base", left, 0, controller, state)
        frame("text_encoder", left, 1, state, supports_clip_skip=False, supports_training=False)
        frame("embedding", left, 2, state)
        frame("base2", middle, 0, controller, state, video_training_enabled=True)
        experts = _experts(shown)
        for number, (component, title) in enumerate(experts, start=1):
            with _components_called(view, _renaming(component, title)):
                unused = () if shown.trains_layers else _OF_LAYERS
                flags = {"supports_force_attention_mask": False}
                frame("transformer", middle, number, state, without=unused, **flags)
        frame("noise", middle, 3, state, supports_dynamic_timestep_shifting=True)
        rows = _groups(view.components, right, state, shown)
        unused = _MASKS if shown.method == "LORA" else (*_MASKS, *_PRIOR)
        frame("masked", right, rows, state, without=unused)
        with _components_called(view, _loss_weights):
            frame("loss", right, rows + 1, controller, state, without=_LOSSES)
        if shown.trains_layers:
            frame("layer", right, rows + 2, controller, state)


_OF_LAYERS = (
    *("Stop Training After", "transformer.stop_training_after"),
    *("Transformer Learning Rate", "transformer.learning_rate"),
)
"""Labels and fields of the transformer frame that have no effect while only embeddings train."""
_MASKS = (
    *("Unmasked Probability", "unmasked_probability"),
    *("Normalize Masked Area Loss", "normalize_masked_area_loss"),
    *("Custom Conditioning Image", "custom_conditioning_image"),
)
"""Those of the masked frame: every clip has its mask, the loss is always normalized over it, and
the start image of I2V is each clip's own first frame."""
_PRIOR = ("Masked Prior Preservation Weight", "masked_prior_preservation_weight")
_LOSSES = ("MAE Strength", "mae_strength", "log-cosh Strength", "log_cosh_strength")
"""Losses that are refused when training starts."""


def _loss_weights(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # options(master, row, column, values, ui_state, variable)
    if len(args) > 5 and args[5] == "loss_weight_fn":
        args = (*args[:3], list(WEIGHTINGS), *args[4:])
    return make(*args, **kwargs)


def _refresh_on_change(view: Any, config: Any, state: Any, shown: Shown) -> None:
    """Build the view again when another variant or training method is selected."""
    is_first, view.shown_wan = not hasattr(view, "shown_wan"), shown
    if not is_first:
        return

    def changed() -> None:
        if is_wan(config.model_type) and Shown.of(config) != view.shown_wan:
            view.refresh_ui()

    for name in ("base_model_name", "training_method"):
        state.add_var_trace(name, changed)


def _without(*names: str) -> Callable[..., Any]:
    """Makes no widget for these labels and fields."""

    def make(widget: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, str)]
        return None if any(value in names for value in given) else widget(*args, **kwargs)

    return make


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


_GROUPS: Mapping[str, tuple[Field, ...]] = {
    "Experts": (
        {
            "name": "transformer_2.include",
            "type": "bool",
            "only": "two experts",
            "label": "Load Low-Noise Expert",
            "tooltip": "Off: only the high-noise expert is loaded and trained",
        },
    ),
    "Clips": (),
    "Layers": (),
    "Objective": (
        {
            "name": "loss_weight_strength",
            "type": "float",
            "label": "Min-SNR Gamma",
            "tooltip": "Used where the loss weight function is MIN_SNR_GAMMA",
        },
    ),
}
"""The headings of Wan's settings, with fields of OneTrainer's own that stand there too."""


def _groups(make: Any, master: Any, state: Any, shown: Shown) -> int:
    """Make a frame for each group of Wan's settings; returns how many."""
    made = 0
    for title, others in _GROUPS.items():
        own = [field for field in added_fields()["train"] if field["group"] == title]
        fields = [field for field in (*others, *own) if shown.has(field)]
        if not fields:
            continue
        frame = make.section_frame(master, made)
        make.label(frame, 0, 0, title, underline=True)
        for row, field in enumerate(fields, start=1):
            make.label(frame, row, 0, field["label"], tooltip=field["tooltip"])
            _widget(make, frame, (row, 1), state, field, shown)
        made += 1
    return made


def _widget(
    make: Any, frame: Any, place: tuple[int, int], state: Any, field: Field, shown: Shown
) -> None:
    if "choices" in field:
        make.options(frame, *place, field["choices"], state, field["name"])
    elif field["type"] == "bool":
        make.switch(frame, *place, state, field["name"])
    else:
        make.entry(frame, *place, state, field["name"], placeholder=shown.empty(field))


class LoraTab(Patch):
    """Rank and alpha of the low-noise expert, beside those of both."""

    module = "modules.ui.BaseLoraTabView"
    target = "BaseLoraTabView.build_lora_options"

    # In the two right columns, below the rows that the stock view fills there at most.
    _FIRST_FREE_ROW = 7

    def replacement(self, former: Former, view: Any, *args: Any, **kwargs: Any) -> Any:
        master, controller, state, peft_type = args
        result = former(view, *args, **kwargs)
        shown = Shown.of(controller.train_config)
        if not is_wan(controller.train_config.model_type) or peft_type.name == "OFT_2":
            return result
        fields = [f for f in added_fields()["train"] if f["group"] == "LoRA" and shown.has(f)]
        for row, field in enumerate(fields, start=self._FIRST_FREE_ROW):
            view.components.label(master, row, 0, field["label"], tooltip=field["tooltip"])
            _widget(view.components, master, (row, 1), state, field, shown)
        return result


class SampleFrame(Patch):
    """A sample's start image, and the fields that the add-on adds."""

    module = "modules.ui.BaseSampleFrameView"
    target = "BaseSampleFrameView.build_content"

    # The rows above it are filled by the stock view, with those of a video model at most.
    _FIRST_FREE_ROW = 7

    def replacement(self, former: Former, view: Any, *args: Any) -> Any:
        _, frame, state, controller, _, include_settings = args
        if not is_wan(controller.model_type):
            return former(view, *args)
        shown = Shown.of_window()
        empty = {name: shown.filled(text) for name, text in _OFFICIAL.items()}
        with (
            _components_called(view, _without("length:", "length")),  # of audio
            _components_called(view, _showing_when_empty(empty)),
        ):
            result = former(view, *args)
        if not include_settings:
            return result
        make, row = view.components, self._FIRST_FREE_ROW
        number = 0
        if shown.variant is None or shown.variant.takes_image:
            tooltip = "The first frame. I2V-A14B needs one, TI2V-5B can take one"
            make.label(frame, row, 0, "start image:", tooltip=tooltip)
            kind = {"mode": "file", "allow_model_files": False, "allow_image_files": True}
            make.path_entry(frame, row, 1, state, "base_image_path", **kind)
            number = 1
        fields = [field for field in added_fields()["sample"] if shown.has(field)]
        for place, field in enumerate(fields, start=number):
            line, column = row + place // 2, 2 * (place % 2)  # two fields in a row
            make.label(frame, line, column, field["label"], tooltip=field["tooltip"])
            _widget(make, frame, (line, column + 1), state, field, shown)
        return result


_OFFICIAL = {"frames": "{frames}", "diffusion_steps": "{steps}", "cfg_scale": "{guidance}"}
"""What the stock fields of a sample mean where they are empty."""


def _showing_when_empty(texts: Mapping[str, str]) -> Callable[..., Any]:
    """Shows these texts in the entries of these fields while they are empty."""

    def make(widget: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # entry(master, row, column, ui_state, variable)
        if len(args) == 5 and args[4] in texts:
            kwargs = {**kwargs, "placeholder": texts[args[4]]}
        return widget(*args, **kwargs)

    return make
