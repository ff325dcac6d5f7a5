"""Training of classifiers to a density of their activations, and what that density is worth in evaluation."""

from __future__ import annotations

import copy
import functools
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseout
from sparseout import baselines, inference
from sparseout_experiments.data import images
from sparseout_experiments.studies.engine.networks import measured, perceptron, population, steered

TARGETS = (0.3, 0.1, 0.05)  # of the density: the fraction of hidden units that are not 0, in evaluation
STEERED = ("sparseout", "penalty", "topk")  # methods that take a target
METHODS = ("none", "dropout", *STEERED)
BATCHES = (1, 64)  # rows of a call that is timed
SEEDS = (0, 1, 2)
P = 0.5  # of Dropout and Sparseout
RATE = 1e-3  # of Adam
EVERY = 5  # steps between updates of the controller
PROBE = 256  # training images on which it measures


@dataclass(frozen=True)
class Task:
    """A data set, the sizes of its network, and how long that is trained."""

    title: str
    units: int
    epochs: int
    batch: int
    train: int | None
    test: int


TASKS = {
    "digits": Task("Digits (8 x 8)", 500, 30, 64, None, 450),
    "mnist": Task("MNIST", 1000, 6, 50, 5_000, 5_000),
}


def activation(method: str, target: float | None) -> list[nn.Module]:
    """The activation and the noise of a method."""
    if method == "topk":
        assert target is not None
        return [baselines.StatisticalTopK(target), nn.Identity()]
    noise: nn.Module = nn.Identity()
    if method == "dropout":
        noise = nn.Dropout(P)
    if method == "sparseout":
        noise = sparseout.Sparseout(P, 2.0, scale="matched")
    return [nn.ReLU(), noise]


def run(name: str, data: str, method: str, target: float | None, seed: int) -> dict[str, Any]:
    """One training, and what its network is worth compacted and made sparse."""
    task, loaded = TASKS[name], load(name, data)
    train, test = ((part.pixels.flatten(1).float(), part.labels) for part in (loaded.train, loaded.test))
    mean, std = train[0].mean(), train[0].std()
    x, y = (train[0] - mean) / std, train[1]
    torch.manual_seed(seed)
    model = perceptron([x.shape[1], task.units, task.units, loaded.classes], lambda: activation(method, target))
    penalty = None
    if method == "penalty":
        penalty = baselines.ActivityPenalty(model, [nn.ReLU], strength=1e-3, q=1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
    knob: Any = {"sparseout": "q", "penalty": penalty, "topk": "k"}.get(method)
    bounds = {"sparseout": (0.1, 4.0), "topk": (0.002, 0.5)}.get(method)
    control = {"measure": "density", "knob": knob, "probe": x[:PROBE], "every": EVERY, "bounds": bounds}
    order, messages = torch.Generator().manual_seed(seed), []
    with steered(model, optimizer, penalty, target, **control) as (step, controller):
        for _ in range(task.epochs):
            for rows in torch.randperm(len(x), generator=order).split(task.batch):
                messages += step(F.cross_entropy(model(x[rows]), y[rows]))
        knob_value = None if controller is None else next(iter(controller.values.values()))
    model.eval().requires_grad_(False)
    return {"knob": knob_value, "told": messages} | worth(model, x, (test[0] - mean) / std, test[1])


def worth(model: nn.Sequential, x: Tensor, test: Tensor, labels: Tensor) -> dict[str, Any]:
    """Error and density of a trained network, its sizes before and after compaction, and its times."""
    batches = x.split(1000)
    result: dict[str, Any] = {"error": wrong(model, test, labels), "density": density(model, test)}
    compacted = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing to remove is an outcome here
        plan = inference.compact(compacted, batches)
        plan.apply_()
    result |= {"parameters": count(model), "parameters_compact": count(compacted)}
    result["error_compact"] = wrong(compacted, test, labels)
    for key, network in (("macs", model), ("macs_compact", compacted)):
        total = inference.cost(network, [test]).total
        result |= {f"{key}_dense": total["dense_macs"], f"{key}_effective": total["effective_macs"]}
    sparse = copy.deepcopy(compacted)
    report = inference.sparse_linear_(sparse, [test[:rows] for rows in BATCHES])
    result["sparse_layers"] = sorted(report.changed)
    result["error_sparse"] = wrong(sparse, test, labels)
    networks: dict[str, nn.Module] = {"dense": model, "compact": compacted, "sparse": sparse}
    return result | {"us": timed(networks, test)}


@torch.no_grad()
def wrong(model: nn.Module, test: Tensor, labels: Tensor) -> float:
    """The fraction of images that are misclassified."""
    return float((model(test).argmax(1) != labels).double().mean())


def density(model: nn.Module, test: Tensor) -> float:
    """The fraction of hidden units that are not 0, a mean over the two layers."""
    kinds: Sequence[type[nn.Module]] = [nn.ReLU, baselines.StatisticalTopK]
    present = [kind for kind in kinds if any(isinstance(module, kind) for module in model.modules())]
    return population(measured(model, present, [test]), "density")


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def timed(networks: dict[str, nn.Module], test: Tensor, seconds: float = 0.3) -> dict[str, dict[str, float]]:
    """Microseconds a row of each network at each number of rows: the median of calls, all networks in turn."""
    medians: dict[str, dict[str, float]] = {name: {} for name in networks}
    for rows in BATCHES:
        inputs = test[: 8 * rows].split(rows)
        calls: dict[str, list[float]] = {name: [] for name in networks}
        began, turn = time.perf_counter(), 0
        while turn < 16 or time.perf_counter() - began < seconds * len(networks):
            for name, network in networks.items():
                calls[name].append(_seconds(network, inputs[turn % len(inputs)]))
            turn += 1
        for name, times in calls.items():
            medians[name][str(rows)] = 1e6 * sorted(times)[len(times) // 2] / rows
    return medians


def _seconds(network: Callable[[Tensor], Tensor], x: Tensor) -> float:
    network(x)  # its weights are in the cache, as far as they fit
    start = time.perf_counter()
    network(x)
    return time.perf_counter() - start


@functools.cache
def load(name: str, source: str) -> images.Images:
    """Decoded once for all jobs of a worker. Nothing is chosen by validation data; 100 images are held out."""
    return images.load(source, train_size=TASKS[name].train, valid_size=100, test_size=TASKS[name].test)
