"""Models, reports and states that the first version pickled load, work and are reverted, or say why not.

The files were written at commit cb299d0, before the library had subpackages.
"""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

import sparseout
from sparseout import SparsityController, baselines

FILES = Path(__file__).parent / "pickles"


@pytest.fixture
def saved():
    return torch.load(FILES / "first_version.pt", weights_only=False)


@pytest.mark.parametrize(
    ("name", "classes", "revert"),
    [
        ("converted", [nn.Linear, nn.ReLU, nn.Dropout, nn.Dropout1d], sparseout.revert_),
        ("inserted", [nn.Linear, nn.ReLU], sparseout.revert_),
        ("monitored", [nn.Linear, nn.ReLU], None),
        ("baselines", [nn.Linear, nn.Linear, baselines.KWinners, baselines.GaussianDropout], baselines.revert_),
        ("penalised", [nn.Linear, nn.ReLU], None),
        ("controlled", [nn.Linear, nn.ReLU, sparseout.Sparseout], None),
    ],
)
def test_a_model_of_the_first_version_works(saved, name, classes, revert):
    model, x, out = saved["models"][name], saved["x"], saved["outputs"][name]
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.eval()(x).allclose(out)
    if revert is not None:
        assert not torch.equal(model.train()(x), model(x))
        revert(model)
    assert [type(module) for module in model] == classes
    assert model.eval()(x).allclose(out)


def test_reports_of_the_first_version_print_as_they_did(saved):
    conversion, sparsity = saved["reports"]
    assert str(conversion).startswith("changed  2  Dropout(p=0.5, inplace=False) -> Sparseout(p=0.5, q=")
    assert sparsity[0]["module"] == "1"
    assert "train" in str(sparsity)


def test_a_controller_goes_on_from_a_state_of_the_first_version(saved):
    controller = SparsityController(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), sparseout.Sparseout(q=1.0)), 0.5)
    controller.load_state_dict(saved["state"])
    assert controller.q == {"2": 2.0}


def test_a_controller_of_the_first_version_says_what_to_do():
    with pytest.raises(RuntimeError, match="build a new one, whose load_state_dict takes states of the first version"):
        torch.load(FILES / "first_version_controller.pt", weights_only=False)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("schedules", "linear"),
        ("norm", "recalibrate_norm_"),
        ("insertion", "insert_after_"),
        ("conversion", "ConversionReport"),
        ("sparsity_report", "SparsityReport"),
    ],
)
def test_modules_of_the_first_version_can_be_imported(module, name):
    assert hasattr(importlib.import_module(f"sparseout.{module}"), name)
    assert not hasattr(importlib.import_module(f"sparseout.{module}"), "__file__") or module == "schedules"
