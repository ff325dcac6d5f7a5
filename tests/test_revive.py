"""Dead units get weights that can learn, and the model computes what it did."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import sparseout
from sparseout import Sparseout, SparsityController, SparsityMonitor, revive_
from sparseout.inference import compact, sparse_linear_

DEAD = (1, 4, 5)


def kill(layer, units=DEAD):
    """Make these units of a layer negative whatever comes in, if that is below 1 in size, and the others positive."""
    weight, bias = layer.weight.data, layer.bias.data
    bias.fill_(2.0)
    rows = weight.transpose(0, 1) if "Transpose" in type(layer).__name__ else weight
    rows[list(units)] *= 0.1
    bias[list(units)] = -50.0


def mlp(*between):
    net = nn.Sequential(nn.Linear(5, 8), *between, nn.Linear(8, 3))
    kill(net[0])
    return net, torch.rand(40, 5)


def conv(*rest, first=None):
    net = nn.Sequential(first or nn.Conv2d(2, 8, 3, padding=1), *rest)
    kill(net[0])
    return net, torch.rand(6, 2, 6, 6)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.act, self.down = nn.Linear(5, 8), nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 5)
        kill(self.gate)

    def forward(self, x):
        return x + self.down(self.act(self.gate(x)) * self.up(x))


NETS = {
    "linear": lambda: mlp(nn.ReLU()),
    "noise and no bias": lambda: (lambda net, x: (net[-1].register_parameter("bias", None), (net, x))[1])(
        *mlp(nn.ReLU(), Sparseout(0.5, q=1.0), nn.Dropout(0.2))
    ),
    "batch norm before": lambda: mlp(nn.BatchNorm1d(8), nn.ReLU()),
    "batch norm after": lambda: mlp(nn.ReLU(), nn.BatchNorm1d(8)),
    "a constant through more": lambda: mlp(nn.ReLU(), nn.BatchNorm1d(8), nn.Sigmoid(), nn.Dropout(0.5)),
    "convolutions": lambda: conv(nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3, padding=1)),
    "a convolution, batch norm after": lambda: conv(nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, stride=2)),
    "flattened": lambda: conv(nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(72, 3)),
    "flattened, batch norm after": lambda: conv(nn.ReLU(), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 3)),
    "transposed": lambda: conv(nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), first=nn.ConvTranspose2d(2, 8, 2)),
    "gated": lambda: (Gated(), torch.rand(20, 7, 5)),
}


def warm(net, x):
    """Running statistics, and a state of the optimizer and gradients that are nowhere 0."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        (net(x).square().mean() + sum(p.square().sum() for p in net.parameters())).backward()
        optimizer.step()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.bias)
    return optimizer


def watched(net, x, **options):
    with SparsityMonitor(net, **options) as monitor, torch.no_grad():
        net.eval()(x)
    return monitor.report()


@pytest.mark.parametrize("name", NETS)
def test_the_output_is_unchanged_and_the_units_live(name):
    net, x = NETS[name]()
    net, x = net.double(), x.double()
    optimizer = warm(net, x)
    kill(net.gate if name == "gated" else net[0])
    where = "act" if name == "gated" else "2" if name == "batch norm before" else "1"
    report = watched(net, x, modules=[where])
    assert report[0]["dead_indices"] == DEAD
    old = copy.deepcopy(net)
    before = net(x)
    done = revive_(net, report, optimizer)
    producers = ("gate", "up") if name == "gated" else ("0",)
    assert (done.revived, done.left) == (dict.fromkeys(producers, DEAD), {})
    assert (net(x) - before).abs().max() < 1e-12
    assert watched(net, x, modules=[where])[0]["dead_units"] < 3  # some at least fire on these rows

    # Of all entries, those of the dead units are new, and no others.
    for (key, new), was in zip(net.named_parameters(), old.parameters(), strict=True):
        layer = net.get_submodule(key.rpartition(".")[0])
        folded = name in ("batch norm after", "a constant through more") or "batch norm after" in name
        last = key.startswith(("down", str(len(net) - 1) if name != "gated" else "down"))
        if last and key.endswith("bias"):
            assert torch.equal(new, was) != folded
            continue
        dim = int(("Transpose" in type(layer).__name__) != last) if key.endswith("weight") and new.ndim > 1 else 0
        block = new.shape[dim] // 8
        entries = torch.tensor(DEAD)[:, None].mul(block).add(torch.arange(block)).flatten()
        changed = (new != was).movedim(dim, 0).reshape(new.shape[dim], -1).any(1)
        assert set(changed.nonzero().flatten().tolist()) <= set(entries.tolist())
        if last:
            assert not new.index_select(dim, entries).any()
        elif key in ("0.weight", "gate.weight", "up.weight"):
            assert changed[entries].all()
        state = optimizer.state[new]
        for value in (new.grad, state["exp_avg"], state["exp_avg_sq"]):
            zero = (value == 0).movedim(dim, 0).reshape(new.shape[dim], -1).all(1)
            assert zero.nonzero().flatten().tolist() == entries.tolist(), key
        assert state["step"] == 3

    # They get gradients, and do something after a step.
    optimizer.zero_grad()
    net(x).square().sum().backward()
    consumer = net.down if name == "gated" else net[-1]
    gradient = consumer.weight.grad if "Transposed" not in type(consumer).__name__ else consumer.weight.grad.mT
    assert gradient.abs().sum() > 0
    again = revive_(net, watched(net, x, modules=[where]), optimizer)
    assert len(again.revived.get(producers[0], ())) < 3


