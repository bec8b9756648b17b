"""Wan 2.2; see `modules.modelSaver.wan.WanLoRAModelSaver`."""

from modules.util.wan_addon import join

join(__name__, "modules.modelSaver.wan.WanLoRAModelSaver")
