"""The spool: frames on disk while Kafka is away, in order, bounded, safe from kill -9.

A folder of numbered segments. A segment is a run of records: head (magic, kind, number, times, rows, length, payload CRC, CRC
of the head) and the encoded frame. Appends go to the last segment; the sender reads from the first and acknowledges in order;
a segment all of whose frames are acknowledged is deleted. One process owns the folder (lock file).

Durability: `fsync` = always: each append is forced to disk before it returns; interval: at most a second of appends is at risk
if the machine loses power; never: the kernel decides. Nothing is at risk in any of them when only the probe is killed: what was
written is found by the next start, torn tails are cut off, counted and reported. Acknowledgements are not written down: after a
crash the frames of the first segment may be sent again, which readers recognise by identity.

Bound: `max_bytes` on disk. A spool that is full either refuses new events (`newest`) or gives up its oldest ones (`oldest`).
What says what happened and who was who (session, tasks, losses frames) outlives the events in both: it has a
reserve of a sixteenth, and the oldest segments lose their events first. Segments being sent are spared.
All that is given up is tallied by time for a loss row.
"""

import contextlib
import fcntl
import os
import struct
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from events.errors import FrameError, ProbeError
from events.frames import Frame
from probe.framing import Sealed
from probe.outputs import LossTally

__all__ = ["Spool"]

_MAGIC: Final = b"KSP1"
_RECORD: Final = struct.Struct("<4sIQqqIII")  # magic, kind, number, first, last, rows, payload length, payload CRC
_CRC: Final = struct.Struct("<I")
_HEAD_BYTES: Final = _RECORD.size + _CRC.size
_KINDS: Final = ("session/1", "tasks/1", "losses/1", "events/1")
_SEGMENT_BYTES: Final = 8 << 20
_FIRST_SEGMENT: Final = 1 << 40  # room on both sides: what was in flight when Kafka went away goes in front
_FSYNC_NS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class _Record:
    """Where one frame lies in its segment."""

    kind: str
    number: int
    first_mono_ns: int
    last_mono_ns: int
    rows: int
    offset: int
    payload_bytes: int
    payload_crc: int

    @property
    def events(self) -> int:
        return self.rows if self.kind == "events/1" else 0

    @property
    def size_bytes(self) -> int:
        return _HEAD_BYTES + self.payload_bytes


@dataclass(slots=True)
class _Segment:
    index: int
    path: Path
    records: deque[_Record] = field(default_factory=deque)  # not yet acknowledged
    read: int = 0  # how many of them the sender has taken
    size_bytes: int = 0

    @property
    def events(self) -> int:
        return sum(r.events for r in self.records)


