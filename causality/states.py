"""Thread states from scheduler events (D1), for all threads of a batch at once.

Input: the events that change threads' states (`Changes`), sorted by thread, then by time. Output: the state of each
thread from each defining event to the next, half-open, integer ns. The rules:

- switched in: running. Switched out by preemption, or with a runnable state: runnable. Switched out otherwise: blocked.
- The first sched_waking after that ends the blocked time: its current is the waker. A wake of a thread that is not blocked
  changes nothing, with one exception: a wake may race with the thread's way to sleep, and its event then stands *before* the
  switch-out. It is the wake of that sleep if the thread is next enqueued or run without any other wake (zero-length blocked),
  and never if it was enqueued before the switch-out: then the wake found it awake.
- sched_wakeup stands in for a sched_waking that is missing. Neither: from the switch-out on, the state is unknown.
- A thread switched out that is not known to run, or run while it is blocked without a wake: unknown in between, never guessed.
- A thread switched in while it runs elsewhere: the older run ends there.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from causality.log import FORK, IN, MIGRATE, NEW, OUT, WAKEUP, WAKING

__all__ = ["BLOCKED", "RUNNABLE", "RUNNING", "STATE_NAMES", "UNKNOWN", "Changes", "States", "causal_order", "derive"]

RUNNING, RUNNABLE, BLOCKED, UNKNOWN = range(4)
STATE_NAMES: Final = ("running", "runnable", "blocked", "unknown")
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Changes:
    """Rows sorted by (thread, time), each thread in `causal_order`. `blocks`: a switch-out that leaves the run queue."""

    thread: Array
    time_mono_ns: Array
    role: Array
    blocks: Array


@dataclass(frozen=True, slots=True)
class States:
    """Intervals in the order of their rows. `cause`: the row that begins the interval; `wake`: the row that ends a blocked one
    and begins a runnable one, or -1; `open`: nothing ended it yet."""

    start_mono_ns: Array
    end_mono_ns: Array
    state: Array
    cause: Array
    wake: Array
    open: Array


# What comes first of one nanosecond's events on several CPUs, for a thread that runs and for one that does not.
_RANKS: Final = {
    True: {OUT: 0, MIGRATE: 1, FORK: 2, NEW: 2, WAKING: 3, WAKEUP: 4, IN: 5},
    False: {FORK: 0, NEW: 1, WAKING: 2, MIGRATE: 3, WAKEUP: 4, IN: 5, OUT: 6},
}


def causal_order(time: Array, cpu: Array, role: Array) -> Array:
    """A permutation of one thread's rows, which are in the order (time, cpu, seq), that puts cause before effect where several
    CPUs have events of the same nanosecond: asleep before woken, woken before run. Each CPU's own order stays."""
    order = np.arange(len(time))
    tied = np.flatnonzero((time[1:] == time[:-1]) & (cpu[1:] != cpu[:-1])) if len(time) else order
    done = -1
    for at in tied.tolist():
        if at < done:
            continue
        first, done = (int(np.searchsorted(time, time[at], side)) for side in ("left", "right"))
        before = role[order[:first]]
        defining = np.flatnonzero((before == IN) | (before == OUT) | (before == FORK))
        runs = bool(len(defining) and before[defining[-1]] == IN)
        order[first:done] = _merge(first, done, cpu, role, runs=runs if len(defining) else None)
    return order


def _merge(first: int, end: int, cpu: Array, role: Array, *, runs: bool | None) -> list[int]:
    queues: dict[int, list[int]] = {}
    for row in range(first, end):
        queues.setdefault(int(cpu[row]), []).append(row)
    if runs is None:  # nothing is known of the thread yet: a switch-out among the first tells that it ran
        runs = any(int(role[queue[0]]) == OUT for queue in queues.values())
    merged: list[int] = []
    while queues:
        ranks = _RANKS[runs]
        chosen = min(queues, key=lambda c: (ranks[int(role[queues[c][0]])], c))
        row = queues[chosen].pop(0)
        if not queues[chosen]:
            del queues[chosen]
        merged.append(row)
        if int(role[row]) in (IN, OUT):
            runs = int(role[row]) == IN
    return merged


def _last_before(mask: Array, index: Array) -> Array:
    """For each row the index of the last row at or before it that `mask` selects, or -1."""
    return np.maximum.accumulate(np.where(mask, index, -1)) if len(index) else index


def _first_after(mask: Array, index: Array, after: Array) -> Array:
    """For each row of `after` the first row later than it that `mask` selects, or len(index)."""
    chosen = index[mask]
    return np.append(chosen, len(index))[np.searchsorted(chosen, after, side="right")]


