"""Each private part of torch still means what the library takes it for: what a new torch breaks fails here by name."""

import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sparseout._utils import torch_internals as internals


def test_dropout_base():
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    assert all(issubclass(kind, internals.DROPOUT_BASE) for kind in kinds)
    assert not issubclass(nn.Linear, internals.DROPOUT_BASE)


def test_batch_norm_base():
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    assert all(issubclass(kind, internals.BatchNormBase) for kind in kinds)
    assert not issubclass(nn.GroupNorm, internals.BatchNormBase)


def test_own_children():
    shared = nn.ReLU()
    model = nn.Sequential(shared, shared)
    model.add_module("none", None)
    assert internals.own_children(model) == {"0": shared, "1": shared, "none": None}
    assert list(internals.own_children(torch.jit.script(nn.Sequential(nn.ReLU())))) == ["0"]


def test_shallow_copy():
    layer = nn.Linear(2, 3)
    weight = nn.Parameter(torch.ones(3, 2))
    copy = internals.shallow_copy(layer, {"weight": weight})
    copy.training, copy.other = False, nn.ReLU()
    assert (copy.weight, copy.bias) == (weight, layer.bias)
    assert type(copy) is nn.Linear
    assert layer.training
    assert layer.weight is not weight
    assert not hasattr(layer, "other")


def test_call_hooks_and_remove_call_hooks():
    class Before:
        def __call__(self, module, args, kwargs):
            calls.append("before")

    class After:
        def __call__(self, module, args, output):
            calls.append("after")

    calls, layer = [], nn.Linear(2, 2)
    layer.register_forward_pre_hook(Before(), with_kwargs=True)
    layer.register_forward_hook(After())
    layer.register_full_backward_hook(lambda *args: None)
    assert [type(hook) for hook in internals.call_hooks(layer)] == [Before, After]
    assert internals.remove_call_hooks(layer, Before)
    assert not internals.remove_call_hooks(layer, Before)
    layer(torch.ones(1, 2))
    assert calls == ["after"]
    assert internals.remove_call_hooks(layer, After)
    layer.register_forward_pre_hook(lambda module, args: calls.append(args))  # without keyword arguments
    layer(torch.ones(1, 2))
    assert len(calls[1]) == 1


def test_run_before():
    calls, layer = [], nn.Linear(2, 2)
    handles = {name: layer.register_forward_hook(lambda *_, name=name: calls.append(name)) for name in "abcd"}
    internals.run_before(layer, handles["d"], lambda hook: hook.__kwdefaults__["name"] == "b")
    layer(torch.ones(1, 2))
    assert calls == ["a", "d", "b", "c"]


