"""The report of the demonstration: numbers, a page, a picture, and the end of its output in the terminal."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sparseout_experiments.config import record, resolve
from sparseout_experiments.demo import BINS, HIGHEST, LOWEST, RESULTS, Options, Run, figures, payoff, plan
from sparseout_experiments.demo.page import page
from sparseout_experiments.demo.payoff import Payoff
from sparseout_experiments.demo.summary import caveats, summarise, verdict
from sparseout_experiments.demo.table import terminal
from sparseout_experiments.demo.training import chosen, mean_error
from sparseout_experiments.studies.engine import results as files
from sparseout_experiments.training import atomic_files, run_folder
from sparseout_experiments.training.environment import environment


def write(
    folder: Path, options: Options, runs: Sequence[Run], seconds: float, worth: Payoff | None = None
) -> list[Path]:
    """Write results.json, demo.png and report.html; return their paths. `worth` is the last act's, if there was one."""
    record = results(options, runs, seconds) | {"payoff": None if worth is None else worth.record()}
    rows = summarise(options, runs)
    contents: dict[str, str | bytes] = {
        RESULTS: json.dumps(record, indent=1, allow_nan=False) + "\n",
        "demo.png": figures.picture(rows, options.scales),
        "report.html": page(options, rows, record, worth),
    }
    for name, content in contents.items():
        atomic_files.write(folder / name, content)
    return [folder / name for name in contents]


def show(
    console: Console, options: Options, runs: Sequence[Run], written: Sequence[Path], worth: Payoff | None = None
) -> None:
    """The end of the run: table, verdict, caveats, and where to read on."""
    rows = summarise(options, runs)
    console.print(terminal(rows))
    console.print(
        f"Means over {options.seeds} seeds ± half a 95% t interval, on {runs[0].rows} test digits. Live: over the "
        "units that fire for at least one of them; dead: units that fire for none.\n",
        highlight=False,
    )
    console.print(f"[bold]{verdict(rows, options.scales)}[/bold]\n", highlight=False)
    for sentence in caveats(rows, mean_error()):
        console.print(sentence + "\n", highlight=False, markup=False)
    if worth is not None:
        console.print(payoff.terminal(worth))
        console.print(payoff.sentence(worth) + "\n", highlight=False, markup=False)
    console.print("Wrote " + ", ".join(map(str, written)), highlight=False, markup=False, soft_wrap=True)


def results(options: Options, runs: Sequence[Run], seconds: float) -> dict[str, Any]:
    """Everything a reader needs to check the claims; a number that is undefined is null."""
    configs = [record(resolve("autoencoder", chosen(*run, options))) for run in plan(options)]
    return {
        "experiment": "demo",
        "verdict": verdict(summarise(options, runs), options.scales),
        "runs_planned": len(plan(options)),
        "runs_finished": len(runs),
        "options": vars(options) | {"q": list(options.q), "scales": list(options.scales)},
        "protocol": {
            "data": "scikit-learn digits: 1213 to train, 134 to choose the epoch by, 450 to test",
            "options": {name: value for name, value in files.shared(configs).items() if value is not None},
            "histogram": {
                "of": "log10 of the non-zero activations",
                "from": LOWEST,
                "to": HIGHEST,
                "bins": BINS,
            },
        },
        "environment": environment("scikit-learn") | {"threads": 1},
        "seconds": round(seconds, 2),
        "runs": [run_folder.plain(run.record()) for run in runs],
    }
