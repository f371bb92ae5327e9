"""Disk waits (D8): which request a thread waited for, what the device did meanwhile, and for whom.

A request is a pair (issue, completion) of one request pointer on one device; pointers are reused, so the completion
is the first one after the issue. Its submitter is whoever was current when its bio was queued (issue happens in
kworkers too). A wait belongs to a request if the waiter submitted it and it completed within the wait, or if the very
context that completed it did the wake-up.

Within [queued, completed) the device's completions partition the time: the span in which another process's request
was in service is `disk_contention` by that process, the rest is the device's own slowness (`disk_slow`). Time before
a bio of a cgroup was let through by the throttling worker is `disk_throttle`: the waiter's own limit, no culprit.

Can be fooled by: a device that serves many requests at once (the partition then charges the one that completed
first), requests of a stacked device whose lower device is not recorded, and polling (no completion interrupt, same
events).
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from causality.window import EventRef, Leaf, Piece, Rows, Wait, Wake, Who, Window, cover

__all__ = ["Requests", "requests", "resolve_block", "service"]

_WAKE_AFTER_NS: Final = 500_000  # a completion wakes its waiter at once; the bound covers an interrupted completion
_WORKER: Final = "kworker/"  # completions that need a file system's work wake their waiter from there
_FRAMES: Final = ("irq_handler", "softirq", "local_timer", "reschedule", "call_function", "call_function_single", "irq_work")
_CONTEXT_STEPS: Final = {
    **{f"{name}_entry": 1 for name in _FRAMES},
    **{f"{name}_exit": -1 for name in _FRAMES},
    "sched_switch": -1_000_000,
}
_ROOT_CGROUP: Final = 1  # kernfs id of the root of every hierarchy


@dataclass(frozen=True, slots=True)
class Requests:
    """All requests of a window as columns, ordered by completion (unfinished ones last, with complete = end of time)."""

    device: npt.NDArray[Any]
    queued: npt.NDArray[Any]  # when its bio was queued; the issue time where no bio is known (flushes)
    inserted: npt.NDArray[Any]
    issued: npt.NDArray[Any]
    completed: npt.NDArray[Any]
    tid: npt.NDArray[Any]  # submitter
    tgid: npt.NDArray[Any]
    cgroup_id: npt.NDArray[Any]  # of the bio
    complete_cpu: npt.NDArray[Any]
    complete_tid: npt.NDArray[Any]
    operation: npt.NDArray[Any]  # REQ_OP: 0 read, 1 write, 2 flush
    refs: list[tuple[EventRef, EventRef]]

    def __len__(self) -> int:
        return len(self.issued)


_END: Final = np.iinfo(np.int64).max


def _following(keys: npt.NDArray[Any], times: npt.NDArray[Any], of_key: Any, of_time: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Index of the first row with the same key at or after each (of_key, of_time); -1 if none."""
    if not len(keys):
        return np.full(len(of_time), -1)
    order = np.lexsort((times, keys))
    pairs = np.array(list(zip(keys[order].tolist(), times[order].tolist(), strict=True)), dtype=[("k", "u8"), ("t", "i8")])
    wanted = np.empty(len(of_time), pairs.dtype)
    wanted["k"], wanted["t"] = of_key, of_time
    at = np.searchsorted(pairs, wanted, "left")
    inside = at < len(pairs)
    out = np.full(len(of_time), -1)
    hit = np.flatnonzero(inside)
    same = pairs["k"][at[hit]] == wanted["k"][hit]
    out[hit[same]] = order[at[hit][same]]
    return out


