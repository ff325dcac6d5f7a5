"""The theory as statements, each a number that is measured and the range that it must be in."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sparseout
from sparseout import theory
from sparseout.theory import BERNOULLI, GAUSSIAN, POISSON, Family
from sparseout_experiments.studies.theory import masks
from sparseout_experiments.studies.theory.masks import BIAS, FEATURES, TARGET, WEIGHT

QS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
PS = (0.25, 0.5)
ROUNDING = 1e-12  # of fp64, over some hundred terms
DIFFERENCES = 1e-7  # error of derivatives by differences
CLEAR = 1e-5  # what counts as different: a hundred times that
ERRORS = 4.0  # standard errors of a Monte-Carlo mean
SAMPLES = 200_000


class Check(NamedTuple):
    """A measured number of a statement, and the least and the most that it may be."""

    statement: str
    of: str
    measured: float
    least: float
    most: float

    @property
    def holds(self) -> bool:
        """Whether it is in the range; NaN is not."""
        return self.least <= self.measured <= self.most


def _gap(value: Tensor, reference: Tensor) -> float:
    return (value - reference).abs().max().item()


def _loss(family: Family, weight: Tensor = WEIGHT, bias: Tensor = BIAS) -> Tensor:
    return family.negative_log_likelihood(weight @ FEATURES + bias, TARGET)


def added(q: float, p: float, family: Family, weight: Tensor = WEIGHT, bias: Tensor = BIAS) -> tuple[float, float]:
    """E[loss] - loss and R."""
    exact = theory.expected_loss(FEATURES, weight, TARGET, p, q, family, bias=bias) - _loss(family, weight, bias)
    return exact.item(), theory.lq_penalty(FEATURES, weight, p, q, family, bias=bias).item()


def remainder(share: float, p: float, q: float, family: Family, theta: float) -> float:
    """E[loss] - loss - R at weights that are a share of the example's, and a bias that keeps theta."""
    exact, penalty = added(q, p, family, share * WEIGHT, theta - share * WEIGHT @ FEATURES)
    return exact - penalty


def bregman(q: float, family: Family) -> float:
    """E[loss] - loss over p as p falls to 0: of one drop or none, since two are of the order of p^2."""
    amplitude = WEIGHT * FEATURES.sign() * FEATURES.abs().pow(q / 2)
    theta = WEIGHT @ FEATURES + BIAS
    rest = family.log_partition(theta - amplitude) - family.log_partition(theta) + amplitude * family.mean(theta)
    return rest.sum().item()


def _equality() -> Iterator[Check]:
    worst = max(
        abs((masks.mean_loss(q, p, GAUSSIAN) - _loss(GAUSSIAN)).item() - added(q, p, GAUSSIAN)[1])
        for q in QS for p in PS
    )  # fmt: skip
    yield Check("gaussian", "largest error of loss + R against the mean over all masks", worst, 0, ROUNDING)
    for family in (POISSON, BERNOULLI):
        worst = max(
            abs((masks.mean_loss(q, p, family) - _loss(family)).item() - added(q, p, family)[0])
            for q in QS for p in PS
        )  # fmt: skip
        of = f"{family.name}: largest error of the closed form against the mean over all masks"
        yield Check("marginals", of, worst, 0, ROUNDING)
    for family in (GAUSSIAN, POISSON, BERNOULLI):
        worst = 0.0
        for index, q in enumerate(QS):
            estimate = theory.monte_carlo_loss(
                FEATURES, WEIGHT, TARGET, 0.25, q, family, bias=BIAS, samples=SAMPLES, seed=index
            )
            wanted = added(q, 0.25, family)[family is GAUSSIAN] + _loss(family)  # R itself for the Gaussian
            worst = max(worst, ((estimate.mean - wanted) / estimate.standard_error).abs().item())
        of = f"{family.name}: largest distance from Monte-Carlo, in standard errors"
        yield Check("monte-carlo", of, worst, 0, ERRORS)


