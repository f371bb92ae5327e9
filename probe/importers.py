"""Traces of other tools as captures: neutral JSON lines, and the text of ftrace.

`import_trace` reads a file and returns frames as a recording of this kprobe would hold them, and a report. What the probe
knows by itself comes from the trace here, and nothing is guessed beyond it:

- A thread's start time is 0. Where a tid is reused it is 1 for the first life in the trace, and the time of its fork (or first
  sight) for later ones, so that it stays two tasks. A thread group is what the trace says, else the thread alone.
- Who ran when an event happened (`current`) is what the line says; else the task that the last switch on that CPU brought in;
  before the first switch the task which that one takes away; else unknown.
- Sequence numbers count each CPU's events in the order of time, lines of equal time in the order of the file; a note about lost
  events makes the hole that it states. A trace without any sched_waking has its sched_wakeup as the evidence of wake-ups.
- The boot id is a digest of the file and the node: the same file gives the same capture, and the same verdicts.

Inconsistent traces (times that step back, switches that contradict each other, wake-ups of running tasks) are imported as they
are: it is for the engine to judge them. Lines that cannot be used are counted. Raises InputError for an unknown format, an
unreadable file, or one without a single usable event.
"""

import hashlib
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from events.errors import InputError
from events.frames import SCHEMAS, Clocks, Frame, Watermark, events_frame
from events.kinds import BY_NAME, FAMILIES, KINDS, Kind
from events.records import EVENTS, FLAG_WATCHED, LOSSES, TASKS, UNKNOWN_CPU, UNKNOWN_TID
from events.syscalls import NUMBERS
from probe.neutral import STATE_DEAD, Fields, Report, Row, as_number, name_number, state_bits
from probe.trace_json import read_json
from probe.trace_text import read_text

__all__ = ["DEFAULT_NODE", "FORMATS", "import_trace"]

DEFAULT_NODE: Final = "imported"
FORMATS: Final[Mapping[str, Callable[[Iterable[bytes], Report, str], Iterator[Row]]]] = {
    "jsonl": read_json,
    "ftrace-text": read_text,
}
_FRAME_EVENTS: Final = 65_536

# How LTTng calls the kernel's tracepoints.
_LTTNG: Final[Mapping[str, str]] = {
    "irq_softirq_entry": "softirq_entry",
    "irq_softirq_exit": "softirq_exit",
    "irq_softirq_raise": "softirq_raise",
    "timer_hrtimer_start": "hrtimer_start",
    "timer_hrtimer_cancel": "hrtimer_cancel",
    "timer_hrtimer_expire_entry": "hrtimer_expire_entry",
    "timer_hrtimer_expire_exit": "hrtimer_expire_exit",
    "timer_expire_entry": "timer_expire_entry",
    "net_if_receive_skb": "netif_receive_skb",
    "exit_syscall": "sys_exit",
}
_WAKES: Final = frozenset({"sched_waking", "sched_wakeup", "sched_wakeup_new"})
# current is the task that the event names, whatever the line says of the CPU
_OF_CURRENT: Final = frozenset({"sched_process_exit", "sched_process_exec", "sched_process_fork"})
# our field -> the kernel's, where they differ and no unit explains it
_ALIASES: Final[Mapping[str, tuple[str, ...]]] = {
    "nr": ("id", "__syscall_nr"),
    "work": ("work struct", "work"),
    "lock": ("lock_addr",),
    "group": ("grp",),
    "result": ("res",),
    "now_ns": ("now",),
    "now_jiffies": ("now",),
    "expires_ns": ("expires",),
    "softexpires_ns": ("softexpires",),
    "expires_jiffies": ("expires",),
    "skb": ("skbaddr",),
    "sk": ("skaddr",),
    "ip_len": ("len",),
    "target_cgroup_id": ("target_cgroup_id", "memcg_id"),
    "cmd_flags": (),  # from `rwbs`
    "bytes": ("bytes",),
}
_REQUEST_OPERATIONS: Final = {"R": 0, "W": 1, "F": 2, "D": 3, "N": 0}
_REQUEST_FLAGS: Final = {"S": 1 << 11, "M": 1 << 12, "A": 1 << 19}
_FUTEX: Final = NUMBERS["futex"]


