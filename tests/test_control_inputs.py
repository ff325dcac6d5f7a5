"""What a controller measures, whatever runs its layers; and copies, files, wrappers and mistakes."""

import copy
import gc
import io
import math
import pickle
import resource
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import sparseout
from sparseout import Sparseout, SparsityController, SparsityMonitor, insert_after_, measures, revert_, set_q_
from sparseout._utils.hooks import DeadHook


def one(**options: object) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), Sparseout(q=2.5, **options))


def watched(model: nn.Module, x: torch.Tensor, **options: object) -> SparsityController:
    """A controller after one step."""
    controller = SparsityController(model, 0.5, every=1, **options)
    model(x)
    controller.step()
    return controller


def test_a_shared_tensor_moves_only_layers_that_move_together() -> None:
    def model(q: torch.Tensor) -> nn.Sequential:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        insert_after_(layers, nn.ReLU, p=0.5, q=q)
        return layers

    q = torch.tensor(2.5)
    apart = model(q)
    target = {"1.sparseout": 0.01, "3.sparseout": 0.99}
    controller = SparsityController(apart, target, per_layer=True, every=1)
    apart(torch.rand(8, 4))
    controller.step()
    assert controller.q["1.sparseout"] > 2.5 > controller.q["3.sparseout"]
    for place, name in ((1, "1.sparseout"), (3, "3.sparseout")):
        assert float(apart[place].sparseout.q) == pytest.approx(controller.q[name])
    some = model(q)
    watched(some, torch.rand(8, 4), modules=["3.sparseout"])
    assert float(some[3].sparseout.q) != 2.5
    assert some[1].sparseout.q is q
    assert q == 2.5
    together = model(q)
    watched(together, torch.rand(8, 4))
    assert together[1].sparseout.q is together[3].sparseout.q is q  # whoever holds it sees it move


def test_a_layer_called_at_several_widths_counts_as_a_layer_for_each() -> None:
    layer = Sparseout(q=2.5)
    model = nn.Sequential(layer)
    controller = SparsityController(model, 0.5, every=1)
    narrow, wide = torch.rand(5, 7), torch.randn(3, 9)
    model(narrow[:2])
    model(wide)
    model(narrow[2:])
    controller.step()
    hoyer = [measures.hoyer(x).double().mean().item() for x in (narrow, wide)]
    assert controller.measured["0"] == pytest.approx(sum(hoyer) / 2, rel=1e-6)
    state = controller.state_dict()
    controller.load_state_dict(state)
    assert controller.state_dict()["sums"].keys() == {("0", 7), ("0", 9)}


def test_inputs_may_be_given_by_name() -> None:
    model, x = Sparseout(q=2.5), torch.rand(5, 7)
    controller = SparsityController(model, 0.5, every=1)
    model(input=x)
    controller.step()
    assert controller.measured[""] == pytest.approx(measures.hoyer(x).double().mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("number", "shape", "dim"),
    [(1, (4, 3, 5), 1), (1, (3, 5), 0), (2, (4, 3, 5), 1), (2, (4, 3, 5, 2), 1), (3, (3, 5, 2, 2), 0)],
)
def test_channels_are_the_units_of_channel_layers(number: int, shape: tuple[int, ...], dim: int) -> None:
    x = torch.randn(shape)
    hoyer = measures.hoyer(x, dim).double().mean().item()
    layer = getattr(sparseout, f"Sparseout{number}d")(q=2.5)
    assert watched(layer, x).measured[""] == pytest.approx(hoyer, rel=1e-6)
    plain = getattr(nn, f"Dropout{number}d")(0.5)
    for module in (layer, plain):
        with warnings.catch_warnings(), SparsityMonitor(module) as monitor:
            warnings.simplefilter("ignore")  # nn.Dropout2d says that 3-d inputs are read as (N, C, L)
            module(x)
        assert monitor.report()[0]["hoyer"] == pytest.approx(hoyer, rel=1e-6)


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (torch.full((4, 8), math.nan), "are NaN or infinite"),
        (torch.tensor([[1.0, math.inf], [1.0, 2.0]]), "are NaN or infinite"),
        (torch.rand(4, 1), "have 1 units, too few for hoyer"),
    ],
)
def test_what_has_no_value_does_not_move_q_and_is_told_once(x: torch.Tensor, why: str) -> None:
    model = nn.Sequential(Sparseout(q=2.5))
    controller = SparsityController(model, 0.5, every=1)
    model(x)
    with pytest.warns(UserWarning, match=f"^q is not moved by 0: its inputs {why}$"):
        controller.step()
    model(x)
    controller.step()  # no second warning: it would be an error
    assert controller.q == {"0": 2.5}
    told = f"q is not moved by 0: its inputs {why}"
    assert controller.report() == [f"0: q = 2.500, hoyer not measured, target 0.5; {told}"]
    model(torch.rand(4, 8))
    controller.step()
    assert controller.q["0"] < 2.5
    assert "moved by" not in controller.report()[0]