class Spool:
    """Frames in order. `dropped` are events given up, `pending_events` those kept; `tally` has the loss rows."""

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int,
        drop: Literal["oldest", "newest"],
        fsync: Literal["always", "interval", "never"],
        segment_bytes: int = _SEGMENT_BYTES,
    ) -> None:
        self.max_bytes = max_bytes
        self.pending_events = 0
        self.size_bytes = 0
        self.dropped = 0
        self.damaged = 0
        self.tally = LossTally("spool")
        self._folder = folder
        self._drop: Final = drop
        self._fsync: Final = fsync
        self._segment_bytes = min(segment_bytes, max(max_bytes // 8, 1))
        self._segments: deque[_Segment] = deque()
        self._write: int | None = None
        self._synced_mono_ns = time.monotonic_ns()
        self._dirty = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ProbeError(f"cannot use spool folder {folder} (probe.spool_dir): {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise ProbeError(f"spool folder {folder} is in use by another probe; set probe.spool_dir for this one") from error
        self._recover()

    @property
    def empty(self) -> bool:
        """No frame is waiting for its acknowledgement."""
        return not any(s.records for s in self._segments)

    # --- writing

    def append(self, sealed: Sealed) -> bool:
        """Keep a frame at the end. False if it was refused (full); it is then tallied."""
        need = _HEAD_BYTES + len(sealed.data)
        bound = self.max_bytes - (self.max_bytes // 16 if sealed.kind == "events/1" else 0)
        while self._drop == "oldest" and self.size_bytes + need > bound and self._give_up_oldest():
            pass
        if self.size_bytes + need <= bound:
            try:
                self._write_record(sealed)
            except OSError as error:
                print(f"kprobe: cannot write to spool {self._folder}: {error.strerror}; dropping", file=sys.stderr)
            else:
                return True
        self.dropped += sealed.events
        self.tally.frame(sealed, "spool_full")
        return False

    def put_front(self, frames: Sequence[Sealed]) -> None:
        """Keep frames before all others: they were in flight when Kafka went away."""
        if not frames:
            return
        index = self._segments[0].index - 1 if self._segments else _FIRST_SEGMENT
        segment = _Segment(index, self._path(index))
        try:
            with segment.path.open("wb") as file:
                for sealed in frames:
                    self._add(segment, sealed, file.write)
                file.flush()
                if self._fsync != "never":
                    os.fsync(file.fileno())
        except OSError as error:
            print(f"kprobe: cannot write to spool {self._folder}: {error.strerror}; dropping", file=sys.stderr)
            self.pending_events -= segment.events
            self._forget(segment)
            for sealed in frames:
                self.dropped += sealed.events
                self.tally.frame(sealed, "spool_full")
            return
        self._segments.appendleft(segment)
        while self.size_bytes > self.max_bytes and self._give_up_oldest():
            pass

    def sync(self) -> None:
        """Force what is due to disk (policy `interval`); called now and then."""
        now = time.monotonic_ns()
        if self._fsync == "interval" and self._dirty and now - self._synced_mono_ns >= _FSYNC_NS:
            self._force(now)

    def close(self) -> None:
        """Force everything to disk and give the folder back; frames stay for the next start."""
        if self._dirty and self._fsync != "never":
            self._force(time.monotonic_ns())
        self._close_segment()
        os.close(self._lock)

    def _write_record(self, sealed: Sealed) -> None:
        segment = self._segments[-1] if self._segments else None
        if self._write is None or segment is None or segment.size_bytes >= self._segment_bytes:
            segment = self._new_segment()
        handle = self._write
        assert handle is not None

        def write(data: bytes) -> None:
            view = memoryview(data)
            while view:
                view = view[os.write(handle, view) :]

        try:
            self._add(segment, sealed, write)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, segment.size_bytes)
                os.lseek(handle, segment.size_bytes, os.SEEK_SET)
            raise
        self._dirty = True
        if self._fsync == "always":
            self._force(time.monotonic_ns())

    def _add(self, segment: _Segment, sealed: Sealed, write: Callable[[bytes], object]) -> None:
        crc = zlib.crc32(sealed.data)
        head = _RECORD.pack(
            _MAGIC,
            _KINDS.index(sealed.kind),
            sealed.number,
            sealed.first_mono_ns,
            sealed.last_mono_ns,
            sealed.rows,
            len(sealed.data),
            crc,
        )
        write(head + _CRC.pack(zlib.crc32(head)) + sealed.data)
        offset = segment.size_bytes + _HEAD_BYTES
        span = (sealed.first_mono_ns, sealed.last_mono_ns)
        self._count(segment, _Record(sealed.kind, sealed.number, *span, sealed.rows, offset, len(sealed.data), crc))

    def _count(self, segment: _Segment, record: _Record) -> None:
        segment.records.append(record)
        segment.size_bytes += record.size_bytes
        self.size_bytes += record.size_bytes
        self.pending_events += record.events

    def _new_segment(self) -> _Segment:
        self._close_segment()
        index = self._segments[-1].index + 1 if self._segments else _FIRST_SEGMENT
        segment = _Segment(index, self._path(index))
        self._write = os.open(segment.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._segments.append(segment)
        return segment

    def _close_segment(self) -> None:
        if self._write is not None:
            if self._dirty and self._fsync != "never":
                self._force(time.monotonic_ns())
            os.close(self._write)
            self._write = None

    def _force(self, now_mono_ns: int) -> None:
        if self._write is not None:
            os.fsync(self._write)
        self._dirty = False
        self._synced_mono_ns = now_mono_ns

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:016x}.spool"

    # --- reading

    def next(self) -> Sealed | None:
        """The next frame to send, or None. Frames whose bytes are damaged are left out and tallied."""
        for segment in list(self._segments):
            while segment.read < len(segment.records):
                record = segment.records[segment.read]
                sealed = self._load(segment, record)
                if sealed is not None:
                    segment.read += 1
                    return sealed
                del segment.records[segment.read]
                self._give_up(record, "damaged")
        return None

    def put_back(self) -> None:
        """The frame that `next` gave last could not be sent yet."""
        for segment in reversed(self._segments):
            if segment.read:
                segment.read -= 1
                return

    def acknowledge(self) -> None:
        """The first frame taken by `next` and not yet acknowledged has arrived."""
        for segment in self._segments:
            if segment.records:
                record = segment.records.popleft()
                segment.read -= 1
                self.pending_events -= record.events
                break
        while self._segments and not self._segments[0].records:
            self._forget(self._segments.popleft())

    def rewind(self) -> None:
        """Take all frames that were not acknowledged again."""
        for segment in self._segments:
            segment.read = 0

    def _load(self, segment: _Segment, record: _Record) -> Sealed | None:
        try:
            with segment.path.open("rb") as file:
                data = os.pread(file.fileno(), record.payload_bytes, record.offset)
        except OSError:
            return None
        if zlib.crc32(data) != record.payload_crc or len(data) != record.payload_bytes:
            return None
        return Sealed(
            record.kind, record.number, record.rows, record.first_mono_ns, record.last_mono_ns, data, _loss_rows(record, data)
        )

    # --- giving up

    def _give_up_oldest(self) -> bool:
        """Make room: the events of the oldest segment that has any; with none left, the oldest segment. False if empty."""
        for at, segment in enumerate(self._segments):
            if not segment.read and any(r.kind == "events/1" for r in segment.records):
                self._strip(at)
                return True
        if not self._segments or self._segments[0].read:
            return False
        segment = self._segments.popleft()
        for record in segment.records:
            self._give_up(record, "spool_full", self._load(segment, record))
        self._forget(segment)
        return True

    def _strip(self, at: int) -> None:
        """Leave of a segment only what is not events."""
        segment = self._segments[at]
        if at == len(self._segments) - 1:
            self._close_segment()
        kept = [s for r in segment.records if r.kind != "events/1" and (s := self._load(segment, r)) is not None]
        for record in segment.records:
            if record.kind == "events/1":
                self._give_up(record, "spool_full")
        smaller = _Segment(segment.index, segment.path)
        self.size_bytes -= segment.size_bytes
        temporary = segment.path.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                for sealed in kept:
                    self._add(smaller, sealed, file.write)
            temporary.replace(segment.path)
        except OSError:  # not even room for these: their rows at least are told
            temporary.unlink(missing_ok=True)
            self.size_bytes -= smaller.size_bytes
            for sealed in kept:
                self.tally.frame(sealed, "spool_full")
            kept = []
        if kept:
            self._segments[at] = smaller
        else:
            del self._segments[at]
            segment.path.unlink(missing_ok=True)

    def _give_up(self, record: _Record, reason: str, sealed: Sealed | None = None) -> None:
        self.pending_events -= record.events
        if reason == "damaged":
            self.damaged += record.events
        else:
            self.dropped += record.events
        if sealed is not None:
            self.tally.frame(sealed, reason)
        else:
            self.tally.span(reason, record.first_mono_ns, record.last_mono_ns, record.events)

    def _forget(self, segment: _Segment) -> None:
        self.size_bytes -= segment.size_bytes
        if not self._segments:
            self._close_segment()
        segment.path.unlink(missing_ok=True)

    # --- after a crash

    def _recover(self) -> None:
        for temporary in self._folder.glob("*.tmp"):
            temporary.unlink()
        for path in sorted(self._folder.glob("*.spool")):
            segment = _Segment(int(path.stem, 16), path)
            self._scan(segment, path.read_bytes())
            if segment.records:
                self._segments.append(segment)
            else:
                path.unlink()

    def _scan(self, segment: _Segment, data: bytes) -> None:
        at = 0
        while at < len(data):
            record = _parse(data, at)
            if record is None:
                break
            self._count(segment, record)
            at += record.size_bytes
        if at < len(data):
            torn = len(data) - at
            print(f"kprobe: spool segment {segment.path.name}: {torn} torn bytes at its end are left out", file=sys.stderr)
            last = segment.records[-1].last_mono_ns if segment.records else 0
            self.tally.span("damaged", last, max(last, time.monotonic_ns()), 0)
            os.truncate(segment.path, at)


def _parse(data: bytes, at: int) -> _Record | None:
    """The record at `at`, if it is whole and its head is intact."""
    head = data[at : at + _HEAD_BYTES]
    if len(head) < _HEAD_BYTES or head[:4] != _MAGIC or _CRC.unpack(head[-4:])[0] != zlib.crc32(head[:-4]):
        return None
    _, kind, number, first, last, rows, payload_bytes, crc = _RECORD.unpack(head[:-4])
    if kind >= len(_KINDS) or at + _HEAD_BYTES + payload_bytes > len(data):
        return None
    return _Record(_KINDS[kind], number, first, last, rows, at + _HEAD_BYTES, payload_bytes, crc)


def _loss_rows(record: _Record, data: bytes) -> Sequence[Mapping[str, Any]]:
    if record.kind != "losses/1":
        return ()
    try:
        return Frame.decode(data).batch.to_pylist()  # type: ignore[no-any-return]
    except FrameError:
        return ()
