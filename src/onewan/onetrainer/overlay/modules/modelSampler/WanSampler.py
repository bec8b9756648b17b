"""Wan 2.2: the names of `modules.modelSampler.wan.WanSampler`."""

from modules.util.wan_addon import join, names_of

join()
__getattr__ = names_of(__name__)
