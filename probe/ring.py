"""Reading the kernel's rings of event records, whole blocks at a time, with numpy; and accounting for every event.

What: `EventRing` maps the ring of one CPU into memory and gives the committed records as columns; `CpuLedger` follows the
sequence numbers of one CPU and says which events were lost and when; `TextRing` walks the shared ring of names.

Layout of a ring (any kernel since 5.8): a page with the consumer's position (read-write), a page with the producer's, then the
data, mapped twice in a row, so that no record wraps in our view. A record is a 32-bit length with two flag bits, 4 bytes of no
interest, then its payload. All records of an event ring have one size, so a block is one strided array.

Guarantees: records are copied before their space is given back; a record that is still being written ends the block. For
every CPU, produced == delivered + lost + unsettled, and `unsettled` becomes 0 once the CPU is quiet.

Holes: a program interrupted between taking its number and reserving its space delivers later than its interrupter. A missing
number therefore is `pending` until it arrives, or until it cannot arrive any more: a later sched_switch of that CPU was
delivered (programs run with preemption off, so the interrupted one had ended), or GRACE_NS went by. The watermark waits for it.
"""

import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from events.kinds import BY_NAME
from events.records import EVENT_DTYPE, RECORD_BYTES

__all__ = ["Block", "CpuLedger", "EventRing", "Hole", "RingMemory", "TextRecord", "TextRing"]

PAGE: Final = mmap.PAGESIZE
_BUSY: Final = 1 << 31
_DISCARD: Final = 1 << 30
_HEADER_BYTES: Final = 8
_STRIDE: Final = RECORD_BYTES + _HEADER_BYTES
_SLOT: Final = np.dtype([("header", "<u4"), ("page", "<u4"), ("event", EVENT_DTYPE)])
_SWITCH: Final = BY_NAME["sched_switch"].number

# A program that was interrupted between two lines resumes when the interrupt ends; a virtual CPU may be taken away for
# some tens of milliseconds in between.
GRACE_NS: Final = 250_000_000

_FITTING_MIN: Final = 256 << 10
_FITTING_MAX: Final = 64 << 20

U64 = npt.NDArray[np.uint64]


class RingMemory:
    """The two memory mappings of one ring."""

    def __init__(self, map_fd: int, data_bytes: int) -> None:
        self.data_bytes = data_bytes
        self._control = mmap.mmap(map_fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0)
        self._ring = mmap.mmap(map_fd, PAGE + 2 * data_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=PAGE)
        # Aligned 8-byte loads and stores are atomic on every machine that kprobe runs on.
        self._consumer: U64 | None = np.frombuffer(self._control, np.uint64, 1)
        self._producer: U64 | None = np.frombuffer(self._ring, np.uint64, 1)

    @property
    def consumed(self) -> int:
        assert self._consumer is not None, "ring is closed"
        return int(self._consumer[0])

    @property
    def produced(self) -> int:
        assert self._producer is not None, "ring is closed"
        return int(self._producer[0])

    def release(self, position: int) -> None:
        """Give the space before `position` back to the kernel: what lay there must have been copied."""
        assert self._consumer is not None, "ring is closed"
        self._consumer[0] = position

    def word(self, position: int) -> int:
        """The 32 bits at a position: the header of a record. Read before what they vouch for."""
        return int(np.frombuffer(self._ring, "<u4", 1, PAGE + position % self.data_bytes)[0])

    def copy(self, position: int, length: int) -> bytes:
        """A copy of the bytes at a position; the second mapping makes them contiguous."""
        at = PAGE + position % self.data_bytes
        return self._ring[at : at + length]

    @staticmethod
    def map_array(fd: int, size: int) -> U64:
        """The value of a mappable array as words."""
        return np.frombuffer(mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ), np.uint64)

    def close(self) -> None:
        self._consumer = self._producer = None
        self._ring.close()
        self._control.close()


@dataclass(frozen=True, slots=True)
class Block:
    """Records of one CPU in the order of their reservation. `complete`: nothing that was in the ring is left there."""

    events: npt.NDArray[Any]
    complete: bool


