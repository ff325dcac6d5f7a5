"""The closed loop, on a plant whose answer is known and on real networks."""

import io
import math
import os
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import sparseout
from sparseout import Sparseout, SparsityController, measures
from sparseout.control._law import Axis, Law, Swing, response, smooth, trial_side

UNITS = 100


class Plant(nn.Module):
    """Puts out rows of a Hoyer that follows q of its layer with a lag: 0.9 - 0.15 q in the end."""

    def __init__(self, q: float = 2.5, lag: float = 20.0, dead: int = 0, layers: int = 1) -> None:
        super().__init__()
        self.noise = nn.ModuleList(Sparseout(q=q, scale="matched") for _ in range(layers))
        self.hoyer, self.lag, self.dead, self.offset = 0.9 - 0.15 * q, lag, dead, 0.0

    def rows(self, hoyer: float) -> torch.Tensor:
        """One unit large and all others alike, such that the row has this Hoyer."""
        n = UNITS - self.dead
        wanted = UNITS**0.5 - hoyer * (UNITS**0.5 - 1)  # |x|_1 / |x|_2
        m, square = n - 1, wanted**2
        large = (m + (m**2 - (square - 1) * (square * m - m**2)) ** 0.5) / (square - 1)
        row = torch.ones(4, UNITS)
        row[:, 0] = large
        row[:, n:] = 0
        return row

    def forward(self) -> None:
        for place, layer in enumerate(self.noise):
            self.hoyer += (0.9 + self.offset - 0.15 * float(layer.q) - self.hoyer) / self.lag if place == 0 else 0.0
            layer(self.rows(self.hoyer))


def trained(plant: Plant, controller: SparsityController, steps: int) -> list[tuple[float, float]]:
    """Hoyer and q after every update."""
    found = []
    for step in range(1, steps + 1):
        plant()
        controller.step()
        if step % controller.every == 0:
            found.append((plant.hoyer, controller.q["noise.0"]))
    return found


def test_equal_bounds_hold_the_knob_and_the_sparsity_is_measured_all_the_same() -> None:
    plant = Plant(q=1.5)
    controller = SparsityController(plant, 0.2, bounds=(1.5, 1.5))
    found = trained(plant, controller, 9 * controller.every)
    assert [q for _, q in found] == [1.5] * 9
    assert controller.measured["noise.0"] == pytest.approx(0.9 - 0.15 * 1.5)


def test_the_plant_is_as_sparse_as_it_says() -> None:
    plant = Plant()
    for hoyer in (0.3, 0.55, 0.8):
        assert measures.hoyer(plant.rows(hoyer)).mean().item() == pytest.approx(hoyer, abs=1e-5)


