"""Modules of a model: their names without wrappers, those that an argument `modules` selects, and hook points."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.nn.modules import activation
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from sparseout._utils.torch_internals import DROPOUT_BASE, is_part_of_fsdp, own_children
from sparseout._utils.validation import expected, type_name

AnyModule = TypeVar("AnyModule", bound=nn.Module)
Filter = Callable[[str, nn.Module], bool | None]
Modules = Callable[[str, nn.Module], bool] | Collection[str | type[nn.Module]]

# Attention and the softmaxes give distributions, which are no units.
_NO_UNITS = ("MultiheadAttention", "Softmin", "Softmax", "Softmax2d", "LogSoftmax")
ACTIVATIONS: tuple[type[nn.Module], ...] = tuple(
    getattr(activation, name) for name in activation.__all__ if name not in _NO_UNITS
)
# Names of classes without children, but for noise: GELUActivation, GELUTanh, QuickGELU, HardSwish, SwiGLU. DynamicTanh
# takes the place of a layer norm.
_NAMED_ACTIVATION = re.compile("(activation|[a-z]lu|swish|mish|(?<!dynamic)tanh|sigmoid)$", re.IGNORECASE)

# Wrappers: torch.compile, FSDP1 and activation checkpointing hold the module under a private name; others are known by
# their class, those of other libraries by the name of their class.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPERS = (DistributedDataParallel, DataParallel, AveragedModel)
_FOREIGN = {"DeepSpeedEngine": "module", "_FabricModule": "_forward_module"}


class HookPoint(NamedTuple):
    """A hook point of a model: a module, at its input or at its output."""

    name: str
    module: nn.Module
    tensor: str  # "input" | "output"


def check_model(model: Any) -> None:
    """Raise TypeError unless it is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a module", type_name(model)))


def unwrapped(module: nn.Module) -> nn.Module:
    """The user's own module, without the wrappers of torch.compile, DistributedDataParallel and the like."""
    while (inner := _wrapped(module)) is not None:
        module = inner
    return module


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module by each of its names in the user's model: names without wrappers, at any depth."""
    return _named("", unwrapped(model), ())


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on this module."""
    return hasattr(module, "set_requires_gradient_sync")


def sharded_modules(model: nn.Module) -> set[nn.Module]:
    """The modules whose parameters FullyShardedDataParallel or `fully_shard` has, which are whole for a while only."""
    of_fsdp = set(filter(is_part_of_fsdp, model.modules()))
    return of_fsdp.union(*(part.modules() for part in filter(is_fully_sharded, model.modules())))


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module itself by each of their names, without those of its children."""
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def own_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of a module itself by each of their names, without those of its children."""
    return dict(module.named_buffers(recurse=False, remove_duplicate=False))


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module itself by each of their names, without those of its children."""
    return {**own_parameters(module), **own_buffers(module)}


def resolve_filter(filter_fn: Filter | None, module: nn.Module, names: Sequence[str]) -> bool | None:
    """The decision of `filter_fn` about a module with these names: one False is enough, then one True."""
    decisions = [filter_fn(name, module) for name in names] if filter_fn else []
    for decision in decisions:
        if decision is not None and not isinstance(decision, bool):
            raise TypeError(expected("filter_fn", "a function that returns True, False or None", type_name(decision)))
    return False if False in decisions else True if True in decisions else None


def select(candidates: Mapping[str, AnyModule], modules: Any, noun: str = "modules") -> dict[str, AnyModule]:
    """The candidates that `modules` selects, each once, by the first of its names that it selects.

    Args:
        candidates: modules by each of their names.
        modules: a function (name, module) -> bool, or a collection of names and of types; None: all.
        noun: what the candidates are, in errors.

    Raises:
        TypeError: for another kind of argument.
        ValueError: for a name or a type that no candidate has, or if nothing is selected.
    """
    wanted = f"a function (name, module) -> bool, or a collection of dotted names or of types of {noun}"
    if isinstance(modules, (str, type)):
        raise TypeError(expected("modules", wanted, repr(modules) if isinstance(modules, str) else modules.__name__))
    if modules is None:
        names = set(candidates)
    elif callable(modules):
        names = {name for name, module in candidates.items() if modules(name, module)}
    elif isinstance(modules, Collection):
        names = set().union(*(_matches(candidates, item, wanted, noun) for item in modules))
    else:
        raise TypeError(expected("modules", wanted, type_name(modules)))
    if not names:
        near = such_as(candidates)
        raise ValueError(expected("modules", f"what matches some of the {noun}, such as {near}", "what matches none"))
    selected: dict[int, tuple[str, AnyModule]] = {}
    for name, module in candidates.items():
        if name in names:
            selected.setdefault(id(module), (name, module))
    return dict(selected.values())


