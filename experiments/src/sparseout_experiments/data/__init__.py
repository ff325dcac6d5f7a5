"""Data for the experiments."""

from typing import NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """Rows to train on and rows to measure on."""

    train: Tensor
    test: Tensor


def digits(test: int = 450, seed: int = 0) -> Split:
    """The 1797 handwritten digits that ship with scikit-learn: 8 x 8 pixels in [0, 1], as rows of 64."""
    from sklearn.datasets import load_digits  # a second to import: not before it is needed

    pixels = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    return Split(pixels[order[test:]], pixels[order[:test]])
