"""Every method by its name, and the noise on weights coming and going."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

import sparseout
from sparseout import baselines
from sparseout.baselines import Attachment, make, revert_

LAYERS = {
    "none": nn.Identity,
    "dropout": nn.Dropout,
    "sparseout": sparseout.Sparseout,
    "gaussian": baselines.GaussianDropout,
    "kwinners": baselines.KWinners,
    "relu2": baselines.ReLUSquared,
    "statistical_topk": baselines.StatisticalTopK,
}
WEIGHTS = ("bridgeout", "shakeout")
NAMES = "none, dropout, sparseout, bridgeout, shakeout, gaussian, penalty, kwinners, l1_warmup, relu2, statistical_topk"


def test_every_name_makes_a_layer_or_says_how_it_is_attached():
    assert ", ".join(baselines.METHODS) == NAMES
    for name in baselines.METHODS:
        made = make(name)
        if name in LAYERS:
            assert type(made) is LAYERS[name]
            assert made(torch.rand(3, 20)).shape == (3, 20)
        else:
            assert isinstance(made, Attachment)
            assert made.acts_on == ("loss" if name in ("penalty", "l1_warmup") else "weights")
            assert str(made).startswith(f"{name} (")
            assert f"acts on the {made.acts_on}" in str(made)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("dropout", {"p": 0.25, "inplace": True}),
        ("sparseout", {"p": 0.25, "q": 3.0, "gradient": "exact", "scale": "matched", "shared_dims": (0,)}),
        ("gaussian", {"p": 0.25, "shared_dims": (0,)}),
        ("statistical_topk", {"k": 3}),
        ("kwinners", {"k": 3, "k_eval": 0.5, "boost": 2.0, "momentum": 0.5}),
    ],
)
def test_parameters_arrive(name, parameters):
    layer = make(name, **parameters)
    assert {key: getattr(layer, key) for key in parameters} == parameters


def test_what_is_attached_does_what_it_says():
    layer = make("bridgeout", p=0.25, q=1.0, per_example=False).attach(nn.Linear(3, 2))
    assert (layer.p, layer.q, layer.per_example) == (0.25, 1.0, False)
    layer = make("shakeout", p=0.25, c=0.5).attach(nn.Conv2d(3, 2, 1))
    assert (layer.p, layer.c) == (0.25, 0.5)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Sigmoid()), torch.randn(5, 4)
    penalty = make("penalty", strength=2.0, q=0.5, eps=0.1).attach(model, modules=["1"])
    model(x)
    torch.testing.assert_close(penalty.loss(), 2 * baselines.lq_penalty(model[:2](x), 0.5, 0.1))
    penalty.detach()
    penalty = make("penalty", target=0.3).attach(model, modules=["2"])
    out = model(x)
    torch.testing.assert_close(penalty.loss(), 1e-3 * baselines.kl_penalty(out, 0.3))
    penalty.detach()
    penalty = make("l1_warmup", strength=2.0, warmup=2).attach(model, modules=["1"])
    for part in (0.0, 0.5, 1.0, 1.0):
        out = model[:2](x)
        torch.testing.assert_close(penalty.loss(), part * 2 * baselines.lq_penalty(out))


@pytest.mark.parametrize(
    ("name", "parameters", "error", "sentence"),
    [
        ("dropconnect", {}, ValueError, f"expected `name` to be one of {NAMES}, but got 'dropconnect'"),
        (None, {}, TypeError, f"expected `name` to be one of {NAMES}, but got None"),
        ("none", {"p": 0.5}, TypeError, "expected `parameters` to be among none for none, but got 'p'"),
        (
            "shakeout",
            {"p": 0.5, "tau": 0.5},
            TypeError,
            "expected `parameters` to be among p, c for shakeout, but got 'tau'",
        ),
        (
            "kwinners",
            {"p": 0.5},
            TypeError,
            "expected `parameters` to be among k, k_eval, boost, momentum, units, unit_dim for kwinners, but got 'p'",
        ),
        ("bridgeout", {"p": 1}, ValueError, "expected `p` to be a number >= 0 and < 1, but got 1"),
        ("bridgeout", {"q": -1}, ValueError, "expected `q` to be a finite number >= 0, but got -1"),
        ("bridgeout", {"per_example": 1}, TypeError, "expected `per_example` to be a bool, but got an int"),
        ("shakeout", {"c": -0.1}, ValueError, "expected `c` to be a finite number >= 0, but got -0.1"),
        ("shakeout", {"p": "half"}, TypeError, "expected `p` to be a number >= 0 and < 1, but got 'half'"),
        ("gaussian", {"p": 1.0}, ValueError, "expected `p` to be a number >= 0 and < 1, but got 1.0"),
        ("l1_warmup", {"warmup": 0.05}, TypeError, "expected `warmup` to be an int >= 0, but got a float"),
        (
            "statistical_topk",
            {"p": 0.5},
            TypeError,
            "expected `parameters` to be among k, unit_dim for statistical_topk, but got 'p'",
        ),
        ("penalty", {"q": 0}, ValueError, "expected `q` to be a finite number > 0, but got 0"),
        ("penalty", {"target": 0}, ValueError, "expected `target` to be a number > 0 and < 1, but got 0"),
    ],
)
def test_what_cannot_be_made_is_one_sentence(name, parameters, error, sentence):
    with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        make(name, **parameters)


@pytest.mark.parametrize("build", [lambda: nn.Linear(4, 3), lambda: nn.Conv2d(4, 3, 1)], ids=["fc", "conv"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_layer_stays_the_object_that_it_is(name, build):
    layer = build()
    shape = (5, 4) if isinstance(layer, nn.Linear) else (5, 4, 2, 2)
    x, before = torch.randn(shape), copy.deepcopy(layer)
    parameters, keys, attributes = list(layer.parameters()), list(layer.state_dict()), set(vars(layer))
    assert make(name).attach(layer) is layer
    assert isinstance(layer, type(before))
    assert [a is b for a, b in zip(parameters, layer.parameters(), strict=True)] == [True, True]
    assert list(layer.state_dict()) == keys
    assert not torch.equal(layer(x), before(x))
    layer.eval()
    state = torch.get_rng_state()
    assert torch.equal(layer(x), before(x))
    assert torch.equal(state, torch.get_rng_state())
    layer.train()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.manual_seed(1)
        wanted = layer(x)
        torch.manual_seed(1)
        assert torch.equal(other(x), wanted)
    with pytest.raises(TypeError, match="expected `module` to be a Linear or Conv2d, and nothing derived from it"):
        make(name).attach(layer)
    revert_(nn.Sequential(nn.ReLU(), layer))
    assert type(layer) is type(before)
    assert set(vars(layer)) == attributes
    assert torch.equal(layer(x), before(x))


@pytest.mark.parametrize("name", WEIGHTS)
def test_p_0_is_the_layer_itself(name):
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    wanted = layer(x)
    state = torch.get_rng_state()
    assert torch.equal(make(name, p=0).attach(layer)(x), wanted)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("build", [lambda: nn.Linear(4, 3), lambda: nn.Conv2d(4, 3, 1)], ids=["fc", "conv"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_it_compiles_whole(name, build):
    layer = make(name).attach(build())
    x = torch.randn((5, 4) if isinstance(layer, nn.Linear) else (5, 4, 2, 2))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    out = [compiled(x) for _ in range(2)]
    assert not torch.equal(*out)  # new noise each time
    revert_(layer)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("module", [nn.LSTM(3, 2), nn.Bilinear(2, 2, 2), nn.ReLU()])
def test_other_modules_are_refused(name, module):
    sentence = (
        f"expected `module` to be a Linear or Conv2d, and nothing derived from it, but got a {type(module).__name__}"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(sentence)}$"):
        make(name).attach(module)
