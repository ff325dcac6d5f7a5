"""The one form of every error about an argument."""

from typing import Any


def expected(name: str, wanted: str, got: Any) -> str:
    """The sentence "expected `name` to be wanted, but got got"."""
    return f"expected `{name}` to be {wanted}, but got {got}"


def kind(value: Any) -> str:
    """How to name a value whose type is wrong: short ones in full, others by their type."""
    if value is None or isinstance(value, (bool, str)):
        return repr(value)
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"
