"""The layers: modules that keep the arguments of the function, as `nn.Dropout` and `nn.Dropout1d/2d/3d` do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparseout._utils.tracing import as_step
from sparseout._utils.validation import check_bool, check_scalar, expected
from sparseout.functional import (
    Gradient,
    Scale,
    check_dims,
    check_gradient,
    check_p,
    check_q,
    check_scale,
    check_seed,
    sparseout,
)


class Sparseout(nn.Module):
    r"""Perturbs the input in training by :math:`y = x + \beta\,\operatorname{sign}(x)\,|x|^{q/2}\,\xi`.

    Replaces :class:`torch.nn.Dropout`, with one more parameter: with q < 2 activations become sparser, with q = 2 it is
    Dropout, with q > 2 they become denser. In evaluation it returns its input. See :func:`sparseout.sparseout` for the
    equation, the arguments, and why ``gradient="detached"``, the default, is not the derivative of the output.

    Args:
        p: probability that the mask is 0, in [0, 1], or a 0-d floating-point tensor without gradient, which can be
            changed in place with no recompilation and stays where it is: best fp64 on the CPU.
        q: exponent: a finite number >= 0, or a 0-d floating-point tensor without gradient, which can be
            changed in place with no recompilation and keeps its dtype when the module is cast.
        inplace: overwrite the input with the result.
        gradient: ``"detached"`` or ``"exact"``.
        scale: ``None``, a float > 0, or ``"matched"``.
        shared_dims: dims along which one draw is shared; ``(0,)`` on (time, batch, features) is the locked mask
            of language models.
        seed: an int or a 0-d int64 tensor for the same mask on every call, ``None`` for a new one each time.

    Shape:
        - Input: :math:`(*)`, any shape.
        - Output: :math:`(*)`, the same shape, dtype and memory format.

    Raises:
        ValueError: for a value out of range, when the layer is built.
        TypeError: for an argument of another type, booleans for ``p`` and ``q`` included.

    Example:
        >>> import torch, sparseout
        >>> layer = sparseout.Sparseout(p=0.5, q=1.5)
        >>> layer
        Sparseout(p=0.5, q=1.5)
        >>> x = torch.rand(20, 16)
        >>> layer(x).shape
        torch.Size([20, 16])
        >>> layer.eval()(x) is x
        True

    Source: Khan & Stavness (2019), section 3.
    """

    _is_noise: ClassVar = True  # monitor and penalties watch its input

    def __init__(
        self,
        p: float | Tensor = 0.5,
        q: float | Tensor = 2.0,
        inplace: bool = False,
        *,
        gradient: Gradient = "detached",
        scale: Scale = None,
        shared_dims: Sequence[int] = (),
        seed: int | Tensor | None = None,
    ) -> None:
        super().__init__()
        self.p = (
            check_scalar("p", p) if isinstance(p, Tensor) else check_p(p)
        )  # no numbers of other libraries, which would stop the compiler
        self.q = check_q(q)
        self.inplace = check_bool("inplace", inplace)
        self.gradient = check_gradient(gradient)
        self.scale = check_scale(scale)
        self.seed = check_seed(seed)
        self.shared_dims = check_dims(shared_dims)

    def forward(self, input: Tensor) -> Tensor:
        if (step := as_step(self, input)) is not None:
            return step  # type: ignore[return-value]
        return sparseout(
            input,
            self.p,
            self.q,
            self.training,
            self.inplace,
            gradient=self.gradient,
            scale=self.scale,
            shared_dims=self._dims(input),
            seed=self.seed,
        )

    def _dims(self, input: Tensor) -> Sequence[int]:
        return self.shared_dims

    def extra_repr(self) -> str:
        shown = [f"p={self.p!s}, q={self.q!s}"]
        defaults = {"inplace": False, "gradient": "detached", "scale": None, "shared_dims": (), "seed": None}
        for name, default in defaults.items():
            value = getattr(self, name)
            if isinstance(value, Tensor) or value != default:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Tensors for q and seed move with the module but keep their dtype, and stay out of the state_dict. So nothing
        # would give them back what they lose on the meta device, where a model goes for `functional_call`.
        for name in ("q", "seed"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and (device := fn(value).device).type != "meta":
                if value.is_meta:
                    wanted = "a tensor with a value, made with device='cpu' where the default device is meta"
                    raise RuntimeError(expected(name, wanted, "one on the meta device"))
                moved = value.to(device)
                try:
                    value.data = moved  # another layer, or whoever moves q, may hold the same tensor
                except RuntimeError:  # on some devices it must be a new one
                    setattr(self, name, moved)
        return self


_CHANNEL_DROPOUT = {1: F.dropout1d, 2: F.dropout2d, 3: F.dropout3d}


def _channel_dims(input: Any, spatial: int, channels: Mapping[int, int], other: int | None, active: bool) -> list[int]:
    """The dims within a channel, for every number of dims that torch's layer takes, with that layer's warnings."""
    if not isinstance(input, Tensor):
        return []  # the function says what is wrong
    ndim, channel = input.dim(), channels.get(input.dim(), other)
    if channel is None:
        raise ValueError(expected("input", "of shape (N, C, L) or (C, L)", _shape(input)))
    if ndim not in channels:
        if not input.is_nested:
            _CHANNEL_DROPOUT[spatial](input, 0.5, False)  # warns and does nothing
        if active and ndim <= channel:
            raise ValueError(expected("input", f"of {channel + 1} dims or more", _shape(input)))
    return list(range(channel + 1, ndim))


def _shape(input: Tensor) -> str:
    return f"{input.dim()} dims" if input.is_nested else f"shape {tuple(input.shape)}"


# What looks at the input is one step of a graph also where torch.fx, which has stand-ins for tensors, traces the layer.
for _name in ("sparseout", "_channel_dims"):
    fx.wrap(_name)


class _ChannelSparseout(Sparseout):
    """One draw for each channel, with the input shapes of torch's layer of the same number."""

    channel_dims: ClassVar[Mapping[int, int]]  # input.dim() -> where its channels are
    _other_channel: ClassVar[int | None]  # where they are in an input of any other number of dims
    _spatial: ClassVar[int]

    def __init__(
        self,
        p: float | Tensor = 0.5,
        q: float | Tensor = 2.0,
        inplace: bool = False,
        *,
        gradient: Gradient = "detached",
        scale: Scale = None,
        seed: int | Tensor | None = None,
    ) -> None:
        super().__init__(p, q, inplace, gradient=gradient, scale=scale, seed=seed)

    def _dims(self, input: Any) -> Sequence[int]:
        active = self.training and (isinstance(self.p, Tensor) or 0 < self.p < 1)
        return _channel_dims(input, self._spatial, self.channel_dims, self._other_channel, active)


