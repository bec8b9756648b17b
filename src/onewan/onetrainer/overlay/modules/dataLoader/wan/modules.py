"""Modules of OneTrainer's data pipeline that replace its own video modules."""

import threading
from pathlib import Path
from random import Random

from modules.model.WanModel import WanModel
from modules.util.config.TrainConfig import TrainConfig

from mgds.PipelineModule import PipelineModule
from mgds.pipelineModuleTypes.RandomAccessPipelineModule import RandomAccessPipelineModule

import torch

from onewan.errors import DataError
from onewan.model.text import pad_text
from onewan.onetrainer import clip_adapter, settings

_TOKENIZER = threading.Lock()


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
            Path(config.cache_dir) / "image" / "wan-read.json"
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
        item = clip_adapter.encode_pixels(
            self._model, self._get_previous_item(variation, "image", index)
        )
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
    if config.train_any_embedding() or config.train_any_output_embedding():
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
