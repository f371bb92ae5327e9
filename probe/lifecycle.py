"""Task rows from the events that tell of them: fork, exec, rename, exit, change of cgroup.

What: turns the few lifecycle events of a drain, and the texts (arguments, cgroup paths) that came beside them, into rows of
the task stream. Remembers of every living thread what later events leave out: its process, start time, name and cgroup.
Inputs must come in the order of time. Memory is bounded by the number of living threads: an exit forgets.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from events.kinds import BY_NUMBER, Kind
from events.records import FLAG_OBSERVER, FLAG_WATCHED
from probe.cgroups import CgroupTable, container_of
from probe.ring import TextRecord
from probe.snapshot import join_arguments
from probe.watch import WatchTable

__all__ = ["LIFECYCLE", "TaskRows"]

LIFECYCLE: Final = (
    "sched_process_fork",
    "sched_process_exec",
    "sched_process_exit",
    "task_rename",
    "cgroup_attach_task",
    "cgroup_mkdir",
)

_ARGV, _CGROUP_MADE = 1, 2  # TEXT_* of bpf/common.h
_KEPT: Final = ("tid", "tgid", "start_boot_ns", "comm", "cmdline", "cgroup_id", "kthread")

Row = dict[str, Any]


def _comm(values: Mapping[str, int]) -> str:
    raw = values["comm_lo"].to_bytes(8, "little") + values["comm_hi"].to_bytes(8, "little")
    return raw.split(b"\0")[0].decode(errors="replace")


class TaskRows:
    """Builds task rows; `remember` tells it of the threads of the snapshot."""

    def __init__(self, cgroups: CgroupTable, table: WatchTable) -> None:
        self._cgroups = cgroups
        self._table = table
        self._known: dict[int, Row] = {}
        self._arguments: dict[int, deque[bytes]] = defaultdict(deque)
        self._groups: list[tuple[int, str]] = []

    def remember(self, row: Row) -> None:
        """Note what is true of a living thread."""
        self._known[row["tid"]] = {name: row.get(name) for name in _KEPT}

    def knows(self, tid: int) -> bool:
        """Is it a thread of the snapshot, or born since, that has not ended?"""
        return tid in self._known

    def new_groups(self) -> list[tuple[int, str]]:
        """(id, path) of cgroups made since the last question, in the hierarchy that events speak of."""
        groups, self._groups = self._groups, []
        return groups

    def rows(self, columns: Mapping[str, npt.NDArray[Any]], texts: Iterable[TextRecord]) -> list[Row]:
        """Rows for lifecycle events in the order of time."""
        for text in texts:
            if text.kind == _ARGV:
                self._arguments[text.tid].append(text.text)
            elif text.kind == _CGROUP_MADE:
                path = text.text.decode(errors="replace")
                self._cgroups.made(text.key, path)
                if text.key >> 48 == self._cgroups.hierarchy.number:
                    self._groups.append((text.key & (1 << 48) - 1, path))
        out = []
        for i in range(len(columns["kind"])):
            row = self._row({name: column[i] for name, column in columns.items()})
            if row:
                out.append(row)
        self._arguments.clear()  # what no exec asked for belongs to an exec whose event was lost
        return out

    def _row(self, event: Mapping[str, np.generic]) -> Row | None:
        kind: Kind = BY_NUMBER[int(event["kind"])]
        values = kind.decode(tuple(int(event[f"a{i}"]) for i in range(5)))
        tid, tgid = int(event["tid"]), int(event["tgid"])
        row: Row = {"time_mono_ns": int(event["time_mono_ns"])}
        match kind.name:
            case "sched_process_fork":
                row |= self._fork(tid, tgid, values)
            case "sched_process_exec":
                row |= self._exec(tid, tgid, values)
            case "sched_process_exit":
                row |= self._exit(tid, tgid, values)
            case "task_rename":
                row |= self._rename(values)
            case "cgroup_attach_task" if values["root"] == self._cgroups.hierarchy.number:
                row |= self._moved(values)
            case _:
                return None
        flags = self._table.flags(row["tgid"])
        return row | {"watched": bool(flags & FLAG_WATCHED), "observer": bool(flags & FLAG_OBSERVER)}

    def _fork(self, tid: int, tgid: int, values: Mapping[str, int]) -> Row:
        parent = self._known.get(tid, {})
        row = self._identity("fork", values["tid"], values["tgid"], values["start_boot_ns"])
        row |= {
            "comm": _comm(values),
            "cmdline": parent.get("cmdline"),
            "parent_tid": tid,
            "parent_tgid": tgid,
            "parent_start_boot_ns": parent.get("start_boot_ns"),
            "kthread": parent.get("tid") == 2,  # kthreadd forks every kernel thread
        }
        row |= self._group(values["cgroup_id"])
        self.remember(row)
        return row

    def _exec(self, tid: int, tgid: int, values: Mapping[str, int]) -> Row:
        arguments = self._arguments.get(tid)
        row = self._identity("exec", tid, tgid, values["start_boot_ns"])
        row |= {"comm": _comm(values), "kthread": False, "cmdline": join_arguments(arguments.popleft()) if arguments else None}
        row |= self._group(values["cgroup_id"])
        if values["old_tid"] != tid:  # a thread took over its process: its old number is gone
            self._known.pop(values["old_tid"], None)
        self.remember(row)
        return row

    def _exit(self, tid: int, tgid: int, values: Mapping[str, int]) -> Row:
        known = self._known.pop(tid, {})
        row = self._identity("exit", tid, tgid, values["start_boot_ns"])
        row |= {"comm": _comm(values), "exit_code": values["exit_code"], "kthread": known.get("kthread")}
        return row | self._group(values["cgroup_id"])

    def _rename(self, values: Mapping[str, int]) -> Row:
        row = self._identity("rename", values["tid"], values["tgid"], values["start_boot_ns"]) | {"comm": _comm(values)}
        self._known.get(values["tid"], {})["comm"] = row["comm"]
        return row

    def _moved(self, values: Mapping[str, int]) -> Row:
        row = self._identity("cgroup", values["tid"], values["tgid"], values["start_boot_ns"])
        row |= self._group(values["cgroup_id"])
        known = self._known.get(values["tid"], {})
        known["cgroup_id"] = row["cgroup_id"]
        return row | {"comm": known.get("comm")}

    @staticmethod
    def _identity(reason: str, tid: int, tgid: int, start_boot_ns: int) -> Row:
        return {"reason": reason, "tid": tid, "tgid": tgid, "start_boot_ns": start_boot_ns}

    def _group(self, cgroup_id: int) -> Row:
        path = self._cgroups.path(cgroup_id)
        return {"cgroup_id": cgroup_id, "cgroup": path, "container": container_of(path or "")}
