"""Private names of torch, one function each: a torch that renames one breaks here only.

Layers override `_apply` and `_load_from_state_dict`, torch's own points of extension, in their classes.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active, _is_tracing, _len_torch_dispatch_stack
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch._functorch import pyfunctorch
from torch.autograd import forward_ad
from torch.nn.modules import batchnorm, dropout
from torch.utils import _python_dispatch, _pytree
from torch.utils.hooks import RemovableHandle

DROPOUT_BASE: type[nn.Module] = dropout._DropoutNd  # of nn.Dropout, 1d, 2d, 3d, AlphaDropout and FeatureAlphaDropout
BatchNormBase = batchnorm._BatchNorm  # of nn.BatchNorm1d, 2d, 3d and SyncBatchNorm
DispatchMode = _python_dispatch.TorchDispatchMode
tree_leaves = _pytree.tree_leaves
AnyModule = TypeVar("AnyModule", bound=nn.Module)
_PLAIN = (Tensor, nn.Parameter)


def own_children(module: nn.Module) -> Mapping[str, nn.Module | None]:
    """The children by each of their names, where `named_children` has a shared child once."""
    return dict(module._modules.items())  # of a ScriptModule they are no dict


def shallow_copy(module: AnyModule, parameters: Mapping[str, nn.Parameter] | None = None) -> AnyModule:
    """A copy that shares tensors and children, but for these parameters: what is set on it is not set on the module."""
    copy = object.__new__(type(module))
    vars(copy).update(vars(module))
    for name in ("_parameters", "_buffers", "_modules"):
        vars(copy)[name] = dict(vars(module)[name])
    vars(copy)["_parameters"].update(parameters or {})
    return copy


def call_hooks(module: nn.Module) -> list[Any]:
    """The hooks that a call of the module runs, before it and after it."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def gradient_hooks(module: nn.Module) -> list[Any]:
    """The hooks that backward through a call of the module runs."""
    return [*module._backward_pre_hooks.values(), *module._backward_hooks.values()]


def remove_call_hooks(module: nn.Module, cls: type) -> bool:
    """Remove the hooks of a class that calls of the module run. Returns whether there was one."""
    removed = False
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, cls)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            removed = True
    return removed


def run_before(module: nn.Module, handle: RemovableHandle, is_last: Callable[[Any], bool]) -> None:
    """Put the hook of this handle, which runs after calls, before the first that `is_last` chooses."""
    hooks = module._forward_hooks
    keys = list(hooks)
    first = next((index for index, key in enumerate(keys) if is_last(hooks[key])), len(keys))
    for key in keys[first:]:
        if key != handle.id:
            hooks.move_to_end(key)  # type: ignore[attr-defined]  # an OrderedDict


def has_parameter_hooks(parameter: nn.Parameter) -> bool:
    """Whether a parameter has hooks on its gradient."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def tensor_version(x: Tensor) -> int | None:
    """The number of in-place changes of a tensor so far; None for inference tensors, which do not count them."""
    return None if x.is_inference() else x._version


def conv_forward(layer: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The forward of a convolution with another weight."""
    out: Tensor = layer._conv_forward(input, weight, bias)
    return out


def transforms_active() -> bool:
    """Whether a functorch transform (vmap, grad, jvp, ...) or a level of forward-mode differentiation is open."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_untouched(x: Tensor) -> bool:
    """Whether nothing but autograd is to see what happens to `x`, in one question, as small tensors cannot wait.

    No compiler, tracer, mode or transform, no subclass, and memory that holds what the tensor says.
    """
    return not (
        torch.compiler.is_compiling()  # first, as the compiler would have to follow the others
        or type(x) not in _PLAIN
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _len_torch_dispatch_stack()
        or _is_tracing()
        or x.is_neg()  # the dispatcher takes care of these three: what is to be negated, ...
        or x._is_zerotensor()  # the zeros that autograd passes on without writing them down, ...
        or is_functorch_wrapped_tensor(x)  # and what a transform that is over has left
    )


def dispatch_mode_active() -> bool:
    """Whether a `TorchDispatchMode` sees every operation: fake tensors, `make_fx`, a counter of FLOPs."""
    return _len_torch_dispatch_stack() > 0


def is_tracing() -> bool:
    """Whether `torch.jit.trace` records."""
    return torch.jit.is_tracing()  # type: ignore[attr-defined, no-any-return, no-untyped-call]  # public, if untyped


def readable(value: Any) -> Any:
    """A 0-d tensor as the float that it holds, but in code that is compiled or recorded, where it stays a tensor."""
    if not isinstance(value, Tensor) or torch.compiler.is_compiling() or dispatch_mode_active() or is_tracing():
        return value
    return float(value)


def is_recorded(tensors: Sequence[Tensor]) -> bool:
    """Whether a pass over these tensors computes no values, or is written down: meta, fake, traced, exported."""
    if torch.compiler.is_exporting() or is_tracing() or any(x.is_meta for x in tensors):
        return True
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")  # else nothing is recorded by it
    if proxies is not None and proxies.get_proxy_mode() is not None:
        return True
    if not dispatch_mode_active() and all(type(x) in (Tensor, nn.Parameter) for x in tensors):
        return False  # soon said, as it is asked at every call of a watched module
    return torch._guards.detect_fake_mode(tensors) is not None


@contextmanager
def outside_transforms() -> Iterator[None]:
    """A block of plain torch: no functorch transform, no dispatch mode, no inference mode, no gradients.

    What is made there outlives whatever is open around. Dispatch modes do not see it: that of selective activation
    checkpointing takes what is computed again by its order, which a hook would disturb.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_python_dispatch._disable_current_modes())
        if _are_functorch_transforms_active():
            stack.enter_context(pyfunctorch.temporarily_clear_interpreter_stack())
        yield


