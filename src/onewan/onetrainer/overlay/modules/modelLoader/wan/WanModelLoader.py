"""The base model, by onewan's loader: any layout; the variant is determined from the files."""

from modules.model.WanModel import EXPERTS, WanModel
from modules.util.config.TrainConfig import QuantizationConfig
from modules.util.enum.DataType import DataType
from modules.util.enum.ModelType import ModelType
from modules.util.ModelNames import ModelNames
from modules.util.ModelWeightDtypes import ModelWeightDtypes
from modules.util.quantization_util import replace_linear_with_quantized_layers

import torch

from onewan.onetrainer import model_loading


class WanModelLoader:
    def load(
        self,
        model: WanModel,
        model_type: ModelType,
        model_names: ModelNames,
        weight_dtypes: ModelWeightDtypes,
        quantization: QuantizationConfig,
    ):
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
            dtypes={
                part: _plain(dtype, weight_dtypes.train_dtype) for part, dtype in dtypes.items()
            },
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
                keep = [
                    *model_loading.FLOAT32_LINEARS,
                    *(getattr(module, "_keep_in_fp32_modules", None) or ()),
                ]
                layers = quantization if part in EXPERTS else None
                replace_linear_with_quantized_layers(
                    module, dtype, keep, layers, copy_parameters=True
                )


def _plain(dtype: DataType, train_dtype: DataType) -> torch.dtype:
    """Data type of weights that are not quantized."""
    found = (train_dtype if dtype.is_quantized() else dtype).torch_dtype()
    return found or torch.bfloat16
