"""Journal waits and dirty throttling (D8): fsync through jbd2, who filled the commit, who dirtied the pages.

A wait is for the journal if the journal's own thread (jbd2/DEVICE) ended it. The commits of that device that overlap
the wait partition it. A commit that others filled (their handles dirtied more blocks of it than the waiter's process)
is `journal_commit` by whoever dirtied most; otherwise it is as slow as its requests: `disk_slow` or `disk_contention`
as `causality.block` says.

A wait right after `balance_dirty_pages` announced a pause is `wait.dirty`; the culprit is the process that dirtied
most pages of the same backing device in the window before, if it dirtied more than the waiter.

Can be fooled by: handles that ran before the recording began (their blocks are unknown: the commit counts as the
waiter's own), and a nested transaction that reserves blocks without dirtying them.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from causality.block import requests, service
from causality.window import EventRef, Leaf, Piece, Rows, Wait, Who, Window, cover, kernel_threads

__all__ = ["Commit", "commits", "resolve_dirty", "resolve_journal"]

_JOURNAL_THREAD: Final = "jbd2/"
_DIRTY_LOOKBACK_NS: Final = 2_000_000_000
_PAUSE_AFTER_NS: Final = 1_000_000  # from the announcement of a pause to the switch-out


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit of one journal: its span, its thread, who dirtied how many of its blocks."""

    device: int
    transaction: int
    start_mono_ns: int
    end_mono_ns: int
    thread: Who
    blocks: dict[Who, int]
    refs: tuple[EventRef, ...]


def commits(window: Window) -> list[Commit]:
    """All commits that end in the window, in order of their ends (made once)."""
    if "commits" not in window.memo:
        window.memo["commits"] = _commits(window)
    found: list[Commit] = window.memo["commits"]
    return found


def _commits(window: Window) -> list[Commit]:
    starts, ends = window.rows("jbd2_start_commit"), window.rows("jbd2_end_commit")
    begun = {_key(starts, i): i for i in range(len(starts))}
    blocks = _blocks(window)
    out = []
    for i in range(len(ends)):
        key = _key(ends, i)
        first = begun.get(key)
        start = int(starts.time[first]) if first is not None else window.from_mono_ns
        refs = (starts.ref(first), ends.ref(i)) if first is not None else (ends.ref(i),)
        out.append(Commit(key[0], key[1], start, int(ends.time[i]), ends.who(i), blocks.get(key, {}), refs))
    return out


def _key(rows: Rows, i: int) -> tuple[int, int]:
    return int(rows.get("dev")[i]), int(rows.get("transaction")[i])


def _blocks(window: Window) -> dict[tuple[int, int], dict[Who, int]]:
    """Dirtied blocks by transaction and thread."""
    rows = window.rows("jbd2_handle_stats")
    if not len(rows):
        return {}
    keys = np.stack([rows.get("dev"), rows.get("transaction"), rows.tid, rows.tgid], axis=1)
    distinct, group = np.unique(keys, axis=0, return_inverse=True)
    sums = np.bincount(group.ravel(), weights=rows.get("dirtied_blocks").astype(float), minlength=len(distinct))
    out: dict[tuple[int, int], dict[Who, int]] = {}
    for (dev, transaction, tid, tgid), total in zip(distinct.tolist(), sums.tolist(), strict=True):
        out.setdefault((dev, transaction), {})[Who(tid, tgid)] = int(total)
    return out


def resolve_journal(window: Window, wait: Wait) -> list[Piece]:
    """The pieces of a wait that the journal's thread ended, or nothing."""
    wake = wait.wake
    if wake is None or not wake.waker_comm.startswith(_JOURNAL_THREAD):
        return []
    mine = [
        c for c in commits(window)
        if c.thread.tid == wake.waker.tid and c.end_mono_ns > wait.start_mono_ns and c.start_mono_ns < wake.time_mono_ns
    ]  # fmt: skip
    open_commit = _open_commit(window, wake.waker, wake.time_mono_ns)
    if open_commit is not None:
        mine.append(open_commit)
    pieces: list[Piece] = []
    at = wait.start_mono_ns
    for commit in mine:
        end = min(commit.end_mono_ns, wait.end_mono_ns)
        pieces += _pieces(window, wait, commit, at, end)
        at = max(at, end)
    if not pieces:
        return []
    return cover(pieces, wait.start_mono_ns, wait.end_mono_ns, "wait.journal", _kind_of(pieces[-1]))


