"""Wan 2.2; see `modules.modelSaver.wan.WanModelSaver`."""

from modules.util.wan_addon import join

join()
