"""Adapter configs from run files and adapter files, and adapters exported and read back."""

from __future__ import annotations

import copy
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from support.adapters import (
    METHODS,
    MIXED,
    attached,
    file_of,
    gradients,
    output,
    relative,
    trained,
)
from support.tiny_models import tiny_transformer
from torch import Tensor

from onewan.adapters.adapter_config import (
    AdapterConfig,
    adapter_config_for,
    adapter_config_from_file,
)
from onewan.adapters.lora import (
    adapter_of,
    adapter_weights,
    apply_lora,
    attach_adapter,
    base_weight,
)
from onewan.checkpoint.component import from_module
from onewan.checkpoint.saver import AdapterHeader, WanModelSaver
from onewan.config.method import (
    DoraMethod,
    LokrMethod,
    LoraMethod,
    OftMethod,
    PerModule,
)
from onewan.errors import CheckpointError, ConfigError
from onewan.formats.adapter import ModuleAdapter
from onewan.formats.lora import WanShape
from onewan.formats.lora_files import parse_adapter, read_adapter

DATE = datetime(2026, 11, 23, tzinfo=timezone.utc)
KINDS = pytest.mark.parametrize("kind", METHODS)


@pytest.fixture(scope="module")
def base() -> WanTransformer3DModel:
    return tiny_transformer()


# ------------------------------------------------------------------------------------------- config


def test_settings_of_a_module_or_an_expert_replace_those_of_the_method(base):
    method = LoraMethod(rank=4, alpha=2.0, per_module=MIXED)
    config = adapter_config_for(method, base, [1])
    assert {m.split(".")[1] for m in config.modules} == {"1"}
    assert config.ranks["blocks.1.attn1.to_q"] == 4 and config.alphas["blocks.1.attn1.to_q"] == 2.0
    assert config.ranks["blocks.1.ffn.net.2"] == 2 and config.alphas["blocks.1.ffn.net.2"] == 3.0
    assert config.ranks["blocks.1.attn2.to_k"] == 6 and config.alphas["blocks.1.attn2.to_k"] == 2.0
    own = adapter_config_for(method, base, None, rank=8)
    assert own.ranks["blocks.0.attn1.to_q"] == 8 and own.alphas["blocks.0.attn1.to_q"] == 8.0
    own = adapter_config_for(method, base, None, rank=8, alpha=1.0)
    assert own.ranks["blocks.0.ffn.net.2"] == 2 and own.alphas["blocks.0.attn1.to_q"] == 1.0
    free = adapter_config_for(LoraMethod(rank=4, per_module=MIXED), base, None)
    assert free.alphas["blocks.0.attn1.to_q"] == 4.0 and free.alphas["blocks.0.attn2.to_k"] == 6.0
    model, _ = attached(base, method)
    shapes = {n: w.shape[0] for n, w in adapter_weights(model).items() if "lora_A" in n}
    assert shapes["blocks.0.attn2.to_k.lora_A.weight"] == 6
    assert shapes["blocks.1.ffn.net.2.lora_A.weight"] == 2
    last = (PerModule(modules=("ffn",), rank=2), PerModule(modules=("blocks.*",), rank=3))
    assert set(adapter_config_for(LoraMethod(per_module=last), base, None).ranks.values()) == {3}


def test_settings_that_do_not_fit_the_model_are_refused_by_field(base):
    with pytest.raises(
        ConfigError, match=r"per_module\.0\.modules: names no layer that has an adapter"
    ):
        entry = PerModule(modules=("attn2.to_k",), rank=2)
        adapter_config_for(LoraMethod(modules=("ffn",), per_module=(entry,)), base, None)
    with pytest.raises(ConfigError, match=r"block_size: 24 does not divide the 32 inputs of"):
        adapter_config_for(OftMethod(block_size=24), base, None)
    with pytest.raises(
        ConfigError, match=r"rank: is 33, but blocks\.0\.attn1\.to_q has only 32 sin"
    ):
        adapter_config_for(LoraMethod(rank=33, init="pissa"), base, None)
    assert adapter_config_for(LoraMethod(rank=33), base, None).ranks


# ----------------------------------------------------------------------------- out and in by files


