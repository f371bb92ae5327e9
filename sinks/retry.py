"""Retries with bounded backoff, the same for every store.

What is retried must be idempotent; in the sinks everything is, by identity. The waits double from 0.1 s to 2 s, and after
`limit_s` the last error is raised: a store that is away for longer is the caller's business, not to be waited for in silence.
"""

import time
from collections.abc import Callable
from typing import Final, TypeVar

__all__ = ["RETRY_LIMIT_S", "TransientError", "retried"]

RETRY_LIMIT_S: Final = 15.0
_FIRST_WAIT_S: Final = 0.1
_LONGEST_WAIT_S: Final = 2.0

_T = TypeVar("_T")


class TransientError(Exception):
    """A failure that may pass by itself; `final` is what to raise when it does not."""

    def __init__(self, final: Exception) -> None:
        super().__init__(str(final))
        self.final = final


def retried(
    attempt: Callable[[], _T],
    limit_s: float = RETRY_LIMIT_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> _T:
    """The result of `attempt`, tried again after each TransientError until `limit_s` have passed."""
    deadline, wait_s = clock() + limit_s, _FIRST_WAIT_S
    while True:
        try:
            return attempt()
        except TransientError as error:
            if clock() + wait_s > deadline:
                raise error.final from error.final.__cause__
        sleep(wait_s)
        wait_s = min(wait_s * 2, _LONGEST_WAIT_S)
