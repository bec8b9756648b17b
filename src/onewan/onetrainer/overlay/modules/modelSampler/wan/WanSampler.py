"""Samples by onewan's sampler; registers itself."""

import os
from collections.abc import Callable
from pathlib import Path

from modules.model.WanModel import WanModel
from modules.modelSampler.BaseModelSampler import BaseModelSampler, ModelSamplerOutput
from modules.util import factory
from modules.util.config.SampleConfig import SampleConfig
from modules.util.enum.FileType import FileType
from modules.util.enum.ModelType import ModelType

import torch

from onewan.media import write_video
from onewan.onetrainer import sampling
from onewan.onetrainer.residency import ConductorResidency
from onewan.sample.generate import WanModelSampler

from PIL import Image


@factory.register(BaseModelSampler, ModelType.WAN_2_2)
class WanSampler(BaseModelSampler):
    def __init__(self, train_device, temp_device, model: WanModel, model_type: ModelType):
        super().__init__(train_device, temp_device)
        self.model = model
        self.model_type = model_type

    @torch.no_grad()
    def sample(
        self,
        sample_config: SampleConfig,
        destination: str,
        image_format=None,
        video_format=None,
        audio_format=None,
        on_sample: Callable[[ModelSamplerOutput], None] = lambda _: None,
        on_update_progress: Callable[[int, int], None] = lambda _, __: None,
    ):
        wan = self.model.wan
        request = sampling.request_of(sample_config, wan.variant)
        residency = ConductorResidency(self.model, self.train_device)
        sampler = WanModelSampler(wan, residency=residency)
        frames = sampler.sample(request, on_step=on_update_progress)
        os.makedirs(Path(destination).parent, exist_ok=True)
        if len(frames) == 1:
            output = ModelSamplerOutput(FileType.IMAGE, Image.fromarray(frames[0]))
            self.save_sampler_output(output, destination, image_format, video_format, audio_format)
        else:
            output = ModelSamplerOutput(FileType.VIDEO, torch.from_numpy(frames))
            suffix = "webm" if sample_config.wan_format.lower() == "webm" else "mp4"
            write_video(f"{destination}.{suffix}", frames, request.fps)
        on_sample(output)
