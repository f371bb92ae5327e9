"""Retries end, and what is raised at the end is the store's own error."""

import pytest

from events.errors import StoreError
from sinks.retry import TransientError, retried


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now_s = 0.0
        self.slept = []

    def __call__(self):
        return self.now_s

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now_s += seconds


def failing(times):
    """An attempt that fails so often before it gives 23."""
    left = [times]

    def attempt():
        if left[0]:
            left[0] -= 1
            raise TransientError(StoreError("away"))
        return 23

    return attempt


def test_a_failure_that_passes_is_not_seen():
    clock = Clock()

    assert retried(failing(5), 15.0, clock, clock.sleep) == 23
    assert clock.slept == [0.1, 0.2, 0.4, 0.8, 1.6]


def test_a_failure_that_stays_is_raised_within_the_limit():
    clock = Clock()

    with pytest.raises(StoreError, match=r"^away$"):
        retried(failing(10**6), 15.0, clock, clock.sleep)

    assert 13.0 <= clock.now_s <= 15.0
    assert max(clock.slept) == 2.0


def test_other_errors_are_raised_at_once():
    def attempt():
        raise StoreError("refused")

    with pytest.raises(StoreError, match="refused"):
        retried(attempt, 15.0, Clock(), pytest.fail)
