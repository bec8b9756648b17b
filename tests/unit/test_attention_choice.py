"""Which attention backend a run gets, and that diffusers' transformer computes with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from onewan.model.attention_backends import AttentionBackend, attention_backend
from onewan.model.attention_choice import (
    AttentionShape,
    fastest_backend,
    measure,
    why_unusable,
)

CPU = torch.device("cpu")
SHAPE = AttentionShape(batch=2, tokens=65, heads=3, head_dim=32)


class Recorded:
    """A real backend that counts its calls."""

    name = "recorded"

    def __init__(self, inner: AttentionBackend) -> None:
        self.inner = inner
        self.forwards: list[tuple[int, ...]] = []
        self.backwards = 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        self.forwards.append(tuple(q.shape))
        return self.inner.forward(q, k, v)

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        saved: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.backwards += 1
        return self.corrected(*self.inner.backward(grad, q, k, v, out, saved))

    def corrected(self, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = grads
        return q, k, v


class WithoutGradient(Recorded):
    """As SageAttention is: its backward pass is missing."""

    def corrected(self, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError("no backward pass")


class Wrong(Recorded):
    """The gradient of the keys is 3 percent too large."""

    def corrected(self, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = grads
        return q, 1.03 * k, v


def test_a_measurement_leaves_out_what_fails_and_what_computes_something_else() -> None:
    flash, math = attention_backend("flash"), attention_backend("math")
    backends: dict[str, AttentionBackend] = {
        "flash": flash,
        "without": WithoutGradient(flash),
        "wrong": Wrong(flash),
        "math": math,
    }
    milliseconds, failed = measure(backends, CPU, torch.float32, SHAPE)
    assert set(milliseconds) == {"flash", "math"}
    assert list(milliseconds.values()) == sorted(milliseconds.values())
    assert all(0 < ms < 1000 for ms in milliseconds.values())
    assert failed["without"] == "no backward pass"
    assert failed["wrong"].startswith("differs from flash by 0.03")


@pytest.mark.parametrize(
    ("batch", "tokens", "heads"),
    [(1, 1_280, 40), (1, 14_040, 28), (1, 32_760, 5), (21, 1_560, 40), (1, 140_000, 1)],
)
def test_large_shapes_are_measured_with_as_many_heads_as_take_a_tenth_of_a_second(
    batch: int, tokens: int, heads: int
) -> None:
    shape = AttentionShape(batch=batch, tokens=tokens, heads=40, head_dim=128)
    assert shape.measured_heads == heads


def test_a_measurement_runs_the_given_tokens_and_channels() -> None:
    recorded = Recorded(attention_backend("flash"))
    measure({"flash": recorded}, CPU, torch.bfloat16, SHAPE)
    assert set(recorded.forwards) == {(2, 65, 3, 32)}
    assert recorded.backwards == len(recorded.forwards) >= 4


def test_the_cpu_keeps_pytorchs_choice_and_tries_nothing_else() -> None:
    measured = fastest_backend(CPU, torch.bfloat16, SHAPE)
    assert measured.backend.name == "flash"
    assert measured.milliseconds == {}
    assert measured.unusable == {}  # what is made for other devices is not tried
    assert why_unusable(attention_backend("math"), CPU, torch.float32, 32) is None


def test_an_accelerator_with_one_backend_keeps_it(sim: torch.device) -> None:
    measured = fastest_backend(sim, torch.float32, SHAPE)
    assert measured.backend.name in ("overrideable", "flash", "efficient")
    assert why_unusable(measured.backend, sim, torch.float32, 32) is None
    # Packages that are not installed are nobody's concern.
    assert measured.unusable["overrideable"] == "PyTorch has no such kernel for sim"
