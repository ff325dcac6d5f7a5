"""The page of a control study from made-up runs, and what it says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats
from sparseout_experiments.studies import control as study
from sparseout_experiments.studies.control import collect, figures
from sparseout_experiments.studies.control.collect import Ledger, Record
from sparseout_experiments.studies.control.grid import BUDGETS, Task
from sparseout_experiments.studies.engine import style

ROOT = Path(__file__).parents[2]
TASKS = tuple(BUDGETS["small"])


def blank(monkeypatch: pytest.MonkeyPatch, made: bool = False) -> None:
    """Leave figures unpainted, which takes most of the time of a page; and empty, unless they are to be `made`."""
    monkeypatch.setattr(style, "png", lambda *_: b"")
    for name in ("panels", "overview", "networks", "curves") if not made else ():
        monkeypatch.setattr(figures, name, lambda *_: Figure())


def save(tmp_path: Path, ledger: Ledger, task: Task = "autoencoder", budget: str = "small") -> Record:
    return collect.load(collect.save(tmp_path / "results", budget, task, ledger))


def render(tmp_path: Path) -> str:
    study.STUDY.render(tmp_path / "results", tmp_path / "docs" / "results.md")
    return (tmp_path / "docs" / "results.md").read_text()


def flat(tmp_path: Path) -> str:
    return " ".join(render(tmp_path).split())


def raw(tmp_path: Path, task: Task) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((tmp_path / "results" / f"control-small-{task}.json").read_text())["rows"]
    return rows


def tables(text: str, heading: str) -> list[list[str]]:
    part = text.split(f"### {heading}\n")[1].split("\n### ")[0].split("\n\n")
    lines = next(block.strip() for block in part if block.strip().startswith("|")).splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def shown(values: list[float], digits: int, times: float = 1.0, sign: str = "") -> str:
    """A mean with its interval, made with scipy alone."""
    scaled = times * np.array(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=scaled.mean(), scale=stats.sem(scaled))
    return f"{scaled.mean():{sign}.{digits}f} ± {(high - low) / 2:.{digits}f}"
