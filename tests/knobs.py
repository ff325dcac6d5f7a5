"""Models whose sparsity each kind of knob moves, and a knob of a user."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from sparseout import Sparseout
from sparseout.baselines import ActivityPenalty, KWinners


class Shift(nn.Module):
    """max(x - shift, 0): sparser as the shift rises, at once."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.shift).relu()


class ShiftKnob:
    name, scale, raises_sparsity, bounds = "shift", "linear", True, (-1.0, 1.5)

    def __init__(self, layer: Any, site: str = "1") -> None:
        self.layer = layer
        self.sites: Mapping[str, str] = {site: "output"}

    def get(self) -> float:
        return float(self.layer.shift)

    def set(self, value: float) -> None:
        self.layer.shift = value


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
