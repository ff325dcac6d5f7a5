"""The penalty under checkpointing, compilation, tracing and transforms counts what ran once."""

from contextlib import nullcontext

import pytest
import torch
from penalised import network
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from conftest import needs_compiler
from sparseout.baselines import ActivityPenalty, lq_penalty


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_counts_once(reentrant):
    model, x = network(), torch.randn(8, 4, requires_grad=True)
    with ActivityPenalty(model, ["1"]) as penalty:
        model(x)
        wanted = penalty.loss()
        out = checkpoint(model, x, use_reentrant=reentrant)
        found = penalty.loss()
        warning = r"^the penalty of 1 was not collected under checkpoint\(use_reentrant=True\), which runs forward"
        with pytest.warns(UserWarning, match=warning) if reentrant else nullcontext():
            (out.sum() + found).backward()
        assert penalty.loss().item() == 0
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()  # said once
    # the older kind of checkpoint runs forward without gradients, where nothing is collected
    torch.testing.assert_close(found, torch.zeros(()) if reentrant else wanted)


def test_compiled_it_is_the_same():
    model, x = network(), torch.randn(8, 4)
    model[4].p = 0.0
    with ActivityPenalty(model) as penalty:

        def step(x):
            return model(x).square().sum() + penalty.loss()

        wanted = step(x)
        compiled = torch.compile(step, backend="aot_eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(x), wanted)
    torch.testing.assert_close(torch.compile(step, backend="aot_eager")(x), model(x).square().sum())


@needs_compiler
@torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)  # as the docstring says
def test_compiled_whole_with_checkpoints_it_is_the_same():
    model, x = network(), torch.randn(8, 4)
    model[4].p = 0.0
    with ActivityPenalty(model, strength=0.1) as penalty:

        def step(x):
            out = checkpoint(model, x, use_reentrant=False)
            return out.square().sum() + penalty.loss()

        wanted = step(x)
        loss = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(loss, wanted)
        grads = [torch.autograd.grad(total, list(model.parameters())) for total in (loss, wanted)]
        torch.testing.assert_close(*grads)


@needs_compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which the compiler looks at
@pytest.mark.slow
def test_blocks_compiled_one_by_one_in_a_checkpoint_count_once():
    model, x = network(), torch.randn(8, 4)
    model[4].p = 0.0
    blocks = nn.Sequential(*(torch.compile(model[i : i + 2], backend="aot_eager", fullgraph=True) for i in (0, 2, 4)))
    with ActivityPenalty(model, strength=0.1) as penalty:
        model(x)
        wanted = penalty.loss()
        slopes = torch.autograd.grad(wanted, model[0].weight)
        for _ in range(3):
            out = checkpoint(blocks, x, use_reentrant=False).sum()
            loss = penalty.loss()
            torch.testing.assert_close(loss, wanted)
            torch.testing.assert_close(torch.autograd.grad(loss, model[0].weight, retain_graph=True), slopes)
            out.backward()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace")
@pytest.mark.parametrize(
    "record",
    [
        lambda model, x: torch.export.export(model, (x,)),
        torch.jit.trace,
        lambda model, x: make_fx(model)(x),
        lambda model, x: model.to("meta")(x.to("meta")),
    ],
)
def test_a_pass_that_is_recorded_is_not_counted(record):
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU()), torch.randn(8, 4)
    with ActivityPenalty(model) as penalty:
        record(model, x)
        assert penalty.loss().item() == 0


def test_in_a_transform_the_loss_is_taken_in_it():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU()), torch.randn(8, 4)
    wanted = lq_penalty(model(x))
    with ActivityPenalty(model, strength=1.0) as penalty:

        def loss(x):
            model(x)
            return penalty.loss()

        torch.testing.assert_close(torch.vmap(loss)(x).mean(), wanted)
        slope = torch.func.grad(loss)(x)
        y = x.clone().requires_grad_()
        torch.testing.assert_close(slope, torch.autograd.grad(loss(y), y)[0])
        torch.vmap(model)(x)
        with pytest.raises(RuntimeError, match="in the vmap or grad that the model ran in, but got called after"):
            penalty.loss()
        model(x)
        torch.testing.assert_close(penalty.loss(), wanted)
