"""Wan 2.2; see `modules.modelSetup.wan.WanModelSetup`."""

from modules.util.wan_addon import join

join()
