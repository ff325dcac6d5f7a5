"""The demonstration: a sweep of one autoencoder on handwritten digits over q and scale, and a look at what it learned.

Within a seed every run starts from the same weights and sees the same batches, so that the noise is all that differs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sparseout_experiments.message import expected

if TYPE_CHECKING:
    from sparseout_experiments.studies.engine.cluster import Job
    from sparseout_experiments.studies.engine.frame import Results

Scale = float | Literal["paper", "matched"]
Gradient = Literal["detached", "exact"]

EPOCHS = 20

RESULTS = "results.json"

# The histogram of log10 of the activations, the same bins in every run so that seeds can be pooled.
BINS, LOWEST, HIGHEST = 60, -4.0, 2.0


@dataclass(frozen=True)
class Options:
    """Options of the demonstration."""

    q: tuple[float, ...] = (1.0, 1.5, 2.0, 2.5, 3.0)
    p: float = 0.5
    seeds: int = 3
    gradient: Gradient = "detached"
    scales: tuple[Scale, ...] = ("paper", "matched")
    epochs: int = EPOCHS


def plan(options: Options, folder: Path) -> "dict[str, Job]":
    """Every run, seed by seed: an interrupted demonstration has compared all q's on the seeds it did."""
    from sparseout_experiments.studies.engine import sweep

    wanted = {"method": ["sparseout", "dropout", "none"], "scale": options.scales, "q": options.q}
    fixed = {"p": options.p, "gradient": options.gradient, "epochs": options.epochs, "device": "cpu"}
    jobs = sweep.grid("autoencoder", wanted | {k: [v] for k, v in fixed.items()}, options.seeds, folder)
    return dict(sorted(jobs.items(), key=lambda item: item[1].options["seed"]))


def ended(results: "Results") -> int:
    """Number of runs that have a result or have diverged."""
    return int(results.frame["status"].isin(("finished", "failed")).sum())


def earlier(folder: Path) -> tuple[int, bool]:
    """Of how many runs the report in a folder is, and whether of all. Raises ValueError for another's file."""
    from sparseout_experiments.studies.engine import frame

    if not (folder / RESULTS).exists():
        return 0, False
    try:
        results = frame.load(folder / RESULTS)
        if "demo" in results.more:
            return ended(results), ended(results) == len(results.frame)
    except (ValueError, LookupError, TypeError):
        pass
    wanted = "a new folder, or one of an earlier sparseout demo"
    raise ValueError(expected("--out", wanted, f"{str(folder)!r}, with another {RESULTS}"))
