"""HDR video (PQ and HLG) -> SDR, by a stated rule.

1. Linear light, relative to SDR white, by the transfer functions of Recommendation ITU-R BT.2100-2,
   tables 4 (PQ, which is SMPTE ST 2084) and 5 (HLG, which is ARIB STD-B67). White in SDR is 203
   cd/m2 (Report ITU-R BT.2408): 58 % of PQ's signal, and 75 % of HLG's on the display of 1000 cd/m2
   that it is made for, with a system gamma of 1.2.
2. Primaries of BT.2020 (or Display P3) to those of BT.709.
3. Highlights: the brightest of R, G and B keeps its value up to 97 % of SDR white, so that what SDR
   can show is as in SDR; above, it approaches white. All three are scaled alike, which keeps hues.
4. Values below 0, which are colors outside of BT.709, become 0.
5. The transfer function of sRGB (IEC 61966-2-1), and 8 bits.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from onewan.media.colors import Transfer
from onewan.media.gamut import to_709

_SDR_WHITE = 203.0
"""cd/m2."""
_HLG_PEAK, _HLG_GAMMA = 1000.0, 1.2
_KNEE = 0.97
"""Of SDR white, in linear light: below, nothing is changed."""

_SIGNAL_STEPS = 2**14
"""Entries in the table of a transfer function: 16 for each step of a 10-bit signal."""
_ENCODED_STEPS = 2**14

_ROWS = 32
"""Rows that are converted at once, so that what lies between the steps stays in the cache."""

_LUMA_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)


def to_sdr(signal_HWC: np.ndarray, transfer: Transfer, primaries: int) -> np.ndarray:
    """RGB uint8 [H, W, 3] of an HDR signal, R'G'B' float32 [H, W, 3] from 0 to 1.

    `primaries` are numbered as in ITU-T H.273; those that are unknown are taken for BT.2020.
    """
    table = _linear_table(transfer)
    matrix = to_709(primaries).T
    out = np.empty(signal_HWC.shape, np.uint8)
    for row in range(0, len(signal_HWC), _ROWS):
        rows = slice(row, row + _ROWS)
        steps = np.clip(signal_HWC[rows], 0, 1) * np.float32(_SIGNAL_STEPS - 1) + np.float32(0.5)
        linear = table[steps.astype(np.uint16)]
        if transfer == "HLG":
            # The opto-optical transfer function, by the luminance of the scene (BT.2100, table 5).
            linear *= ((linear @ _LUMA_2020) ** np.float32(_HLG_GAMMA - 1))[..., None]
            linear *= np.float32(_HLG_PEAK / _SDR_WHITE)
        linear = linear @ matrix
        brightest = linear.max(axis=-1)
        if (brightest > _KNEE).any():
            linear *= (_rolled_off(brightest) / np.maximum(brightest, _KNEE))[..., None]
        np.clip(linear, 0, 1, out=linear)
        # By the square root, so that the steps of the table are about equal steps of the result.
        np.sqrt(linear, out=linear)
        linear *= np.float32(_ENCODED_STEPS - 1)
        out[rows] = _encoded_table()[(linear + np.float32(0.5)).astype(np.uint16)]
    return out


def _rolled_off(brightest: np.ndarray) -> np.ndarray:
    """The knee k for values up to it; above, k + (1 - k) t / (1 + t) with t = (x - k) / (1 - k).

    The curve leaves the identity with the same slope, is 0.985 at SDR white (253 of 255 when
    encoded), and approaches 1.
    """
    beyond = np.maximum(brightest - np.float32(_KNEE), 0) / np.float32(1 - _KNEE)
    return np.float32(_KNEE) + np.float32(1 - _KNEE) * (beyond / (1 + beyond))


@lru_cache
def _linear_table(transfer: Transfer) -> np.ndarray:
    """Linear light by signal: for PQ that of the display over SDR white, for HLG the scene's."""
    signal = np.linspace(0, 1, _SIGNAL_STEPS)
    if transfer == "PQ":
        m1, m2 = 2610 / 16384, 2523 / 4096 * 128
        c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
        power = signal ** (1 / m2)
        linear = 10_000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1) / _SDR_WHITE
    else:
        a = 0.17883277
        b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
        linear = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    return linear.astype(np.float32)


@lru_cache
def _encoded_table() -> np.ndarray:
    """uint8 value of sRGB by the square root of linear light."""
    linear = np.linspace(0, 1, _ENCODED_STEPS) ** 2
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(encoded * 255).astype(np.uint8)