def _orders() -> Iterator[Check]:
    for order in (2, 3, 4):
        share = theory.noise_moment(order, 2.0**-16) * 2**16
        sign = (-1.0) ** order
        yield Check("moments", f"E[xi^{order}] / p at p = 1/65536", share, sign - 1e-3, sign + 1e-3)
    cases = [
        (POISSON, 0.4, 0.25, 3, "Poisson, p = 0.25"),
        (BERNOULLI, 0.8, 0.25, 3, "Bernoulli, p = 0.25"),
        (POISSON, 0.4, 0.5, 4, "Poisson, p = 0.5"),
        (BERNOULLI, 0.8, 0.5, 4, "Bernoulli, p = 0.5"),
        (BERNOULLI, 0.0, 0.25, 4, "Bernoulli, p = 0.25, A''' = 0"),
    ]
    for family, theta, p, order, name in cases:
        slopes = [
            math.log2(abs(remainder(0.04, p, q, family, theta) / remainder(0.02, p, q, family, theta)))
            for q in QS
        ]  # fmt: skip
        worst = max(slopes, key=lambda slope: abs(slope - order))
        yield Check(f"order-{order}", f"{name}: slope of the remainder", worst, order - 0.1, order + 0.1)
    for family in (POISSON, BERNOULLI):
        p = 2.0**-16
        exact, penalty = added(1.0, p, family)
        yield Check("small-p", f"{family.name}: (E[loss] - loss) / R at p = 1/65536", exact / penalty, 0, math.inf)
        limit = bregman(1.0, family) * p / penalty
        of = f"{family.name}: the same over its limit as p falls"
        yield Check("small-p", of, exact / penalty / limit, 1 - 1e-3, 1 + 1e-3)
        yield Check("small-p", f"{family.name}: distance of that limit from 1", abs(limit - 1), 0.03, math.inf)