class EventRing:
    """The ring of one CPU, with 64-byte records."""

    def __init__(self, map_fd: int, data_bytes: int) -> None:
        self._map = RingMemory(map_fd, data_bytes)
        self.delivered = 0

    def read(self, limit: int) -> Block:
        """A copy of at most `limit` committed records; their space is free again at once."""
        start = self._map.consumed
        available = (self._map.produced - start) // _STRIDE
        count = min(available, limit)
        slots = np.ndarray((count,), _SLOT, buffer=self._map._ring, offset=PAGE + start % self._map.data_bytes)
        headers = slots["header"].copy()
        busy = np.flatnonzero(headers & _BUSY)
        if busy.size:
            count = int(busy[0])
        events = slots["event"][:count].copy()  # always a copy: the kernel overwrites the space one lap later
        self._map.release(start + count * _STRIDE)
        if (headers[:count] & _DISCARD).any():
            events = events[(headers[:count] & _DISCARD) == 0]
        self.delivered += len(events)
        return Block(events, complete=count == available)

    def backlog_bytes(self) -> int:
        """Bytes that wait to be read."""
        return self._map.produced - self._map.consumed

    def close(self) -> None:
        """Unmap the ring."""
        self._map.close()


@dataclass(slots=True)
class Hole:
    """Events `first_seq` to `last_seq` of a CPU, not seen; they happened within (from_mono_ns, to_mono_ns)."""

    first_seq: int
    last_seq: int
    from_mono_ns: int
    to_mono_ns: int
    found_mono_ns: int

    @property
    def count(self) -> int:
        return self.last_seq - self.first_seq + 1


@dataclass(slots=True)
class CpuLedger:
    """Follows the sequence numbers of one CPU. `next_seq` is the lowest number of which nothing is known yet."""

    cpu: int
    next_seq: int = 0
    last_mono_ns: int = 0
    delivered: int = 0
    lost: int = 0
    pending: list[Hole] = field(default_factory=list)

    def extend(self, seq32: npt.NDArray[np.uint32]) -> U64:
        """Full sequence numbers from their low 32 bits: the nearest ones to `next_seq`."""
        step = (seq32 - np.uint32(self.next_seq & 0xFFFFFFFF)).view(np.int32).astype(np.int64)
        return (step + self.next_seq).view(np.uint64)

    def account(self, seq: U64, times: npt.NDArray[np.int64], now_mono_ns: int) -> None:
        """Note that the events `seq` (any order, each for the first time) have been delivered."""
        count = len(seq)
        if count == 0:
            return
        self.delivered += count
        low, high = int(seq.min()), int(seq.max())
        if low == self.next_seq and high - low + 1 == count:  # nearly always: nothing is missing
            self.next_seq, self.last_mono_ns = high + 1, int(times.max())
            return
        order = np.argsort(seq, kind="stable")
        ordered, times = seq[order].astype(np.int64), times[order]
        late = int(np.searchsorted(ordered, self.next_seq))
        for number in ordered[:late].tolist():
            self._fill(number)
        if late < count:
            self._note_gaps(ordered[late:], times[late:], now_mono_ns)
            self.next_seq, self.last_mono_ns = high + 1, max(self.last_mono_ns, int(times.max()))

    def _note_gaps(self, seq: npt.NDArray[np.int64], times: npt.NDArray[np.int64], now_mono_ns: int) -> None:
        before = np.concatenate(([self.next_seq - 1], seq[:-1]))
        times_before = np.concatenate(([self.last_mono_ns], times[:-1]))
        for i in np.flatnonzero(seq - before > 1).tolist():
            bounds = sorted((int(times_before[i]), int(times[i])))
            self.pending.append(Hole(int(before[i]) + 1, int(seq[i]) - 1, bounds[0], bounds[1], now_mono_ns))

    def note_produced(self, produced: int, now_mono_ns: int) -> None:
        """`produced` numbers had been taken, all in the past: what was not delivered is missing at the end."""
        if produced > self.next_seq:
            self.pending.append(Hole(self.next_seq, produced - 1, self.last_mono_ns, now_mono_ns, now_mono_ns))
            self.next_seq = produced

    def _fill(self, seq: int) -> None:
        """An event that was missing has arrived after all."""
        for i, hole in enumerate(self.pending):
            if not hole.first_seq <= seq <= hole.last_seq:
                continue
            rest = [
                Hole(first, last, hole.from_mono_ns, hole.to_mono_ns, hole.found_mono_ns)
                for first, last in ((hole.first_seq, seq - 1), (seq + 1, hole.last_seq))
                if first <= last
            ]
            self.pending[i : i + 1] = rest
            return

    def settle(self, switch_seq: int, now_mono_ns: int, *, final: bool = False) -> list[Hole]:
        """The holes that can no longer be filled: they are lost. `switch_seq` is the highest number of a switch delivered."""
        certain = [h for h in self.pending if final or h.last_seq < switch_seq or now_mono_ns - h.found_mono_ns > GRACE_NS]
        self.pending = [h for h in self.pending if h not in certain]
        self.lost += sum(h.count for h in certain)
        return certain

    def watermark(self, complete_until_mono_ns: int) -> int:
        """Everything before this time has been delivered or declared lost."""
        return min([complete_until_mono_ns, *(hole.from_mono_ns for hole in self.pending)])


