"""Makes a running OneTrainer know the model type `WAN_2_2`, without a change to its files.

`extend` is called by the first of the laid-in files that OneTrainer imports. It looks first whether
everything that it will touch is there, and touches nothing if it is not; called again it does
nothing. OneTrainer's modules are imported inside of it: this module can be read and checked without
them.

The views are patched on the base classes, from which both toolkits inherit. Controllers that import
`modules.util.create` must not be imported here: when the window is the entry point, one of them is
the module that is importing us.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

NAME = "WAN_2_2"
TITLE = "Wan 2.2"
PARTS = ("transformer", "transformer_2", "text_encoder", "vae")
KNOWN_COMMIT = "23df3832"
"""The commit of OneTrainer (19 August 2026) that the add-on was made for and is tested with."""

TOUCHED: dict[str, tuple[str, ...]] = {
    "modules.util.enum.ModelType": (
        "_MODEL_PARTS",
        "ModelType._member_names_",
        "ModelType._member_map_",
        "ModelType._value2member_map_",
        "ModelType.is_flow_matching",
        "ModelType.is_video_model",
        "ModelType.supported_training_methods",
        "ModelType.supported_lora_formats",
        "ModelType.supported_full_model_formats",
    ),
    "modules.util.enum.ModelFormat": (
        "ModelFormat.DIFFUSERS",
        "ModelFormat.ORIGINAL_TRANSFORMER",
        "ModelFormat.DIFFUSERS_LORA",
        "ModelFormat.KOHYA_LORA",
        "ModelFormat.ORIGINAL_LORA",
        "ModelFormat.COMFY_LORA",
    ),
    "modules.util.enum.TrainingMethod": (
        "TrainingMethod.LORA",
        "TrainingMethod.FINE_TUNE",
        "TrainingMethod.EMBEDDING",
    ),
    "modules.util.config.TrainConfig": (
        "TrainConfig.default_values",
        "TrainConfig.weight_dtypes",
        "TrainConfig.model_names",
        "TrainModelPartConfig.default_values",
    ),
    "modules.util.config.SampleConfig": ("_get_model_defaults", "SampleConfig.default_values"),
    "modules.ui.TopBarController": ("TopBarController.get_model_types",),
    "modules.ui.BaseModelTabView": (
        "BaseModelTabView._BaseModelTabView__create_base_components",
        "BaseModelTabView._BaseModelTabView__create_dtype_options",
    ),
    "modules.ui.BaseTrainingTabView": (
        "BaseTrainingTabView.build",
        "BaseTrainingTabView._BaseTrainingTabView__create_base_frame",
        "BaseTrainingTabView._BaseTrainingTabView__create_base2_frame",
        "BaseTrainingTabView._BaseTrainingTabView__create_text_encoder_frame",
        "BaseTrainingTabView._BaseTrainingTabView__create_embedding_frame",
        "BaseTrainingTabView._BaseTrainingTabView__create_transformer_frame",
        "BaseTrainingTabView._BaseTrainingTabView__create_noise_frame",
        "BaseTrainingTabView._BaseTrainingTabView__create_masked_frame",
        "BaseTrainingTabView._BaseTrainingTabView__create_loss_frame",
        "BaseTrainingTabView._BaseTrainingTabView__create_layer_frame",
    ),
    "modules.ui.BaseSampleFrameView": ("BaseSampleFrameView.build_content",),
    "modules.ui.BaseConvertModelUIView": ("BaseConvertModelUIView.build_content",),
}
"""What is patched or used while patching, by module."""


class UnsupportedError(RuntimeError):
    """This OneTrainer lacks what the add-on stands on."""


def extend() -> Any:
    """Add `WAN_2_2` everywhere; returns the member of `ModelType`.

    UnsupportedError, before anything is changed, if something is not there.
    """
    owners = _found()
    model_type = owners["modules.util.enum.ModelType"].ModelType
    if NAME in model_type.__members__:
        return model_type[NAME]
    wan = _add_member(owners, model_type)
    _extend_configs(owners)
    _extend_sample_config(owners, wan)
    _extend_lists(owners, wan)
    _extend_model_tab(owners, wan)
    _extend_training_tab(owners, wan)
    _extend_sample_frame(owners, wan)
    return wan


def _found() -> dict[str, Any]:
    """The modules that are touched; UnsupportedError names all that they lack."""
    modules: dict[str, Any] = {}
    missing: list[str] = []
    for name, attributes in TOUCHED.items():
        try:
            modules[name] = importlib.import_module(name)
        except ImportError as error:
            missing.append(f"{name} ({error})")
            continue
        missing += [a for a in attributes if not _has(modules[name], a)]
    if missing:
        raise UnsupportedError(
            f"this OneTrainer has no {', '.join(missing)}. The add-on supports commit "
            f"{KNOWN_COMMIT} and those after it that kept these names; run `onewan onetrainer "
            "check` on it, and update onewan or go back to that commit"
        )
    return modules


def _has(module: Any, dotted: str) -> bool:
    for name in dotted.split("."):
        if not hasattr(module, name):
            return False
        module = getattr(module, name)
    return True


def _wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Put `make(old)` in the place of the attribute `name` of a class or module."""
    old = getattr(owner, name)
    new = make(old)
    new.__wrapped__ = old
    if isinstance(owner, type):
        type.__setattr__(owner, name, new)  # past EnumMeta's own check
    else:
        setattr(owner, name, new)