def test_fresh_weights_are_of_the_layers_own_initialisation():
    net = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 2))
    nn.init.constant_(net[0].weight, 7.0)
    kill(net[0], range(50))
    report = watched(net, torch.rand(3, 100))
    torch.manual_seed(5)
    revive_(net, report)
    torch.manual_seed(5)
    fresh = nn.Linear(100, 50)
    assert torch.equal(net[0].weight, fresh.weight)
    assert torch.equal(net[0].bias, fresh.bias)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.act, self.out = nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)
        kill(self.fc, (1, 4))

    def forward(self, x):
        return self.out(x + self.act(self.fc(x)))


class Untraced(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.act, self.out = nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)
        kill(self.fc)

    def forward(self, x):
        return self.out(self.act(self.fc(x))) if x.sum() > 0 else x


def tied():
    net = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    kill(net[0], (1, 4))
    net[2].weight = net[0].weight
    return net


def with_(change, make=lambda: mlp(nn.ReLU())[0]):
    net = make()
    change(net)
    return net


LEFT = {
    "residual": (Residual, "is read by"),
    "untraced": (Untraced, "cannot be traced"),
    "tied": (tied, "is shared: 0.weight, 2.weight"),
    "frozen producer": (lambda: with_(lambda net: net[0].requires_grad_(False)), "`0` is frozen"),
    "frozen consumer": (lambda: with_(lambda net: net[2].requires_grad_(False)), "`2` is frozen"),
    "a hook of others": (
        lambda: with_(lambda net: net[0].register_forward_hook(lambda *args: None)),
        "`0` has hooks, which may read its units",
    ),
    "the output": (lambda: with_(lambda net: kill(net[0]), lambda: mlp(nn.ReLU())[0][:2]), "is what the model returns"),
    "parametrized": (
        lambda: with_(lambda net: nn.utils.parametrizations.weight_norm(net[0])),
        "`0` is a ParametrizedLinear, a class of its own",
    ),
    "a constant and no bias": (
        lambda: with_(lambda net: net[-1].register_parameter("bias", None), lambda: mlp(nn.ReLU(), nn.Sigmoid())[0]),
        "a constant that its bias cannot take over",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_reached_is_left_and_named(name):
    make, why = LEFT[name]
    net = make()
    report = watched(net, torch.rand(9, 5), modules=[nn.ReLU])
    old = copy.deepcopy(net.state_dict())
    done = revive_(net, report)
    ((site, (count, reason)),) = done.left.items()
    assert done.revived == {}
    assert site == ("act" if hasattr(net, "act") else "1")
    assert count == report[0]["dead_units"] >= 2
    assert why in reason
    assert f"left  {site}" in str(done)
    assert f"{count} units: {reason}" in str(done)
    assert all(torch.equal(value, old[key]) for key, value in net.state_dict().items())


def test_a_padded_convolution_cannot_take_a_constant():
    net, x = conv(nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1))
    warm(net, x)
    kill(net[0])
    assert "constant" in revive_(net, watched(net, x, modules=["1"])).left["1"][1]


def test_dead_means_in_all_records_and_at_that_width():
    net, x = mlp(nn.ReLU())
    with SparsityMonitor(net, modules=["1"]) as monitor:
        net.train()(x)
        net.eval()(x)
    training, *_ = monitor.report()
    monitor.attach()
    with torch.no_grad():
        net[0].bias[DEAD[0]] = 50.0
        net(x)
        net[0].bias[DEAD[0]] = -50.0
    report = monitor.report()
    monitor.detach()
    assert training["dead_indices"] == DEAD
    assert revive_(net, report).revived == {"0": DEAD[1:]}


def test_layers_that_follow_each_other_are_revived_together():
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    kill(net[0])
    kill(net[2], (0, 7))
    x = torch.rand(30, 5).double()
    before = net(x)
    done = revive_(net, watched(net, x))
    assert done.revived == {"0": DEAD, "2": (0, 7)}
    assert (net(x) - before).abs().max() < 1e-12
    assert not net[2].weight[:, DEAD].any()  # of units that are revived on both ends too


def test_in_training_with_a_controller_and_in_wrappers():
    net = mlp(nn.ReLU(), Sparseout(0.5, scale="matched"))[0]
    x = torch.rand(40, 5)
    wrapped = torch.optim.swa_utils.AveragedModel(net)
    controller = SparsityController(net, 0.5, every=1)
    with SparsityMonitor(net) as monitor:
        net(x)
        done = revive_(net, monitor.report())
        assert done.revived == {"0": DEAD}
        monitor.reset()
        net(x)
        assert monitor.report()[0]["dead_units"] < 3
    controller.step()
    controller.detach()
    assert revive_(wrapped, watched(wrapped, x)).revived == {"0": DEAD}


@pytest.mark.parametrize(
    ("make", "key", "cleared"),
    [
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), "momentum_buffer", lambda w: torch.zeros_like(w)),
        (lambda p: torch.optim.Rprop(p, 0.05), "step_size", lambda w: torch.full_like(w, 0.05)),
        (lambda p: torch.optim.ASGD(p, 0.05), "ax", lambda w: w),
        (lambda p: torch.optim.Adagrad(p, 0.05), "sum", lambda w: torch.zeros_like(w)),
        (lambda p: torch.optim.Adam(p, 0.05, amsgrad=True), "max_exp_avg_sq", lambda w: torch.zeros_like(w)),
    ],
)
def test_what_optimizers_keep(make, key, cleared):
    net, x = mlp(nn.Tanh(), nn.ReLU())
    optimizer = make(net.parameters())
    for _ in range(2):
        (net(x).square().mean() + sum(p.square().sum() for p in net.parameters())).backward()
        optimizer.step()
    kill(net[0])
    before = optimizer.state[net[0].weight][key].clone()
    revive_(net, watched(net, x, modules=["2"]), optimizer)
    after, dead = optimizer.state[net[0].weight][key], list(DEAD)
    assert torch.equal(after[dead], cleared(net[0].weight.detach()[dead]))
    alive = [unit for unit in range(8) if unit not in DEAD]
    assert torch.equal(after[alive], before[alive])
    optimizer.step()  # goes on


