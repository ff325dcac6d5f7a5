"""Training of one network under a controller or at a fixed value of its knob, and its sparsity in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseout
from sparseout import baselines
from sparseout_experiments.data import shuffled_digits, text
from sparseout_experiments.models import LanguageModel
from sparseout_experiments.studies.engine.jobs import train_own
from sparseout_experiments.studies.engine.networks import measured, perceptron, population, steered
from sparseout_experiments.studies.targets.grid import KNOBS, TASKS, Task

P, Q = 0.5, 1.5  # of Sparseout, where they are not the knob
TEST, PROBE = 450, 256  # images
WORDS, UNITS, WINDOW, COLUMNS = 1000, 64, 20, 20  # of the language model


class Threshold(nn.Module):
    """`x` where `x > threshold * rms` of its row, else 0: a layer that the library does not know."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        rms = x.detach().square().mean(-1, keepdim=True).sqrt()
        return torch.where(x > self.threshold * rms, x, 0.0)


class ThresholdKnob:
    """The threshold of all such layers of a model."""

    name, bounds, scale, raises_sparsity = "threshold", (0.0, 3.0), "linear", True

    def __init__(self, model: nn.Module) -> None:
        self._layers = {name: module for name, module in model.named_modules() if isinstance(module, Threshold)}
        self.sites = dict.fromkeys(self._layers, "output")

    def get(self) -> float:
        return next(iter(self._layers.values())).threshold

    def set(self, value: float) -> None:
        for layer in self._layers.values():
            layer.threshold = value


def layer_of(knob: str, value: float) -> nn.Module:
    """The layer after an activation: that of the knob, or none."""
    if knob == "threshold":
        return Threshold(value)
    if knob in ("q", "p"):
        p, q = (value, Q) if knob == "p" else (P, value)
        return sparseout.Sparseout(p, q, scale="matched")
    return baselines.KWinners(value) if knob == "k" else nn.Identity()


@dataclass
class Plant:
    """A network with data, as a controller meets it."""

    model: nn.Module
    sites: Sequence[str]  # modules whose outputs, in evaluation, are the hidden activations
    batches: Iterator[tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    probe: Tensor
    test: Sequence[Tensor]


def digits(name: str, knob: str, value: float, seed: int, task: Task) -> Plant:
    """An autoencoder with one hidden layer of 256 units, or a classifier with two of 128."""
    images, labels = shuffled_digits()
    x = images.flatten(1)
    y = labels if name == "classifier" else x
    sizes = [64, 128, 128, 10] if name == "classifier" else [64, 256, 64]
    model = perceptron(sizes, lambda: [nn.ReLU(), layer_of(knob, value)])
    order = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            rows = torch.randint(TEST, len(x), (task.batch,), generator=order)
            yield x[rows], y[rows]

    loss = F.cross_entropy if name == "classifier" else F.mse_loss
    sites = [str(index) for index in range(2, len(model) - 1, 3)]
    return Plant(model, sites, batches(), loss, x[TEST : TEST + PROBE], [x[:TEST]])


def language(name: str, knob: str, value: float, seed: int, task: Task) -> Plant:
    """A two-layer LSTM, the noise on the output of every layer; every window of text is read for itself."""
    corpus = text.load("topics", words=WORDS, train_size=20_000, valid_size=4_000, test_size=4_000)
    train, valid, test = (text.columns(part, COLUMNS) for part in (corpus.train, corpus.valid, corpus.test))

    def layer(place: str) -> nn.Module:
        return nn.Identity() if place == "input" else layer_of(knob, value)

    model = LanguageModel(WORDS, UNITS, UNITS, 2, layer, torch.Generator().manual_seed(seed))
    order = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            start = int(torch.randint(len(train) - WINDOW, (), generator=order))
            window = train[start : start + WINDOW + 1]
            yield window[:-1], window[1:]

    def loss(out: tuple[Tensor, Any], following: Tensor) -> Tensor:
        return F.cross_entropy(out[0].flatten(0, 1), following.flatten())

    sites = [f"noises.{index}" for index in (1, 2)]
    probe = torch.cat(valid.split(WINDOW)[:3], dim=1)
    return Plant(model, sites, batches(), loss, probe, test.split(WINDOW)[:-1])  # type: ignore[arg-type]


def run(
    name: str, knob: str, seed: int, value: float | None = None, measure: str | None = None, target: float | None = None
) -> dict[str, Any]:
    """One training, at a fixed value or to a target."""
    task, start = TASKS[name], KNOBS[knob].start if value is None else value
    torch.manual_seed(seed)
    plant = (language if name == "language" else digits)(name, knob, start, seed, task)
    model = plant.model
    penalty = None
    if knob == "strength":
        penalty = baselines.ActivityPenalty(model, list(plant.sites), strength=start, q=1.0)
    moved: Any = {"strength": penalty, "threshold": ThresholdKnob(model)}.get(knob, knob)
    bounds = task.bounds.get(knob)
    control = {"measure": measure, "knob": moved, "probe": plant.probe, "every": task.every, "bounds": bounds}
    optimizer = torch.optim.Adam(model.parameters(), lr=task.rate)
    course, messages = [], []
    with steered(model, optimizer, penalty, target, **control) as (step, controller):
        for number in range(1, task.steps + 1):
            inputs, outputs = next(plant.batches)
            messages += step(plant.loss(model(inputs), outputs))
            if controller is not None and number % task.every == 0:
                value_now = fmean(controller.values.values())
                course.append([number, value_now, fmean(m for m in controller.measured.values() if m is not None)])
    result = {"value": course[-1][1] if course else start, "course": course, "messages": messages}
    report = measured(model, list(plant.sites), plant.test)
    return result | {name: population(report, name) for name in ("hoyer", "density")}


def train(task: str, options: dict[str, Any], folder: Path) -> None:
    """A job of the engine: one training, with its result in the folder."""
    train_own(lambda: run(task, **options), options, folder)
