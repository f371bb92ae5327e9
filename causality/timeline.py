"""What happened on one node in [lo, hi]: the questions that a verdict asks, answered from sorted columns.

A `Timeline` is a read-only view of the sealed events at or before the end of one operation, and not older than its
look-back. It is all that inference sees, so a verdict depends on nothing else. Times are integer ns of CLOCK_MONOTONIC,
windows half-open.

The questions:

    timeline.kind("block_rq_issue", start, end)       rows of a kind in [start, end); `Rows.get("rq")` gives a field
    timeline.matching("block_rq_complete", "rq", ptr, start, end)   rows whose field has a value (a pointer, an inode)
    timeline.of_task(tid, start, end)                 rows during which the thread was current (interrupts on top included)
    timeline.states(task_key, start, end)             [Interval]: running, runnable, blocked, unknown, with wakes
    timeline.occupants(cpu, start, end)               [Occupant]: who had the CPU
    timeline.frames(cpu, start, end)                  [IrqFrame]: interrupt frames with parents
    timeline.context(rows, i)                         the interrupt frames an event stands in, innermost last
    timeline.syscall_at(key, time)                    the system call a thread is in
    timeline.task(tid, start_boot_ns)                 Task; timeline.task_at(tid, time) finds the life
    timeline.losses(start, end)                       [Loss]
    timeline.session                                  body of the session frame (families, capabilities, ...)

Mechanism resolvers (`block`, `journal`, `memory`, `network`) are written against the smaller `causality.window`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from causality.log import FORK, IN, MIGRATE, NEW, OUT, WAKEUP, WAKING, Segment
from causality.states import BLOCKED, RUNNABLE, RUNNING, STATE_NAMES, UNKNOWN, Changes, causal_order, derive
from causality.tasks import Task, TaskTable
from events.kinds import BY_NAME, BY_NUMBER
from events.records import FLAG_HARDIRQ, FLAG_SOFTIRQ, LOSS_HIDDEN, UNKNOWN_TID

__all__ = [
    "BLOCKED", "RECORDING_ENDED", "RUNNABLE", "RUNNING", "UNKNOWN", "Interval", "IrqFrame", "Key", "Loss", "Occupant", "Rows",
    "Syscall", "Timeline", "Wake",
]  # fmt: skip

Key = tuple[int, int]
_SWITCH: Final = BY_NAME["sched_switch"]
_MIGRATE: Final = BY_NAME["sched_migrate_task"]
_WAKING: Final = BY_NAME["sched_waking"]
_NR_FUTEX: Final = 202
RECORDING_ENDED: Final = "recording_ended"  # reason of the loss of everything after the last event
_FOR_EVER_NS: Final = (1 << 63) - 1
# What the kernel reports in prev_state for a thread that is still runnable: nothing, or only "preempted" of the text format.
_RUNNABLE_STATES: Final = (0, 256)
_WOKEN: Final = (WAKING, WAKEUP, NEW)
_FROZEN: Final = 0x8000
_DEAD: Final = 0x10 | 0x20 | 0x80
_FRAME_LOSSES: Final = ("", "sched", "irq", "softirq", "irq_vectors", "timers")
_CHUNK: Final = 64
_TAIL_CHANGES: Final = 16  # distinct times of a thread's changes before a window that its states are derived from
_NMI_MAX_NS: Final = 10_000_000
_FRAME_MAX_NS: Final = 100_000_000
_CONTEXT_SCAN: Final = 512  # rows of interrupt entries and exits looked back over to find the frames of one event


@dataclass(frozen=True, slots=True)
class Loss:
    """Events missing on `cpu` (None: any) in [start, end]."""

    start_mono_ns: int
    end_mono_ns: int
    cpu: int | None
    reason: str
    family: str
    count: int

    @property
    def hides_states(self) -> bool:
        """Could scheduler events be among the missing?"""
        return self.family in ("", "sched")

    @property
    def hidden(self) -> bool:
        """Only acts of tasks that this kernel hides are missing, and the switch away from one of them: nobody else's."""
        return self.reason == LOSS_HIDDEN


@dataclass(frozen=True, slots=True)
class Wake:
    """What ended a blocked interval. `frames`: interrupt frames around it, outermost first; none: the waker itself did."""

    time_mono_ns: int
    waker: Key
    cpu: int
    frames: tuple[str, ...]
    evidence: tuple[str, ...]
    exact: bool = True  # a sched_waking; False: a sched_wakeup stood in
    certain: bool = True  # False: events are missing that could hide an interrupt around it
    thaws: bool = False  # the woken thread was frozen where it slept


@dataclass(frozen=True, slots=True)
class Interval:
    """One state of one thread. `cpu`: where it ran or was last queued. `wake`: what ended it (blocked), began it (runnable)."""

    start_mono_ns: int
    end_mono_ns: int
    state: int
    cpu: int
    evidence: tuple[str, ...]
    prev_state: int = 0
    wake: Wake | None = None
    open: bool = False
    throttled: bool = False
    inferred: bool = False
    places: tuple[tuple[int, int], ...] = ()  # (from time, queue CPU) of a runnable interval
    unplaced: bool = False
    lost: bool = False  # events are missing that could say what it did
    role: int = -1  # of the event that begins it (`log.IN`, `OUT`, `WAKING`, ...)

    @property
    def state_name(self) -> str:
        """running, runnable, blocked or unknown."""
        return STATE_NAMES[self.state]


@dataclass(frozen=True, slots=True)
class Occupant:
    """Who had a CPU in [start, end). `realtime`: its class when it was switched in."""

    start_mono_ns: int
    end_mono_ns: int
    key: Key
    tgid: int
    realtime: bool
    kthread: bool
    cgroup_id: int
    evidence: tuple[str, ...]


@dataclass(slots=True)
class IrqFrame:
    """One interrupt frame on a CPU; `parent` indexes the list it came in, or is -1. `kind`: hard, soft, timer."""

    start_mono_ns: int
    end_mono_ns: int
    name: str
    kind: str
    parent: int
    evidence: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Syscall:
    """A system call: number, arguments, the object of its descriptor, and when it began and ended (None: not seen)."""

    nr: int
    args: tuple[int, ...]
    object_type: int
    object: int
    enter_mono_ns: int | None
    exit_mono_ns: int | None
    ret: int | None
    evidence: tuple[str, ...]
    futex: Mapping[str, int] | None = None


class Rows:
    """Some events, in order. Columns are gathered when asked for."""

    def __init__(self, timeline: "Timeline", parts: list[tuple[Segment, npt.NDArray[Any]]]) -> None:
        self._timeline = timeline
        self._parts = [(s, r) for s, r in parts if len(r)]
        self._columns: dict[str, npt.NDArray[Any]] = {}

    def __len__(self) -> int:
        return sum(len(r) for _, r in self._parts)

    def column(self, name: str) -> npt.NDArray[Any]:
        """A column of `events.records.EVENTS`."""
        if name not in self._columns:
            got = [s.columns[name][r] for s, r in self._parts]
            self._columns[name] = np.concatenate(got) if got else np.empty(0, np.uint64)
        return self._columns[name]

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self.column(name)

    @property
    def time(self) -> npt.NDArray[Any]:
        """Times, ns."""
        return self.column("time_mono_ns")

    def get(self, field_name: str, kind: str | None = None) -> npt.NDArray[Any]:
        """A field of the kind (default: that of the first row; all rows must be of one kind or share the layout)."""
        if not self._parts:
            return np.empty(0, np.int64)
        which = BY_NAME[kind] if kind else BY_NUMBER[int(self.column("kind")[0])]
        return which.get(_LazyColumns(self), field_name)

    def ids(self) -> tuple[str, ...]:
        """Evidence ids of all rows."""
        return tuple(self.id(i) for i in range(len(self)))

    def cell(self, name: str, i: int) -> int:
        """One value, without gathering its column."""
        held = self._columns.get(name)
        if held is not None:
            return int(held[i])
        for segment, rows in self._parts:
            if i < len(rows):
                return int(segment.columns[name][rows[i]])
            i -= len(rows)
        raise IndexError(i)

    def id(self, i: int) -> str:
        """Evidence id of row i."""
        return self._timeline.event_id(self.cell("cpu", i), self.cell("seq", i))

    def decode(self, i: int) -> dict[str, int]:
        """All fields of row i, with time_mono_ns, cpu, tid, tgid."""
        kind = BY_NUMBER[self.cell("kind", i)]
        head = {n: self.cell(n, i) for n in ("time_mono_ns", "cpu")}
        head["current_tid"], head["current_tgid"] = self.cell("tid", i), self.cell("tgid", i)
        return {**head, **kind.decode(tuple(self.cell(f"a{k}", i) for k in range(5)))}

    def name(self, i: int) -> str:
        """Kind name of row i."""
        return BY_NUMBER[self.cell("kind", i)].name

    def where(self, mask: npt.NDArray[Any]) -> "Rows":
        """The rows that a mask selects."""
        out, at = [], 0
        for segment, rows in self._parts:
            out.append((segment, rows[mask[at : at + len(rows)]]))
            at += len(rows)
        return Rows(self._timeline, out)

    def ordered(self, order: npt.NDArray[Any]) -> "Rows":
        """The rows in another order, which must keep each segment's rows together (as ties of time do)."""
        out, at = [], 0
        for segment, rows in self._parts:
            out.append((segment, rows[order[at : at + len(rows)] - at]))
            at += len(rows)
        return Rows(self._timeline, out)

    def parts(self) -> list[tuple[Segment, npt.NDArray[Any]]]:
        """(segment, row numbers) of each part."""
        return self._parts


