"""Sparse linear layers: dense where they must be; states, copies and the way back."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from sparse_calls import converted, count_sparse_calls, with_zeros
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

from sparseout.inference import _sparse_linear, revert_, sparse_linear_


@pytest.fixture
def always(monkeypatch):
    return count_sparse_calls(monkeypatch)


def dense_calls():
    """What makes a call dense: (name, what is called with the layer and x)."""
    x = with_zeros(3, 32)

    def training(layer):
        return layer.train()(x)

    def autograd(layer):
        y = layer(x)
        y.sum().backward()
        assert layer.weight.grad is not None
        return y

    def autograd_of_the_input(layer):
        given = x.clone().requires_grad_()
        layer.requires_grad_(False)(given).sum().backward()
        assert_close(given.grad, layer.weight.sum(0).expand(3, 32))
        return layer(x)[:0]  # which is sparse: nothing requires a gradient

    def autocast(layer):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype is torch.bfloat16
        return y

    def vmap(layer):
        with torch.no_grad():
            return torch.vmap(layer)(x)

    def functional_call(layer):
        values = {name: value.detach() for name, value in layer.named_parameters()}
        return torch.func.jvp(lambda v: torch.func.functional_call(layer, values, (v,)), (x,), (x,))[0]

    def jit_trace(layer):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.trace(layer, x, check_trace=False)(x)

    def make_fx(layer):
        with torch.no_grad():
            graph = torch.fx.experimental.proxy_tensor.make_fx(layer)(x)
            assert not any("embedding" in str(node.target) for node in graph.graph.nodes)
            return graph(x)

    def symbolic_trace(layer):
        with torch.no_grad():
            return torch.fx.symbolic_trace(layer)(x)

    def another_layout(layer):
        layer.load_state_dict(
            {name: value.clone().contiguous() for name, value in layer.state_dict().items()}, assign=True
        )
        with torch.no_grad():
            return layer(x)

    def sparse_tensor(layer):
        with torch.no_grad():
            return layer(x.to_sparse())

    return [value for value in locals().values() if callable(value)]


@pytest.mark.parametrize("run", dense_calls(), ids=lambda run: run.__name__)
def test_it_is_dense_and_right_where_it_cannot_be_sparse(always, run):
    layer = converted(always)
    y = run(layer)
    if run.__name__ not in ("autograd_of_the_input", "symbolic_trace"):
        assert not any(always)
    x = with_zeros(3, 32)[: len(y)]
    assert_close(y.float(), F.linear(x, layer.weight, layer.bias).float(), rtol=2e-2, atol=2e-2)


def test_compiled_and_exported_it_is_a_plain_linear(always):
    model = nn.Sequential(nn.Linear(32, 24), nn.ReLU()).eval()
    x = with_zeros(3, 32)
    expected = model(x)
    sparse_linear_(model, [x], modules=["0"])
    always.clear()
    with torch.no_grad():
        assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
        exported = torch.export.export(model, (x,))
    assert not always
    assert "linear" in str(exported.graph)
    assert "embedding_bag" not in str(exported.graph)
    assert_close(exported.module()(x), expected)


def test_state_hooks_copies_and_the_way_back(always):
    plain = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8, bias=False)).train()
    x, seen = with_zeros(5, 32), []
    model = copy.deepcopy(plain)
    model[2].register_forward_hook(lambda *given: seen.append(1))
    plain.eval()
    keys, objects = list(model.state_dict()), list(model.modules())
    report = sparse_linear_(model, [x])
    assert set(report.changed) == {"0", "2"}
    assert model.training
    assert list(model.state_dict()) == keys
    assert all(one is other for one, other in zip(model.modules(), objects, strict=True))
    assert "SparseLinear(in_features=32, out_features=24, bias=True)" in repr(model)
    model.eval()
    other = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8, bias=False)).eval()
    with torch.no_grad():
        for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model[0])), model.double().float()):
            always.clear()
            y = one(x)
            assert all(always), always
            assert_close(y, plain(x) if len(y[0]) == 8 else plain[0](x), rtol=1e-5, atol=1e-6)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), plain(x))
        changed = {name: value + 1 for name, value in plain.state_dict().items()}
        model.load_state_dict(changed)
        other.load_state_dict(changed)
        always.clear()
        assert_close(model(x), other(x), rtol=1e-5, atol=1e-5)
        assert all(always)
    assert seen
    revert_(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(p.is_contiguous() for p in model.parameters())
    assert not {"break_even", "_was_contiguous", _sparse_linear.RECORD} & set(vars(model[0]))
    assert torch.equal(model(x), other(x))


def test_it_trains_on_and_is_sparse_again(always):
    layer = converted(always)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    layer.train()(with_zeros(4, 32)).square().sum().backward()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(layer.weight, before)
    always.clear()
    x = with_zeros(2, 32)
    with torch.no_grad():
        assert_close(layer.eval()(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-6)
    assert always == [True]


def test_in_inference_mode_the_weight_stays_one_to_train(always):
    layer = nn.Linear(32, 24).eval()
    with torch.inference_mode():
        converted(always, layer)
    layer.train()(with_zeros(4, 32)).sum().backward()
    with torch.inference_mode():
        revert_(layer)
    layer.zero_grad()
    layer(with_zeros(4, 32)).sum().backward()


def test_what_is_put_on_the_weight_since_counts(always):
    x = with_zeros(3, 32)
    for change in (
        lambda layer: prune.custom_from_mask(layer, "weight", torch.eye(24, 32)),
        parametrizations.weight_norm,
    ):
        layer = converted(always)
        change(layer)
        with torch.no_grad():
            assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="undo first what made that of it"):
        revert_(layer)


def test_an_error_in_the_model_changes_nothing():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.Linear(9, 9)).train()
    with pytest.raises(RuntimeError):
        sparse_linear_(model, [torch.randn(2, 8)])
    assert model[1].training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (([],), ValueError, "at least one batch"),
        ((torch.ones(2, 8),), TypeError, "put a single batch into a list"),
        ((None,), TypeError, "an iterable of batches"),
        (([3],), TypeError, "begins with an int"),
    ],
)
def test_batches_that_are_none(given, error, message):
    with pytest.raises(error, match=message):
        sparse_linear_(nn.Linear(8, 8), *given)


def test_a_model_without_a_linear_is_said(always):
    with pytest.warns(UserWarning, match="has no Linear layer"):
        sparse_linear_(nn.ReLU(), [torch.ones(1)])
    with pytest.raises(ValueError, match="names of Linear layers"):
        sparse_linear_(nn.Sequential(nn.Linear(32, 24)), [with_zeros(1, 32)], modules=["1"])
    with pytest.raises(TypeError, match="a module"):
        sparse_linear_(3, [])
    layer = converted(always)
    assert set(sparse_linear_(layer, iter([with_zeros(2, 32)])).changed) == {""}  # again: measured anew
    revert_(layer)
    assert type(layer) is nn.Linear
