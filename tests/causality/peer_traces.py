"""Small traces with known answers, after the tests that other tools publish for their own engines.

Each is a list of neutral events (`kprobe import --format jsonl`) and, per tid, the states that must come out:
(start, end, state, cpu while running, waker tid while runnable after a wake-up). END means: still so when the trace ends.
Times before the first proof of a thread have no state.
"""

from dataclasses import dataclass

END = None


@dataclass(frozen=True)
class PeerTrace:
    """One trace, where it comes from, and what must come out."""

    name: str
    origin: str
    events: tuple
    states: dict


def switch(time_ns, cpu, prev_pid, prev_state, next_pid):
    """A sched_switch."""
    fields = {"prev_comm": f"t{prev_pid}", "prev_pid": prev_pid, "prev_prio": 120, "prev_state": prev_state}
    fields |= {"next_comm": f"t{next_pid}", "next_pid": next_pid, "next_prio": 120}
    return {"time_ns": time_ns, "cpu": cpu, "kind": "sched_switch", **fields}


def waking(time_ns, cpu, pid, waker=None, **more):
    """A sched_waking, by `waker` if the trace says so."""
    by = {} if waker is None else {"common_pid": waker}
    return {"time_ns": time_ns, "cpu": cpu, "kind": "sched_waking", "comm": f"t{pid}", "pid": pid, "prio": 120} | by | more


PERFETTO = "google/perfetto thread_state_tracker_unittest.cc"
COMPASS = "eclipse-tracecompass LttngExecutionGraphTest, kernel_analysis, cpu_analysis"
A, B, C = 1, 2, 3

