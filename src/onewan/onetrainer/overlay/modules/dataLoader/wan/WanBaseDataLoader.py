"""OneTrainer's data pipeline with onewan's clips, and its modules for them; registers itself."""

import copy
import json
import os
import threading
from pathlib import Path
from random import Random

from modules.dataLoader.BaseDataLoader import BaseDataLoader
from modules.dataLoader.mixin.DataLoaderText2ImageMixin import DataLoaderText2ImageMixin
from modules.model.WanModel import WanModel
from modules.modelSetup.wan.BaseWanSetup import BaseWanSetup, encodes_text_online
from modules.util import factory
from modules.util.config.ConceptConfig import ConceptConfig
from modules.util.config.TrainConfig import TrainConfig
from modules.util.enum.ModelType import ModelType

from mgds.PipelineModule import PipelineModule
from mgds.pipelineModules.MapData import MapData
from mgds.pipelineModuleTypes.RandomAccessPipelineModule import RandomAccessPipelineModule

import torch

from onewan.errors import DataError
from onewan.model.sources import fingerprint, locate
from onewan.model.text import pad_text
from onewan.onetrainer import clip_adapter, settings

_TEXTS = ("LoadMultipleTexts", "GetFilename", "SelectInput", "SelectRandomText")
_COLORS = ("RandomBrightness", "RandomContrast", "RandomSaturation", "RandomHue")

_IMAGE_INPUTS = (
    *("resolution", "frames", "aspect_ratio_bucketing", "masked_training"),
    *("wan_frame_strategy", "wan_target_fps", "wan_max_duration"),
)
"""Settings that determine latents; those of the concept are in OneTrainer's own key."""
# OneTrainer caches with several threads, and transformers' fast tokenizers allow one at a time.
_TOKENIZER = threading.Lock()


@factory.register(BaseDataLoader, ModelType.WAN_2_2)
class WanBaseDataLoader(BaseDataLoader, DataLoaderText2ImageMixin):
    def _create_dataset(self, config, model, model_setup, train_progress, is_validation=False):
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
        # OneTrainer collects files by its own list of extensions, which is shorter than onewan's.
        modules = super()._enumerate_input_modules(config, allow_videos)
        for module in modules:
            if type(module).__name__ == "CollectPaths":
                own = [f".{kind}" for kind in settings.VIDEO_FORMATS]
                module.extensions = sorted({*module.extensions, *own})
        return modules

    def _load_input_modules(self, config, train_dtype, vae_frame_dim=False) -> list:
        # The stock modules for images and videos are left out: they ignore the frame rate.
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


def _swap_color_and_frames() -> MapData:
    return MapData(in_name="image", out_name="image", map_fn=lambda video: video.transpose(0, 1))


def _concepts(config: TrainConfig) -> list[dict]:
    concepts = config.concepts
    if concepts is None:
        with open(config.concept_file_name) as file:
            concepts = [ConceptConfig.default_values().from_dict(c) for c in json.load(file)]
    return [copy.copy(concept).to_dict() for concept in concepts]


# ------------------------------------------------------------------------- modules of the pipeline


class _EachItem(PipelineModule, RandomAccessPipelineModule):
    """A module that turns each item into one; subclasses name what they read and make."""

    inputs: list[str]
    outputs: list[str]

    def length(self) -> int:
        return self._get_previous_length(self.inputs[0])

    def get_inputs(self) -> list[str]:
        return self.inputs

    def get_outputs(self) -> list[str]:
        return self.outputs


class PlanClips(PipelineModule, RandomAccessPipelineModule):
    """The usable files with the clip of each; prints which files are skipped, and why."""

    def __init__(self, config: TrainConfig, model: WanModel):
        super().__init__()
        self._planner = clip_adapter.ConceptPlanner(config, model.wan.variant)
        self._decode_checks = clip_adapter.DecodeCheckCache(
            Path(config.cache_dir) / "image" / "wan-read.jsonl"
        )
        self._items: list[dict] = []

    def length(self) -> int:
        return len(self._items)

    def get_inputs(self) -> list[str]:
        return ["image_path", "concept"]

    def get_outputs(self) -> list[str]:
        return ["image_path", "concept", "clip"]

    def start(self, variation: int):
        self._items, report = [], []
        for index in range(self._get_previous_length("image_path")):
            path = self._get_previous_item(variation, "image_path", index)
            concept = self._get_previous_item(variation, "concept", index)
            # OneTrainer leaves out its own masks (-masklabel) only, not NAME.mask.png.
            if settings.is_mask_file(path):
                continue
            try:
                clip, warnings = self._planner.plan(path, concept)
                # Checked now, while it can be skipped, and not in the middle of caching.
                self._decode_checks.check(clip)
            except DataError as error:
                report.append(f"skipped: {error}")
                continue
            report += [f"{path}: {warning}" for warning in warnings]
            self._items.append({"image_path": path, "concept": concept, "clip": clip})
        self._decode_checks.save()
        for line in report:
            print(f"Wan 2.2: {line}")
        if not self._items and self._get_previous_length("image_path"):
            raise DataError("Wan 2.2: no clip of the concepts can be used; the lines above say why")

    def get_item(self, variation: int, index: int, requested_name: str | None = None) -> dict:
        return self._items[index]


class LoadClip(_EachItem):
    """A clip's frames, cropped, and its mask: [C, F, H, W], float32 from 0 to 1."""

    inputs = ["clip"]

    def __init__(self, config: TrainConfig):
        super().__init__()
        self._masked = config.masked_training
        mask = ["mask"] if self._masked else []
        self.outputs = ["image", "original_resolution", "crop_resolution", "crop_offset", *mask]

    def get_item(self, variation: int, index: int, requested_name: str | None = None) -> dict:
        clip = self._get_previous_item(variation, "clip", index)
        jitter = self._get_previous_item(variation, "concept.image.enable_crop_jitter", index)
        draw: Random | None = self._get_rand(variation, index) if jitter else None
        fit = clip_adapter.crop_of(clip, draw)
        width, height = clip.size
        item = {
            "image": clip_adapter.read_pixels(clip, fit),
            "original_resolution": (clip.frames, clip.source_size[1], clip.source_size[0]),
            "crop_resolution": (clip.frames, height, width),
            "crop_offset": (fit.down, fit.across),
        }
        if self._masked:
            item["mask"] = clip_adapter.mask_of(clip, fit)
        return item


class EncodeClip(_EachItem):
    """Latents, the conditioning of I2V, and the mask at the resolution of the latents."""

    inputs = ["image"]

    def __init__(self, config: TrainConfig, model: WanModel):
        super().__init__()
        self._model = model.wan
        self.outputs = latent_names(config, model)

    def get_item(self, variation: int, index: int, requested_name: str | None = None) -> dict:
        pixels = self._get_previous_item(variation, "image", index)
        item = clip_adapter.encode_pixels(self._model, pixels)
        if "latent_mask" in self.outputs:
            mask = self._get_previous_item(variation, "mask", index)
            item["latent_mask"] = clip_adapter.latent_mask_of(mask, self._model.variant)
        return item


def latent_names(config: TrainConfig, model: WanModel) -> list[str]:
    """Names of an encoded clip's tensors."""
    return [
        "latent_image",
        *(f"latent_{name}" for name in model.wan.conditioning.tensor_names),
        *(["latent_mask"] if config.masked_training else []),
    ]


class EncodeText(_EachItem):
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


class PadText(_EachItem):
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
