"""Messages of the command line beside its results: one line on standard error.

It imports nothing that takes time, nor does what is imported with it: the library would bring torch, and `--help` and
the completion of a shell would take seconds.
"""

import sys

_ended = False


def show_message(sentence: str, *, last: bool = False) -> None:
    """Print a sentence for the user; `last` is that with which the command ends."""
    global _ended
    _ended = _ended or last
    print(f"sparseout: {sentence}", file=sys.stderr, flush=True)


def expected(name: str, wanted: str, got: object) -> str:
    """The sentence "expected `name` to be wanted, but got got", which is the library's too."""
    return f"expected `{name}` to be {wanted}, but got {got}"


def has_ended() -> bool:
    """Whether the last sentence has been printed."""
    return _ended
