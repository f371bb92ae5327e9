"""The slow way to the answer: one record after the other, one nanosecond-piece after the other, in plain Python.

Written from the published rules (research D1, D2, D4, D6 in the design), not from the engine, and sharing nothing with it
but the catalogue of kinds. `Oracle` replays records in the order (time, CPU, sequence number), with two exceptions that
causality demands: at one nanosecond a wake-up of a task comes after its switch-out on another CPU, and before its
switch-in.

It is used in two ways: checked against the simulator (which knows the truth), and then trusted for traces that have no
simulator, such as other tools' inconsistent ones.
"""

import itertools
from dataclasses import dataclass, field

from events.kinds import BY_NAME, BY_NUMBER
from events.records import FLAG_HARDIRQ, FLAG_SOFTIRQ, UNKNOWN_CPU, UNKNOWN_TID

DEAD = 0x80 | 0x20 | 0x10
ENTRIES = {
    "irq_handler_entry": "irq.hard", "local_timer_entry": "irq.hard", "reschedule_entry": "irq.hard",
    "call_function_entry": "irq.hard", "call_function_single_entry": "irq.hard", "irq_work_entry": "irq.hard",
    "softirq_entry": "irq.soft",
}  # fmt: skip
EXITS = {name.replace("entry", "exit"): name for name in ENTRIES}
WAKES = ("sched_waking",)


@dataclass
class Piece:
    """One state of one task over [start, end); end None: still so at the end of the tape."""

    start: int
    state: str
    cpu: int | None = None
    waker: tuple | str | None = None
    end: int | None = None
    throttled: bool = False
    throttle_end: int | None = None
    moves: list = field(default_factory=list)  # (time, queue CPU) while runnable


class Oracle:
    """Replays records (dicts of head and fields) and answers what each task did, and who else was where."""

    def __init__(self, records, end_ns):
        self.end_ns = end_ns
        self.pieces = {}  # task -> [Piece]
        self.occupants = {}  # cpu -> [(time, task or None)]
        self.irqs = {}  # cpu -> [(time, label or None)]
        self.stacks = {}
        self.early = {}  # task -> waker seen while it still ran
        self.names = {}
        self.incoherent = 0
        for record in _in_order(records):
            self._take(record)
        for pieces in self.pieces.values():
            if pieces[-1].end is None:
                pieces[-1].end = end_ns

    # --- one record

    def _take(self, r):
        name = r["event"]
        if name == "sched_switch":
            self._switch(r)
        elif name in ("sched_waking", "sched_wakeup"):
            (self._waking if name == "sched_waking" else self._wakeup)(r)
        elif name in ("sched_wakeup_new", "sched_process_fork"):
            self._new(r)
        elif name == "sched_migrate_task":
            piece = self._open(_target(r))
            if piece is not None and piece.state == "runnable":
                piece.moves.append((r["time_mono_ns"], r["dest_cpu"]))
        elif name in ENTRIES or name in EXITS:
            self._frame(r)
        elif name == "cfs_period_timer":
            self._refill(r)

    def _open(self, task):
        pieces = self.pieces.get(task)
        return pieces[-1] if pieces and pieces[-1].end is None else None

    def _close(self, task, time_ns):
        piece = self._open(task)
        if piece is not None:
            piece.end = time_ns
        return piece

    def _begin(self, task, time_ns, state, **more):
        if task[0] == 0:
            return None
        piece = Piece(time_ns, state, **more)
        self.pieces.setdefault(task, []).append(piece)
        return piece

    def _switch(self, r):
        now, cpu = r["time_mono_ns"], r["cpu"]
        prev = (r["current"], r["prev_start_boot_ns"]) if r["current"] else (0, cpu)
        following = (r["next_tid"], r["next_start_boot_ns"]) if r["next_tid"] else (0, cpu)
        runnable = bool(r["preempt"]) or not r["prev_state"] & ~0x100
        old = self._close(prev, now)
        if old is not None and old.state != "running":
            self.incoherent += 1
        early = self.early.pop(prev, None)
        if not runnable and r["prev_state"] & DEAD:
            pass
        elif runnable:
            self._begin(prev, now, "runnable", throttled=bool(r["prev_throttled"]), moves=[(now, cpu)])
        else:
            self._begin(prev, now, "blocked")
            if early is not None:
                self._close(prev, now)
                self._begin(prev, now, "runnable", waker=early, moves=[(now, cpu)])
        self._close(following, now)
        self.early.pop(following, None)
        self._begin(following, now, "running", cpu=cpu)
        # Who is taken away by a CPU's first switch was there since the recording began: any switch would have been seen.
        known = self.occupants.setdefault(cpu, [(0, prev if prev[0] else None)])
        known.append((now, following if following[0] else None))

    def _waker(self, r):
        if self.stacks.get(r["cpu"]) or r["flags"] & (FLAG_HARDIRQ | FLAG_SOFTIRQ):
            return "irq"
        return None if r["current"] == UNKNOWN_TID else (r["current"], None)

    def _waking(self, r):
        task, now = _target(r), r["time_mono_ns"]
        piece = self._open(task)
        moves = [] if r["target_cpu"] == UNKNOWN_CPU else [(now, r["target_cpu"])]
        if piece is None:
            if not self.pieces.get(task):
                self._begin(task, now, "runnable", waker=self._waker(r), moves=moves)
        elif piece.state == "running":
            self.early[task] = self._waker(r)
        elif piece.state == "blocked":
            self._close(task, now)
            self._begin(task, now, "runnable", waker=self._waker(r), moves=moves)

    def _wakeup(self, r):
        """The second half of a wake-up: where the task is queued. Of a running task: it never got to sleep."""
        task = _target(r)
        piece = self._open(task)
        if piece is not None and piece.state == "running":
            self.early.pop(task, None)
        elif piece is not None and piece.state == "runnable" and r["target_cpu"] != UNKNOWN_CPU:
            piece.moves.append((r["time_mono_ns"], r["target_cpu"]))

    def _new(self, r):
        task, now = _target(r), r["time_mono_ns"]
        piece = self._open(task)
        if piece is None:
            piece = self._begin(task, now, "runnable", waker=(r["current"], None))
        if r["event"] == "sched_wakeup_new" and piece is not None and piece.state == "runnable":
            piece.moves.append((now, r["target_cpu"]))

    def _frame(self, r):
        stack = self.stacks.setdefault(r["cpu"], [])
        name = r["event"]
        if name in ENTRIES:
            stack.append((name, _number(r)))
        elif (EXITS[name], _number(r)) in stack:
            while stack.pop() != (EXITS[name], _number(r)):
                self.incoherent += 1
        else:
            self.incoherent += 1
        top = ENTRIES[stack[-1][0]] if stack else None
        self.irqs.setdefault(r["cpu"], []).append((r["time_mono_ns"], top))

    def _refill(self, r):
        for pieces in self.pieces.values():
            piece = pieces[-1]
            if piece.end is None and piece.throttled and piece.throttle_end is None:
                piece.throttle_end = r["time_mono_ns"]

    # --- answers

    def states(self, task):
        """[(start, end, state, cpu while running)] of a task."""
        return [(p.start, p.end, p.state, p.cpu) for p in self.pieces.get(task, [])]

    def ledger(self, task, start_ns, end_ns):
        """[(start, end, label, occupant)] of a window, `wait` for whatever a blocked task waits for."""
        cuts = {start_ns, end_ns}
        for steps in (*self.occupants.values(), *self.irqs.values()):
            cuts.update(t for t, _ in steps)
        for piece in self.pieces.get(task, []):
            cuts.update(t for t in (piece.start, piece.end, piece.throttle_end) if t is not None)
            cuts.update(t for t, _ in piece.moves)
        inside = sorted(t for t in cuts if start_ns <= t <= end_ns)
        out = []
        for a, b in itertools.pairwise(inside):
            label = self._label(task, a)
            if out and out[-1][2:] == label:
                out[-1] = (out[-1][0], b, *label)
            else:
                out.append((a, b, *label))
        return out

    def _label(self, task, time_ns):
        piece = next((p for p in self.pieces.get(task, []) if p.start <= time_ns < p.end), None)
        if piece is None:
            return "unknown", None
        if piece.state == "blocked":
            return "wait", None
        if piece.state == "running":
            return _at(self.irqs.get(piece.cpu), time_ns) or "run", None
        if piece.throttled and (piece.throttle_end is None or time_ns < piece.throttle_end):
            return "runq.quota", None
        cpu = _at(piece.moves, time_ns)
        if cpu is None:
            return "runq", None
        irq = _at(self.irqs.get(cpu), time_ns)
        if irq:
            return irq, None
        if cpu not in self.occupants:
            return "unknown", None
        occupant = _at(self.occupants[cpu], time_ns)
        return ("runq", occupant) if occupant else ("runq.idle", None)


