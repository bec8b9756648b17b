"""OneTrainer's micro-batches draw the same noise as onewan's own steps; without OneTrainer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.onetrainer_configs import train_config, with_defaults
from torch import Tensor

from onewan.arithmetic.condition_shares import ConditionShares
from onewan.data.loader import Batch, StepBatches
from onewan.errors import ConfigError
from onewan.model.conditioning import conditioning_of
from onewan.onetrainer.sampling import request_of
from onewan.onetrainer.settings import timesteps_of
from onewan.onetrainer.step_adapter import batch_of, step_adapter_of
from onewan.train.objective import velocity_loss
from onewan.variants import VARIANTS, VariantName

T2V = VARIANTS["t2v-a14b"]


def clips(count: int, seed: int = 0) -> Batch:
    latents = torch.randn(count, 16, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    items = {
        "latent_image": latents,
        "loss_weight": torch.full((count,), 0.5),
        "image_path": [f"{i}.mp4" for i in range(count)],
    }
    text = torch.zeros(count, 512, 8)
    return batch_of(items, text, [""] * count, conditioning_of(T2V))


@pytest.mark.parametrize("ranks", [1, 2])
def test_micro_batches_draw_the_same_noise_as_the_whole_step(ranks: int):
    """Two micro-batches of two clips on each rank are one step of onewan's."""
    adapter = step_adapter_of(
        train_config(gradient_accumulation_steps=2, wan_expert_block=1, timestep_shift=5.0),
        T2V,
        T2V.experts,
    )
    parts = [clips(2, seed) for seed in range(2 * ranks)]
    placed = tuple(replace(part, first_sample_index=2 * i) for i, part in enumerate(parts))
    for number in (0, 1):
        expert = adapter.expert_at(2 * number)
        step = StepBatches(number=number, expert=expert.name, batches=placed, global_size=4 * ranks)
        for micro in (0, 1):
            assert adapter.expert_at(2 * number + micro) is expert
            for rank in range(ranks):
                place = micro * ranks + rank
                own = adapter.add_noise(
                    parts[place], 2 * number + micro, expert, rank=rank, ranks=ranks
                )
                whole = adapter.objective.add_noise(placed[place], step, expert)
                assert own.t_host == whole.t_host
                assert torch.equal(own.x, whole.x) and torch.equal(own.target, whole.target)
                assert torch.equal(own.weight, whole.weight)
    assert adapter.expert_at(0).name == "high" and adapter.expert_at(2).name == "low"


def test_the_steps_of_a_stopped_expert_go_to_the_other():
    adapter = step_adapter_of(train_config(wan_expert_block=1), T2V, T2V.experts)
    assert [adapter.expert_at(s).name for s in range(4)] == ["high", "low", "high", "low"]
    assert {adapter.expert_at(s, {"transformer"}).name for s in range(4)} == {"low"}
    both = {"transformer", "transformer_2"}
    assert [adapter.expert_at(s, both).name for s in range(2)] == ["high", "low"]


def test_validation_covers_every_expert_and_is_repeatable():
    adapter = step_adapter_of(train_config(wan_validation_levels=3), T2V, T2V.experts)
    first, again = adapter.validation_batches(clips(1)), adapter.validation_batches(clips(1))
    assert [expert.name for expert, _ in first] == ["high"] * 3 + ["low"] * 3
    for (expert, one), (_, two) in zip(first, again, strict=True):
        assert torch.equal(one.x, two.x)
        assert expert.t_min <= one.t_host[0] <= expert.t_max
    assert len({one.t_host for _, one in first}) == 6