def last_switch(seq: U64, kinds: npt.NDArray[np.uint8]) -> int:
    """The highest sequence number of a sched_switch in a block; -1 if it has none."""
    found = np.flatnonzero(kinds == _SWITCH)
    return int(seq[found].max()) if found.size else -1


_TEXT_HEAD: Final = np.dtype(
    [("time_mono_ns", "<u8"), ("key", "<u8"), ("kind", "<u4"), ("tid", "<u4"), ("cpu", "<u4"), ("bytes", "<u4")]
)


@dataclass(frozen=True, slots=True)
class TextRecord:
    """A name or a command line that the kernel side read: kind 1 arguments of a new program, 2/3 path of a cgroup made/gone."""

    time_mono_ns: int
    key: int
    kind: int
    tid: int
    text: bytes


class TextRing:
    """The ring of variable-length texts, shared by all CPUs: rare records, walked one by one."""

    def __init__(self, map_fd: int, data_bytes: int) -> None:
        self._map = RingMemory(map_fd, data_bytes)

    def read(self) -> Iterator[TextRecord]:
        """The committed records; their space is given back as the iteration goes on."""
        position, end = self._map.consumed, self._map.produced
        while position < end:
            at = PAGE + position % self._map.data_bytes
            header = int(np.frombuffer(self._map._ring, "<u4", 1, at)[0])
            if header & _BUSY:
                return
            length = header & ~(_BUSY | _DISCARD)
            payload = self._map._ring[at + _HEADER_BYTES : at + _HEADER_BYTES + length]
            position += _HEADER_BYTES + (length + 7 & ~7)
            self._map.release(position)
            if not header & _DISCARD:
                yield _text_record(payload)

    def close(self) -> None:
        """Unmap the ring."""
        self._map.close()


def _text_record(payload: bytes) -> TextRecord:
    head: Mapping[str, Any] = np.frombuffer(payload, _TEXT_HEAD, 1)[0]
    text = payload[_TEXT_HEAD.itemsize : _TEXT_HEAD.itemsize + int(head["bytes"])]
    return TextRecord(int(head["time_mono_ns"]), int(head["key"]), int(head["kind"]), int(head["tid"]), text)


def round_ring_bytes(wanted: int) -> int:
    """The ring size to create: a power of two, at least one page, at most what the kernel takes."""
    return min(max(1 << (wanted - 1).bit_length(), PAGE), 1 << 31)


def fitting_ring_bytes(cpus: int, memory_max_bytes: int) -> int:
    """The ring size where none is set: 64 MiB, or less, so that all rings together fill at most half of the memory cap.

    A ring is mapped twice in a row, and resident memory counts both. 64 MiB hold 0.4 s of 2 million events a second.
    """
    room = memory_max_bytes // 2 // (2 * cpus)
    return min(max(1 << max(room, 1).bit_length() - 1, _FITTING_MIN), _FITTING_MAX)


def online_cpus() -> int:
    """One more than the highest CPU number this machine may ever bring online."""
    return int(os.sysconf("SC_NPROCESSORS_CONF"))
