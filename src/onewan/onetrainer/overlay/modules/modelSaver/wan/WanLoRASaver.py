"""Adapters: a file for each expert in OneTrainer's formats; backups unchanged."""

from pathlib import Path

from modules.model.WanModel import EXPERTS, WanModel
from modules.modelSaver.mixin.LoRASaverMixin import LoRASaverMixin
from modules.modelSaver.wan.WanEmbeddingSaver import WanEmbeddingSaver
from modules.util.enum.ModelFormat import ModelFormat

import torch
from torch import Tensor

from onewan.onetrainer import weight_files


class WanLoRASaver(LoRASaverMixin):
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
        if output_model_format not in model.model_type.supported_lora_formats():
            raise NotImplementedError(f"Unsupported LoRA output format: {output_model_format}")
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
