"""Training that starts from a published LoRA with differences of biases and norms beside its pairs.

The reference is what other programs do with such a file: each ``diff`` is added to a weight, each
``diff_b`` to a bias, and keys of layers that Wan 2.2 does not have are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from support.runs import RunFile, layout_of, outcome, recorder, write_run_file
from support.tiny_models import TinyModels
from torch import Tensor

from onewan.adapters.lora import apply_lora
from onewan.config.schema import ResolvedRun
from onewan.demo.clips import write_clips
from onewan.errors import CheckpointError, ConfigError, Interrupted
from onewan.formats.key_maps import to_official
from onewan.formats.lora_files import read_adapter
from onewan.model.forward import predict_velocity
from onewan.model.load import WanModelLoader
from onewan.runs.control import request
from onewan.runs.events import StepDone
from onewan.train.setup import WanModelSetup
from onewan.train.state import WeightSet
from onewan.train.trainables import AdapterTraining
from onewan.train.trainer import WanTrainer
from onewan.train.validation import clip_losses, mean_loss

Q, K = "diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.1.cross_attn.k"
NORM, NORM3 = "diffusion_model.blocks.0.self_attn.norm_q", "diffusion_model.blocks.1.norm3"
DIFFERENCES = [
    f"{Q}.diff_b",
    f"{K}.diff_b",
    f"{NORM}.diff",
    f"{NORM3}.diff",
    f"{NORM3}.diff_b",
    "diffusion_model.head.head.diff_b",
]


def published(path: Path, seed: int, **changes: Tensor) -> Path:
    """A file with the parts of a published distilled LoRA, float16, for a model of width 32."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.2).half()

    file: dict[str, Tensor] = {}
    for layer in (Q, K):
        file[f"{layer}.lora_down.weight"] = some(2, 32)
        file[f"{layer}.lora_up.weight"] = some(32, 2)
    for key in DIFFERENCES:
        file[key] = some(64 if "head" in key else 32)
    patch = "diffusion_model.patch_embedding"
    file[f"{patch}.lora_down.weight"], file[f"{patch}.lora_up.weight"] = some(3, 144), some(32, 3)
    image = K.replace("attn.k", "attn.k_img")
    file[f"{image}.lora_down.weight"], file[f"{image}.lora_up.weight"] = some(2, 32), some(32, 2)
    file |= {f"{image}.diff_b": some(32), "diffusion_model.blocks.0.diff_m": some(1, 6, 32)}
    save_file({**file, **changes}, path)
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [
        published(tmp_path / f"lightning_{expert}_noise.safetensors", seed)
        for seed, expert in enumerate(("high", "low"))
    ]


def settings(files: list[Path]) -> list[str]:
    listed = ", ".join(path.as_posix() for path in files)
    return ["i2v-a14b", f"method={{kind: lora, init_from: [{listed}]}}"]


