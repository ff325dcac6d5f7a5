"""Style of the figures, and their form inside a page that has a light and a dark theme."""

import io
import re
from html import escape
from typing import Any

from matplotlib.figure import Figure

# The page has a CSS variable of the same name for each; these are the values of its light theme.
COLOURS = {
    "ink": "#1d2430",
    "muted": "#667085",
    "rule": "#d9dee7",
    "card": "#fffffe",
    "first": "#1f6fb2",
    "second": "#c4571b",
}

STYLE: dict[Any, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.8,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"],
    "text.color": COLOURS["ink"],
    "font.size": 10.5,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.7,
    "lines.markersize": 6.5,
    "svg.fonttype": "none",  # text stays text, in the font of the page
    "svg.hashsalt": "sparseout",  # the same numbers give the same file
}


def inline(figure: Figure, name: str, alt: str) -> str:
    """A figure as an <svg> that scales with the page and takes its font and colours from it."""
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


def image(figure: Figure, kind: str, **options: Any) -> bytes:
    """A figure as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def _font(found: re.Match[str]) -> str:
    weight, size = found.groups()
    return f"font-size: {size}" + (f"; font-weight: {weight}" if weight else "")
