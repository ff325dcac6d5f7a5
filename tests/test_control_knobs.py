"""Controllers of every knob: q, p, k, a penalty's strength and a user's own."""

import copy
import io
from typing import Any

import pytest
import torch
from knobs import ShiftKnob, batches, made
from torch import nn
from torch._dynamo.testing import CompileCounter

from sparseout import Sparseout, Sparseout2d, SparsityController, measures
from sparseout.baselines import ActivityPenalty, GaussianDropout, KWinners, StatisticalTopK

KINDS = ["q", "p", "strength", "k", "shift"]


def train(
    model: nn.Module,
    penalty: ActivityPenalty | None,
    controller: SparsityController,
    steps: int,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=3e-3)
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
    train(model, penalty, controller, 240)
    value = torch.tensor(list(controller._groups[0].reach.recent)[-10:]).mean().item()
    assert value == pytest.approx(target, abs=0.01)
    assert list(controller.values.values()) != start
    site = next(iter(controller.values))
    assert controller.report()[0].startswith(f"{site}: {kind} = ")
    code = model.eval()[: 3 if kind == "k" else 2](probe)
    found = measures.hoyer(code).nanmean() if measure == "hoyer" else (code > 0).float().mean()
    assert controller.measured[site] == pytest.approx(found.item(), abs=0.02)  # the knob has moved since


def run(model: nn.Module, controller: SparsityController, steps: int, penalty: ActivityPenalty | None = None) -> None:
    for x in batches(steps):
        loss = model(x).square().mean() + (penalty.loss() if penalty else 0.0)
        loss.backward()
        controller.step()


@pytest.mark.parametrize("kind", KINDS)
def test_goes_on_from_its_state(kind: str) -> None:
    model, knob, penalty = made(kind)
    controller = SparsityController(model, 0.9, knob=knob, every=2)
    run(model, controller, 13, penalty)
    file = io.BytesIO()
    torch.save(controller.state_dict(), file)
    file.seek(0)
    again = copy.deepcopy(model)
    own = {"shift": ShiftKnob(again[1]), "strength": None}.get(kind, kind)
    second = ActivityPenalty(again, [nn.ReLU]).attach() if kind == "strength" else None
    other = SparsityController(again, 0.9, knob=second or own, every=2)
    other.load_state_dict(torch.load(file, weights_only=True))
    for net, moving, extra in ((model, controller, penalty), (again, other, second)):
        torch.manual_seed(5)
        run(net, moving, 9, extra)
    assert other.values == controller.values
    assert other.report() == controller.report()
    if kind != "q":
        wrong = SparsityController(nn.Sequential(Sparseout()), 0.9)
        with pytest.raises(ValueError, match=f"^expected `state` to be one of the knob q, but got one of {kind}$"):
            wrong.load_state_dict(controller.state_dict())
        with pytest.raises(AttributeError, match=f"this controller moves {kind}, not q"):
            _ = controller.q


@pytest.mark.parametrize(
    ("kind", "measure", "target", "bound"),
    [
        ("p", "hoyer", 0.995, "upper bound, 0.95"),
        ("strength", "hoyer", 0.995, "upper bound, 1"),
        ("k", "density", 0.001, "lower bound, 0.005"),
        ("shift", "density", 0.001, "upper bound, 1.5"),
    ],
)
def test_a_target_out_of_reach_names_the_knob(kind: str, measure: str, target: float, bound: str) -> None:
    model, knob, penalty = made(kind)
    controller = SparsityController(model, target, measure, knob=knob, every=1)
    says = (
        f"the target {target} of {measure} is out of reach: {kind} has been (at|close to) its {bound}, for 50 updates; "
    )
    with pytest.warns(UserWarning, match=says + "the closest value is"):
        run(model, controller, 220, penalty)
    assert "out of reach" in controller.report()[0]


def test_one_strength_for_each_module_and_floats_again_in_the_end() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    penalty = ActivityPenalty(model, strength={"1": 1e-3, "3": 1e-2}).attach()
    controller = SparsityController(model, {"1": 0.9, "3": 0.05}, knob=penalty, per_layer=True, every=1)
    run(model, controller, 4, penalty)
    assert controller.values["1"] > 1e-3
    assert controller.values["3"] < 1e-2
    assert float(penalty.strength["1"]) == pytest.approx(controller.values["1"])
    controller.detach()
    assert penalty.strength == pytest.approx(controller.values)
    assert all(isinstance(strength, float) for strength in penalty.strength.values())
    penalty.strength = {"1": 1e-3, "3": 1e-1}
    together = SparsityController(model, 0.9, knob=penalty, every=1)
    run(model, together, 4, penalty)
    assert together.values["1"] == together.values["3"] > 1e-2  # the geometric mean was that
    together.detach()
    assert penalty.strength["3"] == pytest.approx(100 * penalty.strength["1"])
    only = SparsityController(model, 0.9, knob=penalty, every=1, modules=["3"])
    before = penalty.strength["1"]
    run(model, only, 4, penalty)
    assert (list(only.values), penalty.strength["1"]) == (["3"], before)


