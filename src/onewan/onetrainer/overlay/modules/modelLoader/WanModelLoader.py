"""Wan 2.2; see `modules.modelLoader.wan.WanModelLoader`."""

from modules.util.wan_addon import join

join()
