"""Full weights: a whole folder in diffusers' layout, a file for each expert, or a backup."""

from dataclasses import replace
from pathlib import Path

from modules.model.WanModel import WanModel
from modules.util.enum.ModelFormat import ModelFormat

import torch

from onewan.checkpoint.saver import WanModelSaver as Saver
from onewan.onetrainer import model_loading, weight_files


class WanModelSaver:
    def save(
        self,
        model: WanModel,
        output_model_format: ModelFormat,
        output_model_destination: str,
        dtype: torch.dtype | None,
    ):
        destination = Path(output_model_destination)
        match output_model_format:
            case ModelFormat.DIFFUSERS:
                whole = _plain(model)
                Saver().save(whole, destination, "diffusers", dtype, force=True)
            case ModelFormat.ORIGINAL_TRANSFORMER:
                wan = _plain(model, model.expert_parts())
                weight_files.save_experts(wan, destination, dtype, model.expert_parts())
            case ModelFormat.INTERNAL:
                self._save_backup(model, destination)
            case _:
                raise NotImplementedError(
                    f"Wan 2.2 can't be saved as {output_model_format}; choose DIFFUSERS or "
                    "ORIGINAL_TRANSFORMER"
                )

    def _save_backup(self, model: WanModel, destination: Path):
        """The trained experts, and the sources of the other components."""
        config = model.train_config
        trained = [p for p in model.expert_parts() if getattr(config, p).train]
        held = [p for p in trained if not _quantised(getattr(model, p))]
        wan = replace(
            model.wan,
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=model.transformer if "transformer" in held else None,
            transformer_2=model.transformer_2 if "transformer_2" in held else None,
        )
        if held:
            Saver().save(wan, destination, "diffusers", None, force=True)
        model_loading.write_sources(destination, model.wan_sources)


def _quantised(module: torch.nn.Module | None) -> bool:
    """Whether OneTrainer has replaced layers of `module` by quantized ones."""
    return module is not None and any(
        type(layer).__module__.startswith("modules.module.quantized") for layer in module.modules()
    )


def _plain(model: WanModel, parts: list[str] | None = None):
    """onewan's model, with quantized components loaded again from their files."""
    if parts is None:
        parts = [*model.expert_parts(), "text_encoder"]
    again = [part for part in parts if _quantised(getattr(model, part))]
    if not again:
        return model.wan
    fresh = model_loading.reload_components(model.wan, model.wan_sources, again)
    return replace(model.wan, **{part: getattr(fresh, part) for part in again})
