"""A run on the files of ComfyUI and GGUF users: each component is a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file
from support.other_program_files import as_gguf, fp8, shards, single, spiece, text_encoder
from support.runs import RunFile, recorder

from onewan.config.load import dump_run, load_run
from onewan.errors import CheckpointError
from onewan.model.quantized_linear import QuantizedLinear
from onewan.train.setup import WanModelSetup
from onewan.train.trainer import WanTrainer


@pytest.fixture(scope="module")
def files(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The golden T2V-A14B: one expert in fp8_scaled, the other in GGUF, all as single files."""
    golden, folder = shared / "golden" / "t2v-A14B", tmp_path_factory.mktemp("files")
    text = fp8(text_encoder(golden), folder / "umt5_fp8_scaled.safetensors", "old").path
    single({**load_file(text), "spiece_model": spiece(golden)}, text)
    vae = torch.load(golden / "Wan2.1_VAE.pth", weights_only=True)
    high = folder / "wan2.2_t2v_high_noise_fp8_scaled.safetensors"
    return {
        "transformer": fp8(shards(golden / "high_noise_model"), high, "new").path,
        "transformer_2": as_gguf(shards(golden / "low_noise_model"), folder / "low.gguf").path,
        "vae": single(vae, folder / "wan_2.1_vae.safetensors"),
        "text_encoder": text,
    }


@pytest.mark.parametrize("storage", ["as_stored", "bf16", "nf4"])
def test_a_lora_trains_on_quantized_files(
    run_file: RunFile, files: dict[str, Path], tmp_path: Path, storage: str
) -> None:
    components = [f"model.{name}={path}" for name, path in files.items()]
    config = run_file(
        "t2v-a14b",
        *components,
        "model.path=null",
        f"memory.weights={storage}",
        f"video_data.cache_dir={tmp_path / 'cache'}",
        "train.steps=4",
        "sample.prompts=[a dog]",
        "sample.steps=1",
        "sample.frames=5",
        "sample.width=64",
        "sample.height=64",
    )
    (tmp_path / "again.yaml").write_text(dump_run(config), encoding="utf-8")
    assert load_run(tmp_path / "again.yaml") == config
    events: list[dict[str, object]] = []
    WanTrainer(config, listen=recorder(events)).fit()
    losses = [e["loss"] for e in events if e["event"] == "step"]
    assert {e["expert"] for e in events if e["event"] == "step"} == {"high", "low"}
    assert len(losses) == 4 and all(isinstance(loss, float) and loss > 0 for loss in losses)
    warnings = [str(e["text"]) for e in events if e["event"] == "warning"]
    assert len(warnings) == (2 if storage == "nf4" else 0)  # one for each expert
    assert all("weights were rounded twice" in text for text in warnings)
    exported = sorted((tmp_path / "runs" / "run" / "weights").glob("*.safetensors"))
    assert len(exported) == 2 and (tmp_path / "runs" / "run" / "samples").is_dir()
    assert all(
        tensor.isfinite().all() and tensor.dtype == torch.float32
        for file in exported
        for name, tensor in load_file(file).items()
        if "lora" in name
    )
    run = WanModelSetup(config).build()
    for trained in run.state.experts.values():
        packed = [m for m in trained.transformer.modules() if isinstance(m, QuantizedLinear)]
        assert len(packed) == (0 if storage == "bf16" else 20)


def test_facts_that_loading_infers_are_reported(
    run_file: RunFile, files: dict[str, Path], shared: Path, tmp_path: Path
) -> None:
    """Expanded GGUF types are, and so are wrong file names unless that check is switched off."""
    low = shards(shared / "golden" / "t2v-A14B" / "low_noise_model")
    tiny = as_gguf(low, tmp_path / "high_noise_tq2.gguf", GGMLQuantizationType.TQ2_0).path
    given = [
        *[f"model.{name}={path}" for name, path in files.items() if name != "transformer_2"],
        f"model.transformer_2={tiny}",
        f"video_data.cache_dir={tmp_path / 'cache'}",
        "train.steps=1",
    ]
    with pytest.raises(CheckpointError, match="is named as the high-noise expert"):
        WanTrainer(run_file("t2v-a14b", *given)).fit()
    events: list[dict[str, object]] = []
    config = run_file("t2v-a14b", *given, "model.check_file_names=false", name="overruled")
    WanTrainer(config, listen=recorder(events)).fit()
    texts = [str(event.get("text")) for event in events]
    assert len([text for text in texts if "20 weights of type TQ2_0 were expanded" in text]) == 1


def test_kept_and_expanded_weights_train_alike(
    run_file: RunFile, files: dict[str, Path], tmp_path: Path
) -> None:
    def train(storage: str) -> list[float]:
        config = run_file(
            "t2v-a14b",
            *[f"model.{name}={path}" for name, path in files.items()],
            f"memory.weights={storage}",
            f"video_data.cache_dir={tmp_path / 'cache'}",
            f"output.name={storage}",
            "train.steps=2",
        )
        events: list[dict[str, Any]] = []
        WanTrainer(config, listen=recorder(events)).fit()
        return [event["loss"] for event in events if event["event"] == "step"]

    assert train("as_stored") == pytest.approx(train("bf16"), rel=1e-5)
