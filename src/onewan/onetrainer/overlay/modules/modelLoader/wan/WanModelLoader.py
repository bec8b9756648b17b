"""Loaders of the base model, adapters and embeddings, by onewan's readers; registers them."""

import os
from pathlib import Path

from modules.model.WanModel import EXPERTS, WanModel
from modules.modelLoader.GenericEmbeddingModelLoader import make_embedding_model_loader
from modules.modelLoader.GenericFineTuneModelLoader import make_fine_tune_model_loader
from modules.modelLoader.GenericLoRAModelLoader import make_lora_model_loader
from modules.util.config.TrainConfig import QuantizationConfig
from modules.util.enum.DataType import DataType
from modules.util.enum.ModelType import ModelType
from modules.util.ModelNames import ModelNames
from modules.util.ModelWeightDtypes import ModelWeightDtypes
from modules.util.quantization_util import replace_linear_with_quantized_layers

import torch

from onewan.formats.embedding import read_embedding
from onewan.onetrainer import model_loading, weight_files

from safetensors.torch import load_file


class WanModelLoader:
    """The base model in any layout; the variant is determined from the files."""

    def load(
        self,
        model: WanModel,
        model_type: ModelType,
        model_names: ModelNames,
        weight_dtypes: ModelWeightDtypes,
        quantization: QuantizationConfig,
    ):
        train_dtype = weight_dtypes.train_dtype
        # The convert and sample scripts create these without the add-on's fields.
        dtypes = {
            "transformer": weight_dtypes.transformer,
            "transformer_2": getattr(weight_dtypes, "transformer_2", weight_dtypes.transformer),
            "text_encoder": weight_dtypes.text_encoder,
        }
        request = model_loading.LoadRequest(
            base=model_names.base_model,
            overrides={
                "transformer": model_names.transformer_model,
                "transformer_2": getattr(model_names, "transformer_2_model", ""),
                "vae": model_names.vae_model,
            },
            dtypes={part: _plain(dtype, train_dtype) for part, dtype in dtypes.items()},
            boundary=getattr(model_names, "wan_boundary", None),
            excluded=() if getattr(model_names, "include_transformer_2", True) else EXPERTS[1:],
        )
        wan = model_loading.load(request)
        for notice in wan.notices:
            print(notice)
        model.model_type = model_type
        model.take(wan, model_loading.component_sources(request))
        for part, dtype in dtypes.items():
            module = getattr(model, part)
            if module is not None and dtype.is_quantized():
                float32 = getattr(module, "_keep_in_fp32_modules", None) or ()
                keep = [*model_loading.FLOAT32_LINEARS, *float32]
                layers = quantization if part in EXPERTS else None
                replace_linear_with_quantized_layers(
                    module, dtype, keep, layers, copy_parameters=True
                )


def _plain(dtype: DataType, train_dtype: DataType) -> torch.dtype:
    """Data type of weights that are not quantized."""
    found = (train_dtype if dtype.is_quantized() else dtype).torch_dtype()
    return found or torch.bfloat16


class WanLoRALoader:
    """Initial adapters: OneTrainer's backups unchanged, other files by onewan's reader."""

    def load(self, model: WanModel, model_names: ModelNames):
        name = model_names.lora
        if not name:
            return
        if _is_backup(name):
            backup = os.path.join(name, "lora", "lora.safetensors")
            model.lora_state_dict = load_file(backup) if os.path.exists(backup) else None
            return
        variant = None if model.wan is None else model.wan.variant
        model.lora_state_dict = weight_files.load_adapters(Path(name), variant)


class WanEmbeddingLoader:
    """Initial embeddings: from a backup, or from the file that the config names."""

    def load(self, model: WanModel, directory: str, model_names: ModelNames):
        for name in model_names.all_embedding():
            inside = os.path.join(directory or "", "embeddings", f"{name.uuid}.safetensors")
            use_backup = _is_backup(directory) and os.path.exists(inside)
            path = inside if use_backup else name.model_name
            # The convert tool passes one name as the model, the LoRA and the embedding.
            given = bool(path) and path != model_names.lora
            model.embedding_state_dicts[name.uuid] = read_embedding(Path(path)) if given else None


def _is_backup(directory: str | None) -> bool:
    return os.path.exists(os.path.join(directory or "", model_loading.META_FILE))


_SPEC = "resources/sd_model_spec/wan_2_2"
_CLASSES = WanModel, WanModelLoader, WanEmbeddingLoader
make_fine_tune_model_loader({ModelType.WAN_2_2: f"{_SPEC}.json"}, *_CLASSES)
make_embedding_model_loader({ModelType.WAN_2_2: f"{_SPEC}-embedding.json"}, *_CLASSES)
make_lora_model_loader({ModelType.WAN_2_2: f"{_SPEC}-lora.json"}, *_CLASSES, WanLoRALoader)