TRACES = (
    PeerTrace(
        "switch",
        PERFETTO,
        (switch(10, 0, A, "S", B),),
        {A: [(10, END, "blocked", None, None)], B: [(10, END, "running", 0, None)]},
    ),
    PeerTrace("only a waking", PERFETTO, (waking(10, 1, A, C),), {A: [(10, END, "runnable", None, C)]}),
    PeerTrace(
        "waking of a sleeper",
        PERFETTO,
        (switch(10, 0, A, "S", B), waking(20, 1, A, C)),
        {
            A: [(10, 20, "blocked", None, None), (20, END, "runnable", None, C)],
            B: [(10, END, "running", 0, None)],
        },
    ),
    PeerTrace(
        "runnable until switched in",
        PERFETTO,
        (switch(10, 0, A, "R", B), switch(20, 0, B, "S", A)),
        {
            A: [(10, 20, "runnable", None, None), (20, END, "running", 0, None)],
            B: [(10, 20, "running", 0, None), (20, END, "blocked", None, None)],
        },
    ),
    PeerTrace("idle has no states", PERFETTO, (switch(10, 0, 0, "R", A),), {A: [(10, END, "running", 0, None)], 0: []}),
    PeerTrace(
        "blocked with idle in between",
        PERFETTO,
        (switch(1, 0, 0, "D", A), switch(2, 0, A, "D", 0), switch(3, 0, 0, "D", B), switch(4, 0, B, "D", 0)),
        {
            A: [(1, 2, "running", 0, None), (2, END, "blocked", None, None)],
            B: [(3, 4, "running", 0, None), (4, END, "blocked", None, None)],
        },
    ),
    PeerTrace(
        "switched out twice",
        PERFETTO,
        (switch(1, 0, A, "S", B), switch(2, 0, A, "S", B)),
        {
            A: [(1, 2, "blocked", None, None), (2, END, "blocked", None, None)],
            B: [(1, 2, "running", 0, None), (2, END, "running", 0, None)],
        },
    ),
    PeerTrace(
        "a waking first, and switches that contradict each other",
        PERFETTO,
        (
            waking(1, 0, 8, 11),
            switch(2, 0, 0, "R", 8),
            switch(2, 0, 11, "S", 0),
            switch(3, 0, 8, "S", 0),
            switch(4, 0, 17771, "S", 17772),
            switch(5, 0, 17772, "S", 0),
            waking(6, 0, 18, 0),
            switch(7, 0, 0, "R", 18),
        ),
        {
            8: [(1, 2, "runnable", None, 11), (2, 3, "running", 0, None), (3, END, "blocked", None, None)],
            11: [(2, END, "blocked", None, None)],
            17771: [(4, END, "blocked", None, None)],
            17772: [(4, 5, "running", 0, None), (5, END, "blocked", None, None)],
            18: [(6, 7, "runnable", None, 0), (7, END, "running", 0, None)],
        },
    ),
    PeerTrace(
        "one thread on two CPUs",
        PERFETTO,
        (switch(1, 0, C, "S", A), switch(2, 1, B, "S", A)),
        {
            C: [(1, END, "blocked", None, None)],
            A: [(1, 2, "running", 0, None), (2, END, "running", 1, None)],
            B: [(2, END, "blocked", None, None)],
        },
    ),
    PeerTrace(
        "waking of a runnable and of a running thread",
        PERFETTO,
        (switch(10, 0, A, "R", B), waking(15, 1, A, C), waking(16, 1, B, C), switch(20, 0, B, "R+", A)),
        {
            A: [(10, 20, "runnable", None, None), (20, END, "running", 0, None)],
            B: [(10, 20, "running", 0, None), (20, END, "runnable", None, None)],
        },
    ),
    PeerTrace(
        "switches without any wake-up",
        COMPASS,
        (switch(10, 0, 1, 0, 2), switch(20, 0, 2, 3, 1), switch(30, 0, 1, 0, 2), switch(40, 0, 2, 0, 1)),
        {
            1: [
                (10, 20, "runnable", None, None),
                (20, 30, "running", 0, None),
                (30, 40, "runnable", None, None),
                (40, END, "running", 0, None),
            ],
            2: [
                (10, 20, "running", 0, None),
                (20, 30, "blocked", None, None),
                (30, 40, "running", 0, None),
                (40, END, "runnable", None, None),
            ],
        },
    ),
    PeerTrace(
        "fork, exit, and a preemption in an old kernel's numbers",
        COMPASS,
        (
            switch(12, 1, 30, 1, 11),
            switch(20, 1, 11, 1, 20),
            {"time_ns": 25, "cpu": 1, "kind": "sched_process_fork", "parent_tid": 20, "parent_pid": 20, "child_tid": 21}
            | {"child_pid": 20, "parent_comm": "t20", "child_comm": "t20"},
            switch(30, 1, 20, 1, 21),
            switch(35, 0, 100, 1, 11),
            switch(50, 1, 21, 0, 30),
            {"time_ns": 57, "cpu": 1, "kind": "sched_process_exit", "comm": "t30", "tid": 30},
            switch(60, 1, 30, 64, 21),
            switch(70, 1, 21, 1, 20),
            switch(80, 1, 20, 2048, 21),
        ),
        {
            11: [(12, 20, "running", 1, None), (20, 35, "blocked", None, None), (35, END, "running", 0, None)],
            20: [
                (20, 30, "running", 1, None),
                (30, 70, "blocked", None, None),
                (70, 80, "running", 1, None),
                (80, END, "runnable", None, None),
            ],
            21: [
                (25, 30, "runnable", None, 20),
                (30, 50, "running", 1, None),
                (50, 60, "runnable", None, None),
                (60, 70, "running", 1, None),
                (70, 80, "blocked", None, None),
                (80, END, "running", 1, None),
            ],
            30: [(12, 50, "blocked", None, None), (50, 60, "running", 1, None)],
            100: [(35, END, "blocked", None, None)],
        },
    ),
    PeerTrace(
        "threads that change CPUs while they wait",
        COMPASS,
        (
            switch(1, 0, 1, 0, 2),
            switch(2, 1, 3, 0, 4),
            switch(5, 1, 4, 0, 3),
            switch(10, 1, 3, 0, 4),
            switch(15, 1, 4, 0, 1),
            switch(20, 1, 1, 0, 4),
            switch(20, 0, 2, 0, 3),
            switch(25, 0, 3, 0, 2),
        ),
        {
            1: [(1, 15, "runnable", None, None), (15, 20, "running", 1, None), (20, END, "runnable", None, None)],
            2: [(1, 20, "running", 0, None), (20, 25, "runnable", None, None), (25, END, "running", 0, None)],
            3: [
                (2, 5, "runnable", None, None),
                (5, 10, "running", 1, None),
                (10, 20, "runnable", None, None),
                (20, 25, "running", 0, None),
                (25, END, "runnable", None, None),
            ],
            4: [
                (2, 5, "running", 1, None),
                (5, 10, "runnable", None, None),
                (10, 15, "running", 1, None),
                (15, 20, "runnable", None, None),
                (20, END, "running", 1, None),
            ],
        },
    ),
    PeerTrace(
        "a wake-up from an interrupt has no waker",
        "google/perfetto irq_context; eclipse-tracecompass interrupt contexts",
        (
            switch(10, 0, A, "S", B),
            {"time_ns": 20, "cpu": 1, "kind": "irq_handler_entry", "irq": 24, "name": "disk", "common_pid": C},
            waking(22, 1, A, C),
            {"time_ns": 25, "cpu": 1, "kind": "irq_handler_exit", "irq": 24, "ret": "handled", "common_pid": C},
            switch(30, 0, B, "S", A),
            switch(40, 0, A, "D", B),
            waking(50, 1, A, C, common_flags=0x10),
            switch(60, 0, B, "S", A),
        ),
        {
            A: [
                (10, 22, "blocked", None, None),
                (22, 30, "runnable", None, None),
                (30, 40, "running", 0, None),
                (40, 50, "blocked", None, None),
                (50, 60, "runnable", None, None),
                (60, END, "running", 0, None),
            ]
        },
    ),
    PeerTrace(
        "a nested interrupt that ended does not taint the next wake-up",
        "eclipse-tracecompass interrupt contexts",
        (
            switch(10, 0, A, "S", B),
            {"time_ns": 20, "cpu": 1, "kind": "softirq_entry", "vec": 1, "common_pid": C},
            {"time_ns": 21, "cpu": 1, "kind": "irq_handler_entry", "irq": 24, "name": "disk", "common_pid": C},
            {"time_ns": 22, "cpu": 1, "kind": "irq_handler_exit", "irq": 24, "ret": "handled", "common_pid": C},
            {"time_ns": 23, "cpu": 1, "kind": "softirq_exit", "vec": 1, "common_pid": C},
            {"time_ns": 24, "cpu": 1, "kind": "softirq_exit", "vec": 3, "common_pid": C},
            waking(25, 1, A, C),
            switch(30, 0, B, "S", A),
        ),
        {A: [(10, 25, "blocked", None, None), (25, 30, "runnable", None, C), (30, END, "running", 0, None)]},
    ),
)