class _LazyColumns(Mapping[str, npt.NDArray[Any]]):
    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self._rows.column(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class _Stretch:
    """The states of one thread over a time in which nothing is missing, made when they are asked for.

    A busy thread has tens of thousands of intervals in an operation's look-back, and an operation needs a few of them:
    deriving where they begin and end is one vectorised pass, making each of them (its wake, its queue) is not.
    `stop_mono_ns` is where the stretch ends: later intervals are no part of it, an earlier one is clipped.
    """

    def __init__(
        self, early: list[Interval], starts: npt.NDArray[Any], make: Callable[[int], list[Interval]], stop_mono_ns: int
    ) -> None:
        self._early, self._starts, self._make, self.stop_mono_ns = early, starts, make, stop_mono_ns
        self._made: dict[int, list[Interval]] = {}

    def within(self, start_mono_ns: int, end_mono_ns: int) -> Iterator[Interval]:
        """The intervals that touch [start, end), in order; one or two before them may come along."""
        yield from (i for i in self._early if i.end_mono_ns > start_mono_ns and i.start_mono_ns < end_mono_ns)
        first = max(0, int(np.searchsorted(self._starts, start_mono_ns, side="right")) - 1)
        after = int(np.searchsorted(self._starts, min(end_mono_ns, self.stop_mono_ns), side="left"))
        for k in range(first, after):
            if k not in self._made:
                made = [i for i in self._make(k) if i.start_mono_ns < self.stop_mono_ns]
                self._made[k] = [_ending(i, self.stop_mono_ns) for i in made]
            yield from self._made[k]


def _ending(interval: Interval, at_most_mono_ns: int) -> Interval:
    return interval if interval.end_mono_ns <= at_most_mono_ns else replace(interval, end_mono_ns=at_most_mono_ns)


def _stretch_of(intervals: list[Interval], stop_mono_ns: int) -> _Stretch:
    """A stretch of intervals that are known already."""
    kept = [_ending(i, stop_mono_ns) for i in intervals if i.start_mono_ns < stop_mono_ns]
    return _Stretch(kept, np.empty(0, np.int64), lambda _: [], stop_mono_ns)


def _united(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Overlapping spans joined, in order."""
    out: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


class Timeline:
    """The events of one node within [lo, hi]; see the module's text."""

    def __init__(
        self,
        segments: list[Segment],
        tasks: TaskTable,
        losses: list[Loss],
        *,
        lo_mono_ns: int,
        hi_mono_ns: int,
        node: str,
        boot_id: str,
        session: Mapping[str, Any] | None = None,
        proven_mono_ns: int | None = None,
        focus_mono_ns: int | None = None,
    ) -> None:
        """`proven_mono_ns`: from when on every scheduler event was recorded (None: not known, e.g. an import). `focus_mono_ns`:
        from when on states will be asked for (None: not known); earlier ones may be asked for too, at a cost."""
        self.lo_mono_ns, self.hi_mono_ns = lo_mono_ns, hi_mono_ns
        self.node, self.boot_id = node, boot_id
        self.session: Mapping[str, Any] = session or {}
        self.proven_mono_ns = None if proven_mono_ns is None else max(proven_mono_ns, lo_mono_ns)
        self._focus_mono_ns = hi_mono_ns if focus_mono_ns is None else focus_mono_ns
        self._table = tasks
        self._segments = [s for s in segments if len(s) and s.last_mono_ns >= lo_mono_ns and s.first_mono_ns <= hi_mono_ns]
        touching = [x for x in losses if x.end_mono_ns > lo_mono_ns and x.start_mono_ns <= hi_mono_ns]
        self._all_losses = [x for x in touching if not x.hidden]
        # Up to the event that shows it: later ones are not in the view, and need not have arrived.
        self._hidden = [x for x in touching if x.hidden and x.end_mono_ns <= hi_mono_ns]
        self._states: dict[Key, tuple[int, list[_Stretch]]] = {}
        self._tasks: dict[Key, Task] = {}
        self._tgids: dict[Key, int] = {}
        self._cgroups: dict[Key, int] = {}
        self._subjects: dict[int, Rows] = {}
        self._births: dict[Key, int] = {}
        self._cpus: list[int] | None = None
        self._ids = f"{node}/{boot_id}/"

    # --- rows

    @property
    def segments(self) -> list[Segment]:
        """The sealed events that the view cuts from (they may reach beyond it)."""
        return self._segments

    def event_id(self, cpu: int, seq: int) -> str:
        """Evidence id of an event."""
        return f"{self._ids}{cpu}/{seq}"

    def _clip(self, segment: Segment, rows: npt.NDArray[Any], start: int, end: int) -> npt.NDArray[Any]:
        """The rows (ascending) of a segment with start <= time < end, within the view."""
        if not len(rows):
            return rows
        first = segment.time.searchsorted(max(start, self.lo_mono_ns))
        last = segment.time.searchsorted(min(end, self.hi_mono_ns + 1))
        a, b = rows.searchsorted((first, last))
        return rows[a:b]

    def _select(self, start: int, end: int, rows_of: Any) -> Rows:
        return Rows(
            self,
            [
                (s, self._clip(s, rows_of(s), start, end))
                for s in self._segments
                if s.last_mono_ns >= start and s.first_mono_ns < end
            ],
        )

    def kind(self, name: str, start_mono_ns: int, end_mono_ns: int) -> Rows:
        """Events of one kind in [start, end)."""
        number = BY_NAME[name].number
        return self._select(start_mono_ns, end_mono_ns, lambda s: s.rows_of_kind(number))

    def kinds(self, names: tuple[str, ...], start_mono_ns: int, end_mono_ns: int) -> Rows:
        """Events of several kinds in [start, end), in order of time."""
        numbers = [BY_NAME[n].number for n in names]
        return self._select(start_mono_ns, end_mono_ns, lambda s: np.sort(np.concatenate([s.rows_of_kind(n) for n in numbers])))

    def matching(self, name: str, field_name: str, value: int, start_mono_ns: int, end_mono_ns: int) -> Rows:
        """Events of one kind in [start, end) whose field has a value."""
        rows = self.kind(name, start_mono_ns, end_mono_ns)
        return rows.where(rows.get(field_name, name) == value) if len(rows) else rows

    def of_task(self, tid: int, start_mono_ns: int, end_mono_ns: int) -> Rows:
        """Events in [start, end) during which the thread was current."""
        return self._select(start_mono_ns, end_mono_ns, lambda s: s.rows_of_current(tid))

    def of_task_kinds(self, tid: int, names: tuple[str, ...], start_mono_ns: int, end_mono_ns: int) -> Rows:
        """As `of_task`, only some kinds."""
        numbers = tuple(BY_NAME[n].number for n in names)
        return self._select(start_mono_ns, end_mono_ns, lambda s: s.rows_of_current_kinds(tid, numbers))

    def on_cpu(self, cpu: int, start_mono_ns: int, end_mono_ns: int) -> Rows:
        """Events on a CPU in [start, end)."""
        return self._select(start_mono_ns, end_mono_ns, lambda s: s.rows_of_cpu(cpu))

    def has(self, name: str) -> bool:
        """Is there any event of this kind in the view?"""
        return len(self.kind(name, self.lo_mono_ns, self.hi_mono_ns + 1)) > 0

    def cpus(self) -> list[int]:
        """CPUs that have events."""
        if self._cpus is None:
            self._cpus = sorted({c for s in self._segments for c in s.cpus()})
        return self._cpus

    def losses(self, start_mono_ns: int, end_mono_ns: int) -> list[Loss]:
        """Losses that touch [start, end), without what the kernel hides."""
        return [x for x in self._all_losses if x.end_mono_ns > start_mono_ns and x.start_mono_ns < end_mono_ns]

    def hidden(self, start_mono_ns: int, end_mono_ns: int) -> list[Loss]:
        """Where a switch away from a hidden task lies, of those that touch [start, end)."""
        return [x for x in self._hidden if x.end_mono_ns > start_mono_ns and x.start_mono_ns < end_mono_ns]

    def switch_gaps(self, start_mono_ns: int, end_mono_ns: int, cpu: int | None = None) -> list[Loss]:
        """Where switches are missing, of `cpu` or of any."""
        found = [*self.losses(start_mono_ns, end_mono_ns), *self.hidden(start_mono_ns, end_mono_ns)]
        return [x for x in found if x.hides_states and (cpu is None or x.cpu in (None, cpu))]

    # --- tasks

    def task(self, tid: int, start_boot_ns: int = 0) -> Task:
        """A thread, as known at the end of the view."""
        key = (tid, start_boot_ns)
        if key not in self._tasks:
            facts = self._table.look_up(tid, start_boot_ns, self.hi_mono_ns)
            self._tasks[key] = Task(
                tid=tid,
                start_boot_ns=start_boot_ns,
                tgid=int(facts.get("tgid") or self._tgids.get(key) or (self._tgid_of(tid) if tid else 0)),
                comm=str(facts.get("comm") or ("" if tid else "swapper")),
                cgroup_id=int(facts.get("cgroup_id") or self._cgroups.get(key, 0)),
                cgroup=str(facts.get("cgroup") or ""),
                container=facts.get("container"),
                kthread=bool(facts.get("kthread", False)),
                observer=bool(facts.get("observer", False)),
                parent_tid=int(facts.get("parent_tid") or 0),
            )
        return self._tasks[key]

    def _tgid_of(self, tid: int) -> int:
        for s in reversed(self._segments):
            rows = s.rows_of_current(tid)
            if len(rows):
                return int(s.columns["tgid"][rows[-1]])
        rows_ = self._subject(tid)
        for i in range(len(rows_)):
            if rows_.name(i) != "sched_process_free" and int(rows_["a0"][i]) & 0xFFFFFFFF == tid:
                return int(rows_["a0"][i]) >> 32
        return 0

    def task_at(self, tid: int, time_mono_ns: int) -> Key:
        """Which life of `tid` was there at a time: by the scheduler events nearest to it, else by the task rows."""
        earlier, later = self._start_before(tid, time_mono_ns), self._start_after(tid, time_mono_ns)
        if earlier and later and earlier != later:
            ended = self._ended(tid, earlier)
            return (tid, earlier if ended is None or time_mono_ns <= ended else later)
        if earlier or later:
            return (tid, earlier or later)
        lives = self._table.lives(tid, self.hi_mono_ns)
        for start, told in reversed(lives):
            if told <= time_mono_ns or start == lives[0][0]:
                return (tid, start)
        return (tid, 0)

    def _start_before(self, tid: int, time_mono_ns: int) -> int:
        """The start of the life that the last scheduler event of `tid` before a time names; 0: none does."""
        for s in reversed(self._segments):
            if s.first_mono_ns >= time_mono_ns:
                continue
            rows = self._clip(s, s.subject_rows(tid)[0], self.lo_mono_ns, time_mono_ns)
            for end in range(len(rows), 0, -_CHUNK):
                known = self._named(s, tid, rows[max(0, end - _CHUNK) : end])
                if len(known):
                    return int(known[-1])
        return 0

    def _start_after(self, tid: int, time_mono_ns: int) -> int:
        """The same of the first event at or after a time."""
        for s in self._segments:
            if s.last_mono_ns < time_mono_ns:
                continue
            rows = self._clip(s, s.subject_rows(tid)[0], time_mono_ns, self.hi_mono_ns + 1)
            for begin in range(0, len(rows), _CHUNK):
                known = self._named(s, tid, rows[begin : begin + _CHUNK])
                if len(known):
                    return int(known[0])
        return 0

    def _named(self, segment: Segment, tid: int, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The starts of lives that some rows of a subject name, without those that name none."""
        c = segment.columns
        out = (c["kind"][rows] == _SWITCH.number) & (c["tid"][rows] == tid)
        starts: npt.NDArray[Any] = np.where(out, c["a4"][rows], c["a1"][rows])
        known: npt.NDArray[Any] = starts[starts != 0]
        return known

    def _ended(self, tid: int, start_boot_ns: int) -> int | None:
        """When a life of `tid` was switched out for good; None if that was not seen."""
        rows = self._subject(tid)
        starts, roles = self._starts_of(tid, rows), self._roles(tid, rows)
        states = rows.get("prev_state", "sched_switch")
        mine = np.flatnonzero((starts == start_boot_ns) & (roles == OUT))
        if len(mine) and int(states[mine[-1]]) & _DEAD:
            return int(rows.time[mine[-1]])
        return None

    def known_tids(self) -> list[int]:
        """All threads that changed state in the view."""
        found: set[int] = set()
        low = np.uint64(0xFFFFFFFF)
        for name in ("sched_switch", "sched_waking", "sched_wakeup", "sched_wakeup_new", "sched_process_fork"):
            rows = self.kind(name, self.lo_mono_ns, self.hi_mono_ns + 1)
            found.update(int(t) for t in np.unique(rows.column("a0") & low))
            if name == "sched_switch":
                found.update(int(t) for t in np.unique(rows.column("tid")))
        return sorted(found - {0})

    def lives(self, tid: int) -> list[Key]:
        """The lives of a tid that scheduler events of the view name."""
        starts = self._starts_of(tid, self._subject(tid))
        distinct = list(dict.fromkeys(int(s) for s in starts if s)) or [0]
        return [(tid, s) for s in distinct]

    # --- states

    def _subject(self, tid: int, from_mono_ns: int | None = None) -> Rows:
        """The rows that change the state of a thread, from a time on (default: all), in causal order."""
        if from_mono_ns is None and tid in self._subjects:
            return self._subjects[tid]
        first = self.lo_mono_ns if from_mono_ns is None else from_mono_ns
        clipped = [(s, self._clip(s, s.subject_rows(tid)[0], first, self.hi_mono_ns + 1)) for s in self._segments]
        rows = Rows(self, clipped)
        order = causal_order(rows.time, rows["cpu"], self._roles(tid, rows))
        if (order[1:] < order[:-1]).any():
            rows = rows.ordered(order)
        if from_mono_ns is None:
            self._subjects[tid] = rows
        return rows

    def _tail_start(self, key: Key, start_mono_ns: int) -> int | None:
        """From when on the changes of a busy thread suffice to tell its states from a time on; None: all are needed.

        What a change means depends on its neighbours only. The cut lies at a change that is the only one of its nanosecond,
        some changes before the window, and not within a gap.
        """
        if not key[1] or start_mono_ns <= self.lo_mono_ns:
            return None  # without start times one tid may be several lives, of which only all rows tell
        at = start_mono_ns
        while True:
            cut = self._lone_change(key[0], at)
            if cut is None:
                return None
            spanning = [
                x.start_mono_ns for x in (*self._all_losses, *self._hidden)
                if x.hides_states and x.start_mono_ns <= cut <= x.end_mono_ns
            ]  # fmt: skip
            if not spanning:
                return cut
            at = min(spanning)

    def _lone_change(self, tid: int, before_mono_ns: int) -> int | None:
        for s in reversed(self._segments):
            if s.first_mono_ns >= before_mono_ns:
                continue
            rows, roles = s.subject_rows(tid)
            until = int(rows.searchsorted(s.time.searchsorted(before_mono_ns)))
            for width in (4 * _CHUNK, 64 * _CHUNK):
                begin = max(0, until - width)
                defining = np.flatnonzero(roles[begin:until] <= IN)  # OUT, IN
                times, count = np.unique(s.time[rows[begin:until][defining]], return_counts=True)
                lone = np.flatnonzero((count == 1) & (times > self.lo_mono_ns))
                lone = lone[lone < len(times) - _TAIL_CHANGES]
                if len(lone):
                    return int(times[lone[-1]])
            if until > 64 * _CHUNK:
                return None
        return None

    def _roles(self, tid: int, rows: Rows) -> npt.NDArray[Any]:
        kind = rows.column("kind")
        roles = np.full(len(kind), IN, np.int8)
        for name, role in (
            ("sched_waking", WAKING), ("sched_wakeup", WAKEUP), ("sched_wakeup_new", NEW), ("sched_migrate_task", MIGRATE),
            ("sched_process_fork", FORK),
        ):  # fmt: skip
            roles[kind == BY_NAME[name].number] = role
        is_prev = (kind == _SWITCH.number) & (rows.column("tid") == tid)
        roles[is_prev] = OUT
        return roles

    def _starts_of(self, tid: int, rows: Rows) -> npt.NDArray[Any]:
        if not len(rows):
            return np.empty(0, np.int64)
        out = self._roles(tid, rows) == OUT
        starts: npt.NDArray[Any] = np.where(out, rows.column("a4"), rows.column("a1")).astype(np.int64)
        return starts

    def states(self, key: Key, start_mono_ns: int, end_mono_ns: int) -> list[Interval]:
        """Contiguous states of a thread that cover [start, end) exactly; losses are not yet taken out (see `lost_parts`)."""
        held = self._states.get(key)
        if held is None or start_mono_ns < held[0]:
            wanted = min(start_mono_ns, self._focus_mono_ns)
            cut = self._tail_start(key, wanted) if held is None else None
            known_from = self.lo_mono_ns if cut is None else wanted
            held = self._states[key] = (known_from, self._derive(key, cut))
        out: list[Interval] = []
        at = start_mono_ns
        for interval in (i for stretch in held[1] for i in stretch.within(start_mono_ns, end_mono_ns)):
            if interval.start_mono_ns >= end_mono_ns:
                break
            if interval.end_mono_ns <= at:
                continue
            if interval.start_mono_ns > at:
                out.append(Interval(at, interval.start_mono_ns, UNKNOWN, -1, ()))
            out.append(interval)
            at = interval.end_mono_ns
        if at < end_mono_ns:
            out.append(Interval(at, end_mono_ns, UNKNOWN, -1, ()))
        return out

    def _derive(self, key: Key, cut: int | None = None) -> list[_Stretch]:
        """The states of a life; from a `cut` on, those right after it may be wrong (see `_tail_start`)."""
        rows = self._subject(key[0], cut)
        starts = self._starts_of(key[0], rows)
        if key[1] and len(rows):
            rows = rows.where((starts == key[1]) | (starts == 0))
        if not len(rows):
            return [_stretch_of(self._without_changes(key), _FOR_EVER_NS)]
        roles = self._roles(key[0], rows)
        gaps = self._gaps(rows, roles, self._touched(key[0], rows, roles), -1 if cut is None else cut)
        out: list[_Stretch] = []
        begin, first = (self.proven_mono_ns, self.lo_mono_ns) if cut is None else (None, cut)
        for start, end in [*gaps, (self.hi_mono_ns, self.hi_mono_ns)]:
            last = start == self.hi_mono_ns
            part = rows.where((rows.time >= first) & ((rows.time <= start) | last))
            if len(part):
                out.append(self._derive_part(key, part, begin, start))
            if not last:
                out.append(_stretch_of([Interval(start, end, UNKNOWN, -1, (), lost=True)], end))
            begin = first = end
        return out

    def _touched(self, tid: int, rows: Rows, roles: npt.NDArray[Any]) -> list[Loss]:
        """The windows of hidden switches in which something of this thread is missing, as its neighbouring events do not fit:
        it left the CPU without having come, or came without having been woken. Otherwise nothing can be missing."""
        if not self._hidden:
            return []
        defining = np.flatnonzero(np.isin(roles, (IN, OUT, FORK)))
        changing = np.flatnonzero(roles != MIGRATE)
        asleep = self._blocks(rows, roles)
        found: list[Loss] = []
        for loss in self._hidden:
            past = int(np.searchsorted(rows.time, loss.start_mono_ns, side="right"))
            k, n = int(np.searchsorted(defining, past)) - 1, int(np.searchsorted(changing, past))
            if k < 0:
                continue
            last = int(defining[k])
            sleeps = bool(asleep[last]) and int(changing[n - 1]) == last
            if n == len(changing):
                fits = not sleeps  # nobody knows whether it was woken
            else:
                came = (sleeps or roles[last] == IN) and roles[changing[n]] == IN
                left = roles[last] != IN and k + 1 < len(defining) and roles[defining[k + 1]] == OUT
                doubtful = [x for x in (*self._all_losses, *found) if x.hides_states and x.end_mono_ns > int(rows.time[last])]
                woken = int(roles[changing[n - 1]]) in _WOKEN if n else False
                if left and not any(x.start_mono_ns < loss.end_mono_ns for x in doubtful):
                    left = self._let_in_between(tid, loss, woken, bool(sleeps and int(roles[changing[n]]) not in _WOKEN))
                fits = not (came or left)
            if not fits:
                found.append(loss)
        return found

    def _let_in_between(self, tid: int, loss: Loss, woken: bool, wake_unseen: bool) -> bool:
        """Is anything in doubt of a thread whose switch-in is missing, in a window with one hidden switch? The switch let in
        whoever is shown at the window's end. Shown is somebody else: only if nobody recorded wakes the thread later. Shown is
        this one, woken in a system call: it returns from the call as soon as it runs (see `_let_in_unseen`)."""
        shown = self.on_cpu(loss.cpu, loss.end_mono_ns, loss.end_mono_ns + 1) if loss.cpu is not None else Rows(self, [])
        if loss.count != 1 or not len(shown):
            return True
        if int(shown["tid"][0]) != tid:
            return wake_unseen
        return not (woken and shown.name(0) == "sys_exit")

    @staticmethod
    def _blocks(rows: Rows, roles: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Rows by which the thread goes to sleep."""
        preempt = rows.get("preempt", "sched_switch") == 1
        out: npt.NDArray[np.bool_] = (roles == OUT) & ~preempt
        return out & ~np.isin(rows.get("prev_state", "sched_switch"), _RUNNABLE_STATES)

    def _gaps(
        self, rows: Rows, roles: npt.NDArray[Any], touched: Sequence[Loss] = (), since: int = -1
    ) -> list[tuple[int, int]]:
        """The windows in which missing events could hide what the thread did: all losses, but for the time that the events of
        another CPU prove that it ran there."""
        losses = [x for x in (*self._all_losses, *touched) if x.hides_states and x.start_mono_ns < x.end_mono_ns]
        losses = [x for x in losses if x.end_mono_ns > since]
        if not losses:
            return []
        defining = np.flatnonzero(np.isin(roles, (IN, OUT, FORK)))
        moments = [(int(rows.time[i]), int(roles[i]), int(rows["cpu"][i])) for i in defining]
        found: list[tuple[int, int]] = []
        for loss in losses:
            at = max(loss.start_mono_ns, self.lo_mono_ns)
            end = min(loss.end_mono_ns, self.hi_mono_ns)
            before = [m for m in moments if m[0] <= at]
            runs_elsewhere = bool(before) and before[-1][1] == IN and loss.cpu not in (None, before[-1][2])
            for time, role, cpu in [m for m in moments if at < m[0] < end]:
                if runs_elsewhere and role != IN:
                    at, runs_elsewhere = time, False
                elif not runs_elsewhere and role == IN and loss.cpu not in (None, cpu):
                    found.append((at, time))
                    runs_elsewhere = True
            if not runs_elsewhere and at < end:
                found.append((at, end))
        return _united(found)

    def _derive_part(self, key: Key, rows: Rows, proven: int | None, until: int) -> _Stretch:
        """States from rows between which nothing is missing; what came before the first is proven from `proven` on."""
        roles = self._roles(key[0], rows)
        prev_state = rows.get("prev_state", "sched_switch")
        changes = Changes(np.zeros(len(rows), np.int64), rows.time, roles, self._blocks(rows, roles))
        return self._intervals(key, rows, roles, prev_state, changes, proven, until)

    def _intervals(
        self, key: Key, rows: Rows, roles: npt.NDArray[Any], prev_state: npt.NDArray[Any], changes: Changes, proven: int | None,
        until: int,
    ) -> _Stretch:
        states = derive(changes)
        throttle_out = rows.get("prev_throttled", "sched_switch") == 1
        throttle_wake = rows.get("throttled", "sched_waking") == 1
        cpus = rows.column("cpu")
        target = np.where(
            roles == MIGRATE, rows.get("dest_cpu", "sched_migrate_task"),
            np.where((roles == IN) | (roles == OUT) | (roles == FORK), cpus, rows.get("target_cpu", "sched_waking")),
        )  # fmt: skip
        ends = np.where(states.open, np.minimum(states.end_mono_ns, until), states.end_mono_ns)
        cause_role = roles[states.cause] if len(states.cause) else np.empty(0, np.int8)
        died = (cause_role == OUT) & (prev_state[states.cause] & _DEAD != 0) & np.isin(states.state, (BLOCKED, UNKNOWN))
        lasting = ends > states.start_mono_ns
        deaths = np.flatnonzero(died & lasting)
        kept = np.flatnonzero(lasting)
        if len(deaths):
            kept = kept[kept < deaths[0]]

        def make(i: int) -> list[Interval]:
            k = int(kept[i])
            start, end, state = int(states.start_mono_ns[k]), int(ends[k]), int(states.state[k])
            cause, wake_row = int(states.cause[k]), int(states.wake[k])
            is_open = bool(states.open[k])
            unseen = None
            if state == RUNNING and not is_open and self._next_role(roles, cause) != OUT:
                seen_until = self._switched_away(int(cpus[cause]), start, end)
                if seen_until < end:
                    unseen, end = (seen_until, end), seen_until
            wake = self._wake(rows, wake_row) if wake_row >= 0 else None
            tail: list[Interval] = []
            if self._let_in_unseen(key, roles, changes.blocks, cause, state, start, end, is_open):
                state, end, tail = RUNNABLE, *self._unseen_run(key, rows.id(cause), start, end, woken=roles[cause] != OUT)
                is_open = is_open and not tail
                wake = self._wake(rows, cause) if roles[cause] in _WOKEN else None
            places: tuple[tuple[int, int], ...] = ()
            unplaced = False
            if state == RUNNABLE:
                places, unplaced = self._places(rows, roles, target, cause, start, end)
            throttled = state == RUNNABLE and bool(
                throttle_out[cause] if roles[cause] == OUT else throttle_wake[cause] if roles[cause] != IN else False
            )
            made = [
                Interval(
                    start, end, state, int(places[-1][1] if places else target[cause]), (rows.id(cause),),
                    prev_state=int(prev_state[cause]) if roles[cause] == OUT else 0, wake=wake, open=is_open,
                    throttled=throttled, places=places, unplaced=unplaced, role=int(roles[cause]),
                )
            ]  # fmt: skip
            if unseen is not None:
                made.append(Interval(*unseen, UNKNOWN, int(cpus[cause]), (rows.id(cause),)))
            return [m for m in (*made, *tail) if m.end_mono_ns > m.start_mono_ns]

        early = [i for i in self._prefix(rows, roles, target, proven, until) if i.start_mono_ns < until]
        early = [replace(i, end_mono_ns=min(i.end_mono_ns, until)) for i in early]
        return _Stretch(early, states.start_mono_ns[kept], make, until)

    def _let_in_unseen(
        self, key: Key, roles: npt.NDArray[Any], blocks: npt.NDArray[Any], cause: int, state: int, start: int, end: int,
        is_open: bool,
    ) -> bool:  # fmt: skip
        """Was a runnable thread switched in without a record of it, though nothing is known to be lost? (A kernel may not run
        our programs for a task that it hides, and such a task lets others in.) It leaves a CPU next, or is seen on one."""
        if is_open:
            return state == RUNNABLE and len(self.of_task(key[0], start + 1, end)) > 0
        runnable = roles[cause] in _WOKEN or (roles[cause] == OUT and not blocks[cause])
        return state == UNKNOWN and bool(runnable) and self._next_role(roles, cause) == OUT

    def _unseen_run(self, key: Key, evidence: str, start: int, end: int, *, woken: bool) -> tuple[int, list[Interval]]:
        """(until when the thread stood in line, what follows): it cannot have been let in before the last switch of the CPU
        that it is seen on or leaves, and it ran from the first event that shows it there. One that was woken in a system
        call returns from it as soon as it runs."""
        shown = self.of_task(key[0], start + 1, end + 1)
        cpu, seen = int(shown["cpu"][0]), int(shown.time[0])
        last = self._last_switch(cpu, seen)
        since = max(start, int(last[0].time[last[0].switch_rows(cpu)[last[1]]])) if last is not None else start
        if woken and shown.name(0) == "sys_exit":
            since = seen
        return since, [
            Interval(since, seen, UNKNOWN, cpu, (evidence,)),
            Interval(seen, end, RUNNING, cpu, (shown.id(0),), inferred=True, role=IN),
        ]

    @staticmethod
    def _next_role(roles: npt.NDArray[Any], row: int) -> int:
        """The role of the next row that defines a state."""
        return next((int(r) for r in roles[row + 1 :] if int(r) in (IN, OUT, FORK)), -1)

    def _switched_away(self, cpu: int, start: int, end: int) -> int:
        """When the CPU's next switch says that the thread switched in at `start` no longer ran there, at the latest `end`."""
        switches = self._select(start + 1, end, lambda s: s.switch_rows(cpu))
        return int(switches.time[0]) if len(switches) else end

    def _prefix(
        self, rows: Rows, roles: npt.NDArray[Any], target: npt.NDArray[Any], begin: int | None, until: int
    ) -> list[Interval]:
        """What the first event of a thread proves about the time before it, where everything was recorded."""
        first = int(rows.time[0])
        role = int(roles[0])
        if begin is None or first <= begin or role in (FORK, MIGRATE, NEW):
            # Whatever was before: a thread that is woken can run from then on, unless it is switched out next.
            woken = role in (WAKING, NEW) and OUT not in roles[np.isin(roles, (IN, OUT, FORK))][:1]
            return self._after_first_wake(rows, roles, target, RUNNABLE, first, until) if woken else []
        state = {IN: RUNNABLE, OUT: RUNNING, WAKING: BLOCKED, WAKEUP: UNKNOWN}[role]
        wake = self._wake(rows, 0) if state == BLOCKED else None
        places = ((begin, int(target[0])),) if state == RUNNABLE else ()
        end = first
        if role == WAKING:
            # The thread may have been running when it was woken: only a switch-in next proves that it slept.
            later = roles[1:][np.isin(roles[1:], (IN, OUT))][:1]
            if list(later) == [OUT]:
                state, wake = RUNNING, None
            elif not len(later) and begin != self.proven_mono_ns:
                return []
        result = [Interval(begin, end, state, int(target[0]), (rows.id(0),), wake=wake, inferred=True, places=places)]
        if role == WAKING:
            result += self._after_first_wake(rows, roles, target, state, first, until)
        return result

    def _after_first_wake(
        self, rows: Rows, roles: npt.NDArray[Any], target: npt.NDArray[Any], state: int, first: int, until: int
    ) -> list[Interval]:
        defining = np.flatnonzero(np.isin(roles, (IN, OUT, FORK)))[:1]
        end = int(rows.time[defining[0]]) if len(defining) else until
        if end <= first:
            return []
        if state == RUNNING:
            return [Interval(first, end, RUNNING, int(rows["cpu"][defining[0]]), (rows.id(0),), inferred=True)]
        places, unplaced = self._places(rows, roles, target, 0, first, end)
        wake = self._wake(rows, 0)
        throttled = bool(rows.get("throttled", "sched_waking")[0] == 1)
        return [
            Interval(
                first, end, RUNNABLE, places[-1][1], (rows.id(0),), wake=wake, open=not len(defining), places=places,
                unplaced=unplaced, throttled=throttled,
            )
        ]  # fmt: skip

    def _without_changes(self, key: Key) -> list[Interval]:
        """A thread without scheduler events: running throughout if it was seen as current, else as the snapshot says; up to the
        first gap in the record, after which nothing proves anything."""
        begin, end = self.proven_mono_ns, self.hi_mono_ns
        if begin is None or end <= begin:
            return []
        gaps = self._gaps(Rows(self, []), np.empty(0, np.int8))
        lost = [Interval(a, b, UNKNOWN, -1, (), lost=True) for a, b in gaps if b > begin]
        if lost:
            end = max(begin, lost[0].start_mono_ns)
        seen = self.of_task(key[0], self.lo_mono_ns, end + 1)
        row = self._table.snapshots(*key, self.lo_mono_ns, end)
        if end == begin or not (len(seen) or row):
            return lost
        if len(seen):
            return [Interval(begin, end, RUNNING, int(seen["cpu"][0]), (seen.id(0),), inferred=True), *lost]
        state = UNKNOWN if row is None or row.get("state", "?") == "R" else BLOCKED
        cpu = -1 if row is None or row.get("cpu") is None else int(row["cpu"])
        return [Interval(begin, end, state, cpu, (), open=True, inferred=True), *lost]

    def _places(
        self, rows: Rows, roles: npt.NDArray[Any], target: npt.NDArray[Any], cause: int, start: int, end: int
    ) -> tuple[tuple[tuple[int, int], ...], bool]:
        """The CPUs on whose queue a runnable thread stood. A thread being woken counts for its last CPU until it is moved."""
        places: list[tuple[int, int]] = [(start, int(target[cause]))]
        run_cpu = None
        for i in range(cause + 1, len(roles)):
            role, time = int(roles[i]), int(rows.time[i])
            if role in (IN, OUT, FORK):
                run_cpu = int(rows["cpu"][i]) if role == IN else None
                break
            if role in (MIGRATE, WAKEUP):
                if time <= start:
                    places[-1] = (places[-1][0], int(target[i]))
                elif places[-1][1] != int(target[i]):
                    places.append((time, int(target[i])))
        unplaced = run_cpu is not None and places[-1][1] != run_cpu
        return tuple(p for p in places if p[0] < end), unplaced

    def _wake(self, rows: Rows, i: int) -> Wake:
        tid, time, cpu = int(rows["tid"][i]), int(rows.time[i]), int(rows["cpu"][i])
        frames, certain = self.context(cpu, time, int(rows["seq"][i]))
        names = tuple(f.name for f in frames)
        if not names and int(rows["flags"][i]) & (FLAG_HARDIRQ | FLAG_SOFTIRQ):
            names = ("hardirq",) if int(rows["flags"][i]) & FLAG_HARDIRQ else ("softirq",)
        waker = (tid, 0) if tid in (0, UNKNOWN_TID) else self.task_at(tid, time)
        self._tgids.setdefault(waker, int(rows["tgid"][i]))
        waking = int(rows["kind"][i]) == _WAKING.number
        thaws = waking and bool(int(_WAKING.get(_LazyColumns(rows), "state")[i]) & _FROZEN)
        return Wake(
            time, waker, cpu, names, (rows.id(i),),
            exact=int(rows["kind"][i]) != BY_NAME["sched_wakeup"].number, certain=certain, thaws=thaws,
        )  # fmt: skip

    # --- CPUs

    def occupants(self, cpu: int, start_mono_ns: int, end_mono_ns: int) -> list[Occupant]:
        """Who had the CPU, covering what is known of [start, end); idle is tid 0. Losses are not yet taken out."""
        rows = self._switches_around(cpu, start_mono_ns, end_mono_ns)
        if not len(rows):
            return self._lone_occupant(cpu, start_mono_ns, end_mono_ns)
        time, out = rows.time, []
        first = int(time[0])
        if first > start_mono_ns:
            begin = max(start_mono_ns, self.proven_mono_ns if self.proven_mono_ns is not None else first)
            begin = max([begin, *(x.end_mono_ns for x in self.switch_gaps(begin, first, cpu))])
            if begin < first and begin < end_mono_ns:
                out.append(self._occupant(rows, 0, begin, min(first, end_mono_ns), previous=True))
        if not self.switch_gaps(first, self.hi_mono_ns + 1, cpu):
            return out + self._occupants_in_a_row(cpu, rows, start_mono_ns, end_mono_ns)
        for i in range(len(rows)):
            begin = max(int(time[i]), start_mono_ns)
            end = min(int(time[i + 1]) if i + 1 < len(rows) else end_mono_ns, end_mono_ns)
            if begin < end:
                out += self._occupied(cpu, rows, i, begin, end)
        return out

    def _occupants_in_a_row(self, cpu: int, rows: Rows, start: int, end: int) -> list[Occupant]:
        """The occupants from consecutive switches between which no loss is known; a broken chain leaves a hole."""
        following = self._next_switch(cpu, end)
        left = [*rows["tid"].tolist()[1:], *(following["tid"].tolist() or [-1])]
        times = [*rows.time.tolist(), end]
        tids, tgids = rows.get("next_tid", "sched_switch").tolist(), rows.get("next_tgid", "sched_switch").tolist()
        begun = rows.get("next_start_boot_ns", "sched_switch").tolist()
        prio, policy = rows.get("next_prio", "sched_switch").tolist(), rows.get("next_policy", "sched_switch").tolist()
        kthread, cgroup = rows.get("next_kthread", "sched_switch").tolist(), rows.get("next_cgroup_id", "sched_switch").tolist()
        cpus, seqs = rows["cpu"].tolist(), rows["seq"].tolist()
        out = []
        for i, tid in enumerate(tids):
            a, b = max(times[i], start), min(times[i + 1], end)
            if a >= b or (left[i] == -1 and self._may_be_hidden(tid, times[i])):
                continue
            if left[i] not in (tid, -1):
                out += self._after_a_break(cpu, rows, i, following, a, b)
                continue
            key = (tid, begun[i] if tid else 0)
            self._tgids.setdefault(key, tgids[i])
            if cgroup[i]:
                self._cgroups.setdefault(key, cgroup[i])
            realtime = policy[i] in (1, 2, 6) and prio[i] < 100
            proof = (self.event_id(cpus[i], seqs[i]),)
            out.append(Occupant(a, b, key, tgids[i], realtime, bool(kthread[i]), cgroup[i], proof))
        return out

    def _occupied(self, cpu: int, rows: Rows, i: int, begin: int, end: int) -> list[Occupant]:
        """Who had the CPU from switch i on: whom it let in, until a gap; after that, whom the next switch lets go."""
        since = int(rows.time[i])
        following = rows if i + 1 < len(rows) else self._next_switch(cpu, end)
        k = i + 1 if i + 1 < len(rows) else 0
        until = int(following.time[k]) if k < len(following) else self.hi_mono_ns + 1
        gaps = self.switch_gaps(since, until, cpu)
        if not gaps:
            let_in = int(rows["a0"][i]) & 0xFFFFFFFF
            if k < len(following) and let_in != int(following["tid"][k]):
                return self._after_a_break(cpu, rows, i, self._next_switch(cpu, end), begin, end)
            hidden = k >= len(following) and self._may_be_hidden(let_in, since)
            return [] if hidden else [self._occupant(rows, i, begin, end, previous=False)]
        first, last = min(x.start_mono_ns for x in gaps), max(x.end_mono_ns for x in gaps)
        out = []
        if begin < min(first, end):
            out.append(self._occupant(rows, i, begin, min(first, end), previous=False))
        if max(begin, last) < end and k < len(following):
            out.append(self._occupant(following, k, max(begin, last), end, previous=True))
        return out

    def _after_a_break(self, cpu: int, rows: Rows, i: int, later: Rows, begin: int, end: int) -> list[Occupant]:
        """Who had the CPU in [begin, end) after switch i let somebody in whom nobody saw leave: a switch is missing here, and
        the one who left next had the CPU from the first event on that shows him there."""
        following, k = (rows, i + 1) if i + 1 < len(rows) else (later, 0)
        until = int(following.time[k])
        seen = self._first_seen(int(following["tid"][k]), cpu, int(rows.time[i]), until)
        seen = max(seen, begin)
        return [self._occupant(following, k, seen, end, previous=True)] if seen < end else []

    def _first_seen(self, tid: int, cpu: int, start: int, end: int) -> int:
        """The first event after `start` with this thread as current on a CPU, or `end`."""
        rows = self.of_task(tid, start + 1, end)
        here = rows.where(rows["cpu"] == cpu) if len(rows) else rows
        return int(here.time[0]) if len(here) else end

    def _may_be_hidden(self, tid: int, since: int) -> bool:
        """Could a thread that was let in have left the CPU without an event? If the snapshot has other threads but not it, and
        no event is its own, it may be one that the kernel hides; only a later event of its CPU can tell."""
        snapshot = self.proven_mono_ns is not None and any(self._table.children())
        if not tid or not snapshot or self._table.lives(tid, self.hi_mono_ns):
            return False
        return not len(self.of_task(tid, since, self.hi_mono_ns + 1))

    def _next_switch(self, cpu: int, after: int) -> Rows:
        for s in self._segments:
            rows = self._clip(s, s.switch_rows(cpu), after, self.hi_mono_ns + 1)
            if len(rows):
                return Rows(self, [(s, rows[:1])])
        return Rows(self, [])

    def _switches_around(self, cpu: int, start: int, end: int) -> Rows:
        """Switches on a CPU in [start, end), with the last one before and, if there is none before, the first one after."""
        parts = []
        before = self._last_switch(cpu, start)
        if before is not None:
            parts.append((before[0], before[0].switch_rows(cpu)[before[1] : before[1] + 1]))
        inside = self._select(start, end, lambda s: s.switch_rows(cpu))
        parts += inside.parts()
        if not parts:
            for s in self._segments:
                rows = self._clip(s, s.switch_rows(cpu), end, self.hi_mono_ns + 1)
                if len(rows):
                    parts.append((s, rows[:1]))
                    break
        return Rows(self, parts)

    def _last_switch(self, cpu: int, before: int) -> tuple[Segment, int] | None:
        """(segment, position in its switch_rows) of the last switch on a CPU before a time."""
        for s in reversed(self._segments):
            if s.first_mono_ns >= before:
                continue
            rows = s.switch_rows(cpu)
            limit = np.searchsorted(s.time, before)
            i = int(np.searchsorted(rows, limit)) - 1
            if i >= 0:
                return (s, i) if int(s.time[rows[i]]) >= self.lo_mono_ns else None
        return None

    def _occupant(self, rows: Rows, i: int, start: int, end: int, *, previous: bool) -> Occupant:
        row = rows.decode(i)
        side = "prev" if previous else "next"
        tid = row["current_tid"] if previous else row["next_tid"]
        tgid = row["current_tgid"] if previous else row["next_tgid"]
        key = (tid, row[f"{side}_start_boot_ns"] if tid else 0)
        cgroup = 0 if previous else row["next_cgroup_id"]
        self._tgids.setdefault(key, tgid)
        if cgroup:
            self._cgroups.setdefault(key, cgroup)
        policy, prio = row[f"{side}_policy"], row[f"{side}_prio"]
        realtime = policy in (1, 2, 6) and prio < 100
        return Occupant(start, end, key, tgid, realtime, bool(row[f"{side}_kthread"]), cgroup, (rows.id(i),))

    def _lone_occupant(self, cpu: int, start: int, end: int) -> list[Occupant]:
        if self.proven_mono_ns is None or max(start, self.proven_mono_ns) >= end:
            return []
        seen = self.on_cpu(cpu, self.lo_mono_ns, self.hi_mono_ns + 1)
        if not len(seen):
            return []
        tid = int(seen["tid"][0])
        key = self.task_at(tid, int(seen.time[0])) if tid else (0, 0)
        begin = max(start, self.proven_mono_ns)
        return [Occupant(begin, end, key, int(seen["tgid"][0]), False, False, 0, (seen.id(0),))]

    def frames(self, cpu: int, start_mono_ns: int, end_mono_ns: int) -> list[IrqFrame]:
        """Interrupt frames that touch [start, end) on a CPU, outer before inner, clipped to the window."""
        if not self._has_frames(cpu, start_mono_ns - _FRAME_MAX_NS, end_mono_ns) and not self._all_losses:
            return []
        before = self._last_switch(cpu, start_mono_ns)
        begin = self.lo_mono_ns
        if before is not None:
            begin = int(before[0].time[before[0].switch_rows(cpu)[before[1]]])
        if start_mono_ns - begin > _FRAME_MAX_NS:  # a frame does not last that long: do not re-read a hog's whole run
            begin = start_mono_ns - _FRAME_MAX_NS
        gaps = [x for x in self.losses(begin, end_mono_ns) if x.cpu in (None, cpu) and x.family in _FRAME_LOSSES]
        until = self.hi_mono_ns + 1 if gaps else end_mono_ns
        rows = self._select(begin, until, lambda s: s.frame_rows(cpu))
        found = _stack(rows, end_mono_ns, gaps=_united([(x.start_mono_ns, x.end_mono_ns) for x in gaps]))
        kept = [f for f in found if f.end_mono_ns > start_mono_ns and f.start_mono_ns < end_mono_ns]
        renumber = {id(found[i]): i for i in range(len(found))}
        position = {renumber[id(f)]: k for k, f in enumerate(kept)}
        return [
            IrqFrame(
                max(f.start_mono_ns, start_mono_ns), min(f.end_mono_ns, end_mono_ns), f.name, f.kind,
                position.get(f.parent, -1), f.evidence,
            )
            for f in kept
        ]  # fmt: skip

    def nmis(self, cpu: int, start_mono_ns: int, end_mono_ns: int) -> list[IrqFrame]:
        """Non-maskable interrupts that touch [start, end) on a CPU. Their event comes at their end, and tells their length."""
        rows = self.kind("nmi_handler", start_mono_ns, end_mono_ns + _NMI_MAX_NS)
        if not len(rows):
            return []
        rows = rows.where(rows["cpu"] == cpu)
        out: list[IrqFrame] = []
        for i, took in enumerate(rows.get("delta_ns", "nmi_handler").tolist()):
            end = int(rows.time[i])
            a, b = max(end - took, start_mono_ns, out[-1].end_mono_ns if out else start_mono_ns), min(end, end_mono_ns)
            if 0 < took <= _NMI_MAX_NS and a < b:
                out.append(IrqFrame(a, b, "nmi", "nmi", -1, (rows.id(i),)))
        return out

    def context(self, cpu: int, time_mono_ns: int, seq: int) -> tuple[list[IrqFrame], bool]:
        """(interrupt frames around an event, outermost first; is that certain?). Uncertain: events are missing just before."""
        if not self._all_losses and not self._has_frames(cpu, self.lo_mono_ns, time_mono_ns + 1):
            return [], True
        before = self._last_switch(cpu, time_mono_ns + 1)
        begin = self.lo_mono_ns
        if before is not None:
            begin = int(before[0].time[before[0].switch_rows(cpu)[before[1]]])
        rows = self._recent_frames(cpu, begin, time_mono_ns)
        found = _stack(rows, None, stop=(time_mono_ns, seq))
        frames = [f for f in found if f.end_mono_ns < 0]
        lost = any(
            x.cpu in (None, cpu) and x.start_mono_ns < time_mono_ns and x.end_mono_ns > begin
            and x.family in _FRAME_LOSSES
            for x in self._all_losses
        )  # fmt: skip
        return frames, not lost

    def _has_frames(self, cpu: int, start: int, end: int) -> bool:
        """Any entry or exit of interrupt context on a CPU in [start, end)?"""
        for s in self._segments:
            rows = s.frame_rows(cpu)
            if len(rows) and len(self._clip(s, rows, start, end)):
                return True
        return False

    def _recent_frames(self, cpu: int, begin: int, time: int) -> Rows:
        parts: list[tuple[Segment, npt.NDArray[Any]]] = []
        wanted = _CONTEXT_SCAN
        for s in reversed(self._segments):
            if s.first_mono_ns > time or s.last_mono_ns < begin or wanted <= 0:
                continue
            rows = self._clip(s, s.frame_rows(cpu), begin, time + 1)[-wanted:]
            parts.insert(0, (s, rows))
            wanted -= len(rows)
        return Rows(self, parts)

    # --- system calls

    def syscall_at(self, key: Key, time_mono_ns: int) -> Syscall | None:
        """The system call that the thread is in at a time: from its entry before, or from its exit after, or the snapshot."""
        rows = self._current_before(key[0], time_mono_ns)
        after = self._current_after(key[0], time_mono_ns)
        if len(after) and self._hides_calls(time_mono_ns, int(after.time[0])):
            after = Rows(self, [])
        if len(rows) and self._holds_since(key, rows, time_mono_ns):
            return None if rows.name(0) == "sys_exit" else _syscall(rows, after)
        if len(after):
            if after.name(0) != "sys_exit":
                return None
            row = after.decode(0)
            return Syscall(
                row["nr"], (row["arg0"], row["arg1"]), row["object_type"], row["object"], None, row["time_mono_ns"], row["ret"],
                (after.id(0),),
            )  # fmt: skip
        snapshot = self._table.snapshots(*key, self.lo_mono_ns, self.hi_mono_ns)
        if self._hides_calls(self.lo_mono_ns, time_mono_ns) or (snapshot and self._ran_unwatched(key, snapshot, time_mono_ns)):
            return None
        if snapshot and snapshot.get("syscall_nr") is not None and int(snapshot["syscall_nr"]) >= 0:
            args = tuple(int(snapshot.get(f"syscall_arg{i}") or 0) for i in range(3))
            return Syscall(int(snapshot["syscall_nr"]), args, 0, 0, None, None, None, ())
        return None

    def _ran_unwatched(self, key: Key, snapshot: Mapping[str, Any], time_mono_ns: int) -> bool:
        """Has a thread whose calls are not recorded run since the snapshot? Then it may be in any other call by now."""
        if snapshot.get("watched", True):
            return False
        rows = self._subject(key[0])
        ran = (self._roles(key[0], rows) == IN) & (rows.time < time_mono_ns)
        return bool((ran & (rows.time > int(snapshot.get("time_mono_ns") or 0))).any())

    def _born(self, key: Key) -> int:
        """When this life of a tid began, if that was seen: calls before are another's (the last one never returns)."""
        if key not in self._births:
            rows = self._select(self.lo_mono_ns, self.hi_mono_ns + 1, lambda s: s.birth_rows(key[0]))
            rows = rows.where(rows["a1"] == np.uint64(key[1])) if len(rows) else rows
            self._births[key] = int(rows.time[0]) if len(rows) else self.lo_mono_ns
        return self._births[key]

    def _hides_calls(self, start: int, end: int) -> bool:
        """Are events missing in the window that could be entries to or exits from system calls?"""
        return any(x.family in ("", "sched", "syscalls") for x in self.losses(start, end))

    def _holds_since(self, key: Key, rows: Rows, time_mono_ns: int) -> bool:
        """Does the last recorded entry or exit (the one row of `rows`) still say where this life of the thread is?"""
        return int(rows.time[0]) >= self._born(key) and not self._hides_calls(int(rows.time[0]), time_mono_ns)

    def in_kernel(self, key: Key, time_mono_ns: int) -> bool | None:
        """Is the thread in a system call at a time? None: the events that would tell are missing."""
        rows = self._current_before(key[0], time_mono_ns)
        if len(rows) and self._holds_since(key, rows, time_mono_ns):
            return rows.name(0) != "sys_exit"
        after = self._current_after(key[0], time_mono_ns)
        if len(after) and not self._hides_calls(time_mono_ns, int(after.time[0])):
            return after.name(0) == "sys_exit"
        return None if self._hides_calls(self.lo_mono_ns, self.hi_mono_ns) else False

    def records_syscalls(self, key: Key) -> bool:
        """Were system calls of this thread recorded in the view?"""
        for s in self._segments:
            if len(self._clip(s, s.rows_of_current_kinds(key[0], _SYSCALL_KINDS), self.lo_mono_ns, self.hi_mono_ns + 1)):
                return True
        return False

    def _current_before(self, tid: int, time: int) -> Rows:
        """The last entry to or exit from a system call of a thread at or before a time."""
        for s in reversed(self._segments):
            if s.first_mono_ns <= time:
                rows = s.rows_of_current_kinds(tid, _SYSCALL_KINDS)
                at = int(rows.searchsorted(s.time.searchsorted(time + 1))) - 1
                if at >= 0:
                    return Rows(self, [(s, rows[at : at + 1])] if int(s.time[rows[at]]) >= self.lo_mono_ns else [])
        return Rows(self, [])

    def _current_after(self, tid: int, time: int) -> Rows:
        """The first entry or exit after a time."""
        for s in self._segments:
            if s.last_mono_ns > time:
                rows = s.rows_of_current_kinds(tid, _SYSCALL_KINDS)
                at = int(rows.searchsorted(s.time.searchsorted(max(time + 1, self.lo_mono_ns))))
                if at < len(rows):
                    return Rows(self, [(s, rows[at : at + 1])] if int(s.time[rows[at]]) <= self.hi_mono_ns else [])
        return Rows(self, [])


_SYSCALL_KINDS: Final = tuple(BY_NAME[n].number for n in ("sys_enter", "sys_enter_futex", "sys_exit"))


def _syscall(enter: Rows, after: Rows) -> Syscall:
    row = enter.decode(0)
    exit_row = after.decode(0) if len(after) and after.name(0) == "sys_exit" else None
    ended = exit_row["time_mono_ns"] if exit_row else None
    ret = exit_row["ret"] if exit_row else None
    if enter.name(0) == "sys_enter_futex":
        futex = {k: row[k] for k in ("op", "val", "uaddr", "word", "owner", "uaddr2", "timeout")}
        return Syscall(
            _NR_FUTEX, (row["uaddr"], row["op"], row["val"]), 0, 0, row["time_mono_ns"], ended, ret, (enter.id(0),), futex
        )
    args = (row["arg0"], row["arg1"], row["arg2"])
    return Syscall(
        row["nr"], args, row["object_type"], row["object"], row["time_mono_ns"], ended, ret, (enter.id(0),)
    )


_SOFTIRQ_NAMES: Final = ("HI", "TIMER", "NET_TX", "NET_RX", "BLOCK", "IRQ_POLL", "TASKLET", "SCHED", "HRTIMER", "RCU")
_ENTRY: Final = {
    "irq_handler_entry": ("irq", "hard"), "softirq_entry": ("softirq", "soft"), "tasklet_entry": ("tasklet", "soft"),
    "local_timer_entry": ("local_timer", "hard"), "reschedule_entry": ("reschedule", "hard"),
    "call_function_entry": ("call_function", "hard"), "call_function_single_entry": ("call_function_single", "hard"),
    "irq_work_entry": ("irq_work", "hard"), "hrtimer_expire_entry": ("hrtimer", "timer"),
    "timer_expire_entry": ("timer", "timer"),
}  # fmt: skip
_EXIT: Final = {name.replace("_entry", "_exit"): stem for name, (stem, _) in _ENTRY.items()}
_ENTRY_BY_KIND: Final = {BY_NAME[n].number: (n, *v) for n, v in _ENTRY.items()}
_EXIT_BY_KIND: Final = {BY_NAME[n].number: v for n, v in _EXIT.items()}


def _frame_name(rows: Rows, i: int, stem: str) -> str:
    a0 = int(rows["a0"][i])
    if stem == "irq":
        raw = int(rows["a1"][i]).to_bytes(8, "little") + int(rows["a2"][i]).to_bytes(8, "little")
        return f"irq/{a0 & 0xFFFFFFFF} {raw.rstrip(bytes(1)).decode(errors='replace')}".rstrip()
    if stem == "softirq":
        return f"softirq {_SOFTIRQ_NAMES[a0] if a0 < len(_SOFTIRQ_NAMES) else a0}"
    return stem


def _stack(
    rows: Rows, end: int | None, stop: tuple[int, int] | None = None, gaps: list[tuple[int, int]] | None = None
) -> list[IrqFrame]:
    """Frames of one CPU's entries and exits. An exit closes the innermost entry of its name and what is open inside it; one
    without an entry is ignored, but after a gap in the record it proves a frame from there on. Frames still open end at
    `end`, or have end -1 when a `stop` (time, seq) is given; a gap ends all."""
    frames: list[IrqFrame] = []
    stems: list[str] = []
    open_: list[int] = []
    missing = list(gaps or [])
    resumed = None
    kinds, times, seqs = rows["kind"].tolist(), rows.time.tolist(), rows["seq"].tolist()
    for i, kind in enumerate(kinds):
        if stop is not None and (times[i], seqs[i]) >= stop:
            break
        while missing and times[i] >= missing[0][1]:
            begin, resumed = missing.pop(0)
            _close(frames, open_, stems, begin)
        if kind in _ENTRY_BY_KIND:
            _, stem, sort = _ENTRY_BY_KIND[kind]
            open_.append(len(frames))
            stems.append(stem)
            parent = open_[-2] if len(open_) > 1 else -1
            frames.append(IrqFrame(times[i], -1, _frame_name(rows, i, stem), sort, parent, (rows.id(i),)))
        elif kind in _EXIT_BY_KIND and _EXIT_BY_KIND[kind] in stems:
            while True:
                stem = stems.pop()
                frames[open_.pop()].end_mono_ns = times[i]
                if stem == _EXIT_BY_KIND[kind]:
                    break
        elif kind in _EXIT_BY_KIND and resumed is not None:
            stem = _EXIT_BY_KIND[kind]
            sort = next(v[2] for v in _ENTRY_BY_KIND.values() if v[1] == stem)
            frames.append(IrqFrame(resumed, times[i], _frame_name(rows, i, stem), sort, -1, (rows.id(i),)))
    if end is not None:
        _close(frames, open_, stems, min([end, *(g[0] for g in missing)]))
    return sorted(frames, key=lambda f: (f.start_mono_ns, -f.end_mono_ns)) if resumed is not None else frames


def _close(frames: list[IrqFrame], open_: list[int], stems: list[str], time: int) -> None:
    for k in open_:
        frames[k].end_mono_ns = max(time, frames[k].start_mono_ns)
    open_.clear()
    stems.clear()
