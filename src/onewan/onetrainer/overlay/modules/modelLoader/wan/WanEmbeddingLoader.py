"""Initial embeddings: from a backup, or from the file that the config names."""

import os
from pathlib import Path

from modules.model.WanModel import WanModel
from modules.util.ModelNames import ModelNames

from onewan.formats.embedding import read_embedding


class WanEmbeddingLoader:
    def load(self, model: WanModel, directory: str, model_names: ModelNames):
        for name in model_names.all_embedding():
            inside = os.path.join(directory or "", "embeddings", f"{name.uuid}.safetensors")
            backup = os.path.exists(os.path.join(directory or "", "meta.json"))
            path = inside if backup and os.path.exists(inside) else name.model_name
            # The convert tool passes one name as the model, the LoRA and the embedding.
            given = bool(path) and path != model_names.lora
            model.embedding_state_dicts[name.uuid] = read_embedding(Path(path)) if given else None
