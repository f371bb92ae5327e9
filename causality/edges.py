"""Closed wake edges in the stream: for every blocked time that ended, who was blocked how long and who ended it.

`EdgeFold.fold(segment)` takes sealed events in order and returns columns, one row an edge that closed in them. It is
the vectorised half of the engine (no Python per event); verdicts do not depend on it. Columns: `time_mono_ns` (of the
wake), `tid`, `start_boot_ns` (the woken thread), `waker_tid`, `waker_tgid`, `cpu`, `seq` (the wake event),
`blocked_mono_ns` (since when it was blocked), `ns`.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from causality.log import Segment
from events.kinds import BY_NAME

__all__ = ["EDGE_COLUMNS", "EdgeFold"]

EDGE_COLUMNS: Final = (
    "time_mono_ns", "tid", "start_boot_ns", "waker_tid", "waker_tgid", "cpu", "seq", "blocked_mono_ns", "ns",
)  # fmt: skip
_SWITCH: Final = BY_NAME["sched_switch"]
_WAKING: Final = BY_NAME["sched_waking"]
_LOW: Final = np.uint64(0xFFFFFFFF)
_OUT, _IN, _WAKE = 0, 1, 2


class EdgeFold:
    """Carries, per thread, since when it is blocked (0: it is not)."""

    def __init__(self) -> None:
        self._blocked_since = np.zeros(1 << 16, np.int64)

    def fold(self, segment: Segment) -> dict[str, npt.NDArray[Any]]:
        """The wake edges that close in these events."""
        columns = segment.columns
        kind = columns["kind"]
        switches = np.flatnonzero(kind == _SWITCH.number)
        wakes = np.flatnonzero(kind == _WAKING.number)
        state = columns["a2"][switches]
        prev_state, preempt = state & np.uint64(0xFFFF), (state >> np.uint64(40)) & np.uint64(1)
        leaves = (preempt == 0) & (prev_state != 0) & (prev_state != 256)
        outs = switches[leaves]
        row = np.concatenate((outs, switches, wakes))
        tid = np.concatenate(
            (columns["tid"][outs], columns["a0"][switches] & _LOW, columns["a0"][wakes] & _LOW)
        ).astype(np.int64)
        role = np.concatenate(
            (np.full(len(outs), _OUT, np.int8), np.full(len(switches), _IN, np.int8), np.full(len(wakes), _WAKE, np.int8))
        )
        return self._close(columns, row, tid, role)

    def _close(
        self, columns: Any, row: npt.NDArray[Any], tid: npt.NDArray[Any], role: npt.NDArray[Any]
    ) -> dict[str, npt.NDArray[Any]]:
        if not len(row):
            return {name: np.empty(0, np.int64) for name in EDGE_COLUMNS}
        top = int(tid.max())
        if top >= len(self._blocked_since):
            self._blocked_since = np.concatenate((self._blocked_since, np.zeros(top + 1, np.int64)))
        in_order = np.argsort(row, kind="stable")
        row, tid, role = row[in_order], tid[in_order], role[in_order]
        narrow = tid.astype(np.uint16) if top < 1 << 16 else tid
        by_thread = np.argsort(narrow, kind="stable")
        row, tid, role = row[by_thread], tid[by_thread], role[by_thread]
        time = columns["time_mono_ns"][row]
        first = np.append(True, tid[1:] != tid[:-1])
        before_role = np.append(_IN, role[:-1])
        before_time = np.append(0, time[:-1])
        carried = self._blocked_since[tid]
        blocked = np.where(first, carried, np.where(before_role == _OUT, before_time, 0))
        closes = (role == _WAKE) & (blocked > 0)
        last = np.append(tid[1:] != tid[:-1], True)
        self._blocked_since[tid[last]] = np.where(
            role[last] == _OUT, time[last], 0
        )
        at = row[closes]
        since, when = blocked[closes], time[closes]
        return {
            "time_mono_ns": when, "tid": tid[closes], "start_boot_ns": columns["a1"][at].astype(np.int64),
            "waker_tid": columns["tid"][at], "waker_tgid": columns["tgid"][at], "cpu": columns["cpu"][at],
            "seq": columns["seq"][at], "blocked_mono_ns": since, "ns": when - since,
        }  # fmt: skip
