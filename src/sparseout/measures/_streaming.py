"""Accumulation of measures over a stream of activations."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sparseout._utils.torch_internals import outside_transforms, transforms_active, without_transforms
from sparseout._utils.validation import check_int, expected, type_name
from sparseout.measures._functions import (
    MEASURES,
    RATIO,
    Measure,
    active,
    check_eps,
    check_tensor,
    rows_of,
    statistics_of,
    totals_of,
)


class Streaming:
    r"""Means of measures over a stream of activations, in memory that does not grow.

    Rows that are all zero are left out of the mean of a measure that is undefined for them. NaN or infinity in the data
    gives NaN.

    `compute` gives 0-d tensors: the means; rows, the number of samples; undefined_rows, those all zero; units;
    dead_units, active (see `density`) in no sample; always_on_units, active in all; and hoyer_live, Hoyer over live
    units alone, as a network can look sparse by killing units: on the population axis exact at eps = 0, where dead
    units add nothing to a norm (at eps > 0 what they hold stays in); on the lifetime axis the mean over live units.
    Before any update the counts are 0 and the rest is NaN.

    The state is float64, stays on the device of the data (`update` never waits for it) and merges by summing: across
    processes that have all seen a chunk, of shape (0, units) if need be, all_reduce each tensor of `state`, then
    `load_state`. Bad input raises TypeError or ValueError and leaves the state as it was.

    Args:
        measures: names in `sparseout.measures`.
        axis: ``"population"``: over the units of each sample, then the mean over samples. ``"lifetime"``: over all
            samples of each unit, then the mean over units; without gini, which needs whole rows, and for |x| in
            [1e-75, 1e75], for it sums raw powers.
        eps: magnitudes up to it count as zero.
        relative: `eps` is in units of the root mean square of the sample, over its units, on either axis.
        unit_dim: where units lie, 1 for an NCHW map; samples are along all other dims.

    Shape:
        - `update`: (*, units), or units along `unit_dim`; as many at every call.
        - `compute`: 0-d.

    Raises:
        ValueError: for an unknown measure or a value out of range; from `update`, for another number
            of units.
        TypeError: for an argument of another type.

    Example:
        >>> stream = Streaming(("hoyer", "density"))
        >>> stream.update(torch.tensor([[0.0, 5.0, 0.0, 0.0], [0.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
        >>> {name: round(value.item(), 3) for name, value in stream.compute().items()}
        {'hoyer': 0.793, 'density': 0.25, 'hoyer_live': 0.5, 'rows': 3, 'undefined_rows': 1,
         'units': 4, 'dead_units': 2, 'always_on_units': 0}

    Source: those of the measures; population and lifetime sparseness: Willmore & Tolhurst (2001), Characterizing the
    sparseness of neural codes.
    """

    def __init__(
        self,
        measures: Iterable[str] = ("hoyer", "treves_rolls", "density"),
        *,
        axis: str = "population",
        eps: float = 0.0,
        relative: bool = False,
        unit_dim: int = -1,
    ) -> None:
        if isinstance(measures, str) or not isinstance(measures, Iterable):
            raise TypeError(expected("measures", "a sequence of names", repr(measures)))
        names = tuple(measures)
        if unknown := [name for name in names if not isinstance(name, str) or name not in MEASURES]:
            raise ValueError(expected("measures", f"among {', '.join(MEASURES)}", repr(unknown[0])))
        if axis not in ("population", "lifetime"):
            raise ValueError(expected("axis", "'population' or 'lifetime'", repr(axis)))
        check_eps(eps, relative)
        check_int("unit_dim", unit_dim)
        if axis == "lifetime" and "gini" in names:
            raise ValueError(expected("axis", "'population' for gini", "'lifetime'"))
        self._names = names
        self.axis, self.eps, self.relative, self.unit_dim = axis, eps, relative, unit_dim
        self.reset()

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of the measures."""
        return self._names

    @property
    def _table(self) -> dict[str, Measure]:  # its functions cannot be pickled
        return {name: MEASURES[name] for name in self._names}

    def reset(self) -> None:
        """Discard all chunks."""
        self._state: dict[str, Tensor] = {}

    def update(self, x: Tensor) -> None:
        """Add a chunk; inside `vmap` the samples of all examples."""
        check_tensor(x, self.unit_dim, "unit_dim")
        dim = self.unit_dim % x.ndim - x.ndim  # from the last, so that it holds without vmap as well
        x = x.detach()
        if transforms_active():
            with outside_transforms():
                return self._update(without_transforms(x), dim)
        return self._update(x, dim)

    def _update(self, x: Tensor, dim: int) -> None:
        x = x.movedim(dim, -1)
        self._add(self._chunk(x.reshape(math.prod(x.shape[:-1]), x.shape[-1])), "x")

    def merge(self, other: "Streaming") -> None:
        """Add the chunks of another accumulator."""
        if not isinstance(other, Streaming):
            raise TypeError(expected("other", "a Streaming", type_name(other)))
        settings, other_settings = ((set(s._table), s.axis, s.eps, s.relative) for s in (self, other))
        if settings != other_settings:
            raise ValueError(expected("other", f"a Streaming of {settings}", f"one of {other_settings}"))
        self._add(other.state(), "other")

    def state(self) -> dict[str, Tensor]:
        """Copies of the tensors that merge by summing; none before any update."""
        return {name: value.clone() for name, value in self._state.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a result of `state`."""
        keys = self._chunk(torch.zeros(0, 0)).keys()
        if state and state.keys() != keys:
            raise ValueError(expected("state", f"a dict of {sorted(keys)}", f"one of {sorted(state)}"))
        self._state = {name: value.clone() for name, value in state.items()}

    def compute(self) -> dict[str, Tensor]:
        """The means and counts over all chunks since the last reset."""
        state = self._state or self._chunk(torch.zeros(0, 0))
        rows, undefined, active = state["rows"], state["undefined_rows"], state["active"]
        live, units = active != 0, torch.full_like(rows, active.numel())
        if self.axis == "population":
            totals, among, defined = state, rows, rows - undefined
            n, ratio = live.sum(dtype=torch.float64), state["ratio"] / defined
            alive = MEASURES["hoyer"].value(n, ratio, torch.ones_like(ratio)).masked_fill(n < 2, math.nan)
        else:
            zero = state["sum1"] == 0
            totals, among, defined = totals_of(self._table, rows, state, zero), units, units - zero.sum()
            alive = totals_of({"hoyer": MEASURES["hoyer"]}, rows, state, ~live)["hoyer"] / live.sum()
        return {k: totals[k] / (among if m.zero_defined else defined) for k, m in self._table.items()} | {
            "hoyer_live": alive,
            "rows": rows.long(),
            "undefined_rows": undefined.long(),
            "units": units.long(),
            "dead_units": (~live & (rows > 0)).sum(),
            "always_on_units": (live & (active == rows)).sum(),
        }

    def dead_units(self) -> Tensor:
        """The indices of the units that were active in no sample, of which there was at least one."""
        state = self._state or self._chunk(torch.zeros(0, 0))
        return ((state["active"] == 0) & (state["rows"] > 0)).nonzero().flatten()

    def _chunk(self, x: Tensor) -> dict[str, Tensor]:
        """The contribution of the samples `x`, (samples, units), to the state."""
        rows, zero = rows_of(x, -1, self.eps, self.relative)
        if self.axis == "population":
            table = {**self._table, "ratio": RATIO}
            sums = totals_of(table, x.shape[-1], statistics_of(table, rows, -1), zero)
        else:  # a unit's peak is not known yet: its powers are summed as they are, in float64
            rows = rows._replace(unit=rows.raw.double())
            sums = statistics_of({**self._table, "hoyer": MEASURES["hoyer"]}, rows, 0)
        return sums | {
            "rows": torch.full((), x.shape[0], dtype=torch.float64, device=x.device),
            "undefined_rows": zero.sum(dtype=torch.float64),
            "active": active(rows).sum(0, dtype=torch.float64),
        }

    def _add(self, chunk: dict[str, Tensor], name: str) -> None:
        old = self._state or {key: torch.zeros_like(value) for key, value in chunk.items()}
        if chunk and (got := chunk["active"].numel()) != (units := old["active"].numel()):
            raise ValueError(expected(name, f"of {units} units", got))
        self._state = {key: old[key] + value.to(old[key].device) for key, value in chunk.items()} or old