def prediction(transformer: WanTransformer3DModel, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    x, condition = (torch.randn(1, c, 2, 4, 4, generator=generator) for c in (16, 20))
    text = torch.randn(1, 512, transformer.config["text_dim"], generator=generator)
    transformer.eval()
    with torch.no_grad():
        return predict_velocity(
            transformer, x, torch.tensor([0.9]), text, condition_BCFHW=condition, dtype=dtype
        )


def plain(config: ResolvedRun, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The transformers of the base model, by expert."""
    path = Path(str(config.model.path))
    model = WanModelLoader().load({"path": path}, "i2v-a14b", dtype)
    return {expert.name: model.expert(expert) for expert in model.variant.experts}


def load_as_comfyui(transformer: WanTransformer3DModel, path: Path) -> None:
    """Change the weights as ComfyUI does with the keys in the file at `path`."""
    file = load_file(path)
    used: set[str] = set()
    for name, weight in transformer.named_parameters():
        layer, _, which = to_official(name).rpartition(".")
        key = f"diffusion_model.{layer}"
        added = [f"{key}.diff"] if which == "weight" else [f"{key}.diff_b"]
        pair = [f"{key}.{part}" for part in ("lora_A.weight", "lora_B.weight", "alpha")]
        for found in (key for key in added if key in file):
            weight.data += file[found]
            used.add(found)
        if which == "weight" and pair[0] in file:
            a, b = file[pair[0]], file[pair[1]]
            scale = file.get(pair[2], torch.tensor(float(len(a)))) / len(a)
            weight.data += (scale * (b @ a)).reshape(weight.shape)
            used |= set(pair)
    assert used >= file.keys()


def test_overwriting_the_file_during_the_run_changes_nothing(
    run_file: RunFile, files: list[Path]
) -> None:
    run = WanModelSetup(run_file(*settings(files))).build()
    method = run.state.experts["high"].method
    assert isinstance(method, AdapterTraining)
    before = {k: t.clone() for k, t in load_file(files[0]).items()}
    with files[0].open("r+b") as file:  # the same file, as `cp` overwrites it
        file.write(bytes(files[0].stat().st_size))
    adapter = method.adapter()
    assert torch.equal(adapter["blocks.0.attn1.norm_q"].tensors["diff"], before[f"{NORM}.diff"])
    bias = adapter["blocks.0.attn1.to_q"].tensors["diff_b"]
    assert torch.equal(bias, before[f"{Q}.diff_b"].float())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_step_computes_with_what_the_file_does_to_the_model(
    run_file: RunFile, files: list[Path], dtype: str
) -> None:
    config = run_file(*settings(files), f"model.dtype={dtype}")
    run = WanModelSetup(config).build()
    precision = getattr(torch, dtype)
    for (name, trained), path in zip(run.state.experts.items(), files, strict=True):
        base, applied = (plain(config, precision)[name] for _ in range(2))
        apply_lora(applied, read_adapter(path).modules, "one")
        want, of_base = prediction(applied, precision), prediction(base, precision)
        got = prediction(trained.transformer, precision)
        assert (want - of_base).norm() > 0.05 * of_base.norm()
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6 if dtype == "float32" else 0.02)
        with pytest.raises(RuntimeError, match="stop"), trained.base():
            assert torch.equal(prediction(trained.transformer, precision), of_base)
            raise RuntimeError("stop")
        assert torch.equal(prediction(trained.transformer, precision), got)
    for path in files:
        (notice,) = [w for w in run.warnings if str(path) in w and "stay as in the file" in w]
        assert "in 6 modules" in notice and "blocks.0.attn1.norm_q" in notice
        assert any(f"{path}: 4 of 16 keys are skipped" in w for w in run.warnings)


def test_the_export_on_the_base_model_is_the_model_that_was_trained(
    run_file: RunFile, workshop: Path, files: list[Path]
) -> None:
    common = [
        "train={steps: 4, switch_expert_every: 1, ema: {decay: 0.5}}",
        "validation={clips: 1, timesteps: 1}",
        f"video_data.sources=[{{path: {workshop / 'clips'}, target: base}}]",
        "memory.gradient_checkpointing=true",
    ]
    config = run_file(*settings(files), *common, "output.formats=[comfyui, kohya]")
    events: list[dict[str, Any]] = []
    WanTrainer(config, listen=recorder(events)).fit()
    run = WanModelSetup(config).build()
    state = layout_of(config).state(4)
    assert all(e["grad_norm"] > 0 for e in events if e["event"] == "step")  # a pull to the base
    without = WanModelSetup(run_file("i2v-a14b", *common, name="without")).build()
    base_losses = {e["expert"]: e["base"] for e in events if e["event"] == "validation"}
    assert base_losses == {
        name: mean_loss([clip_losses(without, name, "trained", lambda: None)])
        for name in ("high", "low")
    }
    for (name, trained), path in zip(run.state.experts.items(), files, strict=True):
        trainable = trained.trainable
        assert trainable is not None
        list(trainable.load(state, allow_change=False))
        sets: dict[str, WeightSet] = {"": "trained", "_ema": "ema"}
        for suffix, weights in sets.items():
            exported, kohya = (
                layout_of(config).weights(4, f"_{name}_noise{suffix}", format)
                for format in ("comfyui", "kohya")
            )
            base = plain(config)[name]
            load_as_comfyui(base, exported)
            with trainable.using(weights):
                want = prediction(trained.transformer)
            torch.testing.assert_close(prediction(base), want, rtol=0, atol=2e-6)
            given, written = load_file(path), load_file(exported)
            assert [k for k in DIFFERENCES if not torch.equal(written[k], given[k].float())] == []
            assert read_adapter(kohya).digest() == read_adapter(exported).digest()


def test_a_resumed_run_has_the_same_parts_and_notices_another_file(
    run_file: RunFile, files: list[Path]
) -> None:
    chosen = [*settings(files), "train={steps: 4, switch_expert_every: 1}"]
    whole, stopped = run_file(*chosen, name="whole"), run_file(*chosen, name="stopped")
    WanTrainer(whole).fit()

    def stop(event: object) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            request(layout_of(stopped), "stop")

    with pytest.raises(Interrupted):
        WanTrainer(stopped, listen=stop).fit()
    original = load_file(files[1])
    published(files[1], 1, **{f"{NORM}.diff": original[f"{NORM}.diff"] * 2})
    with pytest.raises(CheckpointError) as refusal:
        WanTrainer(stopped, resume=True).fit()
    assert refusal.value.details == (
        "method.init_from: the file for the low expert has other content than that of the run",
    )
    save_file(original, files[1])
    WanTrainer(stopped, resume=True).fit()
    (tensors, steps), (again, steps_again) = outcome(whole), outcome(stopped)
    assert steps == steps_again and tensors.keys() == again.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], again[name])] == []
    files[1].unlink()
    with pytest.raises(ConfigError, match=rf"there is no file {re.escape(str(files[1]))}"):
        run_file(*chosen, name="stopped")


def drop(file: Path, unwanted: Callable[[str], bool], **added: Tensor) -> None:
    save_file({k: t for k, t in load_file(file).items() if not unwanted(k)} | added, file)


def test_what_can_not_be_trained_or_exported_is_refused_before_encoding(
    run_file: RunFile, files: list[Path], tmp_path: Path
) -> None:
    cache = f"video_data.cache_dir={tmp_path / 'cache'}"

    def refusal(*overrides: str, expected: type[Exception] = ConfigError) -> str:
        with pytest.raises(expected) as error:
            WanModelSetup(run_file(*settings(files), cache, *overrides)).build()
        assert not (tmp_path / "cache").exists()
        return str(error.value)

    for formats, reason in (
        ("diffusers", "diffusers reads"),
        ("comfyui, no_alpha", "no_alpha is for read only LoRA; write it as comfyui"),
    ):
        text = refusal(f"output.formats=[{formats}]")
        assert f"output.formats: has {formats.split()[-1]}, and each exported file" in text
        assert str(files[0]) in text and str(files[1]) in text and reason in text
    drop(files[0], lambda key: key == f"{NORM}.diff", **{f"{NORM}.diff": torch.ones(1)})
    text = refusal(expected=CheckpointError)
    assert re.search(r"high_noise.*does not fit the model at blocks.0.attn1.norm_q \(\[1\]", text)
    drop(files[0], lambda key: "lora_" in key or "norm_q" in key)
    assert f"{files[0]} has no adapter on a linear layer" in refusal()


def test_a_published_file_starts_a_run(shared: Path, tmp_path: Path) -> None:
    source = shared / "clips" / "field" / "lora" / "lightx2v_style_i2v.safetensors"
    file = tmp_path / "distilled_high_noise.safetensors"
    file.write_bytes(source.read_bytes())
    TinyModels(tmp_path, width=128, layers=1)("i2v-a14b")
    write_clips(tmp_path / "clips")
    config = write_run_file(
        tmp_path, tmp_path, *settings([file]), "model.experts=high", "train.steps=1"
    )
    events: list[dict[str, Any]] = []
    WanTrainer(config, listen=recorder(events)).fit()
    warnings = [e["text"] for e in events if e["event"] == "warning"]
    assert any("5 of 39 keys are skipped" in text for text in warnings)
    assert any("in 14 modules stay as in the file" in text for text in warnings)
    given = load_file(file)
    written = load_file(layout_of(config).weights(1, "_high_noise"))
    differences = {k for k in given if ".diff" in k and "img" not in k and "diff_m" not in k}
    assert len(differences) == 14
    assert {k for k in written if ".diff" in k} == differences
    assert all(torch.equal(written[k], given[k].float()) for k in differences)
