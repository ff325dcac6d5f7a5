"""What perturbs the activations, by the name that the command line has for it."""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from sparseout import Sparseout
from sparseout.experiments.config import Config


def noise(
    config: Config, *, p: float | None = None, q: float | None = None, shared_dims: Sequence[int] = ()
) -> nn.Module:
    """The layer that a configuration asks for; `p` and `q` are those of the place, where it has its own."""
    p, q = config.p if p is None else p, config.q if q is None else q
    if config.method == "none":
        return nn.Identity()
    if config.method == "dropout":
        # torch has no Dropout with a mask shared over time; Sparseout at q = 2 is one.
        return Sparseout(p, 2.0, shared_dims=shared_dims) if shared_dims else nn.Dropout(p)
    scale: Any = None if config.scale == "paper" else config.scale
    return Sparseout(p, q, gradient=cast(Any, config.gradient), scale=scale, shared_dims=shared_dims)
