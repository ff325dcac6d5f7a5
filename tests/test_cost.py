"""Cost of inference: equal to a count of every pair of an input and a weight."""

import copy

import architectures
import pytest
import torch
from torch import nn

import sparseout
from sparseout.inference import cost

LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "linear over time": (lambda: nn.Linear(7, 5, bias=False), (3, 7)),
    "strided, padded": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 7, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 5, 5)),
    "dilated": (lambda: nn.Conv2d(2, 3, 3, dilation=2, padding=2), (2, 6, 6)),
    "same": (lambda: nn.Conv2d(2, 3, (3, 5), padding="same"), (2, 5, 6)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
    "1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=2), (3, 9)),
    "3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 3, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), (3, 4, 4)),
    "transposed, grouped": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (4, 5)),
}


def pairs(layer, x, dense):
    """By the Jacobian: whether an output reads an input. No layer here reads an input twice for one output."""
    twin = copy.deepcopy(layer).double()
    with torch.no_grad():
        twin.weight.copy_((layer.weight != 0) | dense)
        twin.bias = None
    jacobian = torch.autograd.functional.jacobian(twin, x.double()).flatten(-x.ndim)
    return int((jacobian * ((x != 0) | dense).flatten()).sum())


@pytest.mark.parametrize("name", LAYERS)
def test_every_pair_is_counted(name):
    make, size = LAYERS[name]
    layer = make()
    with torch.no_grad():
        layer.weight[torch.rand_like(layer.weight) < 0.3] = 0.0
    batches = [torch.randn(n, *size).relu() for n in (2, 3)]
    (record,) = report = cost(nn.Sequential(layer), batches)
    assert report.examples == 5
    assert record["effective_macs"] == sum(pairs(layer, x, False) for batch in batches for x in batch[:, None]) / 5
    assert record["dense_macs"] == sum(pairs(layer, x, True) for batch in batches for x in batch[:, None]) / 5
    assert 0 < record["effective_macs"] < record["dense_macs"]


def test_mlp():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 4, bias=False), nn.Sigmoid())
    x = torch.randn(10, 6)
    report = cost(model, [(x, torch.zeros(10))])
    alive = (model[:2](x) != 0).sum().item()
    assert [record["effective_macs"] for record in report] == [48.0, 4 * alive / 10]
    assert report.total == {
        "dense_macs": 80.0,
        "effective_macs": 48 + 4 * alive / 10,
        "density": (48 + 4 * alive / 10) / 80,
    }
    assert report[1]["input_density"] == alive / 80
    assert "total" in str(report)
    assert len(report.frame()) == 2


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_transformers(name):
    model, batch = architectures.transformer(name)
    model.eval()
    counts = {}

    def count(module, args, output):
        w = module.weight.t() if type(module).__name__ == "Conv1D" else module.weight
        counts[module] = int(((args[0] != 0).long() @ (w != 0).long().t()).sum())

    layers = [m for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    handles = [layer.register_forward_hook(count) for layer in layers]
    model(**batch)
    for handle in handles:
        handle.remove()
    report = cost(model, [batch])
    modules = dict(model.named_modules())
    assert len(report) == len(layers)
    assert all(record["effective_macs"] == counts[modules[record["module"]]] / 2 for record in report)
    assert not report.uncounted


def test_what_is_not_counted_is_named():
    model = nn.ModuleDict(
        {"encoder": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), "lstm": nn.LSTM(8, 3, batch_first=True)}
    )
    model.forward = lambda x: model["lstm"](model["encoder"](x))[0]
    report = cost(model, [torch.randn(2, 5, 8)])
    assert [record["module"] for record in report] == ["encoder.linear1", "encoder.linear2"]
    assert report.uncounted.keys() == {"encoder.self_attn", "encoder.self_attn.out_proj", "lstm"}
    assert "not counted: lstm, a LSTM" in str(report)


def test_a_layer_called_twice_and_after_compaction():
    layer = nn.Linear(3, 3)
    assert cost(nn.Sequential(layer, layer), [torch.ones(2, 3)])[0]["dense_macs"] == 18
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].bias[:3] = -99.0
    x = torch.rand(20, 4)
    before = cost(model, [x])
    sparseout.inference.compact(model, [x]).apply_()
    assert cost(model, [x])[1]["effective_macs"] == before[1]["effective_macs"]
    assert cost(model, [x]).total["dense_macs"] <= 5 * (4 + 2)


def test_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Dropout()).train()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    cost(model, [torch.ones(2, 3)])
    assert model.training
    assert len(model[0]._forward_hooks) == 1
    assert not model[0]._forward_pre_hooks
    assert calls == [1]
    with pytest.raises(ValueError, match="to have examples"):
        cost(model, [torch.ones(0, 3)])
    with pytest.raises(RuntimeError):
        cost(model, [torch.ones(2, 4)])
    assert model.training
    assert not model[0]._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_large_counts_are_exact(dtype):
    """Beyond what the dtype, or fp32, can hold."""
    layer = nn.Linear(513, 257).to(dtype)
    report = cost(layer, [torch.ones(129, 513, dtype=dtype)])
    assert report[0]["effective_macs"] == 513 * 257
    conv = nn.Conv2d(3, 1000, 3).to(dtype)
    assert cost(conv, [torch.ones(1, 3, 31, 31, dtype=dtype)])[0]["effective_macs"] == 29 * 29 * 27 * 1000
