"""Figures inside a page that has a light and a dark theme."""

import re
from html import escape

from matplotlib.figure import Figure

from sparseout_experiments.studies.engine.style import COLOURS, image


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


def _font(match: re.Match[str]) -> str:
    weight, size = match.groups()
    return f"font-size: {size}" + (f"; font-weight: {weight}" if weight else "")