def _preceding(keys: npt.NDArray[Any], times: npt.NDArray[Any], of_key: Any, of_time: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Index of the last row with the same key at or before each (of_key, of_time); -1 if none."""
    if not len(keys):
        return np.full(len(of_time), -1)
    order = np.lexsort((times, keys))
    pairs = np.array(list(zip(keys[order].tolist(), times[order].tolist(), strict=True)), dtype=[("k", "u8"), ("t", "i8")])
    wanted = np.empty(len(of_time), pairs.dtype)
    wanted["k"], wanted["t"] = of_key, of_time
    at = np.searchsorted(pairs, wanted, "right") - 1
    hit = np.flatnonzero(at >= 0)
    same = pairs["k"][at[hit]] == wanted["k"][hit]
    out = np.full(len(of_time), -1)
    out[hit[same]] = order[at[hit][same]]
    return out


def requests(window: Window) -> Requests:
    """The table of requests of a window (made once)."""
    if "requests" not in window.memo:
        window.memo["requests"] = _requests(window)
    table: Requests = window.memo["requests"]
    return table


def _requests(window: Window) -> Requests:
    issue, done = window.rows("block_rq_issue"), window.rows("block_rq_complete")
    bio, insert = window.rows("block_bio_queue"), window.rows("block_rq_insert")
    done_at = _following(done.get("rq"), done.time, issue.get("rq"), issue.time)
    # Pointers are reused: a completion ends the last issue before it; an earlier one's is missing.
    followed = np.flatnonzero(done_at >= 0)
    last_issue = {int(done_at[i]): int(i) for i in followed}
    done_at = np.where(np.isin(np.arange(len(done_at)), list(last_issue.values())), done_at, -1)
    bio_at = _preceding(bio.get("bio"), bio.time, issue.get("bio"), issue.time)
    bio_at = np.where(issue.get("bio") == 0, -1, bio_at)
    insert_at = _preceding(insert.get("rq"), insert.time, issue.get("rq"), issue.time)
    completed = _at(done.time, done_at, _END)
    order = np.argsort(completed, kind="stable")

    def ordered(values: Any) -> npt.NDArray[Any]:
        return np.asarray(values)[order]

    tid, tgid = _at(bio.tid, bio_at, 0), _at(bio.tgid, bio_at, 0)  # 0: a flush, which the block layer sends by itself
    return Requests(
        device=ordered(issue.get("dev")),
        queued=ordered(np.where(bio_at >= 0, _at(bio.time, bio_at, 0), issue.time)),
        inserted=ordered(np.where(insert_at >= 0, _at(insert.time, insert_at, 0), issue.time)),
        issued=ordered(issue.time),
        completed=ordered(completed),
        tid=ordered(tid),
        tgid=ordered(tgid),
        cgroup_id=ordered(np.where(bio_at >= 0, _at(bio.get("cgroup_id").astype(np.int64), bio_at, 0), 0)),
        complete_cpu=ordered(_at(done.columns["cpu"].astype(np.int64), done_at, -1)),
        complete_tid=ordered(_at(done.tid, done_at, -1)),
        operation=ordered(issue.get("cmd_flags") & 0xFF),
        refs=[_refs(issue, done, int(i), int(done_at[i])) for i in order],
    )


def _at(values: npt.NDArray[Any], index: npt.NDArray[Any], missing: int) -> npt.NDArray[Any]:
    if not len(values):
        return np.full(len(index), missing, np.int64)
    return np.where(index >= 0, values[np.maximum(index, 0)], missing)


def _refs(issue: Rows, done: Rows, i: int, j: int) -> tuple[EventRef, EventRef]:
    return issue.ref(i), done.ref(j) if j >= 0 else issue.ref(i)


def service(window: Window, mine: int, lo: int, hi: int, own: frozenset[int], label: str | None = None) -> list[Leaf]:
    """Leaves over [lo, hi) of request `mine`: who was being served, by the completions on its device.

    `own`: tgids that count as the waiter's own side. `label` overrides wait.disk.queue / wait.disk.device.
    """
    table = requests(window)
    others = np.flatnonzero(
        (table.device == table.device[mine]) & (table.completed > lo) & (table.completed <= table.completed[mine])
        & (table.issued < hi)
    )  # fmt: skip
    leaves: list[Leaf] = []
    at = lo
    for i in others.tolist():
        begin, end = max(at, int(table.issued[i])), min(hi, int(table.completed[i]))
        if i == mine or int(table.tgid[i]) in own or not table.tgid[i] or end <= begin:
            continue
        leaves += _own(table, mine, at, begin, label)
        culprit = Who(int(table.tid[i]), int(table.tgid[i]))
        leaves += _piece(table, mine, begin, end, label, "disk_contention", culprit, table.refs[i])
        at = end
    return leaves + _own(table, mine, at, hi, label)


def _own(table: Requests, mine: int, lo: int, hi: int, label: str | None) -> list[Leaf]:
    return _piece(table, mine, lo, hi, label, "disk_slow", None, table.refs[mine])


def _piece(
    table: Requests, mine: int, lo: int, hi: int, label: str | None, kind: str, culprit: Who | None, refs: tuple[EventRef, ...]
) -> list[Leaf]:
    """One span, split where the request was issued: scheduler queue before, device after."""
    if hi <= lo:
        return []
    if label is not None:
        return [Leaf(lo, hi, label, kind, culprit, refs)]
    cut = min(max(int(table.issued[mine]), lo), hi)
    spans = ((lo, cut, "wait.disk.queue"), (cut, hi, "wait.disk.device"))
    return [Leaf(a, b, name, kind, culprit, refs) for a, b, name in spans if b > a]


def _mine(window: Window, wait: Wait) -> npt.NDArray[Any]:
    """Indexes of the requests that this wait was for."""
    table = requests(window)
    wake = wait.wake
    end = wake.time_mono_ns if wake is not None else wait.end_mono_ns
    submitted = (table.tid == wait.who.tid) & (table.completed > wait.blocked_mono_ns) & (table.completed <= end)
    submitted &= table.queued <= end
    if wake is None:
        return np.flatnonzero(submitted & (table.completed < _END))
    by_waker = (table.complete_cpu == wake.cpu) & (table.complete_tid == wake.waker.tid)
    by_waker &= (table.completed <= end) & (table.completed >= end - _WAKE_AFTER_NS) & (table.queued < end)
    for i in np.flatnonzero(by_waker).tolist():
        by_waker[i] = _in_one_context(window, int(table.completed[i]), table.refs[i][1][1], wake)
    if not by_waker.any() and not wake.waker_comm.startswith(_WORKER):
        return np.empty(0, np.int64)
    if not by_waker.any() or (submitted & by_waker).any():
        return np.flatnonzero(submitted)
    return np.flatnonzero(by_waker)[-1:]


def _in_one_context(window: Window, completed_mono_ns: int, completed_seq: int, wake: Wake) -> bool:
    """Did the interrupt frame (or stretch of a task) that completed a request go on to the wake-up, without another in between?

    The interrupted task says nothing: on an idle CPU it is the same for the disk's interrupt and for the next timer's.
    """
    time, seq, step = _contexts(window, wake.cpu)
    low = int(np.searchsorted(time, completed_mono_ns, "left"))
    high = int(np.searchsorted(time, wake.time_mono_ns, "right"))
    after = (time[low:high] > completed_mono_ns) | (seq[low:high] > completed_seq)
    before = (time[low:high] < wake.time_mono_ns) | (seq[low:high] < wake.seq)
    depth = np.cumsum(step[low:high][after & before])
    return not len(depth) or (int(depth.min()) >= 0 and int(depth[-1]) == 0)


def _contexts(window: Window, cpu: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """(times, numbers, steps) of a CPU's interrupt entries (+1) and exits (-1), and switches (far below zero), in order."""
    held = window.memo.get(f"contexts {cpu}")
    if held is None:
        parts = [(window.rows(kind), step) for kind, step in _CONTEXT_STEPS.items()]
        cpus = np.concatenate([r.columns["cpu"] for r, _ in parts])
        time = np.concatenate([r.time for r, _ in parts])[cpus == cpu]
        seq = np.concatenate([r.columns["seq"].astype(np.int64) for r, _ in parts])[cpus == cpu]
        step = np.concatenate([np.full(len(r), step, np.int64) for r, step in parts])[cpus == cpu]
        order = np.lexsort((seq, time))
        held = window.memo[f"contexts {cpu}"] = (time[order], seq[order], step[order])
    found: tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]] = held
    return found


def resolve_block(window: Window, wait: Wait) -> list[Piece]:
    """The pieces of a wait for the disk, or nothing if no request explains it."""
    table = requests(window)
    mine = _mine(window, wait)
    pieces: list[Piece] = []
    at = wait.start_mono_ns
    for i in mine.tolist():
        queued, end = int(table.queued[i]), min(int(table.completed[i]), wait.end_mono_ns)
        throttled = int(table.tid[i]) != wait.who.tid and int(table.cgroup_id[i]) > _ROOT_CGROUP and queued > at
        if throttled:
            until = min(queued, wait.end_mono_ns)
            pieces.append(Leaf(at, until, "wait.disk.queue", "disk_throttle", None, table.refs[i]))
            at = until
        pieces += service(window, i, at, end, frozenset((wait.who.tgid,)))
        at = max(at, end)
    if not pieces:
        return []
    return cover(pieces, wait.start_mono_ns, wait.end_mono_ns, "wait.disk.device", "disk_slow")
