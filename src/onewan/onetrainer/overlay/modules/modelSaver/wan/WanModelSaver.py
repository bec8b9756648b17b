"""Savers of full weights, adapters and embeddings, by onewan's writers; registers them."""

import os
from dataclasses import replace
from pathlib import Path

from modules.model.WanModel import EXPERTS, WanModel
from modules.modelSaver.GenericEmbeddingModelSaver import make_embedding_model_saver
from modules.modelSaver.GenericFineTuneModelSaver import make_fine_tune_model_saver
from modules.modelSaver.GenericLoRAModelSaver import make_lora_model_saver
from modules.modelSaver.mixin.LoRASaverMixin import LoRASaverMixin
from modules.util import path_util
from modules.util.enum.ModelFormat import ModelFormat
from modules.util.enum.ModelType import ModelType

import torch
from torch import Tensor

from onewan.checkpoint.saver import WanModelSaver as Saver
from onewan.formats.embedding import EmbeddingFile
from onewan.model.embedding import WanModelEmbedding
from onewan.onetrainer import model_loading, weight_files


class WanModelSaver:
    """Full weights: a whole folder in diffusers' layout, a file for each expert, or a backup."""

    def save(
        self, model: WanModel, format: ModelFormat, destination: str, dtype: torch.dtype | None
    ):
        path = Path(destination)
        match format:
            case ModelFormat.DIFFUSERS:
                whole = _plain(model, [*model.expert_parts(), "text_encoder"])
                Saver().save(whole, path, "diffusers", dtype, force=True)
            case ModelFormat.ORIGINAL_TRANSFORMER:
                weight_files.save_experts(_plain(model, model.expert_parts()), path, dtype)
            case ModelFormat.INTERNAL:
                self._save_backup(model, path)
            case _:
                raise NotImplementedError(
                    f"Wan 2.2 can't be saved as {format}; choose DIFFUSERS or ORIGINAL_TRANSFORMER"
                )

    def _save_backup(self, model: WanModel, destination: Path):
        """The trained experts, and the sources of the other components."""
        config = model.train_config
        trained = [p for p in model.expert_parts() if getattr(config, p).train]
        held = [p for p in trained if not _quantised(getattr(model, p))]
        if held:
            trained_only = weight_files.only_transformers(model.wan, held)
            Saver().save(trained_only, destination, "diffusers", None, force=True)
        model_loading.write_sources(destination, model.wan_sources)


def _quantised(module: torch.nn.Module | None) -> bool:
    """Whether OneTrainer has replaced layers of `module` by quantized ones."""
    own = "modules.module.quantized"
    return module is not None and any(type(m).__module__.startswith(own) for m in module.modules())


def _plain(model: WanModel, parts: list[str]):
    """onewan's model, with quantized components among `parts` loaded again from their files."""
    again = [part for part in parts if _quantised(getattr(model, part))]
    if not again:
        return model.wan
    fresh = model_loading.reload_components(model.wan, model.wan_sources, again)
    return replace(model.wan, **{part: getattr(fresh, part) for part in again})


class WanLoRASaver(LoRASaverMixin):
    """Adapters: a file for each expert in OneTrainer's formats; backups unchanged."""

    def _get_state_dict(self, model: WanModel) -> dict[str, Tensor]:
        # The convert tool creates no wrappers; it has only the loaded state dict.
        state_dict = dict(model.lora_state_dict or {})
        for part in EXPERTS:
            adapter = getattr(model, f"{part}_lora")
            if adapter is not None:
                state_dict |= adapter.state_dict()
        return state_dict

    def _save(
        self,
        model: WanModel,
        output_model_format: ModelFormat,
        output_model_destination: str,
        dtype: torch.dtype | None,
    ):
        if output_model_format == ModelFormat.INTERNAL:
            self._save_internal(model, output_model_destination)
            return
        formats = model.model_type.supported_lora_formats()
        if output_model_format not in formats:
            choices = ", ".join(str(known) for known in formats)
            raise NotImplementedError(
                f"LoRAs for Wan 2.2 can't be saved as {output_model_format}; choose {choices}"
            )
        state_dict = self._get_state_dict(model)
        weight_files.save_adapters(
            state_dict,
            Path(output_model_destination),
            str(output_model_format),
            variant=None if model.wan is None else model.wan.variant,
            metadata=self._create_safetensors_header(model, state_dict),
            dtype=dtype,
            report=print,
            model=model.wan,
        )
        if model.train_config is not None and model.train_config.bundle_additional_embeddings:
            # No program reads embeddings from a Wan adapter's file, so they get files beside it.
            WanEmbeddingSaver().save_multiple(
                model, ModelFormat.SAFETENSORS, output_model_destination, dtype
            )


class WanEmbeddingSaver:
    """Embeddings: a file for each, with onewan's keys."""

    def save_single(
        self, model: WanModel, format: ModelFormat, destination: str, dtype: torch.dtype | None
    ):
        """The trained embedding, or in the convert tool the loaded one."""
        found = self._all(model)
        chosen = model.trained_embedding()
        uuid = next(iter(found)) if chosen is None else chosen.uuid
        self._write(found[uuid], uuid, format, destination, dtype)

    def save_multiple(
        self, model: WanModel, format: ModelFormat, destination: str, dtype: torch.dtype | None
    ):
        """All others."""
        chosen = model.trained_embedding()
        if not model.trained_embeddings():
            return
        for uuid, embedding in self._all(model).items():
            if chosen is not None and uuid == chosen.uuid:
                continue
            path = destination
            if format != ModelFormat.INTERNAL:
                placeholder = embedding.placeholder
                name = path_util.safe_filename(placeholder, allow_spaces=False, max_length=None)
                path = os.path.join(f"{destination}_embeddings", f"{name or uuid}.safetensors")
            self._write(embedding, uuid, format, path, dtype)

    def _all(self, model: WanModel) -> dict[str, WanModelEmbedding]:
        read = {
            uuid: weight_files.embedding_of(uuid, file)
            for uuid, file in model.embedding_state_dicts.items()
            if isinstance(file, EmbeddingFile)
        }
        return read | {embedding.uuid: embedding for embedding in model.trained_embeddings()}

    def _write(self, embedding, uuid, format, destination, dtype):
        match format:
            case ModelFormat.SAFETENSORS:
                path = Path(destination)
            case ModelFormat.INTERNAL:
                path, dtype = Path(destination) / "embeddings" / f"{uuid}.safetensors", None
            case _:
                raise NotImplementedError(
                    f"Embeddings can't be saved as {format}; choose SAFETENSORS"
                )
        Saver().save_embedding(embedding, path, dtype=dtype)


make_fine_tune_model_saver(ModelType.WAN_2_2, WanModel, WanModelSaver, WanEmbeddingSaver)
make_lora_model_saver(ModelType.WAN_2_2, WanModel, WanLoRASaver, WanEmbeddingSaver)
make_embedding_model_saver(ModelType.WAN_2_2, WanModel, WanEmbeddingSaver)
