"""A converted layer is the same object with another class, and everything else in the model is as it was."""

import numpy as np
import pytest
import torch
from copies import copies, seeded
from torch import nn

from conftest import needs_compiler
from sparseout import Sparseout, Sparseout1d, Sparseout2d, Sparseout3d, convert_dropout_, revert_, set_q_

PAIRS = [
    (nn.Dropout, Sparseout, (6, 5)),
    (nn.Dropout1d, Sparseout1d, (2, 3, 5)),
    (nn.Dropout2d, Sparseout2d, (2, 3, 4, 5)),
    (nn.Dropout3d, Sparseout3d, (2, 3, 4, 5, 2)),
]


def net(p=0.5):
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Dropout(p), nn.Linear(20, 3))


@pytest.mark.parametrize(("dropout", "sparse", "shape"), PAIRS)
def test_every_kind_becomes_its_counterpart(dropout, sparse, shape):
    layer = dropout(0.25, inplace=True).eval()
    convert_dropout_(layer, q=1.0, gradient="exact", scale=0.5)
    assert type(layer) is sparse
    assert repr(layer) == repr(sparse(0.25, 1.0, True, gradient="exact", scale=0.5))
    assert not layer.training
    x = torch.rand(shape)
    expected = seeded(sparse(0.25, 1.0, gradient="exact", scale=0.5), x.clone())
    assert torch.equal(seeded(layer.train(), x.clone()), expected)


@pytest.mark.parametrize(("dropout", "sparse", "shape"), PAIRS)
def test_reverting_restores_everything(dropout, sparse, shape):
    layer = dropout(np.float32(0.25))
    before, x = dict(vars(layer)), torch.rand(shape)
    expected = seeded(layer, x)
    convert_dropout_(layer, q=1.0, p=0.7)
    assert layer.p == 0.7
    assert not torch.equal(seeded(layer, x), expected)
    revert_(layer)
    assert type(layer) is dropout
    assert vars(layer) == before
    assert type(layer.p) is np.float32
    assert torch.equal(seeded(layer, x), expected)


def test_q_2_changes_no_bit_of_a_training_step():
    model, x = net(), torch.rand(8, 6)
    before = seeded(model, x)
    convert_dropout_(model, q=2.0)
    assert isinstance(model[2], Sparseout)
    after = seeded(model, x)
    assert torch.equal(before, after)
    assert torch.equal(torch.rand(1), (seeded(net(), x), torch.rand(1))[1])


def test_references_hooks_and_shared_modules_survive():
    drop = nn.Dropout(0.5)
    model = nn.ModuleDict({"a": nn.Sequential(nn.ReLU(), drop), "b": drop})
    calls = []
    drop.register_forward_hook(lambda *_: calls.append("hook"))
    report = convert_dropout_(model, q=1.0)
    assert model["b"] is drop
    assert model["a"][1] is drop
    assert type(drop) is Sparseout
    drop(torch.ones(3))
    assert calls == ["hook"]
    assert len(report.changed) == 1


def test_each_name_of_a_shared_layer_is_asked_and_false_counts_most():
    drop = nn.Dropout(0.5)
    seen = []
    model = nn.Sequential(nn.ModuleDict({"a": drop}), nn.Sequential(drop, nn.Dropout(0.1)))

    def filter_fn(name, module):
        seen.append(name)
        return {"0.a": True, "1.0": False}.get(name)

    report = convert_dropout_(model, q=1.0, filter_fn=filter_fn)
    assert sorted(seen) == ["0.a", "1.0", "1.1"]
    assert report.skipped == {"0.a": "filter_fn says so"}
    assert list(report.changed) == ["1.1"]


class Mine(nn.Dropout):
    pass


def test_what_is_left_is_reported():
    replaced = nn.Dropout(0.5)
    replaced.forward = lambda x: x
    odd = nn.Dropout(0.5)
    odd.p = 3.0
    kinds = {"mine": Mine(), "alpha": nn.AlphaDropout(), "feature": nn.FeatureAlphaDropout(), "replaced": replaced}
    model = nn.ModuleDict({**kinds, "odd": odd, "mine_already": Sparseout(q=1.0)})
    before = {name: type(module) for name, module in model.items()}
    report = convert_dropout_(model, q=1.5)
    assert {name: type(module) for name, module in model.items()} == before
    assert report.skipped == {
        "mine": "Mine is derived from Dropout and may do something else",
        "alpha": "AlphaDropout keeps the mean and variance of SELU units, which Sparseout does not",
        "feature": "FeatureAlphaDropout keeps the mean and variance of SELU units, which Sparseout does not",
        "replaced": "its forward was replaced on the object, so its class decides nothing",
        "odd": "expected `p` to be a number between 0 and 1, but got 3.0",
        "mine_already": "it is a Sparseout layer already: set_q_ changes its q",
    }
    assert not report.changed
    assert str(report).splitlines()[-1].split() == ["changed", "nothing", "all", "layers", "were", "skipped"]


def test_report_is_a_table_with_one_line_for_layers_that_differ_in_numbers():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)) for _ in range(3)], nn.AlphaDropout())
    lines = str(convert_dropout_(model, q=1.5)).splitlines()
    assert lines == [
        "changed  *.* (3x)  Dropout(p=0.1, inplace=False) -> Sparseout(p=0.1, q=1.5)",
        "skipped  3         AlphaDropout keeps the mean and variance of SELU units, which Sparseout does not",
    ]
    with pytest.warns(UserWarning, match="^nothing was converted: the Linear has no dropout$"):
        assert str(convert_dropout_(nn.Linear(2, 2), q=1.0)) == "changed  nothing  no layer to change"
    assert str(convert_dropout_(nn.Dropout(0.1), q=1.0)).startswith("changed  (the model itself)  Dropout(p=0.1")


