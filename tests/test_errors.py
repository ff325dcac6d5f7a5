"""One sentence for every bad argument: its name, what was expected, what came; for function and layer alike."""

import numpy as np
import pytest
import torch
from torch import nn

import sparseout

NAN, INF = float("nan"), float("inf")

P = "expected `p` to be a number between 0 and 1, but got "
Q = "expected `q` to be a finite number >= 0, but got "
Q_TYPE = "expected `q` to be a number or a 0-d floating-point tensor, but got "
SCALE = "expected `scale` to be a finite number > 0, but got "
SCALE_RANGE = "expected `scale` to be a number from 1e-37 to 1e37, which fp32 can divide by, but got "
SCALE_TYPE = "expected `scale` to be None, a number > 0 or 'matched', but got "
GRADIENT = "expected `gradient` to be 'detached' or 'exact', but got "
SEED = "expected `seed` to be None, an int or a 0-d int64 tensor, but got "
DIMS = "expected `shared_dims` to be a sequence of different ints, but got "

BAD = [
    ({"p": -0.1}, ValueError, P + "-0.1"),
    ({"p": 1.1}, ValueError, P + "1.1"),
    ({"p": NAN}, ValueError, P + "nan"),
    ({"p": INF}, ValueError, P + "inf"),
    ({"p": True}, TypeError, P + "True"),
    ({"p": False}, TypeError, P + "False"),
    ({"p": "0.5"}, TypeError, P + "'0.5'"),
    ({"p": None}, TypeError, P + "None"),
    ({"p": torch.tensor(1)}, TypeError, Q_TYPE.replace("`q`", "`p`") + "a tensor of shape () and torch.int64"),
    ({"p": 0.5j}, TypeError, P + "a complex"),
    ({"q": -1.0}, ValueError, Q + "-1.0"),
    ({"q": NAN}, ValueError, Q + "nan"),
    ({"q": INF}, ValueError, Q + "inf"),
    ({"q": True}, TypeError, Q_TYPE + "True"),
    ({"q": np.True_}, TypeError, Q_TYPE + "a bool"),
    ({"q": "2"}, TypeError, Q_TYPE + "'2'"),
    ({"q": [2.0]}, TypeError, Q_TYPE + "a list"),
    ({"q": torch.ones(1)}, TypeError, Q_TYPE + "a tensor of shape (1,) and torch.float32"),
    ({"q": torch.tensor(2)}, TypeError, Q_TYPE + "a tensor of shape () and torch.int64"),
    (
        {"q": torch.tensor(1.5, requires_grad=True)},
        ValueError,
        "expected `q` to be a tensor without gradient, but got one that requires it",
    ),
    ({"inplace": "matched"}, TypeError, "expected `inplace` to be a bool, but got 'matched'"),
    ({"gradient": "Exact"}, ValueError, GRADIENT + "'Exact'"),
    ({"gradient": None}, ValueError, GRADIENT + "None"),
    ({"gradient": np.array([0, 1])}, ValueError, GRADIENT + "array([0, 1])"),
    ({"scale": 0.0}, ValueError, SCALE + "0.0"),
    ({"scale": -1}, ValueError, SCALE + "-1"),
    ({"scale": NAN}, ValueError, SCALE + "nan"),
    ({"scale": INF}, ValueError, SCALE + "inf"),
    ({"scale": 1e-46}, ValueError, SCALE_RANGE + "1e-46"),
    ({"scale": 1e38}, ValueError, SCALE_RANGE + "1e+38"),
    ({"scale": "match"}, ValueError, SCALE_TYPE + "'match'"),
    ({"scale": True}, TypeError, SCALE_TYPE + "True"),
    ({"scale": torch.tensor(1.0)}, TypeError, SCALE_TYPE + "a Tensor"),
    ({"seed": 1.5}, TypeError, SEED + "a float"),
    ({"seed": True}, TypeError, SEED + "True"),
    ({"seed": torch.tensor(1.0)}, TypeError, SEED + "a tensor of shape () and torch.float32"),
    ({"seed": torch.ones(2, dtype=torch.int64)}, TypeError, SEED + "a tensor of shape (2,) and torch.int64"),
    ({"seed": 2**64}, ValueError, f"expected `seed` to be an integer of 64 bits, but got {2**64}"),
    ({"shared_dims": 2}, TypeError, DIMS + "an int"),
    ({"shared_dims": None}, TypeError, DIMS + "None"),
    ({"shared_dims": np.array([0, 1])}, TypeError, DIMS + "a ndarray"),
    ({"shared_dims": (0, 1.0)}, TypeError, DIMS + "one with a float in it"),
    ({"shared_dims": (True,)}, TypeError, DIMS + "one with True in it"),
    ({"shared_dims": (0, 0)}, ValueError, DIMS + "(0, 0)"),
]