def test_a_layer_of_nan_leaves_the_others_their_say() -> None:
    model = nn.Sequential(Sparseout(q=2.5), Sparseout(q=2.5))
    controller = SparsityController(model, 0.9, every=1)
    x = torch.rand(5, 8)
    model[0](x)
    model[1](x * math.nan)
    with pytest.warns(UserWarning, match="not moved by 1"):
        controller.step()
    assert controller.measured["0"] == pytest.approx(measures.hoyer(x).double().mean().item(), rel=1e-6)
    assert controller.q["1"] < 2.5


def test_a_copy_does_not_feed_the_controller_of_the_original() -> None:
    model = one()
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
    model = one()
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
    model = one()
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
    model, x = one(), torch.rand(4, 6)
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
    model, x = one(), torch.rand(4, 6)
    controller = watched(model, x)
    before = controller.report()
    other = SparsityController(one(), 2, "kurtosis").state_dict()
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
    model, x = one(), torch.rand(4, 6)
    state = watched(model, x).state_dict()
    state["groups"]["2"]["told"] = "the target 0.5 of hoyer is out of reach"
    again = SparsityController(one(), 0.7)
    again.load_state_dict(state)
    assert again.q["2"] == state["groups"]["2"]["q"]
    assert again.report()[0].endswith("target 0.7")
    assert again._groups[0].error is None


@pytest.mark.parametrize("wrapped", ["compiled", "distributed", "both"])
def test_names_are_those_of_the_model_that_was_written(wrapped: str, tmp_path: object) -> None:
    inner = model = one()
    state = SparsityController(one(), 0.5).state_dict()
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


def test_a_model_in_evaluation_mode_is_told_once() -> None:
    model = one().eval()
    controller = SparsityController(model, 0.5, every=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(30):
            model(torch.rand(4, 6))
            controller.step()
    assert len(caught) == 1
    wanted = "no training pass was seen in 10 steps, so q does not move: is the model in evaluation mode?"
    assert str(caught[0].message) == wanted
    assert caught[0].filename == __file__


def test_types_choose_layers() -> None:
    model = nn.Sequential(Sparseout(q=2.5), sparseout.Sparseout2d(q=2.5))
    assert list(SparsityController(model, 0.5, modules=[sparseout.Sparseout2d]).q) == ["1"]


def test_compiled_code_keeps_sums_for_each_width() -> None:
    layer = Sparseout(q=2.5)
    fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
    controller = SparsityController(layer, 0.9, every=1)
    narrow, wide = torch.rand(5, 7), torch.randn(5, 9)
    for _ in range(3):
        fast(narrow)
        fast(input=wide)
        controller.step()
        hoyer = [measures.hoyer(x).double().mean().item() for x in (narrow, wide)]
        assert controller.measured[""] == pytest.approx(sum(hoyer) / 2, rel=1e-6)


HALF = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]])  # rows of Hoyer 1 and 0


