"""Inputs of any strides, for every path that they may take: eager, ops called as such, compiled, exported, traced."""

import itertools

import pytest
import torch
from interpreter import DEVICE, launchers
from layouts import fresh, layouts, strides
from torch import nn
from torch.export import Dim, export

from sparseout import Sparseout, Sparseout1d, Sparseout2d, Sparseout3d, sparseout
from sparseout.kernels import backends
from sparseout.kernels.params import NoiseArguments

SEED = torch.tensor(5)
SETTINGS = [
    {"q": 1.5},
    {"q": 1.0, "gradient": "exact"},
    {"q": 1.5, "scale": "matched"},
    {"q": torch.tensor(1.3), "gradient": "exact", "scale": "matched"},
    {"q": torch.tensor(1.3), "scale": 0.5},
    {"q": 0.1, "scale": 0.5},
]
LAYERS = {Sparseout: (4, 5), Sparseout1d: (3, 4, 5), Sparseout2d: (6, 3, 4, 5), Sparseout3d: (6, 3, 4, 5, 2)}


def value_and_gradient(f, x):
    leaf = fresh(x)
    y = f(leaf)
    upstream = torch.linspace(-1, 1, y.numel()).view(y.shape)
    return y.detach(), torch.autograd.grad(y, leaf, upstream)[0]


def assert_same(f, g, x, exactly=True):
    for a, b in zip(value_and_gradient(f, x), value_and_gradient(g, x), strict=True):
        torch.testing.assert_close(a, b, **({"rtol": 0, "atol": 0} if exactly else {}))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_result_lies_as_torchs_do_and_the_mask_follows_its_memory(dtype, settings):
    def f(x):
        return sparseout(x, 0.4, seed=SEED, shared_dims=(2,), **settings)

    for _, x in layouts(3, 4, 5, dtype=dtype):
        order = sorted(range(3), key=torch.empty_like(x).stride, reverse=True)

        def by_hand(x, order=order):
            y = sparseout(x.permute(order).contiguous(), 0.4, seed=SEED, shared_dims=(order.index(2),), **settings)
            return y.permute([order.index(dim) for dim in range(3)])

        assert_same(f, by_hand, x)
        assert strides(f(x)) == strides(torch.empty_like(x))


@pytest.mark.parametrize("params", [([1.3, 1.0, 1.0], None), ([], torch.tensor([1.3, 2.0, 0.5]))])
def test_the_ops_take_what_they_are_given(params):
    for (_, x), (_, grad) in itertools.product(layouts(2, 3, 4, 5), list(layouts(2, 3, 4, 5))[:4]):
        order = sorted(range(4), key=torch.empty_like(x).stride, reverse=True)
        inverse = [order.index(dim) for dim in range(4)]
        dense, dims = x.permute(order).contiguous(), [order.index(1)]
        results = [torch.ops.sparseout.forward(x, SEED, 0.3, *params, [1], False)]
        results += [torch.ops.sparseout.backward(grad, x, SEED, 0.3, *params, [1], True)]
        expected = [torch.ops.sparseout.forward(dense, SEED, 0.3, *params, dims, False)]
        expected += [torch.ops.sparseout.backward(grad.permute(order), dense, SEED, 0.3, *params, dims, True)]
        if params[0]:
            results += [torch.ops.sparseout.slope(x, SEED, 0.3, params[0], [1])]
            expected += [torch.ops.sparseout.slope(dense, SEED, 0.3, params[0], dims)]
        for a, b in zip(results, expected, strict=True):
            assert torch.equal(a, b.permute(inverse))
            assert strides(a) == strides(torch.empty_like(x))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on which Triton's interpreter computes
def test_the_kernel_reads_and_writes_nothing_else(monkeypatch):
    pytest.importorskip("triton")
    with launchers() as module:
        plain = []
        for kernels in (None, module):
            monkeypatch.setattr(backends, "kernels", lambda device, kernels=kernels: kernels)
            torch.manual_seed(1)
            results = []
            for _, x in layouts(4, 6, 8):
                leaf = fresh(x.to(DEVICE))
                y = torch.ops.sparseout.forward(leaf, SEED.to(DEVICE), 0.3, [1.5, 1.0, 1.0], None, [1], False)
                results += [
                    y,
                    torch.autograd.grad(y, leaf, leaf.detach().transpose(0, 1).contiguous().transpose(0, 1))[0],
                ]
            plain = plain or results
        for a, b in zip(results, plain, strict=True):
            torch.testing.assert_close(a, b)
        for _, x in layouts(4, 6, 8):  # called as such
            noise = NoiseArguments(SEED.to(DEVICE), 0.3, [1.5, 1.0, 1.0], None, (), False)
            y = module.launch(None, x.to(DEVICE), noise)
            expected = module.launch(None, x.contiguous().to(DEVICE), noise)
            assert torch.equal(y, expected)


