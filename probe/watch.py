"""What is watched: selectors, and the table of processes that the kernel side keeps.

What: `Selector` is one `--watch` argument (`pid:N`, `comm:GLOB`, `cgroup:PATH`, `container:ID`, `port:N`, `all`). `WatchTable`
is one byte a process id, shared with the BPF programs through memory: bit 0 watched, bit 1 observer (kprobe itself, and the
servers it was told to leave out). A child inherits its parent's byte at fork, in the kernel, before it can run; a
byte is written whole, so kernel and user side cannot disturb each other.

Once watched, a process stays so until it ends, also when it leaves the cgroup or changes its name.
`comm:` patterns without `*`, or with one `*` at the end, are matched in the kernel at exec and rename; others when the
event is read, some milliseconds later. A `port:` matches a local port, and the remote port of sockets that connect.

Fails: InputError for a selector that is none, naming it and the forms there are.
"""

import contextlib
import fnmatch
import mmap
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from events.errors import InputError
from events.records import FLAG_OBSERVER, FLAG_WATCHED

__all__ = ["PIDS_MAX", "Selector", "WatchTable", "descendants", "glob_masks", "pids_of_port"]

PIDS_MAX: Final = 4 << 20  # PID_MAX_LIMIT of every 64-bit kernel
_FORMS: Final = "pid:N, comm:GLOB, cgroup:PATH, container:ID, port:N or all"
_NUMBER_MAX: Final = {"pid": PIDS_MAX - 1, "port": 65535}


@dataclass(frozen=True, slots=True)
class Selector:
    """One `--watch` argument. `number` is set for pid and port, `text` for comm, cgroup and container."""

    kind: str
    text: str = ""
    number: int = 0

    @classmethod
    def parse(cls, argument: str) -> "Selector":
        """The selector that `argument` spells. Raises InputError for anything else."""
        if argument == "all":
            return cls("all")
        kind, _, value = argument.partition(":")
        if kind in _NUMBER_MAX:
            if not value.isdecimal() or not 0 < int(value) <= _NUMBER_MAX[kind]:
                raise InputError(f"watch {argument!r}: {kind} must be a number from 1 to {_NUMBER_MAX[kind]}")
            return cls(kind, number=int(value))
        if kind not in ("comm", "cgroup", "container") or not value:
            raise InputError(f"watch {argument!r} is not a selector: give {_FORMS}")
        if kind == "container" and not re.fullmatch(r"[0-9a-f]{12,64}", value):
            raise InputError(f"watch {argument!r}: a container id is 12 to 64 hex digits, as `docker ps` or `crictl ps` print")
        return cls(kind, value)

    def __str__(self) -> str:
        return "all" if self.kind == "all" else f"{self.kind}:{self.text or self.number}"

    def matches_comm(self, comm: str) -> bool:
        """Is this a `comm:` selector for that name?"""
        return self.kind == "comm" and fnmatch.fnmatchcase(comm, self.text)

    def matches_cgroup(self, path: str) -> bool:
        """Is this a `cgroup:` or `container:` selector for the group at `path` or one above it?"""
        if self.kind == "cgroup":
            wanted = "/" + self.text.strip("/")
            return path == wanted or path.startswith(wanted.rstrip("/") + "/")
        return self.kind == "container" and re.search(rf"(^|[/:_-]){self.text}", path) is not None


def glob_masks(pattern: str) -> tuple[int, int, int, int] | None:
    """(mask, value, mask, value) over the 16 bytes of a comm for patterns that are a plain text, `?` and a trailing `*`.

    None for others: those are matched in user space.
    """
    prefix = pattern.endswith("*")
    text = pattern[:-1] if prefix else pattern
    name = text.encode()
    if set(text) & set("*[]") or len(name) > 15:
        return None
    mask = bytes(0 if c == ord("?") else 255 for c in name)
    value = bytes(0 if c == ord("?") else c for c in name)
    if not prefix:  # the end of the name is part of the match
        mask += b"\xff"
        value += b"\0"
    mask, value = mask.ljust(16, b"\0"), value.ljust(16, b"\0")
    return tuple(int.from_bytes(b[i : i + 8], "little") for i in (0, 8) for b in (mask, value))  # type: ignore[return-value]


class WatchTable:
    """The byte of each process, in memory that the BPF programs read and write too."""

    def __init__(self, map_fd: int) -> None:
        self._bytes = mmap.mmap(map_fd, PIDS_MAX, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)

    def fill(self, flags: int) -> None:
        """The byte of every process, present and future."""
        self._bytes[:] = bytes([flags]) * PIDS_MAX

    def flags(self, tgid: int) -> int:
        """The byte of one process."""
        return self._bytes[tgid]

    def watch(self, tgid: int) -> None:
        """Watch a process, even if its parent is an observer."""
        self._bytes[tgid] = FLAG_WATCHED

    def exclude(self, tgid: int) -> None:
        """Leave a process out: its switches are still recorded, flagged as the observer's."""
        self._bytes[tgid] = FLAG_OBSERVER

    def close(self) -> None:
        """Unmap the table."""
        self._bytes.close()


def descendants(roots: Iterable[int], parents: Mapping[int, int]) -> set[int]:
    """`roots` and all processes below them; `parents` maps each process to its parent."""
    children: dict[int, list[int]] = {}
    for child, parent in parents.items():
        children.setdefault(parent, []).append(child)
    found, todo = set(), list(roots)
    while todo:
        pid = todo.pop()
        if pid not in found:
            found.add(pid)
            todo += children.get(pid, [])
    return found


def pids_of_port(port: int, proc: Path = Path("/proc")) -> set[int]:
    """Processes that hold a TCP or UDP socket with local port `port`, listening or not, or a TCP connection to it."""
    inodes = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        with contextlib.suppress(OSError):
            for line in (proc / "net" / table).read_text().splitlines()[1:]:
                words = line.split()
                ports = {int(words[i].rsplit(":", 1)[1], 16) for i in (1, 2)}
                if port in ports and words[9] != "0":
                    inodes.add(f"socket:[{words[9]}]")
    return {int(p.name) for p in proc.iterdir() if p.name.isdecimal() and inodes and _holds(p / "fd", inodes)}


def _holds(folder: Path, links: set[str]) -> bool:
    try:
        entries = list(folder.iterdir())
    except OSError:  # the process has ended
        return False
    for entry in entries:
        with contextlib.suppress(OSError):
            if str(entry.readlink()) in links:
                return True
    return False
