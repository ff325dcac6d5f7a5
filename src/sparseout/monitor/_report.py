"""Report of a monitor: records, a table, a picture, and warnings."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseout._utils.records import RecordSequence
from sparseout.monitor._accumulators import Norm
from sparseout.monitor._table import WIDTH, table

COLLAPSED = 0.01  # of rows undefined
OFF = 0.1  # noise power against Dropout's; batch norm in units of its standard deviation
SURE = 3.0  # standard errors


class SparsityReport(RecordSequence):
    r"""The records of a :class:`sparseout.SparsityMonitor`: one for each module, mode and axis.

    A record is a dict: module, tensor ("input" or "output"), mode ("train" or "eval"), axis; steps watched, of_steps
    that there were; the measures by name; hoyer_live (over live units), rows, undefined_rows (all zero), units,
    dead_units, always_on_units, all as `sparseout.measures.Streaming` defines them; noise, the power of the layer's
    noise in training over that of Dropout at its p, mean (y - x)^2 / (V mean x^2) with V = p / (1 - p), and its
    standard error noise_error, None where there is no such layer; zeros, histogram and not_finite: how many values are
    0, have log10|x| in [-8, -7.5), ..., [3.5, 4) (what is beyond counts in the outermost), are NaN or infinite; calls,
    how often the module was called in one step, at most; dead_indices, which units are dead.

    `diagnosis` is a list of warnings, empty when nothing is wrong:

    - more than half of a module's units are 0 in all rows;
    - more than 1% of rows are all zero;
    - the noise has a power more than 10% from Dropout's (and 3 standard errors);
    - what a batch norm is given in evaluation differs from its running statistics: the root mean square over channels,
      of the means' distance or of the deviations' ratio - 1, exceeds sqrt(0.1^2 + 3/n) running standard deviations, for
      n samples (not positions);
    - activations that are NaN or infinite;
    - several calls of one module in a step, at one width, which share a record;
    - modules that were never called, or only in steps that were not watched or without a floating-point tensor;
    - activations whose leading dims were not those of the :class:`sparseout.row_mask` in force: all rows were counted.

    `norms` holds the figures of the batch norms, `steps` the window, `silent` the modules that were never called,
    `unmasked` those that no mask fitted, `zero` the monitor's (eps, relative).
    `str` gives :meth:`table` and the warnings.

    Source: Willmore & Tolhurst (2001), Characterizing the sparseness of neural codes, for the two axes; the measures
    have theirs in :mod:`sparseout.measures`.
    """

    # of reports that were pickled before there were these
    skipped: list[str] = []
    unmasked: list[str] = []
    zero: tuple[float, bool] = (0.0, False)

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        steps: Mapping[str, tuple[int, int]],
        norms: Sequence[Norm] = (),
        silent: Sequence[str] = (),
        skipped: Sequence[str] = (),
        unmasked: Sequence[str] = (),
        zero: tuple[float, bool] = (0.0, False),
    ) -> None:
        super().__init__(records)
        self.steps, self.norms = dict(steps), list(norms)
        self.silent, self.skipped, self.unmasked, self.zero = list(silent), list(skipped), list(unmasked), zero

    @property
    def diagnosis(self) -> list[str]:
        """Warnings, one sentence each."""
        population = [record for record in self if record["axis"] == "population"]

        def where(test: Any, shown: Any) -> str:
            return _listed([f"{_name(r['module'])} ({r['mode']}, {shown(r)})" for r in population if test(r)])

        sentences = [sentence.format(names) for test, shown, sentence in _SIGNS if (names := where(test, shown))]
        off = [norm for norm in self.norms if max(norm.shift, norm.stretch) ** 2 > OFF**2 + 3 / norm.samples]
        if off:
            worst = max(off, key=lambda norm: max(norm.shift, norm.stretch))
            sentences.append(
                f"Batch norm: in evaluation {len(off)} of {len(self.norms)} layers get inputs that do not match their "
                f"running statistics, most of all {_name(worst.module)}: the means differ by {worst.shift:.2f} running "
                f"standard deviations, and the standard deviations are {worst.spread:.2f} times the running ones. "
                "Estimate the statistics again without noise: sparseout.recalibrate_norm_."
            )
        if any(total for _, total in self.steps.values()):
            uncounted = "Called only in steps not watched, or without a floating-point tensor of at least one dim"
            for start, unseen in (("Never called", self.silent), (uncounted, self.skipped)):
                if unseen:
                    sentences.append(f"{start}: {_listed([_name(name) for name in unseen])}.")
        if self.unmasked:
            sentences.append(
                f"Row mask: all rows are counted of {_listed([_name(name) for name in self.unmasked])}, whose leading "
                "dims are not those of the mask."
            )
        return sentences

    def table(self, axes: bool = False) -> str:
        """The records as text, a line for each module and mode; those of a stack of layers stand together.

        Args:
            axes: a line for the lifetime axis too.
        """
        return "\n".join(table(self._records, axes)) if self._records else ""

    def __str__(self) -> str:
        window = ", ".join(
            f"{watched} of {total} steps in {mode}" for mode, (watched, total) in self.steps.items() if total
        )
        sentences = map(_folded, self.diagnosis)
        if not self._records:
            return "\n".join([f"Sparsity: {window or 'no step measured'}", *sentences])
        eps, relative = self.zero
        unit = " times the root mean square of the row" if relative else ""
        zero = f" What is at most {eps:g}{unit} counts as zero." if eps else ""
        head = f"Sparsity over {window}. Measures over the units of a row.{zero}"
        return "\n".join([head, "", self.table(), *sentences])

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


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _folded(sentence: str) -> str:
    return "\n" + textwrap.fill(
        f"! {sentence}", WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


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
        lambda r: f"{r['dead_units']} of {r['units']} in {r['rows']} rows",
        "Dead units: more than half of the units are 0 in every row measured: {}. Compare hoyer_live, which leaves "
        "them out; to keep units alive, raise q or lower p.",
    ),
    (
        lambda r: r["undefined_rows"] > COLLAPSED * r["rows"],
        lambda r: f"{r['undefined_rows'] / r['rows']:.1%} of {r['rows']}",
        "Rows are all zero, and left out of the means: {}.",
    ),
    (
        _loud,
        lambda r: f"{r['noise']:.2f} ± {r['noise_error']:.2f} times",
        'The power of the noise differs from that of Dropout at the same p: {}. scale="matched" makes them equal.',
    ),
    (
        lambda r: r.get("calls", 1) > 1,
        lambda r: f"{r['calls']} calls a step",
        "Several calls in one step share a record: {}. A unit counts as dead if it is 0 in all of them. To see the "
        "calls apart, give each a module of its own.",
    ),
)
