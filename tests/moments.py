"""Estimates by Monte-Carlo beside what they should be."""

import torch


def agrees(samples: torch.Tensor, wanted: float, precision: float) -> None:
    """The mean of the samples is what is wanted, within 4 standard errors that are at most `precision` of it."""
    samples = samples.double()
    error = samples.std().item() / len(samples) ** 0.5
    assert error < precision * abs(wanted), "too few samples to tell a wrong constant"
    assert abs(samples.mean().item() - wanted) < 4 * error, (samples.mean().item(), wanted, error)
