"""Bridgeout: Sparseout's noise on weights, in place of activations."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseout._utils.unit_steps import padding_sizes
from sparseout._utils.validation import check_bool, check_positive, check_probability
from sparseout.baselines.rows import with_parts
from sparseout.baselines.weights import Layer, NoisyWeights, change_
from sparseout.functional import sparseout


def bridgeout_(module: Layer, p: float = 0.5, q: float = 1.5, *, per_example: bool = True) -> Layer:
    r"""Adds noise proportional to :math:`|w|^{q/2}` to the weights of a Linear or Conv2d, in training.

    .. math::
        \tilde w = w + |w|^{q/2} \, \xi, \qquad \xi = \frac{m}{1 - p} - 1, \qquad m \sim \operatorname{Bernoulli}(1 - p)

    so that :math:`E[\tilde w] = w` and :math:`\operatorname{Var}[\tilde w] = V |w|^q` with :math:`V = p / (1 - p)`.
    For linear regression this is an L_q penalty on the weights,

    .. math::
        E \|y - X \tilde w\|^2 = \|y - X w\|^2 + V \sum_j \|x_j\|^2 |w_j|^q

    where :math:`x_j` is a column of X. The equation is the paper's: the noise has no sign of w. With one, as Sparseout
    has for activations, mean, variance and penalty would be the same, and for p != 1/2 the skew of negative weights
    another; so at q = 2 this is DropConnect for weights that are positive, and for all if p = 1/2.

    The derivative is that of the equation, except that the slope of :math:`|w|^{q/2}` at 0 is taken as 0; weights below
    the smallest normal number of their dtype count as 0. In evaluation the layer is unchanged. Per example, a Linear
    makes a weight matrix for every row of its input, rows x out x in numbers, kept twice for backward, and a Conv2d
    runs as one convolution with a group for every image.

    Args:
        module: an ``nn.Linear`` or ``nn.Conv2d``; it remains the same object, with the same ``state_dict`` keys.
        p: probability that the mask is 0, in [0, 1).
        q: exponent of the penalty, a finite number >= 0, without unit.
        per_example: noise for every row of the input of a Linear (all but the last dim) or every image of a Conv2d;
            if False, one noise for the whole input: as cheap as the layer, and the examples' gradients share it.

    Returns:
        The module itself, until `sparseout.baselines.revert_` undoes it.

    Raises:
        ValueError: for a value out of range.
        TypeError: for another kind of module or argument.

    Example:
        >>> layer = bridgeout_(nn.Linear(3, 2), p=0.5, q=1.0)
        >>> layer
        BridgeoutLinear(in_features=3, out_features=2, bias=True, p=0.5, q=1.0, per_example=True)
        >>> layer(torch.ones(4, 3)).shape
        torch.Size([4, 2])

    Source: Khan, Shah & Stavness (2018), Bridgeout: stochastic bridge regularization for deep neural networks,
    arXiv 1804.08042.
    """
    return change_(module, _CLASSES, **check(p, q, per_example))


def check(p: float = 0.5, q: float = 1.5, per_example: bool = True) -> dict[str, Any]:
    """The arguments, if they are right."""
    check_bool("per_example", per_example)
    return {"p": check_probability(p), "q": check_positive("q", q, zero=True), "per_example": per_example}


def perturbed(weight: Tensor, p: float, q: float, examples: int | None = None) -> Tensor:
    """The weight with noise; so many of them, along a new first dim, if `examples` is a number."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    size = wide.abs()
    small = size < torch.finfo(wide.dtype).tiny  # also keeps the slope of the power finite
    power: Tensor = torch.where(small, 0.0, torch.where(small, 1.0, size) ** (q / 2))
    shape = weight.shape if examples is None else (examples, *weight.shape)
    # 1 + xi, the same at any q: Sparseout's generator makes it faster than torch's Bernoulli draws
    xi = sparseout(torch.ones(shape, dtype=wide.dtype, device=weight.device), p, 1.0).sub_(1)
    return (power * xi).add_(wide).to(weight.dtype)


class _Bridgeout(NoisyWeights):
    weight: Tensor
    bias: Any  # nn.Linear says a Tensor, though it can be None
    q: float
    per_example: bool

    def _noisy(self, input: Tensor) -> Tensor:
        if self.per_example:
            return self._for_each(input)
        return self._product(input, perturbed(self.weight, self.p, self.q), self.bias)

    def _for_each(self, input: Tensor) -> Tensor:
        raise NotImplementedError


class BridgeoutLinear(_Bridgeout, nn.Linear):
    """A Linear after :func:`sparseout.baselines.bridgeout_`."""

    def _for_each(self, input: Tensor) -> Tensor:
        if input.is_nested:
            return with_parts(input, [self(part) for part in input.unbind()])
        rows = input.reshape(-1, self.in_features)
        weights = perturbed(self.weight, self.p, self.q, rows.shape[0])
        out = torch.bmm(weights, rows.unsqueeze(-1)).view(*input.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class BridgeoutConv2d(_Bridgeout, nn.Conv2d):
    """A Conv2d after :func:`sparseout.baselines.bridgeout_`."""

    def _for_each(self, input: Tensor) -> Tensor:
        if input.dim() == 3 or input.shape[0] == 0:  # without a batch there is one example, or none
            return self._product(input, perturbed(self.weight, self.p, self.q), self.bias)
        x, padding = input, self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, padding_sizes(self), mode=self.padding_mode), (0, 0)
        weights = perturbed(self.weight, self.p, self.q, x.shape[0]).flatten(0, 1)
        groups = self.groups * x.shape[0]
        out = F.conv2d(x.flatten(0, 1), weights, None, self.stride, padding, self.dilation, groups)
        out = out.view(x.shape[0], self.out_channels, *out.shape[1:])
        return out if self.bias is None else out + self.bias.to(out.dtype).view(-1, 1, 1)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: BridgeoutLinear, nn.Conv2d: BridgeoutConv2d}
