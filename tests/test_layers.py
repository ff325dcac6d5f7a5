"""A layer is the function with its arguments kept, and a module as others are."""

import copy
import inspect
import itertools
import pickle

import pytest
import torch
from torch import nn

import sparseout
from sparseout import Sparseout, Sparseout1d, Sparseout2d, Sparseout3d

CHANNELS = [
    (Sparseout1d, nn.Dropout1d, (5, 6), (1,)),
    (Sparseout1d, nn.Dropout1d, (4, 5, 6), (2,)),
    (Sparseout2d, nn.Dropout2d, (3, 4, 5, 6), (2, 3)),
    (Sparseout3d, nn.Dropout3d, (3, 4, 5, 6), (1, 2, 3)),
    (Sparseout3d, nn.Dropout3d, (2, 3, 4, 5, 6), (2, 3, 4)),
]
ARGUMENTS = {
    "p": [0.25, 1],
    "q": [1.0, 2.0, torch.tensor(1.5)],
    "inplace": [False, True],
    "gradient": ["detached", "exact"],
    "scale": [None, 0.3, "matched"],
    "seed": [4, torch.tensor(4), None],
}


def value_and_gradient(f, x):
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    y = f(x * 1)
    return y, torch.autograd.grad(y.sum(), x)[0]


def assert_same(layer, function, x):
    for a, b in zip(value_and_gradient(layer, x), value_and_gradient(function, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shared_dims", [(), (0,), (1, -1)])
@pytest.mark.parametrize("training", [True, False])
def test_layer_is_the_function(training, shared_dims):
    x = torch.randn(3, 4, 5)
    for values in itertools.product(*ARGUMENTS.values()):
        kwargs = dict(zip(ARGUMENTS, values, strict=True), shared_dims=shared_dims)
        layer = Sparseout(**kwargs).train(training)
        assert_same(layer, lambda x: sparseout.sparseout(x, training=training, **kwargs), x)  # noqa: B023


@pytest.mark.parametrize(("layer", "dropout", "shape", "dims"), CHANNELS)
def test_channel_layer_is_the_function_with_shared_dims(layer, dropout, shape, dims):
    x = torch.randn(shape)
    for values in itertools.product(*ARGUMENTS.values()):
        kwargs = dict(zip(ARGUMENTS, values, strict=True))
        assert_same(layer(**kwargs), lambda x: sparseout.sparseout(x, shared_dims=dims, **kwargs), x)  # noqa: B023


def test_every_argument_changes_the_result():
    """So that none is accepted and ignored."""
    x = torch.randn(3, 4, 5)
    base = {"p": 0.25, "q": 1.0, "seed": 1}
    reference = value_and_gradient(Sparseout(**base), x)
    for change in (
        {"p": 0.5},
        {"q": 1.5},
        {"gradient": "exact"},
        {"scale": 0.3},
        {"scale": "matched"},
        {"seed": 2},
    ):
        changed = value_and_gradient(Sparseout(**base | change), x)
        assert not all(map(torch.equal, reference, changed))
    assert not torch.equal(value_and_gradient(Sparseout(**base, shared_dims=(0,)), x)[0], reference[0])


@pytest.mark.parametrize(("layer", "dropout", "shape", "dims"), [(Sparseout, nn.Dropout, (3, 4), ()), *CHANNELS])
def test_stands_where_dropout_stands(layer, dropout, shape, dims):
    ours, theirs = inspect.signature(layer).parameters, inspect.signature(dropout).parameters
    assert [name for name in ours if name != "q"][: len(theirs)] == list(theirs)
    assert all(ours[name].default == theirs[name].default for name in theirs)
    x = torch.randn(shape)
    for p, inplace in itertools.product((0.0, 0.3, 1.0), (False, True)):
        assert_same(layer(p, 2, inplace), dropout(p, inplace), x)


def test_2d_takes_sequences_as_dropout2d_does():
    x = torch.randn(4, 5, 6)
    with pytest.warns(UserWarning, match="Received a 3D input"):
        expected = value_and_gradient(nn.Dropout2d(0.3), x)
    ours = value_and_gradient(Sparseout2d(0.3, 2.0), x)
    assert all(map(torch.equal, ours, expected))
    assert Sparseout2d(0.5, 1.0, seed=0)(torch.ones(4, 5, 6)).std(dim=2).max() == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("q", [1.0, 2.0, torch.tensor(1.5)])
@pytest.mark.parametrize(
    ("layer", "dropout", "shape", "shared"),
    [
        (Sparseout2d, nn.Dropout2d, (6, 5), ()),
        (Sparseout2d, nn.Dropout2d, (3, 4, 2, 2, 2), (2, 3, 4)),
        (Sparseout3d, nn.Dropout3d, (8, 5), (1,)),
        (Sparseout3d, nn.Dropout3d, (8, 3, 4), (1, 2)),
        (Sparseout3d, nn.Dropout3d, (8, 1, 2, 2, 2, 2), (1, 2, 3, 4, 5)),
    ],
)
def test_other_numbers_of_dims_go_through_with_torchs_warning(layer, dropout, shape, shared, q, training):
    x = torch.ones(shape)
    warning = f"{dropout.__name__.lower()}: Received a {len(shape)}-D input"
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=warning):
        expected = dropout(0.5).train(training)(x)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=warning):
        y = layer(0.5, q).train(training)(x)
    if (q == 2 and not isinstance(q, torch.Tensor)) or not training:
        assert torch.equal(y, expected)
    else:
        for result in (y, expected):  # one draw where torch has one, and no further
            first = result[tuple(slice(1) if dim in shared else slice(None) for dim in range(len(shape)))]
            assert torch.equal(result, first.expand(shape))
            assert 0 < (first > 1).float().mean() < 1


