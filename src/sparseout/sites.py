"""Where a model is watched: which modules, at their input or at their output, and which tensor and units there."""

import math
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import activation
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import PackedSequence

from sparseout.errors import expected, kind
from sparseout.layers import Sparseout, Sparseout1d, Sparseout2d, Sparseout3d

Modules = Callable[[str, nn.Module], bool] | Collection[str | type[nn.Module]]

# Attention and the softmaxes give distributions, which are no units.
_NO_UNITS = ("MultiheadAttention", "Softmin", "Softmax", "Softmax2d", "LogSoftmax")
ACTIVATIONS: tuple[type[nn.Module], ...] = tuple(
    getattr(activation, name) for name in activation.__all__ if name not in _NO_UNITS
)
NOISES = (Sparseout, _DropoutNd)
ROWS = 4096
# Where the channels are in what these take, by its number of dims.
_CHANNELS: tuple[tuple[tuple[type[nn.Module], ...], Mapping[int, int]], ...] = (
    ((Sparseout1d, nn.Dropout1d), {2: 0, 3: 1}),
    ((Sparseout2d, nn.Dropout2d), {3: 1, 4: 1}),
    ((Sparseout3d, nn.Dropout3d), {4: 0, 5: 1}),
)


class Site(NamedTuple):
    """One place that is watched."""

    name: str
    module: nn.Module
    tensor: str  # "input" | "output"


def choose(model: nn.Module, modules: Modules | None) -> list[Site]:
    """The sites of `model`, in its order, each module once. Raises: TypeError, ValueError."""
    named = dict(model.named_modules(remove_duplicate=False))
    wanted = _wanted(named, modules)
    unique: dict[int, Site] = {}
    for name, module in named.items():
        if name in wanted:
            unique.setdefault(id(module), Site(name, module, "input" if isinstance(module, NOISES) else "output"))
    sites = list(unique.values())
    if not sites and modules is None:
        wish = "a module with activation modules or dropout layers (or `modules` to say what to watch)"
        raise ValueError(expected("model", wish, f"{type(model).__name__} without any"))
    if not sites:
        raise ValueError(expected("modules", f"what matches a module, such as {_some(named)}", "what matches none"))
    return sites


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
    return isinstance(module, (*ACTIVATIONS, *NOISES)) or (leaf and type(module).__name__.endswith("Activation"))


def _some(names: Collection[str], near: str = "") -> str:
    """Up to three names, the closest to `near` if any is close."""
    names = [name for name in names if name]
    close = get_close_matches(near, names, n=3, cutoff=0.5) or names[:3]
    return ", ".join(repr(name) for name in close) or "those of a model with submodules"


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor of at least one dimension that is in `value`."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() and value.ndim else None
    if isinstance(value, PackedSequence):
        return value.data
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((found for item in items if (found := first_tensor(item)) is not None), None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that was written, whose names are meant, of a compiled or distributed one."""
    while (inner := model.module if isinstance(model, DistributedDataParallel) else _compiled(model)) is not model:
        model = inner
    return model


def _compiled(model: nn.Module) -> nn.Module:
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def channel_dim(module: nn.Module, ndim: int) -> int | None:
    """Where the channels of an input of `ndim` dims are, if `module` is of a class that knows; else None."""
    for classes, dims in _CHANNELS:
        if isinstance(module, classes):
            return dims.get(ndim)
    return None


def unit_dim(x: Tensor, given: int | None, module: nn.Module | None = None) -> int:
    """Where the units of `x` lie: as given, as `module` has it, else 1 for maps and volumes and -1 for others."""
    if given is None and module is not None:
        given = channel_dim(module, x.ndim)
    return given if given is not None else 1 if x.ndim in (4, 5) else -1


def stride(rows: int) -> int:
    """The least step that leaves at most `ROWS` of so many rows and has no factor in common with their number.

    With a common factor it could meet the same few positions of every image, borders only for one.
    """
    step = max(1, -(-rows // ROWS))
    while math.gcd(step, rows) > 1 and rows:
        step += 1
    return step


def sampled(x: Tensor, dim: int) -> Tensor:
    """Rows of `x`, (rows, units), with units along `dim`: every `stride`-th of them."""
    x = x.detach().movedim(dim, -1)
    shape = x.shape[:-1]
    count = math.prod(shape)
    if (step := stride(count)) == 1:
        return x.reshape(count, x.shape[-1])
    number = torch.arange(0, count, step, device=x.device)
    places = []
    for size in reversed(shape):
        places.append(number % size)
        number = number // size
    return x[tuple(reversed(places))]
