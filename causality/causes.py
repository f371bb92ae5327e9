"""From the roots of an operation's time to ranked causes, and what the operation would have taken without each.

The kind of a cause is the mechanism at the root, seen through the hops that lead there: a runnable root is
`cpu_preempted`, or `priority_inversion` if somebody on the way waited for a lock; a root that ran or slept is `own_cpu`
/ `own_sleep` for the operation's own thread, `lock_holder` for whoever held the lock it waited for, else `peer_slow`.
Two or more holders within one wait for one lock are a `lock_convoy`.

Ranking (`ranked`): by time, but own work does not hide what made a late operation late. If it would have been in time without
all that came from outside, what came from outside ranks first; an operation that is late by its own work alone keeps the
order of time.

Without a cause (`without_it_ns`, an interval): the low end takes away all of its time. The high end recomputes the
longest path: time saved before a wait for somebody who works independently of the operation (it did not wake them
since) is absorbed by that wait.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from causality.timeline import Key
from causality.walk import LOCK_EDGES, Root, weaker

__all__ = ["CAPABILITY_OF", "KINDS", "Cause", "collect", "kind_of", "ranked", "without"]

KINDS: Final = (
    "cpu_preempted", "cpu_preempted_rt", "cpu_quota", "irq_storm", "lock_holder", "lock_convoy", "priority_inversion",
    "disk_contention", "disk_throttle", "disk_slow", "journal_commit", "dirty_throttle", "memcg_reclaim", "global_reclaim",
    "swap_in", "net_loss", "net_peer", "net_reset", "killed_oom", "killed_signal", "stopped", "peer_slow", "peer_exited",
    "io_error", "own_cpu", "own_sleep", "unknown",
)  # fmt: skip
# The families of events without which a kind cannot be seen.
CAPABILITY_OF: Final[Mapping[str, tuple[str, ...]]] = {
    "irq_storm": ("irq", "softirq"), "disk_contention": ("block",), "disk_throttle": ("block",), "disk_slow": ("block",),
    "journal_commit": ("jbd2",), "dirty_throttle": ("writeback",), "memcg_reclaim": ("reclaim",),
    "global_reclaim": ("reclaim",), "swap_in": ("faults", "block"), "net_loss": ("tcp",), "net_reset": ("tcp",),
    "killed_oom": ("oom",), "killed_signal": ("signals",), "cpu_quota": ("throttle",), "lock_holder": ("locks", "syscalls"),
    "lock_convoy": ("locks", "syscalls"), "priority_inversion": ("locks", "syscalls"),
}  # fmt: skip
_CONVOY_SHARE: Final = 10  # a holder counts if it held for at least a tenth of the wait
_NO_CULPRIT: Final = frozenset({"own_cpu", "own_sleep", "disk_throttle", "memcg_reclaim", "killed_oom"})
_OWN_KINDS: Final = frozenset({"own_cpu", "own_sleep"})
# Waits for what the operation itself set off: they move along with it.
_OWN_WAITS: Final = ("wait.disk", "wait.journal", "wait.dirty", "wait.reclaim", "wait.swap", "wait.timer", "wait.signal")


@dataclass(slots=True)
class Cause:
    """One cause: its roots, and who did it with how many ns each."""

    kind: str
    roots: list[Root] = field(default_factory=list)
    culprits: dict[tuple[Key, str], int] = field(default_factory=dict)
    confidence: str = "exact"

    @property
    def ns(self) -> int:
        """Its time in total."""
        return sum(r.ns for r in self.roots)


def _locked(root: Root) -> bool:
    return any(h.edge in LOCK_EDGES for h in root.hops)


def kind_of(root: Root) -> str | None:
    """The cause kind of a root; None for dispatch delay, which nobody caused."""
    if root.kind is not None:
        return root.kind
    last_is_lock = bool(root.hops) and root.hops[-1].edge in LOCK_EDGES
    match root.mechanism:
        case "run" | "sleep":
            if not root.hops:
                return "own_cpu" if root.mechanism == "run" else "own_sleep"
            return "lock_holder" if last_is_lock else "peer_slow"
        case "runq" | "runq_rt":
            if _locked(root):
                return "priority_inversion"
            return "cpu_preempted" if root.mechanism == "runq" else "cpu_preempted_rt"
        case "quota":
            return "cpu_quota"
        case "irq":
            return "irq_storm"
        case "net":
            return "net_peer"
        case "idle":
            return None
    return "unknown"


def culprit_of(root: Root, kind: str | None) -> tuple[Key, str] | None:
    """(key, interrupt's name) of who did it, or None."""
    if kind in _NO_CULPRIT or kind in (None, "unknown"):
        return None
    if root.culprit is not None:
        return root.culprit, root.name
    if root.mechanism in ("run", "sleep", "quota") and root.hops:
        return root.hops[-1].other, ""
    return None


def settle_convoys(roots: Sequence[Root]) -> list[Root]:
    """The roots with their kind decided; within one wait for one lock, several holders make a convoy."""
    kinds = [kind_of(r) if r.mechanism != "idle" else r.kind for r in roots]
    out = [r if r.kind == kind else replace(r, kind=kind) for r, kind in zip(roots, kinds, strict=True)]
    i = 0
    while i < len(out):
        j = i
        while j < len(out) and out[j].lock and out[j].lock == out[i].lock and out[j].start_mono_ns == _end(out, i, j):
            j += 1
        if j > i:
            _mark_convoy(out, i, j)
        i = max(j, i + 1)
    return out


def _end(roots: Sequence[Root], first: int, i: int) -> int:
    return roots[i - 1].end_mono_ns if i > first else roots[i].start_mono_ns


def _mark_convoy(roots: list[Root], i: int, j: int) -> None:
    held: dict[Key, int] = {}
    for root in roots[i:j]:
        if root.kind == "lock_holder":
            holder = root.hops[-1].other
            held[holder] = held.get(holder, 0) + root.ns
    total = sum(r.ns for r in roots[i:j])
    if sum(1 for ns in held.values() if ns * _CONVOY_SHARE >= total) >= 2:
        for k in range(i, j):
            if roots[k].kind == "lock_holder":
                roots[k] = replace(roots[k], kind="lock_convoy")


def collect(roots: Sequence[Root]) -> list[Cause]:
    """Causes of settled roots, the most costly first. Peers are told apart; occupants of a CPU belong to one cause."""
    causes: dict[tuple[str, object], Cause] = {}
    for root in roots:
        kind = root.kind
        if kind is None:
            continue
        who = culprit_of(root, kind)
        group: object = who if kind in ("peer_slow", "stopped") else root.lock if kind in ("lock_holder", "lock_convoy") else ""
        cause = causes.setdefault((kind, group), Cause(kind))
        cause.roots.append(root)
        cause.confidence = weaker(cause.confidence, root.confidence)
        if who is not None:
            cause.culprits[who] = cause.culprits.get(who, 0) + root.ns
    return sorted(causes.values(), key=lambda c: (-c.ns, KINDS.index(c.kind), c.roots[0].start_mono_ns))


def ranked(causes: Sequence[Cause], duration_ns: int, deadline_ns: int | None) -> list[Cause]:
    """Causes by what removing each would save. Own work cannot be removed: of a late operation it stands behind everything
    that came from outside, if without all of that the operation would have been in time."""
    outside = sum(c.ns for c in causes if c.kind not in _OWN_KINDS)
    if deadline_ns is None or duration_ns <= deadline_ns or duration_ns - outside > deadline_ns:
        return list(causes)
    return sorted(causes, key=lambda c: c.kind in _OWN_KINDS)


def without(roots: Sequence[Root], cause: Cause, duration_ns: int, woken: Sequence[tuple[int, Key]]) -> tuple[int, int]:
    """[low, high] ns that the operation would have taken without a cause. `woken`: (time, thread) that its thread woke."""
    removed = {id(r) for r in cause.roots}
    by_thread: dict[Key, list[int]] = {}
    for time, key in woken:
        by_thread.setdefault(key, []).append(time)
    low = duration_ns - cause.ns
    saved, since, wait_start, last_end = 0, 0, 0, -1
    for root in roots:
        if not (root.label.startswith("wait.") and root.start_mono_ns == last_end):
            wait_start = root.start_mono_ns
        last_end = root.end_mono_ns
        if id(root) in removed:
            saved += root.ns
            since = max(since, root.start_mono_ns)
        elif saved and _independent(root, since, by_thread, within=since >= wait_start):
            saved = 0
    return low, duration_ns - saved


def _independent(root: Root, since: int, woken: Mapping[Key, Sequence[int]], *, within: bool) -> bool:
    """Does this wait end at a time that does not depend on when the operation began to wait, or on what was taken away?

    `within`: what was taken away lies in this same wait; then what the same thread did or stood in line for moves along.
    `woken`: when the operation's thread woke whom, in order of time.
    """
    if not root.label.startswith("wait.") or root.label.startswith(_OWN_WAITS):
        return False
    if within:
        return root.mechanism in ("sleep", "net", "unknown")
    for hop in root.hops:
        times = woken.get(hop.other, ())
        at = bisect_left(times, since)
        if at < len(times) and times[at] <= root.end_mono_ns:
            return False
    return True
