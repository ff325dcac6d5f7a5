"""torch.compile with fullgraph: the same noise, value and gradient as eager."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from conftest import needs_compiler
from sparseout import Sparseout, Sparseout1d, Sparseout2d, Sparseout3d, sparseout
from sparseout.baselines import GaussianDropout, KWinners, StatisticalTopK

BACKENDS = ["aot_eager", pytest.param("inductor", marks=needs_compiler)]


def value_and_gradient(f, x, *args):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = f(x, *args)
    upstream = torch.empty_like(y).copy_(torch.linspace(-1, 1, y.numel()).view(y.shape))  # a gradient follows upstream
    return y.detach(), torch.autograd.grad(y, x, upstream)[0]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.slow
def test_compiled_equals_eager_for_a_seed_tensor(backend, dynamic):
    qs, scales = enumerate((0.5, 1.5, torch.tensor(1.3))), enumerate((None, 0.5, "matched"))
    variants = [  # every two of their values meet
        (q, ("detached", "exact")[(i + j) % 2], beta) for (i, q), (j, beta) in itertools.product(qs, scales)
    ]
    if backend == "inductor" or dynamic:  # slow to compile
        variants = [variants[at] for at in (0, 5, 7)]  # every value is there

    def f(x, seed):  # one graph, as each takes half a second
        pairs = zip(x.unbind(), variants, strict=True)
        return torch.stack([sparseout(x, 0.3, q, gradient=how, scale=beta, seed=seed) for x, (q, how, beta) in pairs])

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend=backend)
    for shape in ((6, 7), (9, 5)) if dynamic else ((6, 7),):
        x = torch.randn(len(variants), *shape).relu()
        for seed in (torch.tensor(3), torch.tensor(2**40)):
            eager, other = value_and_gradient(f, x, seed), value_and_gradient(compiled, x, seed)
            for at, (q, _, scale) in enumerate(variants):
                # The mean may be summed in another order, and beta computed from tensors in fp32.
                rounded = scale == "matched" or (scale and isinstance(q, torch.Tensor))
                same = {"rtol": 1e-5, "atol": 1e-6} if rounded else {"rtol": 0, "atol": 0}
                torch.testing.assert_close(other[0][at], eager[0][at], **same)
                torch.testing.assert_close(other[1][at], eager[1][at], **same)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dims", [(), (2, 3), (0,)])
def test_compiled_layouts_and_shared_dims(dims, memory_format):
    x = torch.randn(3, 4, 5, 6).contiguous(memory_format=memory_format)

    def f(x, seed):
        return sparseout(x, 0.3, 1.5, shared_dims=dims, seed=seed)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    eager, other = value_and_gradient(f, x, torch.tensor(1)), value_and_gradient(compiled, x, torch.tensor(1))
    for a, b in zip(eager, other, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


@pytest.mark.parametrize("q", [1.0, 2.0, torch.tensor(1.5)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_differ_and_backward_uses_the_mask_of_forward(backend, q):
    layer = torch.compile(Sparseout(0.5, q), fullgraph=True, backend=backend)
    x = torch.ones(50)
    results = [value_and_gradient(lambda x: layer(x) * 1, x) for _ in range(3)]
    for (a, _), (b, _) in itertools.combinations(results, 2):
        assert not torch.equal(a, b)
    upstream = torch.linspace(-1, 1, 50)
    for y, gradient in results:
        torch.testing.assert_close(gradient, y * upstream)  # at x = 1 value and slope are 1 + xi
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Sparseout, (4, 5)),
        (Sparseout1d, (2, 4, 5)),
        (Sparseout2d, (2, 3, 4, 5)),
        (Sparseout3d, (2, 3, 4, 5, 6)),
    ],
)
@pytest.mark.parametrize("q", [1.5, 2.0])
def test_layers_in_training_and_evaluation(q, layer, shape):
    for inplace in (False, True):
        module = layer(0.5, q, inplace)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        x = torch.ones(shape)
        assert compiled(x.clone()).std() > 0
        module.eval()
        state = torch.get_rng_state()
        assert torch.equal(compiled(x), x)
        assert torch.equal(torch.get_rng_state(), state)


def test_a_model_trains_when_compiled():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), Sparseout(0.5, 1.5, scale="matched"), nn.Linear(16, 1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(32, 8)
    y = x.sum(1, keepdim=True)
    losses = []
    for _ in range(30):
        loss = (compiled(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_moving_a_tensor_q_neither_recompiles_nor_goes_unseen():
    counter = CompileCounter()
    q = torch.tensor(1.0)
    layer = Sparseout(0.5, q, seed=1)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.rand(20)
    for value in (1.0, 1.7, 3.1):
        q.fill_(value)
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == 1


def test_moving_a_float_q_is_seen():
    layer = Sparseout(0.5, 1.0, seed=1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.rand(20)
    for q in (1.0, 1.7, 2.0, 3.1):
        layer.q = q
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("q", [1.5, torch.tensor(1.5)])
def test_one_layer_in_a_checkpoint_and_one_after_it_with_dynamic_sizes(q):
    first, second = Sparseout(0.5, q, seed=1), Sparseout(0.5, q, seed=2)

    def f(x):
        return second(checkpoint(first, x, use_reentrant=False))

    compiled, x = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager"), torch.randn(4, 8)
    for a, b in zip(value_and_gradient(f, x), value_and_gradient(compiled, x), strict=True):
        torch.testing.assert_close(a, b)


MOVED = {
    "detached": ("p", partial(Sparseout, q=1.5, seed=3)),
    "exact": ("p", partial(Sparseout1d, q=2.5, gradient="exact", seed=3)),
    "gaussian": ("p", GaussianDropout),
    "k-winners": ("k", partial(KWinners, boost=2.0)),
    "statistical": ("k", StatisticalTopK),
}


@pytest.mark.parametrize(
    ("name", "transformed"), [*((name, False) for name in MOVED), ("detached", True), ("statistical", True)]
)
def test_a_tensor_for_p_or_k_moves_without_recompilation_and_with_the_bits_of_a_float(name, transformed):
    torch.compiler.reset()
    attribute, made = MOVED[name]
    value, counter = torch.tensor(0.5, dtype=torch.float64), CompileCounter()
    layer = made(value)

    def gradients(layer, x):
        if transformed:
            return torch.vmap(torch.func.grad(lambda row: layer(row[None]).square().sum()), randomness="same")(x)
        return torch.autograd.grad(layer(x).square().sum(), x)[0]

    def f(x):
        return gradients(layer, x) if transformed else layer(x)

    compiled, counts = torch.compile(f, backend=counter, fullgraph=True), []
    for number in (0.3, 0.123456789, 0.995, 0.0, 1.0) if attribute == "p" else (0.3, 0.7, 0.01):
        if name == "gaussian" and number == 1:
            continue  # its variance would be infinite
        value.fill_(number)
        plain = made(number) if attribute == "k" or number else nn.Identity()
        x = torch.randn(6, 4, 32, requires_grad=True)
        if name == "k-winners":
            for one in (layer, plain):
                one.duty_cycle = torch.linspace(0, 0.3, 32)
        torch.manual_seed(1)
        y = compiled(x)
        torch.manual_seed(1)
        if transformed:  # other operations than eager ones have the last bits differ, of a float too
            torch.testing.assert_close(y, gradients(plain, x))
        else:
            assert torch.equal(y, plain(x))
            torch.manual_seed(1)
            assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], gradients(plain, x))
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1


def test_a_tensor_for_p_is_checked_when_it_is_read():
    for bad in (torch.ones(2), torch.tensor(1), torch.tensor(0.5, requires_grad=True)):
        with pytest.raises((TypeError, ValueError), match=r"^expected `p` to be"):
            Sparseout(bad)
    layer = Sparseout(torch.tensor(0.5), 1.5)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    compiled(torch.ones(3))
    layer.p.fill_(1.5)
    for function in (layer, compiled):
        with pytest.raises(ValueError, match=r"^expected `p` to be a number between 0 and 1, but got 1\.5"):
            function(torch.ones(3))
