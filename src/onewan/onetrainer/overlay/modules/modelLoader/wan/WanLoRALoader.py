"""Initial adapters: OneTrainer's backups unchanged, other files by onewan's reader."""

import os
from pathlib import Path

from modules.model.WanModel import WanModel
from modules.util.ModelNames import ModelNames

from onewan.onetrainer import weight_files

from safetensors.torch import load_file


class WanLoRALoader:
    def load(self, model: WanModel, model_names: ModelNames):
        name = model_names.lora
        if not name:
            return
        if os.path.exists(os.path.join(name, "meta.json")):
            backup = os.path.join(name, "lora", "lora.safetensors")
            model.lora_state_dict = load_file(backup) if os.path.exists(backup) else None
            return
        variant = None if model.wan is None else model.wan.variant
        model.lora_state_dict = weight_files.load_adapters(Path(name), variant)
