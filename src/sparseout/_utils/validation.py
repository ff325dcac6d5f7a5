"""Checks of arguments, and the one form of their errors. Each check returns the value that it lets pass."""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


def expected(name: str, wanted: str, got: Any) -> str:
    """The sentence "expected `name` to be wanted, but got got"."""
    return f"expected `{name}` to be {wanted}, but got {got}"


def type_name(value: Any) -> str:
    """The name of a value whose type is wrong: short ones in full, others by their type."""
    if value is None or isinstance(value, (bool, str)):
        return repr(value)
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


def is_number(value: Any) -> bool:
    """Whether `value` is a real number, of numpy too, and no bool."""
    return isinstance(value, (int, float, numbers.Real)) and not isinstance(value, bool)


def is_int(value: Any) -> bool:
    """Whether `value` is an int and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_number(
    name: str, value: Any, wanted: str = "a finite number", condition: Callable[[float], bool] = math.isfinite
) -> float:
    """A number that meets a `condition`, as a float. TypeError if it is none, ValueError if it is not as `wanted`."""
    if not is_number(value):
        raise TypeError(expected(name, wanted, type_name(value)))
    if not condition(float(value)):
        raise ValueError(expected(name, wanted, value))
    return float(value)


def check_scalar(name: str, value: Tensor) -> Tensor:
    """A tensor in the place of a number, which may be changed in place: 0-d, floating-point and without gradient."""
    if value.dim() != 0 or not value.is_floating_point():
        got = f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
        raise TypeError(expected(name, "a number or a 0-d floating-point tensor", got))
    if value.requires_grad:
        raise ValueError(expected(name, "a tensor without gradient", "one that requires it"))
    return value


def check_positive(name: str, value: Any, zero: bool = False) -> float:
    """A finite number > 0, or >= 0 with `zero`, as a float."""
    wanted = f"a finite number {'>=' if zero else '>'} 0"
    return check_number(name, value, wanted, lambda number: 0 < number < math.inf or (zero and number == 0))


def check_probability(value: Any) -> float:
    """A `p` of which p / (1 - p) is finite."""
    return check_number("p", value, "a number >= 0 and < 1", lambda p: 0 <= p < 1)


def check_int(name: str, value: Any, least: int | None = None) -> int:
    """An int, of `least` or more. TypeError if it is none, ValueError if it is less."""
    wanted = "an int" if least is None else f"an int >= {least}"
    if not is_int(value):
        raise TypeError(expected(name, wanted, type_name(value)))
    if least is not None and value < least:
        raise ValueError(expected(name, wanted, value))
    return value  # type: ignore[no-any-return]


def check_bool(name: str, value: Any) -> bool:
    """True or False. TypeError if it is neither."""
    if not isinstance(value, bool):
        raise TypeError(expected(name, "a bool", type_name(value)))
    return value


def check_floating(name: str, value: Any) -> None:
    """Raise TypeError unless it is a floating-point tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type_name(value)
        raise TypeError(expected(name, "a floating-point tensor", got))


def check_dim(name: str, dim: int, ndim: int) -> int:
    """A dim of a tensor with `ndim` of them, of which there is one at least; raises ValueError for another."""
    if not -ndim <= dim < ndim:
        raise ValueError(expected(name, f"in [{-ndim}, {ndim - 1}]", dim))
    return dim


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of the `choices`. ValueError if it is none of them."""
    if not isinstance(value, str) or value not in choices:
        *first, last = map(repr, choices)
        raise ValueError(expected(name, f"{', '.join(first)} or {last}", repr(value)))
    return value
