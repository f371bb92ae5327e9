"""Two simple rules that kprobe must beat: the busiest process near the time, and the noisiest within 50 ms."""

from collections import Counter
from typing import Any

import numpy as np

from benchmarks.accuracy.judge import Run
from benchmarks.accuracy.lab import Operation
from events.kinds import BY_NUMBER

__all__ = ["busiest_process", "events_nearby"]

_NEAR_NS = 50_000_000
_KIND_OF_FAMILY = {
    "sched": "cpu_preempted", "block": "disk_contention", "jbd2": "journal_commit", "tcp": "peer_slow", "sock": "peer_slow",
    "net": "peer_slow", "reclaim": "memcg_reclaim", "locks": "lock_holder", "softirq": "irq_storm", "irq": "irq_storm",
    "signals": "killed_signal", "oom": "killed_oom", "writeback": "dirty_throttle",
}  # fmt: skip


def busiest_process(run: Run, victim_tgids: set[int]) -> tuple[str, int]:
    """(kind, culprit): whoever used most CPU while the fault ran, other than the victim."""
    return next((("cpu_preempted", pid) for pid, _ in run.busiest if pid not in victim_tgids), ("unknown", 0))


def events_nearby(run: Run, op: Operation) -> tuple[str, int]:
    """(kind, culprit): the process and the family with most events within 50 ms of the operation's end."""
    tgids: Counter[int] = Counter()
    families: Counter[str] = Counter()
    for columns in _events(run):
        near = np.abs(columns["time_mono_ns"] - op.end_mono_ns) <= _NEAR_NS
        near &= (columns["tid"] != op.tid) & (columns["tid"] != 0)
        tgids.update(columns["tgid"][near].tolist())
        families.update(BY_NUMBER[k].family for k in columns["kind"][near].tolist() if k in BY_NUMBER)
    kinds = [_KIND_OF_FAMILY[f] for f, _ in families.most_common() if f in _KIND_OF_FAMILY]
    return (kinds or ["unknown"])[0], (tgids.most_common(1) or [(0, 0)])[0][0]


def _events(run: Run) -> list[dict[str, Any]]:
    from probe.capture import CaptureReader

    return [frame.events() for frame in CaptureReader(run.capture).frames() if frame.kind == "events/1"]
