"""A controller in several processes moves q as one process that has seen all rows."""

from pathlib import Path

import pytest
from ranks import on_two_ranks

DISTRIBUTED = """
import sys, torch, torch.distributed as dist
from torch import nn
from sparseout import Sparseout, SparsityController, measures
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
x = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(7)

def moved(parts):
    model = nn.Sequential(Sparseout(q=2.5, scale="matched"))
    controller = SparsityController(model, 0.5, every=1)
    for _ in range(4):
        for part in parts:
            model(part)
        controller.step()
    return controller.q["0"], controller.measured["0"]

together = moved([x[rank]])
model = nn.Sequential(Sparseout(q=2.5), Sparseout(q=2.5))
controller = SparsityController(model, 0.5, every=1)
model[rank](x[0, :, : 5 + rank])  # where the other process has not been
controller.step()
hoyer = [measures.hoyer(x[0, :, :units]).double().mean().item() for units in (5, 6)]
assert abs(controller.measured["0"] - sum(hoyer) / 2) < 1e-6, (controller.measured, hoyer)

def error(options={}, load=None, steps=6):  # what a controller raises in training, alike on both processes
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 7), Sparseout(q=2.5))
    try:
        controller = SparsityController(model, **({"target": 0.5, "every": 5} | options))
        for step in range(steps):
            if rank == 0 and step == load:
                state = controller.state_dict()
                state["steps"], state["groups"]["1"]["q"] = 3, 2.2
                controller.load_state_dict(state)
            model(x[rank])
            controller.step()
    except (RuntimeError, ValueError) as wrong:
        return str(wrong)

same = "expected `controller` to be the same on all processes"
both = f"{same} (with the same arguments, and one state loaded on all), but got "
assert error() is None
assert error({"target": 0.5 + rank / 4}) == both + "target of 1 0.5 on process 0 and 0.75 on process 1"
assert error({"every": 5 + rank}) == both + "every 5 on process 0 and 6 on process 1"
assert error(load=0) == both + "steps 3 on process 0 and 0 on process 1"  # before training
assert error(load=2).startswith(both + "q of 1 2.2 on process 0 and 2.5")  # within an interval: at the next update
assert error(load=5, steps=10).startswith(both + "q of 1 2.2 on process 0 and ")  # after an update
alone = [dist.new_group([one]) for one in range(2)]
assert error({"target": 0.5 + rank / 4, "group": alone[rank]}) is None  # stages of a pipeline
assert "with this process in it" in error({"group": alone[1 - rank]})
torch.manual_seed(rank)
stage = nn.Sequential(nn.Linear(7, 7), Sparseout(q=2.5))
try:
    SparsityController(stage, 0.5).step()
except ValueError as wrong:
    assert "other parameters on process 1 than on process 0" in str(wrong), wrong
else:
    raise AssertionError("stages were taken for copies")
stage = nn.Sequential(nn.Linear(7, 7), Sparseout(q=2.5))
wrapped = nn.parallel.DistributedDataParallel(stage, process_group=alone[rank])
controller = SparsityController(wrapped, 0.5, every=1)
wrapped(x[rank])
controller.step()
hoyer = measures.hoyer(stage[0](x[rank])).double().mean().item()
assert abs(controller.measured["1"] - hoyer) < 1e-6, (controller.measured, hoyer)
dist.destroy_process_group()
alone, whole = moved([x[rank]]), moved(list(x))
assert abs(together[1] - whole[1]) < 1e-12 and abs(together[0] - whole[0]) < 1e-9, (together, whole)
assert abs(alone[1] - whole[1]) > 1e-4, (alone, whole)
print("done", together[0])
"""


@pytest.mark.slow
def test_processes_move_q_as_one_that_has_seen_all(tmp_path: Path) -> None:
    first, second = on_two_ranks(DISTRIBUTED, tmp_path, "-W", "error")
    assert first.stdout.startswith("done"), (first, second)
    assert first.stdout == second.stdout