def test_evaluation_returns_the_input():
    x = torch.randn(3, 4)
    state = torch.get_rng_state()
    assert Sparseout(0.5, 1.0).eval()(x) is x
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("q", [1.5, torch.tensor(1.5)])
def test_copies_behave_the_same(q, make):
    layer = Sparseout(0.3, q, gradient="exact", scale="matched", shared_dims=(0,), seed=3)
    assert_same(make(layer), layer, torch.randn(4, 5))
    assert repr(make(layer)) == repr(layer)


@pytest.mark.parametrize("q", [1.5, torch.tensor(1.5)])
def test_no_state(q):
    layer = Sparseout(0.3, q, seed=torch.tensor(1))
    assert layer.state_dict() == {}
    assert list(layer.parameters()) == list(layer.buffers()) == []


def test_tensors_keep_their_dtype_and_identity_when_the_module_is_cast():
    q, seed = torch.tensor(1.5), torch.tensor(1)
    layer = nn.Sequential(Sparseout(0.3, q, seed=seed)).half().double().bfloat16()[0]
    assert layer.q is q
    assert layer.seed is seed
    on_meta = copy.deepcopy(layer).to("meta")  # whose values would be lost there
    assert on_meta(torch.ones(2, device="meta")).is_meta
    assert (on_meta.to_empty(device="cpu").q.item(), on_meta.seed.item()) == (1.5, 1)
    with torch.device("meta"):
        born_there = Sparseout(0.3, torch.tensor(1.5))
    with pytest.raises(RuntimeError, match="expected `q` to be a tensor with a value"):
        born_there.to_empty(device="cpu")


def test_a_tensor_q_can_be_moved_in_place():
    q = torch.tensor(1.0)
    layer = Sparseout(0.5, q, seed=1)
    x = torch.rand(20)
    q.fill_(3.0)
    assert torch.equal(layer(x), Sparseout(0.5, torch.tensor(3.0), seed=1)(x))


def test_repr_says_what_differs_from_the_defaults():
    assert repr(Sparseout()) == "Sparseout(p=0.5, q=2.0)"
    assert repr(Sparseout2d(0.1, 1.5, True)) == "Sparseout2d(p=0.1, q=1.5, inplace=True)"
    full = Sparseout(0.1, torch.tensor(1.25), gradient="exact", scale="matched", shared_dims=(0, 2), seed=7)
    assert repr(full) == (
        "Sparseout(p=0.1, q=tensor(1.2500), gradient='exact', scale='matched', shared_dims=(0, 2), seed=7)"
    )
    assert repr(Sparseout(seed=torch.tensor(3))) == "Sparseout(p=0.5, q=2.0, seed=tensor(3))"
