"""The layers: modules that keep the arguments of the function, as `nn.Dropout` and `nn.Dropout1d/2d/3d` do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import Tensor, fx, nn

from sparseout._utils.validation import expected
from sparseout.functional import Gradient, Scale, check_arguments, sparseout


class Sparseout(nn.Module):
    r"""Perturbs the input in training by :math:`y = x + \beta\,\operatorname{sign}(x)\,|x|^{q/2}\,\xi`.

    Stands where :class:`torch.nn.Dropout` stands, with one more parameter: q < 2 makes activations sparser, q = 2
    is Dropout, q > 2 makes them denser. In evaluation it returns its input. See :func:`sparseout.sparseout` for the
    equation, the arguments, and why ``gradient="detached"``, the default, is not the derivative of the output.

    Args:
        p: probability that the mask is 0, in [0, 1].
        q: exponent: a finite number >= 0, or a 0-d fp32 tensor without gradient, which can be changed in place
            with no recompilation and stays fp32 when the module is cast.
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
        p: float = 0.5,
        q: float | Tensor = 2.0,
        inplace: bool = False,
        *,
        gradient: Gradient = "detached",
        scale: Scale = None,
        shared_dims: Sequence[int] = (),
        seed: int | Tensor | None = None,
    ) -> None:
        self.shared_dims = check_arguments(p, q, inplace, gradient, scale, shared_dims, seed)
        super().__init__()
        self.p = float(p)  # numbers of other libraries would stop the compiler
        self.q = q if isinstance(q, Tensor) else float(q)
        self.inplace = inplace
        self.gradient = gradient
        self.scale = scale
        self.seed = seed

    def forward(self, input: Tensor) -> Tensor:
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
        shown = [f"p={self.p}, q={self.q!s}"]
        defaults = {"inplace": False, "gradient": "detached", "scale": None, "shared_dims": (), "seed": None}
        for name, default in defaults.items():
            value = getattr(self, name)
            if isinstance(value, Tensor) or value != default:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Tensors for q and seed move with the module but keep their dtype, and stay out of the state_dict.
        for name in ("q", "seed"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                moved = value.to(fn(value).device)
                try:
                    value.data = moved  # another layer, or whoever moves q, may hold the same tensor
                except RuntimeError:  # to and from meta tensors it must be a new one
                    setattr(self, name, moved)
        return self


def _channel_dims(input: Any, dims: Mapping[int, tuple[int, ...]], shapes: str) -> Sequence[int]:
    if not isinstance(input, Tensor):
        return ()  # the function says what is wrong
    if input.dim() not in dims:
        raise ValueError(expected("input", f"of shape {shapes}", f"shape {tuple(input.shape)}"))
    return dims[input.dim()]


# What looks at the input is one step of a graph to torch.fx, which traces with stand-ins for tensors.
for _name in ("sparseout", "_channel_dims"):
    fx.wrap(_name)


class _ChannelSparseout(Sparseout):
    """One draw for each channel, with the input shapes of torch's layer of the same number."""

    channel_dims: ClassVar[Mapping[int, int]]  # input.dim() -> where its channels are
    _DIMS: ClassVar[Mapping[int, tuple[int, ...]]]  # input.dim() -> shared dims
    _SHAPES: ClassVar[str]

    def __init__(
        self,
        p: float = 0.5,
        q: float | Tensor = 2.0,
        inplace: bool = False,
        *,
        gradient: Gradient = "detached",
        scale: Scale = None,
        seed: int | Tensor | None = None,
    ) -> None:
        super().__init__(p, q, inplace, gradient=gradient, scale=scale, seed=seed)

    def _dims(self, input: Any) -> Sequence[int]:
        return _channel_dims(input, self._DIMS, self._SHAPES)


class Sparseout1d(_ChannelSparseout):
    r"""Sparseout with one draw for each channel of a sequence, as :class:`torch.nn.Dropout1d` drops them.

    The arguments are those of :class:`Sparseout` without ``shared_dims``.

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
    """

    channel_dims = {2: 0, 3: 1}
    _DIMS = {3: (2,), 2: (1,)}
    _SHAPES = "(N, C, L) or (C, L)"


class Sparseout2d(_ChannelSparseout):
    r"""Sparseout with one draw for each feature map, as :class:`torch.nn.Dropout2d` drops them.

    The arguments are those of :class:`Sparseout` without ``shared_dims``.

    Shape:
        - Input: :math:`(N, C, H, W)`, or :math:`(N, C, L)` as ``nn.Dropout2d`` takes it for historical reasons.
        - Output: the same.

    Raises:
        ValueError: for a value out of range, when the layer is built; for an input of another shape.
        TypeError: for an argument of another type.

    Example:
        >>> import torch, sparseout
        >>> layer = sparseout.Sparseout2d(p=0.2, q=2.5, scale="matched")
        >>> layer(torch.rand(2, 3, 4, 5)).shape
        torch.Size([2, 3, 4, 5])
    """

    channel_dims = {3: 1, 4: 1}
    _DIMS = {4: (2, 3), 3: (2,)}
    _SHAPES = "(N, C, H, W) or (N, C, L)"


class Sparseout3d(_ChannelSparseout):
    r"""Sparseout with one draw for each feature volume, as :class:`torch.nn.Dropout3d` drops them.

    The arguments are those of :class:`Sparseout` without ``shared_dims``.

    Shape:
        - Input: :math:`(N, C, D, H, W)` or :math:`(C, D, H, W)`.
        - Output: the same.

    Raises:
        ValueError: for a value out of range, when the layer is built; for an input of another shape.
        TypeError: for an argument of another type.

    Example:
        >>> import torch, sparseout
        >>> layer = sparseout.Sparseout3d(p=0.2, q=1.5)
        >>> layer(torch.rand(2, 3, 4, 5, 6)).shape
        torch.Size([2, 3, 4, 5, 6])
    """

    channel_dims = {4: 0, 5: 1}
    _DIMS = {5: (2, 3, 4), 4: (1, 2, 3)}
    _SHAPES = "(N, C, D, H, W) or (C, D, H, W)"
