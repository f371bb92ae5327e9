"""The `.kcap` capture file: a flight recorder's tape that survives whatever stops the recorder.

Layout, little endian (`_HEADER`, `_RECORD`, `_TRAILER` below are the only definition):

    header   magic, version, header length, creation time, file id, CRC
    record*  magic, frame kind, rows, number, first and last time, payload length and CRC, chain, CRC of this head;
             then the payload: exactly the bytes of `events.frames.Frame.encode`
    index    at a clean close: one more record, kind 255, whose payload has one `_INDEX` row a frame
    trailer  magic, offset of the index, number of frames, CRC

`chain` of a record is SHA-256 over the chain of the record before it (the SHA-256 of the header for the first), the fields of
its own head and its payload: a frame cannot be altered, removed or moved without the next chain failing to match.

Guarantees. Frames are only ever appended, each by one write; after kill -9 all frames whose write returned are there (the page
cache outlives the process; only `close` forces the file to disk, so a power cut may cost the last seconds). A file cut anywhere
reads up to its last whole frame, a damaged one everywhere else, and `CaptureReader.damage` says where and how much is missing.
When the disk is full the writer takes back the torn frame, so that the file stays whole, and raises ProbeError.

Failures: CaptureFormatError for a file that is not a capture or is of another version, ProbeError while writing.
"""

import contextlib
import errno
import hashlib
import os
import secrets
import stat
import struct
import time
import weakref
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from events.errors import CaptureFormatError, FrameError, ProbeError
from events.frames import Frame, Watermark
from events.records import LOSSES, rows_to_arrow
from probe.framing import Sealed, loss_row, seal

__all__ = ["VERSION", "CaptureReader", "CaptureWriter", "Damage", "Entry"]

VERSION: Final = 1

_MAGIC: Final = b"\x89KCAP\r\n\x1a"  # the line ends show a transfer that "corrected" them; the first byte shows 7-bit ones
_RECORD_MAGIC: Final = b"\xf7kFRAME\n"
_TRAILER_MAGIC: Final = b"\xf7kEND\r\n\0"

_HEADER: Final = struct.Struct("<8sIIq16s20x")  # magic, version, header length, created_real_ns, file id
_RECORD: Final = struct.Struct("<8sIIQqqQI4x")  # magic, kind, rows, number, first, last, payload length, payload CRC
_TRAILER: Final = struct.Struct("<8sQQ")  # magic, offset of the index, frames
_CRC: Final = struct.Struct("<I")
_CHAIN_BYTES: Final = 32
_HEADER_BYTES: Final = _HEADER.size + _CRC.size
_HEAD_BYTES: Final = _RECORD.size + _CHAIN_BYTES + _CRC.size
_TRAILER_BYTES: Final = _TRAILER.size + _CRC.size

_KINDS: Final = {"session/1": 1, "tasks/1": 2, "losses/1": 3, "events/1": 4, "payload/1": 5}
_KIND_NAMES: Final = {code: kind for kind, code in _KINDS.items()}
_KIND_INDEX: Final = 255
# A length beyond this is damage, not a frame: the recorder makes frames of about a megabyte, other writers may exceed that.
_PAYLOAD_BYTES_MAX: Final = 1 << 31

_INDEX: Final = np.dtype(
    [
        ("offset", "<u8"),
        ("kind", "<u4"),
        ("rows", "<u4"),
        ("number", "<u8"),
        ("first_mono_ns", "<i8"),
        ("last_mono_ns", "<i8"),
        ("payload_bytes", "<u8"),
    ]
)
_CHUNK_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one frame lies in the file and what its head says of it."""

    offset: int
    kind: str
    rows: int
    number: int
    first_mono_ns: int
    last_mono_ns: int
    payload_bytes: int

    @property
    def end(self) -> int:
        """The offset after the frame."""
        return self.offset + _HEAD_BYTES + self.payload_bytes


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes [offset, offset + size_bytes) of the file that are not what was written, and what is missing because of it.

    `events` is how many events are lost where the head of the frame could still be read, else None.
    """

    offset: int
    size_bytes: int
    reason: str
    events: int | None = None

    def __str__(self) -> str:
        lost = "an unknown number of events" if self.events is None else f"{self.events} events"
        return f"bytes {self.offset}..{self.offset + self.size_bytes}: {self.reason}; {lost} lost"


