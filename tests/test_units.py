"""Where the units of an activation lie: as given, or as the module that made it put them."""

import copy

import pytest
import torch
from torch import nn
from tracked import hooks

from conftest import needs_compiler
from sparseout import Sparseout2d
from sparseout._utils.activations import UnitTracker, counted_rows


class Step(nn.Module):
    """A step between a producer and the activation that is no module of torch's."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def dim_at_the_end(*modules, x, given=None, act=None):
    """Where the units at an activation after these modules lie, from the end, and its shape."""
    model = nn.Sequential(*modules, act or nn.ReLU())
    tracker, seen = UnitTracker(model, given), []
    tracker.attach()
    name = str(len(modules))
    model[-1].register_forward_hook(
        lambda module, args, out: seen.append((tracker.dim(name, module, out), tuple(out.shape)))
    )
    model(x)
    tracker.detach()
    assert not any(isinstance(module, (nn.Linear, nn.Conv2d)) and module._forward_hooks for module in model.modules())
    ((dim, shape),) = seen
    return dim - len(shape), shape


MAP = (2, 5, 6, 8)  # dims of different length


@pytest.mark.parametrize(
    ("modules", "shape", "dim"),
    [
        ([nn.Linear(8, 7)], (2, 5, 5, 8), -1),
        ([nn.Linear(8, 7)], (2, 5, 5, 5, 8), -1),
        ([nn.Linear(8, 7), nn.GELU(), nn.Dropout(0.5), nn.Identity()], MAP, -1),
        ([nn.LayerNorm(8)], MAP, -1),
        ([nn.RMSNorm(8)], MAP, -1),
        ([nn.Linear(8, 8), nn.LayerNorm((5, 6, 8))], MAP, -1),  # over several dims: units stay where they were
        ([nn.Conv2d(5, 4, 1), nn.LayerNorm((4, 6, 8))], MAP, -3),
        ([nn.Conv1d(5, 4, 1)], (2, 5, 6), -2),
        ([nn.Conv2d(5, 4, 1)], MAP, -3),
        ([nn.Conv2d(5, 4, 1)], (5, 6, 8), -3),  # without a batch
        ([nn.Conv3d(5, 4, 1)], (2, 5, 3, 6, 8), -4),
        ([nn.ConvTranspose1d(5, 4, 1)], (2, 5, 6), -2),
        ([nn.BatchNorm1d(5)], (2, 5, 6), -2),
        ([nn.BatchNorm1d(5)], (2, 5), -1),
        ([nn.BatchNorm2d(5)], MAP, -3),
        ([nn.InstanceNorm1d(5)], (2, 5, 6), -2),
        ([nn.GroupNorm(1, 5)], (2, 5, 6), -2),
        ([nn.LSTM(8, 7), Step(lambda out: out[0])], (4, 5, 8), -1),
        ([nn.GRU(8, 7, bidirectional=True), Step(lambda out: out[0])], (4, 5, 8), -1),
        ([nn.Conv2d(5, 16, 1), nn.PixelShuffle(2)], (2, 5, 8, 8), -3),
        ([nn.Linear(8, 96), nn.Unflatten(1, (3, 4, 8))], (2, 8), -3),
        # the last producer is meant
        ([nn.Conv2d(5, 4, 1), Step(lambda x: x.permute(0, 2, 3, 1)), nn.Linear(4, 3)], MAP, -1),
        ([nn.Linear(8, 3), Step(lambda x: x.permute(0, 3, 1, 2)), nn.Conv2d(3, 4, 1)], MAP, -3),
        # permuted since
        ([nn.Linear(8, 7), Step(lambda x: x.permute(0, 3, 1, 2))], MAP, -3),
        ([nn.Linear(8, 7), Step(lambda x: x.transpose(1, 2))], (2, 5, 8), -2),
        ([nn.Conv2d(5, 4, 1), Step(lambda x: x.permute(0, 2, 3, 1).contiguous())], MAP, -1),
        ([nn.Linear(8, 8), Step(lambda x: x.transpose(1, 2))], (2, 8, 8), -2),  # told by strides alone
        ([nn.Conv2d(8, 8, 1), Step(lambda x: x.permute(0, 2, 3, 1))], (2, 8, 8, 8), -1),
        ([nn.Linear(8, 8), Step(torch.t)], (8, 8), -2),
        # reshaped since
        ([nn.Linear(8, 7), Step(lambda x: x.unflatten(1, (2, 3)))], (2, 6, 8), -1),  # windows
        ([nn.Linear(8, 7), Step(lambda x: x.flatten(0, 1))], (2, 6, 8), -1),
        ([nn.Conv2d(5, 4, 1), Step(lambda x: x.flatten(2))], MAP, -2),  # patches
        ([nn.Conv2d(5, 4, 1), Step(lambda x: x.flatten(2).transpose(1, 2))], MAP, -1),
        ([nn.Conv2d(5, 4, 1), nn.Flatten()], MAP, -1),
        ([nn.Conv2d(5, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()], MAP, -1),
        ([nn.Conv2d(5, 4, 1), nn.MaxPool2d(2)], MAP, -3),
        ([nn.Conv2d(5, 4, 1), Step(lambda x: x.to(memory_format=torch.channels_last))], MAP, -3),
        ([nn.Linear(8, 6), nn.GLU()], MAP, -1),
        ([nn.Conv2d(5, 4, 1), nn.GLU(1)], MAP, -3),
        ([nn.Conv2d(5, 4, 1), nn.MaxPool2d(2), Step(lambda x: x.permute(0, 2, 3, 1))], (2, 5, 4, 6), -1),
        ([nn.Linear(8, 7), Step(lambda x: x.view(2, 7, 6, 7))], (2, 42, 8), -1),  # as high and wide as it has units
        # of an attention, (batch, heads, queries, keys), no dim has units: heads, whatever the number of keys
        ([nn.Linear(8, 8), Step(lambda x: torch.rand(2, 4, 6, 6))], (2, 6, 8), -3),
        ([nn.Linear(8, 8), Step(lambda x: torch.rand(2, 4, 8, 8))], (2, 8, 8), -3),
        ([nn.Linear(8, 5 * 12), Step(lambda x: x.view(2, 5, 3, 4))], (2, 8), -3),  # a decoder's first map
        # nobody knows
        ([], MAP, -3),
        ([], (2, 3, 5, 6, 8), -4),
        ([], (2, 5, 6), -1),
    ],
)
def test_units_are_where_the_last_producer_put_them(modules, shape, dim):
    assert dim_at_the_end(*modules, x=torch.randn(shape))[0] == dim


def test_embeddings_put_units_last():
    assert dim_at_the_end(nn.Embedding(9, 4), x=torch.randint(9, (2, 3, 5)))[0] == -1


class ChannelNorm(nn.LayerNorm):
    """A layer norm of channels, as ConvNeXt has it."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_a_subclass_may_put_them_elsewhere():
    assert dim_at_the_end(ChannelNorm(5), x=torch.randn(MAP))[0] == -3


