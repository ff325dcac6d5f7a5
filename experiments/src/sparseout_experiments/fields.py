"""The kinds of options: what each means, what it may be, and how it is read."""

import math
from collections.abc import Callable
from dataclasses import field
from typing import Any


def option(default: Any, says: str, wanted: str, read: Callable[[Any], Any]) -> Any:
    """A field: what it means, what completes "expected `p` to be ...", and how a text or value is read.

    `read` raises ValueError where the value is not what was wanted. A default of None stands for "not given"; what
    that amounts to is said in `says`.
    """
    return field(default=default, metadata={"says": says, "wanted": wanted, "read": read})


def reads(holds: Callable[[float], bool]) -> Callable[[Any], float]:
    """What reads a number for which `holds` is true."""

    def read(value: Any) -> float:
        if isinstance(value, bool) or not holds(number := float(value)):
            raise ValueError
        return number

    return read


def number(default: float | None, says: str, *, low: float = 0.0, below: float = math.inf) -> Any:
    """A number in [low, below)."""
    wanted = f"a {'finite ' if below == math.inf else ''}number >= {low:g}" + (
        f" and < {below:g}" if below < math.inf else ""
    )
    return option(default, says, wanted, reads(lambda value: low <= value < below))


def whole(default: int | None, says: str, *, low: int = 1) -> Any:
    """A whole number >= low."""
    check = reads(lambda value: value >= low and value % 1 == 0)

    def read(value: Any) -> int:
        checked = int(check(value))
        try:
            return int(value)  # digit by digit: a float is a whole number of 53 bits
        except ValueError:
            return checked  # 1e3

    return option(default, says, f"a whole number >= {low}", read)


def choice(default: str, says: str, *names: str) -> Any:
    """One of some names."""
    wanted = f"{', '.join(names[:-1])} or {names[-1]}"

    def read(value: Any) -> str:
        if value not in names:
            raise ValueError
        return str(value)

    return option(default, says, wanted, read)


def text(default: str, says: str, wanted: str = "a text") -> Any:
    """Any text but the empty one."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise ValueError
        return value

    return option(default, says, wanted, read)


def flag(default: bool, says: str) -> Any:
    """True or false."""

    def read(value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value

    return option(default, says, "true or false", read)