def _u64(value: int) -> int:
    return value & (1 << 64) - 1


def _must_be_tid(tid: int) -> None:
    if not 0 <= tid < UNKNOWN_TID:
        raise ValueError(f"thread id {tid} is none")


@dataclass(slots=True)
class _Life:
    """One life of one thread, as far as the trace has told it."""

    tid: int
    start_boot_ns: int
    tgid: int
    comm: str = ""
    comm_is_hint: bool = False  # from the column of names, which tracers fill from a cache that lags behind
    kthread: bool = False
    exiting: bool = False
    dead: bool = False
    forked_ns: int = -1


@dataclass(slots=True)
class _Facts:
    """What the whole trace of a node says, gathered before its events are encoded."""

    tgids: dict[int, int] = field(default_factory=dict)
    kthreads: set[int] = field(default_factory=set)
    first_current: dict[int, int] = field(default_factory=dict)
    priorities: set[int] = field(default_factory=set)
    kinds: Counter[str] = field(default_factory=Counter)

    @property
    def priority_offset(self) -> int:
        """100 if priorities count from MAX_RT_PRIO, as LTTng's do: an idle or default task then has 20, and nobody 100."""
        return 100 if 20 in self.priorities and max(self.priorities) < 40 else 0


def _canonical(row: Row) -> str:
    """Our name of the row's kind; single system calls become sys_enter and sys_exit with their number."""
    kind = _LTTNG.get(row.kind, row.kind)
    for prefix, ours in (
        ("syscall_entry_", "sys_enter"),
        ("syscall_exit_", "sys_exit"),
        ("sys_enter_", "sys_enter"),
        ("sys_exit_", "sys_exit"),
    ):
        if kind.startswith(prefix) and kind not in BY_NAME:
            row.fields = Fields({"name": kind.removeprefix(prefix), **row.fields.to_dict()})
            return ours
    return kind


def _gather(rows: Sequence[Row]) -> _Facts:
    facts = _Facts()
    for row in rows:
        facts.kinds[row.kind] += 1
        f = row.fields
        if row.tid is not None and row.tgid is not None:
            facts.tgids.setdefault(row.tid, row.tgid)
        if row.kind == "sched_switch":
            _gather_switch(row, facts)
        elif row.kind in _WAKES and f.number("prio") is not None:
            facts.priorities.add(f.number("prio") or 0)
        for tid_names, tgid_names in ((("tid", "pid"), ("tgid",)), (("child_tid", "child_pid"), ("child_tgid",))):
            tid = f.number(*tid_names)
            # LTTng: `tid` is the thread and `pid` its group.
            tgid = f.number(*tgid_names) if tid_names[0] not in f else f.number(*tgid_names, tid_names[1])
            if tid is not None and tgid is not None:
                facts.tgids.setdefault(tid, tgid)
    return facts


def _gather_switch(row: Row, facts: _Facts) -> None:
    f = row.fields
    prev = f.number("prev_tid", "prev_pid")
    if prev is not None:
        facts.first_current.setdefault(row.cpu, prev)
    for side in ("prev", "next"):
        tid, tgid, prio = f.number(f"{side}_tid", f"{side}_pid"), f.number(f"{side}_tgid"), f.number(f"{side}_prio")
        if tid is not None and tgid is not None:
            facts.tgids.setdefault(tid, tgid)
        if prio is not None:
            facts.priorities.add(prio)
    if f.get("prev_state") == "I" and prev:
        facts.kthreads.add(prev)  # only kernel threads sleep in TASK_IDLE


