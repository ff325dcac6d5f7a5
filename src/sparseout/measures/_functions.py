r"""Six measures of how sparse a row of activations is.

A row is x along `dim`, n its length, and only magnitudes |x| count. Every measure is a value computed from
statistics of the row, both in one table, `MEASURES`, which the functions and `Streaming` share.

All are dimensionless. float16 and bfloat16 are computed, and returned, in float32. Rows are divided by their largest
magnitude, so nothing overflows or underflows. NaN or infinity in a row gives NaN, and so does n = 0. |x| has slope 0
at 0, and all-zero rows have gradient 0, also where their value is NaN. Raises: TypeError unless `x` is a
floating-point tensor, `dim` an int and `eps` a number; ValueError where `x` is 0-d, or `dim` or `eps` out of range.

Each says which axioms of Hurley & Rickard (2009) it keeps. D1 Robin Hood (mass goes from a larger element to a smaller
one, which stays the smaller) and D3 rising tide (a constant is added to a row not constant) make a row less sparse; P1
Bill Gates (an element, once large, grows; in a one-hot row that is a scaling) and P2 babies (a zero is appended) make
it sparser; D2 scaling and D4 cloning (the row is repeated) change nothing.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sparseout._utils.validation import (
    check_bool,
    check_dim,
    check_floating,
    check_int,
    check_positive,
    expected,
)

__all__ = ["MEASURES", "density", "gini", "hoyer", "kurtosis", "sparsity", "treves_rolls"]


class Rows(NamedTuple):
    raw: Tensor  # |x|: what the threshold is compared with
    unit: Tensor  # |x| in a unit in which powers stay in range; its dtype is that of the sums
    threshold: float | Tensor  # what exceeds it is active


def active(rows: Rows) -> Tensor:
    """1 where active, else 0; NaN where not finite (raw - raw is 0 for every finite number)."""
    return (rows.raw > rows.threshold) + (rows.raw - rows.raw).detach()


def _ranked(rows: Rows, dim: int) -> Tensor:
    """Sum of (2k - n - 1)/n times the k-th smallest: Gini's numerator over |x|_1, exactly 0 for constants."""
    n = rows.unit.shape[dim]
    weights = (2 * torch.arange(n, dtype=rows.unit.dtype, device=rows.unit.device) + 1 - n) / n
    return (rows.unit.movedim(dim, -1).sort().values * weights).sum(-1)


_STATISTICS: dict[str, Callable[[Rows, int], Tensor]] = {
    "sum1": lambda rows, dim: rows.unit.sum(dim),
    "sum2": lambda rows, dim: rows.unit.square().sum(dim),
    "sum4": lambda rows, dim: rows.unit.square().square().sum(dim),
    "active": lambda rows, dim: active(rows).sum(dim, dtype=rows.unit.dtype),
    "ranked": _ranked,  # the only one that does not add up over chunks
}


class Measure(NamedTuple):
    """An entry of `MEASURES`: value(n, *statistics), and whether an all-zero row has one."""

    statistics: tuple[str, ...]
    value: Callable[..., Tensor]
    zero_defined: bool = False


MEASURES: dict[str, Measure] = {
    "hoyer": Measure(("sum1", "sum2"), lambda n, s1, s2: (n**0.5 - s1 / s2**0.5) / (n**0.5 - 1)),
    "gini": Measure(("ranked", "sum1"), lambda n, ranked, s1: ranked / s1),
    "treves_rolls": Measure(("sum1", "sum2"), lambda n, s1, s2: s1**2 / s2 / n),
    "sparsity": Measure(("active",), lambda n, active: 1 - active / n, zero_defined=True),
    "density": Measure(("active",), lambda n, active: active / n, zero_defined=True),
    "kurtosis": Measure(("sum2", "sum4"), lambda n, s2, s4: s4 / s2 / s2 * n),
}
# |x|_1/|x|_2. Dead units leave it alone, and mean Hoyer over any number of units is affine in its mean.
RATIO = Measure(("sum1", "sum2"), lambda n, s1, s2: s1 / s2**0.5)
Table = Mapping[str, Measure]


def statistics_of(table: Table, rows: Rows, dim: int) -> dict[str, Tensor]:
    names = dict.fromkeys(name for measure in table.values() for name in measure.statistics)
    return {name: _STATISTICS[name](rows, dim) for name in names}


def _value(
    measure: Measure, n: int | Tensor, statistics: Mapping[str, Tensor], zero: Tensor, undefined: float
) -> Tensor:
    values = [statistics[name] for name in measure.statistics]
    if measure.zero_defined:
        return measure.value(n, *values)
    # Ones in place of zeros: an undefined value then has slope 0 and not NaN.
    return measure.value(n, *(s.masked_fill(zero, 1) for s in values)).masked_fill(zero, undefined)