class Sparseout1d(_ChannelSparseout):
    r"""Sparseout with one draw for each channel of a sequence, as :class:`torch.nn.Dropout1d` drops them.

    .. math:: y = x + \beta\,\operatorname{sign}(x)\,|x|^{q/2}\,\xi

    with one :math:`\xi` for all elements of a channel of an example: :class:`Sparseout` with ``shared_dims`` the dims
    within a channel.

    Args:
        p: probability that a channel's mask is 0, in [0, 1].
        q: exponent, as in :class:`Sparseout`: below 2 sparser, above 2 denser, at 2 :class:`torch.nn.Dropout1d`.
        inplace: overwrite the input with the result.
        gradient: ``"detached"`` or ``"exact"``.
        scale: ``None``, a float > 0, or ``"matched"``.
        seed: an int or a 0-d int64 tensor for the same mask on every call, ``None`` for a new one each time.

    Shape:
        - Input: :math:`(N, C, L)` or :math:`(C, L)`.
        - Output: the same.

    Raises:
        ValueError: for a value out of range, when the layer is built; for an input of another shape.
        TypeError: for an argument of another type.

    Example:
        >>> import torch, sparseout
        >>> layer = sparseout.Sparseout1d(p=0.5, q=1.0, seed=0)
        >>> layer(torch.ones(2, 3, 4)).std(dim=2).max()  # a channel moves as one
        tensor(0.)

    Source: Khan & Stavness (2019), section 3; for whole channels Tompson et al. (2015), Efficient object localization
    using convolutional networks.
    """

    channel_dims = {2: 0, 3: 1}
    _other_channel = None
    _spatial = 1


