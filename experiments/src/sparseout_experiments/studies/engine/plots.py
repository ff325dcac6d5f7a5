"""Parts that figures share, and how a figure becomes a part of a page."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from sparseout_experiments.studies.engine.statistics import Interval
from sparseout_experiments.studies.engine.style import COLOURS, image


def canvas(width: float, height: float, **pads: float) -> Figure:
    """A figure in which neither labels nor panels touch; `pads` are those of the constrained layout."""
    given: dict[str, Any] = {"w_pad": 0.1, "h_pad": 0.1} | pads
    return Figure((width, height), layout=ConstrainedLayoutEngine(**given))


def points(axes: Axes, x: Sequence[float | Interval], y: Sequence[float | Interval], **look: Any) -> None:
    """Points with 95% intervals; a number has none, and one that is undefined is not drawn."""
    axes.errorbar(_means(x), _means(y), _halves(y), _halves(x), **look)


def _means(values: Iterable[float | Interval]) -> list[float]:
    return [value.mean if isinstance(value, Interval) else value for value in values]


def _halves(values: Sequence[float | Interval]) -> list[float] | None:
    halves = [value.half for value in values if isinstance(value, Interval)]
    return [0.0 if math.isnan(half) else half for half in halves] if halves else None


def references(axes: Axes, values: Mapping[str, float]) -> None:
    """A line for each value, named at its right end, at the limits that the axes have now."""
    low, high = axes.get_ylim()
    height = -math.inf
    for name, value in sorted(values.items(), key=lambda item: (item[1], item[0])):
        if math.isnan(value):
            continue
        axes.axhline(value, color=COLOURS["muted"], linewidth=1.1, zorder=1)
        height = max(value, height + 0.07 * (high - low))  # names that would touch are pushed apart
        axes.annotate(
            name, (1.0, height), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
            fontsize=9, color=COLOURS["muted"], annotation_clip=False,
        )  # fmt: skip


def inline(figure: Figure, name: str, alt: str) -> str:
    """A figure as an <svg> that scales with a page of the engine and takes its font and colours from it."""
    text = image(figure, "svg", metadata={"Date": None}).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", text)  # a page has one space of ids
    text = re.sub(r"font: (?:(bold|\d+) )?([\d.]+px) [^;\"]+", _font, text)
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    return re.sub(
        r'width="[\d.]+pt" height="[\d.]+pt"',
        f'role="img" aria-label="{escape(alt)}" class="plot {name}"',
        text,
        count=1,
    )


def _font(match: re.Match[str]) -> str:
    weight, size = match.groups()
    return f"font-size: {size}" + (f"; font-weight: {weight}" if weight else "")