@dataclass(frozen=True, slots=True)
class _Head:
    entry: Entry
    is_index: bool
    payload_crc: int
    fields: bytes
    chain: bytes


def _chain(before: bytes, fields: bytes, payload: bytes) -> bytes:
    digest = hashlib.sha256(before)
    digest.update(fields)
    digest.update(payload)
    return digest.digest()


class CaptureWriter:
    """Appends frames to a new capture file. Not for use by several threads.

    An existing capture is replaced; any other existing file is refused, so that a slip of the keyboard costs nothing.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.frames = 0
        self.events = 0
        self._entries: list[tuple[int, ...]] = []
        self._file = _create(self.path)
        self._closed = False
        header = _HEADER.pack(_MAGIC, VERSION, _HEADER_BYTES, time.time_ns(), secrets.token_bytes(16))
        header += _CRC.pack(zlib.crc32(header))
        self._chain = hashlib.sha256(header).digest()
        self.size_bytes = 0
        try:
            self._append(header)
        except ProbeError:
            self.abandon()
            raise

    def write(self, frame: Frame) -> None:
        """Append one frame. Raises ProbeError if it could not be written whole; the file then ends with the one before."""
        self.write_sealed(seal(frame))

    def write_sealed(self, sealed: Sealed) -> None:
        """Append a frame that is already encoded."""
        row = (_KINDS[sealed.kind], sealed.rows, sealed.number, sealed.first_mono_ns, sealed.last_mono_ns, len(sealed.data))
        offset = self.size_bytes
        self._record(row, sealed.data)
        self._entries.append((offset, *row))
        self.frames += 1
        self.events += sealed.events

    def close(self) -> None:
        """Write the index and force the file to disk. Without room for the index the file is whole all the same."""
        if self._closed:
            return
        try:
            offset = self.size_bytes
            payload = np.array(self._entries, dtype=_INDEX).tobytes()
            self._record((_KIND_INDEX, len(self._entries), 0, 0, 0, len(payload)), payload)
            trailer = _TRAILER.pack(_TRAILER_MAGIC, offset, len(self._entries))
            self._append(trailer + _CRC.pack(zlib.crc32(trailer)))
            if stat.S_ISREG(os.fstat(self._file).st_mode):
                os.fsync(self._file)
        except OSError as error:
            raise ProbeError(f"cannot force {self.path} to disk: {error.strerror}") from error
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the file as it is: without index, as after a crash."""
        if not self._closed:
            self._closed = True
            os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _record(self, row: tuple[int, ...], payload: bytes) -> None:
        fields = _RECORD.pack(_RECORD_MAGIC, *row, zlib.crc32(payload))
        chain = _chain(self._chain, fields, payload)
        head = fields + chain
        self._append(head + _CRC.pack(zlib.crc32(head)), payload)
        self._chain = chain

    def _append(self, *parts: bytes) -> None:
        if self._closed:
            raise ProbeError(f"capture {self.path} is closed")
        size = sum(map(len, parts))
        try:
            written = os.writev(self._file, parts)
            if written < size:  # a disk that fills up takes a part first and refuses the rest
                rest = b"".join(parts)
                while written < size:
                    written += os.write(self._file, rest[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self.size_bytes)
                os.lseek(self._file, self.size_bytes, os.SEEK_SET)
            what = "the disk is full" if error.errno == errno.ENOSPC else f"{error.strerror}"
            raise ProbeError(
                f"cannot write to {self.path}: {what}; it holds its first {self.frames} frames ({self.size_bytes} bytes)"
            ) from error
        self.size_bytes += size


def _create(path: Path) -> int:
    try:
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and path.stat().st_size:
                with path.open("rb") as old:
                    if old.read(len(_MAGIC)) != _MAGIC:
                        raise CaptureFormatError(f"{path} exists and is not a capture; give another name, or remove it first")
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CaptureFormatError(f"cannot create capture {path}: {error.strerror}") from error


class CaptureReader:
    """Reads a capture file, whole, cut or damaged; also one that is still being written (up to its size at opening).

    `entries` are the frames in file order, `closed` tells whether the recorder closed the file, `damage` lists what is known
    to be missing: after opening, what the heads show; after `verify`, everything.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CaptureFormatError(f"cannot read capture {self.path}: {error.strerror}") from error
        # `for frame in CaptureReader(path).frames()` is a fair use: the file goes back with the reader.
        self._give_back = weakref.finalize(self, os.close, self._file)
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise CaptureFormatError(f"{self.path} is not a file: a capture is read by position")
        self.size_bytes = os.fstat(self._file).st_size
        self.closed = False
        self._damage: dict[int, Damage] = {}
        self._genesis, self.created_real_ns, self.file_id = self._read_header()
        entries = self._read_index()
        self.entries: Sequence[Entry] = self._scan() if entries is None else entries

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back."""
        self._give_back()

    @property
    def damage(self) -> Sequence[Damage]:
        """What is known to be damaged or cut off, in file order."""
        return [self._damage[at] for at in sorted(self._damage)]

    def frames(self, from_mono_ns: int | None = None, to_mono_ns: int | None = None) -> Iterator[Frame]:
        """The frames in the order in which they were recorded.

        With a window, events and losses frames entirely outside [from, to) are left out; session and tasks frames always
        come, because names and states before the window matter in it. Where a frame is damaged a losses frame stands in
        its place (reason `damaged`), so that no reader takes the hole for silence.
        """
        lost: list[Entry] = []
        last: Frame | None = None
        for entry in self._with_holes():
            if not _touches(entry, from_mono_ns, to_mono_ns):
                continue
            frame = self._decode(entry)
            if frame is None:
                lost.append(entry)
                continue
            yield from _stand_in(lost, before=last, after=frame)
            lost = []
            last = frame
            yield frame
        if last is not None:
            yield from _stand_in(lost, before=last, after=None)

    def verify(self) -> Sequence[Damage]:
        """Check every byte: checksums and hash chain of all frames, and that each decodes. Returns `damage`."""
        chain: bytes | None = self._genesis
        at = _HEADER_BYTES
        for entry in self.entries:
            if entry.offset != at:
                chain = None  # after a hole the chain starts anew from the head that follows it
            chain = self._verify_entry(entry, chain)
            at = entry.end
        return self.damage

    def _verify_entry(self, entry: Entry, before: bytes | None) -> bytes | None:
        head = self._read_head(entry.offset)
        if self._decode(entry) is None or head is None:
            return None if head is None else head.chain
        payload = self._pread(entry.offset + _HEAD_BYTES, entry.payload_bytes)
        if before is not None and _chain(before, head.fields, payload) != head.chain:
            reason = f"hash chain broken at frame {entry.number}: it, or what stood before it, was replaced or removed"
            self._note(Damage(entry.offset, entry.end - entry.offset, reason, 0))
        return head.chain

    def _pread(self, offset: int, size: int) -> bytes:
        return os.pread(self._file, min(size, max(self.size_bytes - offset, 0)), offset)

    def _note(self, damage: Damage) -> None:
        self._damage.setdefault(damage.offset, damage)

    def _read_header(self) -> tuple[bytes, int, str]:
        raw = self._pread(0, _HEADER_BYTES)
        if raw[: len(_MAGIC)] != _MAGIC[: len(raw)] or not raw:
            raise CaptureFormatError(f"{self.path} is not a kprobe capture (it does not begin with its mark)")
        if len(raw) < _HEADER_BYTES:
            raise CaptureFormatError(
                f"capture {self.path} is cut off inside its header (at {len(raw)} bytes): it holds no frames"
            )
        _, version, header_bytes, created_real_ns, file_id = _HEADER.unpack(raw[: _HEADER.size])
        if version != VERSION:
            raise CaptureFormatError(f"capture {self.path} has format version {version}; this kprobe reads version {VERSION}")
        if header_bytes != _HEADER_BYTES or _CRC.unpack(raw[_HEADER.size :])[0] != zlib.crc32(raw[: _HEADER.size]):
            self._note(Damage(0, _HEADER_BYTES, "the header does not match its checksum", 0))
        return hashlib.sha256(raw).digest(), created_real_ns, file_id.hex()

    def _read_head(self, offset: int) -> _Head | None:
        """The head at `offset`, or None if there is none that matches its checksum."""
        raw = self._pread(offset, _HEAD_BYTES)
        if len(raw) < _HEAD_BYTES or raw[: len(_RECORD_MAGIC)] != _RECORD_MAGIC:
            return None
        if _CRC.unpack(raw[-_CRC.size :])[0] != zlib.crc32(raw[: -_CRC.size]):
            return None
        _, kind, rows, number, first, last, payload_bytes, crc = _RECORD.unpack(raw[: _RECORD.size])
        if payload_bytes > _PAYLOAD_BYTES_MAX:
            return None
        entry = Entry(offset, _KIND_NAMES.get(kind, f"kind {kind}"), rows, number, first, last, payload_bytes)
        return _Head(entry, kind == _KIND_INDEX, crc, raw[: _RECORD.size], raw[_RECORD.size : -_CRC.size])

    def _read_index(self) -> list[Entry] | None:
        """The frames by the index at the end; None if the file was not closed or the index is damaged."""
        offset = self.size_bytes - _TRAILER_BYTES
        raw = self._pread(offset, _TRAILER_BYTES) if offset >= _HEADER_BYTES else b""
        if raw[: len(_TRAILER_MAGIC)] != _TRAILER_MAGIC or _CRC.unpack(raw[-_CRC.size :])[0] != zlib.crc32(raw[: -_CRC.size]):
            return None
        _, at, frames = _TRAILER.unpack(raw[: _TRAILER.size])
        head = self._read_head(at)
        payload = b"" if head is None else self._pread(at + _HEAD_BYTES, head.entry.payload_bytes)
        if head is None or not head.is_index or zlib.crc32(payload) != head.payload_crc:
            return None
        rows = np.frombuffer(payload, _INDEX) if len(payload) == frames * _INDEX.itemsize else None
        if rows is None:
            return None
        self.closed = True
        return _entries(rows)

    def _scan(self) -> list[Entry]:
        """The frames by walking from head to head, and over damage to the next head; notes what is missing."""
        entries: list[Entry] = []
        at = _HEADER_BYTES
        while at < self.size_bytes:
            head = self._read_head(at)
            if head is None:
                at = self._skip_damage(at)
            elif head.entry.end > self.size_bytes:
                self._note(_cut_off(head.entry, self.size_bytes))
                break
            elif head.is_index:
                at = self._after_index(head.entry)
            else:
                entries.append(head.entry)
                at = head.entry.end
        return entries

    def _after_index(self, entry: Entry) -> int:
        """Past an index that the trailer does not lead to: the file was cut after it, or the index itself is damaged."""
        self._note(Damage(entry.offset, self.size_bytes - entry.offset, "the index at the end is cut off or damaged", 0))
        return self.size_bytes

    def _skip_damage(self, start: int) -> int:
        """Offset of the next whole head after `start`, or the end of the file."""
        at = self._find_head(start + 1)
        if at is None:
            size = self.size_bytes - start
            self._note(Damage(start, size, f"cut off or damaged: {size} bytes that are no whole frame"))
            return self.size_bytes
        self._note(Damage(start, at - start, "the head of a frame does not match its checksum"))
        return at

    def _find_head(self, start: int) -> int | None:
        at = start
        while at < self.size_bytes:
            chunk = self._pread(at, _CHUNK_BYTES + len(_RECORD_MAGIC) - 1)
            found = chunk.find(_RECORD_MAGIC)
            while found >= 0:
                if self._read_head(at + found) is not None:
                    return at + found
                found = chunk.find(_RECORD_MAGIC, found + 1)
            at += _CHUNK_BYTES
        return None

    def _with_holes(self) -> Iterator[Entry]:
        """The entries, with one of kind `hole` where bytes between frames belong to no readable frame."""
        at = _HEADER_BYTES
        for entry in self.entries:
            if entry.offset > at:
                yield Entry(at, "hole", 0, max(entry.number - 1, 0), entry.first_mono_ns, entry.last_mono_ns, entry.offset - at)
            yield entry
            at = entry.end

    def _decode(self, entry: Entry) -> Frame | None:
        """The frame of an entry; None, with the damage noted, if its bytes are not what was written."""
        if entry.kind == "hole":
            return None
        head = self._read_head(entry.offset)
        size = entry.end - entry.offset
        if head is None or head.entry != entry:
            self._note(Damage(entry.offset, size, f"the head of frame {entry.number} was altered", _events(entry)))
            return None
        payload = self._pread(entry.offset + _HEAD_BYTES, entry.payload_bytes)
        if zlib.crc32(payload) != head.payload_crc:
            self._note(Damage(entry.offset, size, f"frame {entry.number} does not match its checksum", _events(entry)))
            return None
        try:
            return Frame.decode(payload)
        except FrameError as error:
            self._note(Damage(entry.offset, size, f"frame {entry.number} cannot be decoded: {error}", _events(entry)))
            return None


def _entries(rows: npt.NDArray[np.void]) -> list[Entry]:
    return [Entry(o, _KIND_NAMES.get(k, f"kind {k}"), n, number, a, b, size) for o, k, n, number, a, b, size in rows.tolist()]


def _events(entry: Entry) -> int:
    return entry.rows if entry.kind == "events/1" else 0


def _cut_off(entry: Entry, size_bytes: int) -> Damage:
    missing = entry.end - size_bytes
    reason = f"frame {entry.number} ({entry.kind}) is cut off: {missing} of its {entry.end - entry.offset} bytes are missing"
    return Damage(entry.offset, size_bytes - entry.offset, reason, _events(entry))


def _touches(entry: Entry, from_mono_ns: int | None, to_mono_ns: int | None) -> bool:
    if entry.kind not in ("events/1", "losses/1", "payload/1"):
        return True
    ended_before = from_mono_ns is not None and entry.last_mono_ns < from_mono_ns
    begins_after = to_mono_ns is not None and entry.first_mono_ns >= to_mono_ns
    return not (ended_before or begins_after)


def _stand_in(lost: Sequence[Entry], *, before: Frame | None, after: Frame | None) -> Iterator[Frame]:
    """A losses frame in the place of damaged ones. What they held is older than the next watermark, newer than nothing."""
    like = after if after is not None else before
    if not lost or like is None:
        return
    rows = []
    for entry in lost:
        known = entry.kind in ("events/1", "losses/1")
        start = entry.first_mono_ns if known else 0 if before is None else before.watermark.node_mono_ns
        end = entry.last_mono_ns if known else max(like.watermark.node_mono_ns, like.clocks.mono_ns)
        rows.append(loss_row("damaged", "capture", from_mono_ns=start, to_mono_ns=max(start, end), count=_events(entry)))
    batch = rows_to_arrow(rows, LOSSES)
    watermark = Watermark(0) if before is None else before.watermark
    yield replace(like, kind="losses/1", number=lost[0].number, watermark=watermark, batch=batch, body={})
