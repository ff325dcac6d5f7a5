"""Data for the experiments."""

import torch
from torch import Tensor


def shuffled_digits(seed: int = 0) -> tuple[Tensor, Tensor]:
    """The 1797 handwritten digits that ship with scikit-learn, (1797, 8, 8) in [0, 1], and which digit each one is."""
    from sklearn.datasets import load_digits  # a second to import: not before it is needed

    digits = load_digits()
    rows = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(digits.images / 16, dtype=torch.float32)[rows], torch.tensor(digits.target).long()[rows]