# ---------------------------------------------------------------------------------------- the enum


def _add_member(owners: dict[str, Any], model_type: Any) -> Any:
    """The member, its parts, methods and formats.

    An enum can't be extended by its own means; these are the tables that lookups, iteration, match
    and pickle go by (measured with Python 3.10 to 3.13).
    """
    member = object.__new__(model_type)
    member._name_ = member._value_ = NAME
    member.__objclass__ = model_type
    member._sort_order_ = len(model_type._member_names_)
    model_type._member_names_.append(NAME)
    model_type._member_map_[NAME] = member
    model_type._value2member_map_[NAME] = member
    type.__setattr__(model_type, NAME, member)
    owners["modules.util.enum.ModelType"]._MODEL_PARTS[member] = PARTS
    type.__setattr__(model_type, "is_wan", lambda self: self is member)
    formats = owners["modules.util.enum.ModelFormat"].ModelFormat
    methods = owners["modules.util.enum.TrainingMethod"].TrainingMethod
    answers: dict[str, Any] = {
        "is_flow_matching": True,
        "is_video_model": True,
        "supported_training_methods": (methods.FINE_TUNE, methods.LORA, methods.EMBEDDING),
        "supported_lora_formats": [
            formats.DIFFUSERS_LORA,
            formats.KOHYA_LORA,
            formats.ORIGINAL_LORA,
            formats.COMFY_LORA,
        ],
        "supported_full_model_formats": [formats.DIFFUSERS, formats.ORIGINAL_TRANSFORMER],
    }
    for name, answer in answers.items():
        _wrap(
            model_type, name, lambda old, a=answer: lambda self: a if self is member else old(self)
        )
    return member


# ----------------------------------------------------------------------------------------- configs


def _extend_configs(owners: dict[str, Any]) -> None:
    module = owners["modules.util.config.TrainConfig"]
    part = module.TrainModelPartConfig

    def fields() -> list[tuple[str, Any, type, bool]]:
        second = part.default_values()
        second.stop_training_after = 0  # as OneTrainer's first transformer has it
        return [
            ("transformer_2", second, part, False),
            ("wan_high_share", "equal", str, False),
            ("wan_expert_block", 10, int, False),
            ("wan_boundary", None, float, True),
            ("wan_frame_strategy", "uniform", str, False),
            ("wan_target_fps", None, float, True),
            ("wan_max_duration", 10.0, float, False),
            ("wan_temporal_consistency_weight", 1.0, float, False),
            ("wan_layers", "", str, False),
            ("wan_use_temporal_attention", True, bool, False),
            ("wan_first_frame_probability", 0.2, float, False),
            ("wan_validation_levels", 4, int, False),
            ("wan_low_lora_rank", None, int, True),
            ("wan_low_lora_alpha", None, float, True),
        ]

    def with_second_names(old: Any) -> Any:
        def model_names(self: Any) -> Any:
            names = old(self)
            names.transformer_2_model = self.transformer_2.model_name
            names.include_transformer_2 = self.transformer_2.include
            names.wan_boundary = self.wan_boundary
            return names

        return model_names

    def with_second_dtype(old: Any) -> Any:
        def weight_dtypes(self: Any) -> Any:
            dtypes = old(self)
            dtypes.transformer_2 = self.transformer_2.weight_dtype
            return dtypes

        return weight_dtypes

    _add_fields(module.TrainConfig, fields)
    _wrap(module.TrainConfig, "model_names", with_second_names)
    _wrap(module.TrainConfig, "weight_dtypes", with_second_dtype)


