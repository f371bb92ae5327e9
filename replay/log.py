"""A recording on disk: the event log, the files it needs by content hash, and `recording.json`.

Layout of a recording folder (mode 0700, files 0600; a recording can hold secrets):
  recording.json   program, arguments, environment, machine, exit status, fidelity and reasons (schema kprobe.recording/1)
  events.zst       the events in the one order in which they happened, zstd
  blobs/HASH       program images and mapped files, once each (blake2b-160)

An event is a fixed head and byte pieces. `Kind.CALL` is a finished call: number, result, arguments, what it read (`payload`,
full up to 64 KiB, then hash and head) and what it wrote (`pieces`). The other kinds are named in `Kind`.
Guarantees: what was written is read back identically; a file cut short yields the events before the cut, then `TruncatedLog`.
"""

import enum
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import zstandard

from events.errors import InputError

__all__ = ["BlobStore", "Event", "Kind", "LogReader", "LogWriter", "TruncatedLog", "digest_payload", "load_meta", "save_meta"]

SCHEMA: Final = "kprobe.recording/1"
_HEAD: Final = struct.Struct("<BBHiqQ6QII")
NO_THREAD: Final = 0xFFFF
PAYLOAD_KEEP_BYTES: Final = 65536
_FLUSH_BYTES: Final = 1 << 18


class Kind(enum.IntEnum):
    """What an event is."""

    CALL = 1  # a finished call
    START = 2  # a thread runs for the first time, or again after PREEMPT
    SPAWN = 3  # nr: the call; result: new thread's index; args[0]: 1 same process, 2 shares memory; extra: real ids
    SIGNAL = 4  # nr: signal; args[0]: 0 at a boundary, 1 by an instruction; payload: siginfo
    LEAVE = 5  # exit or exit_group entered
    DEATH = 6  # result: wait status; nr: unfinished call or -1
    TRAP = 7  # rdtsc or cpuid answered: nr 1 rdtsc, 2 rdtscp, 3 cpuid; args[0..3]: values
    PREEMPT = 8  # stopped in user code: payload: registers
    EXEC = 9  # a call that replaced the program; extra: images, layout
    END = 10  # the last process has ended
    WRITE = 11  # thread: NO_THREAD; the kernel wrote memory beside a call: args: address, a thread there; payload: bytes


class Event(NamedTuple):
    """One entry of the log."""

    kind: int
    thread: int
    nr: int
    result: int
    time_ns: int
    args: tuple[int, ...]
    payload: bytes
    pieces: tuple[bytes, ...]


class TruncatedLog(InputError):  # noqa: N818 - names what the file is
    """The log ends before its END event: the recorder was killed."""


def digest_payload(data: bytes) -> bytes:
    """The payload as the log keeps it: itself, or head and hash."""
    if len(data) <= PAYLOAD_KEEP_BYTES:
        return data
    return data[:4096] + hashlib.blake2b(data, digest_size=20).digest() + len(data).to_bytes(8, "little")


class LogWriter:
    """Appends events; `close` writes END."""

    def __init__(self, folder: Path) -> None:
        self._file = open(_private(folder / "events.zst"), "wb")  # noqa: SIM115 - closed by `close`
        self._stream = zstandard.ZstdCompressor(level=1).stream_writer(self._file)
        self._buffer: list[bytes] = []
        self._size = 0
        self.count = 0

    def add(
        self,
        kind: int,
        thread: int,
        nr: int = 0,
        result: int = 0,
        time_ns: int = 0,
        args: Sequence[int] = (0, 0, 0, 0, 0, 0),
        payload: bytes = b"",
        pieces: Sequence[bytes] = (),
    ) -> None:
        """Append one event."""
        buffer = self._buffer
        count = len(pieces)
        buffer.append(_HEAD.pack(kind, 0, thread, nr, result, time_ns, *args, len(payload), count))
        if count:
            buffer.append(struct.pack(f"<{count}I", *map(len, pieces)))
        buffer.append(payload)
        buffer.extend(pieces)
        self._size += 100 + len(payload) + sum(map(len, pieces))
        self.count += 1
        if self._size > _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand what is buffered to the compressor."""
        self._stream.write(b"".join(self._buffer))
        self._buffer.clear()
        self._size = 0

    def close(self, end: bool = True) -> None:
        """Finish the file."""
        if end:
            self.add(Kind.END, 0)
        self.flush()
        self._stream.flush(zstandard.FLUSH_FRAME)
        self._file.close()


class LogReader:
    """Iterates the events of a recording."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "events.zst"

    def __iter__(self) -> Iterator[Event]:
        with open(self._path, "rb") as file:
            source = zstandard.ZstdDecompressor().stream_reader(file, read_size=1 << 18)
            while True:
                head = self._exactly(source, _HEAD.size)
                kind, _, thread, nr, result, time_ns, *rest = _HEAD.unpack(head)
                args, payload_len, count = tuple(rest[:6]), rest[6], rest[7]
                sizes = struct.unpack(f"<{count}I", self._exactly(source, 4 * count)) if count else ()
                payload = self._exactly(source, payload_len) if payload_len else b""
                pieces = tuple(self._exactly(source, size) for size in sizes)
                yield Event(kind, thread, nr, result, time_ns, args, payload, pieces)
                if kind == Kind.END:
                    return

    def _exactly(self, source: Any, size: int) -> bytes:
        try:
            data: bytes = source.read(size)
            while len(data) < size:
                more = source.read(size - len(data))
                if not more:
                    raise TruncatedLog(f"{self._path} ends in the middle: the recorder was interrupted; record again")
                data += more
        except zstandard.ZstdError as error:
            raise TruncatedLog(f"{self._path} is damaged: {error}; record again") from error
        return data


class BlobStore:
    """Files by content, stored once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "blobs"
        self._known: dict[tuple[int, ...], str] = {}

    def add_fd(self, fd: int) -> str:
        """Store the whole content behind an open file; returns its hash. The file's position is not used."""
        info = os.fstat(fd)
        key = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        if key in self._known:
            return self._known[key]
        self.folder.mkdir(mode=0o700, exist_ok=True)
        temporary = self.folder / f".partial-{os.getpid()}"
        digest = hashlib.blake2b(digest_size=20)
        with open(os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o700), "wb") as out:
            offset = 0
            while piece := os.pread(fd, 1 << 20, offset):
                digest.update(piece)
                out.write(piece)
                offset += len(piece)
        name = digest.hexdigest()
        temporary.rename(self.folder / name)
        self._known[key] = name
        return name

    def path(self, name: str) -> Path:
        """Where the content with this hash lies; its absence is an error with the hash."""
        path = self.folder / name
        if not name.isalnum() or not path.is_file():
            raise InputError(f"the recording lacks the file content {name}: it was not copied whole")
        return path


def _private(path: Path) -> Path:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600))
    return path


def save_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Write recording.json in one step."""
    temporary = _private(folder / ".recording.json")
    temporary.write_text(json.dumps(meta, indent=1) + "\n")
    temporary.rename(folder / "recording.json")


def load_meta(folder: Path) -> dict[str, Any]:
    """Read recording.json; refuses what is not a recording of this version."""
    path = folder / "recording.json"
    try:
        meta: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(
            f"{folder} is not a recording: it has no recording.json; `kprobe replay record -o DIR` makes one"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if meta.get("schema") != SCHEMA:
        raise InputError(f"{path} has schema {meta.get('schema')!r}, this kprobe reads {SCHEMA!r}")
    return meta