def export(
    model: WanTransformer3DModel, config: AdapterConfig, path: Path, format: Any
) -> list[str]:
    def base(name: str) -> Tensor:
        layer, _, which = name.rpartition(".")
        return base_weight(model, layer, which)

    return WanModelSaver().save_adapter(
        adapter_of(model, config),
        path,
        format,
        AdapterHeader(facts={"expert": "high"}, date=DATE),
        shape=WanShape.of_config(model.config),
        base=base,
    )


@pytest.mark.parametrize("kind", [kind for kind in METHODS if "pissa" not in kind])
def test_the_adapter_in_memory_equals_what_pefts_settings_describe(base, kind):
    """By module, against PEFT's own configuration with its regular expressions. PiSSA is converted
    to a plain LoRA, see below."""
    model, config = trained(base, METHODS[kind])
    settings = config.peft_config().to_dict()
    want = parse_adapter(adapter_weights(model), settings, source="PEFT")
    got = adapter_of(model, config)
    assert list(got) == list(want) == list(config.modules)
    for module, adapter in got.items():
        assert (adapter.kind, adapter.alpha) == (want[module].kind, want[module].alpha)
        assert list(adapter.tensors) == list(want[module].tensors)
        for name, tensor in adapter.tensors.items():
            assert torch.equal(tensor, want[module].tensors[name])


@KINDS
@pytest.mark.parametrize("format", ["comfyui", "diffusers", "kohya"])
def test_an_exported_adapter_reproduces_the_trained_model(base, tmp_path, kind, format):
    model, config = trained(base, METHODS[kind])
    path = tmp_path / "x.safetensors"
    if format == "diffusers" and config.kind in ("loha", "lokr", "oft"):
        with pytest.raises(CheckpointError, match="diffusers reads in no key format"):
            export(model, config, path, format)
        return
    export(model, config, path, format)
    fresh = copy.deepcopy(base)
    apply_lora(fresh, read_adapter(path).modules, "file")
    effect = output(model) - output(base)
    assert (output(fresh) - output(model)).norm() < 1e-5 * effect.norm()


@KINDS
def test_a_saved_model_has_the_adapter_merged_in(base, kind):
    model, _ = trained(base, METHODS[kind])
    weights = from_module(model, "transformer", "memory").weights
    merged = copy.deepcopy(base)
    merged.load_state_dict({name: weight.read() for name, weight in weights.items()})
    effect = output(model) - output(base)
    assert (output(merged) - output(model)).norm() < 1e-5 * effect.norm()


def test_pissa_is_exported_as_a_lora_of_twice_the_rank(base, tmp_path):
    model, config = trained(base, METHODS["rs_pissa"])
    export(model, config, tmp_path / "x.safetensors", "comfyui")
    file = read_adapter(tmp_path / "x.safetensors")
    assert {m: a.rank for m, a in file.modules.items()} == {
        m: 2 * r for m, r in config.ranks.items()
    }
    for module, adapter in file.modules.items():
        assert adapter.scale == pytest.approx(config.scale(module))


START = {
    "lora": "comfyui",
    "mixed": "kohya",
    "rslora": "diffusers",
    "pissa": "diffusers",
    "dora": "diffusers",
    "loha": "kohya",
    "lokr": "comfyui",
    "lokr_both": "comfyui",
    "lokr_whole": "comfyui",
}


@pytest.mark.parametrize("kind", START)
def test_training_starts_from_an_exported_file(base, tmp_path, kind):
    model, config = trained(base, METHODS[kind])
    path = tmp_path / "x.safetensors"
    export(model, config, path, START[kind])
    plain = type(METHODS[kind])()
    again, weights = adapter_config_from_file(read_adapter(path), plain, base)
    other = copy.deepcopy(base)
    attach_adapter(other, again, 7, "low", weights)
    effect = output(model) - output(base)
    assert (output(other) - output(model)).norm() < 1e-5 * effect.norm()
    assert again.modules == config.modules and not again.pissa
    if kind != "pissa":
        assert all(
            torch.equal(w, adapter_weights(model)[n])
            for n, w in adapter_weights(other).items()
            if kind != "lokr_whole"
        )
    gradients(other)  # each parameter gets one
    export(other, again, tmp_path / "y.safetensors", START[kind])
    last = copy.deepcopy(base)
    apply_lora(last, read_adapter(tmp_path / "y.safetensors").modules, "file")
    assert (output(last) - output(model)).norm() < 1e-5 * effect.norm()


