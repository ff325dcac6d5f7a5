"""Training under the noise beside training under the penalty, and what rescaling does to a network of two layers.

Linear regression (the Gaussian family) of images from features, on scikit-learn's digits in their 16 leading principal
components, in fp64. The noise is the library's.
"""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sparseout
from sparseout import theory
from sparseout.functional import Gradient
from sparseout_experiments.data import shuffled_digits

P = 0.5
IMAGES, INPUTS, UNITS, HIDDEN = 128, 16, 16, 32
COPIES = 4  # draws of the noise a step
STEPS = 2000
RATE = 0.1  # falling to 0 over the steps
TRAINED = (1.0, 1.25, 1.5, 2.0, 3.0)
NEAR = 0.1  # how much larger a q gives the solution that distances are to be compared with
SHOWN = 24  # images whose features are kept for a figure
GRADIENTS: tuple[Gradient, ...] = ("exact", "detached")


def images(count: int = IMAGES) -> Tensor:
    """So many digits as 16 numbers each, of mean 0 and, over all, variance 1."""
    pixels = shuffled_digits()[0][450:].flatten(1)[:count].double()
    centred = pixels - pixels.mean(0)
    left, size, right = torch.linalg.svd(centred, full_matrices=False)
    right = right[:INPUTS]
    sign = right.gather(1, right.abs().argmax(1, keepdim=True)).sign().squeeze(1)  # which an SVD leaves open
    components = left[:, :INPUTS] * size[:INPUTS] * sign
    scaled: Tensor = components / components.std()
    return scaled


