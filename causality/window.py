"""What the mechanism resolvers see of the events, and what they answer. Pure: columns in, pieces out.

`Window` gives the rows of one kind within a span of time, in total order, from sorted segments
(`causality.log.Segment`). `Wait` is one blocked interval of one thread as the engine knows it: when, in which state,
who or what ended it. A resolver (`causality.block`, `journal`, `memory`, `network`) answers with pieces that cover
the interval exactly, in time order, or with an empty list if its mechanism has no part in it. A piece is a `Leaf` (a
label, a cause kind, perhaps a culprit: the walk ends here) or a `Follow` (the interval was spent waiting for that
task: the walk goes on there, clipped to the piece).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from causality.log import Segment
from events.kinds import BY_NAME, Kind

__all__ = ["EventRef", "Follow", "Leaf", "Piece", "Rows", "Wait", "Wake", "Who", "Window", "cover", "kernel_threads"]

EventRef = tuple[int, int]  # (cpu, seq): with node and boot id the event's name
_HEAD: Final = ("time_mono_ns", "cpu", "seq", "tgid", "tid", "a0", "a1", "a2", "a3", "a4")


@dataclass(frozen=True, slots=True, order=True)
class Who:
    """A thread as an event names it; the engine knows which life of the tid was meant at that time."""

    tid: int
    tgid: int


@dataclass(frozen=True, slots=True)
class Wake:
    """The event that ended a wait. `waker` is who was current; `in_irq` whether an interrupt's frame was on top."""

    time_mono_ns: int
    cpu: int
    seq: int
    waker: Who
    waker_comm: str = ""
    in_irq: bool = False
    by_timer: bool = False  # among those interrupts there is a timer's

    @property
    def ref(self) -> EventRef:
        """The event's name."""
        return self.cpu, self.seq


@dataclass(frozen=True, slots=True)
class Wait:
    """[start, end) of `who` blocked, clipped to what is being explained; `blocked_mono_ns` is where it truly began."""

    who: Who
    start_mono_ns: int
    end_mono_ns: int
    blocked_mono_ns: int
    state: int = 1  # prev_state of the switch that began it
    wake: Wake | None = None
    syscall: int | None = None  # number of the system call it sits in


@dataclass(frozen=True, slots=True)
class Leaf:
    """The wait ends in this mechanism."""

    start_mono_ns: int
    end_mono_ns: int
    label: str
    kind: str
    culprit: Who | None = None
    evidence: tuple[EventRef, ...] = ()
    confidence: str = "exact"


@dataclass(frozen=True, slots=True)
class Follow:
    """The wait was for this task: explain what it did in this span."""

    start_mono_ns: int
    end_mono_ns: int
    task: Who
    label: str
    edge: str
    evidence: tuple[EventRef, ...] = ()
    confidence: str = "exact"


Piece = Leaf | Follow


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one kind, in total order."""

    kind: Kind
    columns: dict[str, npt.NDArray[Any]]

    def __len__(self) -> int:
        return len(self.columns["time_mono_ns"])

    @property
    def time(self) -> npt.NDArray[np.int64]:
        """Times, CLOCK_MONOTONIC."""
        return self.columns["time_mono_ns"]

    @property
    def tid(self) -> npt.NDArray[np.int64]:
        """Current's thread id."""
        return self.columns["tid"].astype(np.int64)

    @property
    def tgid(self) -> npt.NDArray[np.int64]:
        """Current's process id."""
        return self.columns["tgid"].astype(np.int64)

    def get(self, field: str) -> npt.NDArray[Any]:
        """A field of all rows."""
        return self.kind.get(self.columns, field)

    def take(self, chosen: npt.NDArray[Any]) -> "Rows":
        """The rows of a mask or of indexes."""
        return Rows(self.kind, {n: c[chosen] for n, c in self.columns.items()})

    def between(self, from_mono_ns: int, to_mono_ns: int) -> "Rows":
        """The rows with from <= time <= to."""
        low = int(np.searchsorted(self.time, from_mono_ns, "left"))
        high = int(np.searchsorted(self.time, to_mono_ns, "right"))
        return Rows(self.kind, {n: c[low:high] for n, c in self.columns.items()})

    def who(self, i: int) -> Who:
        """Current of row `i`."""
        return Who(int(self.columns["tid"][i]), int(self.columns["tgid"][i]))

    def ref(self, i: int) -> EventRef:
        """The name of row `i`."""
        return int(self.columns["cpu"][i]), int(self.columns["seq"][i])