def _special() -> Iterator[Check]:
    x = torch.randn(20, len(WEIGHT), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    worst = 0.0
    for family in (GAUSSIAN, BERNOULLI, POISSON):
        information = torch.diag(x.T @ torch.diag(family.variance(x @ WEIGHT)) @ x)
        wanted = 0.25 / 0.75 / 2 * WEIGHT @ (information * WEIGHT)
        worst = max(worst, _gap(theory.lq_penalty(x, WEIGHT, 0.25, 2.0, family).sum() / wanted, torch.tensor(1.0)))
    of = "largest relative error at q = 2 against p/(1 - p) w' diag(X' V X) w / 2"
    yield Check("dropout", of, worst, 0, ROUNDING)
    count = (WEIGHT.square() * (FEATURES != 0)).sum()
    for q, most in ((0.0, ROUNDING), (1e-6, 1e-5)):
        penalty = theory.lq_penalty(FEATURES, WEIGHT, 0.5, q, GAUSSIAN)
        of = f"error against the sum of w^2 over non-zero features, halved, at q = {q:g}"
        yield Check("count", of, _gap(penalty, count / 2), 0, most)


def _gradients() -> Iterator[Check]:
    worst = dict.fromkeys(("exact", "detached", "marginal", "direct"), 0.0)
    for q in QS:
        for p in PS:
            wanted = masks.slopes_of(masks.loss_and_penalty(q, p, GAUSSIAN))
            exact, detached = (masks.mean_slopes(q, p, GAUSSIAN, mode) for mode in (True, False))
            worst["exact"] = max(worst["exact"], *map(_gap, exact, wanted))
            more = (1 - q / 2) * masks.direct(q, p, GAUSSIAN)
            wanted = wanted._replace(features=wanted.features + more)
            worst["detached"] = max(worst["detached"], *map(_gap, detached, wanted))
            for family in (POISSON, BERNOULLI):
                exact, detached = (masks.mean_slopes(q, p, family, mode) for mode in (True, False))
                wanted = masks.slopes_of(masks.expected(q, p, family))
                worst["marginal"] = max(worst["marginal"], *map(_gap, exact, wanted))
                inner = _through_theta(q, p, family)
                gaps = [_gap(q / 2 * (detached.features - inner), exact.features - inner)]
                worst["direct"] = max(worst["direct"], *gaps, *map(_gap, detached[1:], exact[1:]))
    largest = "largest error of the mean over all masks"
    yield Check("exact", f"Gaussian: {largest} against the gradient of loss + R", worst["exact"], 0, ROUNDING)
    of = f"Poisson, Bernoulli: {largest} against the gradient of E[loss]"
    yield Check("exact", of, worst["marginal"], 0, ROUNDING)
    for family in (POISSON, BERNOULLI):
        slopes = [math.log2(_from_penalty(q, family, 0.004) / _from_penalty(q, family, 0.002)) for q in QS]
        slope = max(slopes, key=lambda slope: abs(slope - 3))
        of = f"{family.name}, p = 0.25: slope of its distance from the gradient of loss + R"
        yield Check("exact", of, slope, 2.9, 3.1)
    of = f"Gaussian: {largest} against that gradient with its direct term times 2/q"
    yield Check("detached", of, worst["detached"], 0, ROUNDING)
    of = "Poisson, Bernoulli: largest error of q/2 times the direct part against that of the exact gradient"
    yield Check("detached", of, worst["direct"], 0, ROUNDING)
    yield from _no_loss()


def _from_penalty(q: float, family: Family, beta: float) -> float:
    """Distance of the mean exact gradient from that of loss + R, at amplitudes beta times the example's."""
    slopes = masks.mean_slopes(q, 0.25, family, exact=True, beta=beta)
    wanted = masks.slopes_of(masks.loss_and_penalty(q, 0.25, family, beta))
    return max(map(_gap, slopes, wanted))


def _through_theta(q: float, p: float, family: Family) -> Tensor:
    """The mean of the gradient in the features were the noise a constant: what is not direct."""
    xi, probability = masks.every_noise(p)
    noisy = FEATURES + FEATURES.sign() * FEATURES.abs().pow(q / 2) * xi
    return (probability @ (family.mean(noisy @ WEIGHT + BIAS) - TARGET)) * WEIGHT


def _no_loss() -> Iterator[Check]:
    p, kept = 0.25, FEATURES != 0
    n = int(kept.sum())
    for q in (1.0, 2.0, 3.0):
        gap = masks.asymmetry(q, p, GAUSSIAN, weight_too=True)[n:, :n]
        wanted = (q - 2) * p / (1 - p) * (WEIGHT * FEATURES.sign() * FEATURES.abs().pow(q - 1))[kept]
        of = f"q = {q:g}: error of the difference of cross derivatives against (q - 2) V w |h|^(q - 1) sign(h)"
        yield Check("no-loss", of, _gap(gap, torch.diag(wanted)), 0, DIFFERENCES)
        if q != 2:
            yield Check("no-loss", f"q = {q:g}: the largest such difference", gap.abs().max().item(), CLEAR, math.inf)
    for family, least, most in (
        (GAUSSIAN, 0.0, DIFFERENCES),
        (POISSON, CLEAR, math.inf),
        (BERNOULLI, CLEAR, math.inf),
    ):
        gap = masks.asymmetry(1.0, p, family, weight_too=False)
        of = f"{family.name}, weights fixed, q = 1: the largest difference"
        yield Check("fixed-weights", of, gap.abs().max().item(), least, most)


def _rescaling() -> Iterator[Check]:
    worst = dict.fromkeys(("penalty", "detached", "exact", "matched", "push"), 0.0)
    for q in QS:
        for family in (GAUSSIAN, POISSON, BERNOULLI):
            before = theory.lq_penalty(FEATURES, WEIGHT, 0.25, q, family, bias=BIAS)
            after = theory.lq_penalty(3 * FEATURES, WEIGHT / 3, 0.25, q, family, bias=BIAS)
            worst["penalty"] = max(worst["penalty"], abs((after / before * 3 ** (2 - q)).item() - 1))
            slopes = masks.slopes_by_mask(q, 0.25, family, exact=False)
            along = FEATURES * slopes.features - WEIGHT * slopes.weight
            worst["detached"] = max(worst["detached"], along.abs().max().item())
        mean = masks.mean_slopes(q, 0.25, GAUSSIAN, exact=True)
        share = WEIGHT.square() * torch.where(FEATURES == 0, 0.0, FEATURES.abs().pow(q)) * 0.25 / 0.75 / 2
        along = FEATURES * mean.features - WEIGHT * mean.weight
        worst["exact"] = max(worst["exact"], _gap(along, (q - 2) * share))
        penalty, rescaled, push = _matched(q)
        worst["matched"] = max(worst["matched"], abs(rescaled / penalty - 1))
        worst["push"] = max(worst["push"], abs(push - (q - 2) * penalty))
    of = "largest relative error of R(w/3, 3h) against 3^(q - 2) R(w, h)"
    yield Check("rescaling", of, worst["penalty"], 0, ROUNDING)
    of = "detached: largest part of the gradient along the rescaling, in any mask"
    yield Check("no-force", of, worst["detached"], 0, ROUNDING)
    of = "exact, Gaussian: largest error of its mean against (q - 2) R_j"
    yield Check("force", of, worst["exact"], 0, ROUNDING)
    of = "largest relative error of R(w/3, 3h) against R(w, h)"
    yield Check("matched", of, worst["matched"], 0, ROUNDING)
    of = "largest error of its gradient along the rescaling against (q - 2) R"
    yield Check("matched", of, worst["push"], 0, ROUNDING)


def _matched(q: float) -> tuple[float, float, float]:
    """With scale="matched": R, R of rescaled layers, and the gradient of R along the rescaling."""
    h, w = FEATURES.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    penalty = theory.lq_penalty(h, w, 0.25, q, GAUSSIAN, scale="matched")
    after = theory.lq_penalty(3 * FEATURES, WEIGHT / 3, 0.25, q, GAUSSIAN, scale="matched")
    slope_h, slope_w = torch.autograd.grad(penalty, (h, w))
    along = (FEATURES * slope_h - WEIGHT * slope_w).sum()
    return penalty.item(), after.item(), along.item()


def _consequences() -> Iterator[Check]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400_000, generator=generator, dtype=torch.float64).abs()
    for q in (1.0, 3.0):
        y = sparseout.sparseout(x, 0.5, q, seed=1)
        dropped = y < x
        moved = _gap(y[dropped], (x - x.pow(q / 2))[dropped])
        yield Check("moved", f"q = {q:g}: error of dropped units against x - |x|^(q/2)", moved, 0, ROUNDING)
        zero = (y[dropped] == 0).double().mean().item()
        yield Check("moved", f"q = {q:g}: share of dropped units that are zero", zero, 0, 0)
        negative = (y[dropped] < 0).double().mean().item()
        past = (x[dropped].pow(q / 2) > x[dropped]).double().mean().item()
        of = f"q = {q:g}: share of dropped units that changed sign, less the share with |x|^(q/2) > |x|"
        yield Check("moved", of, negative - past, 0, 0)
        yield Check("moved", f"q = {q:g}: that share, half-normal activations", negative, 0.1, 1)
    for q in (0.5, 1.0, 1.5):
        h = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(sparseout.sparseout(h, 0.5, q, seed=2).sum(), h)
        tail = (slope - 1).abs().sort(descending=True).values[:4001]
        exponent = 1 / (tail[:-1] / tail[-1]).log().mean().item()
        wanted, error = 2 / (2 - q), 2 / (2 - q) / 4000**0.5
        of = f"q = {q:g}: exponent of the tail of the slope (Hill's estimate from 4000 of 400,000)"
        yield Check("tails", of, exponent, wanted - ERRORS * error, wanted + ERRORS * error)


