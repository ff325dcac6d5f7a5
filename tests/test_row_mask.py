"""Rows that a mask leaves out are not counted: the numbers are those of the other rows alone."""

import asyncio
import contextvars
import math
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from conftest import needs_compiler
from sparseout import Sparseout, SparsityMonitor, row_mask
from sparseout._utils import row_mask as module
from sparseout._utils.activations import ROWS, counted_rows

MASK = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1], [1, 1, 1]])  # (batch, time)
KEEP = MASK.bool()


def values(report, **wanted):
    """The records with these values, without the numbers of steps."""
    left_out = {"steps", "of_steps", "calls"}
    records = [r for r in report if all(r[key] == value for key, value in wanted.items())]
    return [{key: value for key, value in r.items() if key not in left_out} for r in records]


def watched(model, *batches, mask=None, **options):
    """The report on a model called on each of the batches, in a mask's block if there is one."""
    with SparsityMonitor(model, **options) as monitor:
        for x in batches:
            with row_mask(mask):
                model(x)
    return monitor.report()


def layer():
    return nn.Sequential(nn.ReLU())


@pytest.mark.parametrize(
    "mask", [MASK, KEEP, MASK.double(), MASK.to(torch.uint8), MASK.repeat(1, 2)[:, ::2][:, [0, 2, 1]]]
)
def test_masked_rows_are_as_if_they_were_not_there(mask):
    x = torch.randn(4, 3, 5)
    kept = mask.bool()
    masked, alone = watched(layer(), x, mask=mask), watched(layer(), x[kept])
    assert values(masked) == values(alone)
    assert masked.unmasked == []
    assert values(watched(layer(), x)) != values(masked)


# The model, the shape of its input, the mask, and how the rows that count are got from its output.
WHERE = {
    "one dim of the batch": (layer, (4, 3, 5), MASK[:, 0], lambda y: y[KEEP[:, 0]].flatten(0, 1)),
    "channels first": (lambda: nn.Sequential(nn.Conv1d(5, 6, 1), nn.ReLU()), (4, 5, 3), MASK, lambda y: y.mT[KEEP]),
    "heads after time": (layer, (4, 3, 2, 5), MASK, lambda y: y[KEEP].flatten(0, 1)),
    "images": (
        lambda: nn.Sequential(nn.Conv2d(5, 6, 1), nn.ReLU()),
        (4, 5, 2, 3),
        MASK[:, 0],
        lambda y: y[KEEP[:, 0]].movedim(1, -1).flatten(0, 2),
    ),
    "a mask of three dims": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU()),
        (2, 2, 3, 5),
        MASK.reshape(2, 2, 3),
        lambda y: y[MASK.reshape(2, 2, 3).bool()],
    ),
    "a transposed input": (layer, (4, 3, 5), MASK, lambda y: y[KEEP]),
}


@pytest.mark.parametrize("name", WHERE)
def test_rows_lie_in_all_dims_but_that_of_the_units(name):
    make, shape, mask, rows = WHERE[name]
    model, x = make(), torch.randn(shape)
    x = x.mT.contiguous().mT if name == "a transposed input" else x
    unit_dim = {"unit_dim": -1} if name == "heads after time" else {}
    masked = watched(model, x, mask=mask, **unit_dim)
    alone = watched(layer(), rows(model(x).detach()))
    assert masked.unmasked == []
    for got, expected in zip(values(masked), values(alone), strict=True):
        assert got | {"module": ""} == expected | {"module": ""}


@pytest.mark.parametrize("shape", [(4, 2, 3, 5), (12, 5), (3, 4, 5), (5,), (4, 5)])
def test_activations_of_other_leading_dims_are_counted_whole_and_named(shape):
    x = torch.rand(shape)
    report = watched(layer(), x, mask=MASK, unit_dim=-1)
    assert str(values(report)) == str(values(watched(layer(), x, unit_dim=-1)))  # NaN is NaN
    assert report.unmasked == ["0"]
    assert "Row mask: all rows are counted of `0`, whose leading dims are not those of the mask." in report.diagnosis
    assert "Row mask" in str(report)


def test_a_reset_forgets_which_activations_no_mask_fitted():
    monitor = SparsityMonitor(layer())
    for mode, left in (("eval", ["0"]), ("train", [])):
        with monitor, row_mask(MASK):
            monitor._model(torch.randn(4, 5))
        monitor.reset(mode)
        assert monitor.report().unmasked == left


