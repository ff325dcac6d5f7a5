"""Controllers of every knob: q, p, k, a penalty's strength and one of the test's own; and the target in evaluation."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from sparseout import Sparseout, SparsityController, measures
from sparseout.baselines import ActivityPenalty, KWinners


class Shift(nn.Module):
    """max(x - shift, 0): sparser as the shift rises, at once."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.shift).relu()


class ShiftKnob:
    name, scale, raises_sparsity = "shift", "linear", True

    def __init__(self, layer: Any, site: str = "1", bounds: tuple[float, float] = (-1.0, 1.5)) -> None:
        self.layer, self.sites, self.bounds = layer, {site: "output"}, bounds

    def get(self) -> float:
        return float(self.layer.shift)

    def set(self, value: float) -> None:
        self.layer.shift = value


KINDS = ["q", "p", "strength", "k", "shift"]


def made(kind: str, units: int = 64) -> tuple[nn.Sequential, Any, ActivityPenalty | None]:
    """An autoencoder, the knob for it, and its penalty if that is the knob."""
    torch.manual_seed(0)
    code: Any = {
        "q": [nn.ReLU(), Sparseout(q=2.5, scale="matched")],
        "p": [nn.ReLU(), Sparseout(q=1.5, scale="matched")],
        "strength": [nn.ReLU()],
        "k": [nn.ReLU(), KWinners(0.5, boost=0)],
        "shift": [Shift()],
    }[kind]
    model = nn.Sequential(nn.Linear(8, units), *code, nn.Linear(units, 8))
    penalty = ActivityPenalty(model, [nn.ReLU], strength=1e-3).attach() if kind == "strength" else None
    return (
        model,
        {"strength": penalty, "shift": ShiftKnob(model[1]) if kind == "shift" else None}.get(kind, kind),
        penalty,
    )


BASIS = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))


def batches(steps: int, rows: int = 32) -> Iterator[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randn(rows, 4, generator=draw).relu() @ BASIS


def train(model: nn.Module, penalty: ActivityPenalty | None, controller: SparsityController, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for x in batches(steps):
        loss = (model(x) - x).square().mean() + (penalty.loss() if penalty else 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        controller.step()


@pytest.mark.parametrize(
    ("kind", "measure", "target"),
    [
        ("q", "hoyer", 0.5),
        ("p", "hoyer", 0.5),
        ("strength", "density", 0.35),
        ("k", "density", 0.35),
        ("shift", "hoyer", 0.5),
    ],
)
def test_the_target_is_met_by_every_knob(kind: str, measure: str, target: float) -> None:
    model, knob, penalty = made(kind)
    probe = next(batches(1, 512))
    controller = SparsityController(model, target, measure, knob=knob, every=2, probe=probe)
    start = list(controller.values.values())
    train(model, penalty, controller, 400)
    value = torch.tensor(list(controller._groups[0].reach.recent)[-10:]).mean().item()
    assert value == pytest.approx(target, abs=0.01)
    assert list(controller.values.values()) != start
    site = next(iter(controller.values))
    assert controller.report()[0].startswith(f"{site}: {kind} = ")
    code = model.eval()[: 3 if kind == "k" else 2](probe)
    found = measures.hoyer(code).nanmean() if measure == "hoyer" else (code > 0).float().mean()
    assert controller.measured[site] == pytest.approx(found.item(), abs=0.02)  # the knob has moved since
