"""What a capture holds, in one pass: for `kprobe info`.

`summarise` reads every frame once (memory stays bounded by the largest frame and the task table) and gives a JSON document of
schema `kprobe.info/1`: kinds and counts, clocks, losses per CPU and time, tasks, damage. `complete` is false when any event is
known to be lost, or when the file was cut or damaged; `hidden_switches` are
those of tasks that the kernel hides from everybody. Holes in the sequence numbers that no loss row explains are losses too.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from events.frames import Frame
from events.kinds import BY_NUMBER
from events.records import LOSS_HIDDEN
from probe.accounts import RingLedger
from probe.capture import CaptureReader
from probe.tasks import TaskTable

__all__ = ["SCHEMA", "summarise"]

SCHEMA: Final = "kprobe.info/1"
_TASK_FIELDS: Final = ("tid", "tgid", "start_boot_ns", "comm", "cmdline", "cgroup", "container", "kthread", "watched")


class _Collected:
    """Running sums over the frames."""

    def __init__(self) -> None:
        self.frames: Counter[str] = Counter()
        self.kinds = np.zeros(256, dtype=np.int64)
        self.cpus: Counter[int] = Counter()
        self.tids: Counter[int] = Counter()
        self.ring = RingLedger()
        self.losses: list[dict[str, Any]] = []
        self.sessions: list[Frame] = []
        self.tasks = TaskTable()
        self.first_mono_ns: int | None = None
        self.last_mono_ns: int | None = None
        self.first: Frame | None = None
        self.last: Frame | None = None

    def add(self, frame: Frame) -> None:
        self.frames[frame.kind] += 1
        self.first = self.first or frame
        self.last = frame
        if frame.kind == "events/1":
            self._events(frame.events())
        elif frame.kind == "tasks/1":
            self.tasks.add(frame.batch)
        elif frame.kind == "losses/1":
            rows = frame.batch.to_pylist()
            self.losses.extend(rows)
            self.ring.add({"cpu": np.empty(0, np.uint16), "seq": np.empty(0, np.uint64)}, rows)
        elif frame.kind == "session/1":
            self.sessions.append(frame)

    def _events(self, columns: Mapping[str, npt.NDArray[Any]]) -> None:
        if not len(columns["kind"]):
            return
        self.kinds += np.bincount(columns["kind"], minlength=256)
        for name, counter in (("cpu", self.cpus), ("tid", self.tids)):
            values, counts = np.unique(columns[name], return_counts=True)
            counter.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        self.ring.add(columns, ())
        times = columns["time_mono_ns"]
        low, high = int(times.min()), int(times.max())
        self.first_mono_ns = low if self.first_mono_ns is None else min(low, self.first_mono_ns)
        self.last_mono_ns = high if self.last_mono_ns is None else max(high, self.last_mono_ns)


def summarise(reader: CaptureReader) -> dict[str, Any]:
    """The summary of the capture; damage that only reading reveals is in it too."""
    seen = _Collected()
    for frame in reader.frames():
        seen.add(frame)
    reader.verify()
    lost = _lost(seen)
    cut = not reader.closed
    return {
        "schema": SCHEMA,
        "file": str(reader.path),
        "size_bytes": reader.size_bytes,
        "created_real_ns": reader.created_real_ns,
        "closed": reader.closed,
        "damage": [
            {"offset": d.offset, "size_bytes": d.size_bytes, "reason": d.reason, "events": d.events} for d in reader.damage
        ],
        "frames": dict(sorted(seen.frames.items())),
        "recording": _recording(seen),
        "clocks": _clocks(seen),
        "events": int(seen.kinds.sum()),
        "kinds": {BY_NUMBER[k].name if k in BY_NUMBER else f"kind {k}": int(seen.kinds[k]) for k in _by_count(seen.kinds)},
        "cpus": {str(cpu): n for cpu, n in sorted(seen.cpus.items())},
        "losses": lost,
        "lost_events": sum(row["count"] for row in lost if row["reason"] != LOSS_HIDDEN),
        "hidden_switches": sum(row["count"] for row in lost if row["reason"] == LOSS_HIDDEN),
        "tasks": _tasks(seen),
        "complete": not (cut or reader.damage or any(row["reason"] != LOSS_HIDDEN for row in lost)),
    }


def _by_count(kinds: npt.NDArray[np.int64]) -> list[int]:
    return sorted(np.flatnonzero(kinds).tolist(), key=lambda k: (-kinds[k], k))


def _recording(seen: _Collected) -> dict[str, Any]:
    """Who recorded what: from the last session frame, the one with all that changed."""
    if seen.first is None:
        return {}
    body = dict(seen.sessions[-1].body) if seen.sessions else {}
    return {"node": seen.first.node, "boot_id": seen.first.boot_id, "recording": seen.first.recording, "session": body}


def _clocks(seen: _Collected) -> dict[str, Any]:
    if seen.first is None or seen.last is None:
        return {}
    first, last = seen.first.clocks, seen.last.clocks
    return {
        "first_event_mono_ns": seen.first_mono_ns,
        "last_event_mono_ns": seen.last_mono_ns,
        "watermark_mono_ns": seen.last.watermark.node_mono_ns,
        "opened": {"mono_ns": first.mono_ns, "boot_ns": first.boot_ns, "real_ns": first.real_ns},
        "closed": {"mono_ns": last.mono_ns, "boot_ns": last.boot_ns, "real_ns": last.real_ns},
    }


def _lost(seen: _Collected) -> list[dict[str, Any]]:
    """Loss rows merged per CPU, reason, hop and family, and holes in the numbers that nobody reported."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in seen.losses:
        key = (row["cpu"], row["reason"], row["hop"], row["family"])
        entry = merged.setdefault(
            key, {**dict(zip(("cpu", "reason", "hop", "family"), key, strict=True)), "count": 0, "rows": 0}
        )
        entry["count"] += row["count"] or 0
        entry["rows"] += 1
        entry["from_mono_ns"] = min(entry.get("from_mono_ns", row["from_mono_ns"]), row["from_mono_ns"])
        until = entry.get("to_mono_ns", row["to_mono_ns"])
        entry["to_mono_ns"] = None if until is None or row["to_mono_ns"] is None else max(until, row["to_mono_ns"])
    for cpu, missing in seen.ring.unexplained().items():
        merged[cpu, "unexplained", "file", None] = {
            "cpu": cpu,
            "reason": "unexplained",
            "hop": "file",
            "family": None,
            "count": missing,
            "rows": 0,
            "from_mono_ns": seen.first_mono_ns,
            "to_mono_ns": seen.last_mono_ns,
        }
    return sorted(merged.values(), key=lambda r: (r["cpu"] is None, r["cpu"] or 0, r["reason"], r["family"] or ""))


def _tasks(seen: _Collected) -> list[dict[str, Any]]:
    """Every life of every thread; `events` are those of its thread id (both lives, if the id was reused)."""
    rows = [{**{f: life.get(f) for f in _TASK_FIELDS}, "events": seen.tids.get(life["tid"], 0)} for life in seen.tasks.lives()]
    known = {row["tid"] for row in rows}
    unknown = [
        {**dict.fromkeys(_TASK_FIELDS), "tid": tid, "events": n} for tid, n in seen.tids.items() if tid and tid not in known
    ]
    return sorted([*rows, *unknown], key=lambda r: (-r["events"], r["tid"]))
