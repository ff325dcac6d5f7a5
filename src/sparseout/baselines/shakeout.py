"""Shakeout: Dropout that replaces the weights of a dropped unit by a constant of opposite sign."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sparseout._utils.validation import check_positive, check_probability
from sparseout.baselines.weights import Layer, NoisyWeights, change_


def shakeout_(module: Layer, p: float = 0.5, c: float = 0.01) -> Layer:
    r"""Enhances or reverses, in training, what each input of a Linear or Conv2d contributes.

    For input unit j and each of its weights :math:`w_{ij}`, with one draw for the unit:

    .. math::
        \tilde w_{ij} = \begin{cases}
            -c \, \operatorname{sign}(w_{ij}) & \text{with probability } p \\
            (w_{ij} + c \, p \, \operatorname{sign}(w_{ij})) / (1 - p) & \text{otherwise}
        \end{cases}

    so that :math:`E[\tilde w] = w`. For linear regression, with :math:`x_j` a column of X, this adds a penalty with
    L0, L1 and L2 terms,

    .. math::
        E \|y - X \tilde w\|^2 = \|y - X w\|^2 + R, \qquad
            R = \frac{p}{1 - p} \sum_j \|x_j\|^2 \, [w_j \ne 0] \, (|w_j| + c)^2

    At c = 0 it is Dropout on the layer's input: same bits, same random numbers. The draw is for every element of the
    input, as Dropout's, for a Conv2d too: all weights that meet the element share it. The sign of a weight is a
    constant for autograd. In evaluation the layer is unchanged. The cost is a second product of the layer, without a
    weight matrix per example.

    Args:
        module: an ``nn.Linear`` or ``nn.Conv2d``; it remains the same object, with the same ``state_dict`` keys.
        p: the paper's tau, the probability that a unit is reversed, in [0, 1).
        c: the constant, a finite number >= 0, in the unit of the weights: its effect is strong if it is of their size.

    Returns:
        The module itself, until `sparseout.baselines.revert_` undoes it.

    Raises:
        ValueError: for a value out of range.
        TypeError: for another kind of module or argument.

    Example:
        >>> shakeout_(nn.Linear(3, 2), p=0.5, c=0.1)
        ShakeoutLinear(in_features=3, out_features=2, bias=True, p=0.5, c=0.1)

    Source: Kang, Li & Tao (2016), Shakeout: a new regularized deep neural network training scheme, AAAI.
    """
    return change_(module, _CLASSES, **check(p, c))


def check(p: float = 0.5, c: float = 0.01) -> dict[str, Any]:
    """The arguments, if they are right."""
    return {"p": check_probability(p), "c": check_positive("c", c, zero=True)}


class _Shakeout(NoisyWeights):
    weight: Tensor
    bias: Any  # nn.Linear says a Tensor, though it can be None
    c: float

    def _noisy(self, input: Tensor) -> Tensor:
        # with r = m / (1 - p) the weights are r w + c (r - 1) sign(w)
        dropped = F.dropout(input, self.p)
        out = self._product(dropped, self.weight, self.bias)
        return out + self._product(dropped - input, self.c * self.weight.detach().sign(), None) if self.c else out


class ShakeoutLinear(_Shakeout, nn.Linear):
    """A Linear after :func:`sparseout.baselines.shakeout_`."""


class ShakeoutConv2d(_Shakeout, nn.Conv2d):
    """A Conv2d after :func:`sparseout.baselines.shakeout_`."""


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: ShakeoutLinear, nn.Conv2d: ShakeoutConv2d}
