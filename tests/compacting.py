"""Networks with silent units, and the check of a compacted copy."""

import torch
from torch import nn

from sparseout.inference import compact

ROWS = 64


def numel(model):
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def silence(layer, units, bias=-50.0, weights=False):
    """Make units of a layer what no input moves, or never enough to fire if their weights are kept."""
    transposed = type(layer).__name__ == "Conv1D" or isinstance(layer, nn.ConvTranspose2d)
    rows = layer.weight.transpose(0, 1) if transposed else layer.weight
    if not weights:
        rows[units] = 0.0
    if layer.bias is not None:
        layer.bias[units] = bias


@torch.no_grad()
def outputs(model, batch):
    flags = {module: module.training for module in model.modules()}
    model.eval()
    out = model(**batch) if isinstance(batch, dict) else model(batch)
    for module, flag in flags.items():
        module.training = flag
    return out.logits if hasattr(out, "logits") else out


def compacted(model, *batches):
    """Compact the model on batches, and compare what it computes on each of them."""
    before = [outputs(model, batch) for batch in batches]
    plan = compact(model, list(batches))
    plan.apply_()
    for batch, expected in zip(batches, before, strict=True):
        torch.testing.assert_close(outputs(model, batch), expected, rtol=0, atol=1e-12)
    assert plan.difference < 1e-12
    assert plan.parameters_after == numel(model)
    return plan


def mlp(activation=nn.ReLU, bias=True):
    return nn.Sequential(
        nn.Linear(5, 16), activation(), nn.Dropout(), nn.Linear(16, 8, bias=bias), nn.ReLU(), nn.Linear(8, 2)
    ).double()


def vgg():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(6 * 4, 10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 3)),
    ).double()
