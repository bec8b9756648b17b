"""OneTrainer's pipeline from files to frames, with onewan's clips instead of its own loaders.

It is based on OneTrainer's `DataLoaderText2ImageMixin`, which takes videos too, but ignores their
frame rate, drops the first frame and repeats the last one of short clips.
"""

import copy
import json
from pathlib import Path
from random import Random

from modules.dataLoader.mixin.DataLoaderText2ImageMixin import DataLoaderText2ImageMixin
from modules.util.config.ConceptConfig import ConceptConfig
from modules.util.config.TrainConfig import TrainConfig

from mgds.PipelineModule import PipelineModule
from mgds.pipelineModules.MapData import MapData
from mgds.pipelineModuleTypes.RandomAccessPipelineModule import RandomAccessPipelineModule

from onewan.errors import DataError
from onewan.onetrainer import clip_adapter, settings
from onewan.variants import Variant

_TEXTS = ("LoadMultipleTexts", "GetFilename", "SelectInput", "SelectRandomText")
_COLORS = ("RandomBrightness", "RandomContrast", "RandomSaturation", "RandomHue")


class DataLoaderText2VideoMixin(DataLoaderText2ImageMixin):
    """The stages that read clips; `_model` is the model, from whose variant sizes follow."""

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
        return [PlanClips(config, self._model.wan.variant), LoadClip(config), *texts]

    def _mask_augmentation_modules(self, config: TrainConfig) -> list:
        for concept in concepts_of(config):
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


def _swap_color_and_frames() -> MapData:
    return MapData(in_name="image", out_name="image", map_fn=lambda video: video.transpose(0, 1))


def concepts_of(config: TrainConfig) -> list[dict]:
    """The concepts of the config, or of the file that it names, as dictionaries."""
    concepts = config.concepts
    if concepts is None:
        with open(config.concept_file_name) as file:
            concepts = [ConceptConfig.default_values().from_dict(c) for c in json.load(file)]
    return [copy.copy(concept).to_dict() for concept in concepts]


# ------------------------------------------------------------------------- modules of the pipeline


class EachItem(PipelineModule, RandomAccessPipelineModule):
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

    def __init__(self, config: TrainConfig, variant: Variant):
        super().__init__()
        self._planner = clip_adapter.ConceptPlanner(config, variant)
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
            # OneTrainer leaves out its own masks (-masklabel) only, not NAME.mask.png and the like.
            if settings.is_companion_file(path):
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


class LoadClip(EachItem):
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
