"""K-winners under checkpointing, compilation, export and transforms choose as they do without."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from conftest import needs_compiler, needs_symbols
from sparseout.baselines import KWinners, StatisticalTopK


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_a_checkpoint_computes_again_chooses_as_before_and_moves_nothing(reentrant):
    layer, x = KWinners(1, boost=1, momentum=0.5), torch.tensor([[1.0, 0.9]], requires_grad=True)
    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0]]
    assert layer.duty_cycle.tolist() == [0.5, 0.0]


def run(layer, inputs, calls, backward=True):
    """The gradients of several calls, each checkpointed, reentrant or not, or plain, and then one backward."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    ways = {
        "plain": lambda x: layer(x),
        "reentrant": lambda x: checkpoint(layer, x, use_reentrant=True),
        "other": lambda x: checkpoint(layer, x, use_reentrant=False),
    }
    total = sum((ways[call](x) * (i + 1)).sum() for i, (x, call) in enumerate(zip(inputs, calls, strict=True)))
    if backward:
        total.backward()
    return [x.grad for x in inputs]


@needs_compiler
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.slow
def test_the_same_in_compiled_code(reentrant, whole):
    layer, x = KWinners(1, boost=1, momentum=0.5, units=2), torch.tensor([[1.0, 0.9]], requires_grad=True)

    def compiled(function):
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    if whole:
        compiled(lambda x: checkpoint(layer, x, use_reentrant=reentrant))(x).sum().backward()
    else:
        checkpoint(compiled(layer), x, use_reentrant=reentrant).sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0]]
    assert layer.duty_cycle.tolist() == [0.5, 0.0]


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize(
    "calls", ["reentrant reentrant reentrant", "other other other", "other plain other", "reentrant plain other"]
)
def test_each_of_several_calls_is_computed_again_as_it_was(calls, equal):
    torch.manual_seed(0)
    inputs = [torch.rand(4, 8)] * 3 if equal else list(torch.rand(3, 4, 8))
    layer, plain = (KWinners(2, boost=5.0, momentum=0.5) for _ in range(2))
    for step in range(3):
        if step == 1:
            with torch.no_grad():
                checkpoint(layer, inputs[0], use_reentrant=False)  # without a backward
                plain(inputs[0])
        grads = run(layer, inputs, calls.split())
        assert all(map(torch.equal, grads, run(plain, inputs, ["plain"] * 3)))
        assert torch.equal(layer.duty_cycle, plain.duty_cycle)
        assert len({tuple(grad.flatten().tolist()) for grad in grads}) == 3


def test_several_calls_on_one_input_in_one_checkpoint_keep_their_order():
    gradients = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        layer, x = KWinners(1, boost=1, momentum=0.5), torch.tensor([[1.0, 0.9]], requires_grad=True)
        run(lambda x, layer=layer: layer(x) + 10 * layer(x), x).sum().backward()
        gradients.append(x.grad.tolist())
    assert gradients == [[[1, 10]]] * 2


def test_what_is_kept_for_checkpoints_is_bounded():
    layer = KWinners(1, boost=1.0)
    with torch.no_grad():
        for x in torch.rand(300, 1, 4):
            layer(x)
    assert len(layer._past._forwards) == 256
    assert not copy.deepcopy(layer)._past._forwards


WINNERS = [[0.0, 3.0, 0.0], [0.0, 0.0, 6.0]]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace")
def test_in_a_transform_and_traced():
    layer, x = KWinners(1, units=3).eval(), torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 6.0]])
    assert torch.vmap(layer)(x).tolist() == WINNERS
    assert torch.vmap(layer, in_dims=1, out_dims=1)(x.t()).t().tolist() == WINNERS
    assert torch.vmap(torch.func.grad(lambda row: layer(row).sum()))(x).tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    traced = torch.jit.trace(layer, x)
    assert traced(x).tolist() == WINNERS
    assert traced(x.flip(0)).tolist() == WINNERS[::-1]
    exported = torch.export.export(layer, (x,), dynamic_shapes=[{0: torch.export.Dim("rows")}])
    assert exported.module()(x[:1].repeat(5, 1)).tolist() == WINNERS[:1] * 5


