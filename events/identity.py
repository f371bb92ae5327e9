"""Names that stay true: of threads, processes and events.

A bare pid says nothing a minute later. A thread is (boot id, tid, start_boot_ns), a process (boot id, tgid, start_boot_ns
of its leader); the start time is `task_struct.start_boottime`, in nanoseconds, whose hundredths of a second are field 22
of /proc/PID/stat.
An event is (node, boot id, cpu, seq): the same after a retry, a replay or a rebuild.
"""

from dataclasses import dataclass
from pathlib import Path

from events.errors import InputError

__all__ = ["EventId", "ProcessKey", "ThreadKey", "read_boot_id", "read_node_name"]


@dataclass(frozen=True, slots=True, order=True)
class ThreadKey:
    """One life of one thread."""

    boot_id: str
    tid: int
    start_boot_ns: int


@dataclass(frozen=True, slots=True, order=True)
class ProcessKey:
    """One life of one process (thread group)."""

    boot_id: str
    tgid: int
    start_boot_ns: int


@dataclass(frozen=True, slots=True, order=True)
class EventId:
    """One recorded event; its text form is NODE/BOOT/CPU/SEQ."""

    node: str
    boot_id: str
    cpu: int
    seq: int

    def __str__(self) -> str:
        return f"{self.node}/{self.boot_id}/{self.cpu}/{self.seq}"

    @classmethod
    def parse(cls, text: str) -> "EventId":
        """The event that `text` names. Raises InputError if it is not of the form NODE/BOOT/CPU/SEQ."""
        parts = text.split("/")
        if len(parts) != 4 or not (parts[2].isdigit() and parts[3].isdigit()):
            raise InputError(f"event id {text!r} is not of the form NODE/BOOT/CPU/SEQ; copy one from a verdict's evidence")
        return cls(parts[0], parts[1], int(parts[2]), int(parts[3]))


def read_boot_id(proc: Path = Path("/proc")) -> str:
    """The kernel's boot id, without dashes (32 hex digits)."""
    return (proc / "sys/kernel/random/boot_id").read_text().strip().replace("-", "")


def read_node_name(proc: Path = Path("/proc")) -> str:
    """The node's name as other machines know it: its host name."""
    return (proc / "sys/kernel/hostname").read_text().strip() or "localhost"