def totals_of(table: Table, n: int | Tensor, statistics: Mapping[str, Tensor], zero: Tensor) -> dict[str, Tensor]:
    """The sum of each measure over the rows where it is defined."""
    return {k: _value(m, n, statistics, zero, 0).sum(dtype=torch.float64) for k, m in table.items()}


def rows_of(x: Tensor, dim: int, eps: float, relative: bool) -> tuple[Rows, Tensor]:
    """The rows of `x` and which of them are all zero."""
    raw = (x if x.dtype == torch.float64 else x.float()).abs()
    size = raw.detach()
    peak = size.amax(dim, keepdim=True) if x.shape[dim] else size.sum(dim, keepdim=True)
    unit = raw / peak.masked_fill(peak == 0, 1)  # no slope through the scale: every measure cancels it
    rms = unit.detach().square().mean(dim, keepdim=True).sqrt() * peak if relative else 1.0
    return Rows(raw, unit, eps * rms), (peak == 0).squeeze(dim)


def check_tensor(x: Tensor, dim: int, name: str = "dim") -> None:
    check_floating("x", x)
    check_int(name, dim)
    if x.ndim == 0:
        raise ValueError(expected("x", "a tensor of at least one dimension", "a 0-d one"))
    check_dim(name, dim, x.ndim)


def check_eps(eps: float, relative: bool) -> None:
    check_positive("eps", eps, zero=True)
    check_bool("relative", relative)


def _measure(name: str, x: Tensor, dim: int, eps: float = 0.0, relative: bool = False) -> Tensor:
    check_tensor(x, dim)
    check_eps(eps, relative)
    rows, zero = rows_of(x, dim, eps, relative)
    statistics = statistics_of({name: MEASURES[name]}, rows, dim)
    return _value(MEASURES[name], x.shape[dim], statistics, zero, math.nan)


def hoyer(x: Tensor, dim: int = -1) -> Tensor:
    r"""Hoyer's measure: from 0, all elements alike, to 1, a single one that is not zero.

    .. math:: (\sqrt n - |x|_1 / |x|_2) \, / \, (\sqrt n - 1)

    In [0, 1] up to rounding: 0 for constant |x|, 1 for one-hot. NaN for all-zero rows and for n = 1.
    Keeps D1, D2, D3, P1, and P2 but that one-hot rows stay at 1. Breaks D4: [2, 1] has 0.18 and its clone
    [2, 1, 2, 1] has 0.10, so beside rows of another length look at `gini` or `treves_rolls` too.

    Args:
        x: rows of n elements along `dim`; the result has the other dims.
        dim: the dim of a row's elements.

    Raises:
        ValueError: for a dim out of range.
        TypeError: for an argument of another type, or an x that is not of floating point.

    Source: Hoyer (2004), "Non-negative matrix factorization with sparseness constraints", JMLR 5.

    Example:
        >>> hoyer(torch.tensor([[0.0, 5.0, 0.0, 0.0], [2.0, -2.0, 2.0, 2.0]]))
        tensor([1., 0.])
    """
    return _measure("hoyer", x, dim)


def gini(x: Tensor, dim: int = -1) -> Tensor:
    r"""Gini's coefficient of the magnitudes, for rows of different length.

    .. math:: 1 - 2 \sum_k \frac{|x|_{(k)}}{|x|_1} \, \frac{n - k + 1/2}{n}, \quad |x|_{(1)} \le \dots \le |x|_{(n)}

    In [0, 1 - 1/n]: 0 for constant |x|, 1 - 1/n for one-hot. NaN for all-zero rows.
    Keeps all six axioms. It needs a sort, and has a kink where magnitudes tie: one of the slopes is taken.

    Args:
        x: rows of n elements along `dim`; the result has the other dims.
        dim: the dim of a row's elements.

    Raises:
        ValueError: for a dim out of range.
        TypeError: for an argument of another type, or an x that is not of floating point.

    Source: Hurley & Rickard (2009), "Comparing measures of sparsity", IEEE Trans. Inf. Theory 55, table I.

    Example:
        >>> gini(torch.tensor([[0.0, 5.0, 0.0, 0.0], [2.0, -2.0, 2.0, 2.0]]))
        tensor([0.7500, 0.0000])
    """
    return _measure("gini", x, dim)


