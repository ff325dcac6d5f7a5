"""The demonstration: one autoencoder on handwritten digits, trained once for every q, scale and seed.

Within a seed every run starts from the same weights and sees the same batches: weights, order and noise come from
three generators, so that the noise is all that differs.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseout import Sparseout
from sparseout._utils.validation import expected
from sparseout.measures import Streaming
from sparseout_experiments.data import Split
from sparseout_experiments.models import Autoencoder

Scale = float | Literal["paper", "matched"]
Gradient = Literal["detached", "exact"]

UNITS = 256
BATCH = 64
LEARNING_RATE = 1e-3
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

    filters: Tensor
    reconstructions: Tensor


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

    def record(self) -> dict[str, Any]:
        """The entry of results.json."""
        numbers = {name: value for name, value in vars(self).items() if name not in ("setting", "pictures")}
        return vars(self.setting) | numbers


def settings(options: Options) -> list[Setting]:
    """Every setting, in the order of the table."""
    dials = [Setting("sparseout", scale, q) for scale in options.scales for q in options.q]
    return [*dials, Setting("dropout"), Setting("none")]


def plan(options: Options) -> list[tuple[Setting, int]]:
    """Every run, seed by seed: an interrupted demonstration has compared all q's on the seeds it did."""
    return [(setting, seed) for seed in range(options.seeds) for setting in settings(options)]


def run_all(options: Options, data: Split, on_epoch: Callable[[Setting, int], None]) -> Iterator[Run]:
    """Train and measure run after run; `on_epoch` hears of every epoch."""
    with one_thread():
        for setting, seed in plan(options):
            yield train(setting, seed, options, data, on_epoch)


def earlier(folder: Path) -> tuple[int, bool]:
    """Of how many runs the report in a folder is, and whether of all. Raises ValueError for another's file."""
    path = folder / RESULTS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["experiment"] != "demo":
            raise KeyError
        return int(found["runs_finished"]), found["runs_finished"] == found["runs_planned"]
    except FileNotFoundError:
        return 0, False
    except (ValueError, LookupError, TypeError):
        wanted = "a new folder, or one of an earlier sparseout demo"
        raise ValueError(expected("--out", wanted, f"{str(folder)!r}, with another {RESULTS}")) from None


def noise_layer(setting: Setting, options: Options) -> nn.Module:
    """The layer on the code."""
    if setting.method == "none":
        return nn.Identity()
    if setting.method == "dropout":
        return nn.Dropout(options.p)
    assert setting.q is not None
    scale = None if setting.scale == "paper" else setting.scale
    return Sparseout(options.p, setting.q, gradient=options.gradient, scale=scale)


def train(setting: Setting, seed: int, options: Options, data: Split, on_epoch: Callable[[Setting, int], None]) -> Run:
    """Train one autoencoder and measure its code."""
    started = time.perf_counter()
    weights, order = (torch.Generator().manual_seed(3 * seed + stream) for stream in range(2))
    with torch.random.fork_rng(devices=[]):
        model = Autoencoder(data.train.shape[1], UNITS, noise_layer(setting, options), weights)
        torch.default_generator.manual_seed(3 * seed + 2)  # the noise
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
        for _ in range(options.epochs):
            for batch in torch.split(torch.randperm(len(data.train), generator=order), BATCH):
                x = data.train[batch]
                loss = F.mse_loss(model(x), x)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            on_epoch(setting, seed)
    return measure(model, setting, seed, data.test, time.perf_counter() - started)


@torch.no_grad()
def measure(model: Autoencoder, setting: Setting, seed: int, test: Tensor, seconds: float) -> Run:
    """Measure a trained model; the pictures are kept for the first seed."""
    model.eval()
    code = model.code(test)
    reconstruction = model(test)
    streaming = Streaming(("hoyer", "gini", "density"))
    streaming.update(code)
    found = streaming.compute()
    exponents = code[code > 0].log10().clamp(LOWEST, HIGHEST)
    return Run(
        setting=setting,
        seed=seed,
        hoyer=float(found["hoyer"]),
        hoyer_live=float(found["hoyer_live"]),
        gini=float(found["gini"]),
        density=float(found["density"]),
        dead=float(found["dead_units"] / found["units"]),
        rows=int(found["rows"]),
        undefined_rows=int(found["undefined_rows"]),
        error=F.mse_loss(reconstruction, test).item(),
        seconds=seconds,
        histogram=[int(count) for count in torch.histc(exponents, BINS, LOWEST, HIGHEST)],
        pictures=Pictures(_busiest_filters(model, code), reconstruction[:10].clone()) if seed == 0 else None,
    )


def mean_error(data: Split) -> float:
    """The error of answering every test digit with the average training digit: what a network must beat."""
    return F.mse_loss(data.train.mean(0).expand_as(data.test), data.test).item()


def _busiest_filters(model: Autoencoder, code: Tensor, count: int = 10) -> Tensor:
    """The decoder's weights of the units that contribute most to the reconstructions."""
    weight = model.decoder.weight.t()
    power = code.square().mean(0) * weight.square().sum(1)
    return weight[power.topk(count).indices].clone()


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for a block: at this size a second one doubles the processor time and saves none."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
