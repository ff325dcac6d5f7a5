"""Names of modules and their selection: the same in every tool, under every wrapper and at every depth."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from sparseout import (
    Sparseout,
    SparsityController,
    SparsityMonitor,
    convert_dropout_,
    insert_after_,
    set_q_,
)
from sparseout._utils.modules import named_modules, select, unwrapped
from sparseout.baselines import ActivityPenalty

NAMES = ["", "0", "0.linear", "0.r", "0.d", "1", "1.linear", "1.r", "1.d"]


def block(noise: Callable[[], nn.Module] = nn.Dropout) -> nn.Sequential:
    layers = nn.Sequential()
    for name, layer in (("linear", nn.Linear(4, 4)), ("r", nn.ReLU()), ("d", noise())):
        layers.add_module(name, layer)
    return layers


class Foreign(nn.Module):
    """As the wrappers of other libraries are known: by the name of their class."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


Foreign.__name__ = "DeepSpeedEngine"
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": torch.compile,
    "DataParallel": DataParallel,
    "AveragedModel": AveragedModel,
    "DDP": DistributedDataParallel,
    "FSDP1": lambda module: FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True),
    "checkpoint": checkpoint_wrapper,
    "several": lambda module: DataParallel(torch.compile(AveragedModel(module))),
    "foreign": Foreign,
}


@pytest.mark.parametrize("depth", ["model", "block", "both"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.filterwarnings("ignore:FSDP is switching", "ignore:FSDP.*deprecated")
def test_every_tool_has_the_names_of_the_model_that_was_written(wrapper: str, depth: str, process_group: None) -> None:
    wrap = WRAPPERS[wrapper]
    model: nn.Module = nn.Sequential(*(block() if depth == "model" else wrap(block()) for _ in range(2)))
    model = model if depth == "block" else wrap(model)
    assert [name for name, _ in named_modules(model)] == NAMES
    seen = []
    report = convert_dropout_(model, q=1.5, filter_fn=lambda name, layer: seen.append(name))
    assert seen == list(report.changed) == ["0.d", "1.d"]
    assert list(insert_after_(model, nn.ReLU, p=0.5, q=1.0, filter_fn=lambda name, _: name == "1.r").changed) == ["1.r"]
    set_q_(model, {"0.d": 1.25})
    written = dict(named_modules(model))
    assert isinstance(written["0.d"], Sparseout)
    assert written["0.d"].q == 1.25
    controller = SparsityController(model, {"0.d": 0.5, "1.d": 0.6}, modules=["0.d", "1.d"], per_layer=True)
    assert list(controller.q) == ["0.d", "1.d"]
    controller.detach()
    with SparsityMonitor(model, ["0.r"]) as monitor:
        written["0"](torch.ones(2, 4))
    assert {record["module"] for record in monitor.report(sync=False)} == {"0.r"}
    ActivityPenalty(model, strength={"0.r": 0.1, "1.r": 0.2})


def test_a_name_that_only_looks_like_a_wrapper_stays() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.ReLU()

    assert [name for name, _ in named_modules(nn.Sequential(Head()))] == ["", "0", "0.module"]
    assert type(unwrapped(Head())) is Head


def test_every_name_of_a_shared_module_and_none_of_a_circle() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(shared, nn.Sequential(shared))
    model[1].parent = model
    assert [name for name, _ in named_modules(model)] == ["", "0", "1", "1.0"]


def test_selected_modules_come_once_in_the_order_of_the_model() -> None:
    shared = nn.ReLU()
    candidates = dict(named_modules(nn.Sequential(shared, nn.Tanh(), shared)))
    assert list(select(candidates, ["1", "2"])) == ["1", "2"]
    assert list(select(candidates, [nn.Tanh, nn.ReLU, "2"])) == ["0", "1"]
    assert list(select(candidates, lambda name, module: name != "0" and isinstance(module, nn.ReLU))) == ["2"]
    assert list(select(candidates, None)) == ["", "0", "1"]