@pytest.mark.parametrize("name", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_gradient_hooks(name):
    layer = nn.Linear(2, 2)
    assert internals.gradient_hooks(layer) == []
    handle = getattr(layer, name)(lambda *args: None)
    assert len(internals.gradient_hooks(layer)) == 1
    handle.remove()
    assert internals.gradient_hooks(layer) == []


@pytest.mark.parametrize("name", ["register_hook", "register_post_accumulate_grad_hook"])
def test_has_parameter_hooks(name):
    parameter = nn.Parameter(torch.ones(1))
    assert not internals.has_parameter_hooks(parameter)
    getattr(parameter, name)(lambda *args: None)
    assert internals.has_parameter_hooks(parameter)


def test_tensor_version():
    x = torch.zeros(2)
    before = internals.tensor_version(x)
    x.add_(1)
    assert internals.tensor_version(x) > before
    with torch.inference_mode():
        assert internals.tensor_version(torch.zeros(2)) is None


def test_conv_forward():
    layer = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular", bias=False)
    x = torch.randn(1, 1, 4, 4)
    assert torch.equal(internals.conv_forward(layer, x, layer.weight * 2, None), layer(x) * 2)


def test_dispatch_mode():
    names = []

    class Mode(internals.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.zeros(2) + 1
    assert names[-1] == "add"


def test_tree_leaves():
    assert internals.tree_leaves(([1, (2, {"a": 3})], {"b": 4})) == [1, 2, 3, 4]


def test_transforms_active():
    inside = []

    def f(x):
        inside.append(internals.transforms_active())
        return x.sum()

    torch.vmap(f)(torch.ones(2, 3))
    torch.func.grad(f)(torch.ones(3))
    torch.func.jvp(f, (torch.ones(3),), (torch.ones(3),))
    with forward_ad.dual_level():
        f(torch.ones(3))
    assert inside == [True] * 4
    assert not internals.transforms_active()


def test_is_untouched():
    plain, seen, kept = torch.ones(3), [], []

    def see(x):
        kept.append(x)
        seen.append((internals.is_untouched(x), internals.is_untouched(plain)))
        return x.sum()

    assert internals.is_untouched(plain)
    assert internals.is_untouched(nn.Parameter(plain))
    torch.vmap(see)(torch.ones(2, 3))
    torch.func.grad(see)(torch.ones(3))
    with forward_ad.dual_level():
        see(plain)
    with FakeTensorMode():
        see(torch.ones(3))
    torch.jit.trace(see, torch.ones(3), check_trace=False)  # which would run it untraced
    assert len(seen) >= 5
    assert not any(answer for answers in seen for answer in answers)
    left, of_subclass = kept[1], torch.ones(3).as_subclass(type("Sub", (torch.Tensor,), {}))
    for x in (left, of_subclass, torch.ones(3, dtype=torch.cfloat).conj().imag, torch._efficientzerotensor(3)):
        assert not internals.is_untouched(x)


def test_direct_apply():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            ctx.factor = factor
            return x * factor

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.factor, None

    x = torch.ones(3, requires_grad=True)
    y = internals.direct_apply(Double)(x, 2)
    y.sum().backward()
    assert torch.equal(y, torch.full((3,), 2.0))
    assert torch.equal(x.grad, y)


def test_dispatch_mode_active():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    assert not internals.dispatch_mode_active()
    with Mode():
        assert internals.dispatch_mode_active()


def test_is_tracing():
    inside = []
    torch.jit.trace(lambda x: (inside.append(internals.is_tracing()), x + 1)[1], torch.ones(2), check_trace=False)
    assert inside == [True]
    assert not internals.is_tracing()


def test_readable():
    assert (half := internals.readable(torch.tensor(0.5))) == 0.5
    assert isinstance(half, float)
    assert internals.readable(3) == 3
    inside = []
    torch.jit.trace(lambda x: inside.append(internals.readable(x.sum())) or x * 2, torch.ones(2), check_trace=False)
    compiled = torch.compile(lambda x, p: x * internals.readable(p), backend="eager", fullgraph=True)
    assert isinstance(inside[0], torch.Tensor)
    assert compiled(torch.ones(2), torch.tensor(0.5)).tolist() == [0.5, 0.5]


def test_is_batched_gradient():
    inside = []
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: inside.append(internals.is_batched_gradient(grad)))
    torch.autograd.grad(y, x, torch.ones(3), retain_graph=True)
    torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True)
    assert inside == [False, True]


def test_backward_number():
    numbers, x = [], torch.ones(3, requires_grad=True)
    x.register_hook(lambda grad: numbers.append(internals.backward_number()))
    for _ in range(2):
        x.sum().backward()
    assert len({*numbers, internals.backward_number()}) == 3
    assert internals.backward_number() == -1


def test_in_backward():
    inside = []
    x = torch.ones(3, requires_grad=True)
    x.register_hook(lambda grad: inside.append(internals.in_backward()))
    x.sum().backward()
    assert inside == [True]
    assert not internals.in_backward()


def test_compiler_loaded(monkeypatch):
    """That neither torch nor the library loads it, test_import.py asks a new process."""
    torch.compile(lambda x: x, backend="eager")(torch.ones(1))
    assert internals.compiler_loaded()
    monkeypatch.delitem(sys.modules, "torch._dynamo")
    assert not internals.compiler_loaded()


