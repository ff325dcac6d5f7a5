"""The look of every figure of this package: colours, and settings of matplotlib."""

import io
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.figure import Figure

# The pages in HTML have a CSS variable of the same name for each. These are the values of their light theme.
COLOURS = {
    "page": "#f4f5f8",
    "ink": "#1d2430",
    "muted": "#667085",
    "rule": "#d9dee7",
    "card": "#fffffe",
    "first": "#1f6fb2",
    "second": "#c4571b",
}
DARK = {
    "page": "#10141b",
    "ink": "#e6eaf1",
    "muted": "#97a2b5",
    "rule": "#303948",
    "card": "#191f29",
    "first": "#74b3ea",
    "second": "#f0945a",
}
# Okabe and Ito (2008), for more than two series: told apart by colour-blind readers too.
CYCLE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c510a")

DASHES: Any = (0, (4, 2))
DOTS: Any = (0, (1.2, 1.6))

STYLE: dict[Any, Any] = {
    "figure.facecolor": COLOURS["card"],
    "axes.facecolor": "none",
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.prop_cycle": cycler(color=CYCLE),
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
}


def style() -> AbstractContextManager[None]:
    """The style as a with-block, in which figures are both made and written."""
    return mpl.rc_context(STYLE)


def png(figure: Figure, dpi: int = 160) -> bytes:
    """A figure as PNG, the same for the same numbers."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