def without_transforms(x: Tensor) -> Tensor:
    """The values of `x` for all examples of a vmap, whose dims come first; for use in `outside_transforms`."""
    functorch, batch_dims = torch._C._functorch, []
    while is_functorch_wrapped_tensor(x):
        batch_dims.append(functorch.maybe_get_bdim(x) if functorch.is_batchedtensor(x) else -1)
        x = functorch.get_unwrapped(x)
    front = 0
    for dim in reversed(batch_dims):  # each counts without the batch dims further in
        if dim >= 0:
            x = x.movedim(dim + front, 0)
            front += 1
    return forward_ad.unpack_dual(x).primal if forward_ad._current_level >= 0 else x


def is_transformed(x: Tensor) -> bool:
    """Whether `x` is of a functorch transform, after whose end it is dead."""
    return is_functorch_wrapped_tensor(x)


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The function's `apply` without what that does for functorch's transforms, a third of its time."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc, no-any-return]


def is_batched_gradient(grad: Tensor) -> bool:
    """Whether `grad` holds many gradients at once, as `is_grads_batched=True` passes them to a backward."""
    return is_legacy_batchedtensor(grad)


def in_backward() -> bool:
    """Whether autograd's backward runs in this thread, as it does when a checkpoint computes its forward again."""
    return backward_number() != -1


def backward_number() -> int:
    """The number of the backward pass that runs in this thread, another one for each; -1 if none does."""
    return torch._C._current_graph_task_id()


def outside_compiler(function: Callable[..., None], caller: Callable[..., Any]) -> Callable[..., None]:
    """The function, kept from the compiler; so is the code of its caller, but where compiled code calls that."""
    from torch._dynamo import eval_frame

    eval_frame.skip_code(caller.__code__)
    eager: Callable[..., None] = torch.compiler.disable(function)
    return eager


def allow_side_effect(function: Callable[..., None], *args: Any) -> None:
    """Call a function, in code that is compiled, that leaves something behind, in a checkpoint too."""
    from torch._dynamo import utils

    utils._disable_side_effect_safety_checks_for_current_subtracer(function, *args)


def compiler_loaded() -> bool:
    """Whether the compiler has been imported, without which nothing is compiled. Importing it takes seconds."""
    return "torch._dynamo" in sys.modules


def may_be_empty(x: Tensor) -> bool:
    """Whether `x` has no elements, or a number of them that a compiler or a tracer is not to look at."""
    size = x.numel()
    if torch.compiler.is_compiling():
        from torch.fx.experimental import symbolic_shapes  # not above: it brings sympy, a third of a second

        return symbolic_shapes.guard_or_true(size == 0)
    return size == 0 if type(size) is int else True


def is_sharded(x: Tensor) -> bool:
    """Whether `x` is a DTensor. Only who has made one has imported what knows it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def jagged_parts(x: Any) -> tuple[Tensor, Tensor | None, int]:
    """The values of a jagged tensor, its lengths if there are holes between rows, and the ragged dim of the values."""
    return x.values(), x.lengths(), x._ragged_idx - 1


def with_values(x: Any, values: Tensor) -> Tensor:
    """A jagged tensor of other values, ragged as `x` is, so that the two can be added."""
    return torch.nested.nested_tensor_from_jagged(
        values,
        x.offsets(),
        x.lengths(),
        x._ragged_idx,
        min_seqlen=x._maybe_min_seqlen,
        max_seqlen=x._maybe_max_seqlen,
    )


def may_be_recomputed() -> bool:
    """Whether a checkpoint may compute this forward again: it turns gradients off, or has hooks on saved tensors."""
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def checkpoint_number() -> int | None:
    """Identity of the open checkpoint, from the hooks it puts on saved tensors; None if there is none."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else id(hooks[0])


def parallel_for() -> int | None:
    """The address of `torch_parallel_for`, of torch's stable C interface: None before torch 2.10."""
    try:
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).torch_parallel_for, ctypes.c_void_p).value
    except (AttributeError, OSError):
        return None


def is_part_of_fsdp(module: nn.Module) -> bool:
    """Whether FullyShardedDataParallel around `module`, or around what it is in, shards its parameters."""
    return getattr(module, "_is_fsdp_managed_module", False)


def op_name(op: Any) -> str:
    """The name of a registered op with its namespace, such as ``"sparseout::forward"``."""
    name: str = op._qualified_op_name
    return name
