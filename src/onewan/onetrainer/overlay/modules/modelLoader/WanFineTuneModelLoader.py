"""Wan 2.2; see `modules.modelLoader.wan.WanFineTuneModelLoader`."""

from modules.util.wan_addon import join

join(__name__, "modules.modelLoader.wan.WanFineTuneModelLoader")
