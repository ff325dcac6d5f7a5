"""The masks of the function: seeds, shapes, shared dims, memory formats, and what is kept for backward."""

import importlib.util
import itertools
import math
import threading

import pytest
import torch
from slopes import DTYPES, value_and_gradient
from torch._subclasses.fake_tensor import FakeTensorMode

from sparseout import backend, sparseout
from sparseout.kernels import seeds

# Seeds


def noise_of(n=1000, **kwargs):
    return sparseout(torch.ones(n), 0.5, 1.0, **kwargs)


def test_seed_repeats_and_the_default_does_not():
    assert torch.equal(noise_of(seed=7), noise_of(seed=7))
    assert torch.equal(noise_of(seed=7), noise_of(seed=torch.tensor(7)))
    assert not torch.equal(noise_of(), noise_of())
    torch.manual_seed(1)
    first = noise_of(), noise_of()
    torch.manual_seed(1)
    second = noise_of(), noise_of()
    assert all(map(torch.equal, first, second))


def test_explicit_seed_leaves_the_generator_alone():
    state = torch.get_rng_state()
    noise_of(seed=7)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("other", [8, 7 + 2**32, 7 + 2**62, -7, 7 - 2**63])
def test_different_seeds_differ(other):
    agreement = (noise_of(seed=7) == noise_of(seed=other)).float().mean().item()
    assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(1000)


def test_drawn_seeds_use_all_64_bits():
    drawn = [seeds.number(None) for _ in range(500)]
    assert len(set(drawn)) == 500
    for bit in range(64):
        ones = sum((seed >> bit) & 1 for seed in drawn)
        assert abs(ones - 250) < 5 * 0.5 * math.sqrt(500)


@pytest.mark.parametrize("seed", [None, 7, -7, 2**64 - 1, torch.tensor(-(2**63))])
def test_a_seed_as_a_number_is_that_as_a_tensor(seed):
    def three(make):
        torch.manual_seed(4)
        return [make() for _ in range(3)], torch.rand(2).tolist()

    assert three(lambda: seeds.number(seed)) == three(lambda: seeds.tensor(seed, torch.device("cpu")).item())


def test_a_thread_that_begins_in_inference_mode_draws_outside_too():
    drawn = []

    def draw():
        with torch.inference_mode():
            drawn.append(seeds.number(None))
        drawn.append(seeds.number(None))

    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()
    assert len(set(drawn)) == 2


def test_seeds_wrap_at_64_bits():
    assert torch.equal(noise_of(seed=2**64 - 1), noise_of(seed=-1))
    assert torch.equal(noise_of(seed=2**63), noise_of(seed=-(2**63)))


@pytest.mark.parametrize("q", [0.5, 1.5, 3.0])
def test_the_mask_does_not_depend_on_q_dtype_or_gradient(q):
    x = torch.ones(500)
    mask = sparseout(x, 0.3, 1.0, seed=6) > 1
    for dtype, gradient in itertools.product(DTYPES, ("detached", "exact")):
        assert torch.equal(sparseout(x.to(dtype), 0.3, q, gradient=gradient, seed=6) > 1, mask)


# Shapes and layouts


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 0, 2), (13, 17), (2, 3, 5, 7)])
@pytest.mark.parametrize("q", [1.0, 2.0, 3.0])
def test_shapes(shape, q):
    y, slope = value_and_gradient(torch.randn(shape), 0.5, q)
    assert y.shape == slope.shape == shape


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((2, 3, 4, 5), torch.channels_last), ((2, 3, 4, 5, 6), torch.channels_last_3d)],
)
@pytest.mark.parametrize("crop", [False, True])
def test_memory_format_is_kept_and_the_mask_follows_memory(shape, memory_format, crop):
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    if crop:
        x = x[..., 1:]
    y, slope = value_and_gradient(x, 0.5, 1.0, seed=3)
    assert y.is_contiguous(memory_format=memory_format)
    assert slope.is_contiguous(memory_format=memory_format)
    in_memory_order = x.movedim(1, -1).contiguous()
    expected, expected_slope = value_and_gradient(in_memory_order, 0.5, 1.0, seed=3)
    assert torch.equal(y, expected.movedim(-1, 1))
    assert torch.equal(slope, expected_slope.movedim(-1, 1))


def test_expanded_input_gets_a_draw_for_each_element():
    x = torch.ones(1, 50).expand(40, 50)
    y = sparseout(x, 0.5, 1.0, seed=0)
    assert torch.equal(y, sparseout(x.contiguous(), 0.5, 1.0, seed=0))
    assert y.std(dim=0).min() > 0.5


@pytest.mark.parametrize("gradient", ["detached", "exact"])
def test_gradient_of_other_strides_gives_the_same_result(gradient):
    x = torch.randn(4, 6, 5, 3)
    upstream = torch.randn(4, 6, 5, 3)
    _, expected = value_and_gradient(x, 0.5, 1.0, gradient=gradient, seed=3, upstream=upstream)
    other = upstream.contiguous(memory_format=torch.channels_last)
    _, slope = value_and_gradient(x, 0.5, 1.0, gradient=gradient, seed=3, upstream=other)
    assert torch.equal(slope, expected)
    constant = torch.ones(()).expand(4, 6, 5, 3)
    _, slope = value_and_gradient(x, 0.5, 1.0, gradient=gradient, seed=3, upstream=constant)
    assert torch.equal(slope, value_and_gradient(x, 0.5, 1.0, gradient=gradient, seed=3)[1])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dims", [(0,), (2, 3), (1, 2, 3), (-1,), [0, 1], (0, 1, 2, 3)])