class Window:
    """Events of [from, to] by kind; each kind is cut out once, when first asked for."""

    def __init__(self, segments: Iterable[Segment], from_mono_ns: int, to_mono_ns: int) -> None:
        self.from_mono_ns, self.to_mono_ns = from_mono_ns, to_mono_ns
        self._segments = [s for s in segments if len(s) and s.last_mono_ns >= from_mono_ns and s.first_mono_ns <= to_mono_ns]
        self._rows: dict[str, Rows] = {}
        self._with_kind: dict[int, list[Segment]] = {}
        self.memo: dict[str, Any] = {}  # tables that resolvers derive from a window, by name

    def rows(self, kind: str) -> Rows:
        """All rows of one kind in the window."""
        if kind not in self._rows:
            parts = [(s, self._cut(s, BY_NAME[kind].number)) for s in self._segments]
            self._rows[kind] = Rows(BY_NAME[kind], _Gathered(parts))
        return self._rows[kind]

    def _cut(self, segment: Segment, number: int) -> npt.NDArray[Any]:
        rows = segment.rows_of_kind(number)
        first, last = np.searchsorted(segment.time, (self.from_mono_ns, self.to_mono_ns + 1))
        low, high = np.searchsorted(rows, (first, last))
        return rows[low:high]

    def last_of(self, kind: str, who_tid: int, before_mono_ns: int) -> tuple[Rows, int] | None:
        """The last row of a kind with this current thread at or before a time: (rows that hold it, its index), or None."""
        number = BY_NAME[kind].number
        before = min(before_mono_ns, self.to_mono_ns) + 1
        for segment in reversed(self._having(number)):
            rows = segment.rows_of_current_kinds(who_tid, (number,))
            if not len(rows):
                continue
            at = int(rows.searchsorted(segment.time.searchsorted(before))) - 1
            if at >= 0:
                found = int(segment.time[rows[at]]) >= self.from_mono_ns
                return (Rows(BY_NAME[kind], _Gathered([(segment, rows[at : at + 1])])), 0) if found else None
        return None

    def _having(self, number: int) -> list[Segment]:
        """The segments that hold events of a kind at all: most resolvers ask for kinds that most captures do not have."""
        held = self._with_kind.get(number)
        if held is None:
            held = self._with_kind[number] = [s for s in self._segments if len(s.rows_of_kind(number))]
        return held


class _Gathered(dict[str, npt.NDArray[Any]]):
    """Columns of chosen rows, each gathered when first asked for."""

    def __init__(self, parts: list[tuple[Segment, npt.NDArray[Any]]]) -> None:
        super().__init__()
        self._parts = parts

    def __missing__(self, name: str) -> npt.NDArray[Any]:
        if name not in _HEAD:
            raise KeyError(name)
        got = [s.columns[name][r] for s, r in self._parts]
        self[name] = np.concatenate(got) if got else np.empty(0, np.int64 if name == "time_mono_ns" else np.uint64)
        return self[name]

    def items(self) -> Any:
        """All columns."""
        for name in _HEAD:
            self[name]
        return super().items()


def kernel_threads(window: Window) -> frozenset[int]:
    """The kernel threads that were woken in the window (made once): they work for others, and are nobody's culprit."""
    if "kthreads" not in window.memo:
        rows = window.rows("sched_waking")
        window.memo["kthreads"] = frozenset(rows.get("tid")[rows.get("kthread") == 1].tolist())
    found: frozenset[int] = window.memo["kthreads"]
    return found


def cover(pieces: Sequence[Piece], start_mono_ns: int, end_mono_ns: int, label: str, kind: str) -> list[Piece]:
    """`pieces` clipped to [start, end), in order, overlaps given to the earlier piece, holes filled with `label`."""
    out: list[Piece] = []
    at = start_mono_ns
    for piece in sorted(pieces, key=lambda p: (p.start_mono_ns, p.end_mono_ns)):
        low, high = max(piece.start_mono_ns, at), min(piece.end_mono_ns, end_mono_ns)
        if high <= low:
            continue
        if low > at:
            out.append(Leaf(at, low, label, kind))
        out.append(_moved(piece, low, high))
        at = high
    if at < end_mono_ns:
        last = out[-1] if out else None
        if isinstance(last, Leaf) and last.label == label:
            out[-1] = _moved(last, last.start_mono_ns, end_mono_ns)  # the way from the mechanism's end to the wake-up
        else:
            out.append(Leaf(at, end_mono_ns, label, kind))
    return out


def _moved(piece: Piece, low: int, high: int) -> Piece:
    if isinstance(piece, Leaf):
        return Leaf(low, high, piece.label, piece.kind, piece.culprit, piece.evidence, piece.confidence)
    return Follow(low, high, piece.task, piece.label, piece.edge, piece.evidence, piece.confidence)
