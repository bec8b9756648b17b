"""Wan 2.2; see `modules.dataLoader.wan.WanBaseDataLoader`."""

from modules.util.wan_addon import join

join()
