"""Copies, pickles and states of controllers, models that were wrapped or reverted, and what is left behind."""

import copy
import gc
import io
import pickle
import resource

import pytest
import torch
from controlled import one_layer, watched
from torch import nn

import sparseout
from sparseout import Sparseout, SparsityController, SparsityMonitor, revert_
from sparseout._utils.hooks import DeadHook


def test_a_copy_does_not_feed_the_controller_of_the_original() -> None:
    model = one_layer()
    controller = SparsityController(model, 0.9, every=1)
    copied = copy.deepcopy(model)
    copied(torch.rand(4, 6))
    for _ in range(3):
        controller.step()
    assert controller.measured == {"2": None}
    both, other = copy.deepcopy((model, controller))
    both(torch.rand(4, 6))
    other.step()
    assert float(both[2].q) == pytest.approx(other.q["2"])
    assert other.q["2"] < 2.5 == float(model[2].q)
    other.detach()
    assert all(isinstance(hook, DeadHook) for hook in both[2]._forward_pre_hooks.values())
    assert model[2]._forward_pre_hooks


def test_models_and_controllers_are_pickled() -> None:
    model = one_layer()
    controller = watched(model, torch.rand(4, 6))
    file = io.BytesIO()
    torch.save((model, controller), file)
    file.seek(0)
    again, other = torch.load(file, weights_only=False)
    x = torch.rand(4, 6)
    for net, control in ((model, controller), (again, other)):
        net(x)
        control.step()
    assert other.q == controller.q
    assert float(again[2].q) == float(model[2].q)


def test_a_copy_of_a_watched_model_is_not_watched() -> None:
    model = one_layer()
    with SparsityMonitor(model) as monitor:
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other(torch.rand(4, 6))
        assert len(monitor.report()) == 0
        model(torch.rand(4, 6))
    assert monitor.report().steps["train"] == (1, 1)


def test_a_reverted_layer_is_told_and_left_alone() -> None:
    model = nn.Sequential(nn.Dropout(0.5))
    sparseout.convert_dropout_(model, q=2.5)
    controller = watched(model, torch.rand(4, 6))
    revert_(model)
    model(torch.rand(4, 6))
    with pytest.raises(RuntimeError, match=r"expected `0` to be a Sparseout layer as before \(detach .* got a Dropout"):
        controller.step()
    controller.detach()
    assert "q" not in vars(model[0])
    assert not model[0]._forward_pre_hooks


def test_a_detached_controller_and_a_former_one_say_so() -> None:
    model, x = one_layer(), torch.rand(4, 6)
    former = watched(model, x)
    with pytest.warns(UserWarning, match="^another controller has lost 2 to this one .*: detach it first$"):
        later = watched(model, x)
    assert len(model[2]._forward_pre_hooks) == 1
    with pytest.raises(RuntimeError, match="expected `controller` to be on its layers, but got one that was"):
        former.step()
    later.detach()
    with pytest.raises(RuntimeError, match="that gave `2` to a later one"):
        later.step()


def test_states_of_others_are_refused_and_change_nothing() -> None:
    model, x = one_layer(), torch.rand(4, 6)
    controller = watched(model, x)
    before = controller.report()
    other = SparsityController(one_layer(), 2, "kurtosis").state_dict()
    for state, error, says in (
        (other, ValueError, "`state` to be one of hoyer, but got one of kurtosis"),
        ({}, ValueError, "`state` to be what state_dict gives, but got one without groups, measure, steps, sums"),
        (model.state_dict(), ValueError, "`state` to be what state_dict gives, but got one without groups"),
        (None, TypeError, "`state` to be what state_dict gives, but got None"),
    ):
        with pytest.raises(error, match=f"^expected {says}"):
            controller.load_state_dict(state)
    assert controller.report() == before


def test_another_target_goes_on_from_q() -> None:
    model, x = one_layer(), torch.rand(4, 6)
    state = watched(model, x).state_dict()
    state["groups"]["2"]["told"] = "the target 0.5 of hoyer is out of reach"
    again = SparsityController(one_layer(), 0.7)
    again.load_state_dict(state)
    assert again.q["2"] == state["groups"]["2"]["q"]
    assert again.report()[0].endswith("target 0.7")
    assert again._groups[0].error is None


@pytest.mark.parametrize("wrapped", ["compiled", "distributed", "both"])
def test_names_are_those_of_the_model_that_was_written(wrapped: str, tmp_path: object) -> None:
    inner = model = one_layer()
    state = SparsityController(one_layer(), 0.5).state_dict()
    if wrapped != "compiled":
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        if wrapped != "compiled":
            model = nn.parallel.DistributedDataParallel(model)
        if wrapped != "distributed":
            model = torch.compile(model, backend="eager")
        controller = SparsityController(model, 0.5, modules=["2"])
        controller.load_state_dict(state)
        assert list(controller.q) == ["2"]
        with SparsityMonitor(model) as monitor:
            inner(torch.rand(4, 6))
            assert [record["module"] for record in monitor.report(sync=False)] == ["1", "1", "2", "2"]
    finally:
        if wrapped != "compiled":
            torch.distributed.destroy_process_group()


def test_a_copy_keeps_nothing() -> None:
    model = one_layer()
    controller = watched(model, torch.rand(4, 6))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.optim.swa_utils.AveragedModel(model)):
        other(torch.rand(4, 6, requires_grad=True)).sum().backward()
        (hook,) = (
            h for layer in other.modules() if isinstance(layer, Sparseout) for h in layer._forward_pre_hooks.values()
        )
        assert isinstance(hook, DeadHook)
    again = SparsityController(other, 0.5)  # takes nothing away from anybody: no warning
    assert list(again.q) == ["2"]
    model(torch.rand(4, 6))
    controller.step()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler's own, of a second block
@pytest.mark.slow
def test_wrappers_inside_the_model_do_not_change_names() -> None:
    def blocks() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Sparseout(q=2.5)) for _ in range(2)))

    state = SparsityController(blocks(), {"0.2": 0.3, "1.2": 0.9}, per_layer=True).state_dict()
    compiled, averaged = blocks(), torch.optim.swa_utils.AveragedModel(blocks())
    for block in compiled:
        block.compile(backend="eager")
    outer = nn.Sequential(*(torch.compile(block, backend="aot_eager") for block in blocks()))
    for model in (compiled, outer, averaged, nn.DataParallel(blocks())):
        controller = SparsityController(model, {"1.2": 0.9}, per_layer=True, modules=["1.2"], every=1)
        model(torch.rand(8, 6))
        controller.step()
        assert controller.q["1.2"] < 2.5
        controller.detach()
        whole = SparsityController(model, {"0.2": 0.3, "1.2": 0.9}, per_layer=True)
        whole.load_state_dict(state)
        assert list(whole.q) == ["0.2", "1.2"]


def test_memory_is_flat() -> None:
    model = nn.Sequential(nn.Linear(16, 1024), nn.ReLU(), Sparseout(q=2.5))
    controller = SparsityController(model, 0.5, every=2, deadband=1.0)

    def run(steps: int) -> int:
        for _ in range(steps):
            model(torch.rand(64, 16)).sum().backward()
            controller.step()
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    begin = run(30)
    assert run(300) - begin < 20_000  # kB; activations of 300 steps are 79,000


def test_a_controller_that_others_replace_leaves_nothing_behind() -> None:
    model = one_layer()
    watched(model, torch.rand(4, 6))
    with pytest.warns(UserWarning, match="lost 2 to this one"):
        SparsityController(model, 0.5).detach()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
