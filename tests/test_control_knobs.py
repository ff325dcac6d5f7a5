"""Controllers of every knob: q, p, k, a penalty's strength and one of the test's own; and the target in evaluation."""

import copy
import io
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from sparseout import Sparseout, Sparseout2d, SparsityController, SparsityMonitor, measures, row_mask
from sparseout.baselines import ActivityPenalty, GaussianDropout, KWinners, StatisticalTopK


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


class Odd(nn.Module):
    """Has all that a probe might change: modes, a buffer that evaluation changes, random numbers, hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.noise, self.frozen = nn.Linear(8, 16), Sparseout(q=2.5), nn.BatchNorm1d(16).eval()
        self.register_buffer("calls", torch.zeros(()))
        self.modes: list[bool] = []

    def forward(self, x: torch.Tensor, *, shift: torch.Tensor | float = 0.0) -> torch.Tensor:
        self.modes.append(self.training)
        if not self.training:
            self.calls += 1
            torch.rand(3)
        return self.noise(self.frozen(self.linear(x)).relu() + shift)


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_a_probe_leaves_everything_as_it_was(form: str) -> None:
    model, x = Odd(), torch.rand(32, 8)
    probe = {"tensor": x, "tuple": (x,), "dict": {"x": x, "shift": torch.tensor(0.5)}}[form]
    controller = SparsityController(model, 0.5, every=1, probe=probe)
    with SparsityMonitor(model, ["noise"]) as monitor, torch.autocast("cpu", torch.bfloat16):
        loss = model(x).square().mean()
        before = (
            copy.deepcopy(model.state_dict()),
            torch.get_rng_state(),
            [module.training for module in model.modules()],
        )
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        controller.step()
        assert torch.equal(torch.get_rng_state(), before[1])
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_grad_enabled()
        model(x).square().mean().backward()  # what the probe cast has no gradient
        loss.backward()
        after = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        assert after == hooks
    assert model.modes == [True, False, True]
    assert model.linear.weight.grad is not None
    state, _, modes = before
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert [module.training for module in model.modules()] == modes
    assert {record["mode"] for record in monitor.report()} == {"train"}  # it does not count the probe
    code = model.frozen(model.linear(x)).relu() + (0.5 if form == "dict" else 0.0)
    assert controller.measured["noise"] == pytest.approx(measures.hoyer(code).mean().item(), abs=0.01)  # bf16
    assert "in evaluation (" in controller.report()[0]


def test_of_a_probe_the_rows_count_that_its_own_mask_keeps() -> None:
    class Masked(nn.Sequential):
        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    x, mask = torch.rand(4, 6, 8), torch.arange(6) < torch.tensor([1, 6, 2, 3])[:, None]
    other = row_mask(torch.ones(4, 6).triu())  # of the training batch
    for probe, rows in (({"x": x, "attention_mask": mask}, x[mask]), ((x, mask), x)):
        model = Masked(nn.Identity(), Sparseout())
        controller = SparsityController(model, 0.5, every=1, probe=probe)
        with other:
            model(x, mask)
            controller.step()
        assert controller.measured["1"] == pytest.approx(measures.hoyer(rows).mean().item(), abs=1e-6)
    with pytest.warns(UserWarning, match="all rows of the probe count, for its `attention_mask` is no mask: expected"):
        SparsityController(Masked(Sparseout()), 0.5, probe={"x": x, "attention_mask": -1e9 * mask})


def test_a_probe_that_fails_leaves_everything_as_it_was() -> None:
    model = Odd()
    controller = SparsityController(model, 0.5, every=1, probe=torch.rand(4, 5))
    model(torch.rand(4, 8))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        controller.step()
    assert model.training
    assert not model.frozen.training
    assert model.calls == 0
    with pytest.raises(TypeError, match=r"^expected `probe` to be a batch: .*, but got an int$"):
        SparsityController(model, 0.5, probe=3)
    with pytest.raises(ValueError, match=r"^expected `mode` to be None or 'eval' beside a probe"):
        SparsityController(model, 0.5, probe=torch.rand(4, 8), mode="train")


def rows(hoyer: float, n: int = 100) -> torch.Tensor:
    """One unit large and all others alike, such that the row has this Hoyer."""
    wanted, m = n**0.5 - hoyer * (n**0.5 - 1), n - 1
    large = (m + (m**2 - (wanted**2 - 1) * (wanted**2 * m - m**2)) ** 0.5) / (wanted**2 - 1)
    row = torch.ones(4, n)
    row[:, 0] = large
    return row


def test_between_evaluations_training_steers_with_the_offset_last_seen() -> None:
    layer, hoyer = Sparseout(q=2.5), 0.5
    controller = SparsityController(layer, 0.6, every=1)

    def step(offset: float | None = None) -> None:
        nonlocal hoyer
        hoyer += (0.9 - 0.15 * float(layer.q) - hoyer) / 5
        layer.train()(rows(hoyer))
        if offset is not None:
            layer.eval()(rows(hoyer + offset))
        controller.step()

    layer.eval()(rows(0.1))  # before training: a check of the validation loop, which says nothing
    for _ in range(150):
        step()
    assert hoyer == pytest.approx(0.6, abs=0.005)
    assert f"hoyer {hoyer:.3f} in training, target" in controller.report()[0]
    step(-0.1)
    assert f"hoyer {hoyer - 0.1:.3f} in evaluation ({hoyer:.3f} in training), target" in controller.report()[0]
    for _ in range(150):
        step()
    assert hoyer - 0.1 == pytest.approx(0.6, abs=0.005)
    assert controller.measured[""] == pytest.approx(hoyer - 0.1, abs=1e-3)
    assert "expected in evaluation" in controller.report()[0]
    for number in range(150):
        step(0.05 if number % 20 == 0 else None)
    assert hoyer + 0.05 == pytest.approx(0.6, abs=0.005)


def test_noise_in_the_measure_moves_q_neither_way() -> None:
    draw, layer, hoyer, seen = torch.Generator().manual_seed(0), Sparseout(q=2.5), 0.5, []
    controller = SparsityController(layer, 0.6, every=1)
    for _ in range(1500):
        hoyer += (0.9 - 0.15 * float(layer.q) - hoyer) / 20
        layer(rows(hoyer + 0.02 * torch.randn((), generator=draw).item()))
        controller.step()
        seen.append(hoyer)
    assert sum(seen[300:]) / 1200 == pytest.approx(0.6, abs=0.004)


def test_what_is_small_counts_as_zero_and_padding_does_not_count() -> None:
    x = torch.tensor([[1.0, 1e-3, 0.5, -1e-4], [9.0, 9.0, 9.0, 9.0]])
    layer = Sparseout(q=2.5)
    fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for run_layer in (layer, fast):
        for options, density in (({}, 1.0), ({"eps": 0.01}, 0.5), ({"eps": 1.0, "relative": True}, 0.25)):
            controller = SparsityController(layer, 0.4, "density", every=1, **options)
            with row_mask(torch.tensor([1, 0])):
                run_layer(x)
            controller.step()
            assert controller.measured[""] == pytest.approx(density)
            assert "row mask" not in controller.report()[0]
            with row_mask(torch.ones(7)):
                run_layer(x)
            controller.step()
            assert controller.report()[0].endswith("the row mask does not fit the model, where all rows count")
            controller.detach()
    with pytest.raises(ValueError, match="`eps` to be"):
        SparsityController(layer, 0.4, eps=-1.0)


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
        for x in batches(50):
            loss = (model(x) - x).square().mean() + (penalty.loss() if penalty else 0.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            controller.step()
        return model[0].bias[:5], model[-1].weight[:, :5]

    bias, outgoing = trained(revive=True)
    assert (bias > -10).all()
    assert not outgoing.any()
    bias, outgoing = trained(revive=False)
    assert (bias < -900).all()
    assert outgoing.any()
    with pytest.raises(TypeError, match=r"^expected `revive` to be a bool or the optimizer, but got an int$"):
        SparsityController(made("q")[0], 0.5, revive=1)


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
