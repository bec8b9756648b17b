"""Wan 2.2; see `modules.modelSaver.wan.WanFineTuneModelSaver`."""

from modules.util.wan_addon import join

join(__name__, "modules.modelSaver.wan.WanFineTuneModelSaver")
