"""Full fine-tuning: makes weights of a transformer trainable, in float32 or as they are stored.

Trainable weights may be float32 beside frozen ones in bfloat16: under `compute_context` autocast
casts the operands of matrix products, and norms and modulation tables compute in float32, as the
official code does with its float32 weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from onewan.errors import CheckpointError, ConfigError
from onewan.model.quantized_linear import QuantizedLinear

Precision = Literal["stochastic", "kahan", "float32"]


class _Float32RMSNorm(nn.RMSNorm):
    """RMSNorm with a float32 weight on bfloat16 inputs. The values equal those of PyTorch's own,
    whose fused kernel needs one dtype for both and warns otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight, self.eps)


def train_weights(
    transformer: WanTransformer3DModel, names: Sequence[str], precision: Precision
) -> dict[str, nn.Parameter]:
    """Make the weights `names` of `transformer` trainable, and no others; returned in that order.

    "float32" replaces them in place by float32 copies. The other precisions do not change
    the stored dtype: the optimizer step rounds its results so that small updates survive.
    ConfigError for weights that are packed.
    """
    quantized = [n for n in names if _is_quantized(transformer, n)]
    if quantized:
        some = ", ".join(quantized[:3])
        raise ConfigError(
            "run file",
            [
                f"memory.weights: {len(quantized)} of the weights to train are packed, such as "
                f"{some}; set it to bf16, or leave them out of method.modules"
            ],
        )
    transformer.requires_grad_(False)
    parameters: dict[str, nn.Parameter] = {}
    for name in names:
        owner, _, which = name.rpartition(".")
        module = transformer.get_submodule(owner)
        parameter = module.get_parameter(which)
        if precision == "float32" and parameter.dtype != torch.float32:
            parameter = nn.Parameter(parameter.detach().float())
            module.register_parameter(which, parameter)
            # Changing the class keeps the module's hooks, name and identity.
            if isinstance(module, nn.RMSNorm):
                module.__class__ = _Float32RMSNorm
        parameter.requires_grad_(True)
        parameters[name] = parameter
    return parameters


def weights_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies on the CPU, in the precision of each."""
    return {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}


@torch.no_grad()
def load_weights(
    parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor], source: str
) -> None:
    """Overwrite `parameters` with the values of `weights`, bit-exact. `source` names the file for
    the CheckpointError that missing, unexpected or misshapen weights or other dtypes raise."""
    wrong = sorted(set(parameters) ^ set(weights))
    # The dtype too: `copy_` would round float32 values to a bfloat16 weight silently.
    wrong += [
        name
        for name, parameter in parameters.items()
        if name in weights
        and (parameter.shape, parameter.dtype) != (weights[name].shape, weights[name].dtype)
    ]
    if wrong:
        raise CheckpointError(
            f"{source}: does not fit the weights that this run trains ({len(wrong)} differ, such "
            f"as {', '.join(wrong[:3])}); were modules, layers or precision changed?"
        )
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def _is_quantized(transformer: WanTransformer3DModel, name: str) -> bool:
    owner, _, which = name.rpartition(".")
    return which == "weight" and isinstance(transformer.get_submodule(owner), QuantizedLinear)
