"""Classes swapped by conversion and by noise on weights meet what else changes classes, hooks or forwards."""

import functools
import warnings

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

import sparseout
from sparseout import baselines, convert_dropout_, insert_after_

X = torch.ones(4, 8)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))


def bridgeout_(model: nn.Sequential) -> None:
    baselines.bridgeout_(model[0])


def shakeout_(model: nn.Sequential) -> None:
    baselines.shakeout_(model[0])


def convert_(model: nn.Sequential) -> None:
    convert_dropout_(model, 1.5)


SWAPS = [(bridgeout_, baselines.revert_, 0), (shakeout_, baselines.revert_, 0), (convert_, sparseout.revert_, 1)]
swaps = pytest.mark.parametrize(("swap", "revert", "index"), SWAPS)


def wrap_forward(module: nn.Module) -> None:
    """As accelerate and others do, written out."""
    old = module.forward
    module.forward = functools.wraps(old)(lambda *args, **kwargs: old(*args, **kwargs))


@swaps
@pytest.mark.parametrize("wrap", [wrap_forward, lambda module: add_hook_to_module(module, ModelHook())])
def test_a_forward_put_on_the_object_since_is_an_error_first(swap, revert, index, wrap):
    model = net()
    swap(model)
    wrap(model[index])
    made = type(model[index])
    with pytest.raises(
        RuntimeError, match=f"expected `{index}` to be the {made.__name__} that was made of it, but got"
    ):
        revert(model)
    assert type(model[index]) is made
    model(X)


@swaps
def test_it_goes_on_once_the_hook_is_gone(swap, revert, index):
    model = net().eval()
    before, expected = type(model[index]), model(X)
    for step in (swap, revert):
        add_hook_to_module(model[index], ModelHook())
        remove_hook_from_module(model[index])  # leaves the forward on the object
        step(model)
        assert torch.equal(model(X), expected)
    assert type(model[index]) is before


@pytest.mark.parametrize("change_", [baselines.bridgeout_, baselines.shakeout_])
def test_noise_on_weights_refuses_a_layer_whose_class_decides_nothing(change_):
    layer = nn.Linear(8, 8)
    wrap_forward(layer)
    with pytest.raises(TypeError, match="expected `module` to be a layer with the forward of its class"):
        change_(layer)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("swap", [bridgeout_, shakeout_])
def test_a_parametrization_added_since_is_an_error_first(swap):
    model = net()
    swap(model)
    made = type(model[0])
    parametrizations.weight_norm(model[0])
    model(X)
    with pytest.raises(RuntimeError, match=f"but got a Parametrized{made.__name__}: undo first what made that of it"):
        baselines.revert_(model)
    assert is_parametrized(model[0])
    model(X)
    remove_parametrizations(model[0], "weight")
    baselines.revert_(model)
    assert type(model[0]) is nn.Linear
    model(X)


@pytest.mark.parametrize("swap", [bridgeout_, shakeout_])
@pytest.mark.parametrize("later", [lambda layer: prune.l1_unstructured(layer, "weight", 0.5), weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_what_changes_weights_by_a_hook_stays(swap, later):
    model = net()
    swap(model)
    later(model[0])
    expected = model.eval()(X)
    baselines.revert_(model)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(X), expected)


def test_a_class_made_since_is_an_error_first():
    model = net()
    convert_(model)
    insert_after_(model, nn.Linear, p=0.5, q=1.0)
    model[1].__class__ = type("FSDPSparseout", (type(model[1]),), {})  # as fully_shard does
    with pytest.raises(RuntimeError, match="`1` to be the Sparseout that was made of it, but got a FSDPSparse"):
        sparseout.revert_(model)
    assert hasattr(model[0], "sparseout")


@pytest.mark.filterwarnings("ignore:.*quantiz", "ignore:.*torch.ao", "ignore:.*TypedStorage")
def test_what_takes_over_the_hooks_and_not_the_children_keeps_the_noise():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    insert_after_(model, nn.Linear, p=0.5, q=1.0)
    quantized = torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear})
    assert type(quantized[0]) is not nn.Linear
    assert not hasattr(quantized[0], "sparseout")
    quantized.train()  # as quantize_dynamic leaves it
    clean = quantized(X)
    torch.testing.assert_close(clean, model(X), atol=0.05, rtol=0.1)
    sparseout.revert_(quantized)
    assert not quantized[0]._forward_hooks
    model.train()
    assert not torch.equal(model(X), model(X))  # the original's layer is its own
    aware = nn.Linear(8, 8)
    aware._forward_hooks.update(model[0]._forward_hooks)  # as quantization-aware training does
    assert not torch.equal(aware(X), aware(X))
    assert torch.equal(aware.eval()(X), nn.functional.linear(X, aware.weight, aware.bias))


@pytest.mark.parametrize("revert", [sparseout.revert_, baselines.revert_])
def test_nothing_to_revert_is_said(revert):
    with pytest.warns(UserWarning, match="^nothing was reverted: "):
        revert(net())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = net()
        insert_after_(model, nn.Linear, p=0.5, q=1.0)
        sparseout.revert_(model)
