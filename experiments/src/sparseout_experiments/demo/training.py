"""The runs of the demonstration: those of `sparseout run autoencoder`, and a look at what each has learned."""

import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseout_experiments.config import resolve
from sparseout_experiments.data import Split, images
from sparseout_experiments.demo import BINS, HIGHEST, LOWEST, Options, Pictures, Run, Setting, plan
from sparseout_experiments.models import Autoencoder
from sparseout_experiments.training import run_folder
from sparseout_experiments.training.environment import one_thread
from sparseout_experiments.training.loop import perform

MEASURES: tuple[str, ...] = ("hoyer", "hoyer_live", "gini", "density", "rows", "undefined_rows")
OnProgress = Callable[[Setting, int, float], None]  # the last is the fraction of the run that is done


def run_all(options: Options, on_progress: OnProgress) -> Iterator[Run]:
    """Train and measure run after run."""
    with one_thread(), TemporaryDirectory() as folder:
        for index, (setting, seed) in enumerate(plan(options)):
            yield train(setting, seed, options, Path(folder) / str(index), on_progress)


def chosen(setting: Setting, seed: int, options: Options) -> dict[str, Any]:
    """A run as options of `sparseout run autoencoder`: within a seed, weights and batches are the same."""
    given: dict[str, Any] = {"method": setting.method, "seed": seed, "epochs": options.epochs, "device": "cpu"}
    if setting.method != "none":
        given["p"] = options.p
    if setting.method == "sparseout":
        given |= {"q": setting.q, "scale": setting.scale, "gradient": options.gradient}
    return given


def train(setting: Setting, seed: int, options: Options, folder: Path, on_progress: OnProgress) -> Run:
    """Train one autoencoder and measure its code on the test digits; what has diverged has no numbers."""
    test = digits().test
    try:
        config = resolve("autoencoder", chosen(setting, seed, options))
        result = perform(config, folder, lambda progress: on_progress(setting, seed, progress.done))
    except run_folder.RunFailed:
        nothing: dict[str, Any] = dict.fromkeys(("hoyer", "hoyer_live", "gini", "density", "dead", "error"), math.nan)
        return Run(setting, seed, **nothing, rows=len(test), undefined_rows=0, seconds=0.0, histogram=[0] * BINS)
    state, _ = run_folder.load(folder)
    assert state is not None
    weights: dict[str, Tensor] = state["best"]["weights"]
    with torch.random.fork_rng(devices=[]):  # it draws weights, and then gets others
        model = Autoencoder(test.shape[1], len(weights["encoder.bias"]), nn.Identity(), torch.Generator())
    model.load_state_dict(weights)
    code: dict[str, Any] = result["sparsity"]["code"]
    found: dict[str, Any] = {name: math.nan if value is None else value for name, value in code.items()}
    histogram, pictures = look(model, test)
    return Run(
        setting,
        seed,
        **{name: found[name] for name in MEASURES},
        dead=found["dead_units"] / found["units"],
        error=result["test"]["mse"],
        seconds=result["seconds"],
        histogram=histogram,
        pictures=pictures if seed == 0 else None,
        model=model,
    )


@torch.no_grad()
def look(model: Autoencoder, test: Tensor, count: int = 10) -> tuple[list[int], Pictures]:
    """The sizes of the active units; and reconstructions, with what the units add that contribute most to them."""
    code = model.code(test)
    exponents = code[code > 0].log10().clamp(LOWEST, HIGHEST)
    histogram = [int(number) for number in torch.histc(exponents, BINS, LOWEST, HIGHEST)]
    weight = model.decoder.weight.t()
    power = code.square().mean(0) * weight.square().sum(1)
    return histogram, Pictures(weight[power.topk(count).indices].clone(), model.decoder(code[:count]))


@cache
def digits() -> Split:
    """The digits as the runs see them, as rows of 64 pixels."""
    found = images.load("digits", labelled=False)
    return Split(*(part.pixels.flatten(1).float() / 255 for part in (found.train, found.test)))


def mean_error() -> float:
    """The error of answering every test digit with the average training digit: what a network must beat."""
    train, test = digits()
    return F.mse_loss(train.mean(0).expand_as(test), test).item()
