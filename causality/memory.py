"""Memory (D9): reclaim brackets, swap-in, and who made the kernel reclaim.

A reclaim bracket is a thread's own begin and end of direct or memory-cgroup reclaim. What runs inside it is
`run.reclaim`, what waits inside it is `wait.reclaim`, whatever the wait itself was for. A memory-cgroup bracket is
`memcg_reclaim`, a limit of the waiter's own: no culprit. Direct reclaim is global pressure: `global_reclaim` by the
process whose resident memory grew most in the window before (confidence `statistical`).

A page fault that submitted a read of its own, with no file fault in between, is `swap_in`.

Can be fooled by: a limit of a parent cgroup that a neighbour fills (reported as the own limit), and by growth that
`rss_stat` does not tell (page cache, huge pages of shared memory).
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from causality.block import requests
from causality.window import EventRef, Leaf, Piece, Wait, Who, Window

__all__ = ["Bracket", "reclaim_brackets", "resolve_reclaim", "resolve_swap"]

_BRACKETS: Final = (
    ("mm_vmscan_direct_reclaim_begin", "mm_vmscan_direct_reclaim_end", "global_reclaim"),
    ("mm_vmscan_memcg_reclaim_begin", "mm_vmscan_memcg_reclaim_end", "memcg_reclaim"),
    ("mm_vmscan_memcg_softlimit_reclaim_begin", "mm_vmscan_memcg_softlimit_reclaim_end", "memcg_reclaim"),
    ("mm_vmscan_node_reclaim_begin", "mm_vmscan_node_reclaim_end", "global_reclaim"),
)
_GROWTH_LOOKBACK_NS: Final = 5_000_000_000
_PAGE_BYTES: Final = 4096
_FAULTS: Final = ("page_fault_user", "page_fault_kernel")


@dataclass(frozen=True, slots=True)
class Bracket:
    """One reclaim by a thread for itself."""

    start_mono_ns: int
    end_mono_ns: int  # end of the window if it had not ended by then
    kind: str
    culprit: Who | None
    refs: tuple[EventRef, ...]


def reclaim_brackets(window: Window, who: Who) -> list[Bracket]:
    """All reclaim by this thread in the window, in order (made once a thread)."""
    memo = f"reclaim/{who.tid}"
    if memo not in window.memo:
        found = [b for begin, end, kind in _BRACKETS for b in _pairs(window, who, begin, end, kind)]
        window.memo[memo] = sorted(found, key=lambda b: b.start_mono_ns)
    brackets: list[Bracket] = window.memo[memo]
    return brackets


def _pairs(window: Window, who: Who, begin: str, end: str, kind: str) -> list[Bracket]:
    starts, ends = window.rows(begin), window.rows(end)
    end_rows = np.flatnonzero(ends.columns["tid"] == who.tid)
    end_times = ends.time[end_rows]
    out = []
    for i in np.flatnonzero(starts.columns["tid"] == who.tid):
        start = int(starts.time[i])
        j = int(np.searchsorted(end_times, start, "left"))
        closed = j < len(end_rows)
        stop = int(end_times[j]) if closed else window.to_mono_ns
        refs = (starts.ref(int(i)), ends.ref(int(end_rows[j]))) if closed else (starts.ref(int(i)),)
        culprit = _grower(window, who, start) if kind == "global_reclaim" else None
        out.append(Bracket(start, stop, kind, culprit, refs))
    return out


def _grower(window: Window, who: Who, before_mono_ns: int) -> Who | None:
    """The process whose resident memory grew most before a time, other than the waiter's; None if none grew by a page."""
    rows = window.rows("rss_stat").between(before_mono_ns - _GROWTH_LOOKBACK_NS, before_mono_ns)
    if not len(rows):
        return None
    current = np.flatnonzero((rows.get("curr") == 1) & (rows.columns["tgid"] != who.tgid))
    first: dict[tuple[int, int], int] = {}
    last: dict[tuple[int, int], int] = {}
    thread: dict[int, int] = {}
    member, size = rows.get("member"), rows.get("size_bytes")
    for i in current:
        key = (int(rows.columns["tgid"][i]), int(member[i]))
        first.setdefault(key, int(size[i]))
        last[key] = int(size[i])
        thread[key[0]] = int(rows.columns["tid"][i])
    growth: dict[int, int] = {}
    for key, grown in last.items():
        growth[key[0]] = growth.get(key[0], 0) + grown - first[key]
    top = max(growth, key=lambda tgid: (growth[tgid], -tgid), default=None)
    if top is None or growth[top] < _PAGE_BYTES:
        return None
    return Who(thread[top], top)


def resolve_reclaim(window: Window, wait: Wait) -> list[Piece]:
    """A wait inside the thread's own reclaim, or nothing."""
    for bracket in reclaim_brackets(window, wait.who):
        if bracket.start_mono_ns <= wait.blocked_mono_ns < bracket.end_mono_ns:
            confidence = "exact" if bracket.culprit is None else "statistical"
            lo, hi = wait.start_mono_ns, wait.end_mono_ns
            return [Leaf(lo, hi, "wait.reclaim", bracket.kind, bracket.culprit, bracket.refs, confidence)]
    return []


def resolve_swap(window: Window, wait: Wait) -> list[Piece]:
    """A wait in a page fault for a page that was swapped out, or nothing. Called when the wait is for a read of its own."""
    faults = [f for name in _FAULTS if (f := window.last_of(name, wait.who.tid, wait.blocked_mono_ns)) is not None]
    if not faults:
        return []
    rows, i = max(faults, key=lambda f: int(f[0].time[f[1]]))
    began = int(rows.time[i])
    if _left_kernel_since(window, wait, began):
        return []
    file_fault = window.last_of("filemap_fault", wait.who.tid, wait.blocked_mono_ns)
    if file_fault is not None and int(file_fault[0].time[file_fault[1]]) >= began:
        return []
    table = requests(window)
    read = (table.tid == wait.who.tid) & (table.operation == 0) & (table.queued >= began)
    read &= (table.queued <= wait.blocked_mono_ns) & (table.completed > wait.blocked_mono_ns)
    mine = np.flatnonzero(read)
    if not len(mine):
        return []
    refs = (rows.ref(i), *table.refs[int(mine[-1])])
    return [Leaf(wait.start_mono_ns, wait.end_mono_ns, "wait.swap", "swap_in", None, refs)]


def _left_kernel_since(window: Window, wait: Wait, began_mono_ns: int) -> bool:
    """Whether the thread made a system call after the fault (then the fault was over)."""
    for name in ("sys_enter", "sys_enter_futex"):
        last = window.last_of(name, wait.who.tid, wait.blocked_mono_ns)
        if last is not None and int(last[0].time[last[1]]) > began_mono_ns:
            return True
    return False
