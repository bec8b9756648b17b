"""Encoding in strips gives the latents of the whole picture, with the memory of a part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan

from onewan.arithmetic.strips import strips_of
from onewan.memory.plan.bucket import Bucket
from onewan.memory.plan.shapes import STRIP_MARGIN, VaeShape
from onewan.model import vae_strips
from onewan.model.vae import encode_in_strips, encode_video
from onewan.variants import VARIANTS

# The architectures of the two VAEs, with few channels.
A14B: dict[str, Any] = {"base_dim": 8, "z_dim": 16}
TI2V: dict[str, Any] = {
    **{"base_dim": 8, "decoder_base_dim": 8, "z_dim": 48, "is_residual": True},
    **{"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16},
    **{"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48},
}


def vae_of(settings: dict[str, Any]) -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(**settings).eval()


def pixels(frames: int, width: int, height: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(1, 3, frames, height, width, generator=generator) * 2 - 1


def difference(vae: AutoencoderKLWan, video: torch.Tensor, strips: int) -> float:
    """The largest difference of latents in `strips` strips, by the size of the latents."""
    whole = encode_video(vae, video)
    encode_in_strips(vae, lambda *_: strips)
    parts = encode_video(vae, video)
    assert parts.shape == whole.shape and parts.dtype == whole.dtype
    return float((parts - whole).abs().max() / whole.std())


@pytest.mark.parametrize(
    ("settings", "size", "strips"),
    [
        (A14B, (9, 200, 64), 2),
        (A14B, (5, 64, 200), 3),  # the longer side is cut
        (A14B, (1, 136, 64), 40),  # in as many as there are cells
        (TI2V, (9, 368, 64), 2),
    ],
    ids=["wide", "tall", "image", "TI2V-5B"],
)
@torch.no_grad()
def test_strips_have_the_latents_of_the_whole(
    settings: dict[str, Any], size: tuple[int, int, int], strips: int
) -> None:
    vae = vae_of(settings)
    assert vae_strips.margin_of(vae) == STRIP_MARGIN
    assert difference(vae, pixels(*size), strips) < 2e-5


@torch.no_grad()
def test_the_margin_is_as_wide_as_it_has_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_strips, "margin_of", lambda _: STRIP_MARGIN - 1)
    assert difference(vae_of(A14B), pixels(5, 200, 64), 2) > 1e-4


@torch.no_grad()
def test_the_number_of_strips_is_asked_for_each_clip() -> None:
    vae, asked = vae_of(A14B), list[tuple[int, int, int]]()

    def strips(frames: int, width: int, height: int) -> int:
        asked.append((frames, width, height))
        return 1

    encode_in_strips(vae, strips)
    encode_video(vae, pixels(5, 64, 32))
    assert asked == [(5, 64, 32)]


def test_strips_cover_the_picture_once() -> None:
    for cells, number in ((104, 1), (104, 3), (90, 8), (4, 9)):
        strips = list(strips_of(cells, number, 5))
        assert [cell for strip in strips for cell in strip.inner] == list(range(cells))
        for strip in strips:
            assert strip.outer[0] == max(0, strip.inner[0] - 5)
            assert strip.outer[-1] == min(cells - 1, strip.inner[-1] + 5)


# Live bytes of `moments_in_strips` over fake tensors (benchmarks/live_bytes.py), clip included.
@pytest.mark.parametrize(
    ("variant", "size", "counted"),
    [
        ("t2v-a14b", (81, 720, 1280), {2: 8.042e9, 4: 5.177e9, 8: 3.664e9}),
        ("t2v-a14b", (81, 480, 832), {2: 3.578e9, 4: 2.428e9, 8: 1.772e9}),
        ("t2v-a14b", (5, 480, 832), {2: 2.643e9, 4: 1.682e9, 8: 1.092e9}),
        ("t2v-a14b", (1, 480, 832), {2: 0.860e9, 4: 0.547e9, 8: 0.356e9}),
        ("ti2v-5b", (121, 704, 1280), {2: 5.153e9, 4: 3.896e9, 8: 3.140e9}),
        ("ti2v-5b", (33, 704, 1280), {2: 4.003e9}),
    ],
)
def test_the_plan_knows_the_memory_of_strips(
    variant: Any, size: tuple[int, int, int], counted: dict[int, float]
) -> None:
    shape = VaeShape.of_variant(VARIANTS[variant])
    bucket = Bucket(frames=size[0], height=size[1], width=size[2])
    for strips, expected in counted.items():
        assert shape.encoding_bytes(bucket, strips) == pytest.approx(expected, rel=0.05)
        assert shape.strips(bucket, shape.encoding_bytes(bucket, strips)) == strips
    assert shape.strips(bucket, shape.encoding_bytes(bucket)) == 1
    assert shape.strips(bucket, 0) == 8
