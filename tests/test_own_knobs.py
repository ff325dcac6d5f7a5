"""Knobs of one's own, and what is refused as a knob."""

from typing import Any

import pytest
import torch
from knobs import Shift, ShiftKnob, batches, made
from torch import nn

from sparseout import SparsityController
from sparseout.baselines import ActivityPenalty, KWinners


class Lacking:
    name = "none"


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"sites": {"7": "output"}}, ValueError, "`knob.sites` to be by names of the model's modules, but got '7'"),
        ({"sites": {"1": "both"}}, ValueError, "`knob.sites` to be 'input' or 'output' for '1', but got 'both'"),
        ({"sites": {}}, TypeError, "`knob.sites` to be a mapping of names of .*, but got an empty one"),
        ({"scale": "cubic"}, ValueError, "`knob.scale` to be one of 'linear', 'log', 'logit', but got 'cubic'"),
        (
            {"scale": "log"},
            ValueError,
            r"`knob.bounds` to be two finite numbers > 0, low <= high, but got \(-1.0, 1.5\)",
        ),
        ({"raises_sparsity": 1}, TypeError, "`knob.raises_sparsity` to be a bool, but got an int"),
        ({"name": ""}, TypeError, "`knob.name` to be a name, but got ''"),
        ({"get": lambda: None}, TypeError, r"`knob.get\(\)` to be a finite number, but got None"),
    ],
)
def test_what_is_no_knob_is_refused(changed: dict[str, Any], error: type, says: str) -> None:
    model, knob, _ = made("shift")
    for name, value in changed.items():
        setattr(knob, name, value)
    with pytest.raises(error, match=f"^expected {says}$"):
        SparsityController(model, 0.5, knob=knob)
    assert not model[1]._forward_hooks


@pytest.mark.parametrize(
    ("knob", "error", "says"),
    [
        ("strength", ValueError, "'q', 'p', 'k', an ActivityPenalty, or an object as sparseout.Knob .* got 'strength'"),
        (3, TypeError, "'q', .*, but got an int"),
        (Lacking(), TypeError, "'q', .*, but got a Lacking without sites, bounds, scale, raises_sparsity, get, set"),
        (ShiftKnob, TypeError, "'q', .*, but got <class '.*ShiftKnob'>"),
        ([], ValueError, "one knob, or with per_layer=True a sequence of them, but got a list"),
        ("k", ValueError, "one with KWinners layers, which sparseout.baselines has, but got a Sequential"),
    ],
)
def test_other_knobs_are_refused(knob: Any, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        SparsityController(made("shift")[0], 0.5, knob=knob)
    with pytest.raises(
        ValueError, match="`knob` to be a penalty on modules of the model, but got one on another's, '0'"
    ):
        SparsityController(made("shift")[0], 0.5, knob=ActivityPenalty(nn.Sequential(nn.ReLU())))
    wanted = (
        "`k` to be a fraction of the units of '0', to be moved, but got 3, a number of them: give the layer k / units"
    )
    with pytest.raises(ValueError, match=wanted):
        SparsityController(nn.Sequential(KWinners(3)), 0.5, knob="k")


def test_several_knobs_of_ones_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), Shift(), nn.Linear(32, 32), Shift())
    knobs = [ShiftKnob(model[number], str(number)) for number in (1, 3)]
    controller = SparsityController(model, {"1": 0.3, "3": 0.1}, "density", knob=knobs, per_layer=True, every=1)
    for x in batches(200, 256):
        model(x)
        controller.step()
    assert controller.measured == pytest.approx({"1": 0.3, "3": 0.1}, abs=0.03)
    assert [knob.get() for knob in knobs] == list(controller.values.values())
    with pytest.raises(ValueError, match="one knob, or with per_layer=True a sequence"):
        SparsityController(model, 0.5, knob=knobs)
    with pytest.raises(ValueError, match="`modules` to be None beside a knob of your own"):
        SparsityController(model, 0.5, knob=knobs[0], modules=["1"])


@pytest.mark.parametrize("bounds", [(0.1, 1.0), (1.0, 10.0)])
def test_bounds_of_k_are_fractions_since_from_1_on_k_is_a_number_of_units(bounds: tuple[float, float]) -> None:
    model = nn.Sequential(nn.Linear(4, 8), KWinners(0.3))
    with pytest.raises(ValueError, match="`bounds` to be two finite numbers > 0 and < 1, low <= high"):
        SparsityController(model, 0.5, knob="k", bounds=bounds)
    assert model[1].k == 0.3


def test_a_knob_of_ones_own_may_have_the_name_of_one_of_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    knob = ShiftKnob(Shift())
    knob.name = "q"
    assert SparsityController(model, 0.5, knob=knob, bounds=(-0.5, 0.5)).bounds == (-0.5, 0.5)