def _kind_of(piece: Piece) -> str:
    return piece.kind if isinstance(piece, Leaf) else "disk_slow"


def _open_commit(window: Window, thread: Who, before_mono_ns: int) -> Commit | None:
    """A commit of this thread that had begun and not ended when it woke the waiter (commits wake waiters on the way, too)."""
    begun = window.last_of("jbd2_start_commit", thread.tid, before_mono_ns)
    if begun is None:
        return None
    rows, i = begun
    device, transaction = _key(rows, i)
    if any(c.device == device and c.transaction == transaction and c.end_mono_ns <= before_mono_ns for c in commits(window)):
        return None
    blocks = _blocks(window).get((device, transaction), {})
    return Commit(device, transaction, int(rows.time[i]), before_mono_ns, thread, blocks, (rows.ref(i),))


def _pieces(window: Window, wait: Wait, commit: Commit, lo: int, hi: int) -> list[Piece]:
    if hi <= lo:
        return []
    culprit = _filler(window, commit, wait.who.tgid)
    if culprit is not None:
        return [Leaf(lo, hi, "wait.journal", "journal_commit", culprit, commit.refs)]
    table = requests(window)
    own = frozenset((wait.who.tgid, commit.thread.tgid))
    pieces: list[Piece] = []
    at = lo
    for i in np.flatnonzero((table.tid == commit.thread.tid) & (table.completed > lo) & (table.queued < hi)).tolist():
        begin, end = max(at, int(table.queued[i])), min(hi, int(table.completed[i]))
        if end > begin:
            pieces += service(window, i, begin, end, own, "wait.journal")
            at = end
    return cover(pieces, lo, hi, "wait.journal", "disk_slow")


def _filler(window: Window, commit: Commit, own_tgid: int) -> Who | None:
    """Who dirtied most blocks of the commit, if others dirtied more of it than the waiter's own process."""
    others: dict[int, int] = {}
    workers = kernel_threads(window)
    for who, count in commit.blocks.items():
        if who.tgid not in (own_tgid, commit.thread.tgid) and who.tid not in workers:
            others[who.tgid] = others.get(who.tgid, 0) + count
    mine = sum(count for who, count in commit.blocks.items() if who.tgid == own_tgid)
    if sum(others.values()) <= mine:
        return None
    top = max(others, key=lambda tgid: (others[tgid], -tgid))
    threads = [(count, -who.tid, who) for who, count in commit.blocks.items() if who.tgid == top]
    return max(threads)[2]


def resolve_dirty(window: Window, wait: Wait) -> list[Piece]:
    """The pause of a thread that dirtied pages faster than its device may take them, or nothing."""
    announced = window.last_of("balance_dirty_pages", wait.who.tid, wait.blocked_mono_ns)
    if announced is None:
        return []
    rows, i = announced
    if int(rows.time[i]) < wait.blocked_mono_ns - _PAUSE_AFTER_NS or int(rows.get("pause_jiffies")[i]) <= 0:
        return []
    culprit = _dirtier(window.rows("balance_dirty_pages"), int(rows.get("bdi_dev")[i]), wait)
    confidence = "exact" if culprit is None else "statistical"
    leaf = Leaf(wait.start_mono_ns, wait.end_mono_ns, "wait.dirty", "dirty_throttle", culprit, (rows.ref(i),), confidence)
    return [leaf]


def _dirtier(rows: Rows, device: int, wait: Wait) -> Who | None:
    near: Any = (rows.get("bdi_dev") == device) & (rows.time <= wait.end_mono_ns)
    near &= rows.time >= wait.blocked_mono_ns - _DIRTY_LOOKBACK_NS
    pages: dict[Who, int] = {}
    for k in np.flatnonzero(near):
        who = rows.who(int(k))
        pages[who] = pages.get(who, 0) + max(int(rows.get("dirtied")[k]), 1)
    mine = sum(n for who, n in pages.items() if who.tgid == wait.who.tgid)
    others = {who: n for who, n in pages.items() if who.tgid != wait.who.tgid}
    if not others or sum(others.values()) <= mine:
        return None
    return max(others, key=lambda who: (others[who], -who.tid))