class Sparseout2d(_ChannelSparseout):
    r"""Sparseout with one draw for each feature map, as :class:`torch.nn.Dropout2d` drops them.

    .. math:: y = x + \beta\,\operatorname{sign}(x)\,|x|^{q/2}\,\xi

    with one :math:`\xi` for all elements of a channel of an example: :class:`Sparseout` with ``shared_dims`` the dims
    within a channel.

    Args:
        p: probability that a channel's mask is 0, in [0, 1].
        q: exponent, as in :class:`Sparseout`: below 2 sparser, above 2 denser, at 2 :class:`torch.nn.Dropout2d`.
        inplace: overwrite the input with the result.
        gradient: ``"detached"`` or ``"exact"``.
        scale: ``None``, a float > 0, or ``"matched"``.
        seed: an int or a 0-d int64 tensor for the same mask on every call, ``None`` for a new one each time.

    Shape:
        - Input: :math:`(N, C, H, W)`, or :math:`(N, C, L)`, which ``nn.Dropout2d`` accepts for historical reasons. With
          its warning also :math:`(N, C)`, in which each element is a channel, and :math:`(N, C, *)`.
        - Output: the same.

    Raises:
        ValueError: for a value out of range, when the layer is built; for an input of too few dims.
        TypeError: for an argument of another type.

    Example:
        >>> import torch, sparseout
        >>> layer = sparseout.Sparseout2d(p=0.2, q=2.5, scale="matched")
        >>> layer(torch.rand(2, 3, 4, 5)).shape
        torch.Size([2, 3, 4, 5])

    Source: Khan & Stavness (2019), section 3; for whole channels Tompson et al. (2015), Efficient object localization
    using convolutional networks.
    """

    channel_dims = {3: 1, 4: 1}
    _other_channel = 1
    _spatial = 2


class Sparseout3d(_ChannelSparseout):
    r"""Sparseout with one draw for each feature volume, as :class:`torch.nn.Dropout3d` drops them.

    .. math:: y = x + \beta\,\operatorname{sign}(x)\,|x|^{q/2}\,\xi

    with one :math:`\xi` for all elements of a channel of an example: :class:`Sparseout` with ``shared_dims`` the dims
    within a channel.

    Args:
        p: probability that a channel's mask is 0, in [0, 1].
        q: exponent, as in :class:`Sparseout`: below 2 sparser, above 2 denser, at 2 :class:`torch.nn.Dropout3d`.
        inplace: overwrite the input with the result.
        gradient: ``"detached"`` or ``"exact"``.
        scale: ``None``, a float > 0, or ``"matched"``.
        seed: an int or a 0-d int64 tensor for the same mask on every call, ``None`` for a new one each time.

    Shape:
        - Input: :math:`(N, C, D, H, W)` or :math:`(C, D, H, W)`; with the warning of ``nn.Dropout3d`` also whatever
          else that accepts, such as :math:`(C, *)`.
        - Output: the same.

    Raises:
        ValueError: for a value out of range, when the layer is built; for an input of too few dims.
        TypeError: for an argument of another type.

    Example:
        >>> import torch, sparseout
        >>> layer = sparseout.Sparseout3d(p=0.2, q=1.5)
        >>> layer(torch.rand(2, 3, 4, 5, 6)).shape
        torch.Size([2, 3, 4, 5, 6])

    Source: Khan & Stavness (2019), section 3; for whole channels Tompson et al. (2015), Efficient object localization
    using convolutional networks.
    """

    channel_dims = {4: 0, 5: 1}
    _other_channel = 0
    _spatial = 3
