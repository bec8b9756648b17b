"""Wan 2.2; see `modules.modelSetup.wan.WanFineTuneSetup`."""

from modules.util.wan_addon import join

join(__name__, "modules.modelSetup.wan.WanFineTuneSetup")