def test_losses_are_added_and_the_prior_is_the_target_outside_the_mask():
    plain = step_adapter_of(train_config(), T2V, T2V.experts)
    batch = clips(1)
    sample = plain.add_noise(batch, 0, T2V.experts[0])
    predicted = torch.randn(sample.x.shape, generator=torch.Generator().manual_seed(3))
    error = (predicted - sample.target).double()
    assert plain.loss(sample, predicted).item() == pytest.approx(
        0.5 * error.square().mean().item(), rel=1e-6
    )
    mixed = step_adapter_of(train_config(mse_strength=0.25, huber_strength=2.0), T2V, T2V.experts)
    huber = torch.nn.functional.huber_loss(predicted.double(), sample.target.double())
    expected = 0.5 * (0.25 * error.square().mean() + 2.0 * huber)
    assert mixed.loss(sample, predicted).item() == pytest.approx(expected.item(), rel=1e-6)

    masked = replace(batch, mask=torch.zeros(1, 1, 2, 4, 4))
    assert masked.mask is not None
    masked.mask[..., :2] = 1
    adapter = step_adapter_of(
        train_config(unmasked_weight=0.0, masked_prior_preservation_weight=0.5), T2V, T2V.experts
    )
    sample = adapter.add_noise(masked, 0, T2V.experts[0])
    prior = torch.zeros_like(sample.target)

    def part(of: Tensor, cut: slice) -> float:
        return of[..., cut].double().square().mean().item()

    expected_loss = 0.5 * (
        part(predicted - sample.target, slice(0, 2)) + 0.5 * part(predicted - prior, slice(2, 4))
    )
    assert adapter.loss(sample, predicted, prior).item() == pytest.approx(expected_loss, rel=1e-6)
    assert velocity_loss(predicted, sample, adapter.losses[0][1]) > 0


DENSITIES: list[tuple[dict[str, Any], list[tuple[float, float]]]] = [
    # What OneTrainer's own formulas give: (timestep, share below it).
    ({}, [(0.5, 0.5)]),
    ({"timestep_shift": 5.0}, [(0.875, 0.5833)]),
    ({"timestep_distribution": "LOGIT_NORMAL"}, [(0.5, 0.5), (0.7310586, 0.8413)]),
    ({"timestep_distribution": "LOGIT_NORMAL", "noising_bias": 1.0}, [(0.7310586, 0.5)]),
    ({"timestep_distribution": "BETA", "noising_weight": 2.0, "noising_bias": 1.0}, [(0.5, 0.25)]),
    (
        {"timestep_distribution": "SIGMOID", "noising_weight": 0.0},
        [(0.5, 0.5), (0.9, 0.9)],
    ),
    ({"timestep_distribution": "INVERTED_PARABOLA", "noising_weight": 8.0}, [(0.5, 0.5)]),
    ({"timestep_distribution": "COS_MAP"}, [(0.5, 0.5)]),
    (
        {"min_noising_strength": 0.2, "max_noising_strength": 0.6},
        [(0.2, 0.0), (0.4, 0.5), (0.6, 1.0)],
    ),
]


@pytest.mark.parametrize(("changes", "shares"), DENSITIES)
def test_timestep_distributions_follow_onetrainers_formulas(changes, shares):
    density = timesteps_of(train_config(**changes)).density(1.0)
    for level, share in shares:
        assert density.cdf(level) == pytest.approx(share, abs=2e-4)


def test_the_heavy_tail_distribution_follows_onetrainers_formula():
    """Its formula maps an even u to 1 - u - s (cos^2(pi/2 u) - 1 + u)."""
    import math

    scale = 0.8
    density = timesteps_of(
        train_config(timestep_distribution="HEAVY_TAIL", noising_weight=scale)
    ).density(1.0)
    for u in (0.1, 0.3, 0.7):
        level = 1 - u - scale * (math.cos(math.pi / 2 * u) ** 2 - 1 + u)
        assert density.cdf(level) == pytest.approx(1 - u, abs=1e-6)


def test_unusable_settings_are_reported_together():
    config = train_config(
        frames="x", log_cosh_strength=1.0, min_noising_strength=0.9, max_noising_strength=0.1
    )
    with pytest.raises(ConfigError) as error:
        step_adapter_of(config, T2V, T2V.experts)
    for name in ("frames", "log_cosh_strength", "min_noising_strength"):
        assert name in str(error.value)


