"""The loss: its definition in float64, masks, the temporal split, and what does not count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from onewan.config.objective import LossSection
from onewan.train.objective import NoisedBatch, velocity_loss

MSE = LossSection()


def pair(
    frames: int = 3, loss_mask: Tensor | None = None, weight: tuple[float, float] = (1.0, 1.0)
) -> tuple[Tensor, NoisedBatch]:
    generator = torch.Generator().manual_seed(frames)
    prediction = torch.randn(2, 4, frames, 4, 6, generator=generator, requires_grad=True)
    target = torch.randn(2, 4, frames, 4, 6, generator=generator)
    return prediction, NoisedBatch(
        x=target,
        t=torch.zeros(2),
        t_host=(0.0, 0.0),
        target=target,
        clean_frames=None,
        weight=torch.tensor(weight),
        has_weights=weight != (1.0, 1.0),
        loss_mask=loss_mask,
    )


def masks(frames: int = 3) -> Tensor:
    """Fractions; 0 in one sample's first frame, and in one cell of all frames of the other."""
    loss_mask = torch.rand(2, 1, frames, 4, 6, generator=torch.Generator().manual_seed(1))
    loss_mask[0, :, 0] = 0
    loss_mask[1, :, :, 2, 3] = 0
    return loss_mask


def test_weight_one_is_bit_exact_with_the_plain_loss() -> None:
    prediction, sample = pair()
    plain = prediction.detach().clone().requires_grad_()
    loss, expected = velocity_loss(prediction, sample, MSE, 1.0), F.mse_loss(plain, sample.target)
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(prediction.grad, plain.grad)  # pyright: ignore
    half = prediction.detach().bfloat16()
    assert torch.equal(velocity_loss(half, sample, MSE), F.mse_loss(half.float(), sample.target))


def definition(
    prediction: Tensor, sample: NoisedBatch, rho, w: float, loss_mask: Tensor | None
) -> Tensor:
    """In float64, as `velocity_loss` describes it; for mse by the split of the squares."""
    losses = []
    for b in range(2):
        error = prediction[b] - sample.target[b].double()
        c = torch.ones_like(error[:1]) if loss_mask is None else loss_mask[b].double()
        whole = c.sum(dim=1, keepdim=True)
        mean = (c * error).sum(dim=1, keepdim=True) / whole.where(whole > 0, 1.0)
        deviation = error - mean
        if rho == "mse":
            loss = c * mean.square() + w * c * deviation.square()
        else:
            loss = c * rho(mean + w**0.5 * deviation)
        losses.append(float(sample.weight[b]) * loss.sum() / (4 * c.sum()))
    return torch.stack(losses).mean()


def huber(e: Tensor) -> Tensor:
    return torch.where(e.abs() <= 0.4, e.square(), 0.8 * e.abs() - 0.16)


def pseudo_huber(e: Tensor) -> Tensor:
    return 2 * 0.16 * ((1 + (e / 0.4).square()).sqrt() - 1)


@pytest.mark.parametrize(
    ("kind", "rho"), [("mse", "mse"), ("huber", huber), ("pseudo_huber", pseudo_huber)]
)
@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weight", [(1.0, 1.0), (0.5, 2.0)])
def test_loss_and_gradient_follow_the_definition(
    kind, rho, w: float, masked: bool, weight: tuple[float, float]
) -> None:
    prediction, sample = pair(loss_mask=masks() if masked else None, weight=weight)
    reference = prediction.detach().double().requires_grad_()
    expected = definition(reference, sample, rho, w, sample.loss_mask)
    expected.backward()
    loss = velocity_loss(prediction, sample, LossSection(kind=kind, delta=0.4), w)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert prediction.grad is not None and reference.grad is not None
    distance = (prediction.grad.double() - reference.grad).norm() / reference.grad.norm()
    assert float(distance) < 1e-6


@pytest.mark.parametrize("kind", ["huber", "pseudo_huber"])
def test_huber_losses_are_the_square_of_small_errors_and_linear_beyond(kind) -> None:
    prediction, sample = pair()
    choice = LossSection(kind=kind, delta=0.5)
    for size, expected in ((1e-4, 1e-8), (1e4, 2 * 0.5 * 1e4)):
        loss = velocity_loss(sample.target + size, replace(sample, target=sample.target), choice)
        assert loss.item() == pytest.approx(expected, rel=2e-3)
    exact = replace(sample, target=torch.zeros_like(sample.target))
    tiny = velocity_loss(torch.full_like(prediction, 1e-5), exact, choice)
    assert tiny.item() == pytest.approx(1e-10, rel=1e-5)


def test_mean_and_deviation_over_frames_add_up_to_the_plain_loss() -> None:
    prediction, sample = pair()
    both = velocity_loss(prediction, sample, MSE, 2.0) - velocity_loss(prediction, sample, MSE, 1.0)
    mean_only = velocity_loss(prediction, sample, MSE, 0.0)
    torch.testing.assert_close(mean_only + both, velocity_loss(prediction, sample, MSE))


@pytest.mark.parametrize("w", [1.0, 2.0])
def test_errors_outside_the_loss_mask_do_not_change_the_loss(w: float) -> None:
    prediction, sample = pair(loss_mask=masks())
    with torch.no_grad():
        before = velocity_loss(prediction, sample, MSE, w)
        prediction[0, :, 0] += 100
        prediction[1, :, :, 2, 3] += 100
        assert torch.equal(velocity_loss(prediction, sample, MSE, w), before)
        prediction[1, :, 0] += 100
        assert velocity_loss(prediction, sample, MSE, w) > before


@pytest.mark.parametrize("w", [1.0, 2.0])
def test_a_sample_whose_loss_mask_is_zero_has_no_loss(w: float) -> None:
    loss_mask = torch.zeros(2, 1, 3, 4, 6)
    loss_mask[1] = 1
    prediction, sample = pair(loss_mask=loss_mask)
    loss = velocity_loss(prediction, sample, MSE, w)
    loss.backward()
    assert prediction.grad is not None
    assert not prediction.grad[0].any() and bool(prediction.grad[1].all())
    assert bool(loss.isfinite())


def test_micro_batches_have_the_gradient_of_one_batch() -> None:
    """Each sample's loss by its own mask, so means over samples add up however they are cut."""
    prediction, sample = pair(loss_mask=masks(), weight=(0.5, 2.0))
    velocity_loss(prediction, sample, MSE, 1.5).backward()
    assert prediction.grad is not None and sample.loss_mask is not None
    together = prediction.grad.clone()
    prediction.grad = None
    for i in range(2):
        part = replace(
            sample,
            target=sample.target[i : i + 1],
            weight=sample.weight[i : i + 1],
            loss_mask=sample.loss_mask[i : i + 1],
        )
        (velocity_loss(prediction[i : i + 1], part, MSE, 1.5) / 2).backward()
    torch.testing.assert_close(prediction.grad, together, rtol=1e-6, atol=1e-9)
