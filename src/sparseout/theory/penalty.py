"""The penalty that the noise amounts to, and the expected loss that it approximates."""

from typing import NamedTuple

import torch
from torch import Tensor

from sparseout._utils.validation import check_floating, check_int, expected, type_name
from sparseout.functional import Scale, check_p, check_q, check_scale, sparseout
from sparseout.kernels import reference
from sparseout.kernels.mask import variance
from sparseout.theory.families import Family, enumerated


class Estimate(NamedTuple):
    """A Monte-Carlo estimate, as :func:`sparseout.theory.monte_carlo_loss` returns it.

    Attributes:
        mean: over the draws, of the shape of theta and target.
        standard_error: of that mean, of the same shape: the standard deviation over the draws by the root of their
            number.

    Example:
        >>> import torch
        >>> from sparseout import theory
        >>> one = torch.ones(1)
        >>> mean, error = theory.monte_carlo_loss(one, one, one[0], p=0.5, q=2.0, family=theory.GAUSSIAN, samples=100)
        >>> mean.shape, error.item() < 0.1
        (torch.Size([]), True)
    """

    mean: Tensor
    standard_error: Tensor


def noise_moment(order: int, p: float) -> float:
    r"""The central moment :math:`E[\xi^k] = (1 - p) (p / (1 - p))^k + (-1)^k p` of the noise.

    0 for k = 1, p / (1 - p) for k = 2, and for every k > 1 of the order of p as p falls to 0: the k-th moment is not
    the k-th power of something small.

    Args:
        order: k, an int >= 0.
        p: probability of a drop, 0 <= p < 1.

    Raises:
        ValueError: for a value outside these ranges.
        TypeError: for an argument of another type.

    Example:
        >>> from sparseout import theory
        >>> [theory.noise_moment(k, 0.5) for k in (1, 2, 3, 4)]
        [0.0, 1.0, 0.0, 1.0]

    Source: the moments of a Bernoulli variable, shifted and scaled; the noise is that of Khan & Stavness (2019).
    """
    check_int("order", order, least=0)
    _check_noise(p, 2.0, None)
    sign = 1 if order % 2 == 0 else -1
    return (1 - p) * variance(p) ** order + sign * p


def lq_penalty(
    features: Tensor,
    weight: Tensor,
    p: float,
    q: float | Tensor,
    family: Family,
    *,
    bias: float | Tensor = 0.0,
    scale: Scale = None,
) -> Tensor:
    r"""The increase of the expected loss by Sparseout on the features, to second order in its amplitude.

    .. math::
        R = \tfrac{1}{2} A''(\theta) \frac{p}{1 - p} \beta^2 \sum_j w_j^2 |h_j|^q, \qquad
        \theta = b + \sum_j w_j h_j

    Exact for the Gaussian. Otherwise the remainder begins with
    :math:`\tfrac{1}{6} A'''(\theta) E[\xi^3] \sum_j a_j^3`, of third order in the amplitudes
    :math:`a_j = \beta w_j \operatorname{sign}(h_j) |h_j|^{q/2}`. At p = 0.5, where :math:`E[\xi^3] = 0`, or where
    :math:`A'''(\theta) = 0`, it is of fourth order. For a given amplitude a small p does not
    make it small relative to R.

    Args:
        features: h, shape (..., d), of a floating-point dtype.
        weight: w, shape (d,), or any that broadcasts against ``features``: for k outputs, features (..., 1, d) and
            weights (k, d).
        p: probability of a drop, 0 <= p < 1, taken as it is. (``sparseout`` rounds it to a multiple of 2^-16.)
        q: exponent, a finite number >= 0, or a 0-d floating-point tensor. At 0, R counts the
            features that are not zero.
        family: ``GAUSSIAN``, ``BERNOULLI``, ``POISSON``, or another :class:`sparseout.theory.Family`.
        bias: b, a number or a tensor that broadcasts against theta.
        scale: sets beta as in :func:`sparseout.sparseout`: ``None`` is 1, the paper's. No gradient flows through it.

    Returns:
        A tensor of theta's shape, (...), differentiable in features, weight and bias. Its slope in a feature is 0
        where the feature is 0.

    Raises:
        ValueError: for a value outside the ranges above, or shapes that do not fit.
        TypeError: for an argument of another type.

    Example:
        >>> import torch
        >>> from sparseout import theory
        >>> h, w = torch.tensor([0.0, 4.0, -9.0]), torch.tensor([5.0, 1.0, 2.0])
        >>> theory.lq_penalty(h, w, p=0.5, q=1.0, family=theory.GAUSSIAN)  # (1 * 4 + 4 * 9) / 2
        tensor(20.)
        >>> theory.lq_penalty(h, w, p=0.5, q=0.0, family=theory.GAUSSIAN)  # (1 + 4) / 2
        tensor(2.5000)

    Source: Khan & Stavness (2019), section 3. q = 2: Wager, Wang & Liang (2013), section 2. beta is this library's.
    """
    theta = _theta(features, weight, p, q, family, bias, scale)
    spread = weight.square() * _power(features, q) * _beta(features, q, scale) ** 2
    return family.variance(theta) * variance(p) * spread.sum(-1) / 2


