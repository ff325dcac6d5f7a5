"""The implementations that are compared. The first of each table is the baseline."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseout import Sparseout2d, sparseout
from sparseout.baselines import Attachment, make
from sparseout_experiments.bench.timing import Function

P = 0.5

T = TypeVar("T")


def plain_formula(x: Tensor, p: float = P, q: float = 1.5) -> Tensor:
    """The equation as one would write it, with torch's Bernoulli draw and autograd."""
    xi = torch.bernoulli(torch.full_like(x, 1 - p)) / (1 - p) - 1
    return x + x.sign() * x.abs() ** (q / 2) * xi


class _Published(torch.autograd.Function):
    """The sequence of operations of the code published with the paper, in our words.

    Clone; noise from a Bernoulli fill, divided by 1 - p, minus 1; times a power of |x| + 1e-12; plus 1; multiply. The
    multiplier is kept and backward multiplies by it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, q: float) -> Tensor:
        y = x.clone()
        multiplier = torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)
        multiplier.sub_(1).mul_((x.abs() + 1e-12).pow((q - 2) / 2)).add_(1)
        ctx.save_for_backward(multiplier)
        return y.mul_(multiplier)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (multiplier,) = ctx.saved_tensors
        return grads[0].mul(multiplier), None, None


def published_formula(x: Tensor, p: float = P, q: float = 1.5) -> Tensor:
    """The result of the code published with the paper."""
    return _Published.apply(x, p, q)  # type: ignore[no-untyped-call]


def compiled(function: Callable[[Tensor], T]) -> Callable[[Tensor], T]:
    """Compiled at the first call, so that where it cannot be, the call fails."""
    build = cache(lambda: torch.compile(function, dynamic=False))
    return lambda x: build()(x)


def _sparseout(q: float | Tensor, **options: Any) -> Function:
    return lambda x: sparseout(x, P, q, **options)


def element(device: str) -> dict[str, Function]:
    """All implementations, on a vector with a mask of its own for every element."""
    return {
        "F.dropout": lambda x: F.dropout(x, P),
        **{f"Sparseout q={q:g}": _sparseout(q) for q in (1.0, 1.3, 1.5, 2.5, 3.0)},
        "Sparseout q=1.5 matched": _sparseout(1.5, scale="matched"),
        "Sparseout q=1.5 exact": _sparseout(1.5, gradient="exact"),
        "Sparseout q=1.5 as tensor": _sparseout(torch.tensor(1.5, device=device)),
        "plain formula, eager": plain_formula,
        "plain formula, compiled": compiled(plain_formula),
        "published formula": published_formula,
    }


def element_short(device: str) -> dict[str, Function]:
    """Two of them, where the layout of the input is what matters."""
    return {name: element(device)[name] for name in ("F.dropout", "Sparseout q=1.5")}


def channel(device: str) -> dict[str, Function]:
    """One draw a channel."""
    return {"F.dropout2d": lambda x: F.dropout2d(x, P), **{f"Sparseout2d q={q}": Sparseout2d(P, q) for q in (1.3, 1.5)}}


class Layout(NamedTuple):
    """The input, in a shape of the case's number of elements or in one of its own, and who computes with it."""

    implementations: Callable[[str], dict[str, Function]]
    shape: tuple[int, ...] = (-1,)
    memory_format: torch.memory_format = torch.contiguous_format


_MAPS = (-1, 64, 8, 8)
LAYOUTS = {
    "vector": Layout(element),
    "channel mask, NCHW": Layout(channel, _MAPS),
    "channel mask, channels_last": Layout(channel, _MAPS, torch.channels_last),
    "element mask, channels_last": Layout(element_short, _MAPS, torch.channels_last),
    # As users have them: a batch of features, of tokens, of maps.
    "32 x 4096": Layout(element_short, (32, 4096)),
    "8 x 512 x 768": Layout(element_short, (8, 512, 768)),
    "64 x 64 x 32 x 32": Layout(element_short, (64, 64, 32, 32)),
    "channel mask, 64 x 64 x 32 x 32": Layout(channel, (64, 64, 32, 32)),
}


class Method(NamedTuple):
    """A layer in the position of Dropout, and an attachment to a layer or a model."""

    noise: Callable[[], Any]
    attachment: Attachment | None = None


def named(name: str, **parameters: Any) -> Method:
    """A method of `baselines.make`."""
    made = make(name, **parameters)
    return Method(nn.Identity, made) if isinstance(made, Attachment) else Method(partial(make, name, **parameters))


# In whole models and beside a linear layer; the others where a model has a place for them.
METHODS = {
    "nn.Dropout": named("dropout", p=P),
    "no dropout": named("none"),
    "Sparseout q=1.5": named("sparseout", p=P, q=1.5),
}
ALTERNATIVES = {
    "Gaussian dropout": named("gaussian", p=P),
    "L1 penalty": named("penalty"),
    "k-winners, a tenth": named("kwinners", k=0.1),
    "Shakeout": named("shakeout", p=P),
    "Bridgeout, per batch": named("bridgeout", p=P, q=1.5, per_example=False),
    "Bridgeout, per example": named("bridgeout", p=P, q=1.5),
}
FOR_TEXT = ("Gaussian dropout", "L1 penalty")  # LSTM layers keep their weights to themselves
