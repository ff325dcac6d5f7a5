"""Where a model is watched: which modules, at their input or at their output, and which tensor and units there."""

from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules import activation
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel

from sparseout._utils.validation import expected, kind

Filter = Callable[[str, nn.Module], bool | None]
Modules = Callable[[str, nn.Module], bool] | Collection[str | type[nn.Module]]

# Attention and the softmaxes give distributions, which are no units.
_NO_UNITS = ("MultiheadAttention", "Softmin", "Softmax", "Softmax2d", "LogSoftmax")
ACTIVATIONS: tuple[type[nn.Module], ...] = tuple(
    getattr(activation, name) for name in activation.__all__ if name not in _NO_UNITS
)


class Site(NamedTuple):
    """One place that is watched."""

    name: str
    module: nn.Module
    tensor: str  # "input" | "output"


def check_model(model: Any) -> None:
    """Raise if it is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a module", kind(model)))


def resolve_filter(filter_fn: Filter | None, module: nn.Module, names: Sequence[str]) -> bool | None:
    """What filter_fn says of a module with these names."""
    answers = [filter_fn(name, module) for name in names] if filter_fn else []
    for answer in answers:
        if answer is not None and not isinstance(answer, bool):
            raise TypeError(expected("filter_fn", "a function that returns True, False or None", kind(answer)))
    return False if False in answers else True if True in answers else None


def choose(model: nn.Module, modules: Modules | None) -> list[Site]:
    """The sites of `model`, in its order, each module once. Raises: TypeError, ValueError."""
    named = dict(model.named_modules(remove_duplicate=False))
    wanted = _wanted(named, modules)
    unique: dict[int, Site] = {}
    for name, module in named.items():
        if name in wanted:
            unique.setdefault(id(module), Site(name, module, "input" if is_noise(module) else "output"))
    sites = list(unique.values())
    if not sites and modules is None:
        wish = "a module with activation modules or dropout layers (or `modules` to say what to watch)"
        raise ValueError(expected("model", wish, f"{type(model).__name__} without any"))
    if not sites:
        raise ValueError(expected("modules", f"what matches a module, such as {_some(named)}", "what matches none"))
    return sites


def is_noise(module: nn.Module) -> bool:
    """Whether it is a layer of noise: Sparseout, which says so itself, or Dropout of any kind."""
    return isinstance(module, _DropoutNd) or getattr(module, "_is_noise", False)


def _wanted(named: Mapping[str, nn.Module], modules: Modules | None) -> set[str]:
    wish = "a function (name, module) -> bool, or a collection of dotted names or of module types"
    if modules is None:
        return {name for name, module in named.items() if _default(module)}
    if isinstance(modules, (str, type)):
        raise TypeError(expected("modules", wish, repr(modules) if isinstance(modules, str) else modules.__name__))
    if callable(modules):
        return {name for name, module in named.items() if modules(name, module)}
    if not isinstance(modules, Collection):
        raise TypeError(expected("modules", wish, kind(modules)))
    found = set()
    for item in modules:
        if isinstance(item, str):
            if item not in named:
                raise ValueError(expected("modules", f"names of modules, such as {_some(named, item)}", repr(item)))
            found.add(item)
        elif isinstance(item, type) and issubclass(item, nn.Module):
            some = {name for name, module in named.items() if isinstance(module, item)}
            if not some:
                kinds = {type(module).__name__: None for name, module in named.items() if name}
                near = _some(kinds, item.__name__)
                raise ValueError(expected("modules", f"types of modules, such as {near}", item.__name__))
            found |= some
        else:
            raise TypeError(expected("modules", wish, f"one of {kind(item)}"))
    return found


def _default(module: nn.Module) -> bool:
    leaf = next(module.children(), None) is None
    return (
        isinstance(module, ACTIVATIONS) or is_noise(module) or (leaf and type(module).__name__.endswith("Activation"))
    )


def _some(names: Collection[str], near: str = "") -> str:
    """Up to three names, the closest to `near` if any is close."""
    names = [name for name in names if name]
    close = get_close_matches(near, names, n=3, cutoff=0.5) or names[:3]
    return ", ".join(repr(name) for name in close) or "those of a model with submodules"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that was written, whose names are meant, of a compiled or distributed one."""
    while (inner := model.module if isinstance(model, DistributedDataParallel) else _compiled(model)) is not model:
        model = inner
    return model


def _compiled(model: nn.Module) -> nn.Module:
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner
