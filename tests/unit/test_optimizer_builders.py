"""Optimizers by name: each has the arguments of its section, and a missing package is named."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from onewan.config.optimizer import (
    AdafactorOptimizer,
    AdamMiniOptimizer,
    AdamW8bitOptimizer,
    AdamWLowBitOptimizer,
    AdamWOffloadOptimizer,
    AdamWOptimizer,
    AdamWScheduleFreeOptimizer,
    CameOptimizer,
    CustomOptimizer,
    LionOptimizer,
    MuonOptimizer,
    Optimizer,
    ProdigyOptimizer,
    ProdigyPlusOptimizer,
    SgdOptimizer,
    joint_only_reason,
)
from onewan.errors import ConfigError
from onewan.train.optimizers.builders import (
    build_optimizer,
    inexact_resume_reason,
    is_schedule_free,
)


def some_weights() -> list[nn.Parameter]:
    torch.manual_seed(3)
    return [nn.Parameter(torch.randn(*shape)) for shape in ((8, 6), (6,), (1, 6, 8))]


def trained(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter]) -> list[Tensor]:
    for step in range(3):
        for index, weight in enumerate(weights):
            generator = torch.Generator().manual_seed(10 * step + index)
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return [weight.detach() for weight in weights]


def check_same(
    choice: object, reference: Callable[..., torch.optim.Optimizer], **arguments: object
) -> None:
    """The optimizer that `choice` names gives the bits of the reference."""
    ours, theirs = some_weights(), some_weights()
    made = build_optimizer([{"params": ours, "lr": 0.02}], choice)  # pyright: ignore
    other = reference(theirs, lr=0.02, **arguments)  # pyright: ignore
    for one, two in zip(trained(made, ours), trained(other, theirs), strict=True):
        assert torch.equal(one, two)


def test_adamw_is_pytorchs() -> None:
    choice = AdamWOptimizer(betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)
    arguments = {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.2, "fused": True}
    check_same(choice, torch.optim.AdamW, **arguments)


def test_sgd_is_pytorchs() -> None:
    choice = SgdOptimizer(momentum=0.8, nesterov=True, weight_decay=0.1)
    check_same(choice, torch.optim.SGD, momentum=0.8, nesterov=True, weight_decay=0.1)


def test_lion_is_the_librarys() -> None:
    from lion_pytorch import Lion

    choice = LionOptimizer(betas=(0.8, 0.7), weight_decay=0.1)
    check_same(choice, Lion, betas=(0.8, 0.7), weight_decay=0.1)


def test_came_is_the_librarys() -> None:
    from came_pytorch import CAME

    choice = CameOptimizer(betas=(0.8, 0.9, 0.99), clip_threshold=0.5, weight_decay=0.1)
    check_same(choice, CAME, betas=(0.8, 0.9, 0.99), clip_threshold=0.5, weight_decay=0.1)


def test_adafactor_uses_the_learning_rate_of_the_run_file() -> None:
    from transformers.optimization import Adafactor

    choice = AdafactorOptimizer(decay_rate=-0.5, clip_threshold=0.5, weight_decay=0.1)
    arguments = {"decay_rate": -0.5, "clip_threshold": 0.5, "weight_decay": 0.1}
    check_same(choice, Adafactor, scale_parameter=False, relative_step=False, **arguments)


def test_prodigy_is_the_librarys() -> None:
    from prodigyopt import Prodigy

    choice = ProdigyOptimizer(
        betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, d0=1e-3, d_coef=0.5, safeguard_warmup=False
    )
    arguments = {"eps": 1e-6, "weight_decay": 0.1, "d0": 1e-3, "d_coef": 0.5}
    check_same(choice, Prodigy, betas=(0.8, 0.9), use_bias_correction=True, **arguments)


def test_prodigy_plus_is_the_librarys() -> None:
    from prodigyplus import ProdigyPlusScheduleFree

    choice = ProdigyPlusOptimizer(
        betas=(0.8, 0.9), weight_decay=0.1, d0=1e-3, d_coef=0.5, factored=False
    )
    arguments = {"weight_decay": 0.1, "d0": 1e-3, "d_coef": 0.5, "factored": False}
    check_same(choice, ProdigyPlusScheduleFree, betas=(0.8, 0.9), split_groups=False, **arguments)


def test_schedule_free_adamw_is_the_librarys() -> None:
    from schedulefree import AdamWScheduleFree

    def started(*given: object, **named: object) -> torch.optim.Optimizer:
        optimizer = AdamWScheduleFree(*given, **named)  # pyright: ignore
        optimizer.train()
        return optimizer

    choice = AdamWScheduleFreeOptimizer(
        betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, warmup_steps=2
    )
    arguments = {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1, "warmup_steps": 2}
    check_same(choice, started, **arguments)


def test_adamw_8bit_is_the_librarys() -> None:
    from bitsandbytes.optim import AdamW8bit

    choice = AdamW8bitOptimizer(betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    check_same(choice, AdamW8bit, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)


@pytest.mark.parametrize("bits", ["8", "4", "fp8"])
def test_adamw_low_bit_is_the_librarys(bits: str) -> None:
    library = importlib.import_module("torchao.optim")
    kind = {"8": library.AdamW8bit, "4": library.AdamW4bit, "fp8": library.AdamWFp8}[bits]
    choice = AdamWLowBitOptimizer(bits=bits, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)  # pyright: ignore
    torch.compiler.set_stance("force_eager")  # the same function, without half a minute of g++
    try:
        check_same(choice, kind, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    finally:
        torch.compiler.set_stance("default")


@pytest.mark.parametrize(
    ("bits", "kind"), [("8", "OptimState8bit"), ("4", "OptimState4bit"), ("fp8", "OptimStateFp8")]
)
def test_low_bit_states_have_the_requested_bits(bits: str, kind: str) -> None:
    weight = nn.Parameter(torch.zeros(64, 64))  # smaller ones stay in float32
    choice = AdamWLowBitOptimizer(bits=bits)  # pyright: ignore
    made = build_optimizer([{"params": [weight], "lr": 0.02}], choice)
    torch.compiler.set_stance("force_eager")
    try:
        trained(made, [weight])
    finally:
        torch.compiler.set_stance("default")
    assert type(made.state[weight]["exp_avg"]).__name__ == kind


@pytest.mark.parametrize("value", [False, True])
def test_switches_reach_the_library(value: bool) -> None:
    """Those that make no difference in a few steps of small weights."""
    groups = [{"params": some_weights(), "lr": 1.0}]
    prodigy = ProdigyOptimizer(safeguard_warmup=value, bias_correction=value)
    group = build_optimizer(groups, prodigy).param_groups[0]
    assert group["safeguard_warmup"] is group["use_bias_correction"] is value
    adafactor = build_optimizer(groups, AdafactorOptimizer(scale_parameter=value))
    assert adafactor.param_groups[0]["scale_parameter"] is value
    assert vars(build_optimizer(groups, AdamW8bitOptimizer(paged=value)))["is_paged"] is value


def test_muon_updates_matrices_and_adamw_all_other_weights() -> None:
    ours, theirs = some_weights(), some_weights()
    choice = MuonOptimizer(momentum=0.8, nesterov=False, ns_steps=3, weight_decay=0.1)
    made = build_optimizer([{"params": ours, "lr": 0.02}], choice)
    muon = torch.optim.Muon(
        theirs[:1],
        lr=0.02,
        momentum=0.8,
        nesterov=False,
        ns_steps=3,
        weight_decay=0.1,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(theirs[1:], lr=0.02, weight_decay=0.1, fused=True)
    trained(muon, theirs[:1])
    for step in range(3):  # the same gradients as in trained, by the index among all weights
        for index, weight in enumerate(theirs[1:], start=1):
            generator = torch.Generator().manual_seed(10 * step + index)
            weight.grad = torch.randn(weight.shape, generator=generator)
        adamw.step()
    for one, two in zip(trained(made, ours), theirs, strict=True):
        assert torch.equal(one, two.detach())
    assert build_optimizer([{"params": ours, "lr": 1}], MuonOptimizer(match_adamw=False))
    assert len(made.state) == 3


def test_muon_leaves_embeddings_to_adamw() -> None:
    weights = some_weights()[:1]
    groups = [{"params": weights, "lr": 0.02, "embeddings": True}]
    assert [g["muon"] for g in build_optimizer(groups, MuonOptimizer()).param_groups] == [False]


def test_the_combination_with_muon_is_one_optimizer_to_pytorch() -> None:
    """Its state passes through PyTorch's state_dict, and rates set in its groups apply."""
    weights, copies = some_weights(), some_weights()
    made = build_optimizer([{"params": weights, "lr": 0.02}], MuonOptimizer())
    trained(made, weights)
    other = build_optimizer([{"params": copies, "lr": 0.5}], MuonOptimizer())
    other.load_state_dict(deepcopy(made.state_dict()))
    with torch.no_grad():
        for weight, copy in zip(weights, copies, strict=True):
            copy.copy_(weight)
    for group in [*made.param_groups, *other.param_groups]:
        group["lr"] = 0.01
    for one, two in zip(trained(made, weights), trained(other, copies), strict=True):
        assert torch.equal(one, two)


