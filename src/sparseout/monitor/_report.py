"""What a monitor has seen: records, a table, a picture, and in plain words what is off."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from sparseout.monitor._accumulators import Norm

WIDTH = 120
COLLAPSED = 0.01  # of rows undefined
OFF = 0.1  # noise power against Dropout's; batch norm in units of its standard deviation
SURE = 3.0  # standard errors


class SparsityReport(Sequence[dict[str, Any]]):
    r"""The records of a :class:`sparseout.SparsityMonitor`: one for each module, mode and axis.

    A record is a dict: module, tensor ("input" or "output"), mode ("train" or "eval"), axis; steps watched, of_steps
    that there were; the measures by name; hoyer_live (over live units), rows, undefined_rows (all zero), units,
    dead_units, always_on_units, all as `sparseout.measures.Streaming` defines them; noise, the power of the layer's
    noise in training over that of Dropout at its p, mean (y - x)^2 / (V mean x^2) with V = p / (1 - p), and its
    standard error noise_error, None where there is no such layer; zeros, histogram and not_finite: how many values are
    0, have log10|x| in [-8, -7.5), ..., [3.5, 4) (what is beyond counts in the outermost), are NaN or infinite.

    `diagnosis` is a list of sentences, empty when nothing is off:

    - more than half of a module's units never fire;
    - more than 1% of rows are all zero;
    - the noise has a power more than 10% from Dropout's (and 3 standard errors);
    - what a batch norm is given in evaluation differs from its running statistics: the root mean square over channels,
      of the means' distance or of the deviations' ratio - 1, exceeds sqrt(0.1^2 + 3/n) running standard deviations, for
      n samples (not positions);
    - activations that are NaN or infinite; modules never called.

    `norms` holds the figures of the batch norms, `steps` the window. `str` gives the table.
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        steps: Mapping[str, tuple[int, int]],
        norms: Sequence[Norm] = (),
        silent: Sequence[str] = (),
    ) -> None:
        self._records, self.steps, self.norms, self.silent = list(records), dict(steps), list(norms), list(silent)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        return self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._records)

    @property
    def diagnosis(self) -> list[str]:
        """What is off, a sentence each."""
        population = [record for record in self if record["axis"] == "population"]

        def where(test: Any, shown: Any) -> str:
            found = [f"{_name(r['module'])} ({r['mode']}, {shown(r)})" for r in population if test(r)]
            return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")

        said = [sentence.format(places) for test, shown, sentence in _SIGNS if (places := where(test, shown))]
        off = [norm for norm in self.norms if max(norm.shift, norm.stretch) ** 2 > OFF**2 + 3 / norm.samples]
        if off:
            worst = max(off, key=lambda norm: max(norm.shift, norm.stretch))
            said.append(
                f"Batch norm: in evaluation {len(off)} of {len(self.norms)} layers are given something else than their "
                f"running statistics say, most of all {_name(worst.module)}: means {worst.shift:.2f} standard "
                f"deviations away, deviations {worst.spread:.2f} times as large. Estimate them again without noise: "
                "sparseout.recalibrate_norm_."
            )
        if self.silent and any(total for _, total in self.steps.values()):
            some = ", ".join(map(_name, self.silent[:3])) + (" and more" if len(self.silent) > 3 else "")
            said.append(f"Never called in a watched step: {some}.")
        return said

    def __str__(self) -> str:
        window = ", ".join(f"{seen} of {total} steps in {mode}" for mode, (seen, total) in self.steps.items() if total)
        if not self._records:
            return f"Sparsity: {window or 'no step seen'}"
        head = f"Sparsity over {window}. pop: over the units of a row; life: over the rows of a unit."
        return "\n".join([head, "", *_table(self._records), *map(_folded, self.diagnosis)])

    __repr__ = __str__

    def frame(self) -> Any:
        """The records as a pandas DataFrame. Raises: ImportError without pandas."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("SparsityReport.frame needs pandas: pip install pandas") from error
        return pandas.DataFrame(self._records)

    def plot(self, path: str | Path | None = None) -> Any:
        """A matplotlib Figure, written to `path` if one is given. Raises: ImportError without matplotlib."""
        try:
            from sparseout.monitor._plot import draw
        except ImportError as error:
            raise ImportError("SparsityReport.plot needs matplotlib: pip install matplotlib") from error
        figure = draw(self)
        if path is not None:
            figure.savefig(path)
        return figure


def _name(name: str) -> str:
    return f"`{name}`" if name else "the model"


def _folded(sentence: str) -> str:
    return "\n" + textwrap.fill(f"! {sentence}", WIDTH, subsequent_indent="  ", break_long_words=False)


def _loud(record: Mapping[str, Any]) -> bool:
    ratio, error = record["noise"], record["noise_error"]
    return ratio is not None and abs(ratio - 1) > max(OFF, SURE * error)


# Of a population record: the sign, how it is shown beside the module, and the sentence.
_SIGNS: tuple[tuple[Any, Any, str], ...] = (
    (
        lambda r: r["not_finite"] > 0,
        lambda r: f"{r['not_finite']} values",
        "Activations are NaN or infinite: {}.",
    ),
    (
        lambda r: r["dead_units"] > r["units"] / 2,
        lambda r: f"{r['dead_units']} of {r['units']}",
        "Mass death: more than half of the units never fired: {}. Look at hoyer_live; raise q or lower p.",
    ),
    (
        lambda r: r["undefined_rows"] > COLLAPSED * r["rows"],
        lambda r: f"{r['undefined_rows'] / r['rows']:.1%}",
        "Collapse: rows are all zero, and not in the means: {}.",
    ),
    (
        _loud,
        lambda r: f"{r['noise']:.2f} times",
        'The noise has not the power of Dropout\'s at the same p: {}. scale="matched" makes it so.',
    ),
)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if math.isnan(value) or abs(value) < 1000 else f"{value:.2e}"


def _table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = list(records[0])
    measures = keys[keys.index("of_steps") + 1 : keys.index("hoyer_live")]
    columns = {name[:8]: name for name in measures} | {
        "live": "hoyer_live",
        "rows": "rows",
        "undef": "undefined_rows",
        "units": "units",
        "dead": "dead_units",
        "on": "always_on_units",
        "noise": "noise",
    }
    short = {"input": "in", "output": "out", "population": "pop", "lifetime": "life"}
    body = [
        [*(short.get(r[k], r[k]) for k in ("tensor", "mode", "axis")), *map(_cell, (r[k] for k in columns.values()))]
        for r in records
    ]
    lines = [["at", "mode", "axis", *columns], *body]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    room = max(12, WIDTH - sum(widths) - 2 * len(widths))
    names = ["module", *(r["module"] or "(model)" for r in records)]
    names = [name if len(name) <= room else "…" + name[1 - room :] for name in names]
    wide = max(map(len, names))
    shown = []
    for name, line in zip(names, lines, strict=True):
        left = [cell.ljust(width) for cell, width in zip(line[:3], widths[:3], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(line[3:], widths[3:], strict=True)]
        shown.append("  ".join([name.ljust(wide), *left, *right]).rstrip())
    return shown