def test_a_channel_layer_says_it_itself():
    assert dim_at_the_end(nn.Linear(8, 7), x=torch.randn(MAP), act=Sparseout2d())[0] == -3


@pytest.mark.parametrize(
    ("given", "dim"),
    [
        (2, -2),
        ({"1": 1}, -3),
        ({nn.ReLU: 2}, -2),
        ({nn.Module: 2, nn.ReLU: 1}, -3),  # the nearest class
        ({"1": 1, nn.ReLU: 2}, -3),  # a name before a type
        ({"elsewhere": 1}, -1),
        (lambda name, module, x: 2 if (name, type(module), x.ndim) == ("1", nn.ReLU, 4) else 0, -2),
        (lambda name, module, x: None, -1),
    ],
)
def test_what_is_given_comes_first(given, dim):
    assert dim_at_the_end(nn.Linear(8, 7), x=torch.randn(MAP), given=given)[0] == dim


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (True, TypeError, "expected `unit_dim` to be an int, a mapping from .*, or None, but got True"),
        (1.0, TypeError, "but got a float"),
        ("last", TypeError, "but got 'last'"),
        ({3: 1}, TypeError, "but got a mapping with a key that is an int"),
        ({"1": "last"}, TypeError, "but got a mapping to 'last'"),
        (4, ValueError, r"expected `unit_dim` to be in \[-4, 3\] for `1`, which has 4 dims, but got 4"),
        (lambda *_: "last", TypeError, "a function that gives an int or None, but got one that gave 'last'"),
    ],
)
def test_bad_unit_dims(given, error, message):
    with pytest.raises(error, match=message):
        dim_at_the_end(nn.Linear(8, 7), x=torch.randn(MAP), given=given)


def test_nothing_is_left_of_it_and_a_copy_is_not_followed():
    model = nn.Sequential(nn.Linear(8, 7), nn.ReLU())
    tracker = UnitTracker(model)
    tracker.attach()
    tracker.attach()
    copy.deepcopy(model)(torch.randn(2, 8))
    assert tracker.produced is None
    model(torch.randn(2, 8))
    assert tracker.produced.shape == (2, 7)
    tracker.detach()
    assert hooks(model) == 0


def test_a_pass_begins_without_the_producers_of_the_last():
    model = nn.Sequential(nn.ReLU(), nn.Linear(8, 5))
    tracker, dims = UnitTracker(model), []
    tracker.attach()
    model[0].register_forward_hook(lambda module, args, out: dims.append(tracker.dim("0", module, out)))
    for _ in range(2):
        model(torch.randn(2, 5, 5, 8))
    assert dims == [1, 1]


@needs_compiler
def test_it_works_in_compiled_code():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear, self.act = nn.Conv2d(5, 4, 1), nn.Linear(4, 3), nn.ReLU()
            self.tracker = UnitTracker(self)
            self.tracker.attach()

        def forward(self, x):
            x = self.act(self.conv(x))
            first = self.tracker.dim("act", self.act, x)
            x = self.act(self.linear(x.permute(0, 2, 3, 1)))
            return first, self.tracker.dim("act", self.act, x)

    fast = torch.compile(Net(), backend="eager", fullgraph=True, dynamic=True)
    for size in (6, 7, 6, 4):
        assert fast(torch.randn(2, 5, size, 8)) == (1, 3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_rows_of_nested_tensors_are_the_real_ones(layout):
    parts = [torch.randn(3, 4), torch.randn(1, 4), torch.randn(0, 4)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    assert torch.equal(counted_rows(nested, -1)[0][0], torch.cat(parts))
    model = nn.Linear(4, 6)
    tracker = UnitTracker(model)
    tracker.attach()
    out = model(nested)
    assert tracker.dim("", nn.ReLU(), out) == 2
