"""Tensors of the library's own are where the model is, whatever torch's default device: here one without values."""

import threading

import pytest
import torch
from torch import nn

from sparseout import Sparseout, SparsityController, SparsityMonitor, recalibrate_norm_, revive_
from sparseout.baselines import ActivityPenalty, GaussianDropout, KWinners, StatisticalTopK, bridgeout_, shakeout_
from sparseout.inference import _sparse_timing, compact, cost, threshold_
from sparseout.kernels import seeds

META = {"device": "meta"}


def net(*more):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), *more, nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias.fill_(3)[1] = -1
    return model


@pytest.fixture
def elsewhere():
    return torch.device("meta")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Sparseout(0.5, 1.0, scale="matched"),
        lambda: Sparseout(0.5, 1.0, gradient="exact"),
        lambda: KWinners(1, units=8),
        lambda: StatisticalTopK(0.3),
        GaussianDropout,
        lambda: bridgeout_(nn.Linear(8, 8)),
        lambda: shakeout_(nn.Linear(8, 8)),
    ],
)
def test_layers_and_second_derivatives(make, elsewhere):
    layer, x = make(), torch.rand(3, 8, requires_grad=True)
    with elsewhere:
        (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        slope.sum().backward()
    assert x.grad.isfinite().all()


def test_what_watches_a_model(elsewhere):
    model, x = net(Sparseout(0.5, 1.0), nn.BatchNorm1d(8)), torch.rand(5, 4)
    with elsewhere:
        monitor, penalty = SparsityMonitor(model), ActivityPenalty(model, strength=1.0, warmup=2).attach()
        assert penalty.loss().is_cpu
        controller = SparsityController(model, 0.5, every=1, probe=x)
        losses = []
        with monitor:
            for _ in range(3):
                model(x)
                losses.append(penalty.loss())
                losses[-1].backward()
                controller.step()
        assert revive_(model, monitor.report()).revived == {"0": (1,)}
        recalibrate_norm_(model, [x])
    assert losses[0].item() == 0 < losses[1].item() < losses[2].item()
    assert controller.measured["2"] > 0


def test_inference(elsewhere, monkeypatch):
    model, x = net().eval(), torch.rand(20, 4)
    smooth = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)).eval()
    monkeypatch.setattr(_sparse_timing, "times", lambda *functions: [function().sum().item() for function in functions])
    with elsewhere:
        assert cost(model, [x]).total["dense_macs"] == 48
        compact(model, [x]).apply_()
        assert threshold_(smooth, [x], density=0.5).records[0]["density"] == pytest.approx(0.5, abs=0.1)
        assert _sparse_timing.measure_break_even(torch.rand(4, 8, device="cpu").t(), None)
    assert model[0].out_features == 7


def test_a_seed_is_drawn_where_factories_are_patched(monkeypatch):
    """As accelerate's init_empty_weights(include_buffers=True) does, on a thread that draws its first seed."""
    monkeypatch.setattr(seeds, "_local", threading.local())
    monkeypatch.setattr(torch, "empty", lambda *args, empty=torch.empty, **other: empty(*args, **other | META))
    torch.manual_seed(0)
    number = seeds.number(None)
    torch.manual_seed(0)
    assert number == seeds.tensor(None, torch.device("cpu")).item()