def decoder(units: int = UNITS) -> Tensor:
    """A fixed second layer, (inputs, units), with columns of length 1."""
    weight = torch.randn(INPUTS, units, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit: Tensor = weight / weight.norm(dim=0)
    return unit


def penalty(features: Tensor, weight: Tensor, q: float) -> Tensor:
    """R of all outputs together, a number for each image: A'' is 1, so that a column counts by its length."""
    return theory.lq_penalty(features, weight.norm(dim=0), P, q, theory.GAUSSIAN)


def misfit(x: Tensor, features: Tensor, weight: Tensor) -> Tensor:
    """Half of the squared error, a number for each image."""
    return (x - features @ weight.T).square().sum(-1) / 2


def by_penalty(x: Tensor, weight: Tensor, q: float, factor: float, iterations: int = 500) -> Tensor:
    """The encoder that minimises loss + factor * R, found by L-BFGS. Convex for q >= 1."""
    encoder = (weight.T / 2).contiguous().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [encoder], max_iter=iterations, tolerance_grad=1e-9, tolerance_change=1e-15, history_size=50,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        features = x @ encoder.T
        objective = (misfit(x, features, weight) + factor * penalty(features, weight, q)).mean()
        objective.backward()
        return objective

    optimizer.step(closure)
    return encoder.detach()


def descend(
    x: Tensor, weight: Tensor, q: float, gradient: Gradient, steps: int, start: Tensor,
    features: Callable[[Tensor], Tensor],
) -> tuple[Tensor, list[float]]:  # fmt: skip
    """Gradient descent under the noise from `start`: the mean of its second half, and the lengths of the gradients."""
    value, total, lengths = start.clone().requires_grad_(), torch.zeros_like(start), []
    for step in range(steps):
        noisy = sparseout.sparseout(features(value), P, q, gradient=gradient, seed=step)
        (slope,) = torch.autograd.grad(misfit(x, noisy, weight).mean(), value)
        with torch.no_grad():
            value -= RATE * (1 - step / steps) * slope
            if 2 * step >= steps:
                total += value
                lengths.append(slope.norm().item())
    return total / len(lengths), lengths


def equivalence(q: float, gradient: Gradient, steps: int = STEPS) -> dict[str, Any]:
    """Features learned under the noise, and under the penalty that its gradient stands for."""
    x, weight = images(), decoder()
    encoder, lengths = descend(
        x, weight, q, gradient, steps, weight.T / 2, lambda encoder: (x @ encoder.T).expand(COPIES, -1, -1)
    )
    noise = x @ encoder.T
    factor = 1.0 if gradient == "exact" else 2 / q
    wanted = x @ by_penalty(x, weight, q, factor).T
    near = x @ by_penalty(x, weight, q + NEAR, 1.0 if gradient == "exact" else 2 / (q + NEAR)).T
    return {
        "q": q,
        "gradient": gradient,
        "distance": distance(noise, wanted),
        "near": distance(near, wanted),
        "largest_gradient": max(lengths) / statistics.median(lengths),
        "hoyer": {
            "noise": sparseout.measures.hoyer(noise).mean().item(),
            "penalty": sparseout.measures.hoyer(wanted).mean().item(),
        },
        "features": {"noise": rounded(noise[:SHOWN].flatten()), "penalty": rounded(wanted[:SHOWN].flatten())},
    }


def distance(value: Tensor, reference: Tensor) -> float:
    """The length of the difference over that of the reference."""
    return float((value - reference).norm() / reference.norm())


def rounded(values: Tensor) -> list[float]:
    """For figures, which show no more digits."""
    return [float(f"{value:.4g}") for value in values.tolist()]


# The path of one image's features


def path(steps: int = 1500) -> dict[str, Any]:
    """The features of one digit that minimise loss + R, for q from 1 to 4, and those found under the noise."""
    weight, x = decoder(12), images()[_DIGIT]
    grid = [1 + index / 16 for index in range(49)]
    lines = [sparse_code(x, weight, q) for q in grid]
    marks = []
    for q in (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0):
        features, _ = descend(
            x, weight, q, "exact", steps, weight.T @ x / 2, lambda value: value.expand(32 * COPIES, -1)
        )  # fmt: skip
        wanted = sparse_code(x, weight, q)
        marks.append({"q": q, "features": rounded(features), "distance": distance(features, wanted)})
    return {"q": grid, "features": [rounded(line) for line in lines], "noise": marks}


_DIGIT = 3


def sparse_code(x: Tensor, weight: Tensor, q: float, sweeps: int = 2000) -> Tensor:
    """The minimum of loss + R in the features themselves, one after the other: convex for q >= 1, |h| included."""
    gram, pull = (weight.T @ weight).tolist(), (weight.T @ x).tolist()
    code = [0.0] * len(pull)
    for _ in range(sweeps):
        before = list(code)
        for index, row in enumerate(gram):
            rest = pull[index] - sum(a * h for a, h in zip(row, code, strict=True)) + row[index] * code[index]
            code[index] = _alone(row[index], rest, P / (1 - P) * row[index] / 2, q)
        if max(abs(a - b) for a, b in zip(before, code, strict=True)) < 1e-12:
            break
    return torch.tensor([h if abs(h) > 1e-9 else 0.0 for h in code], dtype=torch.float64)


def _alone(curvature: float, pull: float, strength: float, q: float) -> float:
    """The minimum over h of curvature h^2 / 2 - pull h + strength |h|^q, by bisection of its slope."""
    low, high = 0.0, abs(pull) / curvature
    for _ in range(60):
        middle = (low + high) / 2
        rising = curvature * middle + q * strength * middle ** (q - 1) > abs(pull)
        low, high = (low, middle) if rising else (middle, high)
    return low if pull > 0 else -low


# Rescaling


class Kind(NamedTuple):
    """A way to train a network of two layers."""

    q: float
    gradient: Gradient
    decay: float


DECAY = 0.05
LONG, SLOW = 2000, 0.02  # steps, and their constant rate
KINDS = tuple(
    kind for q in (1.0, 3.0) for kind in (Kind(q, "exact", 0.0), Kind(q, "detached", 0.0), Kind(q, "exact", DECAY))
)


def rescaling(kind: Kind, steps: int = LONG) -> dict[str, Any]:
    """Train both layers of a ReLU network and follow the balance |U|^2 - |W|^2 of their weights.

    `predicted` is the integral of 2 (2 - q) R over time, which is steps times rate: what "exact" without weight decay
    makes of it. With weight decay it settles at (2 - q) R / decay.
    """
    x, every = images(), max(steps // 60, 1)
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(HIDDEN, INPUTS, generator=generator, dtype=torch.float64) / INPUTS**0.5
    second = torch.randn(INPUTS, HIDDEN, generator=generator, dtype=torch.float64)
    second *= first.norm(dim=1) / second.norm(dim=0)  # every unit balanced
    layers = (first.requires_grad_(), second.requires_grad_())
    rows: list[dict[str, float]] = []
    predicted = 0.0
    for step in range(steps + 1):
        features = torch.relu(x @ first.T)
        with torch.no_grad():
            balance = (first.square().sum() - second.square().sum()).item()
            cost = penalty(features, second, kind.q).mean().item()
            if step % every == 0:
                rows.append(
                    {
                        "time": step * SLOW,
                        "balance": balance,
                        "predicted": predicted,
                        "penalty": cost,
                        "loss": misfit(x, features, second).mean().item(),
                        "rms": features.square().mean().sqrt().item(),
                    }
                )
        predicted += SLOW * 2 * (2 - kind.q) * cost
        noisy = sparseout.sparseout(features, P, kind.q, gradient=kind.gradient, seed=step)
        weights = sum(layer.square().sum() for layer in layers)
        objective = misfit(x, noisy, second).mean() + kind.decay / 2 * weights
        slopes = torch.autograd.grad(objective, layers)
        with torch.no_grad():
            for layer, slope in zip(layers, slopes, strict=True):
                layer -= SLOW * slope
    return {**kind._asdict(), "rows": rows}