def test_state_dicts_fit_both_ways():
    original, converted = net(), net()
    convert_dropout_(converted, q=1.0)
    assert list(original.state_dict()) == list(converted.state_dict())
    converted.load_state_dict(original.state_dict(), strict=True)
    original.load_state_dict(converted.state_dict(), strict=True)


@pytest.mark.parametrize("q", [1.0, torch.tensor(1.0)])
def test_copies_and_pickles_can_be_reverted(q):
    model, x = net(), torch.rand(4, 6)
    original = seeded(model, x)
    convert_dropout_(model, q=q)
    converted = seeded(model, x)
    for other in copies(model):
        assert torch.equal(seeded(other, x), converted)
        revert_(other)
        assert type(other[2]) is nn.Dropout
        assert torch.equal(seeded(other, x), original)
    assert isinstance(model[2], Sparseout)


@needs_compiler
def test_compiled_before_and_after():
    x = torch.rand(64, 6)
    model = net()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    dropped = compiled(x)
    convert_dropout_(compiled, q=torch.tensor(1.0), p=1.0)
    assert isinstance(model[2], Sparseout)
    assert torch.equal(compiled(x), model[3](torch.zeros(64, 20)))  # p = 1 is zeros: seen by code compiled before
    assert not torch.equal(dropped, compiled(x))
    assert torch.allclose(compiled.eval()(x), model.eval()(x))
    revert_(compiled.train())
    assert not torch.equal(compiled(x), model[3](torch.zeros(64, 20)))


def test_set_q_of_all_of_some_and_of_tensors():
    model = nn.Sequential(nn.Dropout(0.5), nn.ReLU(), nn.Dropout(0.5))
    convert_dropout_(model, q=1.0)
    set_q_(model, 1)
    assert type(model[0].q) is float
    set_q_(model, {"2": 2.5})
    assert (model[0].q, model[2].q) == (1.0, 2.5)
    q = torch.tensor(3.0)
    set_q_(model, q)
    assert model[0].q is q
    assert model[2].q is q
    set_q_(model, 1.5)
    assert model[0].q is q
    assert q == 1.5
    with pytest.raises(ValueError, match="one value for all layers whose q is the same tensor"):
        set_q_(model, {"0": 2.0})
    assert q == 1.5
    set_q_(model, {"0": 2.0, "2": 2.0})
    assert q == 2
    set_q_(model, {"0": torch.tensor(1.0)})
    assert model[0].q == 1
    assert q == 2


@pytest.mark.parametrize(
    ("q", "error", "sentence"),
    [
        ({"first": 1.0, "secnd": 2.0}, ValueError, "such as 'second', but got 'secnd'"),
        (
            {"first": 1.0, "linear": 2.0},
            ValueError,
            "expected `q` to be {name of a Sparseout layer: q}, such as 'first', 'second', but got 'linear'",
        ),
        ({"first": 1.0, 2: 2.0}, TypeError, "but got an int for a name"),
        ({"first": 1.0, "second": -1}, ValueError, "expected `q` to be a finite number >= 0, but got -1"),
        (True, TypeError, "but got True"),
        (torch.ones(2), TypeError, "0-d floating-point tensor"),
    ],
)
def test_set_q_refuses_in_one_sentence_and_changes_nothing(q, error, sentence):
    model = nn.ModuleDict({"first": Sparseout(q=2.0), "second": Sparseout(q=2.0), "linear": nn.Linear(2, 2)})
    with pytest.raises(error) as caught:
        set_q_(model, q)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (model["first"].q, model["second"].q) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"q": -1.0}, ValueError, "expected `q` to be a finite number >= 0, but got -1.0"),
        ({"q": True}, TypeError, "but got True"),
        ({"q": 1.0, "p": 2.0}, ValueError, "expected `p` to be a number between 0 and 1, but got 2.0"),
        ({"q": 1.0, "gradient": "both"}, ValueError, "expected `gradient`"),
        ({"q": 1.0, "filter_fn": lambda name, module: "yes"}, TypeError, "expected `filter_fn`"),
    ],
)
def test_conversion_refuses_in_one_sentence_and_changes_nothing(arguments, error, sentence):
    model = net()
    with pytest.raises(error) as caught:
        convert_dropout_(model, **arguments)
    assert sentence in str(caught.value)
    assert type(model[2]) is nn.Dropout


@pytest.mark.parametrize("function", [lambda m: convert_dropout_(m, q=1.0), revert_, lambda m: set_q_(m, 1.0)])
def test_models_are_modules(function):
    with pytest.raises(TypeError, match="expected `model` to be a module, but got a list"):
        function([nn.Dropout()])


def test_layers_built_as_sparseout_are_not_reverted():
    model = nn.Sequential(Sparseout(q=1.0), nn.Dropout(0.5))
    convert_dropout_(model, q=1.0)
    convert_dropout_(model, q=1.5)
    assert model[1].q == 1.0
    revert_(model)
    with pytest.warns(UserWarning, match="^nothing was reverted: the model has no converted or inserted layer$"):
        revert_(model)
    assert [type(module) for module in model] == [Sparseout, nn.Dropout]


def test_a_tensor_q_is_shared_and_moves_all_layers():
    q = torch.tensor(1.0)
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    convert_dropout_(model, q=q)
    assert all(layer.q is q for layer in model)
