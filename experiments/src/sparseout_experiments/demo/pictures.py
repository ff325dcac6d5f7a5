"""Rows of 8 x 8 pictures as PNG images that a page can hold inside itself."""

import base64
import io

import numpy as np
from matplotlib import colormaps
from matplotlib.image import imsave
from torch import Tensor

_SIDE, _GAP, _ENLARGED = 8, 1, 6


def digits(rows: Tensor) -> str:
    """Images with values in [0, 1], as ink on paper."""
    return _strip(rows.clamp(0, 1), "gray_r")


def filters(rows: Tensor) -> str:
    """Weights: blue below 0, white at 0, red above, each picture scaled by its own largest weight."""
    peak = rows.abs().amax(1, keepdim=True).clamp_min(1e-12)
    return _strip((rows / peak + 1) / 2, "RdBu_r")


def _strip(rows: Tensor, colours: str) -> str:
    """Pictures side by side with transparent gaps, as a data URI."""
    painted = colormaps[colours](rows.nan_to_num(0.5).numpy().reshape(len(rows), _SIDE, _SIDE))
    gap = np.zeros((_SIDE, _GAP, 4))
    strip = np.concatenate([part for tile in painted for part in (tile, gap)][:-1], axis=1)
    strip = strip.repeat(_ENLARGED, axis=0).repeat(_ENLARGED, axis=1)
    buffer = io.BytesIO()
    imsave(buffer, strip, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
