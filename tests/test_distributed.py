"""Sums over processes: over those that run copies of a model, and over no others in silence."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from tracked import on_two_processes

from sparseout import SparsityMonitor
from sparseout._utils.distributed import all_reduce_sums, check_group

SCRIPT = """
import copy, warnings
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from sparseout import Sparseout, SparsityController, SparsityMonitor, measures, revive_, row_mask
from sparseout._utils.distributed import all_reduce_sums, check_replicas, data_parallel_group
from sparseout.integrations._common import TrainingSession

dist.init_process_group("gloo")
rank = dist.get_rank()
alone = [dist.new_group([r]) for r in range(2)][rank]


def error(call):
    try:
        call()
    except ValueError as error:
        return str(error)


sums = all_reduce_sums({"both": torch.tensor([1, 2.0]), ("only", rank): torch.ones(2, 1) * rank}, torch.device("cpu"))
assert {k: v.tolist() for k, v in sums.items()} == {"both": [2, 4], ("only", 0): [[0], [0]], ("only", 1): [[1], [1]]}
assert all_reduce_sums({}, torch.device("cpu")) == {}
one = all_reduce_sums({"both": torch.ones(1)}, torch.device("cpu"), alone)
assert one == {"both": torch.ones(1)}, one
unlike = {"x": torch.ones(1 + rank)}
assert "one shape on every process for x" in error(lambda: all_reduce_sums(unlike, torch.device("cpu")))

# Stages of a pipeline have modules of equal names.
torch.manual_seed(rank)
stage = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
with SparsityMonitor(stage) as monitor:
    stage(torch.randn(3, 4))
assert "but got None, with other parameters on process 1 than on process 0" in error(monitor.report)
assert monitor.report(group=alone)[0]["rows"] == monitor.report(sync=False)[0]["rows"] == 3
assert monitor.report(group=dist.group.WORLD)[0]["rows"] == 6  # as the user says
other = [dist.new_group([r]) for r in range(2)][1 - rank]
assert "with this process in it" in error(lambda: monitor.report(group=other))

# A sum over some of the rows over the number of all is no mean.
same = nn.ReLU()
with SparsityMonitor(same, measures=("hoyer", "gini")[: 1 + rank]) as monitor:
    same(torch.randn(3, 4))
assert "the same on all processes, but got (('hoyer',), 1, 0.0, False) on process 0" in error(monitor.report)

# A mask of its own on each process: of process 1 one that fits nothing, which both say.
with SparsityMonitor(same) as monitor, row_mask(torch.tensor([1, 0, 0, 1])[: 3 + rank]):
    same(torch.randn(3, 4))
report = monitor.report()
assert (report[0]["rows"], report.unmasked) == (1 + 3, [""])
assert monitor.report(sync=False).unmasked == [""][:rank]

# Units revived get the same weights on all processes; reports that differ are an error on all.
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
net[0].bias.data[:] = torch.tensor([-9.0] * 3 + [9.0] * 5)
twin = nn.parallel.DistributedDataParallel(net)
torch.manual_seed(rank)
with SparsityMonitor(twin) as monitor:
    twin(torch.rand(3, 4))
assert revive_(twin, monitor.report()).revived == {"0": (0, 1, 2)}
check_replicas(net)
net[0].bias.data[0] = (9.0, -9.0)[rank]
monitor.reset()
with monitor:
    twin(torch.rand(3, 4))
assert "the same dead units on all processes" in error(lambda: revive_(twin, monitor.report(sync=False)))

# Wrappers know their group.
wrapped = nn.Sequential(nn.parallel.DistributedDataParallel(stage, process_group=alone), nn.ReLU())
assert data_parallel_group(wrapped) is alone
with SparsityMonitor(wrapped) as monitor:
    wrapped(torch.randn(3, 4))
assert {record["rows"] for record in monitor.report()} == {3}
assert {record["module"] for record in monitor.report()} == {"0.1", "1"}

# Tensor parallelism: half of the units here, half there.
torch.manual_seed(0)
mesh = init_device_mesh("cpu", (2,))
net = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 8, bias=False))
net[0].weight.data.abs_()[8:].neg_()
x = torch.rand(5, 8)
whole = net[0](x).relu()
for output in (True, False):
    split = copy.deepcopy(net)
    plan = {"0": ColwiseParallel(use_local_output=output), "2": RowwiseParallel()}
    parallelize_module(split, mesh, plan)
    with SparsityMonitor(split) as monitor:
        split(x)
    if output:  # a plain tensor, of which nobody knows that it is a part
        assert "other parameters on process 1" in error(monitor.report)
        assert monitor.report(sync=False)[0]["units"] == 8
    else:
        record = monitor.report(sync=False)[0]
        assert (record["units"], record["dead_units"], record["rows"]) == (16, 8, 5)
        assert abs(record["hoyer"] - measures.hoyer(whole).mean().item()) < 1e-6

# A callback logs what its own process has measured, and says so.
session = TrainingSession(None, ("hoyer",), None, 1, None)
session.begin(split)
split(x)
with warnings.catch_warnings(record=True) as caught:
    values = session.values("train")
assert ["different parameters" in str(warning.message) for warning in caught] == [True]
assert abs(values["1/hoyer"] - measures.hoyer(whole).mean().item()) < 1e-6
split(x)
assert "1/hoyer" in session.values("train")  # and says it once
session.close()

noisy = nn.Sequential(copy.deepcopy(net[0]), nn.ReLU(), Sparseout(q=2.5, scale="matched"))
parallelize_module(noisy, mesh, {"0": ColwiseParallel(use_local_output=False)})
controller = SparsityController(noisy, 0.9, every=1, group=alone)
noisy(x)
controller.step()
assert abs(controller.measured["2"] - measures.hoyer(whole).mean().item()) < 1e-6, controller.report()
controller.detach()
controller = SparsityController(noisy, 0.9, every=1)
assert "other parameters on process 1" in error(controller.step)  # not the sum over parts, in silence

# DTensors with rows of their own on each process.
rows = distribute_tensor(torch.rand(6, 8), mesh, [Shard(0)])
act = nn.Sequential(nn.ReLU())
with SparsityMonitor(act) as monitor:
    act(rows)
assert (monitor.report(sync=False)[0]["rows"], monitor.report()[0]["rows"]) == (3, 6)
dist.destroy_process_group()
print("result done")
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    assert on_two_processes(SCRIPT, tmp_path) == ["done", "done"]


def test_without_processes_sums_are_ones_own():
    x = torch.ones(2, dtype=torch.float32)
    (total,) = all_reduce_sums({"x": x}, torch.device("cpu")).values()
    assert total.tolist() == [1, 1]
    assert total is not x


def test_groups_that_are_none(tmp_path):
    monitor = SparsityMonitor(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match=r"`group` to be None, as torch.distributed is not initialized"):
        monitor.report(group=3)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with pytest.raises(TypeError, match=r"`group` to be a torch.distributed.ProcessGroup or None, but got an int"):
            monitor.report(group=3)
        check_group(dist.group.WORLD)
        assert len(monitor.report()) == 0
    finally:
        dist.destroy_process_group()