class _Tasks:
    """The lives of a node's threads, and the task rows that tell them."""

    def __init__(self, facts: _Facts, reused: frozenset[int]) -> None:
        self.reused: set[int] = set()  # tids that turned out to have several lives
        self._first_start = dict.fromkeys(reused, 1)
        self.rows: list[dict[str, Any]] = []
        self._facts = facts
        self._lives: dict[int, _Life] = {}

    def life(self, tid: int, time_ns: int, comm: str | None = None, hint: str | None = None) -> _Life:
        """The life that `tid` has at `time_ns`; a dead thread that appears again is another one."""
        _must_be_tid(tid)
        life = self._lives.get(tid)
        if life is None or (life.dead and tid):
            life = self._begin(tid, self._start(life, time_ns), comm or "", time_ns, "snapshot", None)
        if hint and not life.comm:
            self._name(life, hint, time_ns)
            life.comm_is_hint = True
        self._name(life, comm, time_ns)
        return life

    def fork(self, parent: _Life, tid: int, time_ns: int, comm: str) -> _Life:
        """The life that begins with a fork."""
        _must_be_tid(tid)
        known = self._lives.get(tid)
        if known is not None and known.forked_ns == time_ns:
            return known
        life = self._begin(tid, self._start(known, time_ns), comm, time_ns, "fork", parent)
        life.forked_ns = time_ns
        return life

    def known(self, tid: int) -> _Life | None:
        """The latest life of `tid`, dead or not."""
        return self._lives.get(tid)

    def _start(self, before: _Life | None, time_ns: int) -> int:
        if before is None:
            return 0
        self.reused.add(before.tid)
        return max(time_ns, 2)

    def _begin(self, tid: int, start_boot_ns: int, comm: str, time_ns: int, reason: str, parent: _Life | None) -> _Life:
        tgid = 0 if tid == 0 else self._facts.tgids.get(tid, tid)
        tgid = tgid if 0 <= tgid < UNKNOWN_TID else tid
        start_boot_ns = start_boot_ns or self._first_start.get(tid, 0)
        life = _Life(tid, start_boot_ns, tgid, comm, kthread=tid in self._facts.kthreads)
        self._lives[tid] = life
        self._tell(life, time_ns, reason, parent)
        return life

    def _name(self, life: _Life, comm: str | None, time_ns: int) -> None:
        if not comm or comm == life.comm:
            return
        first = not life.comm or life.comm_is_hint
        life.comm, life.comm_is_hint = comm, False
        if first and life.tid and self.rows:
            # The thread had this name all along; only its first line did not say so.
            for row in reversed(self.rows):
                if row["tid"] == life.tid:
                    row["comm"] = comm
                    return
        self._tell(life, time_ns, "rename", None)

    def _tell(self, life: _Life, time_ns: int, reason: str, parent: _Life | None) -> None:
        if life.tid == 0:
            return
        row: dict[str, Any] = dict.fromkeys(TASKS.names)
        row.update(
            time_mono_ns=time_ns,
            reason=reason,
            tid=life.tid,
            tgid=life.tgid,
            start_boot_ns=life.start_boot_ns,
            comm=life.comm or None,
            kthread=life.kthread or None,
            observer=False,
            watched=True,
        )
        if parent is not None and parent.tid != UNKNOWN_TID:
            row.update(parent_tid=parent.tid, parent_tgid=parent.tgid, parent_start_boot_ns=parent.start_boot_ns)
        self.rows.append(row)