NOISY: dict[str, Any] = {
    "p": [Sparseout2d(q=1.5, scale="matched"), GaussianDropout(0.2)],
    "k": [KWinners(0.5, k_eval=0.6, units=8), StatisticalTopK(0.5)],
}


@pytest.mark.parametrize("knob", NOISY)
@pytest.mark.slow
def test_p_and_k_move_without_recompilation_and_are_floats_again(knob: str) -> None:
    counter = CompileCounter()
    layers = copy.deepcopy(NOISY[knob])
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), *(nn.Sequential(layer, nn.Linear(8, 8)) for layer in layers))
    fast = torch.compile(model, backend=counter, fullgraph=True)
    controller = SparsityController(model, 0.9, knob=knob, every=1, gain=100)
    counts, values = [], set()
    for _ in range(5):
        for mode in (True, False):
            model.train(mode)
            fast(torch.rand((4, 8, 8) if knob == "k" else (4, 3, 8, 8))).sum().backward()
        controller.step()
        values |= set(controller.values.values())
        assert all(float(getattr(layer, knob)) == controller.values[f"{i + 2}.0"] for i, layer in enumerate(layers))
        counts.append(counter.frame_count)
    controller.detach()
    assert counts[-1] == counts[1]
    assert len(values) >= 4
    kept = {name: value for layer in layers for name, value in vars(layer).items() if name in ("p", "k", "k_eval")}
    assert {type(value) for value in kept.values()} <= {float, type(None)}


def test_a_strength_moves_without_recompilation() -> None:
    compiled = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal compiled
        compiled += 1
        return graph

    model, knob, penalty = made("strength")
    assert penalty is not None
    fast = torch.compile(model, backend=backend, fullgraph=True)
    controller = SparsityController(model, 0.9, knob=knob, every=1)
    counts, losses = [], []
    for x in batches(8):
        fast(x)
        losses.append(penalty.loss().item())
        controller.step()
        counts.append(compiled)
    assert counts[-1] == counts[1]
    assert losses[-1] > 1.2 * losses[0]  # and compiled code sees it move


def test_k_eval_keeps_its_ratio() -> None:
    model = nn.Sequential(KWinners(0.2, k_eval=0.3, boost=0))
    controller = SparsityController(model, 0.1, "density", knob="k", every=1)
    for _ in range(20):
        model(torch.rand(4, 50))
        controller.step()
    assert model[0].k == controller.values["0"] == pytest.approx(0.1, abs=0.02)
    assert model[0].k_eval == pytest.approx(1.5 * model[0].k)


def test_controllers_of_two_knobs_share_a_layer() -> None:
    layer = Sparseout(q=2.5)
    first, second = SparsityController(layer, 0.9, every=1), SparsityController(layer, 0.9, knob="p", every=1)
    layer(torch.rand(8, 6))
    for controller in (first, second):
        controller.step()
    assert first.q[""] < 2.5
    assert layer.p == second.values[""] > 0.5
    with pytest.warns(UserWarning, match="another controller has lost the model to this one"):
        SparsityController(layer, 0.9, knob="p")
    second_error = "on its layers, but got one that was detached, or that gave `` to a later one"
    with pytest.raises(RuntimeError, match=second_error):
        second.step()


def test_equal_bounds_hold_a_knob() -> None:
    layer = Sparseout(q=2.5)
    controller = SparsityController(layer, 0.9, every=1, bounds=(2.0, 2.0))
    for _ in range(20):
        layer(torch.rand(8, 6))
        controller.step()
    assert controller.q[""] == float(layer.q) == 2.0
    assert controller.measured[""] is not None


@pytest.mark.parametrize("kind", ["q", "strength"])
def test_dead_units_are_revived_where_that_is_asked_for(kind: str) -> None:
    def trained(revive: bool) -> tuple[torch.Tensor, torch.Tensor]:
        model, knob, penalty = made(kind)
        with torch.no_grad():
            model[0].bias[:5] = -1e3  # dead
        optimizer = torch.optim.Adam(model.parameters())
        controller = SparsityController(model, 0.6, knob=knob, every=1, revive=optimizer if revive else False)
        train(model, penalty, controller, 50, optimizer)
        return model[0].bias[:5], model[-1].weight[:, :5]

    bias, outgoing = trained(revive=True)
    assert (bias > -10).all()
    assert not outgoing.any()
    bias, outgoing = trained(revive=False)
    assert (bias < -900).all()
    assert outgoing.any()
    with pytest.raises(TypeError, match=r"^expected `revive` to be a bool or the optimizer, but got an int$"):
        SparsityController(made("q")[0], 0.5, revive=1)
