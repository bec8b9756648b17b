"""Optimizers by name: the run file's `optimizer` section -> an optimizer of its library.

Packages that not every run needs are imported when they are chosen, and a missing one says how to
install it. What they print while they are built is left out.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, TypeAlias

import torch

from onewan.config.optimizer import (
    OPTIMIZER_PACKAGES,
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
from onewan.errors import ConfigError

Groups: TypeAlias = list[dict[str, Any]]
"""Parameter groups as torch takes them: `params`, `lr` and whatever else is to stay in a group."""


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on matrices and AdamW on everything else, as one optimizer.

    Each group may have both; it is divided in two, which keep its rate and other entries. A group
    with a true `embeddings` is AdamW's: Muon is for the matrices of layers
    (kellerjordan.github.io/posts/muon).
    """

    def __init__(self, groups: Groups, choice: MuonOptimizer) -> None:
        parts: Groups = []
        for group in groups:
            rest = {key: value for key, value in group.items() if key != "params"}
            layers = not group.get("embeddings", False)
            for muon in (True, False):
                chosen = [p for p in group["params"] if (layers and p.ndim == 2) is muon]
                if chosen:
                    parts.append({**rest, "params": chosen, "muon": muon})
        super().__init__(parts, {})
        matrices = [g for g in self.param_groups if g["muon"]]
        others = [g for g in self.param_groups if not g["muon"]]
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            muon = torch.optim.Muon(
                matrices,
                momentum=choice.momentum,
                nesterov=choice.nesterov,
                ns_steps=choice.ns_steps,
                weight_decay=choice.weight_decay,
                adjust_lr_fn="match_rms_adamw" if choice.match_adamw else "original",
            )
            self._parts.append(muon)
        if others:
            self._parts.append(
                torch.optim.AdamW(others, weight_decay=choice.weight_decay, fused=True)
            )
        # One set of groups and states: what is set here is what the two work with.
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        for part in self._parts:
            part.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by torch's `load_state_dict`, which puts new groups and states in place."""
        super().__setstate__(state)
        for part in self._parts:
            is_muon = isinstance(part, torch.optim.Muon)
            part.param_groups = [g for g in self.param_groups if g["muon"] is is_muon]
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        del closure
        for part in self._parts:
            part.step()


