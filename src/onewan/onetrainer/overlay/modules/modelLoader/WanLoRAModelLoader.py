"""Wan 2.2; see `modules.modelLoader.wan.WanLoRAModelLoader`."""

from modules.util.wan_addon import join

join(__name__, "modules.modelLoader.wan.WanLoRAModelLoader")