class _Encoder:
    """Encodes the rows of one node, in the order of time, into event columns, task rows and loss rows."""

    def __init__(self, facts: _Facts, report: Report, start_ns: int, reused: frozenset[int] = frozenset()) -> None:
        self.columns: dict[str, list[int]] = {name: [] for name in EVENTS.names}
        self.losses: list[dict[str, Any]] = []
        self.tasks = _Tasks(facts, reused)
        self._facts = facts
        self.report = report
        self._current: dict[int, int] = {}
        self._next_seq: Counter[int] = Counter()
        self._last_ns: dict[int, int] = defaultdict(lambda: start_ns)
        self._wakeup_is_evidence = not facts.kinds["sched_waking"]

    def add(self, row: Row) -> None:
        """Encode one row. Raises ValueError if a field that the kind cannot do without is missing or malformed."""
        kind = BY_NAME[row.kind]
        if row.kind == "sched_wakeup" and row.fields.number("success") == 0:
            self.report.notes["sched_wakeup that woke nobody (success=0)"] += 1
            return
        head, values = self._encode(kind, row)
        if row.lost_before is not None:
            self.lose(row.cpu, row.time_ns, row.lost_before)
        if row.kind == "sched_wakeup" and self._wakeup_is_evidence:
            self._append(BY_NAME["sched_waking"], row, head, values)
            self.report.notes["sched_wakeup taken as the wake-up, for want of sched_waking"] += 1
        self._append(kind, row, head, values)

    def lose(self, cpu: int, until_ns: int, count: int) -> None:
        """Note that `count` events (0: an unknown number) are missing on `cpu` before `until_ns`."""
        first = self._next_seq[cpu] if count else None
        self._next_seq[cpu] += count
        loss: dict[str, Any] = dict.fromkeys(LOSSES.names)
        loss.update(cpu=cpu, reason="ring_full", hop="trace", from_mono_ns=self._last_ns[cpu], to_mono_ns=until_ns, count=count)
        loss.update(first_seq=first, last_seq=None if first is None else first + count - 1)
        self.losses.append(loss)
        self.report.losses += 1
        self.report.lost_events += count

    def _append(self, kind: Kind, row: Row, head: _Life, values: Mapping[str, int]) -> None:
        seq = self._next_seq[row.cpu]
        self._next_seq[row.cpu] += 1
        self._last_ns[row.cpu] = row.time_ns
        self.report.events += 1
        fixed = (row.time_ns, seq, row.cpu, kind.number, FLAG_WATCHED | row.flags, head.tgid, head.tid)
        for name, value in zip(EVENTS.names, fixed + kind.encode(**values), strict=True):
            self.columns[name].append(value)

    def _head(self, row: Row) -> _Life:
        tid = row.tid
        if tid is None:
            tid = self._current.get(row.cpu, self._facts.first_current.get(row.cpu))
        if tid is None or not 0 <= tid < UNKNOWN_TID:
            return _Life(UNKNOWN_TID, 0, UNKNOWN_TID)
        known = self.tasks.known(tid)
        if known is not None and known.dead:
            return known  # a line after its last switch-out: no proof of another life
        return self.tasks.life(tid, row.time_ns, hint=row.comm)

    def _encode(self, kind: Kind, row: Row) -> tuple[_Life, dict[str, int]]:
        if kind.name == "sched_switch":
            return self._switch(row)
        if kind.name in _OF_CURRENT:
            return self._of_current(kind, row)
        head = self._head(row)
        if "tid" in kind.fields and "start_boot_ns" in kind.fields:
            return head, self._target(kind, row)
        if kind.name in ("sys_enter", "sys_exit"):
            return head, _syscall(kind, row)
        if kind.family == "block":
            return head, _block(kind, row)
        return head, _generic(kind, row)

    def _switch(self, row: Row) -> tuple[_Life, dict[str, int]]:
        f = row.fields
        prev_tid, next_tid = f.need("prev_pid", "prev_tid"), f.need("next_pid", "next_tid")
        _must_be_tid(prev_tid)
        _must_be_tid(next_tid)
        if f.get("prev_state") is None:
            raise ValueError("field prev_state is missing")
        state, preempted = state_bits(f.get("prev_state"))
        preempted = preempted or bool(f.number("prev_preempt", "preempt"))
        known = self.tasks.known(prev_tid)
        if state == 0x40 and known is not None and known.exiting:
            state = STATE_DEAD  # 64 was TASK_DEAD before it became TASK_PARKED (4.14); a task parks, or exits, not both
        again = known is not None and known.dead and state & STATE_DEAD
        prev = known if known is not None and again else self.tasks.life(prev_tid, row.time_ns, f.text("prev_comm"))
        if state & STATE_DEAD and prev_tid:
            prev.dead = True
        following = self.tasks.life(next_tid, row.time_ns, f.text("next_comm"))
        self._current[row.cpu] = next_tid
        values = {
            "next_tid": following.tid,
            "next_tgid": following.tgid,
            "next_start_boot_ns": following.start_boot_ns,
            "prev_start_boot_ns": prev.start_boot_ns,
            "prev_state": state,
            "preempt": int(preempted),
            "prev_kthread": int(prev.kthread),
            "next_kthread": int(following.kthread),
            **self._priority(f, "prev_"),
            **self._priority(f, "next_"),
        }
        return prev, values

    def _priority(self, fields: Fields, prefix: str = "") -> dict[str, int]:
        prio = fields.number(f"{prefix}prio")
        if prio is None:
            return {f"{prefix}prio": 120}
        prio += self._facts.priority_offset
        policy = 6 if prio < 0 else 1 if prio < 100 else 0  # SCHED_DEADLINE, SCHED_FIFO (or RR), SCHED_NORMAL
        return {f"{prefix}prio": prio, f"{prefix}policy": policy}

    def _target(self, kind: Kind, row: Row) -> dict[str, int]:
        f = row.fields
        tid = f.need("tid", "pid") if "tid" in f and "pid" in f else f.need("pid", "tid")
        known = self.tasks.known(tid)
        if known is not None and kind.name not in _WAKES and known.dead:
            life = known
        else:
            life = self.tasks.life(tid, row.time_ns, f.text("newcomm") if kind.name == "task_rename" else f.text("comm"))
        values = _generic(kind, row) | {"tid": life.tid, "tgid": life.tgid, "start_boot_ns": life.start_boot_ns}
        if "target_cpu" in kind.fields:
            cpu = f.number("target_cpu")
            values |= {"target_cpu": UNKNOWN_CPU if cpu is None else cpu, "kthread": int(life.kthread), **self._priority(f)}
        if "comm_lo" in kind.fields:
            values |= _comm_words(life.comm)
        return values

    def _of_current(self, kind: Kind, row: Row) -> tuple[_Life, dict[str, int]]:
        f = row.fields
        tid = f.number("parent_tid", "parent_pid", "tid", "pid") if kind.name.endswith("fork") else f.number("tid", "pid")
        if tid is not None:
            row.tid = tid
        head = self._head(row)
        if kind.name == "sched_process_fork":
            child_tid = f.need("child_tid", "child_pid")
            child = self.tasks.fork(head, child_tid, row.time_ns, f.text("child_comm") or head.comm)
            mine = _generic(kind, row) | {"tid": child.tid, "tgid": child.tgid, "start_boot_ns": child.start_boot_ns}
            return head, mine | _comm_words(child.comm)
        if kind.name == "sched_process_exec":
            path = f.text("filename")
            head = self.tasks.life(head.tid, row.time_ns, path.rpartition("/")[2][:15] if path else f.text("comm"))
            mine = {"old_tid": f.number("old_pid", "old_tid") or head.tid}
            return head, _generic(kind, row) | mine | self._self(head)
        head.exiting = True
        return head, _generic(kind, row) | self._self(head)

    def _self(self, life: _Life) -> dict[str, int]:
        return {"start_boot_ns": life.start_boot_ns, **_comm_words(life.comm)}


