"""Training of small ReLU networks on digits under noise that kills units, which are revived or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparseout
from sparseout_experiments.data import shuffled_digits
from sparseout_experiments.studies.engine.jobs import train_own
from sparseout_experiments.studies.engine.networks import measured, perceptron, population

TEST = 450  # images of 1797
UNITS, P, Q = 256, 0.4, 1.0
EPOCHS, BATCH, RATE = 40, 64, 2e-3
# After which epochs dead units are revived. The last third of training is left for them to learn in.
ARMS: dict[str, tuple[int, ...]] = {"never": (), "once": (20,), "every five epochs": (5, 10, 15, 20, 25)}


@dataclass(frozen=True)
class Task:
    """A network, its loss, and its error, which is what a reader would ask for."""

    title: str
    error: str
    layers: int  # with ReLU and noise
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]  # of outputs, images, labels
    outputs: int


TASKS = {
    "autoencoder": Task("Autoencoder on digits", "squared error x 1000", 1, lambda out, x, y: F.mse_loss(out, x), 64),
    "classifier": Task(
        "ReLU classifier on digits",
        "cross-entropy x 1000",
        2,
        lambda out, x, y: F.cross_entropy(out, y),
        10,
    ),
}


def network(task: Task) -> nn.Sequential:
    """Linear, ReLU and noise for each layer, then a linear layer; weights by He et al. (2015), biases 0."""

    def linear(inputs: int, outputs: int) -> nn.Linear:
        layer = nn.Linear(inputs, outputs)
        nn.init.normal_(layer.weight, std=(2 / inputs) ** 0.5)
        nn.init.zeros_(layer.bias)
        return layer

    sizes = [64, *[UNITS] * task.layers, task.outputs]
    return perceptron(sizes, lambda: [nn.ReLU(), sparseout.Sparseout(P, Q, scale="matched")], linear)


def run(name: str, arm: str, seed: int, epochs: int = EPOCHS) -> dict[str, Any]:
    """One training; the arms of a seed are the same run up to the first revival, with the same noise after it."""
    task = TASKS[name]
    images, labels = (part.flatten(1) if part.ndim > 1 else part for part in shuffled_digits())
    x, y = images[TEST:], labels[TEST:]
    torch.manual_seed(seed)
    net, order = network(task), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    course, revived = [], []
    for epoch in range(1, epochs + 1):
        net.train()
        for rows in torch.randperm(len(x), generator=order).split(BATCH):
            optimizer.zero_grad()
            task.loss(net(x[rows]), x[rows], y[rows]).backward()
            optimizer.step()
        report = measured(net, [nn.ReLU], [x])
        course.append(live(report))
        if epoch in ARMS[arm]:
            with torch.random.fork_rng():
                done = sparseout.revive_(net, report, optimizer)
            revived.append(sum(map(len, done.revived.values())))
    with torch.no_grad():
        tested = net.eval()(images[:TEST])
        error = 1000 * task.loss(tested, images[:TEST], labels[:TEST])
    report = measured(net, [nn.ReLU], [x])
    result = {"error": error.item(), "live": live(report), "revived": revived, "course": course}
    result["hoyer"] = population(report, "hoyer")
    if task.outputs == 10:
        result["wrong"] = (tested.argmax(1) != labels[:TEST]).double().mean().item()
    return result


def live(report: sparseout.SparsityReport) -> float:
    """The part of the units that fire on any of the training images; all layers have as many."""
    return 1 - population(report, "dead_units") / UNITS


def train(task: str, options: dict[str, Any], folder: Path) -> None:
    """A job of the engine: one training, with its result in the folder."""
    train_own(lambda: run(task, **options), options, folder, "scikit-learn")
