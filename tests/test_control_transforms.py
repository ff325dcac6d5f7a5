"""A controller counts every row once: in checkpoints, compiled code, transforms and modes."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from controlled import HALF, watched
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sparseout import Sparseout, SparsityController, measures, set_q_


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
@pytest.mark.slow
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
