"""Who held the lock during a wait (D7): kernel locks by their contention events, futexes by the word and the releases.

A wait on a lock is cut where the lock changed hands, and each part belongs to its holder:

- Kernel lock: the wait lies between the thread's contention_begin and contention_end. The owner read at the begin holds it
  until another waiter's contention_end shows the next one. The waker is the last holder.
- Futex: FUTEX_WAKE calls on the same word by threads of the process are the releases; whoever calls one held the lock until
  then. The first holder is what the word says at FUTEX_WAIT (PI: low 30 bits; glibc mutex: the tid at word + 8), accepted
  only if it names another live thread of the same process. Without an owner (condition variables, semaphores, runtimes) this
  module says nothing: the waker is followed instead, with the edge "wakes".
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from causality.timeline import Interval, Key, Syscall, Timeline

__all__ = ["Held", "futex_owner", "held_by"]

_WAIT_OPS: Final = frozenset({0, 9, 11})  # WAIT, WAIT_BITSET, WAIT_REQUEUE_PI
_WAKE_OPS: Final = (1, 10, 5, 3, 4)  # WAKE, WAKE_BITSET, WAKE_OP, REQUEUE, CMP_REQUEUE
_PI_LOCK: Final = frozenset({6, 13})
_PI_UNLOCK: Final = 7
_OP_MASK: Final = 0x7F
_TID_MASK: Final = 0x3FFFFFFF


@dataclass(frozen=True, slots=True)
class Held:
    """[start, end) of a wait: who held the lock (None: not known)."""

    start_mono_ns: int
    end_mono_ns: int
    holder: Key | None
    label: str
    edge: str
    evidence: tuple[str, ...]
    confidence: str
    lock: str


def held_by(timeline: Timeline, key: Key, interval: Interval, call: Syscall | None) -> list[Held]:
    """The holders during a blocked interval, covering it; empty if it is no wait for a lock with a readable owner."""
    kernel = _kernel(timeline, key, interval)
    if kernel:
        return kernel
    if call is None or call.futex is None:
        return []
    return _futex(timeline, key, interval, call)


def _kernel(timeline: Timeline, key: Key, interval: Interval) -> list[Held]:
    rows = timeline.of_task_kinds(
        key[0], ("contention_begin", "contention_end"), interval.start_mono_ns - 1_000_000_000, interval.start_mono_ns + 1
    )
    if not len(rows) or rows.name(len(rows) - 1) != "contention_begin":
        return []
    begin = rows.decode(len(rows) - 1)
    evidence = (rows.id(len(rows) - 1),)
    first = None
    if begin["owner_tid"]:
        first = (begin["owner_tid"], begin["owner_start_boot_ns"])
        if not first[1]:
            first = timeline.task_at(begin["owner_tid"], begin["time_mono_ns"])
    ends = timeline.matching("contention_end", "lock", begin["lock"], interval.start_mono_ns, interval.end_mono_ns)
    cuts: list[tuple[int, Key, str]] = []
    for i in range(len(ends)):
        tid = int(ends["tid"][i])
        if tid != key[0] and int(ends.get("ret")[i]) == 0:
            cuts.append((int(ends.time[i]), timeline.task_at(tid, int(ends.time[i])), ends.id(i)))
    last = _thread_waker(interval)
    if first is None and not cuts and last is None:
        return []
    lock = f"kernel/{begin['lock']:x}"
    return _cut(interval, first if first is not None else None, cuts, last, ("wait.lock", "holds_lock", lock), evidence)


def _cut(
    interval: Interval, first: Key | None, cuts: list[tuple[int, Key, str]], last: Key | None, what: tuple[str, str, str],
    evidence: tuple[str, ...],
) -> list[Held]:  # fmt: skip
    """Parts by acquisition: the first owner, then whoever acquired it; an unknown first owner falls back to the waker."""
    label, edge, lock = what
    out: list[Held] = []
    at, holder, proof, confidence = interval.start_mono_ns, first, evidence, "exact"
    if holder is None and not cuts:
        holder, confidence = last, "strong"
    for time, taken_by, event in cuts:
        if time > at:
            out.append(Held(at, time, holder, label, edge, proof, confidence, lock))
            at = time
        holder, proof, confidence = taken_by, (*evidence, event), "exact"
    if at < interval.end_mono_ns:
        out.append(Held(at, interval.end_mono_ns, holder, label, edge, proof, confidence, lock))
    return out


def _thread_waker(interval: Interval) -> Key | None:
    wake = interval.wake
    return wake.waker if wake is not None and wake.waker[0] and not wake.frames else None


def futex_owner(timeline: Timeline, key: Key, call: Syscall) -> Key | None:
    """The thread that the futex word names as owner, if it is another live thread of the same process."""
    futex = call.futex or {}
    op = futex.get("op", 0) & _OP_MASK
    time = call.enter_mono_ns if call.enter_mono_ns is not None else timeline.lo_mono_ns
    if op in _PI_LOCK:
        candidates = [futex["word"] & _TID_MASK]
    elif op in _WAIT_OPS:
        robust = futex["val"] & _TID_MASK if futex["val"] & 0x80000000 else 0
        plain = futex["owner"] if futex["val"] == 2 else 0
        candidates = [robust, plain]
    else:
        return None
    mine = timeline.task(*key).tgid
    for tid in candidates:
        if not tid or tid == key[0]:
            continue
        owner = timeline.task_at(tid, time)
        if mine and timeline.task(*owner).tgid == mine:
            return owner
    return None


def _futex(timeline: Timeline, key: Key, interval: Interval, call: Syscall) -> list[Held]:
    first = futex_owner(timeline, key, call)
    if first is None:
        return []
    assert call.futex is not None
    uaddr, lock = call.futex["uaddr"], f"futex/{timeline.task(*key).tgid}/{call.futex['uaddr']:x}"
    begin, end = interval.start_mono_ns, interval.end_mono_ns
    out: list[Held] = []
    at, proof = begin, call.evidence
    for time, releaser, event in _releases(timeline, key, uaddr, begin, end):
        if time <= at:
            continue
        out.append(Held(at, time, releaser, "wait.futex", "holds_futex", (*proof, event), "exact", lock))
        at, proof = time, (event,)
    if at < end:
        waker = _thread_waker(interval)
        holder = first if not out else waker
        confidence = "exact" if holder == first and not out else "strong"
        out.append(Held(at, end, holder, "wait.futex", "holds_futex", proof, confidence, lock))
    return out


def _releases(timeline: Timeline, key: Key, uaddr: int, begin: int, end: int) -> list[tuple[int, Key, str]]:
    """FUTEX_WAKE and UNLOCK_PI calls on a word by other threads of the process: (time, who, event)."""
    rows = timeline.matching("sys_enter_futex", "uaddr", uaddr, begin, end)
    if not len(rows):
        return []
    operation = rows.get("op") & _OP_MASK
    mine = timeline.task(*key).tgid
    wakes = np.isin(operation, (*_WAKE_OPS, _PI_UNLOCK)) & (rows["tgid"] == mine) & (rows["tid"] != key[0])
    rows = rows.where(wakes)
    return [(int(rows.time[i]), timeline.task_at(int(rows["tid"][i]), int(rows.time[i])), rows.id(i)) for i in range(len(rows))]
