"""Ending on purpose: SIGTERM and SIGINT set a flag; the sources then say that they are at their end.

Bytewax dies at once of a SIGTERM, without a snapshot. With the flag, each source ends (StopIteration), sinks flush, a last
snapshot is taken, and the process exits with 0; the next start resumes exactly there. A second signal ends the process at once.
"""

import signal
import threading
from types import FrameType

__all__ = ["install", "requested"]

_stop = threading.Event()


def requested() -> bool:
    """Whether the process was asked to end."""
    return _stop.is_set()


def install() -> None:
    """Take over SIGTERM and SIGINT. Only the main thread can; from any other this does nothing."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _handle)
        signal.signal(signal.SIGINT, _handle)


def _handle(number: int, _frame: FrameType | None) -> None:
    _stop.set()
    signal.signal(number, signal.SIG_DFL)