@pytest.mark.parametrize("name", ["fun-inp-a14b", "fun-control-a14b"])
def test_wan_fun_is_refused(name: VariantName):
    variant = VARIANTS[name]
    with pytest.raises(ConfigError, match=r"base_model_name: is Wan 2\.2 Fun-.*onewan train"):
        step_adapter_of(train_config(), variant, variant.experts)


def test_sample_sizes_are_rounded_to_what_the_vae_accepts():
    sample = with_defaults("sample", {"prompt": "a", "frames": 80, "width": 500, "height": 300})
    request = request_of(SimpleNamespace(**sample), T2V)
    assert (request.frames, request.width, request.height) == (81, 496, 304)
    assert request.guidance == (7.0, 7.0) and request.fps == 16 and request.shift == 12
    assert request_of(SimpleNamespace(**{**sample, "frames": 83}), T2V).frames == 81
    sample |= {"wan_low_cfg_scale": 3.0, "wan_fps": 12.0, "cfg_scale": 0.5, "frames": 1}
    request = request_of(SimpleNamespace(**sample), T2V)
    assert request.guidance == (1.0, 3.0) and request.fps == 12 and request.frames == 1
    assert request_of(SimpleNamespace(**sample), VARIANTS["ti2v-5b"]).guidance == (1.0,)


def test_frames_are_given_in_the_shares_of_the_config():
    i2v = VARIANTS["i2v-a14b"]
    config = train_config(wan_condition_shares="first 0.5, both=0.5")
    adapter = step_adapter_of(config, i2v, i2v.experts)
    assert adapter.conditioning.shares == ConditionShares(first=0.5, both=0.5)
    default = step_adapter_of(train_config(), i2v, i2v.experts).conditioning.shares
    assert default == ConditionShares(first=1.0)
    for wrong in ("first 0.5", "start 1", "first", "first 0.5, first 0.5"):
        with pytest.raises(ConfigError, match=r"wan_condition_shares: is .* add up to 1"):
            step_adapter_of(train_config(wan_condition_shares=wrong), i2v, i2v.experts)
    # As `onewan train` draws them, by the step and the index in the global batch.
    given = [each for step in range(100) for each in adapter.draw_given(2, 9, step)]
    assert set(given) == {"first", "both"}
    draw = adapter.conditioning.draw
    assert given[:4] == [draw(9, seed=42, step=n // 2, index=n % 2) for n in range(4)]
    ranks = [adapter.draw_given(2, 9, 5, rank=rank, ranks=2) for rank in (0, 1)]
    assert [*ranks[0], *ranks[1]] == adapter.draw_given(4, 9, 5)


def test_a_batch_has_the_channels_of_the_frames_that_its_samples_are_given():
    i2v = VARIANTS["i2v-a14b"]
    conditioning = conditioning_of(i2v, ConditionShares(first=0.5, both=0.5))
    items = {
        "latent_image": torch.zeros(2, 16, 3, 2, 2),
        "latent_condition": torch.full((2, 16, 3, 2, 2), 1.0),
        "latent_end_of_both": torch.full((2, 16, 1, 2, 2), 2.0),
        "loss_weight": torch.ones(2),
        "image_path": ["a", "b"],
    }
    batch = batch_of(items, torch.zeros(2, 512, 8), ["", ""], conditioning, ["both", "first"])
    assert batch.given == ("both", "first") and batch.condition is not None
    assert batch.condition[:, 4:, -1].flatten(1).mean(dim=1).tolist() == [2.0, 1.0]
    assert batch.condition[:, :4, -1, 0, 0].tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
    usual = batch_of(items, torch.zeros(2, 512, 8), ["", ""], conditioning)
    assert usual.given == ("first", "first")


def test_a_sample_may_end_with_an_image():
    values = {"prompt": "a", "base_image_path": " a.png ", "wan_last_image_path": "b.png"}
    sample = with_defaults("sample", values)
    request = request_of(SimpleNamespace(**sample), VARIANTS["i2v-a14b"])
    assert (request.image, request.last_image) == (Path("a.png"), Path("b.png"))
    assert request.given == "both"
