"""The operation under torch's transforms: vmap, forward mode, checkpoints, autocast, fake tensors, export."""

import io
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from sparseout import Sparseout, Sparseout2d, set_q_, sparseout
from sparseout.baselines import GaussianDropout, KWinners, bridgeout_, shakeout_

VARIANTS = [
    {"q": q, "gradient": gradient, "scale": scale}
    for q, gradient, scale in itertools.product(
        (0.5, 1.5, 3.0, torch.tensor(1.5)), ("detached", "exact"), (None, "matched")
    )
]


def slope_of(x, **kwargs):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(sparseout(x, **kwargs).sum(), x)[0]


# vmap


def test_vmap_different_draws_a_mask_for_each_example():
    x = torch.ones(6, 400)
    y = vmap(lambda x: sparseout(x, 0.5, 1.0), randomness="different")(x)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    for a, b in itertools.combinations(y, 2):
        assert abs((a == b).float().mean() - 0.5) < 5 * 0.5 / 400**0.5


@pytest.mark.parametrize("in_dims", [0, 1])
def test_vmap_same_draws_one_mask(in_dims):
    y = vmap(lambda x: sparseout(x, 0.5, 1.0), in_dims, randomness="same")(torch.ones(6, 6))
    assert torch.equal(y, y[:1].expand(6, -1))
    assert y.std() > 0


@pytest.mark.parametrize("q", [1.0, 2.0, torch.tensor(1.5)])
def test_vmap_error_raises_as_dropout_does(q):
    def message(f):
        with pytest.raises(RuntimeError) as caught:
            vmap(f)(torch.ones(3, 4))
        return str(caught.value)

    assert message(lambda x: sparseout(x, 0.5, q)) == message(lambda x: F.dropout(x, 0.5))


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
@pytest.mark.parametrize("kwargs", VARIANTS)
def test_vmap_with_a_seed_is_the_loop(kwargs, randomness):
    x = torch.randn(4, 5, 6)
    y = vmap(lambda x: sparseout(x, 0.3, seed=3, **kwargs), randomness=randomness)(x)
    expected = torch.stack([sparseout(row, 0.3, seed=3, **kwargs) for row in x])
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("shared_dims", [(), (0,), (1,)])
def test_vmap_over_seeds_is_the_loop(shared_dims):
    x, seeds = torch.randn(5, 6), torch.arange(4)
    y = vmap(lambda seed: sparseout(x, 0.3, 1.0, seed=seed, shared_dims=shared_dims))(seeds)
    expected = torch.stack([sparseout(x, 0.3, 1.0, seed=seed, shared_dims=shared_dims) for seed in seeds])
    torch.testing.assert_close(y, expected)


def test_vmap_of_evaluation_is_silent():
    x = torch.ones(3, 4)
    assert torch.equal(vmap(lambda x: sparseout(x, 0.5, 1.0, training=False))(x), x)


@pytest.mark.parametrize("kwargs", VARIANTS)
def test_per_example_gradients(kwargs):
    x = torch.randn(4, 30)
    seeds = torch.arange(4)
    per_example = vmap(grad(lambda x, seed: sparseout(x, 0.3, seed=seed, **kwargs).sum()))(x, seeds)
    expected = torch.stack([slope_of(row, p=0.3, seed=seed, **kwargs) for row, seed in zip(x, seeds, strict=True)])
    torch.testing.assert_close(per_example, expected)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_of_grad_keeps_one_mask_for_value_and_gradient(randomness):
    def f(x):
        y = sparseout(x, 0.5, 1.0)
        return y.sum(), y

    gradient, y = vmap(grad(f, has_aux=True), randomness=randomness)(torch.ones(5, 60))
    assert torch.equal(gradient, y)  # at x = 1 both are 1 + xi


# Forward mode and reverse mode by function


@pytest.mark.parametrize("kwargs", VARIANTS)
def test_jvp_and_vjp_are_the_slope_with_the_same_noise(kwargs):
    x = torch.randn(200)
    x[::5] = 0
    direction = torch.randn(200)

    def f(x):
        return sparseout(x, p=0.3, seed=7, **kwargs)

    y, slope = f(x), slope_of(x, p=0.3, seed=7, **kwargs)
    value, tangent = jvp(f, (x,), (direction,))
    torch.testing.assert_close(value, y)
    torch.testing.assert_close(tangent, slope * direction)
    value, pullback = vjp(f, x)
    torch.testing.assert_close(value, y)
    torch.testing.assert_close(pullback(direction)[0], slope * direction)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(f(forward_ad.make_dual(x, direction)))
        torch.testing.assert_close(dual.primal, y)
        torch.testing.assert_close(dual.tangent, slope * direction)


