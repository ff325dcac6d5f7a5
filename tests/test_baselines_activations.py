"""ReLU squared, and the statistical top-k: its threshold, its fraction, its gradient, and rows without a deviation."""

import copy
import math
import pickle
import re
from statistics import NormalDist

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import sparseout
from conftest import needs_compiler
from sparseout.baselines import ActivityPenalty, ReLUSquared, StatisticalTopK, relu_squared, statistical_topk


def by_hand(row, k):
    """The equation, in Python's own numbers."""
    mean = math.fsum(row) / len(row)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in row) / len(row))
    threshold = mean + deviation * NormalDist().inv_cdf(1 - k)
    return [max(0.0, x - threshold) for x in row]


def rows(x, units):
    return [by_hand(row, 0.2) for row in x.double().reshape(-1, units).tolist()]


@pytest.mark.parametrize("k", [0.05, 0.5, 0.9, 3, 19])
def test_it_is_the_equation(k):
    scales = torch.tensor([[1e-30], [1.0], [1e3], [1e200], [1e-200]], dtype=torch.float64)
    x = torch.randn(5, 20, dtype=torch.float64) * scales
    wanted = torch.tensor([by_hand(row, k / 20 if k >= 1 else k) for row in x[:3].tolist()], dtype=torch.float64)
    torch.testing.assert_close(statistical_topk(x, k)[:3], wanted, rtol=1e-9, atol=1e-44)
    scaled = statistical_topk(x[3:] / x[3:].abs().amax(1, keepdim=True), k) * x[3:].abs().amax(1, keepdim=True)
    torch.testing.assert_close(statistical_topk(x, k)[3:], scaled, rtol=1e-9, atol=0)  # squares would leave the dtype


@pytest.mark.parametrize(
    ("shape", "unit_dim", "competing"),
    [
        ((20,), None, 20),
        ((3, 4, 20), None, 20),
        ((5, 4, 5, 4), None, 80),
        ((2, 4, 5, 2, 2), None, 80),
        ((5, 4, 5, 4), -1, 4),
        ((3, 4, 5), 1, 20),
        ((3, 4, 5), lambda name, module, x: 1, 20),
    ],
)
def test_rows_are_those_of_k_winners(shape, unit_dim, competing):
    x = torch.randn(shape)
    out = StatisticalTopK(0.2, unit_dim=unit_dim)(x)
    torch.testing.assert_close(out.reshape(-1, competing), torch.tensor(rows(x, competing)), rtol=1e-4, atol=1e-5)
    layer = sparseout.baselines.KWinners(1, boost=0, unit_dim=unit_dim)
    assert (layer(x).reshape(-1, competing) != 0).sum(1).tolist() == [1] * (x.numel() // competing)


@pytest.mark.parametrize("k", [0.02, 0.1, 0.5])
def test_of_gaussian_rows_the_fraction_is_k_and_density_is_the_exact_one(k):
    x = torch.randn(8, 50_000) * 3 - 7
    model = nn.Sequential(StatisticalTopK(k))
    with sparseout.SparsityMonitor(model) as monitor:
        y = model(x)
    exact = (y != 0).double().mean(1)
    torch.testing.assert_close(exact, torch.full((8,), k, dtype=torch.float64), rtol=0, atol=0.006)
    assert monitor.report()[0]["density"] == pytest.approx(exact.mean().item(), abs=1e-7)
    skewed = statistical_topk(
        torch.rand(8, 5000).pow(8), k
    )  # of others it is another, and never above Cantelli's bound
    assert (skewed != 0).double().mean() <= 1 / (1 + NormalDist().inv_cdf(1 - k) ** 2)
    assert abs((skewed != 0).double().mean() - k) > 0.01


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1e-30, 1e30])
@pytest.mark.parametrize("k", [0.1, 0.5, 0.9])
def test_a_row_of_equal_values_becomes_zero_and_has_no_gradient(value, k):
    x = torch.full((3, 7), value)
    x[1] = torch.arange(7.0)
    x.requires_grad_()
    y = statistical_topk(x, k)
    y.sum().backward()
    assert torch.equal(y[::2], torch.zeros(2, 7))
    assert torch.equal(x.grad[::2], torch.zeros(2, 7))
    assert x.grad.isfinite().all()
    assert y[1].count_nonzero() > 0


def test_nan_and_infinity_stay_in_their_row():
    x = torch.randn(4, 6)
    plain = statistical_topk(x, 0.2)
    x[0, 1], x[1, 2], x[2, 3] = math.nan, math.inf, -math.inf
    y = statistical_topk(x, 0.2)
    assert y[:3].isnan().all()
    assert torch.equal(y[3], plain[3])