def build_optimizer(groups: Groups, choice: Optimizer) -> torch.optim.Optimizer:
    """The optimizer that the run file's `optimizer` section names, over `groups`.

    A group has `params` and its absolute `lr`; further entries stay in it untouched. One of them,
    `embeddings`, says whether its matrices are embeddings and not a layer's. ConfigError if a
    package is missing, or if the optimizer can't be used with these groups or on this machine.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer: Any = _BUILDERS[choice.name]([dict(group) for group in groups], choice)
        if averages_itself(choice):
            optimizer.train()  # some start in neither mode
    return optimizer


def averages_itself(choice: Optimizer) -> bool:
    """Whether the weights to use are another than those to train: schedule-free optimizers."""
    if isinstance(choice, CustomOptimizer):
        # The sign of a schedule-free optimizer, in all packages that have one.
        chosen = _custom_class(choice)
        return hasattr(chosen, "train") and hasattr(chosen, "eval")
    return choice.name in {"adamw_schedule_free", "prodigy_plus_schedule_free"}


def needs_all_weights(choice: Optimizer) -> str | None:
    """Why the optimizer can't take one weight for itself, or None if it can.

    It has to for a step within the backward pass and for rounding that is not its own.
    """
    own = choice.class_path if isinstance(choice, CustomOptimizer) else choice.name
    if any(family in own.lower() for family in ("prodigy", "dadapt")):
        return "it finds one learning rate from all weights together"
    if choice.name == "adamw_cpu_offload":
        return "it takes gradients to the CPU in its own way"
    return None


def resumes_exactly(choice: Optimizer) -> str | None:
    """None if a resumed run goes on as if it had not been cut, else the reason why it may not."""
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
    # fused: one kernel for all tensors, on CPU, CUDA and ROCm
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
        relative_step=False,  # the learning rate is the run file's
    )


def _prodigy(groups: Groups, choice: ProdigyOptimizer) -> torch.optim.Optimizer:
    library = _package(choice.name, "prodigyopt", "prodigyopt")
    rates = sorted({group["lr"] for group in groups})
    if len(rates) > 1:
        given = ", ".join(f"{rate:g}" for rate in rates)
        message = (
            f"optimizer.name: 'prodigy' takes one learning rate for all weights, and this run "
            f"gives {given}; leave out the other rates (method.lora_plus_ratio, embeddings.*.lr), "
            "or take prodigy_plus_schedule_free"
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
        split_groups=False,  # groups differ in their rates, not in what they are to learn
        stochastic_rounding=False,  # its draws come from the global generator
    )


def _lion(groups: Groups, choice: LionOptimizer) -> torch.optim.Optimizer:
    library = _package(choice.name, "lion_pytorch", "lion-pytorch")
    return library.Lion(groups, betas=choice.betas, weight_decay=choice.weight_decay)


def _muon(groups: Groups, choice: MuonOptimizer) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        message = (
            f"optimizer.name: 'muon' needs PyTorch 2.9 or later, and this is {torch.__version__}; "
            "update PyTorch or take adamw"
        )
        raise ConfigError("run file", [message])
    return MuonWithAdamW(groups, choice)


def _came(groups: Groups, choice: CameOptimizer) -> torch.optim.Optimizer:
    library = _package(choice.name, "came_pytorch", "came-pytorch")
    return library.CAME(
        groups,
        lr=choice.lr,  # each group has its own; the library checks this one
        betas=choice.betas,
        clip_threshold=choice.clip_threshold,
        weight_decay=choice.weight_decay,
    )


def _adam_mini(groups: Groups, choice: AdamWOptimizer) -> torch.optim.Optimizer:
    """One running square for each row of a matrix; plain Adam for everything else.

    The library goes by names, made for other models than this one, and divides query and key by
    heads, which low-rank factors do not have. These names choose its rule for rows ("mlp") or for
    all of the rest ("bias").
    """
    library = _package(choice.name, "adam_mini", "adam-mini")
    named = [
        (f"{place}.{'mlp' if parameter.ndim == 2 else 'bias'}", parameter, group)
        for group in groups
        for place, parameter in enumerate(group["params"])
    ]
    optimizer = library.Adam_mini(
        [(name, parameter) for name, parameter, _ in named],
        betas=choice.betas,
        eps=choice.eps,
        weight_decay=choice.weight_decay,
        verbose=False,
    )
    for made, (_, _, group) in zip(optimizer.param_groups, named, strict=True):
        made.update({key: value for key, value in group.items() if key != "params"})
        made["weight_decay"] = choice.weight_decay  # the library leaves "bias" out
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
    kinds = {"8": "AdamW8bit", "4": "AdamW4bit", "fp8": "AdamWFp8"}
    return vars(library)[kinds[choice.bits]](groups, **_adam_arguments(choice))


def _adamw_cpu_offload(groups: Groups, choice: AdamWOptimizer) -> torch.optim.Optimizer:
    library = _package(choice.name, "torchao.optim", "torchao")
    if not torch.cuda.is_available():
        message = (
            "optimizer.name: 'adamw_cpu_offload' moves gradients from a GPU to the CPU, and "
            "PyTorch finds no GPU here; take adamw"
        )
        raise ConfigError("run file", [message])
    return library.CPUOffloadOptimizer(groups, torch.optim.AdamW, **_adam_arguments(choice))


def _custom_class(choice: CustomOptimizer) -> type[torch.optim.Optimizer]:
    """The class at `class_path`; ConfigError if it is not an optimizer of a package on the list."""
    path = choice.class_path

    def wrong(what: str) -> ConfigError:
        return ConfigError("run file", [f"optimizer.class_path: {what}"])

    if not any(path.startswith(f"{package}.") for package in OPTIMIZER_PACKAGES):
        known = ", ".join(OPTIMIZER_PACKAGES)
        raise wrong(f"{path!r} is in none of the packages that may be used; take one of {known}")
    module, _, name = path.rpartition(".")
    if name == "CPUOffloadOptimizer":
        raise wrong(f"{path} is another optimizer's shell; take optimizer.name: adamw_cpu_offload")
    try:
        found = vars(importlib.import_module(module))
    except ImportError as error:
        package = path.split(".")[0].replace("_", "-")
        raise wrong(
            f"{module!r} can't be imported ({error}); correct it, or install its package "
            f"(`pip install {package}`)"
        ) from error
    if not inspect.isclass(found.get(name)) or not issubclass(found[name], torch.optim.Optimizer):
        near = sorted(
            key
            for key, value in found.items()
            if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
        )
        raise wrong(
            f"{name!r} is not an optimizer of {module}; it has "
            f"{', '.join(near[:12]) or 'none'}{' and others' if len(near) > 12 else ''}"
        )
    chosen: type[torch.optim.Optimizer] = found[name]
    closure = inspect.signature(chosen.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise wrong(f"{path} computes the loss itself in its step (a closure); take another")
    return chosen


def _custom(groups: Groups, choice: CustomOptimizer) -> torch.optim.Optimizer:
    chosen = _custom_class(choice)
    own = [name for name in ("params", "lr") if name in choice.arguments]
    if own:
        message = f"optimizer.arguments.{own[0]}: can't be given here; the rate is optimizer.lr"
        raise ConfigError("run file", [message])
    try:
        return chosen(groups, lr=choice.lr, **choice.arguments)  # pyright: ignore[reportCallIssue]
    except (TypeError, ValueError, AssertionError) as error:
        message = (
            f"optimizer.arguments: {choice.class_path} does not take them ({error}); "
            f"its signature is {inspect.signature(chosen)}"
        )
        raise ConfigError("run file", [message]) from error


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
    "custom": _custom,
}
