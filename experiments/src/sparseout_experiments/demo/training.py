"""The runs of the demonstration: those of `sparseout run autoencoder`, and a look at what each has learned."""

from collections.abc import Callable, Generator, Mapping
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseout_experiments.config import resolve
from sparseout_experiments.data import Split, images
from sparseout_experiments.demo import BINS, HIGHEST, LOWEST
from sparseout_experiments.models import Autoencoder
from sparseout_experiments.studies.engine.cluster import Job
from sparseout_experiments.training import run_folder
from sparseout_experiments.training.environment import one_thread
from sparseout_experiments.training.loop import perform

OnProgress = Callable[[str, float], None]  # the name of a run, and the fraction of it that is done


class Look(NamedTuple):
    """Result of a run: its network without noise, its active units by size, and pictures, rows of 64 pixels."""

    model: Autoencoder
    histogram: list[int]
    reconstructions: Tensor
    filters: Tensor


def run_all(jobs: Mapping[str, Job], on_progress: OnProgress) -> Generator[Look | None, None, None]:
    """Train run after run, each in its folder, and look at it; None for one that has diverged."""
    with one_thread():
        for name, job in jobs.items():
            yield train(name, job, on_progress)


def train(name: str, job: Job, on_progress: OnProgress) -> Look | None:
    """Train one autoencoder and look at its best weights."""
    try:
        perform(resolve(job.task, job.options), job.folder, lambda progress: on_progress(name, progress.done))
    except run_folder.RunFailed:
        return None
    state, _ = run_folder.load(job.folder)
    assert state is not None
    weights: dict[str, Tensor] = state["best"]["weights"]
    with torch.random.fork_rng(devices=[]):  # it draws weights, and then gets others
        units, pixels = weights["encoder.weight"].shape
        model = Autoencoder(pixels, units, nn.Identity(), torch.Generator())
    model.load_state_dict(weights)
    return look(model, digits().test)


@torch.no_grad()
def look(model: Autoencoder, test: Tensor, count: int = 10) -> Look:
    """The sizes of the active units; and reconstructions, with what the units add that contribute most to them."""
    code = model.code(test)
    exponents = code[code > 0].log10().clamp(LOWEST, HIGHEST)
    histogram = [int(number) for number in torch.histc(exponents, BINS, LOWEST, HIGHEST)]
    weight = model.decoder.weight.t()
    power = code.square().mean(0) * weight.square().sum(1)
    return Look(model, histogram, model.decoder(code[:count]), weight[power.topk(count).indices].clone())


@cache
def digits() -> Split:
    """The digits as the runs see them, as rows of 64 pixels."""
    data = images.load("digits", labelled=False)
    return Split(*(part.pixels.flatten(1).float() / 255 for part in (data.train, data.test)))


def mean_error() -> float:
    """The error x 1000 of answering every test digit with the average training digit: what a network must beat."""
    train, test = digits()
    return 1000 * F.mse_loss(train.mean(0).expand_as(test), test).item()
