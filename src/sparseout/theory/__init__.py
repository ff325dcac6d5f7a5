r"""The effect of the noise on the loss of a generalized linear model: closed forms, exact means, Monte-Carlo estimates.

A model with natural parameter :math:`\theta = b + w \cdot h` and log-partition A has the loss
:math:`A(\theta) - y \theta - \log g(y)`. Perturb the features h by Sparseout and average:

.. math::
    E[\text{loss}] = \text{loss} + R + \text{remainder}, \qquad
    R = \tfrac{1}{2} A''(\theta) \frac{p}{1 - p} \beta^2 \sum_j w_j^2 |h_j|^q

:func:`sparseout.theory.lq_penalty` is R, :func:`sparseout.theory.expected_loss` the exact left side, and
:func:`sparseout.theory.monte_carlo_loss` an estimate of it with the library's own noise. The remainder is of third
order in the amplitudes :math:`\beta w_j |h_j|^{q/2}`, and zero for `GAUSSIAN`.

Source: Khan & Stavness (2019), Sparseout: Controlling Sparsity in Deep Networks, section 3; for q = 2, Wager, Wang &
Liang (2013), Dropout Training as Adaptive Regularization, section 2. ``docs/theory.md`` has the derivations.
"""

from sparseout.theory.families import BERNOULLI, GAUSSIAN, POISSON, Family
from sparseout.theory.penalty import Estimate, expected_loss, lq_penalty, monte_carlo_loss, noise_moment

__all__ = [
    "BERNOULLI",
    "GAUSSIAN",
    "POISSON",
    "Estimate",
    "Family",
    "expected_loss",
    "lq_penalty",
    "monte_carlo_loss",
    "noise_moment",
]
