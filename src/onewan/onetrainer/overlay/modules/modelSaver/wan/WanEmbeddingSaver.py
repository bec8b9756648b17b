"""Embeddings: a file for each, as ComfyUI reads it."""

import os
from pathlib import Path

from modules.model.WanModel import WanModel
from modules.util import path_util
from modules.util.enum.ModelFormat import ModelFormat

import torch

from onewan.checkpoint.saver import WanModelSaver
from onewan.formats.embedding import EmbeddingFile
from onewan.model.embedding import WanModelEmbedding
from onewan.onetrainer import weight_files


class WanEmbeddingSaver:
    def save_single(
        self,
        model: WanModel,
        output_model_format: ModelFormat,
        output_model_destination: str,
        dtype: torch.dtype | None,
    ):
        """The trained embedding, or in the convert tool the loaded one."""
        found = self._all(model)
        uuid = next(iter(found)) if model.embedding is None else model.embedding.uuid
        self._write(found[uuid], uuid, output_model_format, output_model_destination, dtype)

    def save_multiple(
        self,
        model: WanModel,
        output_model_format: ModelFormat,
        output_model_destination: str,
        dtype: torch.dtype | None,
    ):
        """All others."""
        chosen = None if model.embedding is None else model.embedding.uuid
        if model.wan is None or not model.all_embeddings():
            return
        for uuid, embedding in self._all(model).items():
            if uuid == chosen:
                continue
            destination = output_model_destination
            if output_model_format != ModelFormat.INTERNAL:
                name = path_util.safe_filename(
                    embedding.placeholder, allow_spaces=False, max_length=None
                )
                destination = os.path.join(
                    f"{output_model_destination}_embeddings", f"{name or uuid}.safetensors"
                )
            self._write(embedding, uuid, output_model_format, destination, dtype)

    def _all(self, model: WanModel) -> dict[str, WanModelEmbedding]:
        read = {
            uuid: weight_files.embedding_of(uuid, file)
            for uuid, file in model.embedding_state_dicts.items()
            if isinstance(file, EmbeddingFile)
        }
        return read | {embedding.uuid: embedding for embedding in model.all_embeddings()}

    def _write(self, embedding, uuid, output_model_format, destination, dtype):
        match output_model_format:
            case ModelFormat.SAFETENSORS:
                path = Path(destination)
            case ModelFormat.INTERNAL:
                path, dtype = Path(destination) / "embeddings" / f"{uuid}.safetensors", None
            case _:
                raise NotImplementedError(
                    f"Embeddings can't be saved as {output_model_format}; choose SAFETENSORS"
                )
        WanModelSaver().save_embedding(embedding, path, dtype=dtype)
