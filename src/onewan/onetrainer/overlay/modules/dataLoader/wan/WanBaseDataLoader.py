"""OneTrainer's data pipeline with onewan's clips; registers itself."""

import copy
import json
import os

from modules.dataLoader.BaseDataLoader import BaseDataLoader
from modules.dataLoader.mixin.DataLoaderText2ImageMixin import DataLoaderText2ImageMixin
from modules.dataLoader.wan.modules import (
    EncodeClip,
    EncodeText,
    LoadClip,
    PadText,
    PlanClips,
    latent_names,
    text_names,
)
from modules.model.WanModel import WanModel
from modules.modelSetup.wan.BaseWanSetup import BaseWanSetup
from modules.util import factory
from modules.util.config.ConceptConfig import ConceptConfig
from modules.util.config.TrainConfig import TrainConfig
from modules.util.enum.ModelType import ModelType
from modules.util.TrainProgress import TrainProgress

from mgds.pipelineModules.MapData import MapData

from onewan.model.sources import fingerprint, locate
from onewan.onetrainer import clip_adapter, settings

_TEXTS = ("LoadMultipleTexts", "GetFilename", "SelectInput", "SelectRandomText")
_COLORS = ("RandomBrightness", "RandomContrast", "RandomSaturation", "RandomHue")


@factory.register(BaseDataLoader, ModelType.WAN_2_2)
class WanBaseDataLoader(BaseDataLoader, DataLoaderText2ImageMixin):
    def _create_dataset(
        self,
        config: TrainConfig,
        model: WanModel,
        model_setup: BaseWanSetup,
        train_progress: TrainProgress,
        is_validation: bool = False,
    ):
        self._model = model
        return DataLoaderText2ImageMixin._create_dataset(
            self,
            config,
            model,
            model_setup,
            train_progress,
            is_validation,
            aspect_bucketing_quantization=model.wan.variant.size_multiple,
            frame_dim_enabled=True,
            allow_video_files=True,
            vae_frame_dim=True,
            supports_inpainting=False,
        )

    def _enumerate_input_modules(self, config: TrainConfig, allow_videos: bool = False) -> list:
        modules = super()._enumerate_input_modules(config, allow_videos)
        for module in modules:
            if type(module).__name__ == "CollectPaths":
                own = [f".{kind}" for kind in settings.VIDEO_FORMATS]
                module.extensions = sorted({*module.extensions, *own})
        return modules

    def _load_input_modules(self, config, train_dtype, vae_frame_dim=False) -> list:
        stock = super()._load_input_modules(config, train_dtype, vae_frame_dim)
        texts = [module for module in stock if type(module).__name__ in _TEXTS]
        return [PlanClips(config, self._model), LoadClip(config), *texts]

    def _mask_augmentation_modules(self, config: TrainConfig) -> list:
        for concept in _concepts(config):
            for name in ("enable_random_circular_mask_shrink", "enable_random_mask_rotate_crop"):
                if config.masked_training and concept["image"][name]:
                    raise ValueError(
                        f"Wan 2.2: concept {concept['name'] or concept['path']}: image.{name} is "
                        "for single images; turn it off"
                    )
        return []

    def _aspect_bucketing_in(self, config, aspect_bucketing_quantization, frame_dim_enabled=False):
        return []  # a clip is loaded in its bucket's size

    def _crop_modules(self, config: TrainConfig):
        return []

    def _augmentation_modules(self, config: TrainConfig):
        """Colors are changed frame by frame: the stock modules expect them on the third axis from
        the end."""
        out = []
        for module in super()._augmentation_modules(config):
            if type(module).__name__ in _COLORS:
                out += [_swap_color_and_frames(), module, _swap_color_and_frames()]
            else:
                out.append(module)
        return out

    def _preparation_modules(self, config: TrainConfig, model: WanModel):
        text = [EncodeText(config, model)] if text_names(config) else []
        return [EncodeClip(config, model), *text]

    def _cache_modules(self, config: TrainConfig, model: WanModel, model_setup: BaseWanSetup):
        image = [*latent_names(config, model), "original_resolution", "crop_offset"]
        aggregate = ["crop_resolution", "image_path"]
        text = text_names(config)
        modules = self._cache_modules_from_names(
            model,
            model_setup,
            image_split_names=image,
            image_aggregate_names=aggregate,
            text_split_names=text,
            sort_names=[*aggregate, *image, *text, "prompt", "concept"],
            config=config,
            text_caching=bool(text),
        )
        if config.latent_caching:
            for module in modules:
                if hasattr(module, "cache_dir"):
                    module.cache_dir = os.path.join(module.cache_dir, self._key(config, module))
        return [*modules, *([PadText(config)] if text else [])]

    def _key(self, config: TrainConfig, module) -> str:
        """Name of a folder in image/ or text/, which OneTrainer clears on request."""
        kind = os.path.basename(module.cache_dir)
        wan, sources = self._model.wan, locate(self._model.wan_sources)
        parts = ("vae",) if kind == "image" else ("text_encoder", "tokenizer")
        inputs = [wan.variant.name, *(fingerprint(sources.paths[part]) for part in parts)]
        if kind == "image":
            inputs += [f"{name}={getattr(config, name)}" for name in _IMAGE_INPUTS]
        else:
            inputs += [*text_names(config), config.text_encoder.weight_dtype, config.train_dtype]
        return "wan-" + clip_adapter.cache_digest(kind, _concepts(config), inputs)

    def _output_modules(self, config: TrainConfig, model: WanModel, model_setup: BaseWanSetup):
        names = ["image_path", *latent_names(config, model), "prompt"]
        names += ["original_resolution", "crop_resolution", "crop_offset"]
        names += [f"{name}_padded" for name in text_names(config)]
        return self._output_modules_from_out_names(
            model,
            model_setup,
            output_names=names,
            config=config,
            vae=model.vae,
            autocast_context=[model.autocast_context],
            train_dtype=model.train_dtype,
        )

    def _debug_modules(self, config: TrainConfig, model: WanModel):
        return []


_IMAGE_INPUTS = (
    "resolution",
    "frames",
    "aspect_ratio_bucketing",
    "masked_training",
    "wan_frame_strategy",
    "wan_target_fps",
    "wan_max_duration",
)
"""Settings that determine latents; those of the concept are in OneTrainer's own key."""


def _swap_color_and_frames() -> MapData:
    return MapData(in_name="image", out_name="image", map_fn=lambda video: video.transpose(0, 1))


def _concepts(config: TrainConfig) -> list[dict]:
    concepts = config.concepts
    if concepts is None:
        with open(config.concept_file_name) as file:
            concepts = [ConceptConfig.default_values().from_dict(c) for c in json.load(file)]
    return [copy.copy(concept).to_dict() for concept in concepts]
