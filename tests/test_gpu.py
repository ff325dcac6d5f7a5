"""What only a GPU can show; without one the kernel is still interpreted, in `tests/kernels/test_cuda.py`."""

import pytest
import torch
from torch import nn
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import sparseout as package
from sparseout import Sparseout, sparseout
from sparseout.kernels import backends, reference
from sparseout.kernels import mask as masks
from sparseout.kernels.params import NoiseParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernel was not run natively")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def value_and_gradient(f, x, *args):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = f(x, *args)
    return y.detach(), torch.autograd.grad(y.sin().sum(), x)[0]


def test_the_kernel_is_taken():
    assert package.backend().name == "triton", package.backend().reason


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shared_dims", [(), (0,), (2, 3), (0, 2, 3)])
@pytest.mark.parametrize("scale", [None, 0.5, "matched"])
@pytest.mark.parametrize("gradient", ["detached", "exact"])
def test_values_and_gradients_are_those_of_a_cpu(gradient, scale, shared_dims, memory_format):
    x = torch.randn(16, 24, 7, 8).relu().contiguous(memory_format=memory_format)
    for q in (0.5, 1.0, 1.3, 1.5, 2.5, 3.0, torch.tensor(1.7)):

        def f(x, q=q):
            q = q.to(x.device) if isinstance(q, torch.Tensor) else q
            return sparseout(x, 0.3, q, gradient=gradient, scale=scale, shared_dims=shared_dims, seed=5)

        for ours, theirs in zip(value_and_gradient(f, x.cuda()), value_and_gradient(f, x), strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=2e-5, atol=2e-5)
            assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q", [0.0, 0.5, 1.0, 1.3, 1.5, 2.5, 3.0, 6.0])
def test_matched_is_the_equation_and_the_same_bits_every_time(q, dtype):
    x = torch.randn(9_000_001, device="cuda").relu().to(dtype)  # more tiles than programs
    expected = NoiseParams(q, *reference.matched(x.double(), q)).balanced(torch.float32).numbers()
    for form in (q, torch.tensor(q, device="cuda")):
        first, *others = [backends.kernels(x.device).matched(x, form).numbers() for _ in range(5)]
        assert first[1:] == pytest.approx(expected[1:], rel=5e-6)
        assert all(other == first for other in others)
        x[-1] = torch.inf
        assert backends.kernels(x.device).matched(x, form).numbers()[1:] == (1, 1)
        x[-1] = 0


def captured(layer, x):
    """A graph of forward and backward, and what it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(layer(x).sum(), x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
    return graph, y, gradient


def test_a_replayed_graph_matches_the_noise_to_what_x_has_become():
    layer = Sparseout(0.5, 1.5, scale="matched", seed=3)
    x = torch.rand(10_000, device="cuda", requires_grad=True)
    graph, y, gradient = captured(layer, x)
    for scale in (1.0, 7.0, 0.01):
        x.data.mul_(scale)
        graph.replay()
        expected = layer(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), x)[0])


def test_a_replayed_graph_draws_a_new_mask():
    x = torch.ones(1000, device="cuda", requires_grad=True)
    graph, y, gradient = captured(Sparseout(0.5, 1.5), x)
    masks = []
    for _ in range(3):
        graph.replay()
        torch.testing.assert_close(gradient, y.detach())  # at x = 1 value and slope are 1 + xi
        masks.append(y.detach() > 1)
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


@pytest.mark.parametrize("q", [1.0, 1.3, torch.tensor(1.5, device="cuda" if torch.cuda.is_available() else "cpu")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_equals_eager(dtype, q):
    def f(x, seed):
        return sparseout(x, 0.3, q, seed=seed)

    x = torch.randn(50, 40, device="cuda").to(dtype)
    seed = torch.tensor(2**40, device="cuda")
    for a, b in zip(
        value_and_gradient(f, x, seed),
        value_and_gradient(torch.compile(f, fullgraph=True), x, seed),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_changes_nothing(use_reentrant):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Sparseout(0.5, 1.0), nn.Linear(8, 1)).cuda()
    results = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        torch.manual_seed(4)
        x = torch.linspace(-1, 1, 80, device="cuda").view(10, 8).requires_grad_()
        run(x).sum().backward()
        results.append(x.grad)
    assert torch.equal(*results)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_for_the_device():
    x = torch.randn(1000, device="cuda", requires_grad=True)
    q = torch.tensor(1.5, device="cuda")
    layers = [Sparseout(0.5, q, scale=scale) for scale in (None, 0.5, "matched")] + [Sparseout(0.5, 1.3)]
    for layer in layers:
        torch.autograd.grad(layer(x).sum(), x)  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        for layer in layers:
            q.mul_(1.01)
            torch.autograd.grad(layer(x).sum(), x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shared_dims", [[], [0]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, shared_dims):
    x, seed = torch.randn(30, 8, device="cuda").to(dtype).requires_grad_(), torch.tensor(3, device="cuda")
    curve = torch.tensor([1.3, 2.0, 0.5], device="cuda")
    for arguments in (([1.3, 1.0, 1.0], None), ([], curve)):
        opcheck(torch.ops.sparseout.forward.default, (x, seed, 0.3, *arguments, shared_dims, False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_keeps_the_input_and_no_pass_takes_more_than_its_result(dtype):
    x = torch.randn(1 << 24, device="cuda").to(dtype).requires_grad_()
    grad = torch.ones_like(x)
    size = x.numel() * x.itemsize
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = sparseout(x, 0.5, 1.5)
        assert torch.cuda.memory_allocated() - before < 1.01 * size
        torch.autograd.grad(y, x, grad)
        assert torch.cuda.max_memory_allocated() - before < 2.01 * size
        del y


@pytest.mark.parametrize("n", [2**31 + 4100, 2**32 + 4100])
def test_positions_beyond_32_bits(n):
    if torch.cuda.mem_get_info()[0] < 5 * n:
        pytest.skip(f"needs {5 * n / 2**30:.0f} GiB of GPU memory")
    x = torch.ones(n, device="cuda", dtype=torch.bfloat16)
    for place in (2**31 + 1, n - 1):
        x[place] = 2.0
        assert backends.kernels(x.device).matched(x, 6.0).scale_unit == 2
        x[place] = 1.0
    y = sparseout(x, 0.5, 1.0, seed=3)
    for start in (0, 2**31 - 4096, n - 4100):
        xi = masks.noise(masks.key(3), 0.5, torch.float32, start, 4100)
        assert torch.equal(y[start : start + 4100].cpu() > 1, xi > 0)


@pytest.mark.parametrize(("dtype", "dims"), [(torch.float64, ()), (torch.float32, (0, 2, 4))])
def test_what_the_kernel_does_not_do_torch_does(dtype, dims):
    def f(x):
        return sparseout(x, 0.3, 1.5, shared_dims=dims, seed=5)

    x = torch.randn(2, 3, 2, 3, 2, 3, dtype=dtype)
    for ours, theirs in zip(value_and_gradient(f, x.cuda()), value_and_gradient(f, x), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs)