@pytest.mark.parametrize(("arguments", "error", "sentence"), BAD)
@pytest.mark.parametrize("training", [True, False])
def test_function(arguments, error, sentence, training):
    x = torch.ones(2, 3, 4, 5)
    with pytest.raises(error) as caught:
        sparseout.sparseout(x, training=training, **arguments)
    assert str(caught.value) == sentence
    assert torch.equal(x, torch.ones_like(x))


@pytest.mark.parametrize(("arguments", "error", "sentence"), BAD)
def test_layers_when_built(arguments, error, sentence):
    layers = [sparseout.Sparseout]
    if "shared_dims" not in arguments:
        layers += [sparseout.Sparseout1d, sparseout.Sparseout2d, sparseout.Sparseout3d]
    for layer in layers:
        with pytest.raises(error) as caught:
            layer(**arguments)
        assert str(caught.value) == sentence


def test_a_layer_changed_to_nonsense_says_so():
    layer = sparseout.Sparseout(0.5, 1.0)
    layer.q = -1.0
    with pytest.raises(ValueError, match=r"expected `q` to be a finite number >= 0, but got -1\.0"):
        layer(torch.ones(3))


FLOATING = "expected `input` to be a floating-point tensor (fp64, fp32, bf16 or fp16), but got "


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("q", [1.0, 2.0])
def test_inputs_of_other_dtypes(dtype, q):
    with pytest.raises(TypeError) as caught:
        sparseout.sparseout(torch.ones(3).to(dtype), 0.5, q)
    assert str(caught.value) == FLOATING + str(dtype)


@pytest.mark.parametrize(
    ("value", "shown"), [([1.0], "a list"), (np.ones(3), "a ndarray"), (None, "None"), (nn.ReLU(), "a ReLU")]
)
@pytest.mark.parametrize("training", [True, False])
def test_inputs_that_are_no_tensors(value, shown, training):
    sentence = "expected `input` to be a tensor, but got " + shown
    for f in (
        sparseout.sparseout,
        sparseout.Sparseout().train(training),
        sparseout.Sparseout2d().train(training),
    ):
        with pytest.raises(TypeError) as caught:
            f(value)
        assert str(caught.value) == sentence


@pytest.mark.parametrize("training", [True, False])
def test_dims_out_of_range_or_the_same(training):
    x = torch.ones(2, 3)
    for dims, sentence in (
        ((2,), "expected `shared_dims` to be dims of a 2-d input, but got (2,)"),
        ((-3,), "expected `shared_dims` to be dims of a 2-d input, but got (-3,)"),
        ((0, -2), "expected `shared_dims` to be different dims of a 2-d input, but got (0, -2)"),
    ):
        with pytest.raises(ValueError, match=r"shared_dims") as caught:
            sparseout.sparseout(x, 0.5, 1.0, training, shared_dims=dims)
        assert str(caught.value) == sentence


@pytest.mark.filterwarnings("ignore:dropout.d. Received")
@pytest.mark.parametrize("q", [1.0, 2.0])
@pytest.mark.parametrize(
    ("layer", "shape", "wanted"),
    [
        (sparseout.Sparseout1d, (2,), "of shape (N, C, L) or (C, L)"),
        (sparseout.Sparseout1d, (2, 3, 4, 5), "of shape (N, C, L) or (C, L)"),
        (sparseout.Sparseout2d, (2,), "of 2 dims or more"),
        (sparseout.Sparseout3d, (), "of 1 dims or more"),
    ],
)
def test_channel_layers_name_the_shapes_they_take(layer, shape, wanted, q):
    with pytest.raises(ValueError, match="expected `input`") as caught:
        layer(0.5, q)(torch.ones(shape))
    assert str(caught.value) == f"expected `input` to be {wanted}, but got shape {shape}"


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_layouts_are_named(layout):
    with pytest.raises(TypeError) as caught:
        sparseout.sparseout(torch.eye(3).to_sparse(layout=layout), 0.5, 1.0)
    assert str(caught.value) == f"expected `input` to be a dense or a nested tensor, but got one of layout {layout}"


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.int64(1), 1])
def test_numbers_of_other_libraries_are_numbers(number):
    expected = sparseout.sparseout(torch.ones(50), 0.5, float(number), seed=1)
    assert torch.equal(sparseout.sparseout(torch.ones(50), 0.5, number, seed=1), expected)
    assert torch.equal(sparseout.Sparseout(0.5, number, seed=1)(torch.ones(50)), expected)
