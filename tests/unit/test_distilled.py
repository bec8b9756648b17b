"""Distilled LoRAs: their time steps, their files, and the videos that are sampled with them."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from support.distilled import write_distilled
from torch import Tensor

from onewan.adapters.merging import merge_adapters
from onewan.demo.tiny_model import write_tiny_model
from onewan.errors import CheckpointError, Interrupted
from onewan.memory.block_backward import BlockComputation
from onewan.memory.execution import BlockExecution
from onewan.memory.plan import Settings
from onewan.model.block_parts import BlockParts
from onewan.model.forward import predict_velocity
from onewan.model.load import WanModelLoader
from onewan.model.meta_init import transformer_on_meta
from onewan.model.transformer import WanTransformer
from onewan.model.wan import WanModel
from onewan.sample.distilled import (
    check_distilled,
    distilled_overlays,
    distilled_scheduler,
    read_distilled,
)
from onewan.sample.generate import SampleRequest, WanModelSampler
from onewan.variants import VARIANTS, ExpertName

FORMS = ["alpha", "differences"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), "t2v-a14b", width=64, layers=2)


@pytest.fixture
def model(folder: Path) -> WanModel:
    return WanModelLoader().load(folder, "t2v-a14b", torch.float32)


def request(**changes: object) -> SampleRequest:
    small = SampleRequest(
        prompt="a red square",
        negative_prompt="",
        image=None,
        width=64,
        height=32,
        frames=5,
        steps=12,
        guidance=(3.0, 4.0),
        shift=12.0,
        seed=3,
        fps=8.0,
    )
    return replace(small.in_few_steps(4, 1.0, 5.0), **changes)  # pyright: ignore[reportArgumentType]


# ------------------------------------------------------------------------------------- time steps


@pytest.mark.parametrize(("steps", "shift"), [(4, 5.0), (8, 5.0), (3, 8.0), (1, 5.0)])
def test_time_steps_are_uniform_from_1_and_shifted(steps: int, shift: float) -> None:
    scheduler = distilled_scheduler(shift)
    scheduler.set_timesteps(steps)
    uniform = [1 - n / steps for n in range(steps)]
    want = [1000 * shift * t / (1 + (shift - 1) * t) for t in uniform]
    torch.testing.assert_close(scheduler.timesteps, torch.tensor(want))


def test_the_published_time_steps_and_the_experts_that_get_them() -> None:
    """As the authors of Wan2.2-Lightning list them (ModelTC/LightX2V-Wan2.2-Lightning, issue 3)."""
    scheduler = distilled_scheduler(5.0)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-3)
    assert scheduler.sigmas[-1] == 0
    for variant in ("t2v-a14b", "i2v-a14b"):
        boundary = VARIANTS[variant].boundary
        assert boundary is not None
        assert [t >= 1000 * boundary for t in scheduler.timesteps.tolist()] == [True] * 2 + [
            False
        ] * 2


def test_a_step_is_eulers() -> None:
    scheduler = distilled_scheduler(5.0)
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(1)
    x = latents = torch.randn(1, 16, 2, 4, 8, generator=generator)
    times = [*(scheduler.timesteps / 1000).tolist(), 0.0]
    for t, (now, after) in zip(scheduler.timesteps, pairwise(times), strict=True):
        velocity = torch.randn(x.shape, generator=generator)
        (latents,) = scheduler.step(velocity, t, latents, return_dict=False)
        x = x + (after - now) * velocity
        torch.testing.assert_close(latents, x)


# ------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("form", FORMS)
def test_a_video_is_that_of_the_merged_experts_by_eulers_method(
    folder: Path, model: WanModel, tmp_path: Path, form: str
) -> None:
    """Both experts, each with its own LoRA, switched at the boundary, without guidance."""
    files = read_distilled(_files(folder, tmp_path, form))
    overlays, _ = distilled_overlays(model, files, dict.fromkeys(files, 1.0))
    before = {n: t.clone() for e in _experts(model) for n, t in e.state_dict().items()}
    video = WanModelSampler(model, distilled=overlays).sample(request())
    after = {n: t for e in _experts(model) for n, t in e.state_dict().items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    merged = copy.deepcopy(model)
    for name, file in files.items():
        merge_adapters(merged.expert(merged.variant.expert(name)), file.modules, "one")
    want = _by_definition(merged)
    assert np.abs(video.astype(int) - want.astype(int)).max() <= 1
    plain = WanModelSampler(model).sample(replace(request(), distilled=False))
    assert np.abs(video.astype(int) - plain.astype(int)).mean() > 3


def _files(folder: Path, tmp_path: Path, form: str) -> dict[ExpertName, Path]:
    written = write_distilled(folder, tmp_path / form, form=form)
    return {"high": written["high"], "low": written["low"]}


def _experts(model: WanModel) -> list[WanTransformer3DModel]:
    return [model.expert(expert) for expert in model.variant.experts]


@torch.no_grad()
def _by_definition(model: WanModel) -> np.ndarray:
    text = model.encode_text([request().prompt])
    generator = torch.Generator().manual_seed(request().seed)
    x: Tensor = torch.randn(1, 16, 2, 4, 8, generator=generator)
    times = [1.0, 0.9375, 5 / 6, 0.625, 0.0]
    for now, after in pairwise(times):
        expert = model.expert(model.variant.expert("high" if now >= 0.875 else "low"))
        velocity = predict_velocity(expert, x, torch.tensor([now]), text, dtype=torch.float32)
        x = x + (after - now) * velocity
    pixels = model.decode_video(x)[0].div(2).add(0.5).clamp(0, 1).mul(255).round()
    return pixels.to(torch.uint8).permute(1, 2, 3, 0).numpy()


def test_what_a_file_has_in_excess_is_said_once(folder: Path, tmp_path: Path) -> None:
    paths = _files(folder, tmp_path, "differences")
    tensors = load_file(paths["high"])
    total = len(tensors) + 2
    for name in ("vace_blocks.0.q", "face_adapter.k"):
        tensors[f"diffusion_model.{name}.lora_up.weight"] = torch.ones(64, 4)
    save_file(tensors, paths["high"])
    file = read_distilled(paths)["high"]
    skipped, known, alpha = file.notices
    assert skipped.startswith(f"{paths['high']}: 2 of {total} keys are skipped, since Wan 2.2 has")
    assert "face_adapter.k.lora_up.weight" in skipped
    assert f": 8 of {total} keys are skipped, as in ComfyUI" in known
    assert "has no alpha, so its weights are added as they are" in alpha
    assert alpha.endswith("give it a strength of 2")  # 8 / 4, as 0.125 for rank 64
    assert read_distilled(_files(folder, tmp_path, "alpha"))["high"].notices == ()


def test_layers_that_the_model_lacks_are_left_out(
    folder: Path, model: WanModel, tmp_path: Path
) -> None:
    paths = _files(folder, tmp_path, "alpha")
    tensors, again = load_file(paths["low"]), load_file(paths["low"])
    deeper = {k.replace("blocks.1.", "blocks.7."): t for k, t in again.items() if "blocks.1." in k}
    save_file({**tensors, **deeper}, paths["low"])
    files = read_distilled(paths)
    _, notices = distilled_overlays(model, files, dict.fromkeys(files, 1.0))
    (notice,) = notices
    assert notice.startswith(f"{paths['low']}: 10 of 30 layers are left out")
    assert "blocks.7.attn1.to_k" in notice


def test_files_that_can_not_be_used_are_refused_together(folder: Path, tmp_path: Path) -> None:
    paths = _files(folder, tmp_path, "alpha")
    swapped: dict[ExpertName, Path] = {"high": paths["low"], "low": paths["high"]}
    with pytest.raises(CheckpointError) as error:
        read_distilled(swapped)
    text = str(error.value)
    assert f"{paths['low']}: is given as the distilled LoRA of the high expert" in text
    assert f"{paths['high']}: is given as the distilled LoRA of the low expert" in text
    assert read_distilled(swapped, check_file_names=False).keys() == {"high", "low"}
    save_file({"model.layers.0.weight": torch.ones(2, 2)}, paths["high"])
    with pytest.raises(CheckpointError, match=r"1 tensors, none of a LoRA, such as model\.layers"):
        read_distilled(paths)
    save_file({"diffusion_model.vace_blocks.0.q.lora_up.weight": torch.ones(2, 2)}, paths["high"])
    with pytest.raises(CheckpointError, match=r"not of a Wan 2\.2 LoRA, .* such as .*vace_blocks"):
        read_distilled(paths)


def test_a_file_for_another_model_is_refused_by_its_shapes(
    folder: Path, model: WanModel, tmp_path: Path
) -> None:
    transformer = transformer_on_meta(model.expert(model.variant.experts[0]).config)
    files = read_distilled(_files(folder, tmp_path, "differences"))
    check_distilled(transformer, files["high"])
    narrow = write_tiny_model(tmp_path / "narrow", "t2v-a14b", width=32, layers=2)
    other = read_distilled(_files(narrow, tmp_path / "narrow loras", "differences"))["high"]
    with pytest.raises(CheckpointError) as error:
        check_distilled(transformer, other)
    assert f"{other.path}: does not fit the model in 24 of 24 layers" in str(error.value)
    moved = {m.replace("blocks.", "blocks.9"): a for m, a in other.modules.items()}
    with pytest.raises(CheckpointError, match=r"the model has none of its 24 layers, such as"):
        check_distilled(transformer, replace(other, modules=moved))


# -------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("stop_at", [1, 3])
def test_an_interrupted_sample_leaves_nothing_of_the_loras(
    folder: Path, model: WanModel, tmp_path: Path, stop_at: int
) -> None:
    files = read_distilled(_files(folder, tmp_path, "differences"))
    overlays, _ = distilled_overlays(model, files, dict.fromkeys(files, 1.0))

    def stop(done: int, _total: int) -> None:
        if done == stop_at:
            raise Interrupted

    hooks = [len(m._forward_hooks) for e in _experts(model) for m in e.modules()]
    buffers = [n for e in _experts(model) for n, _ in e.named_buffers()]
    with pytest.raises(Interrupted):
        WanModelSampler(model, distilled=overlays).sample(request(), on_step=stop)
    assert hooks == [len(m._forward_hooks) for e in _experts(model) for m in e.modules()]
    assert buffers == [n for e in _experts(model) for n, _ in e.named_buffers()]


def test_a_request_needs_the_loras(model: WanModel) -> None:
    with pytest.raises(CheckpointError, match="no distilled LoRA was loaded for high, low"):
        WanModelSampler(model).sample(request())


def test_compiled_blocks_are_not_taken_for_those_with_the_loras(
    folder: Path, model: WanModel, tmp_path: Path
) -> None:
    """Compiled code does not look for hooks, and keeps those that it was made with."""
    files = read_distilled(_files(folder, tmp_path, "alpha"))
    overlays, _ = distilled_overlays(model, files, dict.fromkeys(files, 1.0))
    sampler = WanModelSampler(model, distilled=overlays)
    want = sampler.sample(request())
    computation = BlockComputation(parts=BlockParts.compiled("eager"))
    execution = BlockExecution(
        torch.device("cpu"), Settings(resident_blocks=2), computation=computation
    )
    for expert in _experts(model):
        assert isinstance(expert, WanTransformer)
        execution.add(expert)
    plain = replace(request(), distilled=False)
    before = sampler.sample(plain)
    got = sampler.sample(request())
    assert np.abs(got.astype(int) - want.astype(int)).max() <= 1
    assert np.array_equal(sampler.sample(plain), before)