class Twice(nn.Module):
    """One layer called twice a step, the second time in a checkpoint of that kind, if in any."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.noise, self.reentrant = nn.Linear(4, 4), Sparseout(q=2.5, scale="matched"), reentrant

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return self.noise(self.linear(x).relu())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, other = self.block(x).sum(), 3 - 9 * x
        if self.reentrant is None:
            return first + self.block(other).sum()
        return first + checkpoint(self.block, other, use_reentrant=self.reentrant).sum()


def moved(model: nn.Module, run: Callable | None = None) -> tuple[dict, dict]:
    """What a controller measures of three training steps, and its q."""
    controller = SparsityController(model, 0.9, every=1)
    for step in range(3):
        torch.manual_seed(step)
        (model if run is None else run)(torch.rand(8, 4, requires_grad=True)).backward()
        controller.step()
    return controller.measured, controller.q


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_computes_again_is_not_counted(reentrant: bool) -> None:
    wanted = moved(Twice())
    assert moved(Twice(reentrant)) == wanted
    model = Twice(reentrant)
    assert moved(model, torch.compile(model, backend="aot_eager", fullgraph=True)) == wanted
    model = Twice()
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)  # compiled code that is called again
    assert moved(model, lambda x: checkpoint(fast, x, use_reentrant=reentrant)) == wanted


def test_compiled_whole_a_checkpoint_may_hold_what_makes_the_units() -> None:
    """The first module that puts units somewhere runs in the checkpoint, and a layer after it asks where they are."""
    model = nn.Sequential(nn.Conv2d(2, 3, 1), Sparseout(q=2.5, seed=0), Sparseout(q=2.5, seed=1))
    x, measured = torch.randn(2, 2, 5, 4, requires_grad=True), []

    def run(x: torch.Tensor) -> torch.Tensor:
        return model[2](checkpoint(model[:2], x, use_reentrant=False)).sum()

    for compiler in (lambda run: run, partial(torch.compile, backend="aot_eager", fullgraph=True)):
        controller = SparsityController(model, 0.5, every=1, per_layer=True)
        compiler(run)(x).backward()
        controller.step()
        measured.append(controller.measured)
        controller.detach()
        set_q_(model, 2.5)
    assert measured[1] == pytest.approx(measured[0], rel=1e-5)


def test_selective_checkpointing_saves_what_it_saves_without_a_controller() -> None:
    # it pairs the results of a saved op with the calls of that op in the recomputation, by their order
    def save(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if "sum" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    def gradient(controlled: bool) -> torch.Tensor:
        layer = Sparseout(q=torch.tensor(2.5), seed=0)
        if controlled:
            SparsityController(layer, 0.5)
        x = torch.linspace(0.1, 1, 12).reshape(3, 4).requires_grad_()

        def block(x: torch.Tensor) -> torch.Tensor:
            y = layer(x * x)
            return y * y.sum(0).sin() * y.sum(1, keepdim=True).exp()

        contexts = partial(create_selective_checkpoint_contexts, save)
        return torch.autograd.grad(checkpoint(block, x, use_reentrant=False, context_fn=contexts).sum(), x)[0]

    assert torch.equal(gradient(True), gradient(False))


def as_batch(model: nn.Module) -> None:
    torch.vmap(model, randomness="different")(HALF)


def nested_batch(model: nn.Module) -> None:
    both = torch.vmap(torch.vmap(model, in_dims=1, randomness="different"), randomness="different")
    both(HALF.t()[None])


TRANSFORMS = {
    "vmap": as_batch,
    "vmap of vmap, other dims": nested_batch,
    "compiled vmap": lambda model: torch.compile(
        torch.vmap(lambda x: model(x), in_dims=1, randomness="different"), backend="aot_eager", fullgraph=True
    )(HALF.t()),
    "grad": lambda model: torch.func.grad(lambda x: model(x).sum())(HALF),
    "vmap of grad": lambda model: torch.vmap(torch.func.grad(lambda x: model(x).sum()), randomness="different")(HALF),
    "jvp": lambda model: torch.func.jvp(model, (HALF,), (HALF,)),
    "functionalize": lambda model: torch.func.functionalize(model)(HALF),
    "inference mode": torch.inference_mode()(lambda model: model(HALF)),
    "autocast": torch.autocast("cpu", torch.bfloat16)(lambda model: model(HALF)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_rows_are_counted_in_transforms_and_modes_and_training_goes_on(name: str) -> None:
    model = nn.Sequential(Sparseout(q=2.5))
    controller = SparsityController(model, 0.9, every=1)
    TRANSFORMS[name](model)
    controller.step()
    assert controller.measured == {"0": 0.5}
    model(HALF.clone().requires_grad_()).sum().backward()
    TRANSFORMS[name](model)
    controller.step()
    assert controller.measured == {"0": 0.5}
    assert torch.equal(controller._accumulators["0"].sums[True][4], torch.zeros(8, dtype=torch.float64))


def faked(model: nn.Module) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.ones(2, 4))


STAND_INS = {
    "fake": faked,
    "make_fx": lambda model: make_fx(model)(HALF),
    "export": lambda model: torch.export.export(model, (HALF,)),
    "strict export": lambda model: torch.export.export(model, (HALF,), strict=True),
    "meta": lambda model: model(HALF.to("meta")),
}


@pytest.mark.parametrize("name", STAND_INS)
def test_passes_without_values_are_not_counted(name: str) -> None:
    model = nn.Sequential(nn.ReLU(), Sparseout(q=2.5))
    controller = SparsityController(model, 0.9, every=1)
    result = STAND_INS[name](model)
    if "export" in name:
        assert "measure" not in result.graph_module.code
    controller.step()
    assert controller.measured == {"1": None}
    model(HALF)
    controller.step()
    assert controller.measured == {"1": 0.5}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_own_tensors_are_fp32_and_fp64_whatever_the_default(dtype: torch.dtype) -> None:
    default = torch.get_default_dtype()
    model = nn.Sequential(Sparseout(q=2.5))
    torch.set_default_dtype(dtype)
    try:
        controller = watched(model, HALF)
        controller.load_state_dict(controller.state_dict())
        model(HALF)
        controller.step()
        assert (model[0].q.dtype, controller.measured) == (torch.float32, {"0": 0.5})
        model[0].q = 2.0  # somebody has set a number
        model(HALF)
        controller.step()
        assert model[0].q.dtype == torch.float32
    finally:
        torch.set_default_dtype(default)


def test_own_tensors_are_where_the_model_is_whatever_the_default_device() -> None:
    model = nn.Sequential(Sparseout(q=2.5))
    with torch.device("meta"):
        controller = watched(model, HALF)
        controller.load_state_dict(controller.state_dict())
        model(HALF)
        controller.step()
    assert (model[0].q.device.type, controller.measured) == ("cpu", {"0": 0.5})


def test_a_controller_made_in_inference_mode_trains() -> None:
    with torch.inference_mode():
        model = nn.Sequential(Sparseout(q=torch.tensor(2.5)))
        controller = watched(model, HALF)
        controller.load_state_dict(controller.state_dict())
    model(HALF.clone().requires_grad_()).sum().backward()
    controller.step()
    assert controller.measured == {"0": 0.5}


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_rows_of_nested_tensors_are_the_real_ones(layout: torch.layout) -> None:
    model = nn.Sequential(Sparseout(q=2.5))
    controller = SparsityController(model, 0.9, every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls nested tensors a prototype
        model(torch.nested.nested_tensor([HALF, HALF[:1]], layout=layout))
    controller.step()
    assert controller.measured["0"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("unit_dim", [None, -1, {"1": 3}, {Sparseout: -1}, lambda name, layer, x: 3])
def test_units_are_where_the_module_that_made_them_put_them(unit_dim: object) -> None:
    model = nn.Sequential(nn.Linear(8, 8), Sparseout(q=2.5))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([1.0, 1] + [0] * 6))
    assert watched(model, torch.rand(2, 5, 5, 8), unit_dim=unit_dim).measured["1"] == pytest.approx(0.773, abs=5e-4)
    if unit_dim is None:
        fast = torch.compile(model, backend="aot_eager", fullgraph=True)
        accumulator = model[1]._forward_pre_hooks.popitem()[1].function.__self__
        fast(torch.rand(2, 5, 5, 8))
        assert list(accumulator.sums[True]) == [8]


@pytest.mark.parametrize(("unit_dim", "error"), [("1", TypeError), (True, TypeError), ({"1": "a"}, TypeError)])
def test_a_wrong_unit_dim_is_refused(unit_dim: object, error: type) -> None:
    model = one()
    with pytest.raises(error, match="`unit_dim` to be an int"):
        SparsityController(model, 0.5, unit_dim=unit_dim)
    assert not model[2]._forward_pre_hooks


def test_a_copy_keeps_nothing() -> None:
    model = one()
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
    model = one()
    watched(model, torch.rand(4, 6))
    with pytest.warns(UserWarning, match="lost 2 to this one"):
        SparsityController(model, 0.5).detach()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
