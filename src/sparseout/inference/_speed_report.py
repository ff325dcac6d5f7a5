"""Report of sparse_linear_, as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from sparseout._utils.outcome_table import aligned, outcome_rows


@dataclass(frozen=True)
class LayerSpeed:
    """Speed of a layer on an input that it had.

    Args:
        rows: of the input, all its dims but the last.
        density: the fraction of the input that is not 0.
        dense_us: microseconds of a call as the layer was.
        sparse_us: of a call as it is now, the choice included.
        full_us: of a call as it is now on an input without zeros.
        break_even: the density up to which a call with so many rows is sparse.
    """

    rows: int
    density: float
    dense_us: float
    sparse_us: float
    full_us: float
    break_even: float


@dataclass(frozen=True)
class SparseLinearReport:
    """Report of :func:`sparseout.inference.sparse_linear_`: which layers are sparse now, how fast, and why others not.

    Args:
        changed: name -> speeds of a layer that is sparse now, one for each number of rows that it was given.
        left: name -> speeds of a layer that was timed and is as it was.
        skipped: name -> why a layer is as it was.

    Example:
        >>> print(SparseLinearReport({"2": [LayerSpeed(1, 0.1, 1240.0, 230.0, 1210.0, 0.5)]}, {}, {"0": "too dense"}))
        changed  2  density 0.10, 1 row: 1240 -> 230 µs, 5.4 times as fast; sparse up to density 0.50
        skipped  0  too dense

    Source: Liu et al. (2023), Deja vu: contextual sparsity for efficient LLMs at inference time, ICML, for the method.
    """

    changed: dict[str, list[LayerSpeed]] = field(default_factory=dict)
    left: dict[str, list[LayerSpeed]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def records(self) -> list[dict[str, Any]]:
        """A dict for each layer that was timed and each number of rows; `sparse` says whether the layer changed."""
        return [
            {"module": name, "sparse": layers is self.changed, **asdict(speed)}
            for layers in (self.changed, self.left)
            for name, speeds in layers.items()
            for speed in speeds
        ]

    def __str__(self) -> str:
        changed = {name: "; ".join(map(_speed_text, speeds)) for name, speeds in self.changed.items()}
        rows = [*outcome_rows("changed", changed), *outcome_rows("skipped", self.skipped)]
        if not self.changed:
            rows.append(("changed", "nothing", "no layer was made sparse" if self.skipped else "no Linear layer"))
        return aligned(rows)


def _speed_text(speed: LayerSpeed) -> str:
    rows = "1 row" if speed.rows == 1 else f"{speed.rows} rows"
    times = f"{speed.dense_us:.0f} -> {speed.sparse_us:.0f} µs, {speed.dense_us / speed.sparse_us:.1f} times as fast"
    return f"density {speed.density:.2f}, {rows}: {times}; sparse up to density {speed.break_even:.2f}"
