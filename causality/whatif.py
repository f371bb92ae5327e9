"""What would an operation have taken without a task, a lock hold, a disk stall, or with one more CPU? An interval.

What: `what_if(path, removed)` walks an operation's time once, in order, and recomputes its path through waits: time that is
taken away moves everything behind it forward, until a wait that ends at its own time absorbs what was saved. `subjects` names,
for a root, what could be taken away with it, in the words of a rule: `cpu` (a task had the CPU), `lock` (a task held the lock),
`disk`, `irq`, `net`, `wait` (a task it waited for otherwise).

The interval. High: every wait for others that follows absorbs all that was saved before it: it ended when they were done, and
they are done no sooner. Low: everything moves forward, what is contended (a CPU, a lock, the disk's queue) may be free by then,
and no interrupt or dispatch delay is met. Both suppose that the order of events stays. Who could change it stands in
`reorders`: tasks that share a CPU, the disk or a process with the operation and are not taken away with what is removed.
Without any the truth lies in the interval; with some it nearly always does (tests/causality/test_whatif.py measures it against
schedules that are simulated again): less work for all can make one operation later, and no bound holds for that.
Guarantees: integers only; low <= high; what removes nothing and touches nobody gives the recorded duration, twice.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from causality.timeline import Key
from causality.walk import LOCK_EDGES, Root

__all__ = ["Answer", "Path", "subjects", "what_if"]

_DISK: Final = ("wait.disk", "wait.journal", "wait.dirty", "wait.swap")
_QUEUED: Final = ("runq", "runq_rt")
# A wait for time alone: it begins later or earlier, and lasts as long.
_OWN_PACE: Final = ("wait.timer", "wait.signal")


@dataclass(frozen=True, slots=True)
class Path:
    """The time of one operation, explained: what the engine knows of it."""

    roots: Sequence[Root]
    start_mono_ns: int
    end_mono_ns: int
    deadline_ns: int | None
    comm: Callable[[Key], str]
    woken: Sequence[tuple[int, Key]] = ()
    neighbours: Sequence[str] = ()  # names of tasks with which it shared a CPU, the disk or its process


@dataclass(slots=True)
class Answer:
    """`duration_ns` is [low, high]; `removed_ns` what was taken away of the recorded time."""

    recorded_ns: int
    removed_ns: int = 0
    low_ns: int = 0
    high_ns: int = 0
    reorders: list[str] = field(default_factory=list)

    def status(self, deadline_ns: int | None) -> str:
        """ok, late or cannot_tell: against the deadline, for the whole interval."""
        if deadline_ns is None:
            return "unjudged"
        if self.high_ns <= deadline_ns:
            return "ok"
        return "late" if self.low_ns > deadline_ns else "cannot_tell"


def subjects(root: Root, comm: Callable[[Key], str]) -> Iterator[tuple[str, str]]:
    """(what, task) pairs under which a root can be taken away."""
    culprit = comm(root.culprit) if root.culprit is not None and root.mechanism != "irq" else ""
    if root.mechanism in _QUEUED:
        yield "cpu", culprit
    elif root.mechanism == "irq":
        yield "irq", root.name
    elif root.mechanism == "net":
        yield "net", culprit
    if root.label.startswith(_DISK) or (root.kind or "").startswith(("disk_", "journal_", "dirty_")):
        yield "disk", culprit
    for hop in root.hops:
        yield "lock" if hop.edge in LOCK_EDGES else "wait", comm(hop.other)


def what_if(path: Path, removed: Callable[[str, str], bool]) -> Answer:
    """Recompute the path without what `removed` names, asked with the pairs of `subjects`."""

    def gone(root: Root) -> bool:
        return any(removed(*pair) for pair in subjects(root, path.comm))

    answer = Answer(path.end_mono_ns - path.start_mono_ns)
    most = least = 0  # time saved so far: at most, at least
    since = 0  # when something was taken away last
    for roots in _spans(path.roots):
        away = sum(r.ns for r in roots if gone(r))
        if away:
            kept = [r for r in roots if not gone(r)]
            least = 0 if most and _contended(kept) else least
            most, least = most + away, least + away
            answer.removed_ns += away
            since = max(since, roots[-1].end_mono_ns)
        elif most:
            least = _absorbed(path, roots, least, since)
    _note_reorders(path, removed, gone, answer)
    if answer.removed_ns or answer.reorders or path.woken:
        _bound(path, gone, answer, least)
    else:
        answer.low_ns = answer.high_ns = answer.recorded_ns
    return answer


def _note_reorders(
    path: Path, removed: Callable[[str, str], bool], gone: Callable[[Root], bool], answer: Answer
) -> None:
    others = sorted({name for name in path.neighbours if not all(removed(what, name) for what in ("cpu", "lock", "disk"))})
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        answer.reorders.append(f"the order of events may change: the operation shares CPU, disk or process with {shown}")
    if any(_contended([r]) and not gone(r) for r in path.roots):
        answer.reorders.append("the order of events may change: the operation stood in a queue of which not all is taken away")


def _bound(path: Path, gone: Callable[[Root], bool], answer: Answer, least: int) -> None:
    delays = [r.ns for r in path.roots if r.mechanism in ("idle", "irq") or r.label.startswith("irq.")]
    waits = sum(1 for roots in _spans(path.roots) if _group(roots[0]) is not None)
    # A wait that is taken away still ends with a dispatch; one that comes earlier may meet an interrupt that was another's.
    slack = (waits + 1) * sorted([0, 0, *delays])[len(delays) // 2 + 1]
    kept = [r for r in path.roots if not gone(r)]
    if answer.reorders:
        answer.low_ns = sum(r.ns for r in kept if _own(r))
    else:
        answer.low_ns = sum(r.ns for r in kept) - sum(delays)
    if any(_locked(r) for r in path.roots if gone(r)) or path.woken:
        # Calls that only contention makes (to wait for a lock, to wake who waits for it) go with it: own time, in the kernel.
        answer.low_ns -= sum(r.ns for r in kept if r.label == "run.kernel")
    answer.low_ns = max(0, min(answer.low_ns, answer.recorded_ns))
    answer.high_ns = max(answer.recorded_ns - least + (slack if least or answer.reorders else 0), answer.low_ns)


def _spans(roots: Sequence[Root]) -> Iterator[list[Root]]:
    """Roots of one wait together: one stay in a queue, one sleep; what ran is alone."""
    span: list[Root] = []
    for root in roots:
        if span and (_group(root) is None or _group(root) != _group(span[-1])):
            yield span
            span = []
        span.append(root)
    if span:
        yield span


def _group(root: Root) -> str | None:
    if root.label.startswith("runq"):
        return "runq"
    return "wait" if root.label.startswith("wait.") else None


def _contended(roots: Sequence[Root]) -> bool:
    return any(r.mechanism in _QUEUED or r.lock or _locked(r) or r.label == "wait.disk.queue" for r in roots)


def _locked(root: Root) -> bool:
    return any(h.edge in LOCK_EDGES for h in root.hops)


def _absorbed(path: Path, roots: list[Root], least: int, since: int) -> int:
    """What is left of the time saved at least, behind a wait, or a run, that comes earlier by that much."""
    if _group(roots[0]) is None or all(_own(r) for r in roots):
        return least
    others = {h.other for r in roots for h in r.hops}
    set_off = any(time >= since and key in others and time <= roots[-1].end_mono_ns for time, key in path.woken)
    return least if set_off and all(r.mechanism != "sleep" for r in roots) else 0


def _own(root: Root) -> bool:
    """Cannot become shorter: its own running, its own sleep, the disk's own time for its request."""
    if root.hops or (root.label == "wait.disk.device" and root.culprit is not None):
        return False
    return root.label.startswith(("run.", "wait.disk.device", *_OWN_PACE))
