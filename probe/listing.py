"""The events of a capture one by one, in the order of time, decoded: for `kprobe events`.

Frames hold what one drain gave, CPU after CPU; `in_order` merges them by (time, cpu, sequence number). It needs to hold back
only what the watermark says may still be overtaken, so a capture of any size streams in little memory. Fields are decoded a
column at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from events.frames import Frame
from events.identity import EventId
from events.kinds import BY_NUMBER
from probe.framing import concatenate
from probe.tasks import TaskTable

__all__ = ["Choice", "in_order", "rows_of"]

Columns = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Choice:
    """Which events are wanted; an empty set means all."""

    tids: frozenset[int] = frozenset()
    kinds: frozenset[int] = frozenset()
    from_mono_ns: int | None = None
    to_mono_ns: int | None = None

    def mask(self, columns: Columns) -> npt.NDArray[np.bool_]:
        """True where a row is wanted. A thread's events are its own and those that name it (switches, wake-ups)."""
        times = columns["time_mono_ns"]
        wanted = np.ones(len(times), dtype=bool)
        if self.from_mono_ns is not None:
            wanted &= times >= self.from_mono_ns
        if self.to_mono_ns is not None:
            wanted &= times < self.to_mono_ns
        if self.kinds:
            wanted &= np.isin(columns["kind"], list(self.kinds))
        if self.tids:
            wanted &= self._names_thread(columns)
        return wanted

    def _names_thread(self, columns: Columns) -> npt.NDArray[np.bool_]:
        tids = list(self.tids)
        named = np.isin(columns["tid"], tids)
        for number in np.unique(columns["kind"]).tolist():
            kind = BY_NUMBER.get(number)
            fields = [f for f in ("tid", "prev_tid", "next_tid") if kind is not None and f in kind.fields]
            if kind is None or not fields:
                continue
            where = np.flatnonzero(columns["kind"] == number)
            part = {name: column[where] for name, column in columns.items()}
            for field in fields:
                named[where] |= np.isin(kind.get(part, field), tids)
        return named


def in_order(frames: Iterator[Frame], choice: Choice, tasks: TaskTable) -> Iterator[tuple[Frame, Columns]]:
    """Blocks of wanted events in time order, each with the frame that completed it; fills `tasks` on the way."""
    held: list[Columns] = []
    last: Frame | None = None
    for frame in frames:
        if frame.kind == "tasks/1":
            tasks.add(frame.batch)
        if frame.kind != "events/1":
            continue
        last = frame
        columns = frame.events()
        mask = choice.mask(columns)
        if mask.any():
            held.append({name: column[mask] for name, column in columns.items()})
        if held:
            ready, kept = _split(held, frame.watermark.node_mono_ns)
            held = [kept] if len(kept["time_mono_ns"]) else []
            if len(ready["time_mono_ns"]):
                yield frame, ready
    if held and last is not None:
        yield last, _split(held, None)[0]


def _split(held: Sequence[Columns], watermark_mono_ns: int | None) -> tuple[Columns, Columns]:
    """What is older than the watermark (None: everything), sorted, and the rest."""
    columns = concatenate(held)
    order = np.lexsort((columns["seq"], columns["cpu"], columns["time_mono_ns"]))
    end = len(order)
    if watermark_mono_ns is not None:
        end = int(np.searchsorted(columns["time_mono_ns"][order], watermark_mono_ns, "left"))
    ready, rest = order[:end], order[end:]
    return {n: c[ready] for n, c in columns.items()}, {n: c[rest] for n, c in columns.items()}


def rows_of(frame: Frame, columns: Columns, tasks: TaskTable) -> Iterator[dict[str, Any]]:
    """The rows of a block as documents: head, name of the thread, fields of the kind, identity."""
    comms = tasks.comms(columns["tid"], columns["time_mono_ns"], columns["cpu"])
    fields = _fields(columns)
    names = ("time_mono_ns", "cpu", "seq", "kind", "flags", "tgid", "tid")
    heads = zip(*(columns[n].tolist() for n in names), strict=True)
    for (time, cpu, seq, kind, flags, tgid, tid), comm, decoded in zip(heads, comms, fields, strict=True):
        yield {
            "time_mono_ns": time,
            "cpu": cpu,
            "kind": BY_NUMBER[kind].name if kind in BY_NUMBER else f"kind {kind}",
            "tid": tid,
            "tgid": tgid,
            "comm": comm,
            "fields": decoded,
            "flags": flags,
            "event": str(EventId(frame.node, frame.boot_id, cpu, seq)),
        }


def _fields(columns: Columns) -> list[dict[str, Any]]:
    decoded: list[dict[str, Any]] = [{}] * len(columns["kind"])
    for number in np.unique(columns["kind"]).tolist():
        kind = BY_NUMBER.get(number)
        where = np.flatnonzero(columns["kind"] == number)
        part = {f"a{i}": columns[f"a{i}"][where] for i in range(5)}
        names = list(kind.fields) if kind is not None else list(part)
        values = [kind.get(part, name).tolist() for name in names] if kind is not None else [c.tolist() for c in part.values()]
        rows = zip(*values, strict=True) if names else ((),) * len(where)
        for at, row in zip(where.tolist(), rows, strict=True):
            decoded[at] = _readable(dict(zip(names, row, strict=True)))
    return decoded


def _readable(fields: dict[str, Any]) -> dict[str, Any]:
    """Sixteen bytes of a name, carried in two words, as a name."""
    for stem in ("comm", "name"):
        low, high = fields.pop(f"{stem}_lo", None), fields.pop(f"{stem}_hi", None)
        if low is not None and high is not None:
            raw = low.to_bytes(8, "little") + high.to_bytes(8, "little")
            fields[stem] = raw.split(b"\0")[0].decode(errors="replace")
    return fields
