"""Who is who: threads by (tid, start time), with what was true of them at a time.

Folded from task frames: each row states what holds from its time on; a column that is null says nothing. Rows may
arrive in any order and twice. Where the trace carries no start time (imports), it is 0 and one tid is one thread.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

__all__ = ["Task", "TaskTable"]

_FACTS: Final = (
    "tgid", "comm", "cmdline", "parent_tid", "parent_tgid", "cgroup_id", "cgroup", "container", "kthread", "observer",
    "watched", "prio", "policy",
)  # fmt: skip

_Row = tuple[int, str, dict[str, Any]]  # time, canonical text, facts


@dataclass(frozen=True, slots=True)
class Task:
    """One life of one thread, as known at the end of an operation. `tid` 0 is the idle task of some CPU."""

    tid: int
    start_boot_ns: int = 0
    tgid: int = 0
    comm: str = ""
    cgroup_id: int = 0
    cgroup: str = ""
    container: str | None = None
    kthread: bool = False
    observer: bool = False
    parent_tid: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """(tid, start_boot_ns): the thread's identity on its node and boot."""
        return self.tid, self.start_boot_ns


class TaskTable:
    """All task rows of one node, by tid."""

    def __init__(self) -> None:
        self._rows: dict[int, list[_Row]] = {}
        self._sorted: set[int] = set()

    def fold(self, batch: pa.RecordBatch) -> None:
        """Take the rows of one task frame."""
        for row in batch.to_pylist():
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Take one row (columns of `events.records.TASKS`)."""
        facts = {k: v for k, v in row.items() if v is not None}
        tid = int(facts.get("tid", 0))
        self._rows.setdefault(tid, []).append((int(facts["time_mono_ns"]), repr(sorted(facts.items())), facts))
        self._sorted.discard(tid)

    def __len__(self) -> int:
        """Rows held."""
        return sum(map(len, self._rows.values()))

    def _of(self, tid: int) -> list[_Row]:
        rows = self._rows.get(tid, [])
        if tid not in self._sorted and rows:
            unique = {text: (t, text, facts) for t, text, facts in rows}
            rows = self._rows[tid] = sorted(unique.values(), key=lambda r: r[:2])
            self._sorted.add(tid)
        return rows

    def lives(self, tid: int, until_mono_ns: int) -> list[tuple[int, int]]:
        """(start_boot_ns, first time told of) of each life of `tid` that the rows up to a time name, oldest first."""
        seen: dict[int, int] = {}
        for t, _, facts in self._of(tid):
            if t <= until_mono_ns:
                told = int(facts.get("told_mono_ns", t))
                start = int(facts.get("start_boot_ns", 0))
                seen[start] = min(told, seen.get(start, told))
        return sorted(seen.items())

    def look_up(self, tid: int, start_boot_ns: int, until_mono_ns: int) -> dict[str, Any]:
        """What rows up to `until_mono_ns` say of this life (empty if nothing)."""
        known: dict[str, Any] = {}
        for t, _, facts in self._of(tid):
            if t > until_mono_ns:
                break
            start = int(facts.get("start_boot_ns", 0))
            if start_boot_ns and start and start != start_boot_ns:
                continue
            known.update({k: facts[k] for k in _FACTS if k in facts})
        return known

    def snapshots(self, tid: int, start_boot_ns: int, from_mono_ns: int, until_mono_ns: int) -> dict[str, Any] | None:
        """The last snapshot row of this life within the window, or None."""
        found = None
        for t, _, facts in self._of(tid):
            start = int(facts.get("start_boot_ns", 0))
            other = start_boot_ns and start and start != start_boot_ns
            if from_mono_ns <= t <= until_mono_ns and facts.get("reason") == "snapshot" and not other:
                found = {**facts, "time_mono_ns": t}
        return found

    def children(self) -> Iterable[int]:
        """All tids that any row names."""
        return self._rows.keys()

    def forget(self, before_mono_ns: int) -> None:
        """Drop lives that ended before a time, and let one row say what all rows of a life before that time say together.

        What is asked about later times stays the same. A life has ended where an exit row says so, or a later life of its tid.
        """
        for tid in list(self._rows):
            rows = self._of(tid)
            if rows[0][0] >= before_mono_ns:
                continue
            ended = {_start(f) for t, _, f in rows if f.get("reason") == "exit" and t < before_mono_ns}
            told = [_start(f) for t, _, f in rows if t < before_mono_ns]
            ended |= {start for start in told if 0 < start < max(told)}
            kept = _merged([r for r in rows if _start(r[2]) not in ended], before_mono_ns)
            if kept:
                self._rows[tid] = kept
            else:
                del self._rows[tid]
                self._sorted.discard(tid)

    def dump(self) -> list[dict[str, Any]]:
        """All rows, for a snapshot of the engine."""
        return [facts for rows in self._rows.values() for _, _, facts in rows]


def _start(facts: Mapping[str, Any]) -> int:
    return int(facts.get("start_boot_ns", 0))


def _merged(rows: list[_Row], before_mono_ns: int) -> list[_Row]:
    """Rows older than a time joined with their successor of the same life. The joined row stands at the later time, so that
    an older row that arrives once more is overruled by it as before; since when the life is known goes with it."""
    out: list[_Row] = []
    for time, text, facts in rows:
        if time < before_mono_ns and out and _start(out[-1][2]) == _start(facts):
            first, _, earlier = out.pop()
            facts = {**earlier, **facts, "told_mono_ns": earlier.get("told_mono_ns", first)}
            text = repr(sorted(facts.items()))
        out.append((time, text, facts))
    return out