def expected_loss(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    p: float,
    q: float | Tensor,
    family: Family,
    *,
    bias: float | Tensor = 0.0,
    scale: Scale = None,
) -> Tensor:
    r"""The mean over all masks of the negative log-likelihood with Sparseout on the features, exactly.

    .. math::
        E[A(\theta + \delta)] - y \theta - \log g(y), \qquad
        \delta = \beta \sum_j w_j \operatorname{sign}(h_j) |h_j|^{q/2} \xi_j

    The noise has mean 0, so what it adds does not depend on the target. Gaussian: the second moment. Poisson: the
    product over j of :math:`(1 - p) e^{a_j p / (1 - p)} + p e^{-a_j}`. Bernoulli, and families without an
    ``expected_log_partition``: all 2^d masks, for up to 16 features.

    Args:
        features: h. All arguments but ``target`` are those of :func:`sparseout.theory.lq_penalty`.
        weight: w.
        target: y, outcomes of the family (not checked), a tensor that broadcasts against theta.
        p: probability of a drop, 0 <= p < 1, taken as it is.
        q: exponent.
        family: ``GAUSSIAN``, ``BERNOULLI``, ``POISSON``, or another :class:`sparseout.theory.Family`.
        bias: b.
        scale: sets beta.

    Returns:
        A tensor of the shape of theta and target, differentiable as R is.

    Raises:
        ValueError: for a value outside its range, shapes that do not fit, or too many features to enumerate.
        TypeError: for an argument of another type.

    Example:
        >>> import torch
        >>> from sparseout import theory
        >>> h, w, y = torch.tensor([1.0, 4.0]), torch.tensor([0.2, -0.1]), torch.tensor(1.0)
        >>> exact = theory.expected_loss(h, w, y, p=0.25, q=1.0, family=theory.POISSON)
        >>> loss = theory.POISSON.negative_log_likelihood(h @ w, y)
        >>> exact - loss, theory.lq_penalty(h, w, p=0.25, q=1.0, family=theory.POISSON)
        (tensor(0.0110), tensor(0.0109))

    Source: as `lq_penalty`. Poisson: the moment generating function of a sum of independent terms.
    """
    theta = _theta(features, weight, p, q, family, bias, scale)
    _check_target(target, theta)
    term = features.sign() * _power(features, q / 2) * _beta(features, q, scale)
    marginal = family.expected_log_partition or enumerated(family.log_partition)
    return marginal(theta, weight * term, float(p)) - target * theta - family.log_base(target)


