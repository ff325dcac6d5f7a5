"""Data of the figures of the penalty: R, exact and estimated, against q, the amplitude and p."""

from typing import Any

from sparseout import theory
from sparseout.theory import BERNOULLI, GAUSSIAN, POISSON
from sparseout_experiments.studies.theory.masks import BIAS, FEATURES, TARGET, WEIGHT
from sparseout_experiments.studies.theory.statements import SAMPLES, added, bregman, remainder

P = 0.25
ORDERS = ((POISSON, 0.4), (BERNOULLI, 0.8))  # families and the theta at which their remainder is looked at
SHARES = tuple(2.0 ** (-index / 2) for index in range(11))  # of the example's amplitude
DROPS = tuple(2.0**-index for index in range(1, 17))


def penalties() -> list[dict[str, Any]]:
    """Of each family, what the noise adds to the loss against q."""
    grid, marks = [index / 10 for index in range(41)], [index / 2 for index in range(9)]
    curves = []
    for family in (GAUSSIAN, BERNOULLI, POISSON):
        loss = family.negative_log_likelihood(WEIGHT @ FEATURES + BIAS, TARGET).item()
        estimates = [
            theory.monte_carlo_loss(
                FEATURES, WEIGHT, TARGET, P, q, family, bias=BIAS, samples=SAMPLES, seed=100 + index
            )
            for index, q in enumerate(marks)
        ]
        both = [added(q, P, family) for q in grid]
        curves.append(
            {
                "family": family.name,
                "q": grid,
                "exact": [exact for exact, _ in both],
                "penalty": [penalty for _, penalty in both],
                "estimated": {
                    "q": marks,
                    "mean": [estimate.mean.item() - loss for estimate in estimates],
                    "standard_error": [estimate.standard_error.item() for estimate in estimates],
                },
            }
        )
    return curves


def remainders() -> list[dict[str, Any]]:
    """Distance of R from the exact value, against the amplitude, at q = 1."""
    return [
        {
            "family": family.name,
            "p": p,
            "share": list(SHARES),
            "remainder": [abs(remainder(share, p, 1.0, family, theta)) for share in SHARES],
        }
        for family, theta in ORDERS
        for p in (0.25, 0.5)
    ]


def ratios() -> list[dict[str, Any]]:
    """Ratio of the exact value to R, against p, at q = 1, and its limit as p falls."""
    curves = []
    for family in (GAUSSIAN, BERNOULLI, POISSON):
        both = [added(1.0, p, family) for p in DROPS]
        limit = bregman(1.0, family) * DROPS[-1] / (1 - DROPS[-1]) / both[-1][1]
        ratio = [exact / penalty for exact, penalty in both]
        curves.append({"family": family.name, "p": list(DROPS), "ratio": ratio, "limit": limit})
    return curves
