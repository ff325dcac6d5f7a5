"""Data for the experiments."""

from functools import cache

import torch
from torch import Tensor


def shuffled_digits(seed: int = 0) -> tuple[Tensor, Tensor]:
    """The 1797 handwritten digits that ship with scikit-learn, (1797, 8, 8) in [0, 1], and which digit each one is."""
    images, labels = _digits()
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return images[rows], labels[rows]


@cache  # a text file that is read number by number
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits  # a second to import: not before it is needed

    digits = load_digits()
    return torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target).long()
