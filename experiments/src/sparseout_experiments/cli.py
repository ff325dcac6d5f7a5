"""The command line, `sparseout`: what must work before anything is imported that takes seconds."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from contextlib import contextmanager

from sparseout_experiments.message import has_ended, show_message

TYPE_CHECKING = False  # typing takes a while to import, in which Ctrl-C would be a traceback
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType
    from typing import Any, NoReturn

INTERRUPTED = 130  # by Ctrl-C; what `kill`, `timeout` or a batch system ends has 143, as a shell counts
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: int = signal.SIGINT


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its status.

    Ctrl-C or SIGTERM ends it with one sentence whenever it comes: at once while modules are imported, which an
    exception could leave half made; then by an exception, so that the command says what it keeps; at once if it comes a
    second time.
    """
    if args is None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that a terminal in ASCII cannot show, as on stderr
    global _received
    _received = signal.SIGINT
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # no other may handle signals
        before = _handle(_exit)
    try:
        from sparseout_experiments.commands import invoke

        if before:
            _handle(_interrupt)
        status = invoke(args)
    except KeyboardInterrupt:
        show_message("interrupted", last=True)
        status = INTERRUPTED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO) or error.filename:  # not that of standard output
            raise
        show_message(f"the output cannot be written ({error.strerror})", last=True)
        if args is None:  # what is left of it would be tried again as the process ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 1
    finally:
        for number, handler in before.items():
            # the process ends now, in its own time, which SIGTERM may still end; or the program that called goes on
            signal.signal(number, signal.SIG_IGN if args is None and number == signal.SIGINT else handler)
    sys.exit(128 + _received if status == INTERRUPTED else status)


@contextmanager
def importing() -> Iterator[None]:
    """A block that imports: an interrupt ends the command at once there, as `main` says."""
    ours = signal.getsignal(signal.SIGINT) is _interrupt
    if ours:
        _handle(_exit)
    try:
        yield
    finally:
        if ours:
            _handle(_interrupt)


def _handle(handler: Any) -> dict[int, Any]:
    """Have both signals handled so; returns how they were."""
    return {number: signal.signal(number, handler) for number in _SIGNALS}


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    global _received
    _received = number
    _handle(_exit)
    raise KeyboardInterrupt


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    # not by print, which may be what was interrupted
    cursor = b"\r\x1b[K\x1b[?25h" if sys.stderr.isatty() else b""  # a progress bar hides it
    os.write(2, cursor + (b"" if has_ended() else b"sparseout: interrupted\n"))
    os._exit(128 + number)


if __name__ == "__main__":
    main()
