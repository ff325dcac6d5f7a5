"""The statistics of batch norm are estimated again: without noise, by plain means, and nothing else changes."""

import pytest
import torch
from torch import nn

from sparseout import recalibrate_norm_
from sparseout.convert._batch_norm import batch_norms


def network():
    """Noise, convolution, batch norm, noise."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5))
    nn.init.normal_(model[1].weight)
    return model


def by_hand(model, batches):
    """Mean and unbiased variance of each batch, averaged over batches."""
    outputs = [model[1](batch).transpose(0, 1).flatten(1) for batch in batches]
    mean = torch.stack([torch.mean(out, 1) for out in outputs]).mean(0)
    return mean, torch.stack([torch.var(out, 1, correction=1) for out in outputs]).mean(0)


@pytest.mark.parametrize("count", [1, 3])
def test_statistics_are_those_of_the_batches_without_noise(count):
    model = network()
    for _ in range(5):
        model(torch.rand(8, 1, 6, 6) - 2)  # statistics of something else, to be forgotten
    batches = [torch.randn(8, 1, 6, 6) * (1 + i) + i for i in range(count)]
    recalibrate_norm_(model, batches)
    mean, variance = by_hand(model, batches)
    torch.testing.assert_close(model[2].running_mean, mean)
    torch.testing.assert_close(model[2].running_var, variance)
    assert model[2].momentum == 0.1


@pytest.mark.parametrize("broken", [False, True])
def test_nothing_else_changes(broken):
    model = network()
    model.eval()
    model[2].train()
    model[1].weight.requires_grad_(False)
    statistics = [buffer.clone() for buffer in model[2].buffers()]
    flags = [module.training for module in model.modules()]
    parameters = [parameter.clone() for parameter in model.parameters()]
    seen = []
    model[0].register_forward_hook(lambda module, args, out: seen.append(torch.equal(args[0], out)))
    batches = [torch.randn(4, 1, 6, 6), torch.randn(4, 2 if broken else 1, 6, 6)]
    if broken:
        with pytest.raises(RuntimeError):
            recalibrate_norm_(model, iter(batches))
    else:
        recalibrate_norm_(model, iter(batches))
    assert seen == [True, True]
    if broken:
        assert all(torch.equal(new, old) for new, old in zip(model[2].buffers(), statistics, strict=True))
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model[2].momentum == 0.1


def test_no_batch_is_an_error_that_leaves_the_statistics_alone():
    model = network()
    model(torch.rand(8, 1, 6, 6))
    before = model[2].running_mean.clone()
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate_norm_(model, [])
    assert torch.equal(model[2].running_mean, before)


def test_without_batch_norm_no_batch_is_asked_for():
    def never():
        raise AssertionError
        yield

    with pytest.warns(UserWarning, match="^no statistics were estimated: the Sequential has no batch norm$"):
        recalibrate_norm_(nn.Sequential(nn.GroupNorm(1, 4)), never())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_means_are_right_in_a_half_dtype_too(dtype):
    norm = nn.BatchNorm1d(1).to(dtype)  # in bf16 a mean that runs stands still at 256 batches
    recalibrate_norm_(norm, [torch.full((2, 1), float(i // 256), dtype=dtype) for i in range(1024)])
    assert norm.running_mean == 1.5
    assert norm.num_batches_tracked == 1024


def test_a_norm_that_is_not_called_keeps_its_statistics():
    class Aside(nn.Sequential):
        def forward(self, x):
            return self[0](x)

    model = Aside(nn.BatchNorm1d(1), nn.BatchNorm1d(1))
    model[1](torch.tensor([[0.0], [20.0]]))
    recalibrate_norm_(model, [torch.tensor([[0.0], [4.0]])])
    assert [norm.running_mean.item() for norm in model] == [2.0, 1.0]


@pytest.mark.parametrize(
    ("layer", "answer"),
    [
        (nn.BatchNorm2d(4), True),
        (nn.BatchNorm1d(4), True),
        (nn.SyncBatchNorm(4), True),
        (nn.BatchNorm2d(4, track_running_stats=False), False),
        (nn.GroupNorm(1, 4), False),
        (nn.Identity(), False),
    ],
)
def test_batch_norms_are_those_that_keep_statistics(layer, answer):
    found = batch_norms(nn.Sequential(nn.ReLU(), nn.Sequential(layer)))
    assert found == ({"1.0": layer} if answer else {})


class Recurrent(nn.Module):
    """Noise that is no layer: the float of an LSTM."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 3, num_layers=2, dropout=0.5)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.lstm(x)[0].flatten(0, 1))


def test_noise_that_is_no_layer_is_off_too():
    model, x = Recurrent(), torch.randn(5, 4, 3)
    recalibrate_norm_(model, [x])
    torch.testing.assert_close(model.norm.running_mean, model.lstm.eval()(x)[0].mean((0, 1)))


@pytest.mark.parametrize("wrap", [tuple, list])
def test_the_first_of_a_batch_is_the_input(wrap):
    model, x = nn.Sequential(nn.BatchNorm1d(2, momentum=None)), torch.randn(9, 2)
    recalibrate_norm_(model, [wrap((x, None))])
    torch.testing.assert_close(model[0].running_mean, x.mean(0))
    assert model[0].momentum is None


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (nn.BatchNorm1d(2), 5, "expected `batches` to be an iterable of batches, but got an int"),
        (None, [], "expected `model` to be a module, but got None"),
        (nn.BatchNorm1d(2), [{"x": 1}], "expected `batches` to be tensors, or tuples or lists that begin with one,"),
        (nn.BatchNorm1d(2), [("x", 1)], "expected `batches` to be tensors, .* but got 'x'"),
    ],
)
def test_what_is_no_model_or_batch(model, batches, message):
    with pytest.raises(TypeError, match=message):
        recalibrate_norm_(model, batches)