def _extend_sample_config(owners: dict[str, Any], wan: Any) -> None:
    module = owners["modules.util.config.SampleConfig"]

    def model_defaults(old: Any) -> Any:
        def defaults(model_type: Any) -> Any:
            if model_type is not wan:
                return old(model_type)
            size = {"width": 832, "height": 480, "diffusion_steps": 40, "cfg_scale": 5.0}
            return {**old(None), **size}

        return defaults

    def fields() -> list[tuple[str, Any, type, bool]]:
        return [
            ("wan_fps", None, float, True),
            ("wan_low_cfg_scale", None, float, True),
            ("wan_format", "mp4", str, False),
        ]

    _wrap(module, "_get_model_defaults", model_defaults)
    _add_fields(module.SampleConfig, fields)

    def with_frames(old: Any) -> Any:
        def default_values(model_type: Any = None) -> Any:
            config = old(model_type)
            if model_type is wan:
                config.frames = 81
            return config

        return staticmethod(default_values)

    module.SampleConfig.default_values = with_frames(module.SampleConfig.default_values)


def _add_fields(config_class: Any, fields: Callable[[], list[tuple[str, Any, type, bool]]]) -> None:
    """Give each new config the fields (name, default, type, whether it may be None).

    A config saves, loads, and shows in the window what its own tables name.
    """
    old = config_class.default_values

    def default_values(*args: Any, **kwargs: Any) -> Any:
        config = old(*args, **kwargs)
        for name, value, kind, nullable in fields():
            setattr(config, name, value)
            config.types[name] = kind
            config.nullables[name] = nullable
            config.default_values[name] = value
        return config

    config_class.default_values = staticmethod(default_values)


# ----------------------------------------------------------------------------------------- windows


def _extend_lists(owners: dict[str, Any], wan: Any) -> None:
    """The lists of model types: of the main window and of the convert tool."""
    top = owners["modules.ui.TopBarController"].TopBarController
    _wrap(top, "get_model_types", lambda old: lambda self: [*old(self), (TITLE, wan)])
    convert = owners["modules.ui.BaseConvertModelUIView"].BaseConvertModelUIView

    def with_wan(old: Any) -> Any:
        def build_content(self: Any, *args: Any, **kwargs: Any) -> Any:
            def options_kv(real: Any, *a: Any, **k: Any) -> Any:
                *front, values, state, name = a[:6]
                if name == "model_type":
                    values = [*values, (TITLE, wan)]
                return real(*front, values, state, name, *a[6:], **k)

            with _Instead(self, options_kv=options_kv):
                return old(self, *args, **kwargs)

        return build_content

    _wrap(convert, "build_content", with_wan)


class _Instead:
    """For a time, a view's `components` with other functions in the place of some.

    Each replacement is called with the function that it replaces, then its arguments.
    """

    def __init__(self, view: Any, **replaced: Callable[..., Any]) -> None:
        self._view = view
        self._real = view.components
        self._replaced = replaced

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)
        if name not in self._replaced and "*" not in self._replaced:
            return found
        replacement = self._replaced.get(name) or self._replaced["*"]
        if not callable(found):
            return found
        return lambda *args, **kwargs: replacement(found, *args, **kwargs)

    def __enter__(self) -> None:
        self._view.components = self

    def __exit__(self, *_: object) -> None:
        self._view.components = self._real


