"""The distilled LoRAs of `sample.distilled`, which a run samples its previews with."""

from __future__ import annotations

from onewan.adapters.overlay import Overlay
from onewan.config.schema import ResolvedRun
from onewan.formats.lora_files import AdapterFile
from onewan.model.wan import WanModel
from onewan.sample.distilled import distilled_overlays, read_distilled
from onewan.variants import ExpertName


def distilled_files(config: ResolvedRun) -> dict[ExpertName, AdapterFile]:
    """The LoRAs, by expert; none if nothing is sampled. CheckpointError for files that can't be
    used."""
    distilled = config.sample.distilled
    if distilled is None or not config.sample.prompts:
        return {}
    return read_distilled(distilled.files(), check_file_names=config.model.check_file_names)


def preview_overlays(
    config: ResolvedRun, model: WanModel
) -> tuple[dict[ExpertName, Overlay], list[str]]:
    """(the LoRAs as overlays of the transformers of `model`, copied to host memory; notices about
    them for the user)."""
    files, distilled = distilled_files(config), config.sample.distilled
    if distilled is None:
        return {}, []
    return distilled_overlays(model, files, dict.fromkeys(files, distilled.strength))
