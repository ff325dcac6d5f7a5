"""k-winners-take-all: sparsity by decree."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from sparseout._utils.validation import expected, kind
from sparseout.baselines.arguments import at_least_0, number

_WISH = "a whole number >= 1 (of units) or a number > 0 and < 1 (the fraction of them)"


class KWinners(nn.Module):
    r"""Keeps the k largest of the units and sets the others to zero, in training and in evaluation.

    .. math::
        y_i = x_i \, [\, i \in W \,], \qquad
        W = \operatorname{top}_k \; x_j \, b_j, \qquad
        b_j = e^{\beta (k / n - d_j)}, \qquad
        d_j \leftarrow (1 - \mu) \, d_j + \mu \, \overline{[\, j \in W \,]}

    Exactly k of the n units win, ties or not; a winner may be zero. The gradient goes to the winners only, unchanged.
    The boost b changes who wins and not what a winner is worth: units that have won less often than k / n, by their
    duty cycle d, are preferred; only differences between duty cycles matter. They begin at 0, move with every call in
    training, and are a buffer: they are in the ``state_dict``, and in evaluation the choice is boosted by them as
    training left them. Boosting is meant for activations that are not negative: a negative one is pushed the wrong way.

    The n units that compete are those of a row along the last dim; in a map (N, C, H, W) or volume all C H W of an
    example, as in Ahmad & Scheinkman, so that an image may use more units where more is to be seen. A map shares
    its weights over positions, so its duty cycles are per channel, means over the positions. Under data parallelism
    they are those of the first process, as batch norm's statistics are.

    Args:
        k: how many win: a whole number >= 1, or a fraction of n in (0, 1), rounded, of which at least one unit is made.
        k_eval: the same in evaluation, where some more may help; None for k.
        boost: :math:`\beta`, a finite number >= 0; at 0 there is no boost.
        momentum: :math:`\mu`, the weight of the newest batch, in (0, 1].
        units: number of units (channels of a map), each of which has a duty cycle. None: as the first input has; the
            buffer is empty until then, and compiled code breaks there once.

    Shape:
        - Input: (*, units), (N, units, H, W) or (N, units, D, H, W).
        - Output: the same.

    Raises:
        ValueError: for a value out of range; for an input of another number of units, or of fewer than k.
        TypeError: for an argument of another type.

    Example:
        >>> layer = KWinners(2)
        >>> layer(torch.tensor([[1.0, 3.0, 2.0, 0.0]]))
        tensor([[0., 3., 2., 0.]])
        >>> layer.duty_cycle
        tensor([0.0000, 0.0100, 0.0100, 0.0000])

    Source: Makhzani & Frey (2013), k-sparse autoencoders, section 2, which takes k larger in evaluation; Ahmad &
    Scheinkman (2019), How can we be so dense? The benefits of using highly sparse representations, which adds the boost
    and the duty cycles.
    """

    duty_cycle: Tensor

    def __init__(
        self,
        k: float = 0.1,
        *,
        k_eval: float | None = None,
        boost: float = 1.0,
        momentum: float = 0.01,
        units: int | None = None,
    ) -> None:
        super().__init__()
        self.k = _count("k", k)
        self.k_eval = None if k_eval is None else _count("k_eval", k_eval)
        self.boost = at_least_0("boost", boost)
        self.momentum = number("momentum", momentum, "a number > 0 and <= 1", lambda momentum: 0 < momentum <= 1)
        if units is not None and (isinstance(units, bool) or not isinstance(units, int)):
            raise TypeError(expected("units", "None or an int", kind(units)))
        if units is not None and units < 1:
            raise ValueError(expected("units", "at least 1", units))
        self.register_buffer("duty_cycle", torch.zeros(units or 0))

    def forward(self, x: Tensor) -> Tensor:
        maps = x.dim() in (4, 5)
        if x.dim() == 0 or x.shape[1 if maps else -1] == 0:
            raise ValueError(expected("x", "of at least one dim and one unit", f"shape {tuple(x.shape)}"))
        rows = x.detach().flatten(1) if maps else x.detach().reshape(-1, x.shape[-1])
        units, competing = x.shape[1 if maps else -1], rows.shape[1]
        k = _of(self.k, competing, "k")
        if self.duty_cycle.numel() == 0:
            self.duty_cycle.resize_(units).zero_()
        if len(self.duty_cycle) != units:
            raise ValueError(expected("x", f"an input of {len(self.duty_cycle)} units, as before", f"one of {units}"))
        now = k if self.training or self.k_eval is None else _of(self.k_eval, competing, "k_eval")
        if self.boost:
            wins = (self.boost * (k / competing - self.duty_cycle.to(rows.device))).exp()
            rows = rows * wins.repeat_interleave(competing // units)
        winners = rows.topk(now, sorted=False).indices
        won = torch.zeros(rows.shape, dtype=torch.bool, device=x.device).scatter_(1, winners, True)
        if self.training and len(rows):
            share = won.view(len(rows), units, -1).to(self.duty_cycle.dtype).mean((0, 2))
            self.duty_cycle.lerp_(share, self.momentum)
        won = won.view(x.shape)
        if not x.is_contiguous():  # the result has the memory format of x
            won = torch.empty_like(x, dtype=torch.bool).copy_(won)
        return torch.where(won, x, 0.0)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        found = state_dict.get(f"{prefix}duty_cycle")
        if isinstance(found, Tensor) and 0 in (found.numel(), self.duty_cycle.numel()):
            self.duty_cycle.resize_(found.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        more = f", k_eval={self.k_eval}" if self.k_eval is not None else ""
        return f"k={self.k}{more}, boost={self.boost}, momentum={self.momentum}"


def _count(name: str, value: Any) -> float:
    """The number as it was given: an int, or a float below 1."""
    number(name, value, _WISH, lambda k: 0 < k < 1 or (k >= 1 and isinstance(value, Integral)))
    return int(value) if isinstance(value, Integral) else float(value)


def _of(k: float, competing: int, name: str) -> int:
    """How many of so many win."""
    count = k if isinstance(k, int) else max(1, round(k * competing))
    if count > competing:
        raise ValueError(expected(name, f"at most {competing}, the units that compete", count))
    return count