def treves_rolls(x: Tensor, dim: int = -1) -> Tensor:
    r"""Treves-Rolls: how dense a row is.

    .. math:: (\operatorname{mean} |x|)^2 \, / \, \operatorname{mean} x^2

    In [1/n, 1], and *falls* as rows get sparser: 1 for constant |x|, k/n for k equal elements among zeros.
    NaN for all-zero rows. 1 - treves_rolls keeps all six axioms: it orders rows as the pq-mean of Hurley &
    Rickard at p = 1, q = 2 does. The selectivity of Vinje & Gallant (2000, Science 287), in [0, 1], is
    (1 - treves_rolls(x)) / (1 - 1/n). It breaks D4: [2, 1] has 0.20, [2, 1, 2, 1] has 0.13.

    Args:
        x: rows of n elements along `dim`; the result has the other dims.
        dim: the dim of a row's elements.

    Raises:
        ValueError: for a dim out of range.
        TypeError: for an argument of another type, or an x that is not of floating point.

    Source: Treves & Rolls (1991), Network 2, for rates >= 0; of signed x the magnitudes are taken.

    Example:
        >>> treves_rolls(torch.tensor([[0.0, 5.0, 0.0, 0.0], [2.0, -2.0, 2.0, 2.0]]))
        tensor([0.2500, 1.0000])
    """
    return _measure("treves_rolls", x, dim)


def sparsity(x: Tensor, dim: int = -1, *, eps: float = 0.0, relative: bool = False) -> Tensor:
    r"""The fraction of elements that are zero, or close to zero.

    .. math:: \#\{i : |x_i| \le \mathrm{eps}\} \, / \, n

    In [0, 1]; 1 for all-zero rows. A count: it has no gradient.
    At eps = 0 it keeps D2, D4, and P2 for rows not all zero, and breaks D1, D3, P1, blind to how large a
    nonzero is: [3, 1], [2.5, 1.5], [4, 2], [9, 1] all have 0. An absolute eps > 0 breaks D2 too, and D1 can
    turn round (eps = 1: [1.1, 0.5] has 0.5, [0.9, 0.7] has 1). A relative one keeps D2 and breaks P2
    (eps = 1: [1, 1] has 1, [1, 1, 0] has 0.33).

    Args:
        x: rows of n elements along `dim`; the result has the other dims.
        dim: the dim of a row's elements.
        eps: magnitudes up to it count as zero; finite, >= 0.
        relative: `eps` is in units of the root mean square of the row.

    Raises:
        ValueError: for a dim out of range or an eps < 0.
        TypeError: for an argument of another type, or an x that is not of floating point.

    Source: l0 and l0_eps of Hurley & Rickard (2009), table I, as fractions; a count breaks D4.

    Example:
        >>> sparsity(torch.tensor([0.0, 0.1, -3.0, 0.0]), eps=0.1)
        tensor(0.7500)
    """
    return _measure("sparsity", x, dim, eps, relative)


def density(x: Tensor, dim: int = -1, *, eps: float = 0.0, relative: bool = False) -> Tensor:
    r"""The fraction of elements that are active: 1 - `sparsity`.

    .. math:: \#\{i : |x_i| > \mathrm{eps}\} \, / \, n

    In [0, 1]; 0 for all-zero rows. The axioms are those of :func:`sparseout.measures.sparsity`, turned round.

    Args:
        x: rows of n elements along `dim`; the result has the other dims.
        dim: the dim of a row's elements.
        eps: magnitudes up to it count as zero; finite, >= 0.
        relative: `eps` is in units of the root mean square of the row.

    Raises:
        ValueError: for a dim out of range or an eps < 0.
        TypeError: for an argument of another type, or an x that is not of floating point.

    Source: l0 and l0_eps of Hurley & Rickard (2009), table I, as fractions.

    Example:
        >>> density(torch.tensor([0.0, 0.1, -3.0, 0.0]))
        tensor(0.5000)
    """
    return _measure("density", x, dim, eps, relative)


def kurtosis(x: Tensor, dim: int = -1) -> Tensor:
    r"""Kurtosis about 0: how heavy the tails are.

    .. math:: n \sum x^4 \, / \, (\sum x^2)^2

    The fourth standardised moment about 0. In [1, n]: 1 for constant |x|, n for one-hot; 3 for zero-mean
    Gaussian x as n grows. NaN for all-zero rows.
    Keeps D2, D3, D4, P1, P2. Breaks D1: [10, 2, 0] has 2.78, [10, 1, 1] has 2.88.

    Args:
        x: rows of n elements along `dim`; the result has the other dims.
        dim: the dim of a row's elements.

    Raises:
        ValueError: for a dim out of range.
        TypeError: for an argument of another type, or an x that is not of floating point.

    Source: n times kappa_4 of Hurley & Rickard (2009), table I, which without the n breaks D4 and P2 too.

    Example:
        >>> kurtosis(torch.tensor([[0.0, 5.0, 0.0, 0.0], [2.0, -2.0, 2.0, 2.0]]))
        tensor([4., 1.])
    """
    return _measure("kurtosis", x, dim)
