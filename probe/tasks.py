"""Who was who: the task table of a recording, and the container that a cgroup path names.

`TaskTable` takes the rows of tasks frames and answers for a thread id at a time; a reused id is two lives. It is for listings
and summaries; inference has its own, stricter one.

`container_id` knows the forms that runtimes give to cgroups, both under the systemd and the cgroupfs driver: docker,
containerd, cri-o, podman. The innermost container counts. Monitors that stand beside a container (conmon) are not in it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["TaskTable", "container_id", "with_container"]

# docker-<id>.scope, /docker/<id>, cri-containerd-<id>.scope, kubepods-...slice:cri-containerd:<id>, crio-<id>.scope,
# libpod-<id>.scope, /kubepods/burstable/pod<uid>/<id>, /ecs/<task>/<id>
_ID: Final = re.compile(r"(?:^|[-:])([0-9a-f]{64})(?:\.scope)?$")
_MONITOR: Final = re.compile(r"(?:^|-)conmon-")


def container_id(cgroup: str | None) -> str | None:
    """The 64 hex digits of the container that the cgroup path belongs to, or None."""
    for part in reversed((cgroup or "").split("/")):
        found = _ID.search(part)
        if found:
            return None if _MONITOR.search(part) else found[1]
    return None


def with_container(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The task row with its container filled in from its cgroup, if it names one."""
    if row.get("container") is not None or not row.get("cgroup"):
        return row
    container = container_id(row["cgroup"])
    return row if container is None else {**row, "container": container}


class TaskTable:
    """Threads by id and time."""

    def __init__(self) -> None:
        self._rows: dict[int, list[dict[str, Any]]] = {}
        self._names: dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.object_]]] = {}

    def add(self, batch: pa.RecordBatch) -> None:
        """The rows of a tasks frame."""
        for row in batch.to_pylist():
            lives = self._rows.setdefault(row["tid"], [])
            lives.append(row)
            if len(lives) > 1 and (lives[-2]["time_mono_ns"] or 0) > (row["time_mono_ns"] or 0):
                lives.sort(key=lambda r: r["time_mono_ns"] or 0)
            self._names.pop(row["tid"], None)

    def at(self, tid: int, time_mono_ns: int) -> dict[str, Any]:
        """All that was known of the thread at that time: later rows of the same life over earlier ones. Empty if unknown."""
        known: dict[str, Any] = {}
        for row in self._rows.get(tid, ()):
            if known and (row["time_mono_ns"] or 0) > time_mono_ns:
                break
            if row["start_boot_ns"] is not None and known.get("start_boot_ns") not in (None, row["start_boot_ns"]):
                known = {}
            known.update({k: v for k, v in row.items() if v is not None})
        return known

    def comms(self, tids: npt.NDArray[Any], times_mono_ns: npt.NDArray[Any], cpus: npt.NDArray[Any]) -> list[str]:
        """The name of each thread at each time; "" if unknown. Work is per thread, not per row."""
        names = np.full(len(tids), "", dtype=object)
        for tid in np.unique(tids).tolist():
            where = np.flatnonzero(tids == tid)
            if tid == 0:
                names[where] = [f"swapper/{cpu}" for cpu in cpus[where].tolist()]
                continue
            times, comms = self._history(tid)
            if len(times):
                names[where] = comms[np.maximum(np.searchsorted(times, times_mono_ns[where], "right") - 1, 0)]
        return names.tolist()

    def lives(self) -> Iterator[dict[str, Any]]:
        """Every life of every thread once, as last known, in the order of thread ids."""
        for tid in sorted(self._rows):
            known: dict[str, Any] = {}
            for row in self._rows[tid]:
                if row["start_boot_ns"] is not None and known.get("start_boot_ns") not in (None, row["start_boot_ns"]):
                    yield known
                    known = {}
                known.update({k: v for k, v in row.items() if v is not None})
            if known:
                yield known

    def _history(self, tid: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.object_]]:
        if tid not in self._names:
            named: Sequence[dict[str, Any]] = [r for r in self._rows.get(tid, ()) if r["comm"]]
            times = np.array([r["time_mono_ns"] or 0 for r in named], dtype=np.int64)
            self._names[tid] = times, np.array([r["comm"] for r in named], dtype=object)
        return self._names[tid]
