"""A plan of compaction: what it says, when it is stale, and what it leaves as it was."""

import copy

import architectures
import pytest
import torch
from compacting import ROWS, mlp, silence, vgg
from test_chains import Net
from torch import nn

import sparseout
from sparseout.inference import compact


def test_a_failed_pass_leaves_everything():
    model = mlp().train()
    model.insert(2, sparseout.baselines.KWinners(3))  # takes its size at the first call
    duty = model[2].duty_cycle.shape
    with pytest.raises(RuntimeError):
        compact(model, [torch.randn(3, 5).double(), torch.randn(3, 4).double()])
    assert all(module.training for module in model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model[2].duty_cycle.shape == duty


def test_wrapped_for_processes(process_group):
    model = nn.parallel.DistributedDataParallel(mlp())
    silence(model.module[0], [1])
    x = torch.randn(ROWS, 5).double()
    plan = compact(model, [x])
    assert plan.chains[0].removed == (1,)
    with pytest.raises(RuntimeError, match="wrap it afterwards"):
        plan.apply_()
    assert model.module[0].out_features == 16
    compact(model.module, [x]).apply_()
    assert model.module[0].out_features == 15


def test_a_stale_plan_is_an_error():
    model = mlp()
    silence(model[0], [1])
    x = torch.randn(ROWS, 5, dtype=torch.float64)
    changes = [
        lambda m: m[3].weight.data.mul_(2),
        lambda m: m.__setitem__(0, nn.Linear(5, 16).double()),
        lambda m: compact(m, [x]).apply_(),
    ]
    for change in changes:
        other = copy.deepcopy(model)
        plan = compact(other, [x])
        change(other)
        state = copy.deepcopy(other.state_dict())
        with pytest.raises(RuntimeError, match="has not changed since"):
            plan.apply_()
        assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    plan = compact(model, [x])
    twin, its_plan = copy.deepcopy((model, plan))
    its_plan.apply_()
    assert (model[0].out_features, twin[0].out_features) == (16, 15)
    plan.apply_()
    with pytest.raises(RuntimeError, match="this one has"):
        plan.apply_()


def test_nothing_is_touched_by_planning():
    model = vgg().train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model(torch.rand(4, 3, 8, 8).double()).sum().backward()
    silence(model[9], [1])
    before = copy.deepcopy(model.state_dict())
    objects = {name: (id(p), p.data_ptr(), p._version, p.grad) for name, p in model.named_parameters()}
    x = torch.rand(8, 3, 8, 8).double()
    rng = torch.get_rng_state()
    compact(model, iter([x]))
    compact(model, torch.utils.data.DataLoader(x, 4, shuffle=True))
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model] == [position != 1 for position in range(len(model))]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    after = {name: (id(p), p.data_ptr(), p._version, p.grad) for name, p in model.named_parameters()}
    assert all(a[:3] == b[:3] and a[3] is b[3] for a, b in zip(objects.values(), after.values(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_model_trains_on_and_an_optimizers_state_can_be_cut():
    model = mlp()
    silence(model[0], [1, 4])
    x = torch.randn(ROWS, 5, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loss = model(x).sum()
    loss.backward()  # the loss lives on, and the graph with it
    optimizer.step()
    silence(model[0], [1, 4])
    plan = compact(model, [x])
    plan.apply_()
    assert model[0].weight.grad is None
    for name, parameter in model.named_parameters():
        for dim, kept in plan.parameter_masks.get(name, []):
            for key in ("exp_avg", "exp_avg_sq"):
                state = optimizer.state[parameter]
                state[key] = state[key].index_select(dim, kept.nonzero().flatten())
    model(x).sum().backward()
    optimizer.step()
    assert model[0].weight.grad.shape == (14, 5)
    assert loss.grad_fn is not None


def test_batches_of_every_kind_and_a_copy():
    model = mlp()
    silence(model[0], [1])
    x = torch.randn(ROWS, 5, dtype=torch.float64)
    for batches in ([x], [(x, torch.zeros(ROWS))], [{"input": x}], [x[:0], x]):
        assert compact(model, batches).chains[0].removed == (1,)
    compact(model, [x]).apply_()
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.eval()(x), model.eval()(x))
    with pytest.raises(ValueError, match="to have rows"):
        compact(mlp(), [x[:0]])
    with pytest.raises(TypeError, match="put a single batch into a list"):
        compact(mlp(), x)


def test_the_plan_says_what_it_does():
    model = mlp(nn.GELU, bias=False)
    silence(model[0], [3], 0.7)
    text = str(compact(model, [torch.randn(ROWS, 5, dtype=torch.float64)]))
    assert "1 of 24 hidden units go" in text
    assert "0 -> 3" in text
    assert "1 of 16 units: 1 constant" in text
    assert "is what the model returns" in text
    assert "New parameters: 3.bias." in text
    assert "optimizer is not carried over" in text


def test_a_layer_that_is_not_called_is_left():
    model = Net(lambda m, x: x * 1.0)
    model.unused = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    plan = compact(model, [torch.ones(2, 3)])
    assert not plan.chains
    assert plan.unreached["unused.0"]


def test_padding_is_no_row():
    model, batch = architectures.transformer("bert")
    model = model.double().eval()
    del batch["labels"]
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    layer = model.bert.encoder.layer[0].intermediate
    layer.intermediate_act_fn = nn.ReLU()
    full = compact(model, [batch])
    batch["attention_mask"][:, 3:] = 0
    plan = compact(model, [batch])
    assert (full.chains[0].rows, plan.chains[0].rows) == (12, 6)
    assert len(plan.chains[0].removed) > len(full.chains[0].removed)
    before = model(**batch).logits[:, :3]
    plan.apply_()
    torch.testing.assert_close(model(**batch).logits[:, :3], before, rtol=0, atol=1e-12)
    other = compact(mlp(), [torch.randn(8, 5).double()])
    with sparseout.row_mask(torch.tensor([1] * 6 + [0] * 2)):
        assert compact(mlp(), [torch.randn(8, 5).double()]).chains[0].rows == other.chains[0].rows - 2 == 6
