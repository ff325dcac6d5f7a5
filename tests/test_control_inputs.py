"""What a controller measures: rows, widths, channels, dtypes and values of what enters a layer."""

import math
import warnings

import pytest
import torch
from controlled import HALF, one_layer, watched
from torch import nn

import sparseout
from sparseout import Sparseout, SparsityController, SparsityMonitor, insert_after_, measures


def test_a_shared_tensor_moves_only_layers_that_move_together() -> None:
    def model(q: torch.Tensor) -> nn.Sequential:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        insert_after_(layers, nn.ReLU, p=0.5, q=q)
        return layers

    q = torch.tensor(2.5)
    apart = model(q)
    target = {"1.sparseout": 0.01, "3.sparseout": 0.99}
    controller = SparsityController(apart, target, per_layer=True, every=1)
    apart(torch.rand(8, 4))
    controller.step()
    assert controller.q["1.sparseout"] > 2.5 > controller.q["3.sparseout"]
    for place, name in ((1, "1.sparseout"), (3, "3.sparseout")):
        assert float(apart[place].sparseout.q) == pytest.approx(controller.q[name])
    some = model(q)
    watched(some, torch.rand(8, 4), modules=["3.sparseout"])
    assert float(some[3].sparseout.q) != 2.5
    assert some[1].sparseout.q is q
    assert q == 2.5
    together = model(q)
    watched(together, torch.rand(8, 4))
    assert together[1].sparseout.q is together[3].sparseout.q is q  # whoever holds it sees it move


def test_a_layer_called_at_several_widths_counts_as_a_layer_for_each() -> None:
    layer = Sparseout(q=2.5)
    model = nn.Sequential(layer)
    controller = SparsityController(model, 0.5, every=1)
    narrow, wide = torch.rand(5, 7), torch.randn(3, 9)
    model(narrow[:2])
    model(wide)
    model(narrow[2:])
    controller.step()
    hoyer = [measures.hoyer(x).double().mean().item() for x in (narrow, wide)]
    assert controller.measured["0"] == pytest.approx(sum(hoyer) / 2, rel=1e-6)
    state = controller.state_dict()
    controller.load_state_dict(state)
    assert controller.state_dict()["sums"].keys() == {("0", 7), ("0", 9)}


def test_inputs_may_be_given_by_name() -> None:
    model, x = Sparseout(q=2.5), torch.rand(5, 7)
    controller = SparsityController(model, 0.5, every=1)
    model(input=x)
    controller.step()
    assert controller.measured[""] == pytest.approx(measures.hoyer(x).double().mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("number", "shape", "dim"),
    [(1, (4, 3, 5), 1), (1, (3, 5), 0), (2, (4, 3, 5), 1), (2, (4, 3, 5, 2), 1), (3, (3, 5, 2, 2), 0)],
)
def test_channels_are_the_units_of_channel_layers(number: int, shape: tuple[int, ...], dim: int) -> None:
    x = torch.randn(shape)
    hoyer = measures.hoyer(x, dim).double().mean().item()
    layer = getattr(sparseout, f"Sparseout{number}d")(q=2.5)
    assert watched(layer, x).measured[""] == pytest.approx(hoyer, rel=1e-6)
    plain = getattr(nn, f"Dropout{number}d")(0.5)
    for module in (layer, plain):
        with warnings.catch_warnings(), SparsityMonitor(module) as monitor:
            warnings.simplefilter("ignore")  # nn.Dropout2d says that 3-d inputs are read as (N, C, L)
            module(x)
        assert monitor.report()[0]["hoyer"] == pytest.approx(hoyer, rel=1e-6)


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (torch.full((4, 8), math.nan), "are NaN or infinite"),
        (torch.tensor([[1.0, math.inf], [1.0, 2.0]]), "are NaN or infinite"),
        (torch.rand(4, 1), "have 1 units, too few for hoyer"),
    ],
)
def test_what_has_no_value_does_not_move_q_and_is_told_once(x: torch.Tensor, why: str) -> None:
    model = nn.Sequential(Sparseout(q=2.5))
    controller = SparsityController(model, 0.5, every=1)
    model(x)
    with pytest.warns(UserWarning, match=f"^q is not moved by 0: its inputs {why}$"):
        controller.step()
    model(x)
    controller.step()  # no second warning: it would be an error
    assert controller.q == {"0": 2.5}
    told = f"q is not moved by 0: its inputs {why}"
    assert controller.report() == [f"0: q = 2.500, hoyer not measured, target 0.5; {told}"]
    model(torch.rand(4, 8))
    controller.step()
    assert controller.q["0"] < 2.5
    assert "moved by" not in controller.report()[0]


def test_a_layer_of_nan_leaves_the_others_their_say() -> None:
    model = nn.Sequential(Sparseout(q=2.5), Sparseout(q=2.5))
    controller = SparsityController(model, 0.9, every=1)
    x = torch.rand(5, 8)
    model[0](x)
    model[1](x * math.nan)
    with pytest.warns(UserWarning, match="not moved by 1"):
        controller.step()
    assert controller.measured["0"] == pytest.approx(measures.hoyer(x).double().mean().item(), rel=1e-6)
    assert controller.q["1"] < 2.5


def test_a_model_in_evaluation_mode_is_told_once() -> None:
    model = one_layer().eval()
    controller = SparsityController(model, 0.5, every=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(30):
            model(torch.rand(4, 6))
            controller.step()
    assert len(caught) == 1
    wanted = "no training pass was seen in 10 steps, so q does not move: is the model in evaluation mode?"
    assert str(caught[0].message) == wanted
    assert caught[0].filename == __file__


def test_types_choose_layers() -> None:
    model = nn.Sequential(Sparseout(q=2.5), sparseout.Sparseout2d(q=2.5))
    assert list(SparsityController(model, 0.5, modules=[sparseout.Sparseout2d]).q) == ["1"]


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_rows_of_nested_tensors_are_the_real_ones(layout: torch.layout) -> None:
    model = nn.Sequential(Sparseout(q=2.5))
    controller = SparsityController(model, 0.9, every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls nested tensors a prototype
        model(torch.nested.nested_tensor([HALF, HALF[:1]], layout=layout))
    controller.step()
    assert controller.measured["0"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("unit_dim", [None, -1, {"1": 3}, {Sparseout: -1}, lambda name, layer, x: 3])
def test_units_are_where_the_module_that_made_them_put_them(unit_dim: object) -> None:
    model = nn.Sequential(nn.Linear(8, 8), Sparseout(q=2.5))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([1.0, 1] + [0] * 6))
    assert watched(model, torch.rand(2, 5, 5, 8), unit_dim=unit_dim).measured["1"] == pytest.approx(0.773, abs=5e-4)
    if unit_dim is None:
        fast = torch.compile(model, backend="aot_eager", fullgraph=True)
        accumulator = model[1]._forward_pre_hooks.popitem()[1].function.__self__
        fast(torch.rand(2, 5, 5, 8))
        assert list(accumulator.sums[True]) == [8]


@pytest.mark.parametrize(("unit_dim", "error"), [("1", TypeError), (True, TypeError), ({"1": "a"}, TypeError)])
def test_a_wrong_unit_dim_is_refused(unit_dim: object, error: type) -> None:
    model = one_layer()
    with pytest.raises(error, match="`unit_dim` to be an int"):
        SparsityController(model, 0.5, unit_dim=unit_dim)
    assert not model[2]._forward_pre_hooks