def _comm_words(comm: str) -> dict[str, int]:
    raw = comm.encode()[:16].ljust(16, b"\0")
    return {"comm_lo": int.from_bytes(raw[:8], "little"), "comm_hi": int.from_bytes(raw[8:], "little")}


def _generic(kind: Kind, row: Row) -> dict[str, int]:
    """The kind's fields that the row has, by our name or the kernel's."""
    values = {}
    for name in kind.fields:
        value = row.fields.number(*_ALIASES.get(name, ()), name)
        if value is not None and name not in ("tid", "tgid"):
            values[name] = _u64(value)
    name_text = row.fields.text("name")
    if "name_lo" in kind.fields and name_text:
        values["name_lo"], values["name_hi"] = _comm_words(name_text).values()
    if kind.name == "irq_handler_exit" and row.fields.get("ret") in ("handled", "unhandled"):
        values["ret"] = int(row.fields.get("ret") == "handled")
    return values


def _syscall(kind: Kind, row: Row) -> dict[str, int]:
    f = row.fields
    name = f.text("name")
    nr = f.number("id", "nr", "__syscall_nr")
    values = _generic(kind, row)
    if nr is None and name is not None:
        nr = NUMBERS.get(name.removeprefix("new"), -1)  # sys_newstat and its kin
    values["nr"] = -1 if nr is None else nr
    arguments = f.get("args")
    if kind.name == "sys_enter" and isinstance(arguments, list):
        for at, value in enumerate(arguments[:3]):
            values[f"arg{at}"] = _u64(as_number(value) or 0)
    return values


