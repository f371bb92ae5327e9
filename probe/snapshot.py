"""Every thread as it is when a recording begins: rows of the task stream with reason `snapshot`.

What: a BPF iterator walks the kernel's own list of tasks, so that start times, states, CPUs and parents are exact and of
one clock; procfs then adds what only it has: command line, the system call a blocked thread sits in, its wait channel.
Each row carries the time at which it was taken, so it orders against the events recorded meanwhile.
Fails: never for a single task; one that ends between the two steps has no command line.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from probe.cgroups import CgroupTable, container_of

__all__ = ["TASK_ROW", "KernelTask", "read_cmdline", "snapshot_rows", "state_letter"]

# struct task_row of bpf/tasks.c
TASK_ROW: Final = np.dtype(
    [
        ("time_mono_ns", "<u8"),
        ("start_boot_ns", "<u8"),
        ("parent_start_boot_ns", "<u8"),
        ("cgroup_id", "<u8"),
        ("tid", "<u4"),
        ("tgid", "<u4"),
        ("parent_tid", "<u4"),
        ("parent_tgid", "<u4"),
        ("state", "<u4"),
        ("flags", "<u4"),
        ("policy", "<u4"),
        ("on_cpu", "<u4"),
        ("prio", "<i4"),
        ("cpu", "<i4"),
        ("comm", "S16"),
        ("exit_state", "<u4"),
        ("unused", "<u4"),
    ]
)
KernelTask = np.void  # one element of an array of TASK_ROW

_PF_KTHREAD: Final = 0x00200000
# include/linux/sched.h; the letters of /proc/PID/stat
_STATES: Final = ((0x1, "S"), (0x2, "D"), (0x4, "T"), (0x8, "t"), (0x40, "P"))
_TASK_NOLOAD: Final = 0x400
_EXIT_STATES: Final = {0x20: "Z", 0x10: "X", 0x30: "Z"}


def state_letter(state: int, exit_state: int = 0) -> str:
    """The letter of /proc/PID/stat for the kernel's state bits."""
    if exit_state:
        return _EXIT_STATES.get(exit_state & 0x30, "X")
    if state & 0x2 and state & _TASK_NOLOAD:
        return "I"
    for bit, letter in _STATES:
        if state & bit:
            return letter
    return "R" if state & 0xFF == 0 else "X"


def read_cmdline(pid: int, proc: Path = Path("/proc")) -> str | None:
    """Arguments of a process, separated by blanks; None for kernel threads and processes that have ended."""
    with contextlib.suppress(OSError):
        return join_arguments((proc / str(pid) / "cmdline").read_bytes())
    return None


def join_arguments(raw: bytes) -> str | None:
    """Arguments separated by NUL, as one line; None if there are none."""
    return raw.rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace") or None


def _blocked_in(tgid: int, tid: int, proc: Path) -> dict[str, Any]:
    """System call and wait channel of a blocked thread, as far as procfs says."""
    folder, out = proc / str(tgid) / "task" / str(tid), dict[str, Any]()
    with contextlib.suppress(OSError):
        words = (folder / "syscall").read_text().split()
        if len(words) >= 4 and words[0].lstrip("-").isdigit():  # "running" for one that has woken since
            out["syscall_nr"] = int(words[0])
            out.update({f"syscall_arg{i}": int(words[1 + i], 16) for i in range(3)})
    with contextlib.suppress(OSError):
        out["wchan"] = (folder / "wchan").read_text().strip("0") or None
    return out


def snapshot_rows(
    tasks: np.ndarray[Any, np.dtype[np.void]], cgroups: CgroupTable, flags: bytes, proc: Path = Path("/proc")
) -> Iterator[dict[str, Any]]:
    """Rows of the task stream for what the iterator found; `flags[i]` is the watch byte of task i's process."""
    cmdlines: dict[int, str | None] = {}
    for task, watch in zip(tasks, flags, strict=True):
        tid, tgid = int(task["tid"]), int(task["tgid"])
        kthread = bool(task["flags"] & _PF_KTHREAD)
        letter = state_letter(int(task["state"]), int(task["exit_state"]))
        if tgid not in cmdlines:
            cmdlines[tgid] = None if kthread else read_cmdline(tgid, proc)
        path = cgroups.path(int(task["cgroup_id"]))
        row = {
            "time_mono_ns": int(task["time_mono_ns"]),
            "reason": "snapshot",
            "tid": tid,
            "tgid": tgid,
            "start_boot_ns": int(task["start_boot_ns"]),
            "comm": task["comm"].decode(errors="replace"),
            "cmdline": cmdlines[tgid],
            "parent_tid": int(task["parent_tid"]),
            "parent_tgid": int(task["parent_tgid"]),
            "parent_start_boot_ns": int(task["parent_start_boot_ns"]),
            "cgroup_id": int(task["cgroup_id"]),
            "cgroup": path,
            "container": container_of(path or ""),
            "kthread": kthread,
            "watched": bool(watch & 1),
            "observer": bool(watch & 2),
            "prio": int(task["prio"]),
            "policy": int(task["policy"]),
            "state": letter,
            "cpu": int(task["cpu"]),
        }
        if letter in "SD" and not kthread:
            row |= _blocked_in(tgid, tid, proc)
        yield row
