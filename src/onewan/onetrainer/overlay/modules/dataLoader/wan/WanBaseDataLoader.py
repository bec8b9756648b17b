"""OneTrainer's data pipeline with onewan's clips, and its modules for them; registers itself."""

import os
import threading

from modules.dataLoader.BaseDataLoader import BaseDataLoader
from modules.dataLoader.mixin.DataLoaderText2VideoMixin import (
    DataLoaderText2VideoMixin,
    EachItem,
    concepts_of,
)
from modules.model.WanModel import WanModel
from modules.modelSetup.wan.BaseWanSetup import BaseWanSetup, encodes_text_online
from modules.util import factory
from modules.util.config.TrainConfig import TrainConfig
from modules.util.enum.ModelType import ModelType


import torch

from onewan.model.conditioning import Conditioning, conditioning_of
from onewan.model.sources import fingerprint, locate
from onewan.model.text import pad_text
from onewan.onetrainer import clip_adapter, settings

_TEXTS = ("LoadMultipleTexts", "GetFilename", "SelectInput", "SelectRandomText")
_COLORS = ("RandomBrightness", "RandomContrast", "RandomSaturation", "RandomHue")

_SELECTION = ("wan_supported_formats", "wan_min_resolution")
"""Settings that determine which files are used; OneTrainer finds cached items by their number."""

_IMAGE_INPUTS = (
    *("resolution", "frames", "aspect_ratio_bucketing", "masked_training"),
    *("wan_frame_strategy", "wan_target_fps", "wan_max_duration", "wan_max_resolution"),
)
"""Settings that determine latents; those of the concept are in OneTrainer's own key."""
# OneTrainer caches with several threads, and transformers' fast tokenizers allow one at a time.
_TOKENIZER = threading.Lock()


@factory.register(BaseDataLoader, ModelType.WAN_2_2)
class WanBaseDataLoader(BaseDataLoader, DataLoaderText2VideoMixin):
    def _create_dataset(self, config, model, model_setup, train_progress, is_validation=False):
        self._model = model
        return DataLoaderText2VideoMixin._create_dataset(
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
            # OneTrainer's own key does not change with the files (`clip_adapter.cache_digest`).
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
        inputs += [f"{name}={getattr(config, name)}" for name in _SELECTION]
        if kind == "image":
            inputs += [f"{name}={getattr(config, name)}" for name in _IMAGE_INPUTS]
            parts = clip_adapter.condition_parts(conditioning_of_config(config, self._model))
            # Of I2V's first frame alone, caches keep the names that they had without a choice.
            inputs += parts if parts != ("condition",) else ()
        else:
            inputs += [*text_names(config), config.text_encoder.weight_dtype, config.train_dtype]
        return "wan-" + clip_adapter.cache_digest(kind, concepts_of(config), inputs)

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


# ------------------------------------------------------------------------- modules of the pipeline


class EncodeClip(EachItem):
    """Latents, the conditioning of I2V, and the mask at the resolution of the latents."""

    inputs = ["image"]

    def __init__(self, config: TrainConfig, model: WanModel):
        super().__init__()
        self._model = model.wan
        self._conditioning = conditioning_of_config(config, model)
        self.outputs = latent_names(config, model)

    def get_item(self, variation: int, index: int, requested_name: str | None = None) -> dict:
        pixels = self._get_previous_item(variation, "image", index)
        item = clip_adapter.encode_pixels(self._model, pixels, self._conditioning)
        if "latent_mask" in self.outputs:
            mask = self._get_previous_item(variation, "mask", index)
            item["latent_mask"] = clip_adapter.latent_mask_of(mask, self._model.variant)
        return item


def conditioning_of_config(config: TrainConfig, model: WanModel) -> Conditioning:
    """The condition of the model with the shares of the config."""
    variant = model.wan.variant
    return conditioning_of(variant, settings.condition_shares_of(config, variant))


def latent_names(config: TrainConfig, model: WanModel) -> list[str]:
    """Names of an encoded clip's tensors."""
    parts = clip_adapter.condition_parts(conditioning_of_config(config, model))
    return [
        "latent_image",
        *(f"latent_{name}" for name in parts),
        *(["latent_mask"] if config.masked_training else []),
    ]


class EncodeText(EachItem):
    """The embeddings of a caption's tokens, without padding, as they are cached; and of the empty
    caption, where captions are dropped."""

    inputs = ["prompt"]

    def __init__(self, config: TrainConfig, model: WanModel):
        super().__init__()
        self._model = model.wan
        self.outputs = text_names(config)

    def get_item(self, variation: int, index: int, requested_name: str | None = None) -> dict:
        prompts = {"text": self._get_previous_item(variation, "prompt", index), "text_empty": ""}
        with _TOKENIZER, torch.no_grad():
            return {name: self._model.encode_prompt(prompts[name]).cpu() for name in self.outputs}


def text_names(config: TrainConfig) -> list[str]:
    """Names of an encoded caption's tensors; none if captions are encoded in each step."""
    if encodes_text_online(config):
        return []
    return ["text", *(["text_empty"] if config.text_encoder.dropout_probability else [])]


class PadText(EachItem):
    """The transformer's text input: zeros behind the valid tokens, cached or not."""

    def __init__(self, config: TrainConfig):
        super().__init__()
        self.inputs = text_names(config)
        self.outputs = [f"{name}_padded" for name in self.inputs]

    def get_item(self, variation: int, index: int, requested_name: str | None = None) -> dict:
        return {
            f"{name}_padded": pad_text([self._get_previous_item(variation, name, index)])[0]
            for name in self.inputs
        }
