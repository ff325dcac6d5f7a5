"""The parameters of the noise, and their two forms: for the equation, and for an op that torch can register."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Scalar = float | Tensor
ScaleArgument = float | Literal["matched"] | None
Numbers = tuple[float, float, float]  # NoiseParams of floats


class NoiseParams(NamedTuple):
    """The noise term is `amplitude * scale_unit * sign(x) |x / scale_unit|^(q/2) * xi`: beta in two factors.

    Each is a float or a 0-d tensor. As `pack` gives them to an op they are three floats; or, where one of them is a
    tensor, a tensor of the last two behind a float q, or of all three. A q that is moved then costs neither a
    recompilation nor a wait for the device, and a kernel may take shortcuts for a q that is known.
    """

    q: Scalar
    scale_unit: Scalar = 1.0
    amplitude: Scalar = 1.0

    def balanced(self, dtype: torch.dtype) -> NoiseParams:
        """The same noise, with all of beta in the amplitude wherever that is a number of `dtype`.

        For q < 4 no x can then overflow or vanish between the steps of the equation, where x / scale_unit could. From
        q = 4 on the power of x itself might, and what overflows or vanishes in x / scale_unit does so in the noise.
        """
        q, unit, amplitude = self
        if isinstance(q, float) and (q >= 4 or q == 2):
            return self if q >= 4 else NoiseParams(q, 1.0, 1.0)  # at q = 2 beta is 1, and not up to rounding
        limit = math.log2(torch.finfo(dtype).max) - 3
        if isinstance(q, float) and isinstance(unit, float) and isinstance(amplitude, float):
            fits = abs(math.log2(amplitude) + (1 - q / 2) * math.log2(unit)) < limit
            return NoiseParams(q, 1.0, amplitude * unit ** (1 - q / 2)) if fits else self
        beta = amplitude * unit ** (1 - q / 2)
        if isinstance(q, Tensor):
            beta = torch.where(q == 2, 1.0, torch.where(q < 4, beta, 0.0))  # 0 fits nowhere
        fits = (beta > 2.0**-limit) & (beta < 2.0**limit)
        one = torch.ones_like(beta)  # two floats would be chosen between in the default dtype
        return NoiseParams(q, torch.where(fits, one, unit), torch.where(fits, beta, amplitude))

    def to(self, device: torch.device, dtype: torch.dtype) -> NoiseParams:
        """The same with its tensors on this device and of this dtype."""
        return NoiseParams(*(value.to(device, dtype) if isinstance(value, Tensor) else value for value in self))

    def numbers(self) -> Numbers:
        """The same as floats, for which a device is waited for."""
        q, scale_unit, amplitude = self
        return float(q), float(scale_unit), float(amplitude)

    def pack(self, device: torch.device, dtype: torch.dtype) -> tuple[list[float], Tensor | None]:
        """The two arguments of an op: what is a float, and one tensor of the others."""
        if all(isinstance(value, float) for value in self):
            return list(self), None  # type: ignore[arg-type]
        floats = [value for value in self[:1] if isinstance(value, float)]
        others = [
            value if isinstance(value, Tensor) else torch.full((), value, device=device, dtype=dtype)
            for value in self.to(device, dtype)[len(floats) :]
        ]
        return floats, torch.stack(others)

    @classmethod
    def unpack(cls, floats: Sequence[float], params_tensor: Tensor | None) -> NoiseParams:
        """The inverse of `pack`."""
        return cls(*floats) if params_tensor is None else cls(*floats, *params_tensor.unbind())


class NoiseArguments(NamedTuple):
    """The arguments of an op besides x and its gradient, from which the noise is made: see `NoiseParams.pack`.

    A `p_tensor`, a 0-d tensor that is read when the op runs, takes the place of `p`.
    """

    seed: Tensor
    p: float
    floats: Sequence[float]
    params_tensor: Tensor | None
    shared_dims: Sequence[int]
    exact: bool
    p_tensor: Tensor | None = None

    @property
    def params(self) -> NoiseParams:
        """What `floats` and `params_tensor` hold."""
        return NoiseParams.unpack(self.floats, self.params_tensor)