def test_training_starts_from_oft_of_peft(base):
    model, config = trained(base, METHODS["oft"])
    file = file_of(adapter_of(model, config))
    again, weights = adapter_config_from_file(file, OftMethod(), base)
    assert again.block_size == 16
    assert all(relative(weights[n], w) < 1e-4 for n, w in adapter_weights(model).items())
    shared = ModuleAdapter(kind="oft", tensors={"rotation": torch.eye(8)[None]})
    again, weights = adapter_config_from_file(
        file_of({"blocks.0.attn1.to_q": shared}), OftMethod(), base
    )
    assert weights["blocks.0.attn1.to_q.oft_R.weight"].shape == (4, 28)


Q = "blocks.0.attn1.to_q"


def lora(**more: Tensor) -> ModuleAdapter:
    return ModuleAdapter(
        kind="lora", tensors={"lora_A": torch.ones(2, 32), "lora_B": torch.ones(32, 2), **more}
    )


@pytest.mark.parametrize(
    ("method", "adapter", "words"),
    [
        (LoraMethod(), lora(diff_b=torch.ones(32)), "to_q has diff_b, which can't be trained"),
        (
            LoraMethod(),
            ModuleAdapter(kind="difference", tensors={"diff": torch.ones(32, 32)}),
            "has diff",
        ),
        (
            LoraMethod(),
            ModuleAdapter(
                kind="lora", tensors={"lora_A": torch.ones(2, 48), "lora_B": torch.ones(32, 2)}
            ),
            "for a layer of 48 inputs and 32 outputs, not 32 and 32",
        ),
        (
            OftMethod(),
            ModuleAdapter(kind="oft", tensors={"oft_blocks": torch.zeros(4, 8, 8)}),
            "OFT of LyCORIS, which rotates outputs",
        ),
        (
            OftMethod(),
            ModuleAdapter(kind="oft", tensors={"rotation": torch.full((4, 8, 8), 0.5)}),
            "is not a rotation",
        ),
        (
            DoraMethod(),
            ModuleAdapter(
                kind="dora",
                tensors={**lora().tensors, "magnitude": torch.ones(1, 32)},
            ),
            r"has a magnitude \[1, 32\]",
        ),
        (
            LokrMethod(),
            ModuleAdapter(
                kind="lokr", tensors={"lokr_w1": torch.ones(4, 4), "lokr_w2": torch.ones(4, 8)}
            ),
            "for a layer of 32 inputs and 16 outputs",
        ),
        (
            LoraMethod(),
            ModuleAdapter(kind="lora", tensors=lora().tensors, alpha=0.0),
            "has an alpha of 0",
        ),
    ],
)
def test_files_that_cannot_train_are_refused(base, method, adapter, words):
    with pytest.raises(CheckpointError, match=rf"start\.safetensors: .*{words}"):
        adapter_config_from_file(file_of({Q: adapter}), method, base)


def test_files_for_another_model_kind_or_block_are_refused(base):
    with pytest.raises(CheckpointError, match=r"blocks\.9\.attn1\.to_q is not a linear layer of t"):
        adapter_config_from_file(file_of({"blocks.9.attn1.to_q": lora()}), LoraMethod(), base)
    with pytest.raises(
        ConfigError, match=r"method\.kind: is dora, but start\.safetensors holds lo"
    ):
        adapter_config_from_file(file_of({Q: lora()}), DoraMethod(), base)
    with pytest.raises(ConfigError) as error:
        adapter_config_from_file(file_of({Q: lora()}), LoraMethod(), base, [1])
    assert [p.split(":")[0] for p in error.value.problems] == [
        "wan_config.transformer_layers_to_train",
    ]
    config, _ = adapter_config_from_file(file_of({Q: lora()}), LoraMethod(), base, [0])
    assert config.modules == (Q,) and config.scale(Q) == 1.0