def test_of_many_rows_kept_every_sth_is_measured():
    x, mask = torch.randn(300, 64, 3), torch.rand(300, 64) < 0.9
    assert mask.sum() > 2 * ROWS
    masked, alone = watched(layer(), x, mask=mask), watched(layer(), x[mask])
    assert values(masked) == values(alone)
    (rows,), misfit = counted_rows(x, -1, limit=None)
    assert len(rows) == mask.numel()
    assert not misfit


def test_a_mask_of_which_nothing_is_left_counts_nothing():
    record = watched(layer(), torch.randn(4, 3, 5), mask=torch.zeros(4, 3))[0]
    assert (record["rows"], record["dead_units"], record["zeros"]) == (0, 0, 0)


def test_blocks_nest_and_end_with_errors_too():
    model, x, other = layer(), torch.randn(4, 3, 5), torch.randn(4, 7, 5)
    with SparsityMonitor(model) as monitor:

        def rows(x):
            monitor.reset()
            model(x)
            return monitor.report()[0]["rows"]

        with row_mask(MASK) as block:
            assert rows(x) == 7
            with row_mask(1 - MASK):
                assert rows(x) == 5
                with row_mask(None):
                    assert rows(x) == 12
            with row_mask(torch.ones(4, 7) * torch.tensor([1, 1, 0, 0, 0, 0, 0])), block:  # of encoder and decoder
                assert (rows(other), rows(x)) == (8, 7)
            assert rows(x) == 7
            with pytest.raises(ZeroDivisionError), row_mask(1 - MASK):
                1 / 0  # noqa: B018
            assert rows(x) == 7
        assert rows(x) == 12
        with block:  # again
            assert rows(x) == 7


def test_several_passes_a_step_have_a_mask_each():
    x = torch.randn(4, 3, 5)
    model = layer()
    with SparsityMonitor(model) as monitor:
        for mask in (MASK, 1 - MASK):
            with row_mask(mask):
                model(x)
    got, expected = (values(report, axis="population")[0] for report in (monitor.report(), watched(layer(), x)))
    assert [got.pop(key) for key in ("histogram", "dead_indices")] == [
        expected.pop(key) for key in ("histogram", "dead_indices")
    ]
    assert got == pytest.approx(expected)


def test_threads_and_tasks_have_masks_of_their_own():
    model, x = layer(), torch.randn(4, 3, 5)
    barrier = threading.Barrier(2)

    def run(mask):
        with row_mask(mask):
            barrier.wait()
            for _ in range(50):
                model(x)
            barrier.wait()

    with SparsityMonitor(model) as monitor, row_mask(torch.zeros(4, 3)):
        threads = [threading.Thread(target=run, args=(mask,)) for mask in (MASK, None)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert monitor.report()[0]["rows"] == 50 * (7 + 12)  # and none is lost between threads

    async def task(mask):
        with row_mask(mask):
            await asyncio.sleep(0)
            return module._open.get().kept.numbers.tolist()

    async def both():
        return await asyncio.gather(task(KEEP[0]), task(~KEEP[0]))

    assert asyncio.run(both()) == [[0, 1], [2]]


class OpensItsBlock(nn.Module):
    """A model that is given its mask as an argument."""

    def __init__(self):
        super().__init__()
        self.inner = layer()

    def forward(self, x, mask):
        with row_mask(mask):
            return self.inner(x)


def in_threads(*calls):
    threads = [threading.Thread(target=function, args=args) for function, *args in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_know_the_mask_in_a_copy_of_the_context():
    model, x = layer(), torch.randn(4, 3, 5)
    with SparsityMonitor(model) as monitor, row_mask(MASK):
        in_threads(*[(contextvars.copy_context().run, model, x) for _ in range(2)])
    assert monitor.report()[0]["rows"] == 2 * 7


def test_replicas_that_open_the_block_count_their_parts_of_the_batch():
    """What nn.DataParallel does on two devices: replicas, a thread for each, arguments split along their first dim."""
    model, x = OpensItsBlock(), torch.randn(4, 3, 5)
    with SparsityMonitor(model) as monitor:
        replicas = nn.parallel.replicate(model, [0, 1])  # without parameters no device is asked for
        in_threads(*zip(replicas, x.chunk(2), MASK.chunk(2), strict=True))
    report, alone = monitor.report(), watched(layer(), x[KEEP])
    assert report.unmasked == []
    for record, expected in zip(report, alone, strict=True):
        for key in ("rows", "density", "dead_units", "always_on_units"):
            assert record[key] == expected[key]
        assert record["hoyer"] == pytest.approx(expected["hoyer"])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_computes_again_outside_the_block(reentrant):
    # no product of matrices, whose last bits depend on the number of rows
    model, x = nn.Sequential(nn.Identity(), nn.ReLU(), Sparseout(0.5)), torch.randn(4, 3, 5, requires_grad=True)
    with SparsityMonitor(model) as monitor:
        with row_mask(MASK):
            out = checkpoint(model, x, use_reentrant=reentrant)
        out.sum().backward()
    alone = watched(model, x[KEEP].detach(), modules=["1"])
    assert values(monitor.report(), module="1") == values(alone)


def test_noise_is_measured_on_the_rows_that_are_kept():
    model, x = nn.Sequential(Sparseout(0.5, q=1.0)), torch.rand(400, 10, 5)
    mask = torch.rand(400, 10) < 0.5
    x[~mask] = 1e4  # at q = 1 noise of other power
    ratio = [watched(model, x, mask=m)[0]["noise"] for m in (mask, None)]
    expected = math.sqrt(1.0) * (x[mask].abs().sum() / x[mask].square().sum()).item()  # mean |x| over mean x^2
    assert ratio[0] == pytest.approx(expected, rel=0.1)
    assert ratio[1] < 0.01


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize(
    ("mask", "count", "misfit"),
    [
        (torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]]), 3, False),  # as many in each as there are
        (torch.tensor([1, 0, 0]), 2, False),
        (torch.tensor([0, 1, 0]), 0, False),
        (torch.tensor([[1, 0, 0], [0, 0, 0], [1, 0, 0]]), 3, True),
    ],
)
def test_of_nested_tensors_whole_entries_are_kept(layout, mask, count, misfit):
    parts = [torch.randn(n, 4) for n in (2, 0, 1)]
    with row_mask(mask):
        (rows,), got = counted_rows(torch.nested.nested_tensor(parts, layout=layout), -1)
    assert torch.equal(rows, torch.cat(parts)[:count])
    assert got is misfit