def _at(steps, time_ns):
    value = None
    for t, v in steps or ():
        if t > time_ns:
            break
        value = v
    return value


def _target(r):
    return r["tid"], r["start_boot_ns"]


def _number(r):
    return next((r[key] for key in ("irq", "vec", "vector") if key in r), 0)


def _in_order(records):
    """(time, cpu, seq), and within one nanosecond cause before effect across CPUs: a stable topological order."""
    records = sorted(records, key=lambda r: (r["time_mono_ns"], r["cpu"], r["seq"]))
    for _, same in itertools.groupby(records, key=lambda r: r["time_mono_ns"]):
        same = list(same)
        yield from same if len({r["cpu"] for r in same}) < 2 else _causal(same)


def _causal(same):
    """Merge the CPUs' events of one nanosecond: an event whose cause lies in another queue waits for it."""
    queues = {}
    for r in same:
        queues.setdefault(r["cpu"], []).append(r)
    while queues:
        cpu = next((c for c in sorted(queues) if not _waits(queues[c][0], c, queues)), min(queues))
        yield queues[cpu].pop(0)
        if not queues[cpu]:
            del queues[cpu]


def _waits(r, cpu, queues):
    others = [o for c, queue in queues.items() if c != cpu for o in queue]
    if r["event"] == "sched_switch" and r["next_tid"]:
        task = (r["next_tid"], r["next_start_boot_ns"])
        return any(
            (o["event"] in ("sched_waking", "sched_wakeup", "sched_wakeup_new", "sched_process_fork") and _target(o) == task)
            or (o["event"] == "sched_switch" and (o["current"], o["prev_start_boot_ns"]) == task)
            for o in others
        )
    if r["event"] == "sched_waking":
        task = _target(r)
        return any(o["event"] == "sched_switch" and (o["current"], o["prev_start_boot_ns"]) == task for o in others)
    return False


def decode(records):
    """Tape records as dicts."""
    out = []
    for time_ns, cpu, seq, kind, _tgid, tid, args in records:
        k = BY_NUMBER[kind]
        head = {"event": k.name, "time_mono_ns": time_ns, "cpu": cpu, "seq": seq, "current": tid, "flags": 0}
        out.append(head | k.decode(args))
    return out


assert BY_NAME["sched_switch"].number == 1
