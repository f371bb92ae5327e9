"""From what was drained to frames: numbering, splitting and sealing.

`Framer` turns drained columns, task rows and loss rows into `events.frames.Frame`s of one recording, numbers them without a
hole and seals each: encodes it once, whatever the number of outputs that take it. `Sealed` is what outputs get: the bytes,
and what an index, a queue or a ledger has to know of them without decoding.

Guarantees: numbers start at 0 and have no hole; no sealed frame is larger than `max_frame_bytes` unless it holds a single row
(an events frame that comes out larger is cut in two); of the frames of one drain only the last carries its watermark, the
others the one before, so that a watermark never runs ahead of what was sent.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from events.frames import SCHEMAS, Clocks, Frame, Watermark, empty_events, events_frame
from events.records import LOSSES, TASKS, numbers_of, rows_to_arrow

__all__ = ["MAX_FRAME_BYTES", "Framer", "Row", "Sealed", "concatenate", "loss_row", "read_clocks", "seal"]

# Below the usual `message.max.bytes` of a broker (1 MiB less the record's own overhead).
MAX_FRAME_BYTES: Final = 900_000
# Task rows are wide (names, paths, command lines): a snapshot of a large machine travels in several frames.
_TASK_ROWS: Final = 2048
# Payload bytes of one frame: below the limit also where they cannot be compressed.
_PAYLOAD_BYTES: Final = 600_000
_PAYLOAD_ROWS: Final = 4096

Row = Mapping[str, Any]  # one row of `TASKS` or `LOSSES`


@dataclass(frozen=True, slots=True)
class Sealed:
    """An encoded frame. `first_mono_ns`..`last_mono_ns` bound the times in it, both inclusive.

    `losses` keeps the rows of a losses frame, so that an output that must refuse it can report them later.
    """

    kind: str
    number: int
    rows: int
    first_mono_ns: int
    last_mono_ns: int
    data: bytes
    losses: Sequence[Row] = field(default=(), repr=False)

    @property
    def events(self) -> int:
        """How many events the frame holds: what the accounts count."""
        return self.rows if self.kind == "events/1" else 0


def read_clocks() -> Clocks:
    """The three clocks, read within a microsecond of each other (unless the thread is preempted between them)."""
    return Clocks(
        time.clock_gettime_ns(time.CLOCK_MONOTONIC),
        time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        time.clock_gettime_ns(time.CLOCK_REALTIME),
    )


def loss_row(reason: str, hop: str, *, from_mono_ns: int, to_mono_ns: int, count: int = 0, **more: Any) -> dict[str, Any]:
    """A row of `LOSSES`; `more` may give cpu, family, first_seq and last_seq. A count of 0 means unknown."""
    row = {"reason": reason, "hop": hop, "from_mono_ns": from_mono_ns, "to_mono_ns": to_mono_ns, "count": count, **more}
    return {f.name: row.get(f.name) for f in LOSSES}


_SPAN_COLUMNS: Final = {
    "events/1": ("time_mono_ns", "time_mono_ns"),
    "tasks/1": ("time_mono_ns", "time_mono_ns"),
    "losses/1": ("from_mono_ns", "to_mono_ns"),
    "payload/1": ("time_mono_ns", "time_mono_ns"),
}


def _span(frame: Frame) -> tuple[int, int]:
    """First and last time in the frame; the clock it was closed at if it has no rows."""
    columns = _SPAN_COLUMNS.get(frame.kind)
    if columns is None or frame.batch.num_rows == 0:
        return frame.clocks.mono_ns, frame.clocks.mono_ns
    first, last = (_known(frame.batch.column(c)) for c in columns)
    now = frame.clocks.mono_ns
    return int(first.min()) if first.size else now, int(last.max()) if last.size else now


def _known(column: pa.Array) -> npt.NDArray[np.int64]:
    """The values that are not null."""
    if column.null_count == 0:
        return numbers_of(column)
    return np.array([v for v in column.to_pylist() if v is not None], dtype=np.int64)


def seal(frame: Frame) -> Sealed:
    """The frame, encoded, with what outputs need to know of it."""
    first, last = _span(frame)
    losses = frame.batch.to_pylist() if frame.kind == "losses/1" else ()
    return Sealed(frame.kind, frame.number, frame.batch.num_rows, first, last, frame.encode(), losses)


class Framer:
    """Numbers and seals the frames of one recording."""

    def __init__(self, *, node: str, boot_id: str, recording: str, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self.node = node
        self.boot_id = boot_id
        self.recording = recording
        self.next_number = 0
        self._max_frame_bytes = max_frame_bytes
        self._sent = Watermark(0)

    def session(self, body: Mapping[str, Any]) -> Sealed:
        """The frame that opens the recording, or says that its capabilities changed."""
        return self._seal("session/1", pa.RecordBatch.from_arrays([], schema=SCHEMAS["session/1"]), body=body)

    def tasks(self, rows: Sequence[Row]) -> Iterator[Sealed]:
        """Frames of task rows."""
        for at in range(0, len(rows), _TASK_ROWS):
            yield self._seal("tasks/1", rows_to_arrow(rows[at : at + _TASK_ROWS], TASKS))

    def losses(self, rows: Sequence[Row]) -> Iterator[Sealed]:
        """A frame of loss rows, if there are any."""
        if rows:
            yield self._seal("losses/1", rows_to_arrow(rows, LOSSES))

    def payload(self, batch: pa.RecordBatch) -> Iterator[Sealed]:
        """Frames of payload records."""
        offsets = np.frombuffer(batch.column("data").buffers()[1], np.int32)[: batch.num_rows + 1]
        start = 0
        while start < batch.num_rows:
            end = int(np.searchsorted(offsets, offsets[start] + _PAYLOAD_BYTES, side="right")) - 1
            end = min(max(end, start + 1), start + _PAYLOAD_ROWS, batch.num_rows)
            yield self._seal("payload/1", batch.slice(start, end - start))
            start = end

    def events(self, columns: Mapping[str, npt.NDArray[Any]], watermark: Watermark, rows_max: int) -> Iterator[Sealed]:
        """Frames of at most `rows_max` events; the last one (there is always one) carries `watermark`."""
        rows = len(columns["time_mono_ns"])
        starts = range(0, rows, rows_max) if rows else range(1)
        for at in starts:
            part = columns if rows <= rows_max else {n: c[at : at + rows_max] for n, c in columns.items()}
            yield from self._cut(part, watermark if at == starts[-1] else self._sent)
        self._sent = watermark

    def _cut(self, columns: Mapping[str, npt.NDArray[Any]], watermark: Watermark) -> Iterator[Sealed]:
        frame = events_frame(columns, **self._head(watermark))
        sealed = seal(frame)
        rows = sealed.rows
        if len(sealed.data) <= self._max_frame_bytes or rows <= 1:
            self.next_number += 1
            yield sealed
            return
        half = rows // 2
        yield from self._cut({n: c[:half] for n, c in columns.items()}, self._sent)
        yield from self._cut({n: c[half:] for n, c in columns.items()}, watermark)

    def _seal(self, kind: str, batch: pa.RecordBatch, *, body: Mapping[str, Any] | None = None) -> Sealed:
        sealed = seal(Frame(kind=kind, batch=batch, body=body or {}, **self._head(self._sent)))
        self.next_number += 1
        return sealed

    def _head(self, watermark: Watermark) -> dict[str, Any]:
        return {
            "node": self.node,
            "boot_id": self.boot_id,
            "recording": self.recording,
            "number": self.next_number,
            "clocks": read_clocks(),
            "watermark": watermark,
        }


def concatenate(parts: Iterable[Mapping[str, npt.NDArray[Any]]]) -> Mapping[str, npt.NDArray[Any]]:
    """The rows of several drains as one, in that order."""
    kept = [p for p in parts if len(p["time_mono_ns"])]
    if len(kept) == 1:
        return kept[0]
    if not kept:
        return empty_events()
    return {name: np.concatenate([p[name] for p in kept]) for name in kept[0]}
