"""What a monitor watches: the modules, and which tensor of theirs."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from tracked import hooks
from watching import dense, windows

from sparseout import Sparseout2d, SparsityMonitor, measures


class Outputs(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form
        self.out = None

    def forward(self, x):
        return self.form(x)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: (x, -x),
        lambda x: [torch.ones(2).long(), x],
        lambda x: OrderedDict(loss=x.sum(), state=None, hidden=(x,)),
        lambda x: nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 3]), batch_first=True),
    ],
)
def test_the_first_tensor_of_an_output_is_watched(form):
    model, x = nn.Sequential(Outputs(form)), torch.randn(2, 3, 4)
    with SparsityMonitor(model, ["0"]) as monitor:
        model(x)
    record = monitor.report()[0]
    assert (record["rows"], record["units"]) == (6, 4)
    torch.testing.assert_close(record["hoyer"], measures.hoyer(x).double().mean().item())


def test_an_lstm_and_the_model_itself():
    model, x = nn.LSTM(3, 5), torch.randn(4, 2, 3)
    with SparsityMonitor(model, [nn.LSTM]) as monitor:
        out, _ = model(x)
    torch.testing.assert_close(monitor.report()[0]["hoyer"], measures.hoyer(out).double().mean().item())
    assert windows(monitor.report())[0] == (1, 1)


def test_an_output_without_a_tensor_is_an_error():
    model = nn.Sequential(Outputs(lambda x: "text"))
    message = "expected `0` to be a module with a floating-point tensor of at least one dimension as output"
    with SparsityMonitor(model, ["0"]), pytest.raises(TypeError, match=message):
        model(torch.randn(2))


def test_what_nobody_chose_breaks_no_forward():
    model = nn.Sequential(nn.ReLU(), nn.Dropout(0.5)).eval()
    with SparsityMonitor(model) as monitor:
        assert model(torch.tensor([1, -1])).tolist() == [1, 0]
        assert len(monitor.report()) == 0
        model[0](torch.eye(3, dtype=torch.float64).to_sparse())
    assert (monitor.report()[0]["rows"], monitor.report()[0]["density"]) == (3, 1 / 3)


def test_a_module_of_several_widths_has_a_record_for_each_and_unit_dim_helps():
    model = nn.Sequential(nn.ReLU())
    narrow, wide = torch.randn(5, 7), torch.randn(4, 9)
    with SparsityMonitor(model) as monitor:
        model(narrow)
        model(wide)
    found = [record for record in monitor.report() if record["axis"] == "population"]
    assert [(record["units"], record["rows"]) for record in found] == [(7, 5), (9, 4)]
    for record, x in zip(found, (narrow, wide), strict=True):
        assert record["hoyer"] == pytest.approx(measures.hoyer(x.relu()).mean().item(), rel=1e-5)
    with SparsityMonitor(model, unit_dim=1) as monitor:
        model(torch.randn(2, 3, 7))
        model(torch.randn(2, 3, 9))
    assert (monitor.report()[0]["rows"], monitor.report()[0]["units"]) == (32, 3)


class FooActivation(nn.Module):
    def forward(self, x):
        return x


class GELUTanh(FooActivation):
    """A name that activations have, as in transformers."""


class SwiGLU(nn.Sequential):
    """A block of that name, with layers in it, is none."""


class GEGLU(FooActivation):
    """A block whose weights are its own is none either."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight


class DynamicTanh(FooActivation):
    """A norm."""


class TLU(FooActivation):
    """An activation with a threshold for each channel."""

    def __init__(self):
        super().__init__()
        self.threshold = nn.Parameter(torch.zeros(1, 2, 1, 1))


def test_sites_by_default():
    act = nn.ReLU()
    model = nn.Sequential(
        nn.Linear(2, 2), act, nn.Dropout(), Sparseout2d(), nn.Softmax(1), FooActivation(), act, nn.AlphaDropout()
    )
    model.extend([GELUTanh(), SwiGLU(nn.Identity()), GEGLU(nn.Parameter(torch.ones(2, 4))), DynamicTanh(), TLU()])
    model.append(GEGLU(nn.UninitializedParameter()))
    with SparsityMonitor(model) as monitor:
        model.eval()(torch.rand(3, 2, 4, 2))
    population = [r for r in monitor.report() if r["axis"] == "population"]
    expected = [("1", "output"), ("2", "input"), ("3", "input"), ("5", "output"), ("7", "input")]
    expected += [("8", "output"), ("12", "output")]
    assert [(r["module"], r["tensor"]) for r in population] == expected
    assert population[0]["rows"] == 2 * 3 * 4 * 2  # shared, so called twice


@pytest.mark.parametrize(
    ("modules", "names"),
    [
        (lambda name, module: name.startswith("3"), ["3"]),
        (["4", "0"], ["0", "4"]),
        ({nn.Linear}, ["0", "3"]),
        ((nn.Tanh, "2"), ["2", "4"]),
    ],
)
def test_sites_as_told(modules, names):
    model = dense()
    with SparsityMonitor(model, modules) as monitor:
        model(torch.rand(3, 6))
    assert [r["module"] for r in monitor.report() if r["axis"] == "population"] == names


def named():
    return nn.ModuleDict({"encoder": nn.ReLU(), "decoder": nn.ReLU()})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"modules": ["encoderr"]}, ValueError, "expected `modules` to be names of modules, such as 'encoder', "),
        ({"modules": [nn.PReLU]}, ValueError, "expected `modules` to be types of modules, such as 'ReLU', but got PR"),
        ({"modules": []}, ValueError, "expected `modules` to be what matches some of the modules, such as 'encoder', "),
        ({"modules": lambda n, m: False}, ValueError, "but got what matches none"),
        ({"modules": "encoder"}, TypeError, "a collection of dotted names or of types of modules, but got 'encoder'"),
        ({"modules": nn.ReLU}, TypeError, "but got ReLU"),
        ({"modules": [3]}, TypeError, "but got one of an int"),
        ({"modules": 3}, TypeError, "but got an int"),
        ({"model": nn.Linear(1, 1)}, ValueError, "expected `model` to be .*, but got Linear without any"),
        ({"model": 3}, TypeError, "expected `model` to be a module, but got an int"),
        ({"every": 0}, ValueError, "expected `every` to be an int >= 1, but got 0"),
        ({"every": True}, TypeError, "expected `every` to be an int >= 1, but got True"),
        ({"unit_dim": 1.0}, TypeError, "expected `unit_dim` to be an int, a mapping .*, but got a float"),
        ({"measures": ["hoyr"]}, ValueError, "expected `measures` to be among hoyer"),
        ({"measures": "hoyer"}, TypeError, "expected `measures` to be a sequence of names, but got 'hoyer'"),
        ({"measures": 1}, TypeError, "expected `measures` to be a sequence of names, but got 1"),
    ],
)
def test_bad_arguments(arguments, error, message):
    model = arguments.pop("model", None) or named()
    with pytest.raises(error, match=message):
        SparsityMonitor(model, **arguments)
    assert not isinstance(model, nn.Module) or hooks(model) == 0
