"""The types of options: those of pydantic, which also know what completes "expected `p` to be ..."."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, StringConstraints, TypeAdapter, ValidationError


@dataclass(frozen=True)
class Requirement:
    """Requirement on a value, in the words of an error, and its name in the command line's help."""

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


def _whole(value: Any) -> Any:
    return float(value) if isinstance(value, str) and "e" in value.lower() else _number(value)  # 1e3


def _depth(value: int) -> int:
    if value % 6 != 4:
        raise ValueError
    return value


_Finite = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
NonNegative = Annotated[_Finite, Field(ge=0), Requirement("a finite number >= 0")]
Positive = Annotated[_Finite, Field(gt=0), Requirement("a finite number > 0")]
Probability = Annotated[_Finite, Field(ge=0, lt=1), Requirement("a number >= 0 and < 1")]
Fraction = Annotated[_Finite, Field(ge=0, le=1), Requirement("a number >= 0 and <= 1")]
Sparsity = Annotated[_Finite, Field(gt=0, lt=1), Requirement("a number > 0 and < 1")]
_Integer = Annotated[int, BeforeValidator(_whole)]
Seed = Annotated[_Integer, Field(ge=0), Requirement("a whole number >= 0", "N")]
TorchSeed = Annotated[_Integer, Field(ge=0, lt=2**64), Requirement("a whole number >= 0 and < 2^64", "N")]
Count = Annotated[_Integer, Field(ge=1), Requirement("a whole number >= 1", "N")]
AtLeast2 = Annotated[_Integer, Field(ge=2), Requirement("a whole number >= 2", "N")]
AtLeast3 = Annotated[_Integer, Field(ge=3), Requirement("a whole number >= 3", "N")]
Depth = Annotated[_Integer, Field(ge=10), AfterValidator(_depth), Requirement("6 n + 4 with n >= 1", "N")]
Text = Annotated[str, StringConstraints(min_length=1), Requirement("a text", "TEXT")]
Tracker = Annotated[str, StringConstraints(min_length=1), Requirement("the name of a tracker", "NAME")]
Flag = Annotated[StrictBool, Requirement("true or false")]
Scale = Annotated[
    Literal["paper", "matched"] | Positive,
    Requirement(
        "paper (beta = 1), matched (the power of Dropout's noise) or a number > 0 (the unit of x)",
        "paper|matched|NUMBER",
    ),
]
Winners = Annotated[
    Sparsity | Count,
    Requirement("a number > 0 and < 1 (the fraction of units) or a whole number >= 1 (of units)"),
]


def option(default: Any, help: str, *, shown: Any = None) -> Any:
    """A field of a class of options: its default, or a function of the options read before; `shown` is how it reads."""
    source = {"default_factory": default} if callable(default) else {"default": default}
    return Field(**source, description=help, json_schema_extra=None if shown is None else {"default": shown})


Folder = Annotated[Path, BeforeValidator(_path), Requirement("the name of a folder", "FOLDER")]
File = Annotated[Path, BeforeValidator(_path), Requirement("the name of a file", "FILE")]


def choices(type_: Any) -> tuple[str, ...]:
    """The names that a type allows, if it is one of names."""
    return get_args(type_) if get_origin(type_) is Literal else ()


def requirement(type_: Any) -> Requirement:
    """The requirement of a type."""
    if names := choices(type_):
        return Requirement(f"{', '.join(names[:-1])} or {names[-1]}", "|".join(names))
    return next(entry for entry in reversed(get_args(type_)) if isinstance(entry, Requirement))


def reader(type_: Any) -> Callable[[Any], Any]:
    """A function that reads a text as a type. It raises ValueError with the end of "expected `p` to be ..."."""
    adapter: TypeAdapter[Any] = TypeAdapter(type_)

    def read(text: Any) -> Any:
        try:
            return adapter.validate_python(text)
        except ValidationError:
            raise ValueError(f"{requirement(type_).text}, but got {text!r}") from None

    return read
