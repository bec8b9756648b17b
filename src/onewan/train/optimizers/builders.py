"""Optimizers by name: the run file's `optimizer` section -> an optimizer of its library.

Optional packages are imported when their optimizer is chosen; a missing one is a ConfigError that
says how to install it. Output that the packages print while they build an optimizer is discarded.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, TypeAlias

import torch

from onewan.config.optimizer import (
    AVERAGING_OPTIMIZERS,
    AdafactorOptimizer,
    AdamW8bitOptimizer,
    AdamWLowBitOptimizer,
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
)
from onewan.devices import accelerator
from onewan.errors import ConfigError
from onewan.train.optimizers.custom import build_custom, custom_class
from onewan.train.optimizers.muon import MuonWithAdamW

_TORCHAO_OFFLOADS_FROM = ("cuda", "xpu")
"""Types of devices that torchao's `CPUOffloadOptimizer` supports."""

Groups: TypeAlias = list[dict[str, Any]]
"""Parameter groups for torch: `params`, `lr`, and other entries, which remain in them."""


def build_optimizer(groups: Groups, choice: Optimizer) -> torch.optim.Optimizer:
    """The optimizer that the run file's `optimizer` section names, over `groups`.

    A group has `params` and its own `lr`; further entries remain in it unchanged. The entry
    `embeddings` marks a group whose matrices are embedding vectors, not weights of layers.

    ConfigError if a package is missing, or if the optimizer does not support these groups or this
    machine.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer: Any = _BUILDERS[choice.name]([dict(group) for group in groups], choice)
        if is_schedule_free(choice):
            optimizer.train()  # some, such as ProdigyPlus, refuse to step before a mode is set
    return optimizer


def is_schedule_free(choice: Optimizer) -> bool:
    """Whether the weights to validate and export are an average, other than those trained."""
    if isinstance(choice, CustomOptimizer):
        # The two methods identify schedule-free optimizers in all packages that have one.
        chosen = custom_class(choice)
        return hasattr(chosen, "train") and hasattr(chosen, "eval")
    return isinstance(choice, AVERAGING_OPTIMIZERS)


def inexact_resume_reason(choice: Optimizer) -> str | None:
    """Why a resumed run may differ from an uninterrupted one; None if it is bit-exact."""
    if isinstance(choice, CustomOptimizer):
        return (
            f"{choice.class_path} is not one of onewan's own optimizers, and what it keeps outside "
            "its state and parameter groups is not saved"
        )
    return None


def _package(option: str, module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = (
            f"optimizer.name: {option!r} needs the package {package} ({error}); "
            f"install it with `pip install {package}`"
        )
        raise ConfigError("run file", [message]) from error


def _adam_arguments(choice: AdamWOptimizer) -> dict[str, Any]:
    return {"betas": choice.betas, "eps": choice.eps, "weight_decay": choice.weight_decay}


def _adamw(groups: Groups, choice: AdamWOptimizer) -> torch.optim.Optimizer:
    # fused: one kernel for all tensors, faster on the CPU and on accelerators alike
    return torch.optim.AdamW(groups, **_adam_arguments(choice), fused=True)


def _adamw_8bit(groups: Groups, choice: AdamW8bitOptimizer) -> torch.optim.Optimizer:
    library = _package(choice.name, "bitsandbytes.optim", "bitsandbytes")
    return library.AdamW8bit(groups, **_adam_arguments(choice), is_paged=choice.paged)


def _adamw_schedule_free(
    groups: Groups, choice: AdamWScheduleFreeOptimizer
) -> torch.optim.Optimizer:
    library = _package(choice.name, "schedulefree", "schedulefree")
    return library.AdamWScheduleFree(
        groups, **_adam_arguments(choice), warmup_steps=choice.warmup_steps
    )


def _adafactor(groups: Groups, choice: AdafactorOptimizer) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(
        groups,
        clip_threshold=choice.clip_threshold,
        decay_rate=choice.decay_rate,
        weight_decay=choice.weight_decay,
        scale_parameter=choice.scale_parameter,
        relative_step=False,  # it would replace the run file's learning rate
    )


def _prodigy(groups: Groups, choice: ProdigyOptimizer) -> torch.optim.Optimizer:
    library = _package(choice.name, "prodigyopt", "prodigyopt")
    # The library estimates one rate for all groups, and raises in its first step if theirs differ.
    rates = sorted({group["lr"] for group in groups})
    if len(rates) > 1:
        given = ", ".join(f"{rate:g}" for rate in rates)
        message = (
            f"optimizer.name: 'prodigy' supports one learning rate for all weights, and this run "
            f"has {given}; remove the other rates (method.lora_plus_ratio, embeddings.*.lr), or "
            "choose prodigy_plus_schedule_free"
        )
        raise ConfigError("run file", [message])
    return library.Prodigy(
        groups,
        betas=choice.betas,
        eps=choice.eps,
        weight_decay=choice.weight_decay,
        d0=choice.d0,
        d_coef=choice.d_coef,
        safeguard_warmup=choice.safeguard_warmup,
        use_bias_correction=choice.bias_correction,
    )


def _prodigy_plus(groups: Groups, choice: ProdigyPlusOptimizer) -> torch.optim.Optimizer:
    library = _package(choice.name, "prodigyplus", "prodigy-plus-schedule-free")
    return library.ProdigyPlusScheduleFree(
        groups,
        betas=choice.betas,
        weight_decay=choice.weight_decay,
        d0=choice.d0,
        d_coef=choice.d_coef,
        factored=choice.factored,
        # One estimate for all groups: they differ in their learning rates on purpose (LoRA+), and
        # an estimate for each would compensate for that.
        split_groups=False,
        # Its draws come from torch's global generator, so a resumed run would not be bit-exact.
        stochastic_rounding=False,
    )


def _lion(groups: Groups, choice: LionOptimizer) -> torch.optim.Optimizer:
    library = _package(choice.name, "lion_pytorch", "lion-pytorch")
    return library.Lion(groups, betas=choice.betas, weight_decay=choice.weight_decay)


def _muon(groups: Groups, choice: MuonOptimizer) -> torch.optim.Optimizer:
    return MuonWithAdamW(groups, choice)


def _came(groups: Groups, choice: CameOptimizer) -> torch.optim.Optimizer:
    library = _package(choice.name, "came_pytorch", "came-pytorch")
    return library.CAME(
        groups,
        lr=choice.lr,  # unused, since each group has its own; but the library requires it
        betas=choice.betas,
        clip_threshold=choice.clip_threshold,
        weight_decay=choice.weight_decay,
    )


def _adam_mini(groups: Groups, choice: AdamWOptimizer) -> torch.optim.Optimizer:
    """One second moment for each row of a matrix, and plain Adam for everything else.

    The library chooses its partition by parameter names of language models, and divides query and
    key weights by heads, which low-rank factors do not have. The names given here select its rule
    for one value per row ("mlp") or for one value per element ("bias").
    """
    library = _package(choice.name, "adam_mini", "adam-mini")
    named = [
        (f"{index}.{'mlp' if parameter.ndim == 2 else 'bias'}", parameter, group)
        for group in groups
        for index, parameter in enumerate(group["params"])
    ]
    optimizer = library.Adam_mini(
        [(name, parameter) for name, parameter, _ in named],
        betas=choice.betas,
        eps=choice.eps,
        weight_decay=choice.weight_decay,
        verbose=False,
    )
    # The library makes one group for each parameter, without the entries of the given groups.
    for library_group, (_, _, group) in zip(optimizer.param_groups, named, strict=True):
        library_group.update({key: value for key, value in group.items() if key != "params"})
        library_group["weight_decay"] = choice.weight_decay  # the library sets 0 for "bias"
    return optimizer


def _sgd(groups: Groups, choice: SgdOptimizer) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        groups,
        momentum=choice.momentum,
        nesterov=choice.nesterov,
        weight_decay=choice.weight_decay,
    )


def _adamw_low_bit(groups: Groups, choice: AdamWLowBitOptimizer) -> torch.optim.Optimizer:
    library = _package(choice.name, "torchao.optim", "torchao")
    classes = {"8": "AdamW8bit", "4": "AdamW4bit", "fp8": "AdamWFp8"}
    return vars(library)[classes[choice.bits]](groups, **_adam_arguments(choice))


def _adamw_cpu_offload(groups: Groups, choice: AdamWOptimizer) -> torch.optim.Optimizer:
    library = _package(choice.name, "torchao.optim", "torchao")
    found = accelerator()
    if found is None or found.type not in _TORCHAO_OFFLOADS_FROM:
        message = (
            "optimizer.name: 'adamw_cpu_offload' moves gradients to the CPU from a GPU that "
            f"PyTorch calls {' or '.join(_TORCHAO_OFFLOADS_FROM)}, and here it finds "
            f"{'no GPU' if found is None else found.type}; choose adamw"
        )
        raise ConfigError("run file", [message])
    return library.CPUOffloadOptimizer(groups, torch.optim.AdamW, **_adam_arguments(choice))


_BUILDERS: Mapping[str, Callable[[Groups, Any], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "adamw_schedule_free": _adamw_schedule_free,
    "adafactor": _adafactor,
    "prodigy": _prodigy,
    "prodigy_plus_schedule_free": _prodigy_plus,
    "lion": _lion,
    "muon": _muon,
    "came": _came,
    "adam_mini": _adam_mini,
    "sgd": _sgd,
    "adamw_low_bit": _adamw_low_bit,
    "adamw_cpu_offload": _adamw_cpu_offload,
    "custom": build_custom,
}