def derive(changes: Changes) -> States:
    """The states of all threads of `changes`."""
    role, time = changes.role, changes.time_mono_ns
    n = len(role)
    index = np.arange(n)
    defining = (role == IN) | (role == OUT) | (role == FORK)
    d = index[defining]
    starts = np.flatnonzero(np.append(True, changes.thread[1:] != changes.thread[:-1])) if n else index
    group_end = np.append(starts, n)[np.searchsorted(starts, d, side="right")]
    follow = np.minimum(np.append(d[1:], n), group_end)  # the next defining row of the same thread, or past it
    is_open = follow >= group_end
    end = np.where(is_open, np.iinfo(np.int64).max, np.append(time, 0)[np.minimum(follow, n)])
    blocked = changes.blocks[d] | (role[d] == FORK)
    wake = _wakes(changes, index, d, follow, is_open, blocked)
    return _assemble(changes, d, follow, end, is_open, blocked, wake)


def _wakes(changes: Changes, index: Array, d: Array, follow: Array, is_open: Array, blocked: Array) -> Array:
    """Per defining row the row of the wake that ended its blocked time; -1 none, -2 cannot be told."""
    role, n = changes.role, len(index)
    waking, enqueued = (role == WAKING) | (role == NEW), role == WAKEUP
    first_wake, first_enqueue = _first_after(waking, index, d), _first_after(enqueued, index, d)
    first_wake = np.where(first_wake < follow, first_wake, n)
    first_enqueue = np.where(first_enqueue < follow, first_enqueue, n)
    # An early wake stands between the switch-in and this switch-out.
    before = np.concatenate(([-1], d[:-1])) if len(d) else d
    was_in = np.concatenate(([False], (role[d[:-1]] == IN) & (follow[:-1] == d[1:]))) if len(d) else blocked
    last_wake = np.append(_last_before(waking, index), -1)[d - 1] if len(d) else d
    # Enqueued before it left the CPU: the wake found it still on the run queue, and it did not go to sleep then.
    enqueued_early = np.append(_last_before(enqueued, index), -1)[d - 1] if len(d) else d
    early = np.where(was_in & (last_wake > before) & (enqueued_early < last_wake) & (d > 0), last_wake, -1)
    ran_next = ~is_open & (np.append(role, OUT)[np.minimum(follow, n)] == IN)
    woken_first = (first_wake < n) & (first_wake < first_enqueue)
    other = np.where(first_enqueue < n, first_enqueue, -1)
    unwoken = np.where(
        early >= 0,
        np.where((first_enqueue < n) | (ran_next & (first_wake == n)), early, np.where(is_open & (first_wake == n), -2, other)),
        other,
    )
    return np.where(blocked, np.where(woken_first, first_wake, unwoken), -1)


def _assemble(
    changes: Changes, d: Array, follow: Array, end: Array, is_open: Array, blocked: Array, wake: Array
) -> States:
    role, time, n = changes.role, changes.time_mono_ns, len(changes.role)
    start = time[d]
    next_role = np.append(role, -1)[np.minimum(follow, n)]
    runs = role[d] == IN
    woken = blocked & (wake >= 0)
    woken_at = np.where(woken, np.maximum(time[np.maximum(wake, 0)], start) if n else start, end)
    # A thread that was not running cannot be switched out; one that nobody woke cannot run; an ambiguous wake proves nothing.
    impossible = ~is_open & ~runs & (next_role == OUT)
    unwoken = blocked & ~woken & ~is_open
    unknown = (impossible & ~woken) | unwoken | (wake == -2)
    first_state = np.where(runs, RUNNING, np.where(blocked, BLOCKED, RUNNABLE))
    first_state = np.where(unknown, UNKNOWN, first_state)
    second = np.flatnonzero(woken)
    all_start = np.concatenate((start, woken_at[second]))
    all_end = np.concatenate((woken_at, end[second]))
    state = np.concatenate((first_state, np.where(impossible[second], UNKNOWN, RUNNABLE)))
    cause = np.concatenate((d, wake[second]))
    first_wake = np.where(woken, wake, -1)
    all_wake = np.concatenate((first_wake, wake[second]))
    open_ = np.concatenate((is_open & ~woken, is_open[second]))
    # A runnable interval follows its blocked one: order by defining row, then by part.
    order = np.lexsort((np.concatenate((np.zeros(len(d)), np.ones(len(second)))), np.concatenate((d, d[second]))))
    return States(all_start[order], all_end[order], state[order], cause[order], all_wake[order], open_[order])