@pytest.mark.parametrize("layer", [StatisticalTopK(0.3), StatisticalTopK(2), ReLUSquared()])
def test_gradients_are_those_of_the_function(layer):
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(layer, x)
    assert gradgradcheck(layer, x)
    each = torch.vmap(torch.func.grad(lambda row: layer(row).square().sum()))(x.detach())
    layer(x).square().sum().backward()
    torch.testing.assert_close(each, x.grad)
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_fp32(dtype):
    x = (torch.randn(4, 60) * 3).to(dtype)
    y = statistical_topk(x, 0.2)
    assert torch.equal(y, statistical_topk(x.float(), 0.2).to(dtype))
    assert torch.equal(relu_squared(x), relu_squared(x.float()).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        linear = nn.Linear(60, 30)
        assert StatisticalTopK(0.2)(linear(x.float())).dtype == torch.bfloat16


@needs_compiler
@pytest.mark.parametrize("layer", [StatisticalTopK(3), ReLUSquared()])
def test_it_compiles_whole_for_any_size(layer):
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((5, 20), (7, 31)):
        x = torch.randn(shape, requires_grad=True)
        plain = x.detach().requires_grad_()
        compiled(x).square().sum().backward()
        layer(plain).square().sum().backward()
        torch.testing.assert_close(x.grad, plain.grad)


def test_it_is_traced_copied_and_has_no_state():
    model = nn.Sequential(nn.Linear(6, 20), StatisticalTopK(0.2), nn.Linear(20, 8), ReLUSquared())
    x = torch.randn(4, 6)
    wanted = model(x)
    exported = torch.export.export(model, (x,)).module()
    for other in (torch.fx.symbolic_trace(model), exported, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), wanted)
    assert not model[1].state_dict()
    assert torch.equal(model.eval()(x), wanted)
    assert repr(model[1]) == "StatisticalTopK(k=0.2)"


def test_memory_format_and_empty_batches():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert statistical_topk(x).is_contiguous(memory_format=torch.channels_last)
    for shape in ((0, 5), (0, 3, 4, 4), (2, 3, 0, 4)):
        assert statistical_topk(torch.empty(shape)).shape == shape


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("layer", [StatisticalTopK(0.2), ReLUSquared()])
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_nested_tensors(layer, layout):
    parts = [torch.randn(3, 6), torch.randn(5, 6)]
    out = layer(torch.nested.nested_tensor(parts, layout=layout))
    assert out.layout == layout
    for part, one in zip(parts, out.unbind(), strict=True):
        assert torch.equal(one, layer(part))


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Partial(), Replicate()])
def test_sharded_tensors(placement, process_group):
    x = torch.randn(4, 6)
    sharded = DTensor.from_local(x, init_device_mesh("cpu", (1,)), [placement])
    out = StatisticalTopK(0.2)(sharded)
    assert isinstance(out, DTensor)
    assert torch.equal(out.full_tensor(), statistical_topk(x, 0.2))


def test_both_are_activations_to_monitor_and_penalty():
    model = nn.Sequential(nn.Linear(4, 6), ReLUSquared(), nn.Linear(6, 6), StatisticalTopK(0.5))
    x = torch.randn(10, 4)
    with sparseout.SparsityMonitor(model) as monitor, ActivityPenalty(model, strength=1.0) as penalty:
        model(x)
        found = penalty.loss()
    assert {record["module"] for record in monitor.report()} == {"1", "3"}
    wanted = sum(sparseout.baselines.lq_penalty(model[:end](x)) for end in (2, 4))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda x: statistical_topk(x, 1.0),
            ValueError,
            "expected `k` to be a whole number >= 1 (of units) or a number",
        ),
        (lambda x: StatisticalTopK(0), ValueError, "expected `k` to be a whole number >= 1 (of units) or a number > 0"),
        (lambda x: StatisticalTopK("few"), TypeError, "expected `k` to be a whole number >= 1 (of units) or a number"),
        (
            lambda x: statistical_topk(x, 6),
            ValueError,
            "expected `k` to be less than 6, the units that compete, but got",
        ),
        (lambda x: statistical_topk(x, unit_dim=2), ValueError, "expected `unit_dim` to be in [-2, 1], but got 2"),
        (
            lambda x: statistical_topk(x.long()),
            TypeError,
            "expected `x` to be of floating-point numbers, but got torch.int64",
        ),
        (lambda x: statistical_topk(x, unit_dim=0.5), TypeError, "expected `unit_dim` to be an int, but got a float"),
        (lambda x: StatisticalTopK(0.5, unit_dim="1"), TypeError, "expected `unit_dim` to be an int, a mapping"),
        (lambda x: StatisticalTopK()(x[:, :0]), ValueError, "expected `x` to be of at least one dim and one unit, but"),
        (lambda x: StatisticalTopK()(x[0, 0]), ValueError, "expected `x` to be of at least one dim and one unit, but"),
    ],
)
def test_errors(call, error, sentence):
    with pytest.raises(error, match=f"^{re.escape(sentence)}"):
        call(torch.randn(4, 6))
