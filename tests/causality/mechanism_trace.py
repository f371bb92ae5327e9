"""Hand-made traces for the mechanism resolvers: a list of (time ns, kind, current (tid, tgid), fields) becomes a `Window`."""

import numpy as np

from causality.log import Segment
from causality.window import Wait, Wake, Who, Window
from events.kinds import BY_NAME
from events.records import EVENTS

__all__ = ["IDLE", "blocked", "trace", "woken"]

IDLE = Who(0, 0)


def trace(*events, until=10**12):
    """A window over events given as (time_mono_ns, kind, Who, {field: value}[, CPU])."""
    ordered = sorted(enumerate(events), key=lambda e: (e[1][0], e[0]))
    columns = {f.name: np.zeros(len(events), f.type.to_pandas_dtype()) for f in EVENTS}
    for row, (seq, event) in enumerate(ordered):
        time, kind, who, fields = event[:4]
        columns["time_mono_ns"][row], columns["kind"][row] = time, BY_NAME[kind].number
        columns["seq"][row], columns["cpu"][row] = seq, event[4] if len(event) > 4 else 0
        columns["tid"][row], columns["tgid"][row] = who.tid, who.tgid
        for i, value in enumerate(BY_NAME[kind].encode(**fields)):
            columns[f"a{i}"][row] = value
    return Window([Segment(columns)] if events else [], 0, until)


def woken(time, who=IDLE, *, cpu=0, comm="", in_irq=True):
    """A wake-up."""
    return Wake(time, cpu, 999, who, comm, in_irq)


def blocked(who, start, end, wake=None, *, since=None, syscall=None):
    """A blocked interval."""
    return Wait(who, start, end, start if since is None else since, 2, wake, syscall)
