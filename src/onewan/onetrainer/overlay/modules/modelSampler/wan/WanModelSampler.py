"""The design's name of the sampler; OneTrainer names its samplers ``<Model>Sampler``."""

from modules.modelSampler.wan.WanSampler import WanSampler

WanModelSampler = WanSampler
"""An alias of `WanSampler`."""
