"""What the callbacks share, without a framework: the knob, and what counts as zero."""

import json

import pytest
import torch
from torch import nn

from sparseout import Sparseout
from sparseout.baselines import ActivityPenalty
from sparseout.integrations._common import TrainingSession


def net():
    return nn.Sequential(nn.Linear(6, 24), nn.GELU(), Sparseout(0.5, q=2.0), nn.Linear(24, 6))


def test_another_knob_is_moved_and_logged_and_eps_holds_for_both():
    model, x = net(), torch.randn(64, 6)
    code = model[:2](x).detach()
    session = TrainingSession(0.1, ("density",), None, 1, {"measure": "density", "every": 1}, "p", 0.05)
    session.begin(model)
    model(x)
    session.step()
    values = session.values("train")
    assert values["1/density"] == pytest.approx((code.abs() > 0.05).double().mean().item())
    assert session.controller.measured["2"] == pytest.approx(values["1/density"])
    assert values["2/p"] == model[2].p > 0.5
    assert values["2/q"] == 2.0
    assert json.loads(json.dumps(session.arguments())).items() >= {"knob": "p", "eps": 0.05, "relative": False}.items()
    session.close()


def test_a_penalty_is_a_knob():
    model = net()
    penalty = ActivityPenalty(model, strength=1e-3)
    session = TrainingSession(0.9, ("hoyer",), None, 1, {"every": 1}, penalty)
    session.begin(model)
    with penalty:
        model(torch.randn(64, 6))
        session.step()
        assert session.values("train")["1/strength"] > 1e-3
    assert session.arguments()["knob"] == "ActivityPenalty"
    session.close()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"target": None, "knob": "p"},
            ValueError,
            "expected `target` to be a number, as `knob` is given, but got None",
        ),
        ({"control": {"eps": 0.1}}, ValueError, "without eps, which is an argument of its own"),
        ({"eps": -1.0}, ValueError, "expected `eps` to be a finite number >= 0, but got -1.0"),
        ({"relative": 1}, TypeError, "expected `relative` to be a bool"),
    ],
)
def test_wrong_arguments(options, error, text):
    with pytest.raises(error) as caught:
        TrainingSession(
            **{"target": 0.5, "measures": ("hoyer",), "modules": None, "every": 1, "control": None} | options
        )
    assert text in str(caught.value)