@pytest.mark.parametrize("target", [0.35, 0.45, 0.6, 0.7])
@pytest.mark.parametrize("lag", [2.0, 20.0, 50.0])
def test_the_target_is_met_and_kept_without_oscillation(target: float, lag: float) -> None:
    plant = Plant(lag=lag)
    controller = SparsityController(plant, target, every=1)
    found = trained(plant, controller, 400)
    settled = found[len(found) // 2 :]
    assert max(abs(hoyer - target) for hoyer, _ in settled) < 0.01
    assert settled[-1][1] == pytest.approx((0.9 - target) / 0.15, abs=0.1)
    # it crosses the target at most once by more than the dead-band
    sides = [math.copysign(1, hoyer - target) for hoyer, _ in found if abs(hoyer - target) > 0.01]
    assert sum(one != other for one, other in pairwise(sides)) <= 1
    assert max(abs(hoyer - target) for hoyer, _ in found) <= abs(found[0][0] - target) + 0.01


def test_a_step_is_as_the_law_has_it() -> None:
    plant = Plant(lag=math.inf)
    layer = plant.noise[0]
    controller = SparsityController(plant, 0.5, every=1, gain=0.5, delay=10, deadband=0.001, max_step=0.1)
    plant()
    controller.step()
    error = measures.hoyer(plant.rows(plant.hoyer)).mean().item() - 0.5
    q = 2.5 + 0.5 * error / 10
    assert layer.q.item() == pytest.approx(q, abs=1e-6)
    plant.hoyer += 0.04
    plant()
    controller.step()
    # the error is smoothed: a quarter of the way to the new one
    q += 0.5 * (0.01 + (error + 0.01) / 10)
    assert layer.q.item() == pytest.approx(q, abs=1e-5)
    assert controller.measured["noise.0"] == pytest.approx(plant.hoyer, abs=1e-5)


def test_the_law_is_the_equation_of_its_docstring() -> None:
    draw = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(4000):
        x, error, change, gain, time, r = torch.rand(6, generator=draw).tolist()
        x, error, change, gain, time, r = (
            1 + 3 * x,
            0.4 * error - 0.2,
            change / 10 - 0.05,
            10 * gain,
            1 + 9 * time,
            r - 0.5,
        )
        law = Law(gain, time, deadband=0.05, max_step=0.1, ends=(1.0, 4.0))
        k = 1 / (1 / gain + max(r, 0.0))
        i = k * error / max(time * k / gain, min(time, 3)) if abs(error) > 0.05 else 0.0
        least = -0.05 if i < -0.05 else -0.1
        step = max(least, min(0.1, k * change + i))
        wanted = max(1.0, min(4.0, x + step))
        assert law.next(x, error, change, max(r, 0.0)) == pytest.approx(wanted, abs=1e-12)
        assert law.gain(max(r, 0.0)) == pytest.approx(k)
        seen.add((abs(error) > 0.05, least if step == least else step == 0.1, wanted in (1.0, 4.0), r > 0))
    assert len(seen) > 14  # the cases of it
    assert smooth(None, 0.4, 0.25) == 0.4
    assert smooth(0.4, 0.0, 0.25) == pytest.approx(0.3)


@pytest.mark.parametrize(("scale", "bounds", "middle"), [("linear", (1, 4), 2.5), ("log", (1e-4, 1), 1e-2)])
@pytest.mark.parametrize("raises", [True, False])
def test_an_axis_runs_from_sparse_to_dense(scale: str, bounds: tuple, middle: float, raises: bool) -> None:
    axis = Axis(scale, bounds, raises)
    low, high = axis.ends
    assert (axis.value(low), axis.value(high)) == pytest.approx(tuple(reversed(bounds)) if raises else bounds)
    assert axis.value((low + high) / 2) == pytest.approx(middle)
    assert axis.x(axis.value(low + 0.3)) == pytest.approx(low + 0.3)
    assert axis.bound(1) == (f"lower bound, {bounds[0]:g}" if raises else f"upper bound, {bounds[1]:g}")
    logit = Axis("logit", (0.01, 0.95), True)
    assert logit.value(logit.x(0.3)) == pytest.approx(0.3)
    assert logit.x(0.5) == 0


@pytest.mark.parametrize("first", [0.2, -0.2])
def test_the_trial_finds_a_response_beside_a_drift(first: float) -> None:
    def errors(fall: float, drift: float, noise: float = 0.0) -> list[float]:
        draw = torch.Generator().manual_seed(0)
        sides = [0, *(trial_side(update, first) for update in range(1, 8))]
        return [
            first + drift * n - fall * 0.1 * side + noise * torch.randn((), generator=draw).item()
            for n, side in enumerate(sides)
        ]

    assert response(errors(0.5, 0.03), 0.1) == pytest.approx(0.5)
    assert response(errors(0.0, 0.03), 0.1) == pytest.approx(0.0, abs=1e-9)
    assert 0.3 < response(errors(0.5, 0.03, 0.002), 0.1) < 0.5
    assert response(errors(0.0, 0.03, 0.01), 0.1) < 0.05


def test_a_gain_that_is_too_large_shows_in_the_steps() -> None:
    swing = Swing()
    assert [swing.update(step, 0.1) for step in (0.08, -0.09, 0.07, -0.1, 0.1)] == [False] * 3 + [True, False]
    assert not any(swing.update(step, 0.1) for step in [0.08, 0.02, -0.04] * 10)
    assert not any(swing.update(0.1 * (-1) ** (n // 10), 0.1) for n in range(100))  # slow ones


@pytest.mark.parametrize(("target", "step"), [(0.01, 0.1), (0.99, -0.05)])
def test_steps_are_bounded_and_down_is_half_as_fast(target: float, step: float) -> None:
    plant = Plant()
    controller = SparsityController(plant, target, every=1, gain=1e3, max_step=0.1)
    plant()
    controller.step()
    assert controller.q["noise.0"] == pytest.approx(2.5 + step)


def test_inside_the_dead_band_nothing_moves() -> None:
    plant = Plant(lag=math.inf)
    controller = SparsityController(plant, plant.hoyer + 0.001, deadband=0.002, every=1)
    for _ in range(20):
        plant()
        controller.step()
    assert controller.q["noise.0"] == pytest.approx(2.5, abs=1e-4)


@pytest.mark.parametrize(
    ("target", "bound", "closest"), [(0.85, "its lower bound, 1", 0.75), (0.2, "its upper bound, 4", 0.3)]
)
def test_a_target_out_of_reach_is_told_once(target: float, bound: str, closest: float) -> None:
    plant = Plant(lag=2)
    controller = SparsityController(plant, target, every=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(plant, controller, 300)
    assert len(caught) == 1
    told = str(caught[0].message)
    assert told.startswith(f"noise.0: the target {target:g} of hoyer is out of reach: q has been at {bound}, for 50")
    assert told.endswith(f"; the closest value is {closest:.3f}")
    assert controller.report()[0].endswith(told.removeprefix("noise.0: "))


@pytest.mark.parametrize(("target", "offset"), [(0.85, 0.2), (0.2, -0.2)])
def test_out_of_reach_is_withdrawn_when_the_target_is_met(target: float, offset: float) -> None:
    plant = Plant(lag=2)
    controller = SparsityController(plant, target, every=1)
    with pytest.warns(UserWarning, match="out of reach"):
        trained(plant, controller, 100)
    assert "out of reach" in controller.report()[0]
    plant.offset = offset
    trained(plant, controller, 45)
    assert abs(plant.hoyer - target) < 0.02
    assert "out of reach" not in controller.report()[0]
    plant.offset = 0.0  # again, but not a second warning, which would be an error
    trained(plant, controller, 150)
    assert "out of reach" in controller.report()[0]


def test_what_dead_units_ruled_out_is_withdrawn_when_they_live() -> None:
    plant = Plant(dead=75, lag=math.inf)
    plant.hoyer = 0.7
    controller = SparsityController(plant, 0.5, every=1)
    with pytest.warns(UserWarning, match="75 of 100 units are dead"):
        trained(plant, controller, 50)
    plant.dead, plant.lag = 0, 2
    trained(plant, controller, 100)
    assert "out of reach" not in controller.report()[0]


@pytest.mark.parametrize("target", [0.99, 0.9, 0.1])
def test_out_of_reach_is_found_in_a_noisy_measure(target: float) -> None:
    model = nn.Sequential(Sparseout(q=2.5))
    controller = SparsityController(model, target, every=1, bounds=(1.0, 4.0))
    draw = torch.Generator().manual_seed(0)

    def train() -> None:
        for _ in range(1000):
            model(torch.randn(8, 8, generator=draw).relu())
            controller.step()

    with pytest.warns(
        UserWarning, match=f"^0: the target {target} of hoyer is out of reach: q has been (at|close to) its "
    ):
        train()
    assert "out of reach" in controller.report()[0]


def test_noise_around_a_target_is_not_taken_for_out_of_reach() -> None:
    plant = Plant(lag=2)
    draw = torch.Generator().manual_seed(0)
    controller = SparsityController(plant, 0.72, every=1)  # at q = 1.2, close to the bound
    for _ in range(600):
        plant.offset = 0.01 * torch.randn((), generator=draw).item()
        plant()
        controller.step()  # a warning would be an error


def test_what_dead_units_rule_out_is_told() -> None:
    # with 25 of 100 units live no row has a Hoyer below (10 - 5) / 9
    plant = Plant(dead=75, lag=math.inf)
    plant.hoyer = 0.7
    controller = SparsityController(plant, 0.5, every=1)
    with pytest.warns(UserWarning, match=r"75 of 100 units are dead, which no q brings back; the closest value is 0.7"):
        trained(plant, controller, 50)
    controller.detach()
    plant.noise[0].q = 2.5
    reachable = SparsityController(plant, 0.56, every=1)
    trained(plant, reachable, 50)
    assert "out of reach" not in reachable.report()[0]


def test_from_a_collapse_q_rises_and_it_is_said() -> None:
    model = nn.Sequential(Sparseout(q=1.0, scale="matched"))
    controller = SparsityController(model, 0.5, every=1)
    for _ in range(49):
        model(torch.zeros(4, 8))
        controller.step()
    model(torch.zeros(4, 8))
    with pytest.warns(UserWarning, match="8 of 8 units are dead, which no q brings back; no sample has an active unit"):
        controller.step()
    assert controller.q["0"] > 1.5
    assert controller.measured == {"0": None}


def small(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for one, other in pairwise(widths):
        layers += [nn.Linear(one, other), nn.ReLU(), Sparseout(q=2.5, scale="matched")]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("measure", ["hoyer", "hoyer_live", "gini", "treves_rolls", "sparsity", "density", "kurtosis"])
def test_every_measure_is_that_of_the_inputs_and_moves_q_the_right_way(measure: str) -> None:
    model, x = small(6, 20), torch.rand(64, 6)
    code = model[:2](x).detach()
    stream = measures.Streaming((measure,) if measure != "hoyer_live" else ())
    stream.update(code)
    value = stream.compute()[measure].item()
    rises = measure not in ("treves_rolls", "density")
    for factor, sparser in ((0.9, not rises), (1.1, rises)):
        for layer in model[2:]:
            layer.q = 2.5
        controller = SparsityController(model, value * factor, measure, every=2)
        for _ in range(2):
            model(x)
            controller.step()
        assert controller.measured["2"] == pytest.approx(value, rel=1e-6)
        assert (controller.q["2"] < 2.5) == sparser
        controller.detach()


def test_maps_are_measured_over_channels() -> None:
    model = nn.Sequential(sparseout.Sparseout2d(q=2.5))
    controller = SparsityController(model, 0.5, every=1)
    x = torch.rand(2, 7, 3, 5)
    model(x)
    controller.step()
    assert controller.measured["0"] == pytest.approx(measures.hoyer(x, dim=1).mean().item(), rel=1e-6)


def test_evaluation_is_not_measured() -> None:
    model = small(6, 20)
    controller = SparsityController(model, 0.9, every=1)
    model.eval()(torch.rand(4, 6))
    controller.step()
    assert (controller.measured, controller.q) == ({"2": None}, {"2": 2.5})


def test_a_target_is_met_in_evaluation_where_that_is_asked_for() -> None:
    def run(mode: str) -> tuple[SparsityController, dict[str, float]]:
        model = Plant(lag=2)
        controller = SparsityController(model, 0.6, every=2, mode=mode)
        for step in range(600):
            model()
            if step % 4 == 3:  # in evaluation it is denser by 0.1
                layer = model.noise[0].eval()
                layer(model.rows(model.hoyer - 0.1))
                layer.train()
            controller.step()
        return controller, {"train": model.hoyer, "eval": model.hoyer - 0.1}

    for mode, other, name in (("train", "eval", "evaluation"), ("eval", "train", "training")):
        controller, hoyer = run(mode)
        assert hoyer[mode] == pytest.approx(0.6, abs=0.005)
        assert controller.measured["noise.0"] == pytest.approx(hoyer[mode], abs=0.005)
        beside = controller._groups[0].other
        assert beside == pytest.approx(hoyer[other], abs=0.005)
        own = {"train": "training", "eval": "evaluation"}[mode]
        says = f"{controller.measured['noise.0']:.3f} in {own} ({beside:.3f} in {name}), target 0.6"
        assert says in controller.report()[0]
    state = controller.state_dict()
    controller.load_state_dict(state)
    with pytest.raises(ValueError, match=r"^expected `state` to be one of mode 'train', but got one of mode 'eval'$"):
        run("train")[0].load_state_dict(state)


def test_a_missing_evaluation_is_told_once() -> None:
    model = small(6, 20)
    controller = SparsityController(model, 0.5, every=1, mode="eval")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(120):
            model(torch.rand(4, 6))
            controller.step()
    says = "no evaluation pass was seen in 50 steps, so q does not move: is the model in training mode?"
    assert [str(warning.message) for warning in caught] == [says]
    assert controller.q == {"2": 2.5}


def test_one_q_or_one_for_each_layer() -> None:
    x = torch.rand(32, 6)
    model = small(6, 30, 30)
    hoyer = [measures.hoyer(model[:n].eval()(x)).nanmean().item() for n in (2, 5)]
    together = SparsityController(model.train(), 0.9, every=1)
    model(x)
    together.step()
    assert together.q["2"] == together.q["5"] < 2.5
    assert together.measured["2"] == pytest.approx(sum(hoyer) / 2, abs=0.05)
    together.detach()
    assert isinstance(model[2].q, float)
    apart = SparsityController(model, {"2": 0.95, "5": 0.01}, per_layer=True, every=1)
    model(x)
    apart.step()
    assert apart.q["2"] < together.q["2"] < apart.q["5"]
    apart.detach()
    only = SparsityController(model, 0.9, modules=["5"])
    assert list(only.q) == ["5"]
    assert list(SparsityController(model, 0.9, modules=lambda name, layer: name == "2").q) == ["2"]


def test_a_layer_that_never_runs_is_named() -> None:
    def unused() -> nn.Sequential:
        return nn.Sequential(Sparseout(q=2.5), Sparseout(q=2.5))

    model = unused()
    controller = SparsityController(model, 0.5, per_layer=True, every=2)
    says = "no training pass of 1 was seen in 10 steps, so its q does not move: is it called, and in training mode?"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(60):
            model[0](torch.rand(4, 6))
            controller.step()
    assert [str(warning.message) for warning in caught] == [says]
    assert controller.report()[1] == "1: q = 2.500, hoyer not measured, target 0.5; no pass in the last 30 updates"
    model = unused()
    controller = SparsityController(model, 0.5, every=1)
    model[0](torch.rand(4, 6))
    controller.step()
    assert controller.report()[0].endswith("target 0.5; no pass so far of 1")
    model[1](torch.rand(4, 6))
    controller.step()
    assert controller.report()[0].endswith("target 0.5")


@pytest.mark.parametrize("p", [0, 1])
def test_layers_whose_noise_has_no_q_are_named(p: float) -> None:
    model = nn.Sequential(Sparseout(p, q=2.5), Sparseout(0.5, q=2.5))
    with pytest.warns(UserWarning, match="^q has no effect where p is 0 or 1, as it is in 0$"):
        SparsityController(model, 0.5)


def test_detached_it_leaves_no_hook_and_the_last_q() -> None:
    model = small(6, 20)
    controller = SparsityController(model, 0.9, every=1)
    model(torch.rand(4, 6))
    controller.step()
    controller.detach()
    assert not model[2]._forward_pre_hooks
    assert model[2].q == controller.q["2"] < 2.5


def test_goes_on_from_its_state_bit_for_bit() -> None:
    def run(steps: range, state: dict | None, model: nn.Sequential) -> tuple[list[float], dict]:
        controller, found = SparsityController(model, 0.6, every=5), []
        if state is not None:
            controller.load_state_dict(state)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for step in steps:
            torch.manual_seed(step)
            x = torch.rand(16, 6)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            controller.step()
            found.append(controller.q["2"])
        file = io.BytesIO()
        torch.save(controller.state_dict(), file)
        file.seek(0)
        return found, torch.load(file, weights_only=True)

    whole, _ = run(range(40), None, small(6, 20))
    model = small(6, 20)
    first, state = run(range(18), None, model)  # in the middle of an interval
    again = small(6, 20)
    again.load_state_dict(model.state_dict())
    rest, _ = run(range(18, 40), state, again)
    assert len(set(whole)) > 6
    assert first + rest == whole
    with pytest.raises(ValueError, match=r"expected `state` to be one of the layers 2[+]5, but got 2"):
        SparsityController(small(6, 20, 20), 0.6).load_state_dict(state)


def test_a_state_follows_the_model_to_its_device() -> None:
    model = small(6, 20)
    controller = SparsityController(model, 0.6, every=5)
    for _ in range(7):
        model(torch.rand(16, 6))
        controller.step()
    state = controller.state_dict()  # on the CPU, as a checkpoint that was read
    controller.load_state_dict(state)
    state["sums"]["2", 20].fill_(-1.0)
    assert controller._accumulators["2"].sums[True][20].min() >= 0  # a copy
    model.to("meta")
    controller.load_state_dict(state)
    assert controller._accumulators["2"].sums[True][20].device.type == "meta"


@pytest.mark.parametrize("measure", ["hoyer", "hoyer_live", "density"])
def test_compiled_code_measures_alike_and_never_recompiles(measure: str) -> None:
    compiled = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        nonlocal compiled
        compiled += 1
        return aot_eager(graph, inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    model, plain = small(6, 20), small(6, 20)
    plain.load_state_dict(model.state_dict())
    fast = torch.compile(model, backend=backend, fullgraph=True)
    fast(torch.rand(4, 6))  # before the controllers come
    controllers = [SparsityController(one, 0.9, measure, every=2) for one in (model, plain)]
    seen, counts = [], []
    for _ in range(12):
        x = torch.rand(4, 6)
        fast(x).sum().backward()
        plain(x)
        for controller in controllers:
            controller.step()
        seen.append([(controller.q["2"], controller.measured["2"]) for controller in controllers])
        counts.append(compiled)
    for one, other in seen[1:]:
        assert one == pytest.approx(other)
    assert len({one for one, _ in seen}) == 7
    assert len(set(counts[2:])) == 1  # the first calls make the sums; after that nothing is new


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"target": 1.0}, ValueError, r"`target` to be in \(0, 1\), as hoyer is, but got 1.0"),
        ({"target": "0.5"}, TypeError, "`target` to be a number, but got '0.5'"),
        ({"target": {"2": 0.5}}, ValueError, "`target` to be a number, as the layers share a knob"),
        ({"target": {"3": 0.5}, "per_layer": True}, ValueError, "`target` to be a value for each of 2, but got"),
        ({"measure": "entropy"}, ValueError, "`measure` to be one of hoyer, "),
        ({"bounds": (3, 2)}, ValueError, "`bounds` to be two finite numbers 0 <= low <= high"),
        ({"mode": "test"}, ValueError, "`mode` to be 'train' or 'eval', but got 'test'"),
        ({"mode": True}, ValueError, "`mode` to be 'train' or 'eval', but got True"),
        ({"every": 0}, ValueError, "`every` to be an int >= 1, but got 0"),
        ({"gain": -1.0}, ValueError, "`gain` to be a finite number > 0, but got -1.0"),
        ({"gain": "x"}, TypeError, "`gain` to be a finite number > 0, but got 'x'"),
        ({"deadband": -1}, ValueError, "`deadband` to be a finite number >= 0, but got -1"),
        ({"every": 1.0}, TypeError, "`every` to be an int >= 1, but got a float"),
        ({"measure": ["hoyer"]}, TypeError, "`measure` to be one of hoyer, .*, but got a list"),
        ({"bounds": 2.0}, TypeError, "`bounds` to be two finite numbers 0 <= low <= high, but got a float"),
        ({"bounds": ("a", "b")}, TypeError, r"`bounds` to be two finite numbers .*, but got \('a', 'b'\)"),
        ({"bounds": (1, 2, 3)}, ValueError, r"`bounds` to be two finite numbers .*, but got \(1, 2, 3\)"),
        ({"modules": 5}, TypeError, "`modules` to be a function .* or of types of Sparseout layers, but got an int"),
        ({"modules": nn.ReLU}, TypeError, "`modules` to be a function .*, but got ReLU"),
        (
            {"modules": [nn.ReLU]},
            ValueError,
            "`modules` to be types of Sparseout layers, such as 'Sparseout', but got ReLU",
        ),
        ({"modules": [5]}, TypeError, "`modules` to be a function .*, but got one of an int"),
        ({"target": torch.tensor(0.5)}, TypeError, "`target` to be a number, but got a Tensor"),
        ({"model": 3}, TypeError, "`model` to be a module, but got an int"),
        ({"modules": ["7"]}, ValueError, "`modules` to be names of Sparseout layers, such as '2', but got '7'"),
    ],
)
def test_bad_arguments_change_nothing(changed: dict, error: type, says: str) -> None:
    model = small(6, 20)
    with pytest.raises(error, match=f"^expected {says}"):
        SparsityController(**({"model": model, "target": 0.5} | changed))
    assert model[2].q == 2.5
    assert not model[2]._forward_pre_hooks
    with pytest.raises(ValueError, match="`model` to be one with Sparseout layers, which convert_dropout_"):
        SparsityController(nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match="but got a Sequential with 2 Dropout layers, not yet converted"):
        SparsityController(nn.Sequential(nn.Dropout(), nn.Dropout2d()), 0.5)


DISTRIBUTED = """
import sys, torch, torch.distributed as dist
from torch import nn
from sparseout import Sparseout, SparsityController, measures
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
x = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(7)

def moved(parts):
    model = nn.Sequential(Sparseout(q=2.5, scale="matched"))
    controller = SparsityController(model, 0.5, every=1)
    for _ in range(4):
        for part in parts:
            model(part)
        controller.step()
    return controller.q["0"], controller.measured["0"]

together = moved([x[rank]])
model = nn.Sequential(Sparseout(q=2.5), Sparseout(q=2.5))
controller = SparsityController(model, 0.5, every=1)
model[rank](x[0, :, : 5 + rank])  # where the other process has not been
controller.step()
hoyer = [measures.hoyer(x[0, :, :units]).double().mean().item() for units in (5, 6)]
assert abs(controller.measured["0"] - sum(hoyer) / 2) < 1e-6, (controller.measured, hoyer)

def error(options={}, load=None, steps=6):  # what a controller raises in training, alike on both processes
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 7), Sparseout(q=2.5))
    try:
        controller = SparsityController(model, **({"target": 0.5, "every": 5} | options))
        for step in range(steps):
            if rank == 0 and step == load:
                state = controller.state_dict()
                state["steps"], state["groups"]["1"]["q"] = 3, 2.2
                controller.load_state_dict(state)
            model(x[rank])
            controller.step()
    except (RuntimeError, ValueError) as wrong:
        return str(wrong)

same = "expected `controller` to be the same on all processes"
both = f"{same} (with the same arguments, and one state loaded on all), but got "
assert error() is None
assert error({"target": 0.5 + rank / 4}) == both + "target of 1 0.5 on process 0 and 0.75 on process 1"
assert error({"every": 5 + rank}) == both + "every 5 on process 0 and 6 on process 1"
assert error(load=0) == both + "steps 3 on process 0 and 0 on process 1"  # before training
assert error(load=2).startswith(both + "q of 1 2.2 on process 0 and 2.5")  # within an interval: at the next update
assert error(load=5, steps=10).startswith(both + "q of 1 2.2 on process 0 and ")  # after an update
alone = [dist.new_group([one]) for one in range(2)]
assert error({"target": 0.5 + rank / 4, "group": alone[rank]}) is None  # stages of a pipeline
assert "with this process in it" in error({"group": alone[1 - rank]})
torch.manual_seed(rank)
stage = nn.Sequential(nn.Linear(7, 7), Sparseout(q=2.5))
try:
    SparsityController(stage, 0.5).step()
except ValueError as wrong:
    assert "other parameters on process 1 than on process 0" in str(wrong), wrong
else:
    raise AssertionError("stages were taken for copies")
stage = nn.Sequential(nn.Linear(7, 7), Sparseout(q=2.5))
wrapped = nn.parallel.DistributedDataParallel(stage, process_group=alone[rank])
controller = SparsityController(wrapped, 0.5, every=1)
wrapped(x[rank])
controller.step()
hoyer = measures.hoyer(stage[0](x[rank])).double().mean().item()
assert abs(controller.measured["1"] - hoyer) < 1e-6, (controller.measured, hoyer)
dist.destroy_process_group()
alone, whole = moved([x[rank]]), moved(list(x))
assert abs(together[1] - whole[1]) < 1e-12 and abs(together[0] - whole[0]) < 1e-9, (together, whole)
assert abs(alone[1] - whole[1]) > 1e-4, (alone, whole)
print("done", together[0])
"""


@pytest.mark.slow
def test_processes_move_q_as_one_that_has_seen_all(tmp_path: Path) -> None:
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", DISTRIBUTED, str(rank), str(tmp_path / "meet")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120) for process in running]
    assert said[0][0].startswith("done"), said
    assert said[0][0] == said[1][0]
