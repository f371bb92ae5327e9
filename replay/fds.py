"""What each file descriptor of each process stands for, followed from the calls alone, the same way at recording and replay.

A label is the path of a file, `stdin`/`stdout`/`stderr` (or `inherited:N`) for what the program was started with, the
peer of a socket, or a kind (`pipe`, `socket`, `eventfd`, ...). Used to find standard output, for the predicates of
interventions and in reports.
A descriptor received over a socket is `stdout` or `stderr` where the recorder saw that it is, else `received`.
"""

import json
import os
import struct
from collections.abc import Callable, Sequence
from typing import Final

__all__ = ["RECEIVED", "FdTable", "follow"]

RECEIVED: Final = b"\0received:"  # begins the piece that names descriptors which came from elsewhere

_NAMED: Final = {0: "stdin", 1: "stdout", 2: "stderr"}
_CLOEXEC: Final = 0o2000000
_KINDS: Final = {
    "socket": "socket", "accept": "socket", "accept4": "socket", "eventfd": "eventfd", "eventfd2": "eventfd",
    "epoll_create": "epoll", "epoll_create1": "epoll", "timerfd_create": "timerfd", "signalfd": "signalfd",
    "signalfd4": "signalfd", "memfd_create": "memfd", "inotify_init": "inotify", "inotify_init1": "inotify",
    "pidfd_open": "pidfd",
}  # fmt: skip
_FLAGS_AT: Final = {"openat": 2, "open": 1, "epoll_create1": 0, "eventfd2": 1, "accept4": 3, "socket": 1, "timerfd_create": 1,
                    "memfd_create": 1, "inotify_init1": 0, "signalfd4": 3}  # fmt: skip


class FdTable:
    """One table; processes made with CLONE_FILES share the object."""

    def __init__(self, labels: dict[int, str] | None = None, cloexec: set[int] | None = None) -> None:
        self.labels: dict[int, str] = dict(_NAMED) if labels is None else labels
        self.cloexec: set[int] = cloexec or set()

    def copy(self) -> "FdTable":
        """What fork gives the child."""
        return FdTable(dict(self.labels), set(self.cloexec))

    def label(self, fd: int) -> str:
        """What a descriptor is; empty when unknown."""
        return self.labels.get(fd & 0xFFFFFFFF, "")

    def after_exec(self) -> None:
        """Close-on-exec descriptors are gone."""
        for fd in self.cloexec:
            self.labels.pop(fd, None)
        self.cloexec.clear()

    def set(self, fd: int, label: str, cloexec: bool) -> None:
        """A new descriptor."""
        self.labels[fd] = label
        (self.cloexec.add if cloexec else self.cloexec.discard)(fd)


def _open(table: FdTable, name: str, args: Sequence[int], result: int, payload: bytes) -> None:
    path = os.fsdecode(payload)
    flags = args[_FLAGS_AT[name]] if name in _FLAGS_AT else 0
    for prefix in ("/proc/self/fd/", "/dev/fd/"):
        if path.startswith(prefix) and path[len(prefix) :].isdigit():
            path = table.label(int(path[len(prefix) :])) or path
    path = {"/dev/stdout": table.label(1), "/dev/stderr": table.label(2), "/dev/stdin": table.label(0)}.get(path, path)
    table.set(result, path, bool(flags & _CLOEXEC))


def _dup(table: FdTable, name: str, args: Sequence[int], result: int, _payload: bytes) -> None:
    if name in ("dup2", "dup3") and args[0] & 0xFFFFFFFF == args[1] & 0xFFFFFFFF:
        return
    table.set(result, table.label(args[0]), name == "dup3" and bool(args[2] & _CLOEXEC))


def _fcntl(table: FdTable, _name: str, args: Sequence[int], result: int, _payload: bytes) -> None:
    command = args[1] & 0xFFFFFFFF
    if command in (0, 1030):
        table.set(result, table.label(args[0]), command == 1030)
    elif command == 2:
        (table.cloexec.add if args[2] & 1 else table.cloexec.discard)(args[0] & 0xFFFFFFFF)


def _close(table: FdTable, _name: str, args: Sequence[int], _result: int, _payload: bytes) -> None:
    table.labels.pop(args[0] & 0xFFFFFFFF, None)
    table.cloexec.discard(args[0] & 0xFFFFFFFF)


def _close_range(table: FdTable, _name: str, args: Sequence[int], _result: int, _payload: bytes) -> None:
    first, last = args[0] & 0xFFFFFFFF, args[1] & 0xFFFFFFFF
    for fd in [fd for fd in table.labels if first <= fd <= last]:
        if args[2] & 4:
            table.cloexec.add(fd)
        else:
            table.labels.pop(fd, None)


def _connect(table: FdTable, _name: str, args: Sequence[int], _result: int, payload: bytes) -> None:
    table.labels[args[0] & 0xFFFFFFFF] = peer_name(payload)


def _kind(table: FdTable, name: str, args: Sequence[int], result: int, _payload: bytes) -> None:
    flags = args[_FLAGS_AT[name]] if name in _FLAGS_AT else 0
    table.set(result, _KINDS[name], bool(flags & (1 if name == "memfd_create" else _CLOEXEC)))


def peer_name(address: bytes) -> str:
    """A socket address for people."""
    family = int.from_bytes(address[:2], "little")
    if family == 2 and len(address) >= 8:
        return f"tcp:{'.'.join(map(str, address[4:8]))}:{struct.unpack('>H', address[2:4])[0]}"
    if family == 10 and len(address) >= 24:
        groups = struct.unpack(">8H", address[8:24])
        return f"tcp:[{':'.join(f'{g:x}' for g in groups)}]:{struct.unpack('>H', address[2:4])[0]}"
    if family == 1:
        return f"unix:{os.fsdecode(address[2:].split(bytes(1))[0])}"
    return f"socket:family-{family}"


_Follower = Callable[[FdTable, str, Sequence[int], int, bytes], None]
_FOLLOW: Final[dict[str, _Follower]] = {
    "open": _open, "openat": _open, "creat": _open, "openat2": _open, "dup": _dup, "dup2": _dup, "dup3": _dup, "fcntl": _fcntl,
    "close": _close, "close_range": _close_range, "connect": _connect, **dict.fromkeys(_KINDS, _kind),
}  # fmt: skip


def follow(
    table: FdTable, name: str, args: Sequence[int], result: int, payload: bytes, pieces: Sequence[bytes]
) -> None:
    """Apply one finished call to the table."""
    if result < 0 and not (name == "connect" and result == -115):
        return
    if name in ("pipe", "pipe2", "socketpair") and pieces:
        for fd in struct.unpack("<2i", pieces[0]):
            table.set(fd, "pipe" if name != "socketpair" else "socketpair", False)
        return
    if name in ("recvmsg", "pidfd_getfd") and pieces and pieces[-1].startswith(RECEIVED):
        for fd_text, label in json.loads(pieces[-1][len(RECEIVED) :]).items():
            table.set(int(fd_text), label, name == "pidfd_getfd")
        return
    if name == "openat2" or name == "openat":
        payload = payload if name == "openat" else payload[4 : 4 + int.from_bytes(payload[:4], "little")]
    handler = _FOLLOW.get(name)
    if handler:
        handler(table, name, args, result, payload)
