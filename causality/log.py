"""The events of one node, in memory: in total order, without duplicates, indexed, and forgotten when nobody needs them.

Frames arrive in any order. An event is *sealed* once the node's watermark has passed it: then nothing older can come, and the
order (time, cpu, seq) is final. Sealed events live in segments: columns sorted by that order, with indexes by kind, by
current thread and by subject thread that are built when first asked for. Duplicates (same cpu, seq and time) are dropped. An
event older than the seal that is not a duplicate is late: it is put where it belongs, and counted.

Loss: rows of loss frames, and holes in a CPU's sequence numbers that no row explains.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from events.kinds import BY_NAME
from events.records import EVENTS

__all__ = ["FORK", "IN", "MIGRATE", "OUT", "WAKEUP", "WAKING", "Columns", "EventLog", "Segment"]

Columns = Mapping[str, npt.NDArray[Any]]
Ints = npt.NDArray[np.int64]

_NAMES: Final = tuple(f.name for f in EVENTS)
_DTYPES: Final = {f.name: np.dtype(f.type.to_pandas_dtype()) for f in EVENTS}
_TASK_ROWS_MAX: Final = 4096  # (thread, kinds) whose rows a segment remembers
_SEGMENT_ROWS: Final = 1 << 20  # small enough to evict in steps, large enough that a query visits few

# Roles of a subject's row: what the event does to the thread's state.
OUT, IN, WAKING, WAKEUP, FORK, NEW, MIGRATE = range(7)
# (kind, role, which argument holds the subject); a0's low half is the subject of all but switch-out, whose subject is current.
_SUBJECTS: Final = (
    ("sched_switch", IN), ("sched_waking", WAKING), ("sched_wakeup", WAKEUP), ("sched_wakeup_new", NEW),
    ("sched_migrate_task", MIGRATE), ("sched_process_fork", FORK),
)  # fmt: skip


def _group(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """(distinct values ascending, offsets, stable order) such that order[offsets[i]:offsets[i + 1]] are the rows of values[i].

    Small alphabets sort by radix (16 bits); a table of all possible values makes that so for thread ids.
    """
    if len(values) == 0:
        return values, np.zeros(1, np.int64), np.empty(0, np.int64)
    top = int(values.max())
    if top < 1 << 23:
        table = np.zeros(top + 1, np.int32)
        table[values] = 1
        distinct = np.flatnonzero(table)
        table[distinct] = np.arange(len(distinct), dtype=np.int32)
        dense = table[values]
    else:
        distinct, dense = np.unique(values, return_inverse=True)
    if len(distinct) < 1 << 16:
        dense = dense.astype(np.uint16)
    order = np.argsort(dense, kind="stable")
    offsets = np.concatenate(([0], np.cumsum(np.bincount(dense, minlength=len(distinct)))))
    return distinct, offsets, order


class Segment:
    """Sealed events: `columns` sorted by (time, cpu, seq)."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self.time: Ints = columns["time_mono_ns"]
        self._by_cpu: dict[tuple[str, int], npt.NDArray[Any]] = {}
        self._by_task: dict[tuple[int, tuple[int, ...]], npt.NDArray[Any]] = {}

    def __len__(self) -> int:
        return len(self.time)

    @property
    def first_mono_ns(self) -> int:
        """Time of the first event."""
        return int(self.time[0])

    @property
    def last_mono_ns(self) -> int:
        """Time of the last event."""
        return int(self.time[-1])

    @cached_property
    def _kinds(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        kind = self.columns["kind"]
        return np.argsort(kind, kind="stable"), np.concatenate(([0], np.cumsum(np.bincount(kind, minlength=256))))

    def rows_of_kind(self, number: int) -> npt.NDArray[Any]:
        """Row numbers of one kind, ascending."""
        order, offsets = self._kinds
        rows: npt.NDArray[Any] = order[offsets[number] : offsets[number + 1]]
        return rows

    @cached_property
    def _tids(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        return _group(self.columns["tid"])

    def rows_of_current(self, tid: int) -> npt.NDArray[Any]:
        """Row numbers of the events during which `tid` was current, ascending."""
        return _pick(self._tids, tid)

    @cached_property
    def _kinds_by_tid(self) -> npt.NDArray[Any]:
        kinds: npt.NDArray[Any] = self.columns["kind"][self._tids[2]]
        return kinds

    def rows_of_current_kinds(self, tid: int, numbers: tuple[int, ...]) -> npt.NDArray[Any]:
        """As `rows_of_current`, only events of some kinds; found once a thread and set of kinds."""
        held = self._by_task.get((tid, numbers))
        if held is None:
            span = _span(self._tids, tid)
            wanted = np.zeros(256, np.bool_)
            wanted[list(numbers)] = True
            held = self._tids[2][span][wanted[self._kinds_by_tid[span]]]
            if len(self._by_task) >= _TASK_ROWS_MAX:
                self._by_task.clear()
            self._by_task[tid, numbers] = held
        return held

    @cached_property
    def _subjects(self) -> tuple[tuple[Any, Any, Any], npt.NDArray[Any], npt.NDArray[Any]]:
        rows, tids, roles = [], [], []
        low = np.uint64(0xFFFFFFFF)
        for name, role in _SUBJECTS:
            found = self.rows_of_kind(BY_NAME[name].number)
            rows.append(found)
            tids.append((self.columns["a0"][found] & low).astype(np.int64))
            roles.append(np.full(len(found), role, np.int8))
            if role == IN:
                rows.append(found)
                tids.append(self.columns["tid"][found].astype(np.int64))
                roles.append(np.full(len(found), OUT, np.int8))
        row, tid, role_ = np.concatenate(rows), np.concatenate(tids), np.concatenate(roles)
        by_row = np.argsort(row, kind="stable")
        row, tid, role_ = row[by_row], tid[by_row], role_[by_row]
        grouped = _group(tid)
        return grouped, row[grouped[2]], role_[grouped[2]]

    def subject_rows(self, tid: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """(row numbers, roles) of the events that change the state of thread `tid`, in order."""
        grouped, row, role = self._subjects
        span = _span(grouped, tid)
        return row[span], role[span]

    @cached_property
    def _births(self) -> tuple[tuple[Any, Any, Any], npt.NDArray[Any]]:
        names = ("sched_wakeup_new", "sched_process_fork")
        rows = np.sort(np.concatenate([self.rows_of_kind(BY_NAME[n].number) for n in names]))
        return _group((self.columns["a0"][rows] & np.uint64(0xFFFFFFFF)).astype(np.int64)), rows

    def birth_rows(self, tid: int) -> npt.NDArray[Any]:
        """Row numbers of the events with which a life of thread `tid` begins, ascending."""
        grouped, rows = self._births
        found: npt.NDArray[Any] = rows[_pick(grouped, tid)]
        return found

    @cached_property
    def _switches(self) -> tuple[tuple[Any, Any, Any], npt.NDArray[Any]]:
        rows = self.rows_of_kind(BY_NAME["sched_switch"].number)
        return _group(self.columns["cpu"][rows]), rows

    def switch_rows(self, cpu: int) -> npt.NDArray[Any]:
        """Row numbers of the switches on one CPU, ascending."""
        return self._of_cpu("switches", cpu)

    def _of_cpu(self, what: str, cpu: int) -> npt.NDArray[Any]:
        """Copied out of the index once a CPU: every wake-up that is explained asks for them."""
        held = self._by_cpu.get((what, cpu))
        if held is None:
            grouped, rows = self._switches if what == "switches" else self._frames
            held = self._by_cpu[what, cpu] = rows[_pick(grouped, cpu)]
        return held

    @cached_property
    def _frames(self) -> tuple[tuple[Any, Any, Any], npt.NDArray[Any]]:
        order, offsets = self._kinds
        found = [order[offsets[n] : offsets[n + 1]] for n in FRAME_KINDS]
        rows = np.sort(np.concatenate(found))
        return _group(self.columns["cpu"][rows]), rows

    def frame_rows(self, cpu: int) -> npt.NDArray[Any]:
        """Row numbers of entries and exits of interrupt context on one CPU, ascending."""
        return self._of_cpu("frames", cpu)

    @cached_property
    def _cpus(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        return _group(self.columns["cpu"])

    def rows_of_cpu(self, cpu: int) -> npt.NDArray[Any]:
        """Row numbers of all events on one CPU, ascending."""
        return _pick(self._cpus, cpu)

    def index(self) -> None:
        """Build all indexes now, so that no verdict pays for them."""
        self.subject_rows(0)
        self.rows_of_current_kinds(0, ())
        self.switch_rows(0)
        self.frame_rows(0)
        self.rows_of_cpu(0)

    def cpus(self) -> list[int]:
        """The CPUs that have events here."""
        return [int(c) for c in self._cpus[0]]


def _span(grouped: tuple[Any, Any, Any], value: int) -> slice:
    """Where in the order of a grouping the rows of a value stand."""
    distinct, offsets, _ = grouped
    i = int(distinct.searchsorted(value))
    if i == len(distinct) or int(distinct[i]) != value:
        return slice(0, 0)
    return slice(int(offsets[i]), int(offsets[i + 1]))


def _pick(grouped: tuple[Any, Any, Any], value: int) -> npt.NDArray[Any]:
    picked: npt.NDArray[Any] = grouped[2][_span(grouped, value)]
    return picked


_FRAME_NAMES: Final = (
    "irq_handler_entry", "irq_handler_exit", "softirq_entry", "softirq_exit", "tasklet_entry", "tasklet_exit",
    "local_timer_entry", "local_timer_exit", "reschedule_entry", "reschedule_exit", "call_function_entry",
    "call_function_exit", "call_function_single_entry", "call_function_single_exit", "irq_work_entry", "irq_work_exit",
    "hrtimer_expire_entry", "hrtimer_expire_exit", "timer_expire_entry", "timer_expire_exit", "nmi_handler",
)  # fmt: skip
FRAME_KINDS: Final = tuple(BY_NAME[n].number for n in _FRAME_NAMES)


def _sorted(columns: Columns) -> dict[str, npt.NDArray[Any]]:
    """Columns in the order (time, cpu, seq), without duplicates."""
    time = columns["time_mono_ns"]
    steps = np.diff(time)
    if len(steps) and not (steps > 0).all():
        order = np.argsort(time, kind="stable")
        order = _order_ties(columns, order)
        columns = {name: column[order] for name, column in columns.items()}
        time, cpu, seq = columns["time_mono_ns"], columns["cpu"], columns["seq"]
        same = (time[1:] == time[:-1]) & (cpu[1:] == cpu[:-1]) & (seq[1:] == seq[:-1])
        if same.any():
            keep = np.concatenate(([True], ~same))
            columns = {name: column[keep] for name, column in columns.items()}
    return dict(columns)


def _order_ties(columns: Columns, order: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`order` (by time) with equal times put in the order (cpu, seq)."""
    time = columns["time_mono_ns"][order]
    equal = time[1:] == time[:-1]
    tied = np.flatnonzero(np.concatenate((equal, [False])) | np.concatenate(([False], equal)))
    if len(tied):
        rows = order[tied]
        order[tied] = rows[np.lexsort((columns["seq"][rows], columns["cpu"][rows], time[tied]))]
    return order


def _joined(parts: list[Columns]) -> dict[str, npt.NDArray[Any]]:
    if len(parts) == 1:
        return dict(parts[0])
    return {name: np.concatenate([p[name] for p in parts]) for name in _NAMES}


class EventLog:
    """Events of one node. `add` columns, `seal` up to a watermark, read `segments`, `evict` what is no longer needed."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.sealed_mono_ns = -1  # all events before this are in `segments`
        self.evicted_mono_ns = -1  # events up to this may be gone
        self.late_events = 0
        self.duplicate_events = 0
        self.late_since_mono_ns: int | None = None  # oldest late event since last asked
        self._pending: list[Columns] = []
        self._tail: list[Columns] = []  # sealed, in order, not yet a segment
        self._tail_rows = 0

    def add(self, columns: Columns) -> None:
        """Take events, in any order."""
        if len(columns["time_mono_ns"]):
            self._pending.append(columns)

    @property
    def pending_rows(self) -> int:
        """Events that are not sealed yet."""
        return sum(len(p["time_mono_ns"]) for p in self._pending)

    def seal(self, watermark_mono_ns: int) -> Segment | None:
        """Seal events before the watermark. Returns the newly sealed ones, or None."""
        if not self._pending or watermark_mono_ns <= self.sealed_mono_ns:
            self.sealed_mono_ns = max(self.sealed_mono_ns, watermark_mono_ns)
            self._take_late_only()
            return None
        before, self.sealed_mono_ns = self.sealed_mono_ns, watermark_mono_ns
        arrived = _joined(self._pending)
        self._pending = []
        time = arrived["time_mono_ns"]
        late, ready = time < before, time < watermark_mono_ns
        if late.any():
            self._insert_late({n: c[late] for n, c in arrived.items()})
            ready &= ~late
        if not ready.all():
            waiting = ~(ready | late)
            if waiting.any():
                self._pending = [{n: c[waiting] for n, c in arrived.items()}]
            arrived = {n: c[ready] for n, c in arrived.items()}
        if len(arrived["time_mono_ns"]) == 0:
            return None
        count = len(arrived["time_mono_ns"])
        chunk = _sorted(arrived)
        self.duplicate_events += count - len(chunk["time_mono_ns"])
        self._append(chunk)
        return Segment(chunk)

    def _take_late_only(self) -> None:
        if not self._pending:
            return
        arrived = _joined(self._pending)
        late = arrived["time_mono_ns"] < self.sealed_mono_ns
        if late.any():
            self._insert_late({n: c[late] for n, c in arrived.items()})
            self._pending = [{n: c[~late] for n, c in arrived.items()}] if not late.all() else []

    def _append(self, chunk: Columns) -> None:
        self._tail.append(chunk)
        self._tail_rows += len(chunk["time_mono_ns"])
        if self._tail_rows >= _SEGMENT_ROWS:
            self.settle()

    def settle(self) -> None:
        """Make segments of everything sealed, so that it can be queried; small neighbours are joined."""
        if self._tail:
            self.segments.append(Segment(_joined(self._tail)))
            self._tail, self._tail_rows = [], 0
        while len(self.segments) > 1 and len(self.segments[-2]) < min(2 * len(self.segments[-1]), _SEGMENT_ROWS):
            last = self.segments.pop()
            self.segments[-1] = Segment(_joined([self.segments[-1].columns, last.columns]))

    def _insert_late(self, late: Columns) -> None:
        """Put events older than the seal into the segments; those that are there already are duplicates."""
        self.settle()
        gone = late["time_mono_ns"] <= self.evicted_mono_ns
        self.late_events += int(gone.sum())
        late = {n: c[~gone] for n, c in late.items()}
        if not len(late["time_mono_ns"]):
            return
        low, high = int(late["time_mono_ns"].min()), int(late["time_mono_ns"].max())
        touched = [s for s in self.segments if s.last_mono_ns >= low and s.first_mono_ns <= high]
        start = self.segments.index(touched[0]) if touched else self._place(low)
        old = sum(len(s) for s in touched)
        merged = Segment(_sorted(_joined([s.columns for s in touched] + [late])))
        self.segments[start : start + len(touched)] = [merged]
        new = len(merged) - old
        self.duplicate_events += len(late["time_mono_ns"]) - new
        if new:
            self.late_events += new
            self.late_since_mono_ns = min(low, self.late_since_mono_ns if self.late_since_mono_ns is not None else low)

    def _place(self, time_mono_ns: int) -> int:
        return sum(1 for s in self.segments if s.last_mono_ns < time_mono_ns)

    def evict(self, before_mono_ns: int) -> None:
        """Forget what is older than a time: whole segments, and the older part of one if that is more than half of it."""
        while self.segments and self.segments[0].last_mono_ns < before_mono_ns:
            self.evicted_mono_ns = self.segments.pop(0).last_mono_ns
        if self.segments:
            first = self.segments[0]
            old = int(np.searchsorted(first.time, before_mono_ns))
            if 2 * old > len(first):
                self.evicted_mono_ns = int(first.time[old - 1])
                self.segments[0] = Segment({n: c[old:].copy() for n, c in first.columns.items()})
            return
        gone = 0
        while gone < len(self._tail) and int(self._tail[gone]["time_mono_ns"][-1]) < before_mono_ns:
            self.evicted_mono_ns = int(self._tail[gone]["time_mono_ns"][-1])
            self._tail_rows -= len(self._tail[gone]["time_mono_ns"])
            gone += 1
        del self._tail[:gone]

    def dump(self) -> list[Columns]:
        """All events held, sealed and pending, for a snapshot of the engine."""
        self.settle()
        return [s.columns for s in self.segments] + self._pending


def empty() -> dict[str, npt.NDArray[Any]]:
    """Event columns without rows."""
    return {name: np.empty(0, dtype) for name, dtype in _DTYPES.items()}