def _futex(row: Row, values: Mapping[str, int]) -> dict[str, int]:
    arguments = row.fields.get("args")
    more = arguments if isinstance(arguments, list) else []
    timeout = as_number(more[3]) if len(more) > 3 else row.fields.number("utime", "timeout")
    uaddr2 = as_number(more[4]) if len(more) > 4 else row.fields.number("uaddr2")
    return {
        "uaddr": row.fields.number("uaddr") or values.get("arg0", 0),
        "op": row.fields.number("op") or values.get("arg1", 0),
        "val": row.fields.number("val") or values.get("arg2", 0),
        "timeout": _u64(timeout or 0),
        "uaddr2": _u64(uaddr2 or 0),
    }


def _block(kind: Kind, row: Row) -> dict[str, int]:
    """A block event; the request or bio that a trace does not name is known by its device and sector."""
    f = row.fields
    values = _generic(kind, row)
    sectors = f.number("nr_sector", "nr_sectors")
    if "bytes" in kind.fields and not values.get("bytes") and sectors is not None:
        values["bytes"] = sectors * 512
    key = "rq" if "rq" in kind.fields else "bio"
    if key in kind.fields and key not in values and "sector" in values:
        values[key] = name_number(f"{values.get('dev', 0)}/{values['sector']}")
    flags = "cmd_flags" if "cmd_flags" in kind.fields else "opf"
    rwbs = f.text("rwbs")
    if flags in kind.fields and rwbs:
        operation = next((letter for letter in rwbs if letter in "RWDN"), rwbs[0])
        values[flags] = _REQUEST_OPERATIONS.get(operation, 0) | sum(_REQUEST_FLAGS.get(letter, 0) for letter in rwbs)
    return values


@dataclass(slots=True)
class _Pending:
    """Rows of one node in file order, with the notes about loss attached to the event that follows them."""

    rows: list[Row] = field(default_factory=list)
    lost: dict[int, int] = field(default_factory=dict)
    last_ns: int = -1

    def add(self, row: Row, report: Report) -> None:
        """Take a row in."""
        if row.kind == "lost":
            self.lost[row.cpu] = self.lost.get(row.cpu, 0) + (row.lost_before or 0)
            return
        if row.time_ns < self.last_ns:
            report.notes["times that step back: sorted"] += 1
        self.last_ns = max(self.last_ns, row.time_ns)
        row.lost_before = self.lost.pop(row.cpu, None)
        self.rows.append(row)


def _usable(row: Row, report: Report) -> bool:
    if row.kind != "lost" and row.kind not in BY_NAME:
        report.unknown_kinds[row.kind] += 1
        return False
    return True


def _encode_node(pending: _Pending, report: Report) -> _Encoder:
    rows = [_as_futex(row) for row in sorted(pending.rows, key=lambda r: r.time_ns)]
    facts = _gather_safely(rows, report)
    # Only a first reading tells which tids have several lives, and that decides how the first of them is named.
    reused = frozenset(_encode(rows, pending, _Encoder(facts, Report(), _start_of(rows))).tasks.reused)
    return _encode(rows, pending, _Encoder(facts, report, _start_of(rows), reused))


def _start_of(rows: Sequence[Row]) -> int:
    return rows[0].time_ns if rows else 0


def _encode(rows: Sequence[Row], pending: _Pending, encoder: _Encoder) -> _Encoder:
    for row in rows:
        try:
            encoder.add(row)
        except (ValueError, KeyError, OverflowError) as error:
            encoder.report.skip(row.line, "unusable", f"{row.kind}: {error}")
    for cpu, count in sorted(pending.lost.items()):
        encoder.lose(cpu, rows[-1].time_ns if rows else 0, count)
    return encoder


def _as_futex(row: Row) -> Row:
    """Futex calls have a record of their own, which names the word."""
    if row.kind == "sys_enter":
        values = _syscall(BY_NAME["sys_enter"], row)
        if values["nr"] == _FUTEX:
            row.kind = "sys_enter_futex"
            row.fields = Fields(_futex(row, values))
    return row


