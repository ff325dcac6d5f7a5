"""Histogram of magnitudes on a logarithmic scale."""

import torch
from torch import Tensor

LOWEST, PER_DECADE, BINS = -8, 2, 24  # of log10|x|: from -8 to 4 in steps of 1/2


def histogram(rows: Tensor) -> Tensor:
    """Counts of 0, of log10|x| in each bin (what is beyond them in the outermost), and of NaN and infinity."""
    size = rows.abs() if rows.dtype == torch.float64 else rows.float().abs()
    bins = ((size.log10() - LOWEST) * PER_DECADE).floor().clamp(0, BINS - 1) + 1
    bins = bins.masked_fill(size == 0, 0).masked_fill(~size.isfinite(), BINS + 1).long().flatten()
    counts = torch.ones((), dtype=torch.float64, device=rows.device).expand(bins.shape)
    return torch.zeros(BINS + 2, dtype=torch.float64, device=rows.device).scatter_add(0, bins, counts)
