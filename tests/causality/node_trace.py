"""Hand-made traces for the whole engine: events as in `mechanism_trace`, the verdict of one operation on them.

A thread's start is its tid in ns; `task(...)` names it. Everything is recorded from time 0 on unless a loss is given.
"""

import numpy as np
import pyarrow as pa

from causality.engine import NodeEngine
from causality.operations import Operation
from causality.window import Who
from events.frames import SCHEMAS, Clocks, Frame, Watermark, events_frame
from events.kinds import BY_NAME, FAMILIES
from events.records import EVENTS, FLAG_WATCHED, TASKS

__all__ = ["END_NS", "futex", "switch", "task", "verdict", "waking"]

END_NS = 10**11  # within the retention of events whose operation is asked for only afterwards


def task(who, comm, **more):
    """A task row."""
    return {
        "tid": who.tid,
        "tgid": who.tgid,
        "comm": comm,
        "start_boot_ns": who.tid,
        "time_mono_ns": 0,
        "reason": "fork",
        **more,
    }


def switch(time, cpu, prev, following, *, state=1, preempt=0, **more):
    """`prev` leaves the CPU (state 1: to sleep, 0: still runnable), `following` gets it."""
    fields = {
        "next_tid": following.tid, "next_tgid": following.tgid, "next_start_boot_ns": following.tid,
        "prev_start_boot_ns": prev.tid, "prev_state": state, "preempt": preempt, "next_prio": 120, "prev_prio": 120,
    }  # fmt: skip
    return (time, "sched_switch", prev, fields | more, cpu)


def waking(time, cpu, waker, woken, *, target=None, **more):
    """`waker` ends the sleep of `woken`."""
    fields = {"tid": woken.tid, "tgid": woken.tgid, "start_boot_ns": woken.tid, "target_cpu": cpu if target is None else target}
    return (time, "sched_waking", waker, fields | more, cpu)


def futex(time, cpu, who, op, uaddr, **more):
    """A futex call begins (op 0: wait, 1: wake)."""
    return (time, "sys_enter_futex", who, {"op": op, "uaddr": uaddr, **more}, cpu)


def _columns(events):
    columns = {f.name: np.zeros(len(events), f.type.to_pandas_dtype()) for f in EVENTS}
    numbers: dict[int, int] = {}
    for row, (time, kind, who, fields, cpu) in enumerate(sorted(events, key=lambda e: e[0])):
        columns["time_mono_ns"][row], columns["kind"][row], columns["cpu"][row] = time, BY_NAME[kind].number, cpu
        columns["seq"][row] = numbers[cpu] = numbers.get(cpu, -1) + 1
        columns["tid"][row], columns["tgid"][row], columns["flags"][row] = who.tid, who.tgid, FLAG_WATCHED
        for i, value in enumerate(BY_NAME[kind].encode(**fields)):
            columns[f"a{i}"][row] = value
    return columns


def verdict(events, tasks, victim: Who, start, end, *, outcome="ok", deadline_ns=1):
    """The verdict of [start, end) of `victim`."""
    head = {"node": "n", "boot_id": "b", "recording": "r", "clocks": Clocks(0, 0, 0)}
    families = {name: {"attached": True, "missing": [], "reason": ""} for name in FAMILIES}
    body = {"kernel": "k", "cpus": 2, "families": families, "capabilities": {}, "watch": ["all"], "started_mono_ns": 1}
    empty = pa.RecordBatch.from_arrays([], schema=SCHEMAS["session/1"])
    rows = pa.RecordBatch.from_pylist([{n: t.get(n) for n in TASKS.names} for t in tasks], schema=TASKS)
    mark = Watermark(END_NS, {0: END_NS, 1: END_NS})
    engine = NodeEngine("n", "b")
    engine.fold(
        [
            Frame(kind="session/1", batch=empty, body=body, number=0, watermark=mark, **head),
            Frame(kind="tasks/1", batch=rows, number=1, watermark=mark, **head),
            events_frame(_columns(events), number=2, watermark=mark, **head),
        ]
    )
    engine.finish()
    engine.submit([Operation("op", "payment", victim.tid, start, end, deadline_ns, outcome)])
    return engine.ready()[0]