def _gather_safely(rows: list[Row], report: Report) -> _Facts:
    """The facts of the rows that can be read; the others are skipped here already."""
    try:
        return _gather(rows)
    except ValueError:
        kept = []
        for row in rows:
            try:
                _gather([row])
                kept.append(row)
            except ValueError as error:
                report.skip(row.line, "unusable", f"{row.kind}: {error}")
        rows[:] = kept
        return _gather(rows)


def _session(facts_kinds: Counter[str], columns: Mapping[str, list[int]], source: Mapping[str, Any]) -> dict[str, Any]:
    families: dict[str, Any] = {}
    for family in FAMILIES:
        names = [k.name for k in KINDS if k.family == family]
        seen = any(facts_kinds[n] for n in names)
        reason = "" if seen else "the imported trace holds no such event"
        families[family] = {"attached": seen, "missing": [] if seen else names, "reason": reason}
    times = columns["time_mono_ns"]
    return {
        "kernel": "",
        "imported": dict(source),
        "cpus": max(columns["cpu"], default=0) + 1,
        "families": families,
        "capabilities": {},
        "watch": ["all"],
        "started_mono_ns": times[0] if times else 0,
    }


def _frames(node: str, encoder: _Encoder, source: Mapping[str, Any], kinds: Counter[str]) -> Iterator[Frame]:
    columns = encoder.columns
    times = columns["time_mono_ns"]
    digest = hashlib.sha256(f"{source['sha256']}\0{node}".encode()).hexdigest()
    clocks = Clocks(times[-1], times[-1], times[-1])
    number = 0

    def head(watermark_ns: int) -> dict[str, Any]:
        nonlocal number
        number += 1
        marks = Watermark(watermark_ns, dict.fromkeys(sorted(set(columns["cpu"])), watermark_ns))
        more = {"number": number - 1, "clocks": clocks, "watermark": marks}
        return {"node": node, "boot_id": digest[:32], "recording": digest[32:48], **more}

    start = times[0]
    empty = pa.RecordBatch.from_arrays([], schema=SCHEMAS["session/1"])
    yield Frame(kind="session/1", batch=empty, body=_session(kinds, columns, source), **head(start))
    for kind, schema, rows in (("tasks/1", TASKS, encoder.tasks.rows), ("losses/1", LOSSES, encoder.losses)):
        if rows:
            yield Frame(kind=kind, batch=pa.RecordBatch.from_pylist(rows, schema=schema), **head(start))
    for at in range(0, len(times), _FRAME_EVENTS):
        part = {f.name: np.array(columns[f.name][at : at + _FRAME_EVENTS], f.type.to_pandas_dtype()) for f in EVENTS}
        yield events_frame(part, **head(times[min(at + _FRAME_EVENTS, len(times)) - 1]))


def _read(path: str) -> bytes:
    if path == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read trace {path}: {error.strerror}") from error


def import_trace(path: str, format_name: str, node: str = DEFAULT_NODE) -> tuple[list[Frame], Report]:
    """The frames that the trace in `path` ("-": standard input) makes, node by node, and what could not be used."""
    parser = FORMATS.get(format_name)
    if parser is None:
        raise InputError(f"trace format {format_name!r} is unknown; known are {', '.join(FORMATS)}")
    data = _read(path)
    source = {"format": format_name, "sha256": hashlib.sha256(data).hexdigest()}
    report = Report()
    nodes: dict[str, _Pending] = {}
    for row in parser(data.splitlines(), report, node):
        row.kind = _canonical(row)
        if _usable(row, report):
            nodes.setdefault(row.node, _Pending()).add(row, report)
    frames: list[Frame] = []
    for name, pending in nodes.items():
        encoder = _encode_node(pending, report)
        if encoder.columns["time_mono_ns"]:
            report.nodes.append(name)
            frames.extend(_frames(name, encoder, source, Counter(r.kind for r in pending.rows)))
    if not frames:
        raise InputError(f"trace {path} holds no event that can be used as {format_name}: {_first_troubles(report)}")
    return frames, report


def _first_troubles(report: Report) -> str:
    kinds = ", ".join(f"{name} ({count})" for name, count in report.unknown_kinds.most_common(4))
    troubles = report.messages[:3] + ([f"unknown kinds: {kinds}"] if kinds else [])
    return "; ".join(troubles) or "it is empty"