@pytest.mark.parametrize("gradient", ["detached", "exact"])
def test_second_derivative_by_function(gradient):
    x = torch.rand(40, dtype=torch.float64) + 0.1
    p, q = 0.3, 1.2

    def f(x):
        return sparseout(x, p, q, gradient=gradient, seed=7).sum()

    second = vmap(grad(grad(lambda x, seed: sparseout(x, p, q, gradient=gradient, seed=seed))))(x, torch.arange(40))
    if gradient == "detached":
        assert torch.equal(second, torch.zeros_like(x))
    else:
        noise = torch.stack([sparseout(torch.ones(()), p, 1.0, seed=s) - 1 for s in torch.arange(40)]).double()
        expected = noise * (q / 2) * (q / 2 - 1) * x ** (q / 2 - 2)
        torch.testing.assert_close(second, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gradient", ["detached", "exact"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_batched_backward_is_the_loop(dtype, gradient):
    x = torch.randn(5).to(dtype).requires_grad_()

    def f(x):
        return sparseout(x, 0.3, 1.3, gradient=gradient, seed=2)

    y = f(x)
    basis = torch.eye(5, dtype=dtype)
    expected = torch.diag(slope_of(x.detach(), p=0.3, q=1.3, seed=2, gradient=gradient))
    torch.testing.assert_close(torch.autograd.functional.jacobian(f, x.detach(), vectorize=True), expected)
    jacobian = torch.autograd.grad(y, x, basis, is_grads_batched=True, retain_graph=True)[0]
    torch.testing.assert_close(jacobian, expected)
    jacobian = vmap(lambda row: torch.autograd.grad(y, x, row, retain_graph=True)[0])(basis)
    torch.testing.assert_close(jacobian, expected)


# Checkpoints, autocast, fakes


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("q", [1.0, torch.tensor(1.5)])
def test_checkpoint_changes_nothing(q, use_reentrant):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Sparseout(0.5, q), nn.Linear(8, 1))
    x = torch.randn(16, 8)
    results = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        torch.manual_seed(4)
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        loss = run(leaf).square().sum()
        loss.backward()
        results.append([loss.detach(), leaf.grad, *[w.grad.clone() for w in model.parameters()]])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("q", [1.0, 2.0])
@pytest.mark.parametrize("gradient", ["detached", "exact"])
def test_autocast_keeps_the_dtype_of_the_input(gradient, q):
    x = torch.randn(50)
    for dtype in (torch.bfloat16, torch.float32):
        leaf = x.to(dtype).requires_grad_()
        expected = sparseout(leaf, 0.5, q, gradient=gradient, seed=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = sparseout(leaf, 0.5, q, gradient=gradient, seed=1)
        assert y.dtype == dtype
        assert torch.equal(y, expected)
        y.sum().backward()
        assert torch.equal(leaf.grad, torch.autograd.grad(expected.sum(), leaf)[0])


@pytest.mark.parametrize("kwargs", VARIANTS)
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_meta_and_fake_tensors(device, kwargs):
    with FakeTensorMode() if device == "cpu" else torch.device("meta"):
        x = torch.empty(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
        q = torch.empty(()) if isinstance(kwargs["q"], torch.Tensor) else kwargs["q"]
        y = sparseout(x, 0.3, shared_dims=(2, 3), **kwargs | {"q": q})
        y.sum().backward()
    for result in (y, x.grad):
        assert result.shape == (2, 3, 4, 5)
        assert result.dtype == torch.float32
        assert result.device.type == device
        assert result.is_contiguous(memory_format=torch.channels_last)


# Export


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 2, 3),
            nn.ReLU(),
            Sparseout2d(0.5, 1.5, scale="matched"),
            nn.Flatten(),
            Sparseout(0.5, 3.0),
        )

    def forward(self, x):
        return self.body(x)


def test_export_of_an_evaluated_model_shows_no_trace():
    model, x = Model().eval(), torch.randn(2, 1, 5, 5)
    program = torch.export.export(model, (x,))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not any(word in target for target in targets for word in ("sparseout", "rand", "dropout", "pow"))
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.slow
def test_onnx_of_an_evaluated_model_shows_no_trace():
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(Model().eval(), (torch.randn(2, 1, 5, 5),), dynamo=True, verbose=False).save(buffer)
    kinds = {node.op_type for node in onnx.load_from_string(buffer.getvalue()).graph.node}
    assert kinds <= {"Conv", "Relu", "Flatten", "Reshape"}


@pytest.mark.parametrize("training", [True, False])
def test_fx_traces_the_layers(training):
    model = Model().train(training)
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 1, 5, 5)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(traced(x), expected)


@pytest.mark.parametrize(
    "layer",
    [Sparseout(0.5, 1.0), GaussianDropout(), bridgeout_(nn.Linear(8, 8)), shakeout_(nn.Linear(8, 8)), KWinners(3)],
    ids=lambda layer: type(layer).__name__,
)
def test_in_a_graph_of_fx_a_layer_stays_a_layer(layer):
    model, x = nn.Sequential(nn.Linear(8, 8), layer), torch.randn(4, 8)
    traced = torch.fx.symbolic_trace(model)
    for module in (model, traced):
        torch.manual_seed(1)
        module.outputs = module(x).detach()
    assert torch.equal(traced.outputs, model.outputs)
    assert torch.equal(traced.eval()(x), model.eval()(x))  # traced in training, and no noise for all that
    assert type(traced.get_submodule("1")) is type(layer)
    if isinstance(layer, Sparseout):
        set_q_(traced, 2.5)
        assert traced.get_submodule("1").q == 2.5