@pytest.mark.parametrize("size", [0, 3])
def test_may_be_empty(size):
    assert internals.may_be_empty(torch.ones(size)) == (size == 0)
    seen = []

    def f(x):
        seen.append(internals.may_be_empty(x))
        return x + 1

    torch.compile(f, backend="eager", fullgraph=True, dynamic=False)(torch.ones(size))
    assert seen == [size == 0]
    make_fx(f, tracing_mode="symbolic")(torch.ones(size + 2))
    assert seen[-1]  # how many there are is not to be looked at


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_jagged_parts_and_with_values():
    x = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged)
    values, lengths, ragged = internals.jagged_parts(x)
    assert (values.shape, lengths, ragged) == ((6, 3), None, 0)
    assert torch.equal(internals.with_values(x, values * 2).values(), (x + x).values())
    assert internals.jagged_parts(x.transpose(1, 2))[2] == 1
    holes = torch.nested.narrow(torch.ones(2, 5, 3), 1, torch.tensor([0, 1]), torch.tensor([2, 3]), layout=torch.jagged)
    assert internals.jagged_parts(holes)[1].tolist() == [2, 3]


def test_is_sharded_asks_nothing_of_plain_tensors():
    assert not internals.is_sharded(torch.ones(2))


@pytest.mark.parametrize("reentrant", [True, False])
def test_may_be_recomputed(reentrant):
    seen = []

    def f(x):
        seen.append((internals.may_be_recomputed(), internals.in_backward()))
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    f(x)
    checkpoint(f, x, use_reentrant=reentrant).sum().backward()
    assert [recomputed for recomputed, backward in seen if not backward] == [False, True]
    assert len(seen) == 3


def test_is_transformed():
    inside = []
    torch.vmap(lambda x: inside.append(internals.is_transformed(x)) or x)(torch.ones(2))
    torch.func.grad(lambda x: inside.append(internals.is_transformed(x)) or x.sum())(torch.ones(2))
    assert inside == [True, True]
    assert not internals.is_transformed(torch.ones(2))


def test_op_name():
    assert internals.op_name(torch.ops.sparseout.forward) == "sparseout::forward"


def test_is_recorded():
    x = torch.ones(2)
    assert not internals.is_recorded([x])
    assert internals.is_recorded([x, x.to("meta")])
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    assert internals.is_recorded([fake])
    answers = []
    make_fx(lambda x: (answers.append(internals.is_recorded([x])), x + 1)[1])(x)
    assert answers == [True]


def test_outside_transforms_and_without_transforms():
    kept = []

    def inner(x):
        with internals.outside_transforms():
            kept.append(internals.without_transforms(x) * 1)
        return x.sum()

    x = torch.arange(24.0).view(2, 3, 4)
    torch.vmap(torch.vmap(inner, in_dims=1), in_dims=2)(x)  # over the last dim, then over that of 3
    assert torch.equal(kept[0], x.permute(1, 2, 0))
    with torch.inference_mode():
        inner(x)
    torch.func.grad(inner)(x)
    assert not any(value.requires_grad or value.is_inference() for value in kept)


def test_outside_compiler():
    calls = []

    class Caller:
        def __init__(self):
            self.run = internals.outside_compiler(self.note, Caller.__call__)

        def note(self):
            calls.append(torch.compiler.is_compiling())

        def __call__(self):
            self.run()

    caller = Caller()
    torch.compile(lambda x: (caller(), x + 1)[1], backend="eager")(torch.ones(2))
    assert calls == [False]


@pytest.mark.filterwarnings("ignore:FSDP is switching", "ignore:FSDP.*deprecated")
def test_is_part_of_fsdp(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(nn.Sequential(nn.Linear(2, 2)), device_id=torch.device("cpu"))
        assert internals.is_part_of_fsdp(model.module[0])
    finally:
        dist.destroy_process_group()
    assert not internals.is_part_of_fsdp(nn.Linear(2, 2))


def test_allow_side_effect():
    seen = []

    def block(x):
        internals.allow_side_effect(seen.append, 1)
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    f = torch.compile(lambda x: checkpoint(block, x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    f(x).sum().backward()
    assert seen == [1]


def test_checkpoint_number():
    numbers = []

    def block(x):
        numbers.append(internals.checkpoint_number())
        numbers.append(internals.checkpoint_number())
        return x.sin()

    assert internals.checkpoint_number() is None
    x = torch.ones(2, requires_grad=True)
    kept = [checkpoint(block, x, use_reentrant=False) for _ in range(2)]
    assert len(kept) == 2
    assert numbers[0] == numbers[1] != numbers[2] == numbers[3]


def test_parallel_for():
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    assert (internals.parallel_for() is not None) == (release >= (2, 10))