def test_a_tensor_that_is_negated_lazily():
    x = torch.randn(4, 5, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    assert_same(lambda x: sparseout(x, 0.5, 1.0, seed=1), lambda x: sparseout(x.clone(), 0.5, 1.0, seed=1), x)


def compiled_equals_eager(layer_type, settings, x, dynamic):
    layer = layer_type(0.4, seed=SEED, **settings)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic == "all", backend="aot_eager")
    if dynamic == "batch":
        torch._dynamo.mark_dynamic(x, 0)
    torch.compiler.reset()
    scale, tensor_q = settings.get("scale"), isinstance(settings["q"], torch.Tensor)
    beta_is_rounded = scale == "matched" or (scale is not None and tensor_q)
    assert_same(layer, compiled, x, exactly=not beta_is_rounded)
    assert strides(layer(x)) == strides(compiled(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer_type", "memory", "setting", "dynamic"),
    [
        (Sparseout, "reversed", 0, "all"),
        (Sparseout, "expanded", 3, "all"),
        (Sparseout1d, "a part of a transposed", 3, "all"),
        (Sparseout2d, "channels_last", 0, "all"),
        (Sparseout2d, "channels_last", 2, "batch"),
        (Sparseout3d, "channels_last", 3, "all"),
    ],
)
def test_compiled_with_symbols_for_sizes(layer_type, memory, setting, dynamic):
    x = dict(layouts(*LAYERS[layer_type]))[memory]
    compiled_equals_eager(layer_type, SETTINGS[setting], x, dynamic)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", ["none", "batch", "all"])
@pytest.mark.parametrize("setting", range(len(SETTINGS)))
def test_compiled_in_every_memory(setting, dynamic):
    """Layers differ in the number of their dims alone, so each of them takes every fourth combination."""
    at = setting + ["none", "batch", "all"].index(dynamic)
    for count, name in enumerate(dict(layouts(*LAYERS[Sparseout3d]))):
        layer_type = [*LAYERS][2:][(at + count) % 2] if name == "channels_last" else [*LAYERS][(at + count) % 4]
        if dynamic != "batch" or name != "expanded":  # its batch is one row
            x = dict(layouts(*LAYERS[layer_type]))[name]
            compiled_equals_eager(layer_type, SETTINGS[setting], x, dynamic)


class Selecting(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, mask):
        return self.layer(x[mask].transpose(1, 2)) * 1


@pytest.mark.parametrize("settings", SETTINGS[1:4])
@pytest.mark.slow
def test_compiled_and_exported_with_rows_that_depend_on_data(settings):
    model = Selecting(Sparseout(0.4, seed=SEED, **settings))
    x, masks = torch.randn(7, 3, 5), [torch.arange(7) % 3 > 0, torch.zeros(7).bool(), torch.ones(7).bool()]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for mask in masks:
            assert_same(lambda x, mask=mask: model(x, mask), lambda x, mask=mask: compiled(x, mask), x, False)
    program = export(model, (x, masks[0]), strict=True).module()
    for mask in masks:
        torch.testing.assert_close(program(x, mask), model(x, mask))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("layer_type", "dynamic"), [(Sparseout, (0, 1)), (Sparseout1d, (2,)), (Sparseout2d, (2, 3)), (Sparseout3d, (0, 3))]
)
def test_an_exported_program_takes_other_sizes_and_strides(layer_type, dynamic, strict):
    model = nn.Sequential(layer_type(0.4, 1.5, scale="matched" if strict else None, seed=SEED))
    shape = LAYERS[layer_type]
    sizes = {dim: Dim(f"size{dim}") for dim in dynamic}
    program = export(model, (torch.randn(shape),), dynamic_shapes=(sizes,), strict=strict).module()
    for _, x in layouts(*(3 * size if dim in dynamic else size for dim, size in enumerate(shape))):
        torch.testing.assert_close(program(x), model(x))


def test_an_exported_program_runs_on_a_transposed_input():
    model = nn.Sequential(Sparseout(0.5, 1.0))
    program = export(model, (torch.ones(2, 8),), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},)).module()
    assert set(program(torch.ones(512, 1024).t()).unique().tolist()) == {0.0, 2.0}


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_transforms_inside_compiled_code(dynamic):
    def f(x, seed):
        loss = lambda x, seed: sparseout(x, 0.5, 1.5, scale="matched", seed=seed).square().sum()  # noqa: E731
        return torch.func.vmap(torch.func.grad(loss))(x, seed)

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    x, seed = torch.randn(3, 5, 4).transpose(1, 2), torch.arange(3)
    torch.testing.assert_close(compiled(x, seed), f(x, seed))


# Tracers


@pytest.mark.filterwarnings("ignore:Output nr 1. of the traced function:torch.jit.TracerWarning")  # Dropout's as well
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_trace_in_training_draws_anew_and_has_the_gradient(settings, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), Sparseout(0.5, **settings))
    traced = torch.jit.trace(model, torch.ones(3, 4))
    torch.jit.save(traced, tmp_path / "traced.pt")
    x = torch.randn(9, 4)
    for program in (traced, torch.jit.load(tmp_path / "traced.pt")):
        assert not torch.equal(program(x), program(x))

        def seeded(x, f):
            torch.manual_seed(3)
            return f(x)

        assert_same(lambda x: seeded(x, model), lambda x, program=program: seeded(x, program), x, False)
        with torch.no_grad():
            torch.testing.assert_close(seeded(x, program), seeded(x, model))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("scale", [None, "matched"])
def test_make_fx(mode, scale):
    def f(x):
        leaf = x.detach().requires_grad_()
        y = sparseout(leaf, 0.5, 1.5, scale=scale, seed=3)
        return y.detach(), torch.autograd.grad(y.sum(), leaf)[0]

    x = torch.randn(5, 4).t()
    program = torch.fx.experimental.proxy_tensor.make_fx(f, tracing_mode=mode)(x)
    torch.testing.assert_close(program(x), f(x))