def test_muon_without_match_adamw_has_its_original_scale() -> None:
    ours, theirs = some_weights(), some_weights()
    made = build_optimizer([{"params": ours[:1], "lr": 0.02}], MuonOptimizer(match_adamw=False))
    other = torch.optim.Muon(theirs[:1], lr=0.02, weight_decay=0.01)
    assert torch.equal(trained(made, ours[:1])[0], trained(other, theirs[:1])[0])


def test_adam_mini_keeps_one_second_moment_per_row() -> None:
    """Against its definition: Adam with the mean of the squares in each row."""
    weights = some_weights()
    choice = AdamMiniOptimizer(betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    made = build_optimizer([{"params": weights, "lr": 0.02}], choice)
    expected = [w.detach().double().clone() for w in weights]
    means = [torch.zeros_like(w) for w in expected]
    squares = [torch.zeros_like(w) for w in expected]
    for step in range(3):
        for index, weight in enumerate(expected):
            generator = torch.Generator().manual_seed(10 * step + index)
            gradient = torch.randn(weight.shape, generator=generator).double()
            square = gradient.square()
            if weight.ndim == 2:
                square = square.mean(dim=1, keepdim=True).expand_as(gradient)
            means[index].mul_(0.8).add_(gradient, alpha=0.2)
            squares[index].mul_(0.9).add_(square, alpha=0.1)
            root = (squares[index] / (1 - 0.9 ** (step + 1))).sqrt() + 1e-6
            weight.mul_(1 - 0.02 * 0.1).sub_(0.02 * means[index] / (1 - 0.8 ** (step + 1)) / root)
    for one, two in zip(trained(made, weights), expected, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=1e-6)
    assert made.state[weights[0]]["vmean"].numel() == 8


def test_groups_keep_their_own_learning_rates() -> None:
    for choice in (AdamWOptimizer(), MuonOptimizer(), AdamMiniOptimizer(), LionOptimizer()):
        weights = some_weights()
        groups = [{"params": weights[:1], "lr": 0.1}, {"params": weights[1:], "lr": 0.0}]
        before = [w.detach().clone() for w in weights]
        after = trained(build_optimizer(groups, choice), weights)
        assert not torch.equal(after[0], before[0])
        assert all(torch.equal(a, b) for a, b in zip(after[1:], before[1:], strict=True))


def test_prodigy_refuses_several_learning_rates() -> None:
    weights = some_weights()
    groups = [{"params": weights[:1], "lr": 1.0}, {"params": weights[1:], "lr": 16.0}]
    with pytest.raises(ConfigError, match=r"one learning rate for all weights.* has 1, 16; "):
        build_optimizer(groups, ProdigyOptimizer())


@pytest.mark.parametrize(
    ("choice", "module", "package"),
    [
        (ProdigyOptimizer(), "prodigyopt", "prodigyopt"),
        (ProdigyPlusOptimizer(), "prodigyplus", "prodigy-plus-schedule-free"),
        (AdamWScheduleFreeOptimizer(), "schedulefree", "schedulefree"),
        (AdamW8bitOptimizer(), "bitsandbytes.optim", "bitsandbytes"),
        (LionOptimizer(), "lion_pytorch", "lion-pytorch"),
        (CameOptimizer(), "came_pytorch", "came-pytorch"),
        (AdamMiniOptimizer(), "adam_mini", "adam-mini"),
        (AdamWLowBitOptimizer(), "torchao.optim", "torchao"),
    ],
)
def test_a_missing_package_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, choice: object, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # what Python sets for "not there"
    with pytest.raises(ConfigError) as caught:
        build_optimizer([{"params": some_weights(), "lr": 1.0}], choice)  # pyright: ignore
    name = choice.name  # pyright: ignore
    assert f"optimizer.name: {name!r} needs the package {package} (" in str(caught.value)
    assert f"install it with `pip install {package}`" in str(caught.value)


def test_offload_needs_a_gpu() -> None:
    with pytest.raises(
        ConfigError, match="calls cuda or xpu, and here it finds no GPU; choose adamw"
    ):
        build_optimizer([{"params": some_weights(), "lr": 1.0}], AdamWOffloadOptimizer())


def test_a_custom_class_is_used_with_its_arguments() -> None:
    choice = CustomOptimizer(class_path="torch.optim.NAdam", arguments={"betas": (0.8, 0.9)})
    check_same(choice, torch.optim.NAdam, betas=(0.8, 0.9))


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("torch.optim.nothing.AdamW", {}, r"'torch.optim.nothing' can't be imported"),
        ("torch.optim.AdamX", {}, r"'AdamX' is not an optimizer of torch.optim; it has ASGD, "),
        ("torch.optim.lr_scheduler.LRScheduler", {}, "is not an optimizer of torch.optim.lr_sch"),
        ("torch.optim.LBFGS", {}, r"torch.optim.LBFGS computes the loss itself"),
        ("torchao.optim.CPUOffloadOptimizer", {}, "use optimizer.name: adamw_cpu_offload"),
        ("torch.optim.NAdam", {"betas": (2.0, 0.9)}, r"does not accept them \(Invalid beta"),
        (
            "torch.optim.NAdam",
            {"beta": 2.0},
            r"not accept them .*'beta'.*signature is \(params",
        ),
        ("torch.optim.NAdam", {"params": 2.0}, r"does not accept them .*'params'"),
    ],
)
def test_a_wrong_custom_class_or_argument_is_named(
    path: str, arguments: dict[str, object], message: str
) -> None:
    choice = CustomOptimizer(class_path=path, arguments=arguments)  # pyright: ignore
    with pytest.raises(ConfigError, match=message):
        build_optimizer([{"params": some_weights(), "lr": 0.1}], choice)


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        (
            "os.system.Thing",
            {},
            r"class_path\s.*must be in one of torch\.optim, .*os\.system\.Thing",
        ),
        ("torch.optimizers.AdamW", {}, r"class_path\s.*must be in one of torch\.optim, "),
        (
            "torch.optim.NAdam",
            {"lr": 2.0},
            r"arguments\s.*must not contain lr, .*use optimizer\.lr",
        ),
    ],
)
def test_a_class_of_another_package_or_a_second_learning_rate_is_refused_by_the_section_itself(
    path: str, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        CustomOptimizer(class_path=path, arguments=arguments)  # pyright: ignore


def test_schedule_free_joint_only_and_inexact_optimizers_are_recognized() -> None:
    assert is_schedule_free(AdamWScheduleFreeOptimizer())
    assert is_schedule_free(ProdigyPlusOptimizer())
    assert is_schedule_free(CustomOptimizer(class_path="schedulefree.RAdamScheduleFree"))
    assert not is_schedule_free(AdamWOptimizer())
    assert not is_schedule_free(CustomOptimizer(class_path="torch.optim.NAdam"))
    assert "learning rate from all weights" in (joint_only_reason(ProdigyOptimizer()) or "")
    assert joint_only_reason(CustomOptimizer(class_path="prodigyopt.Prodigy"))
    for family in ("Prodigy", "DAdaptAdam"):
        path = f"pytorch_optimizer.{family}"
        assert joint_only_reason(CustomOptimizer(class_path=path)), path
    assert joint_only_reason(CustomOptimizer(class_path="pytorch_optimizer.StableAdamW")) is None
    assert joint_only_reason(AdamWOffloadOptimizer())
    assert joint_only_reason(AdamWScheduleFreeOptimizer()) is None
    assert inexact_resume_reason(AdamWOptimizer()) is None
    assert "torch.optim.NAdam" in (
        inexact_resume_reason(CustomOptimizer(class_path="torch.optim.NAdam")) or ""
    )


def test_building_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for choice in (ProdigyOptimizer(weight_decay=0.1), ProdigyPlusOptimizer()):
        build_optimizer([{"params": some_weights(), "lr": 1.0}], choice)
    assert capsys.readouterr().out == ""


def test_the_documentation_lists_all_optimizers() -> None:
    page = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text(encoding="utf-8")
    for section in get_args(get_args(Optimizer)[0]):
        assert f"| `{section.model_fields['name'].default}` |" in page
