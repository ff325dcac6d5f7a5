"""A controller on small networks: what it measures, states, compiled code, wrong arguments."""

import io
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn

import sparseout
from sparseout import Sparseout, SparsityController, measures


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
@pytest.mark.slow
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
