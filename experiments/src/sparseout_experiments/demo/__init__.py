"""The demonstration: a sweep of one autoencoder on handwritten digits over q and scale, and what it shows of the dial.

Within a seed every run starts from the same weights and sees the same batches, so that the noise is all that differs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from sparseout_experiments.studies.engine.cluster import Job
    from sparseout_experiments.studies.engine.frame import Results

Scale = float | Literal["paper", "matched"]
Gradient = Literal["detached", "exact"]


@dataclass(frozen=True)
class Options:
    """Options of the demonstration."""

    q: tuple[float, ...] = (1.0, 1.5, 2.0, 2.5, 3.0)
    p: float = 0.5
    seeds: int = 3
    gradient: Gradient = "detached"
    scales: tuple[Scale, ...] = ("paper", "matched")
    epochs: int = 20


def plan(options: Options, folder: Path) -> "dict[str, Job]":
    """Every run, by name."""
    from sparseout_experiments.studies.engine import sweep

    wanted = {"method": ["sparseout", "dropout", "none"], "scale": options.scales, "q": options.q}
    fixed = {"p": options.p, "gradient": options.gradient, "epochs": options.epochs, "device": "cpu"}
    return sweep.grid("autoencoder", wanted | {k: [v] for k, v in fixed.items()}, options.seeds, folder)


def run(jobs: "Mapping[str, Job]", command: str, on_progress: Callable[[int, str], None]) -> "Results":
    """Train run after run; `on_progress` hears how many are done, and which is next.

    In this process: workers would take longer to start than the runs take.
    """
    from sparseout_experiments.config import record, resolve
    from sparseout_experiments.studies.engine import frame
    from sparseout_experiments.studies.engine.jobs import train
    from sparseout_experiments.training.environment import one_thread

    with one_thread():
        for done, (name, job) in enumerate(jobs.items()):
            on_progress(done, name)
            train(*job)
    planned = [record(resolve(job.task, job.options)) | {"run": str(job.folder)} for job in jobs.values()]
    return frame.read([job.folder for job in jobs.values()], planned, command)
