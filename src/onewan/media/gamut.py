"""Colors of wide primaries (BT.2020, P3) -> those of BT.709, which screens for sRGB have.

In linear light a change of primaries is a matrix, which follows from the chromaticities of both
(SMPTE RP 177). What lies outside of BT.709 is clipped (Report ITU-R BT.2407, the simple method).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from onewan.media.colors import BT709, BT2020, DCI_P3, DISPLAY_P3

_D65, _DCI_WHITE = (0.3127, 0.3290), (0.314, 0.351)
_CHROMATICITIES = {
    BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), _D65),
    BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), _D65),
    DCI_P3: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), _DCI_WHITE),
    DISPLAY_P3: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), _D65),
}
"""(x, y) of red, green, blue and white, of ITU-R BT.709-6 and BT.2020-2, SMPTE RP 431-2 and EG
432-1."""
_SAME = 0.002
"""Chromaticities that differ by less are the same: files have rounded ones."""
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
"""XYZ to the responses of cones, for another white."""

_GAMMA_22, _GAMMA_28, SRGB = 4, 5, 13
"""Transfer functions, as in ITU-T H.273."""
_BT1886_GAMMA = 2.4

_STEPS = 2**14
"""Entries in the table of a transfer function: 16 for each step of a 10-bit signal."""
_ROWS = 32
"""Rows that are converted at once, so that what lies between the steps stays in the cache."""


def primaries_of(chromaticities: Sequence[float]) -> int:
    """The number of the primaries with these (x, y) of white, red, green and blue, one behind the
    other, as PNG has them; 0 if they are none of those that are known."""
    given = np.array(chromaticities)
    for number, (red, green, blue, white) in _CHROMATICITIES.items():
        if np.allclose(given, np.ravel((white, red, green, blue)), atol=_SAME):
            return number
    return 0


@lru_cache
def to_709(primaries: int) -> np.ndarray:
    """The matrix [3, 3], float32, from linear RGB of `primaries` (ITU-T H.273) to that of BT.709;
    unknown ones are taken for BT.2020. White stays white."""
    source = _CHROMATICITIES.get(primaries, _CHROMATICITIES[BT2020])
    to_xyz, from_xyz = _to_xyz(source), np.linalg.inv(_to_xyz(_CHROMATICITIES[BT709]))
    return (from_xyz @ _adaptation(source[3]) @ to_xyz).astype(np.float32)


def sdr_to_709(signal_HWC: np.ndarray, primaries: int, transfer: int) -> np.ndarray:
    """RGB uint8 [H, W, 3] in the primaries of BT.709 of an SDR signal in others, R'G'B' float32
    [H, W, 3] from 0 to 1.

    Both numbers as in ITU-T H.273. Light is that of the display: by BT.1886, whose exponent is 2.4,
    unless `transfer` is sRGB or a plain exponent. The result has the same transfer function, so
    that grays stay as they are.
    """
    curve = transfer if transfer in (_GAMMA_22, _GAMMA_28, SRGB) else 0
    matrix, linear_table, encoded_table = to_709(primaries).T, *_tables(curve)
    out = np.empty(signal_HWC.shape, np.uint8)
    for row in range(0, len(signal_HWC), _ROWS):
        rows = slice(row, row + _ROWS)
        steps = np.clip(signal_HWC[rows], 0, 1) * np.float32(_STEPS - 1) + np.float32(0.5)
        light = np.clip(linear_table[steps.astype(np.uint16)] @ matrix, 0, 1)
        # By the square root, so that the steps of the table are about equal steps of the result.
        steps = np.sqrt(light) * np.float32(_STEPS - 1) + np.float32(0.5)
        out[rows] = encoded_table[steps.astype(np.uint16)]
    return out


@lru_cache
def _tables(curve: int) -> tuple[np.ndarray, np.ndarray]:
    """Linear light by signal, float32, and uint8 signal by the square root of linear light."""
    signal = np.linspace(0, 1, _STEPS)
    if curve == SRGB:
        linear = np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
        light = signal**2
        encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    else:
        gamma = {_GAMMA_22: 2.2, _GAMMA_28: 2.8}.get(curve, _BT1886_GAMMA)
        linear, encoded = signal**gamma, signal ** (2 / gamma)
    return linear.astype(np.float32), np.round(encoded * 255).astype(np.uint8)


def _to_xyz(chromaticities: tuple[tuple[float, float], ...]) -> np.ndarray:
    """The matrix from linear RGB to XYZ, with white at Y = 1."""
    *primaries, white = map(_xyz, chromaticities)
    columns = np.stack(primaries, axis=1)
    return columns * np.linalg.solve(columns, white)


def _xyz(chromaticity: tuple[float, float]) -> np.ndarray:
    x, y = chromaticity
    return np.array([x / y, 1.0, (1 - x - y) / y])


def _adaptation(white: tuple[float, float]) -> np.ndarray:
    """The matrix in XYZ by which what is white under `white` is white under D65."""
    cones = (_BRADFORD @ _xyz(_D65)) / (_BRADFORD @ _xyz(white))
    return np.linalg.inv(_BRADFORD) @ (cones[:, None] * _BRADFORD)
