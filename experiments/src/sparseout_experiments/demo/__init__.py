"""The demonstration: one autoencoder on handwritten digits, trained once for every q, scale and seed.

They are runs of `sparseout run autoencoder`. Within a seed every run starts from the same weights and sees the same
batches, so that the noise is all that differs.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparseout_experiments.message import expected

if TYPE_CHECKING:  # torch takes seconds to import
    from torch import Tensor

    from sparseout_experiments.models import Autoencoder

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


@dataclass(frozen=True)
class Setting:
    """A method with its parameters; `scale` and `q` are Sparseout's."""

    method: Literal["sparseout", "dropout", "none"]
    scale: Scale | None = None
    q: float | None = None

    def __str__(self) -> str:
        """Its name in the progress bar."""
        return f"{self.scale} q={self.q:g}" if self.q is not None else self.method


@dataclass(frozen=True)
class Pictures:
    """Pictures of one trained model: rows of 64 pixels."""

    filters: "Tensor"
    reconstructions: "Tensor"


@dataclass(frozen=True)
class Run:
    """One trained model, measured on the test digits in evaluation mode, after the ReLU."""

    setting: Setting
    seed: int
    hoyer: float
    hoyer_live: float
    gini: float
    density: float
    dead: float
    rows: int
    undefined_rows: int
    error: float
    seconds: float
    histogram: list[int]
    pictures: Pictures | None = field(default=None, compare=False, repr=False)
    model: "Autoencoder | None" = field(default=None, compare=False, repr=False)  # without its noise

    def record(self) -> dict[str, Any]:
        """The entry of results.json."""
        numbers = {name: value for name, value in vars(self).items() if name not in ("setting", "pictures", "model")}
        return vars(self.setting) | numbers


def settings(options: Options) -> list[Setting]:
    """Every setting, in the order of the table."""
    dials = [Setting("sparseout", scale, q) for scale in options.scales for q in options.q]
    return [*dials, Setting("dropout"), Setting("none")]


def plan(options: Options) -> list[tuple[Setting, int]]:
    """Every run, seed by seed: an interrupted demonstration has compared all q's on the seeds it did."""
    return [(setting, seed) for seed in range(options.seeds) for setting in settings(options)]


def earlier(folder: Path) -> tuple[int, bool]:
    """Of how many runs the report in a folder is, and whether of all. Raises ValueError for another's file."""
    path = folder / RESULTS
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["experiment"] != "demo":
            raise KeyError
        return int(record["runs_finished"]), record["runs_finished"] == record["runs_planned"]
    except FileNotFoundError:
        return 0, False
    except (ValueError, LookupError, TypeError):
        wanted = "a new folder, or one of an earlier sparseout demo"
        raise ValueError(expected("--out", wanted, f"{str(folder)!r}, with another {RESULTS}")) from None