def choose(model: nn.Module, modules: Modules | None) -> list[HookPoint]:
    """The hook points of `model`, in its order: dropout-like modules at their input, others at their output.

    Raises: TypeError, ValueError.
    """
    candidates = {name: module for name, module in named_modules(model) if modules is not None or _default(module)}
    if not candidates:
        wanted = "a module with activation modules or dropout layers (or `modules` to say what to watch)"
        raise ValueError(expected("model", wanted, f"{type(model).__name__} without any"))
    chosen = select(candidates, modules).items()
    return [HookPoint(name, module, "input" if is_noise(module) else "output") for name, module in chosen]


def is_noise(module: nn.Module) -> bool:
    """Whether it is a layer of noise: Sparseout, which says so itself, or Dropout of any kind."""
    return isinstance(module, DROPOUT_BASE) or getattr(module, "_is_noise", False)


def is_activation(module: nn.Module) -> bool:
    """Whether it is an activation module: of torch, of this library, which says so itself, or one by its name.

    Such are those of transformers and timm, and many of a model's own. What has a matrix of weights is a layer.
    """
    if isinstance(module, ACTIVATIONS) or getattr(module, "_is_activation", False):
        return True
    if not _NAMED_ACTIVATION.search(type(module).__name__) or not all(map(is_noise, module.children())):
        return False
    weights = own_parameters(module).values()
    return not any(is_lazy(weight) or sum(size > 1 for size in weight.shape) > 1 for weight in weights)


def _wrapped(module: nn.Module) -> nn.Module | None:
    children = own_children(module)
    inner = next((children[name] for name in _WRAPPED if name in children), None)
    name = "module" if isinstance(module, _WRAPPERS) else _FOREIGN.get(type(module).__name__)
    return children.get(name or "") if inner is None else inner


def _named(name: str, module: nn.Module, around: tuple[nn.Module, ...]) -> Iterator[tuple[str, nn.Module]]:
    yield name, module
    for key, child in own_children(module).items():
        inner = child if child is None else unwrapped(child)
        if inner is not None and not any(inner is outer for outer in (*around, module)):  # some hold their parent
            yield from _named(f"{name}.{key}" if name else key, inner, (*around, module))


def _matches(candidates: Mapping[str, nn.Module], item: Any, wanted: str, noun: str) -> set[str]:
    if isinstance(item, str):
        if item not in candidates:
            raise ValueError(expected("modules", f"names of {noun}, such as {such_as(candidates, item)}", repr(item)))
        return {item}
    if not (isinstance(item, type) and issubclass(item, nn.Module)):
        raise TypeError(expected("modules", wanted, f"one of {type_name(item)}"))
    matches = {name for name, module in candidates.items() if isinstance(module, item)}
    if not matches:
        types = {type(module).__name__: None for name, module in candidates.items() if name}
        near = such_as(types, item.__name__)
        raise ValueError(expected("modules", f"types of {noun}, such as {near}", item.__name__))
    return matches


def _default(module: nn.Module) -> bool:
    return is_activation(module) or is_noise(module)


def such_as(names: Collection[str], near: str = "") -> str:
    """Up to three names for an error, the closest to `near` if any is close."""
    names = [name for name in names if name]
    close = get_close_matches(near, names, n=3, cutoff=0.5) or names[:3]
    return ", ".join(repr(name) for name in close) or "those of a model with submodules"