def test_small_units_count_as_dead_by_eps_and_change_as_little():
    net, x = mlp(nn.GELU())
    net, x = net.double(), x.double()
    with torch.no_grad():
        net[0].weight[list(DEAD)] *= 0.01
        net[0].bias[list(DEAD)] = -4.0
    report = watched(net, x, eps=1e-2)
    assert report[0]["dead_indices"] == DEAD
    before = net(x)
    given = F.gelu(net[0](x))[:, DEAD] @ net[2].weight[:, DEAD].T
    assert revive_(net, report).revived == {"0": DEAD}
    torch.testing.assert_close(before - net(x), given)
    assert given.abs().max() > 1e-5


def test_nothing_dead_and_wrong_arguments():
    net = nn.Sequential(nn.Linear(5, 8), nn.Sigmoid(), nn.Linear(8, 3))
    report = watched(net, torch.rand(4, 5))
    assert str(revive_(net, report)) == "revived  nothing  no unit is dead"
    other = watched(nn.Sequential(nn.Sequential(mlp(nn.ReLU())[0])), torch.rand(4, 5))
    for arguments, error, text in (
        ((net, None), TypeError, "expected `report` to be a SparsityReport, but got None"),
        (
            (net, report, 1),
            TypeError,
            "expected `optimizer` to be a torch.optim.Optimizer or None, but got an int",
        ),
        ((None, report), TypeError, "expected `model` to be a module, but got None"),
        ((net, other), ValueError, "expected `report` to be one of this model, but got one with a module '0.0.1'"),
    ):
        with pytest.raises(error) as caught:
            revive_(*arguments)
        assert str(caught.value) == text
    assert "sparseout" in sparseout.revive_.__module__
    assert math.isfinite(report[0]["hoyer"])


def test_sharded_layers_are_left_even_while_they_are_whole(process_group):
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.rand(8, 4)
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = -1
    fully_shard(model)
    with SparsityMonitor(model) as monitor:
        model.eval()(x)
    assert type(model[0].weight) is nn.Parameter  # after a pass without backward, and lost with the next
    assert revive_(model, monitor.report()).left.keys() == {"1"}
    assert not compact(model, [x]).chains
    assert sparse_linear_(model, [x]).skipped == {"0": "its weight is sharded", "2": "its weight is sharded"}