@pytest.mark.parametrize("strict", [True, False])
def test_exported_in_training_it_takes_batches_of_any_size(strict):
    sizes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(KWinners(1, units=3), (torch.rand(4, 3),), dynamic_shapes=sizes, strict=strict)
    assert program.module()(torch.tensor([[1.0, 3, 2], [5, 4, 6]])).tolist() == [[0, 3, 0], [0, 0, 6]]


def test_an_ensemble_has_duty_cycles_of_its_own_for_each_member():
    layer, x = KWinners(1, momentum=0.5, units=3), torch.tensor([[[1.0, 3, 2]], [[5, 4, 6]]])
    cycles = {"duty_cycle": torch.zeros(2, 3)}
    y = torch.func.vmap(lambda state, x: torch.func.functional_call(layer, state, x))(cycles, x)
    assert y.tolist() == [[[0, 3, 0]], [[0, 0, 6]]]
    assert cycles["duty_cycle"].tolist() == [[0, 0.5, 0], [0, 0, 0.5]]


@pytest.mark.parametrize("size", [(8,), (3, 8), (8, 2, 2)])
def test_training_in_a_transform_counts_all_examples(size):
    x = torch.rand(6, *size)
    layer = KWinners(2, units=8, boost=5.0, unit_dim=0 if len(size) == 3 else None)
    plain = KWinners(2, units=8, boost=5.0)
    for _ in range(2):
        wanted = plain(x)
        assert torch.equal(torch.vmap(layer)(x), wanted)
        assert torch.equal(layer.duty_cycle, plain.duty_cycle)
    grads = torch.vmap(torch.func.grad(lambda x: layer(x).sum()))(x)
    assert torch.equal(grads, (plain(x) != 0).float())
    assert torch.equal(layer.duty_cycle, plain.duty_cycle)


# With a duty cycle of 0 the first unit of [1, 0.9] wins, with one of 0.5 the second.
SELECTIVE = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.sin.default])


def contested():
    return KWinners(1, boost=1.0, momentum=0.5, units=2), torch.tensor([[1.0, 0.9]], requires_grad=True)


@pytest.mark.parametrize("how", ["vmap", "selective", "plain"])
def test_a_checkpoint_computes_the_same_winners_again(how):
    layer, x = contested()
    forward = torch.vmap(layer) if how == "vmap" else lambda x: layer(x.sin().asin())
    options = {"context_fn": SELECTIVE} if how == "selective" else {}
    y = checkpoint(forward, x, use_reentrant=False, **options)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[1.0, 0.0]]))
    assert layer.duty_cycle.tolist() == [0.5, 0.0]


def test_a_second_backward_computes_the_same_winners_again():
    layer, x = contested()
    first, second = (checkpoint(layer, x, use_reentrant=False) for _ in range(2))
    assert torch.autograd.grad(second.sum(), x, retain_graph=True)[0].tolist() == [[0.0, 1.0]]
    (first.sum() + 2 * second.sum()).backward()
    assert x.grad.tolist() == [[1.0, 2.0]]
    for _ in range(9):
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert len(layer._past._forwards) == 1  # what was computed again is not kept for ever


@needs_symbols
@needs_compiler
@pytest.mark.parametrize("layer", [KWinners(1, units=4, momentum=0.5), StatisticalTopK(0.3)], ids=["kwinners", "topk"])
def test_compiled_for_rows_whose_number_depends_on_data(layer):
    x, plain = torch.rand(6, 4), copy.deepcopy(layer)
    compiled = torch.compile(lambda x, least: layer(x[x[:, 0] > least]), backend="aot_eager", fullgraph=True)
    for least in (x[:, 0].median(), torch.tensor(2.0)):  # of the second no row is left
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            y = compiled(x, least)
        torch.testing.assert_close(y, plain(x[x[:, 0] > least]))
        torch.testing.assert_close(dict(layer.named_buffers()), dict(plain.named_buffers()))


@needs_symbols
def test_maps_are_exported_for_any_size():
    sizes = ({0: torch.export.Dim("rows"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")},)
    layer = nn.Sequential(KWinners(3, units=4, boost=0).eval())
    program, x = torch.export.export(layer, (torch.rand(3, 4, 5, 6),), dynamic_shapes=sizes), torch.rand(2, 4, 3, 4)
    assert torch.equal(program.module()(x), layer(x))
