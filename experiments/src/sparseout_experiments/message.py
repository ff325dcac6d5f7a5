"""What the command line says beside its results: one line on standard error."""

import sys

_ended = False


def tell(sentence: str, *, last: bool = False) -> None:
    """Print a sentence for the user; `last` is that with which the command ends."""
    global _ended
    _ended = _ended or last
    print(f"sparseout: {sentence}", file=sys.stderr, flush=True)


def has_ended() -> bool:
    """Whether the last sentence has been printed."""
    return _ended
