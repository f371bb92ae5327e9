"""What an operation's thread did while it ran (D5): the parts of its running time that the kernel's own events bracket.

Spans, later ones over earlier ones:

    run.fault      in a page fault from user mode, up to the last event that can only have happened inside it. No event tells
                   when a fault ends; a thread that runs on silently may be back in user mode: that time is not counted here.
    run.reclaim    between begin and end of the thread's own reclaim
    run.spin       spinning for a kernel lock, between its contention events; the owner, if the lock's word named one

A span that reaches over a gap in the record is left out. What remains is `run.user` or `run.kernel`, by the system calls.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from causality.memory import reclaim_brackets
from causality.timeline import Key, Rows, Timeline
from causality.window import Who, Window

__all__ = ["Span", "spans"]

_SPIN: Final = 1  # LCB_F_SPIN
_CALLS: Final = ("sys_enter", "sys_enter_futex", "sys_exit")
# Acts of a thread in kernel mode: after a fault from user mode, and with no system call since, they are the fault's.
_INSIDE_FAULT: Final = (
    "rss_stat", "filemap_fault", "block_bio_queue", "mm_vmscan_direct_reclaim_begin", "mm_vmscan_direct_reclaim_end",
    "mm_vmscan_memcg_reclaim_begin", "mm_vmscan_memcg_reclaim_end", "mm_compaction_begin", "mm_compaction_end",
)  # fmt: skip
_LOOKBACK_NS: Final = 10_000_000  # a bracket that began longer ago, and that the thread never slept in, is none


@dataclass(frozen=True, slots=True)
class Span:
    """[start, end) of a thread's running time. `kind`: the cause kind, or None for own work."""

    start_mono_ns: int
    end_mono_ns: int
    label: str
    kind: str | None
    culprit: Key | None
    evidence: tuple[str, ...]
    confidence: str = "exact"


def spans(timeline: Timeline, window: Window, key: Key, lo: int, hi: int) -> list[Span]:
    """The bracketed spans within [lo, hi) of a thread that runs, clipped, lower precedence first."""
    found = [*_faults(timeline, key, lo, hi), *_reclaim(timeline, window, key, lo, hi), *_spins(timeline, key, lo, hi)]
    return [s for s in found if s.end_mono_ns > lo and s.start_mono_ns < hi and not _torn(timeline, s)]


def _torn(timeline: Timeline, span: Span) -> bool:
    return any(x.count or not x.family for x in timeline.losses(span.start_mono_ns, span.end_mono_ns))


def _faults(timeline: Timeline, key: Key, lo: int, hi: int) -> list[Span]:
    if not timeline.has("page_fault_user"):
        return []
    names = ("page_fault_user", *_CALLS, *_INSIDE_FAULT)
    rows = timeline.of_task_kinds(key[0], names, lo - _LOOKBACK_NS, hi + _LOOKBACK_NS)
    out: list[Span] = []
    begun = -1
    for i in range(len(rows)):
        name, time = rows.name(i), int(rows.time[i])
        if name == "page_fault_user":
            begun = i
        elif name in _CALLS:
            begun = -1
        elif begun >= 0 and time > lo:
            out.append(Span(int(rows.time[begun]), time, "run.fault", None, None, (rows.id(begun), rows.id(i))))
    return out


def _reclaim(timeline: Timeline, window: Window, key: Key, lo: int, hi: int) -> list[Span]:
    out = []
    for bracket in reclaim_brackets(window, Who(key[0], timeline.task(*key).tgid)):
        if bracket.start_mono_ns < hi and bracket.end_mono_ns > lo:
            culprit = timeline.task_at(bracket.culprit.tid, bracket.start_mono_ns) if bracket.culprit is not None else None
            confidence = "exact" if culprit is None else "statistical"
            evidence = tuple(timeline.event_id(*ref) for ref in bracket.refs)
            out.append(
                Span(bracket.start_mono_ns, bracket.end_mono_ns, "run.reclaim", bracket.kind, culprit, evidence, confidence)
            )
    return out


def _spins(timeline: Timeline, key: Key, lo: int, hi: int) -> Sequence[Span]:
    rows = timeline.of_task_kinds(key[0], ("contention_begin", "contention_end"), lo - _LOOKBACK_NS, hi + _LOOKBACK_NS)
    if not len(rows):
        return []
    out = []
    for i in np.flatnonzero(_begins(rows)).tolist():
        if i + 1 == len(rows) or int(rows.time[i + 1]) <= lo:
            continue
        row = rows.decode(i)
        owner = (row["owner_tid"], row["owner_start_boot_ns"]) if row["owner_tid"] else None
        evidence = (rows.id(i), rows.id(i + 1))
        out.append(Span(row["time_mono_ns"], int(rows.time[i + 1]), "run.spin", "lock_holder", owner, evidence))
    return out


def _begins(rows: Rows) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Rows by which a thread begins to spin; the next of either kind ends that: it has the lock, or goes to sleep for it."""
    begins = np.array([rows.name(i) == "contention_begin" for i in range(len(rows))])
    spins: np.ndarray[tuple[int], np.dtype[np.bool_]] = begins & (rows.get("flags", "contention_begin") & _SPIN != 0)
    return spins
