"""k-winners-take-all: a fixed number of active units."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, NamedTuple, Self
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from sparseout._utils.activations import UnitDim, UnitTracker
from sparseout._utils.torch_internals import (
    backward_number,
    checkpoint_number,
    dispatch_mode_active,
    in_backward,
    is_recorded,
    is_transformed,
    may_be_empty,
    may_be_recomputed,
    outside_transforms,
    readable,
    transforms_active,
    without_transforms,
)
from sparseout._utils.tracing import as_step
from sparseout._utils.validation import check_int, check_number, check_positive, expected
from sparseout.baselines.rows import check_count, map_rows


class KWinners(nn.Module):
    r"""Keeps the k largest of the units and sets the others to zero, in training and in evaluation.

    .. math::
        y_i = x_i \, [\, i \in W \,], \qquad
        W = \operatorname{top}_k \; x_j \, b_j, \qquad
        b_j = e^{\beta (k / n - d_j)}, \qquad
        d_j \leftarrow (1 - \mu) \, d_j + \mu \, \overline{[\, j \in W \,]}

    Exactly k of the n units win, ties or not; a winner may be zero. The gradient goes to the winners only, unchanged.
    The boost b changes which units win and not their values: units that have won less often than k / n, by their duty
    cycle d, are preferred; only differences between duty cycles matter. Duty cycles start at 0, are updated in every
    call in training, and are a buffer in the ``state_dict``; in evaluation the choice is boosted by their last values.
    Boosting is meant for activations that are not negative: for a negative one it has the opposite effect.

    The n units that compete are those of a row along the last dim; in a map (N, C, H, W) or volume all C H W of an
    example, as in Ahmad & Scheinkman, so that an image may use more units where it has more content. A map shares its
    weights over positions, so its duty cycles are per channel, means over the positions. `unit_dim` gives the dim of
    the units: what follows that dim competes too, what precedes it are rows. Under data parallelism the duty cycles are
    those of the first process, as batch norm's statistics are. They are kept in fp32 in a model of a half dtype. A
    forward repeated by activation checkpointing makes the same choice, and does not update them.

    Args:
        k: number of winners: a whole number >= 1, or a fraction of n in (0, 1), rounded to at least one unit; the
            fraction may be a 0-d floating-point tensor without gradient, which can be changed in place with no
            recompilation (best fp64 on the CPU).
        k_eval: the same in evaluation, where a larger number may help; None for k.
        boost: :math:`\beta`, a finite number >= 0; at 0 there is no boost.
        momentum: :math:`\mu`, the weight of the newest batch, in (0, 1].
        units: number of units (channels of a map), each of which has a duty cycle. None: as the first input has; the
            buffer is empty until then, and compiled code breaks there once; what copies or shares buffers before that,
            such as ``AveragedModel(use_buffers=True)``, needs the number.
        unit_dim: where the units lie, if not along the last dim, or along dim 1 of a 4-d or 5-d input: -1 for the maps
            (N, H, W, units) that a Linear makes, unless `units` tells; 1 for sequences (N, units, L). Also a function
            of a name (""), the layer and its input, for a layer that meets both.

    Shape:
        - Input: (*, units), (N, units, H, W) or (N, units, D, H, W), or as `unit_dim` says. Nested tensors too, each
          example with its own rows.
        - Output: the same.

    Raises:
        ValueError: for a value out of range; for an input with another number of units, or with fewer than k.
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
        k: float | Tensor = 0.1,
        *,
        k_eval: float | Tensor | None = None,
        boost: float = 1.0,
        momentum: float = 0.01,
        units: int | None = None,
        unit_dim: UnitDim = None,
    ) -> None:
        super().__init__()
        self.k = check_count("k", k)
        self.k_eval = None if k_eval is None else check_count("k_eval", k_eval)
        self.boost = check_positive("boost", boost, zero=True)
        self.momentum = check_number("momentum", momentum, "a number > 0 and <= 1", lambda momentum: 0 < momentum <= 1)
        if units is not None:
            check_int("units", units, 1)
        self._tracker = UnitTracker(self, unit_dim)
        self._past = _Past()
        with torch.inference_mode(False):
            self.register_buffer("duty_cycle", torch.zeros(units or 0, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        if (step := as_step(self, x)) is not None:
            return step  # type: ignore[return-value]
        if x.dim() == 0:
            raise ValueError(expected("x", "of at least one dim and one unit", "shape ()"))
        return map_rows(x, self._unit_dim(x), self._keep)

    def _keep(self, parts: list[Tensor], dim: int) -> list[Tensor]:
        zero: Any = 0.0 if parts[0].is_floating_point() else 0  # whole numbers stay whole
        return [torch.where(won, part, zero) for won, part in zip(self._winners(parts, dim), parts, strict=True)]

    def _unit_dim(self, x: Tensor) -> int:
        units, plain = len(self.duty_cycle), self._tracker.unit_dim is None and not x.is_nested
        if plain and x.dim() in (4, 5) and x.shape[1] != units == x.shape[-1]:
            return x.dim() - 1
        return self._tracker.dim("", self, x)

    def _winners(self, parts: Sequence[Tensor], dim: int) -> list[Tensor]:
        """The mask of the winners in tensors with units along `dim`: what precedes it are rows, the rest competes."""
        units = parts[0].shape[dim]
        if self.duty_cycle.numel() == 0:
            self._resize_(units)
        if len(self.duty_cycle) != units:
            raise ValueError(expected("x", f"an input of {len(self.duty_cycle)} units, as before", f"one of {units}"))
        rows = [part.detach().reshape(math.prod(part.shape[:dim]), math.prod(part.shape[dim:])) for part in parts]
        duty_cycle = self._past.used(rows, self.duty_cycle) if self.training and self.boost else self.duty_cycle
        won = [self._choose(row, duty_cycle.to(row.device)) for row in rows]
        if self.training:
            self._count(won)
        return [_like(mask.view(part.shape), part) for mask, part in zip(won, parts, strict=True)]

    def _choose(self, rows: Tensor, duty_cycle: Tensor) -> Tensor:
        competing, units = rows.shape[1], len(duty_cycle)
        name = "k" if self.training or self.k_eval is None else "k_eval"
        k, now = readable(self.k), readable(getattr(self, name))
        if self.boost:
            exponent = self.boost * (_share(k, competing) - duty_cycle)
            exponent = exponent - (exponent.amax(0) - _MAX_EXPONENT).clamp(min=0)  # only differences matter
            rows = rows * exponent.exp().repeat_interleave(competing // units)
        if isinstance(now, Tensor):
            winners: Tensor = torch.ops.sparseout.winners(rows, now)
            return winners
        return _top(rows, _of(now, competing, name))

    def _count(self, won: Sequence[Tensor]) -> None:
        """Move the duty cycles."""
        together = transforms_active() and not is_transformed(self.duty_cycle)  # all examples of a vmap
        watched = not torch.compiler.is_compiling() and dispatch_mode_active()  # as by selective checkpointing
        if together or (watched and not is_recorded(won)):
            with outside_transforms():
                return self._move([without_transforms(mask).flatten(0, -2) for mask in won])
        return self._move(won)

    @torch.no_grad()
    def _move(self, won: Sequence[Tensor]) -> None:
        units = len(self.duty_cycle)
        positions: Any = sum(mask.numel() for mask in won) // units
        maybe_none = all(map(may_be_empty, won))  # to the compiler, which may not know
        if maybe_none and not torch.compiler.is_compiling():
            return
        by_unit = [mask.view(mask.shape[0], units, mask.shape[1] // units) for mask in won]
        wins = [mask.sum((0, 2), dtype=torch.float32) for mask in by_unit]
        share = torch.stack(wins).sum(0).to(self.duty_cycle)
        share = share / (torch.sym_max(positions, 1) if maybe_none else positions)
        if maybe_none:
            share = torch.where(share.any(), share, self.duty_cycle)
        move = torch.ops.sparseout.moved_duty_cycle if _is_compiled() else _moved
        self.duty_cycle.copy_(move(self.duty_cycle, share, self.momentum))

    def _resize_(self, units: int) -> None:  # torch's own crashes where memory is shared
        self.duty_cycle.set_(self.duty_cycle.new_zeros(units).untyped_storage(), 0, (units,), (1,))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.duty_cycle
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if _is_half(self.duty_cycle.dtype):  # in which a mean that runs stands still
            self.duty_cycle = before.to(self.duty_cycle.device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        key = f"{prefix}duty_cycle"
        loaded = state_dict.get(key)
        if isinstance(loaded, Tensor):
            if 0 in (loaded.numel(), self.duty_cycle.numel()):
                self._resize_(loaded.numel())
            if _is_half(loaded.dtype):
                state_dict[key] = loaded.float()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a pickle's attributes, or those of the first version, which had fewer."""
        super().__setstate__({"_tracker": UnitTracker(self), "_past": _Past()} | state)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        more = f", k_eval={self.k_eval}" if self.k_eval is not None else ""
        return f"k={self.k!s}{more}, boost={self.boost}, momentum={self.momentum}"


_MAX_EXPONENT = 40.0  # e^40 = 2e17 times any activation is still a number


def _top(rows: Tensor, count: int) -> Tensor:
    """The mask of so many winners of each row."""
    winners = rows.topk(count, sorted=False).indices
    return torch.zeros_like(rows).scatter(1, winners, 1.0) != 0  # of floats, as jit.trace has no scatter of a bool


def _share(k: float | Tensor, competing: int) -> float | Tensor:
    """The part of so many units that wins."""
    if isinstance(k, Tensor):  # in compiled code
        return (k.double() * competing).round().clamp(min=1) / competing
    return _of(k, competing, "k") / competing


def _of(k: Any, competing: int, name: str) -> int:
    """The number of winners among so many units."""
    count = k if isinstance(k, int) else max(1, round(float(check_count(name, k)) * competing))
    if count > competing:
        raise ValueError(expected(name, f"at most {competing}, the units that compete", count))
    return count


def _like(won: Tensor, x: Tensor) -> Tensor:
    """The mask in the memory format of x, which the result then has."""
    return won if x.is_contiguous() else torch.empty_like(x, dtype=torch.bool).copy_(won)


def _is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16)


class _Forward(NamedTuple):
    """A forward under a checkpoint."""

    sums: Tensor  # of the rows that it was given
    duty_cycle: Tensor  # by which it chose
    checkpoint: int | None
    backward: int | None = None  # the latest that computed it again


class _Past:
    """The duty cycles by which forwards under a checkpoint chose, for when backward computes them again.

    A forward is known by the sums of what it was given. Of equal ones those of the latest checkpoint are the first to
    be computed again, in their order where it is known which checkpoint they are of (not with `use_reentrant=True`),
    in each backward once. They are kept until the next forward, for a second backward through the same graph.
    """

    def __init__(self) -> None:
        self._forwards: deque[_Forward] = deque(maxlen=256)
        number = next(_numbers)
        _pasts[number] = self
        with torch.inference_mode(False):
            self._ticket = torch.tensor([number], device="cpu")

    def used(self, rows: Sequence[Tensor], duty_cycle: Tensor) -> Tensor:
        """The duty cycles by which a forward on these rows chooses."""
        if torch.compiler.is_exporting():
            return duty_cycle
        if _is_compiled():
            used: Tensor = torch.ops.sparseout.used_duty_cycle(self._ticket, duty_cycle, _sums(rows))
            return used
        if not (in_backward() or may_be_recomputed()) or is_recorded(rows) or is_transformed(duty_cycle):
            return duty_cycle
        with outside_transforms():
            return self.find(_sums([without_transforms(row).flatten(0, -2) for row in rows]), duty_cycle)

    def find(self, sums: Tensor, duty_cycle: Tensor) -> Tensor:
        """The same, by the sums of the rows; what is there is kept for another time, or taken if this is it."""
        if not in_backward():
            if may_be_recomputed():
                kept = [forward for forward in self._forwards if forward.backward is None]
                kept.append(_Forward(sums, duty_cycle.clone(), checkpoint_number()))
                self._forwards = deque(kept, maxlen=256)
            return duty_cycle
        past, this = self._forwards, backward_number()
        equal = [i for i, known in enumerate(past) if known.backward != this and torch.equal(known.sums, sums)]
        if not equal:
            return duty_cycle
        number = past[equal[-1]].checkpoint
        mates = [index for index in equal if number is not None and past[index].checkpoint == number]
        index = min(mates, default=equal[-1])
        past[index] = past[index]._replace(backward=this)
        return past[index].duty_cycle

    def __reduce__(self) -> Any:
        return _Past, ()


def _sums(rows: Sequence[Tensor]) -> Tensor:
    return torch.cat([row.sum(0, dtype=torch.float32) for row in rows])


# Compiled code calls these as ops, which run as Python at every call and so know whether it is in backward. The ticket
# says whose past it is; it is a tensor, as a number would be guarded on.
_pasts: WeakValueDictionary[int, _Past] = WeakValueDictionary()
_numbers = count()
_library = torch.library.Library("sparseout", "FRAGMENT")


def _used(ticket: Tensor, duty_cycle: Tensor, sums: Tensor) -> Tensor:
    return _pasts[int(ticket[0])].find(sums, duty_cycle).clone()


def _moved(duty_cycle: Tensor, share: Tensor, momentum: float) -> Tensor:
    """The next duty cycles; where a checkpoint computes its forward again, the same."""
    recomputed = not torch.compiler.is_exporting() and in_backward()
    return duty_cycle.clone() if recomputed else duty_cycle.lerp(share, momentum)


def _winners_of(rows: Tensor, k: Tensor) -> Tensor:
    return _top(rows, _of(float(k), rows.shape[-1], "k"))


def _batched_winners(info: Any, in_dims: Any, rows: Tensor, k: Tensor) -> Any:
    rows = rows.movedim(in_dims[0], 0)
    return torch.ops.sparseout.winners(rows.flatten(0, 1), k).view(rows.shape), 0


_library.define("winners(Tensor rows, Tensor k) -> Tensor")
_library.impl("winners", _winners_of, "CompositeExplicitAutograd")
torch.library.register_fake(
    "sparseout::winners", lambda rows, k: torch.empty_like(rows, dtype=torch.bool), lib=_library
)
torch.library.register_vmap("sparseout::winners", _batched_winners, lib=_library)
_library.define("used_duty_cycle(Tensor ticket, Tensor duty_cycle, Tensor sums) -> Tensor")
_library.define("moved_duty_cycle(Tensor duty_cycle, Tensor share, float momentum) -> Tensor")
_library.impl("used_duty_cycle", _used, "CompositeExplicitAutograd")
_library.impl("moved_duty_cycle", _moved, "CompositeExplicitAutograd")
torch.library.register_fake("sparseout::used_duty_cycle", lambda ticket, cycle, sums: cycle.clone(), lib=_library)
torch.library.register_fake("sparseout::moved_duty_cycle", lambda cycle, share, weight: cycle.clone(), lib=_library)


def _is_compiled() -> bool:
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()