def _of_second(real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A widget of the first transformer as one of the second: its field and its label."""

    def changed(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value.startswith("transformer."):
            return "transformer_2." + value.removeprefix("transformer.")
        return value.replace("Transformer", "Low-Noise Transformer")

    return real(*map(changed, args), **{k: changed(v) for k, v in kwargs.items()})


def _extend_model_tab(owners: dict[str, Any], wan: Any) -> None:
    view = owners["modules.ui.BaseModelTabView"].BaseModelTabView
    name = "_BaseModelTabView__create_base_components"

    def with_second(old: Any) -> Any:
        def create(
            self: Any, frame: Any, row: int, controller: Any, ui_state: Any, **has: Any
        ) -> int:
            if controller.train_config.model_type is not wan:
                return old(self, frame, row, controller, ui_state, **has)
            compressed = has.get("include_compressed", False)
            for part, title in (
                ("transformer", "High-Noise Transformer"),
                ("transformer_2", "Low-Noise Transformer"),
            ):
                row = _transformer_rows(self, frame, row, ui_state, part, title, compressed)
            # All but the transformer is the stock view's.
            return old(self, frame, row, controller, ui_state, **{**has, "has_transformer": False})

        return create

    _wrap(view, name, with_second)


def _transformer_rows(
    view: Any, frame: Any, row: int, ui_state: Any, part: str, title: str, compressed: bool
) -> int:
    """Where an expert comes from, and its data type."""
    components = view.components
    components.label(
        frame,
        row,
        0,
        f"Override {title}",
        tooltip=f"A file, folder or Hugging Face repository for the {title.lower()} instead of the "
        "base model's: safetensors, GGUF, fp8, or a folder in the diffusers or official layout",
    )
    components.path_entry(frame, row, 1, ui_state, f"{part}.model_name", mode="file")
    components.label(
        frame, row, 3, f"{title} Data Type", tooltip=f"The {title.lower()}'s weight data type"
    )
    options = view._BaseModelTabView__create_dtype_options(
        include_a8=True, include_compressed=compressed
    )
    components.options_kv(frame, row, 4, options, ui_state, f"{part}.weight_dtype")
    return row + 1


def _extend_training_tab(owners: dict[str, Any], wan: Any) -> None:
    view = owners["modules.ui.BaseTrainingTabView"].BaseTrainingTabView

    def with_wan(old: Any) -> Any:
        def build(
            self: Any, left: Any, middle: Any, right: Any, controller: Any, state: Any
        ) -> Any:
            if controller.config.model_type is not wan:
                return old(self, left, middle, right, controller, state)

            def frame(kind: str, *args: Any, **kwargs: Any) -> None:
                getattr(self, f"_BaseTrainingTabView__create_{kind}_frame")(*args, **kwargs)

            frame("base", left, 0, controller, state)
            frame("text_encoder", left, 1, state, supports_clip_skip=False, supports_training=False)
            frame("embedding", left, 2, state)
            frame("base2", middle, 0, controller, state, video_training_enabled=True)

            def of_first(real: Any, *args: Any, **kwargs: Any) -> Any:
                args = tuple(
                    a.replace("Transformer", "High-Noise Transformer") if isinstance(a, str) else a
                    for a in args
                )
                return real(*args, **kwargs)

            for row, replacement in ((1, of_first), (2, _of_second)):
                with _Instead(self, **{"*": replacement}):
                    frame("transformer", middle, row, state, supports_force_attention_mask=False)
            frame("noise", middle, 3, state, supports_dynamic_timestep_shifting=True)
            _wan_frame(self.components, right, 0, state)
            frame("masked", right, 1, state)
            frame("loss", right, 2, controller, state)
            frame("layer", right, 3, controller, state)
            return None

        return build

    _wrap(view, "build", with_wan)


_ROWS: tuple[tuple[str, str, str, tuple[str, ...] | None], ...] = (
    (
        "wan_high_share",
        "High-Noise Share",
        "Share of the steps that the high-noise expert gets when both train: equal (one half), "
        "density "
        "(the share of noise levels above the boundary), or a number between 0 and 1",
        None,
    ),
    (
        "wan_expert_block",
        "Steps per Expert",
        "Steps for which one expert trains before the other may. More moves weights between RAM "
        "and "
        "VRAM less often",
        None,
    ),
    (
        "wan_boundary",
        "Expert Boundary",
        "Noise level between the experts. Empty is the model's own: 0.875 for T2V, 0.9 for I2V",
        None,
    ),
    (
        "wan_target_fps",
        "Frames per Second",
        "Rate at which frames are taken from clips. Empty is the model's own: 16, or 24 for "
        "TI2V-5B",
        None,
    ),
    (
        "wan_frame_strategy",
        "Frames from",
        "Where in a longer file the frames are taken: uniform is the middle, random anywhere, "
        "keyframe from the key frame nearest to the middle",
        ("uniform", "random", "keyframe"),
    ),
    ("wan_max_duration", "Longest Clip (s)", "No training clip spans more seconds than this", None),
    (
        "wan_temporal_consistency_weight",
        "Temporal Consistency",
        "Weight of each frame's deviation from the clip's mean error. 1 is the plain loss; more "
        "punishes flicker and wrong motion",
        None,
    ),
    (
        "wan_layers",
        "Transformer Blocks",
        "Numbers of the blocks to train, such as 0-9, 12. Empty is all",
        None,
    ),
    (
        "wan_use_temporal_attention",
        "Temporal Attention",
        "Off: each frame attends to itself alone, for training style or character without motion",
        (),
    ),
    (
        "wan_first_frame_probability",
        "First Frame Given",
        "TI2V-5B only: share of samples whose first frame is given, which trains image-to-video",
        None,
    ),
    (
        "wan_validation_levels",
        "Validation Levels",
        "Noise levels of each expert at which a validation clip is measured",
        None,
    ),
    (
        "wan_low_lora_rank",
        "Low-Noise LoRA Rank",
        "Rank of the low-noise expert's LoRA. Empty is that of the LoRA tab",
        None,
    ),
    (
        "wan_low_lora_alpha",
        "Low-Noise LoRA Alpha",
        "Alpha of the low-noise expert's LoRA. Empty is that of the LoRA tab",
        None,
    ),
)
"""Field, label, tooltip, and the choices there are: none is an entry, an empty list a switch."""


def _wan_frame(components: Any, master: Any, row: int, state: Any) -> None:
    frame = components.section_frame(master, row)
    for line, (field, label, tooltip, choices) in enumerate(_ROWS):
        components.label(frame, line, 0, label, tooltip=tooltip)
        if choices is None:
            components.entry(frame, line, 1, state, field)
        elif choices:
            components.options(frame, line, 1, list(choices), state, field)
        else:
            components.switch(frame, line, 1, state, field)


def _extend_sample_frame(owners: dict[str, Any], wan: Any) -> None:
    view = owners["modules.ui.BaseSampleFrameView"].BaseSampleFrameView

    def with_wan(old: Any) -> Any:
        def build_content(
            self: Any, top: Any, bottom: Any, state: Any, controller: Any, *args: Any, **kwargs: Any
        ) -> Any:
            result = old(self, top, bottom, state, controller, *args, **kwargs)
            wanted = args[1] if len(args) > 1 else kwargs.get("include_settings", True)
            if controller.model_type is wan and wanted:
                c = self.components
                c.label(
                    bottom,
                    7,
                    0,
                    "start image:",
                    tooltip="The first frame. I2V-A14B needs one, TI2V-5B can take one",
                )
                c.path_entry(
                    bottom,
                    7,
                    1,
                    state,
                    "base_image_path",
                    mode="file",
                    allow_model_files=False,
                    allow_image_files=True,
                )
                c.label(
                    bottom,
                    7,
                    2,
                    "fps:",
                    tooltip="Of the written video. Empty is the model's own: 16, or 24 for TI2V-5B",
                )
                c.entry(bottom, 7, 3, state, "wan_fps")
                c.label(
                    bottom,
                    8,
                    0,
                    "low-noise cfg scale:",
                    tooltip="Guidance of the low-noise expert. Empty is the same as cfg scale, "
                    "which is then of both",
                )
                c.entry(bottom, 8, 1, state, "wan_low_cfg_scale")
                c.label(
                    bottom,
                    8,
                    2,
                    "video format:",
                    tooltip="mp4 is H.264 and plays everywhere, webm is VP9",
                )
                c.options(bottom, 8, 3, ["mp4", "webm"], state, "wan_format")
            return result

        return build_content

    _wrap(view, "build_content", with_wan)
