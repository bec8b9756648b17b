"""Wan 2.2; see `modules.modelSampler.wan.WanSampler`."""

from modules.util.wan_addon import join

join()