def test_a_batch_that_vmap_takes_apart_is_whole_to_the_mask():
    model, x = layer(), torch.randn(4, 3, 5)
    with SparsityMonitor(model) as monitor, row_mask(MASK):
        torch.vmap(model)(x)
    assert values(monitor.report()) == values(watched(layer(), x[KEEP]))


@needs_compiler
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin:UserWarning")
@pytest.mark.slow
def test_the_block_is_around_compiled_code():
    model, x = nn.Sequential(nn.Linear(5, 6), nn.ReLU()).requires_grad_(False), torch.randn(4, 3, 5)
    compiled = torch.compile(model, backend="eager")
    assert values(watched(compiled, x, x, mask=MASK)) == values(watched(model, x, x, mask=MASK))

    @torch.compile(backend="eager")
    def inside(x):
        with row_mask(MASK):
            return model(x)

    with SparsityMonitor(model) as monitor:
        inside(x)
    assert values(monitor.report()) == values(watched(model, x, mask=MASK))


TENSOR = "expected `mask` to be a boolean tensor, or one of zeros and ones, of at least one dim, but got "


@pytest.mark.parametrize(
    ("mask", "error", "got"),
    [
        ([[1, 0]], TypeError, "a list"),
        (True, TypeError, "True"),
        (torch.ones(2, dtype=torch.complex64), TypeError, "one of torch.complex64"),
        (torch.tensor(1), ValueError, "a 0-d one"),
        (torch.tensor([0.0, -math.inf]), ValueError, "one with -inf"),
        (torch.tensor([[0.0, 0.5]]), ValueError, "one with 0.5"),
        (torch.tensor([1.0, math.nan]), ValueError, "one with nan"),
        (torch.tensor([1, 2]), ValueError, "one with 2"),
    ],
)
def test_what_is_no_mask(mask, error, got):
    with pytest.raises(error) as caught:
        row_mask(mask)
    assert str(caught.value) == TENSOR + got


def test_a_monitor_with_data_can_be_pickled_and_goes_on():
    model, x = nn.Sequential(nn.Linear(5, 6), nn.GELU(), Sparseout(0.5, q=1.0)), torch.randn(4, 3, 5)
    monitor = SparsityMonitor(model, eps=0.1).attach()
    with row_mask(MASK):
        model(x)
    again = pickle.loads(pickle.dumps(monitor))
    assert values(again.report()) == values(monitor.report())
    with again.attach(), row_mask(MASK):
        again._model(x)
    assert again.report()[0]["rows"] == 14


def test_blocks_may_end_in_any_order():
    def block(mask):
        with row_mask(torch.tensor(mask)):
            yield

    first, second = block([1, 0, 0]), block([1, 1, 0])
    next(first), next(second)
    first.close()
    assert [len(rows) for rows in counted_rows(torch.ones(3, 2), -1)[0]] == [2]
    second.close()
    assert not module.any_mask()
