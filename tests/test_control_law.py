"""The control law: on a plant whose sparsity follows q with a lag, and by its equations."""

import math
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn

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


@pytest.mark.parametrize(
    ("target", "lag"),
    [(0.35, 2.0), (0.35, 50.0), (0.45, 20.0), (0.45, 50.0), (0.6, 2.0), (0.6, 20.0), (0.7, 20.0), (0.7, 50.0)],
)
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


@pytest.mark.parametrize(("slope", "target", "lag"), [(-0.0015, 0.4, 50.0), (0.0015, 0.6, 20.0)])
@pytest.mark.slow
def test_the_target_is_met_while_the_sparsity_changes_by_itself(slope: float, target: float, lag: float) -> None:
    plant = Plant(lag=lag)
    controller = SparsityController(plant, target, every=1)
    trained(plant, controller, 300)
    errors = []
    for update in range(500):
        plant.offset += slope if update < 150 else 0
        errors += [hoyer - target for hoyer, _ in trained(plant, controller, 1)]
    # the dead-band is 0.002; without a drift these errors are 0.0055
    assert max(map(abs, errors[75:150])) < 0.0025
    # then the change ends, which the drift learns by an error on the other side, in fewer updates than it took before
    assert max(map(abs, errors[150:])) < 0.003
    assert max(map(abs, errors[400:])) < 0.0018


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
    # the error is smoothed: a quarter of the way to the new one; the drift is a fortieth of the first step
    q += 0.5 * (0.01 + (error + 0.01) / 10) + 0.5 * error / 10 / 40
    assert layer.q.item() == pytest.approx(q, abs=1e-5)
    assert controller.measured["noise.0"] == pytest.approx(plant.hoyer, abs=1e-5)


def test_the_law_is_the_equation_of_its_docstring() -> None:
    draw = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(4000):
        x, error, change, gain, time, r, drift = torch.rand(7, generator=draw).tolist()
        x, error, change, gain, time, r, drift = (
            1 + 3 * x,
            0.4 * error - 0.2,
            change / 10 - 0.05,
            10 * gain,
            1 + 9 * time,
            r - 0.5,
            drift / 20 - 0.025,
        )
        law = Law(gain, time, deadband=0.05, max_step=0.1, ends=(1.0, 4.0))
        k = 1 / (1 / gain + max(r, 0.0))
        i = k * error / max(time * k / gain, min(time, 3)) if abs(error) > 0.05 else 0.0
        least = -0.05 if i < -0.05 else -0.1
        step = max(least, min(0.1, k * change + i + drift))
        wanted = max(1.0, min(4.0, x + step))
        assert law.next(x, error, change, max(r, 0.0), drift) == pytest.approx(wanted, abs=1e-12)
        following = max(-0.025, min(0.025, drift + (wanted - x - drift) / (10 if drift * error < 0 else 40)))
        assert law.drift(drift, wanted - x, error) == pytest.approx(following, abs=1e-12)
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
        for _ in range(400):
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


@pytest.mark.slow
def test_a_target_is_met_in_evaluation_where_that_is_asked_for() -> None:
    def run(mode: str) -> tuple[SparsityController, dict[str, float]]:
        model = Plant(lag=2)
        controller = SparsityController(model, 0.6, every=2, mode=mode)
        for step in range(400):
            model()
            if step % 4 == 3:  # in evaluation it is denser by 0.1
                layer = model.noise[0].eval()
                layer(model.rows(model.hoyer - 0.1))
                layer.train()
            controller.step()
        return controller, {"train": model.hoyer, "eval": model.hoyer - 0.1}

    controllers = {}
    for mode, other, name in (("train", "eval", "evaluation"), ("eval", "train", "training")):
        controller, hoyer = run(mode)
        controllers[mode] = controller
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
        controllers["train"].load_state_dict(state)
