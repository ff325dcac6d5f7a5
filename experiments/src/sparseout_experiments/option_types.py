"""The kinds of options: pydantic types that also know what completes "expected `p` to be ..."."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BeforeValidator, Field, StrictBool, StringConstraints, TypeAdapter, ValidationError


@dataclass(frozen=True)
class Wanted:
    """What a value is wanted to be, in an error, and how the command line's help calls it."""

    text: str
    metavar: str = "NUMBER"


def _number(value: Any) -> Any:
    if isinstance(value, bool):  # to Python a number
        raise ValueError
    return value


def _path(value: Any) -> Any:
    if value == "":  # to Python the folder where one is
        raise ValueError
    return os.path.expanduser(value)  # a shell leaves the ~ of --out=~/runs as it is


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    try:
        return int(value) if isinstance(value, (int, str)) else _integer(value)
    except ValueError:
        return _integer(float(value))  # 1e3


def _integer(value: float) -> int:
    if value % 1 != 0:  # infinity too
        raise ValueError
    return int(value)


def _scale(value: Any) -> float | str:
    if value in ("paper", "matched"):
        return str(value)
    return _checked(float, value, lambda number: 0 < number < float("inf"))


def _winners(value: Any) -> float | int:
    count = _checked(float, value, lambda count: 0 < count < 1 or (count >= 1 and count % 1 == 0))
    return count if count < 1 else int(count)


def _depth(value: Any) -> int:
    return int(_checked(float, value, lambda depth: depth >= 10 and depth % 6 == 4))


def _checked(kind: type[float], value: Any, holds: Callable[[float], bool]) -> float:
    number = kind(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else float("nan")
    if not holds(number):
        raise ValueError
    return number


_Finite = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
NonNegative = Annotated[_Finite, Field(ge=0), Wanted("a finite number >= 0")]
Positive = Annotated[_Finite, Field(gt=0), Wanted("a finite number > 0")]
Probability = Annotated[_Finite, Field(ge=0, lt=1), Wanted("a number >= 0 and < 1")]
Fraction = Annotated[_Finite, Field(ge=0, le=1), Wanted("a number >= 0 and <= 1")]
Sparsity = Annotated[_Finite, Field(gt=0, lt=1), Wanted("a number > 0 and < 1")]
_Integer = Annotated[int, BeforeValidator(_whole)]
Seed = Annotated[_Integer, Field(ge=0), Wanted("a whole number >= 0", "N")]
Count = Annotated[_Integer, Field(ge=1), Wanted("a whole number >= 1", "N")]
AtLeast2 = Annotated[_Integer, Field(ge=2), Wanted("a whole number >= 2", "N")]
AtLeast3 = Annotated[_Integer, Field(ge=3), Wanted("a whole number >= 3", "N")]
Depth = Annotated[int, BeforeValidator(_depth), Wanted("6 n + 4 with n >= 1", "N")]
Text = Annotated[str, StringConstraints(min_length=1), Wanted("a text", "TEXT")]
Tracker = Annotated[str, StringConstraints(min_length=1), Wanted("the name of a tracker", "NAME")]
Flag = Annotated[StrictBool, Wanted("true or false")]
Scale = Annotated[
    float | str,
    BeforeValidator(_scale),
    Wanted(
        "paper (beta = 1), matched (the power of Dropout's noise) or a number > 0 (the unit of x)",
        "paper|matched|NUMBER",
    ),
]
Winners = Annotated[
    float | int,
    BeforeValidator(_winners),
    Wanted("a number > 0 and < 1 (the fraction of units) or a whole number >= 1 (of units)"),
]


def option(default: Any, help: str, *, shown: Any = None) -> Any:
    """A field of a class of options: its default, or a function of the options read before; `shown` is how it reads."""
    given = {"default_factory": default} if callable(default) else {"default": default}
    return Field(**given, description=help, json_schema_extra=None if shown is None else {"default": shown})


Folder = Annotated[Path, BeforeValidator(_path), Wanted("the name of a folder", "FOLDER")]
File = Annotated[Path, BeforeValidator(_path), Wanted("the name of a file", "FILE")]


def choices(kind: Any) -> tuple[str, ...]:
    """The names that a kind allows, if it is one of names."""
    return get_args(kind) if get_origin(kind) is Literal else ()


def wanted(kind: Any) -> Wanted:
    """What a kind wants."""
    if names := choices(kind):
        return Wanted(f"{', '.join(names[:-1])} or {names[-1]}", "|".join(names))
    info: Wanted = next(entry for entry in reversed(get_args(kind)) if isinstance(entry, Wanted))
    return info


def reader(kind: Any) -> Callable[[Any], Any]:
    """What makes a value of a kind of a text. It raises ValueError with the end of "expected `p` to be ..."."""
    adapter: TypeAdapter[Any] = TypeAdapter(kind)

    def read(text: Any) -> Any:
        try:
            return adapter.validate_python(text)
        except ValidationError:
            raise ValueError(f"{wanted(kind).text}, but got {text!r}") from None

    return read
