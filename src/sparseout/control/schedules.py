"""Schedules: q as a function of progress, the fraction of training that is done.

A schedule returns a float. When q changes, compiled code of a layer whose q is a float is recompiled; that of a layer
whose q is a 0-d tensor is not: build it with ``q=torch.tensor(2.0)`` and write into the tensor before each step.

    >>> import torch, sparseout
    >>> layer = sparseout.Sparseout(p=0.5, q=torch.tensor(2.0), scale="matched")
    >>> for step in range(100):
    ...     _ = layer.q.fill_(linear(step / 99, start=2.0, stop=1.2))
    >>> layer
    Sparseout(p=0.5, q=tensor(1.2000), scale='matched')

To reach a *sparsity* instead, see :class:`sparseout.SparsityController`. Lower q slowly: units that die at a low q do
not recover when it rises again.
"""

import math
from collections.abc import Callable

from sparseout._utils.validation import check_number

__all__ = ["cosine", "linear", "warmup"]


def linear(progress: float, start: float, stop: float) -> float:
    r"""Linear from start to stop.

    .. math:: q(t) = \mathrm{start} + t \, (\mathrm{stop} - \mathrm{start}), \qquad t = \mathrm{progress}

    Args:
        progress: fraction of training that is done, in [0, 1].
        start: q at progress 0, a finite number >= 0.
        stop: q at progress 1, likewise.

    Returns:
        q, a float.

    Raises:
        ValueError: for a value out of range.
        TypeError: for what is not a number.

    Example:
        >>> linear(0.25, 2.0, 1.0)
        1.75

    Source: Morerio et al. (2017), Curriculum dropout, which changes p over training; the line is this library's.
    """
    _check(progress=progress, start=start, stop=stop)
    return start + progress * (stop - start)


def cosine(progress: float, start: float, stop: float) -> float:
    r"""Half a cosine from start to stop, flat at both ends.

    .. math:: q(t) = \mathrm{stop} + (\mathrm{start} - \mathrm{stop}) \, (1 + \cos \pi t) / 2

    Args:
        progress: fraction of training that is done, in [0, 1].
        start: q at progress 0, a finite number >= 0.
        stop: q at progress 1, likewise.

    Returns:
        q, a float.

    Raises:
        ValueError: for a value out of range.
        TypeError: for what is not a number.

    Example:
        >>> round(cosine(0.25, 2.0, 1.0), 3)
        1.854

    Source: Loshchilov & Hutter (2017), SGDR: stochastic gradient descent with warm restarts, equation 5, for the
    learning rate.
    """
    _check(progress=progress, start=start, stop=stop)
    return stop + (start - stop) * (1 + math.cos(math.pi * progress)) / 2


def warmup(progress: float, start: float, stop: float, over: float = 0.1) -> float:
    r"""Linear from start to stop while progress < `over`, then stop.

    .. math:: q(t) = \mathrm{start} + \min(1, t / \mathrm{over}) \, (\mathrm{stop} - \mathrm{start})

    Args:
        progress: fraction of training that is done, in [0, 1].
        start: q at progress 0, a finite number >= 0.
        stop: q from progress `over` on, likewise.
        over: the fraction of training that the way takes, in (0, 1].

    Returns:
        q, a float.

    Raises:
        ValueError: for a value out of range.
        TypeError: for what is not a number.

    Example:
        >>> [round(warmup(progress, 2.0, 1.5, over=0.2), 3) for progress in (0.0, 0.1, 0.2, 1.0)]
        [2.0, 1.75, 1.5, 1.5]

    Source: Sønderby et al. (2016), Ladder variational autoencoders, for the strength of a term in the loss.
    """
    _check(progress=progress, start=start, stop=stop, over=over)
    return stop if progress >= over else linear(progress / over, start, stop)


_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "progress": ("a number in [0, 1]", lambda value: 0 <= value <= 1),
    "start": ("a finite number >= 0", lambda value: 0 <= value < math.inf),
    "stop": ("a finite number >= 0", lambda value: 0 <= value < math.inf),
    "over": ("a number in (0, 1]", lambda value: 0 < value <= 1),
}


def _check(**values: float) -> None:
    for name, value in values.items():
        check_number(name, value, *_RANGES[name])
