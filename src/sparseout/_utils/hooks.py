"""Forward hooks of an observer: they read the inputs and outputs of modules, and do nothing in copies and pickles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils.hooks import RemovableHandle

from sparseout._utils.torch_internals import (
    compiler_loaded,
    in_backward,
    is_recorded,
    outside_compiler,
    run_before,
)

_is_uncounted: ContextVar[bool] = ContextVar("sparseout_uncounted", default=False)


@contextmanager
def uncounted() -> Iterator[None]:
    """A block whose passes monitors do not count, for passes that a controller makes."""
    token = _is_uncounted.set(True)
    try:
        yield
    finally:
        _is_uncounted.reset(token)


class Hook:
    """Calls a function with its own arguments followed by those of the hook, except while a graph is exported.

    In compiled code it is compiled along, so the function must allow that. A copy of it, or a pickle, does nothing.
    """

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments
        self._eager = outside_compiler(self._call, type(self).__call__) if compiler_loaded() else self._call

    def __call__(self, *call: Any) -> None:
        if not torch.compiler.is_exporting():
            run = self._call if torch.compiler.is_compiling() else self._eager
            run(*call)

    def _call(self, *call: Any) -> None:
        self.function(*self.arguments, *call)

    def __reduce__(self) -> Any:
        return DeadHook, ()


class EagerHook(Hook):
    """A hook that runs as Python: the compiler breaks its graph there."""

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments
        self._eager = outside_compiler(self._call, type(self).__call__)

    def __call__(self, *call: Any) -> None:
        if not torch.compiler.is_exporting():  # asked in code that an exporter, which cannot break a graph, reads
            self._eager(*call)


class DeadHook:
    """A hook that does nothing, in place of another in copies and pickles of a model."""

    def __call__(self, *call: Any) -> None:
        pass


def is_counted(*values: Any) -> bool:
    """Whether a pass over what is in these values counts.

    What activation checkpointing computes again in backward does not, nor does a pass over meta or fake tensors, nor
    one that is traced or exported, nor one in a block of :func:`uncounted`.
    """
    if _is_uncounted.get():
        return False
    tensors: list[Tensor] = []
    return _collect(values, tensors) and not in_backward() and not is_recorded(tensors)


def _collect(value: Any, tensors: list[Tensor]) -> bool:
    """Put the tensors that are in `value` into `tensors`; False for the stand-ins of `torch.fx`."""
    if isinstance(value, Tensor):
        tensors.append(value)
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return not isinstance(value, Proxy) and all(_collect(item, tensors) for item in items)


class Hooks:
    """The hooks of one observer, removed together. A copy of it holds none: those of the copied model are dead.

    Functions get, after arguments of their own, (module, args, kwargs) before a call and (module, args, output) after.
    """

    def __init__(self, hook_type: Callable[..., Any] = Hook) -> None:
        self._hook_type = hook_type
        self._handles: list[RemovableHandle] = []

    def before(self, module: nn.Module, function: Callable[..., None], *arguments: Any) -> None:
        """Call `function` before every call of `module`."""
        hook = self._hook_type(function, *arguments)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, function: Callable[..., None], *arguments: Any, always: bool = False) -> None:
        """Call `function` after every call of `module`, and before noise is added to its output.

        With `always` also after an error, then without an output, and last.
        """
        handle = module.register_forward_hook(self._hook_type(function, *arguments), always_call=always)
        if not always:
            run_before(module, handle, lambda hook: getattr(hook, "_is_noise", False))
        self._handles.append(handle)

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __bool__(self) -> bool:
        return bool(self._handles)

    def __reduce__(self) -> Any:
        return Hooks, (self._hook_type,)
