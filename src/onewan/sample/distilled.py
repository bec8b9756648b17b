"""Sampling in a few steps with LoRAs that are distilled for it, such as Wan2.2-Lightning.

A distilled LoRA teaches a transformer to reach in one step what the base model reaches in many. It
was trained at a few time steps and without guidance, so it needs exactly these: for four steps and
shift 5 they are 1000, 937.5, 833.3 and 625, of which the high-noise expert gets the first two.
Sources: ModelTC/Wan2.2-Lightning (``wan/utils/fm_solvers_euler.py``, ``wan/configs``), and
ModelTC/LightX2V (``schedulers/wan/step_distill``, ``configs/distill/wan22``).

Published files differ in their keys. Some have alphas (8 for rank 64), others none; some have
differences of biases and norms, and keys that only Wan 2.1 has weights for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

from onewan.adapters.overlay import Overlay
from onewan.errors import CheckpointError
from onewan.formats.adapter import ModuleAdapter
from onewan.formats.lora_files import AdapterFile, read_adapter
from onewan.formats.model_folder import raise_problems
from onewan.formats.untrusted import named
from onewan.formats.weights import detect_expert
from onewan.model.wan import WanModel
from onewan.variants import NUM_TRAIN_TIMESTEPS, ExpertName


class DistilledScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler's method at the time steps of distilled models: uniform from 1, without the 0 at the
    end, then shifted. diffusers' own steps are uniform down to 1/1000, and shifted twice."""

    def set_timesteps(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, num_inference_steps: int, device: torch.device | str | None = None
    ) -> None:
        uniform = np.linspace(1, 0, num_inference_steps + 1)[:-1]
        super().set_timesteps(sigmas=uniform.tolist(), device=device)  # pyright: ignore[reportArgumentType]


def distilled_scheduler(shift: float) -> DistilledScheduler:
    return DistilledScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS, shift=shift)


def read_distilled(
    files: Mapping[ExpertName, Path], *, check_file_names: bool = True
) -> dict[ExpertName, AdapterFile]:
    """The distilled LoRAs in `files`, by the expert that each is for. What they have no use for is
    in their notices.

    CheckpointError, with a line for each problem, for files that can't be used: incomplete ones,
    those of other models, and with `check_file_names` those that are named as the other expert.
    """
    found: dict[ExpertName, AdapterFile] = {}
    problems: list[str] = []
    for expert, path in files.items():
        try:
            file = read_adapter(path, expert, skip_unknown=True)
        except CheckpointError as error:
            problems += error.details or [error.message]
            continue
        by_name = detect_expert(path, file.metadata) if check_file_names else None
        other = file.expert or (by_name and by_name[0])
        if other not in (None, expert) and len(files) > 1:
            problems.append(
                f"{path}: is given as the distilled LoRA of the {expert} expert, but "
                f"{'its keys are' if file.expert else 'it is named as that'} of the {other} one; "
                "swap the two, or set model.check_file_names to false if the name is wrong"
            )
        found[expert] = replace(file, notices=(*file.notices, *_notice_of_alpha(file)))
    raise_problems(problems)
    return found


def _notice_of_alpha(file: AdapterFile) -> Iterable[str]:
    pairs = [a for a in file.modules.values() if a.kind == "lora"]
    if pairs and all(adapter.alpha is None for adapter in pairs):
        yield (
            f"{file.path}: has no alpha, so its weights are added as they are; if samples are "
            "noise or mosaic, it was meant for an alpha of 8: give it a strength of "
            f"{8 / max(a.rank or 8 for a in pairs):g}"
        )


def distilled_overlays(
    model: WanModel, files: Mapping[ExpertName, AdapterFile], strengths: Mapping[ExpertName, float]
) -> tuple[dict[ExpertName, Overlay], list[str]]:
    """(the LoRAs of `files` for the transformers of `model`, multiplied by `strengths`; notices for
    the user, one line each). CheckpointError as from `check_distilled`."""
    overlays: dict[ExpertName, Overlay] = {}
    notices: list[str] = []
    for name, file in files.items():
        transformer = model.expert(model.variant.expert(name))
        fitting, about = _fitting(transformer, file)
        overlays[name] = Overlay(
            transformer, fitting, str(file.path), strength=strengths[name], dtype=model.dtype
        )
        notices += [*file.notices, *about]
    return overlays, notices


def check_distilled(transformer: WanTransformer3DModel, file: AdapterFile) -> None:
    """CheckpointError, which names the file, if the transformer has none of the layers of the LoRA
    in `file`, or for shapes that do not fit. No values are read, and the transformer may be on the
    meta device."""
    fitting, _ = _fitting(transformer, file)
    without_values = {
        module: replace(adapter, tensors={n: t.to("meta") for n, t in adapter.tensors.items()})
        for module, adapter in fitting.items()
    }
    Overlay(transformer, without_values, str(file.path))


def _fitting(
    transformer: WanTransformer3DModel, file: AdapterFile
) -> tuple[dict[str, ModuleAdapter], list[str]]:
    """(the adapters on layers that the transformer has, notices about the others)."""
    present = {name for name, _ in transformer.named_modules()}
    fitting = {name: a for name, a in file.modules.items() if name in present}
    absent = sorted(file.modules.keys() - fitting.keys())
    if not fitting:
        raise CheckpointError(
            f"{file.path}: the model has none of its {len(absent)} layers, such as "
            f"{named(absent)}; it is for another model"
        )
    if not absent:
        return fitting, []
    return fitting, [
        f"{file.path}: {len(absent)} of {len(file.modules)} layers are left out, since the model "
        f"does not have them: {named(absent)}"
    ]
