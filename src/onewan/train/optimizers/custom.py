"""`optimizer.name: custom`: an optimizer class of another package, found by its import path.

`CustomOptimizer` itself refuses import paths outside the allowed packages, so that a run file from
an untrusted source can't import other code; it can't be built with such a path.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch

from onewan.config.optimizer import CustomOptimizer
from onewan.errors import ConfigError


def build_custom(groups: list[dict[str, Any]], choice: CustomOptimizer) -> torch.optim.Optimizer:
    """The optimizer at `class_path` over `groups`; ConfigError if it does not accept them."""
    chosen = custom_class(choice)
    try:
        return chosen(groups, lr=choice.lr, **choice.arguments)  # pyright: ignore[reportCallIssue]
    except (TypeError, ValueError, AssertionError) as error:
        message = (
            f"optimizer.arguments: {choice.class_path} does not accept them ({error}); "
            f"its signature is {inspect.signature(chosen)}"
        )
        raise ConfigError("run file", [message]) from error


def custom_class(choice: CustomOptimizer) -> type[torch.optim.Optimizer]:
    """The class at `class_path`; ConfigError if it is not an optimizer that can be used here."""
    path = choice.class_path
    module, _, name = path.rpartition(".")
    # Its constructor needs an optimizer class, which a run file can't express.
    if name == "CPUOffloadOptimizer":
        raise _class_path_error(
            f"{path} wraps another optimizer; use optimizer.name: adamw_cpu_offload instead"
        )
    try:
        found = vars(importlib.import_module(module))
    except ImportError as error:
        package = path.split(".")[0].replace("_", "-")
        raise _class_path_error(
            f"{module!r} can't be imported ({error}); correct it, or install its package "
            f"(`pip install {package}`)"
        ) from error
    chosen = found.get(name)
    if not inspect.isclass(chosen) or not issubclass(chosen, torch.optim.Optimizer):
        others = sorted(
            key
            for key, value in found.items()
            if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
        )
        raise _class_path_error(
            f"{name!r} is not an optimizer of {module}; it has "
            f"{', '.join(others[:12]) or 'none'}{' and others' if len(others) > 12 else ''}"
        )
    # An optimizer that needs a closure (LBFGS) evaluates the loss several times within one step.
    closure = inspect.signature(chosen.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise _class_path_error(
            f"{path} computes the loss itself in its step (a closure); choose another"
        )
    return chosen


def _class_path_error(problem: str) -> ConfigError:
    return ConfigError("run file", [f"optimizer.class_path: {problem}"])