@torch.no_grad()
def monte_carlo_loss(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    p: float,
    q: float | Tensor,
    family: Family,
    *,
    bias: float | Tensor = 0.0,
    scale: Scale = None,
    samples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    r"""The mean of the negative log-likelihood over draws of the library's own noise, with its standard error.

    .. math::
        \frac1S \sum_{s=1}^S \left[ A(\theta_s) - y \theta_s - \log g(y) \right], \qquad
        \theta_s = b + \sum_j w_j \tilde h_{sj}

    with :math:`\tilde h_s` the features after Sparseout in draw s. Applies :func:`sparseout.sparseout` to ``samples``
    copies of the features, all at once: memory grows with their number.

    Args:
        features: h. The arguments down to ``scale`` are those of :func:`sparseout.theory.expected_loss`.
        weight: w.
        target: y.
        p: probability of a drop, 0 <= p < 1, rounded to a multiple of 2^-16, as in every call of Sparseout.
        q: exponent.
        family: ``GAUSSIAN``, ``BERNOULLI``, ``POISSON``, or another :class:`sparseout.theory.Family`.
        bias: b.
        scale: sets beta.
        samples: number of draws, an int >= 2.
        seed: of the noise, an int.

    Returns:
        Mean and standard error of the mean, each of the shape of theta and target. Not differentiable.

    Raises:
        ValueError: for a value outside its range, or shapes that do not fit.
        TypeError: for an argument of another type.

    Example:
        >>> import torch
        >>> from sparseout import theory
        >>> h, w, y = torch.tensor([1.0, 4.0]), torch.tensor([0.2, -0.1]), torch.tensor(1.0)
        >>> found = theory.monte_carlo_loss(h, w, y, p=0.25, q=1.0, family=theory.POISSON)
        >>> exact = theory.expected_loss(h, w, y, p=0.25, q=1.0, family=theory.POISSON)
        >>> bool((found.mean - exact).abs() < 4 * found.standard_error)
        True

    Source: Khan & Stavness (2019), section 3, for what is estimated.
    """
    _check_target(target, _theta(features, weight, p, q, family, bias, scale))
    check_int("samples", samples, least=2)
    check_int("seed", seed)
    copies = features.expand(samples, *features.shape).contiguous()
    noisy = sparseout(copies, p, q, scale=scale, seed=seed)
    losses = family.negative_log_likelihood((noisy * weight).sum(-1) + bias, target)
    return Estimate(losses.mean(0), losses.std(0) / samples**0.5)


def _power(features: Tensor, exponent: float | Tensor) -> Tensor:
    """|h|^exponent. At h = 0 it and its slope are 0 for every exponent, 0 included, since sign(0) is 0."""
    size = features.abs()
    zero = size == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, size).pow(exponent))


def _beta(features: Tensor, q: float | Tensor, scale: Scale) -> float | Tensor:
    if scale is None:
        return 1.0
    scale_unit, amplitude = reference.matched(features, q) if scale == "matched" else (float(scale), 1.0)
    return amplitude * scale_unit ** (1 - q / 2)


def _theta(
    features: Tensor, weight: Tensor, p: float, q: float | Tensor, family: Family, bias: float | Tensor, scale: Scale
) -> Tensor:
    """The natural parameter, after checking its arguments and those of the noise."""
    _check_noise(p, q, scale)
    if not isinstance(family, Family):
        raise TypeError(expected("family", "a Family, such as theory.GAUSSIAN", type_name(family)))
    for name, value in (("features", features), ("weight", weight)):
        check_floating(name, value)
    if isinstance(bias, bool) or not isinstance(bias, (int, float, Tensor)):
        raise TypeError(expected("bias", "a number or a tensor", type_name(bias)))
    if features.dim() == 0:
        raise ValueError(expected("features", "a tensor of at least one dimension", "a 0-d one"))
    if weight.shape[-1:] != features.shape[-1:]:
        wanted = f"of shape (..., {features.shape[-1]}), as many as there are features"
        raise ValueError(expected("weight", wanted, tuple(weight.shape)))
    _check_fit("weight", weight, features.shape)
    theta = (features * weight).sum(-1)
    _check_fit("bias", bias, theta.shape)
    return theta + bias


def _check_noise(p: float, q: float | Tensor, scale: Scale) -> None:
    check_p(p)
    check_q(q)
    check_scale(scale)
    if p == 1:
        raise ValueError(expected("p", "< 1, beyond which the noise has no variance", p))


def _check_target(target: Tensor, theta: Tensor) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(expected("target", "a tensor", type_name(target)))
    _check_fit("target", target, theta.shape)


def _check_fit(name: str, value: float | Tensor, shape: torch.Size) -> None:
    try:
        torch.broadcast_shapes(value.shape if isinstance(value, Tensor) else (), shape)
    except RuntimeError:
        got = tuple(value.shape) if isinstance(value, Tensor) else value
        raise ValueError(expected(name, f"of a shape that broadcasts with {tuple(shape)}", got)) from None
