"""What the commands share: reading values, progress, and how they fail."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sparseout._utils.validation import expected
from sparseout_experiments.cli import tell

USAGE, FAILED, INTERRUPTED = 2, 1, 130


def progress_bar() -> Progress:
    """A bar on standard error, with `count` before it and `now` behind."""
    return Progress(
        TextColumn("{task.fields[count]}"),
        BarColumn(bar_width=16),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[now]}"),
        console=Console(stderr=True),
        transient=True,
    )


def wrote(console: Console, paths: Sequence[Path]) -> None:
    """Say what was written."""
    console.print("Wrote " + ", ".join(map(str, paths)), highlight=False, markup=False, soft_wrap=True)


def device_named(text: str) -> str:
    """The device that an option names, a GPU where there is one if it is empty."""
    there = torch.cuda.is_available()
    if text not in ("", "cpu", "cuda"):
        fail(expected("--device", "cpu or cuda", repr(text)))
    if text == "cuda" and not there:
        fail(expected("--device", "cpu, since torch finds no CUDA device", repr(text)))
    return text or ("cuda" if there else "cpu")


def count(option: str, text: str) -> int:
    """A whole number >= 1."""
    return int(number(option, text, "a whole number >= 1", lambda value: value >= 1 and value % 1 == 0))


def number(option: str, text: str, wanted: str, holds: Callable[[float], bool]) -> float:
    """A number that holds what was wanted."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not holds(value):
        fail(expected(option, wanted, repr(text)))
    return value


def fail(sentence: str, status: int = USAGE) -> NoReturn:
    """End with a sentence and a status."""
    tell(sentence)
    raise typer.Exit(status)
