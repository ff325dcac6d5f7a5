"""The equation once more, in numpy and fp64, with nothing shared with the library but the paper."""

import numpy as np
import torch


def xi(mask, p):
    return np.asarray(mask, dtype=np.float64) / (1 - p) - 1


def beta(x, q, scale):
    """The factor of the noise for a `scale` argument."""
    if scale == "matched":
        a = np.abs(x[x != 0])
        return np.sqrt((a**2).sum() / (a**q).sum()) if a.size else 1.0
    return 1.0 if scale is None else scale ** (1 - q / 2)


def value(x, mask, p, q, scale=None):
    x = np.asarray(x, dtype=np.float64)
    return x + beta(x, q, scale) * np.sign(x) * np.abs(x) ** (q / 2) * xi(mask, p)


def slope(x, mask, p, q, scale=None, gradient="detached"):
    """dy/dx: the paper's code multiplies the gradient by 1 + |x|^((q - 2)/2) xi; "exact" has q/2 before the noise."""
    x = np.asarray(x, dtype=np.float64)
    inner = np.ones_like(x) if q == 2 else np.zeros_like(x)
    nonzero = x != 0
    inner[nonzero] = np.abs(x[nonzero]) ** (q / 2 - 1)
    factor = q / 2 if gradient == "exact" else 1.0
    return 1 + factor * beta(x, q, scale) * inner * xi(mask, p)


def mask_of(x, p, seed, shared_dims=()):
    """The mask the library uses for x's shape and layout: seen through ones, where y is 1 + xi at any q."""
    import sparseout

    ones = torch.ones_like(x, requires_grad=False)
    return (sparseout.sparseout(ones, p, 1.0, seed=seed, shared_dims=shared_dims) > 1).numpy()
