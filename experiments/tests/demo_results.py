"""Made-up results of the demonstration: a row a run, as its folders would give them."""

from typing import Any

import pandas as pd
from sparseout_experiments.demo import Scale
from sparseout_experiments.studies.engine.frame import Results
from sparseout_experiments.training.run_folder import MEASURES

WOBBLE = (-0.01, 0.0, 0.01)  # of the seeds


def row(
    method: str, seed: int, hoyer: float | None, scale: Scale | None = None, q: float | None = None, **more: Any
) -> dict[str, Any]:
    """A run that has finished, or, where it has no Hoyer and more says so, failed."""
    found: dict[str, Any] = {"method": method, "scale": scale, "q": q, "seed": seed, "status": "finished"}
    found |= {"run": f"runs/{method} {scale} {q} {seed}", "reason": ""} | dict.fromkeys(MEASURES, 0.5)
    return found | {"hoyer": hoyer, "hoyer_live": hoyer, "metric": 10.0, "dead": 0.25, "undefined": 0.0} | more


def dial(
    scale: Scale,
    hoyer: dict[float, float | None],
    live: dict[float, float | None] | None = None,
    wobble: tuple[float, ...] = WOBBLE,
    **more: Any,
) -> list[dict[str, Any]]:
    """Sparseout at several q's, seeds apart by `wobble`."""

    def apart(value: float | None, off: float) -> float | None:
        return None if value is None else value + off

    return [
        row("sparseout", seed, apart(hoyer[q], off), scale, q, hoyer_live=apart((live or hoyer)[q], off), **more)
        for q in hoyer
        for seed, off in enumerate(wobble)
    ]


def results(rows: list[dict[str, Any]]) -> Results:
    """Results of these runs."""
    frame = pd.DataFrame(rows)
    swept: dict[str, list[Any]] = {"method": ["sparseout", "dropout", "none"], "q": [1.0, 2.0, 3.0]}
    none: dict[str, Any] = {row["run"]: {} for row in rows}
    return Results("autoencoder", ("mse", "e-3"), frame, swept, {"units": 256}, none, {run: [] for run in none})
