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
    from typing import NoReturn

INTERRUPTED = 130


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its status.

    Ctrl-C ends it with one sentence whenever it comes: at once while modules are imported, which an exception could
    leave half made; then by an exception, so that the command says what it keeps; at once if it comes a second time.
    """
    if args is None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that a terminal in ASCII cannot show, as on stderr
    before = None
    if threading.current_thread() is threading.main_thread():  # no other may handle signals
        before = signal.signal(signal.SIGINT, _exit)
    try:
        from sparseout_experiments.commands import invoke

        if before is not None:
            signal.signal(signal.SIGINT, _interrupt)
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
        if before is not None:
            # the process ends now, in its own time; or the program that called goes on
            signal.signal(signal.SIGINT, signal.SIG_IGN if args is None else before)
    sys.exit(status)


@contextmanager
def importing() -> Iterator[None]:
    """A block that imports: Ctrl-C ends the command at once there, as `main` says."""
    ours = signal.getsignal(signal.SIGINT) is _interrupt
    if ours:
        signal.signal(signal.SIGINT, _exit)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGINT, _exit)
    raise KeyboardInterrupt


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    # not by print, which may be what was interrupted
    cursor = b"\r\x1b[K\x1b[?25h" if sys.stderr.isatty() else b""  # a progress bar hides it
    os.write(2, cursor + (b"" if has_ended() else b"sparseout: interrupted\n"))
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
