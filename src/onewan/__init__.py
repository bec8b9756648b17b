"""onewan trains the Wan 2.2 video models.

The names below load on first use, so that ``import onewan`` does not import torch::

    from onewan import WanModelLoader
    model = WanModelLoader().load("Wan-AI/Wan2.2-T2V-A14B-Diffusers")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onewan.checkpoint.saver import WanModelSaver
    from onewan.config.clips import WanTrainConfig
    from onewan.config.load import load_run
    from onewan.config.schema import RunConfig
    from onewan.data.decode import VideoSample
    from onewan.data.loader import WanDataLoader
    from onewan.model.embedding import WanModelEmbedding
    from onewan.model.load import WanModelLoader
    from onewan.model.wan import WanModel
    from onewan.sample.generate import WanModelSampler
    from onewan.train.setup import WanModelSetup
    from onewan.train.trainer import WanTrainer
    from onewan.variants import ModelType

_MODULE_OF = {
    "ModelType": "onewan.variants",
    "RunConfig": "onewan.config.schema",
    "VideoSample": "onewan.data.decode",
    "WanDataLoader": "onewan.data.loader",
    "WanModel": "onewan.model.wan",
    "WanModelEmbedding": "onewan.model.embedding",
    "WanModelLoader": "onewan.model.load",
    "WanModelSampler": "onewan.sample.generate",
    "WanModelSaver": "onewan.checkpoint.saver",
    "WanModelSetup": "onewan.train.setup",
    "WanTrainConfig": "onewan.config.clips",
    "WanTrainer": "onewan.train.trainer",
    "load_run": "onewan.config.load",
}

__all__ = [
    "ModelType",
    "RunConfig",
    "VideoSample",
    "WanDataLoader",
    "WanModel",
    "WanModelEmbedding",
    "WanModelLoader",
    "WanModelSampler",
    "WanModelSaver",
    "WanModelSetup",
    "WanTrainConfig",
    "WanTrainer",
    "load_run",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'onewan' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
