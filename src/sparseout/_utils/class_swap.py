"""Class swaps: a module gets another class but stays the same object, with its hooks and keys; and their undoing."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from sparseout._utils.modules import named_modules, select
from sparseout._utils.validation import expected, type_name


def forward_replaced(module: nn.Module) -> bool:
    """Whether a forward on the object, such as accelerate's hooks put there, decides in place of the class's."""
    forward = vars(module).get("forward")
    return (
        forward is not None and not _is_class_forward(module, forward) and not getattr(forward, "follows_class", False)
    )


def _is_class_forward(module: nn.Module, forward: Any) -> bool:
    """Whether it is the forward of the class after all, which accelerate leaves on the object."""
    return getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    if _is_class_forward(module, vars(module).get("forward")):
        del vars(module)["forward"]
    module.__class__ = cls


def swap_class_(module: nn.Module, new: type[nn.Module], attributes: Mapping[str, Any], record: str) -> None:
    """Make `module` an instance of `new` with these attributes; its attribute `record` keeps what it was."""
    before = {name: vars(module)[name] for name in attributes if name in vars(module)}
    vars(module).update(attributes, **{record: (type(module), before, new)})
    _set_class(module, new)


def swapped(model: nn.Module, record: str) -> list[nn.Module]:
    """The modules of `model` that have this record of a swap.

    Raises:
        RuntimeError: if one has been changed since, by parametrizations, fully_shard or a forward of its own: given
            its old class it would fail at its next call.
    """
    modules = []
    for name, module in select(dict(named_modules(model)), None).items():
        swap = vars(module).get(record)
        if not isinstance(swap, tuple):
            continue
        new = swap[2] if len(swap) > 2 else type(module)  # models pickled by the first version do not know
        wanted = f"the {new.__name__} that was made of it"
        if type(module) is not new:
            raise RuntimeError(
                expected(name or "model", wanted, f"{type_name(module)}: undo first what made that of it")
            )
        if forward_replaced(module):
            got = "one with another forward on the object: take that away first, as accelerate's hooks can be"
            raise RuntimeError(expected(name or "model", wanted, got))
        modules.append(module)
    return modules


def restore_class_(module: nn.Module, attributes: Collection[str], record: str) -> None:
    """Give `module` its class back, and of the `attributes` those that it had."""
    cls, before, *_ = vars(module).pop(record)
    _set_class(module, cls)
    for name in attributes:
        vars(module).pop(name, None)
    if isinstance(before, Mapping):  # else the names alone, in models pickled by the first version
        vars(module).update(before)