def of_training(record: Mapping[str, Any]) -> Iterator[Check]:
    """Check what was trained, of a record of results."""
    for row in record["equivalence"]:
        if row["q"] <= 1:  # gradients of infinite variance: how far descent comes is for the page to say
            continue
        if row["gradient"] == "exact":
            of = f"q = {row['q']:g}: relative distance of the features from those of the penalty"
            yield Check("equivalence", of, row["distance"], 0, row["near"])
        elif row["q"] != 2:
            of = f"q = {row['q']:g}, detached: the same from those of the penalty times 2/q"
            yield Check("equivalence-detached", of, row["distance"], 0, row["near"])
    for row in record["rescaling"]:
        last, q, decay = row["rows"][-1], row["q"], row["decay"]
        if row["gradient"] == "detached":
            share = abs(last["balance"] / last["predicted"])
            of = f"q = {q:g}, detached: change of the balance over what it would be under exact"
            yield Check("escape", of, share, 0, 0.05)
        elif decay:
            of = f"q = {q:g}, exact, weight decay: balance at the end over (2 - q) R / decay"
            yield Check("escape", of, last["balance"] * decay / ((2 - q) * last["penalty"]), 0.95, 1.05)
        else:
            of = f"q = {q:g}, exact: change of the balance over the integral of 2 (2 - q) R"
            yield Check("escape", of, last["balance"] / last["predicted"], 0.95, 1.05)


GROUPS: dict[str, Callable[[], Iterator[Check]]] = {
    "the penalty": _equality,
    "orders": _orders,
    "special cases": _special,
    "gradients": _gradients,
    "rescaling": _rescaling,
    "consequences": _consequences,
}