def test_shared_dims_share_one_draw(dims, memory_format):
    x = torch.ones(20, 30, 4, 5).contiguous(memory_format=memory_format)
    for q in (1.0, 2.0):
        y, slope = value_and_gradient(x, 0.3, q, shared_dims=dims, seed=2)
        for result in (y, slope):
            assert result.is_contiguous(memory_format=memory_format)
            first = result
            for dim in dims:
                first = first.narrow(dim, 0, 1)
            assert torch.equal(result, first.expand_as(result))
        rates = (first < 0.5).float()
        assert abs(rates.mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / rates.numel())


def test_locked_mask_draws_for_batch_and_feature():
    y = sparseout(torch.ones(9, 40, 50), 0.5, 1.5, shared_dims=(0,), seed=0)
    assert torch.equal(y[0], y[8])
    assert y[0].std(dim=0).min() > 0
    assert y[0].std(dim=1).min() > 0


# In place


@pytest.mark.parametrize("gradient", ["detached", "exact"])
@pytest.mark.parametrize("q", [1.0, 2.0, torch.tensor(1.5)])
def test_inplace_overwrites_and_differentiates_right(q, gradient):
    x = torch.randn(4, 5)
    expected, expected_slope = value_and_gradient(x, 0.5, q, gradient=gradient, seed=2)
    leaf = x.clone().requires_grad_()
    middle = leaf * 1
    y = sparseout(middle, 0.5, q, inplace=True, gradient=gradient, seed=2)
    assert y is middle
    assert torch.equal(middle, expected)
    (slope,) = torch.autograd.grad(y.sum(), leaf)
    assert torch.equal(slope, expected_slope)
    assert sparseout(x, 0.5, q, inplace=True, seed=2) is x
    torch.testing.assert_close(x, expected)  # without a gradient it may be computed another way


@pytest.mark.parametrize("q", [1.0, 2.0])
def test_inplace_refuses_what_torch_refuses(q):
    with pytest.raises(RuntimeError, match="leaf Variable"):
        sparseout(torch.ones(3, requires_grad=True), 0.5, q, inplace=True)
    with pytest.raises(RuntimeError, match="single memory location"):
        sparseout(torch.ones(1).expand(3), 0.5, q, inplace=True)


# What is kept


@pytest.mark.parametrize("scale", [None, 2.0, "matched"])
@pytest.mark.parametrize("q", [1.0, torch.tensor(1.5)])
@pytest.mark.parametrize(
    ("gradient", "dtype", "own"),
    [
        ("detached", torch.float32, True),  # the slope of a small input, as large as the mask of `F.dropout`
        ("exact", torch.float32, False),
        ("detached", torch.bfloat16, False),
    ],
)
def test_backward_keeps_one_tensor_and_a_few_scalars(gradient, dtype, own, q, scale):
    x = torch.randn(1000).to(dtype).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sparseout(x, 0.5, q, scale=scale, gradient=gradient)
    (large,) = (t for t in kept if t.numel() > 3)
    assert large.numel() == x.numel()
    assert large.dtype == dtype
    kernel = backend("cpu").name == "native"  # without it a tensor among q and scale stays one
    own = own and (kernel or not (isinstance(q, torch.Tensor) or scale == "matched"))
    assert (large.data_ptr() != x.data_ptr()) == own


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradient", ["detached", "exact"])
@pytest.mark.parametrize("scale", [None, 0.3, "matched"])
@pytest.mark.parametrize("q", [0.0, 0.3, 1.0, 1.3, 2.0, 3.0, 6.0, torch.tensor(1.5)])
def test_values_are_the_same_bits_with_gradients_and_without(q, scale, gradient, dtype):
    info = torch.finfo(dtype)
    special = torch.tensor([0.0, info.tiny * info.eps, info.tiny, info.max, math.inf, -math.inf, math.nan]).to(dtype)
    for size in (600, 20000):  # of the slope and of the input that is kept
        x = torch.randn(size).mul(3).to(dtype)
        if size == 600 and scale != "matched":
            x[:70] = special.repeat(10)
        y = sparseout(x, 0.3, q, scale=scale, gradient=gradient, seed=3)
        with_gradients = sparseout(x.clone().requires_grad_(), 0.3, q, scale=scale, gradient=gradient, seed=3).detach()
        torch.testing.assert_close(with_gradients, y, rtol=0, atol=0, equal_nan=True)


def test_seeds_can_be_drawn_where_it_was_imported_under_a_mode():
    spec = importlib.util.find_spec("sparseout.kernels.seeds")
    module = importlib.util.module_from_spec(spec)
    with FakeTensorMode():
        spec.loader.exec_module(module)
    torch.manual_seed(3)
    drawn = module.number(None)
    torch.manual_seed(3)
    assert drawn == module.tensor(None, torch.device("cpu")).item()
