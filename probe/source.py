"""The kernel as a source of events: what `kprobe record` and `kprobe probe` drain.

What: `KernelSource(settings, watch)` loads the BPF programs, says what they can record (`session`), and hands over all that
happened since the last call (`drain`): event columns as numpy arrays, task rows, loss rows and a watermark.

Guarantees
- P1: for every CPU, produced == delivered + lost + unsettled; every loss is a row with its reason and the times between
  which it happened; runs that the kernel refused are rows too, and so are switches that it made without running us: per CPU
  the sched_switch events delivered, lost and not run are as many as the kernel's own count.
- The watermark is exact: the clock is read first, then the rings' ends; an event takes its time after its reservation, so
  all that is older lies before those ends. It waits for records being written and for holes not yet settled.
- Within one drain the events of each CPU are in order of (time, seq); CPUs follow one another.
- The thread that drains is never woken by an event, and no event ever waits for it.

Fails: CapabilityError (root, BTF, BCC, kernel too old), ProbeError; each with the remedy. After `close` nothing is
left attached; after SIGKILL neither, as nothing is pinned.
"""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from events.errors import CapabilityError
from events.frames import Watermark
from events.kinds import BY_NAME, BY_NUMBER, FAMILIES
from events.records import EVENT_COLUMNS, EVENTS, FLAG_OBSERVER, FLAG_WATCHED
from events.settings import ProbeSettings
from probe.btf import KernelTypes, build_id
from probe.cgroups import CgroupTable, find_hierarchy
from probe.lifecycle import LIFECYCLE, TaskRows
from probe.payload import Mask, PayloadSource, PlannedCall
from probe.programs import Maps, ProgramSet
from probe.ring import CpuLedger, EventRing, TextRing, fitting_ring_bytes, last_switch, online_cpus, round_ring_bytes
from probe.snapshot import TASK_ROW, snapshot_rows
from probe.switches import Unseen, UnseenSwitches
from probe.watch import Selector, WatchTable, descendants, pids_of_port

__all__ = ["SHED_ORDER", "Drained", "KernelSource"]

# What goes first when the probe must cost less: detail about single threads before what tells who ran.
SHED_ORDER: Final = (
    "syscalls",
    "memory",
    "power",
    "timers",
    "net",
    "tcp",
    "faults",
    "softirq",
    "irq_vectors",
    "workqueue",
    "locks",
    "writeback",
    "compaction",
    "jbd2",
    "irq",
    "signals",
    "sock",
    "reclaim",
    "oom",
    "throttle",
    "block",
    "cgroup",
    "sched",
)
assert set(SHED_ORDER) == set(FAMILIES)

_READ_MAX: Final = 1 << 16  # records copied at once from one ring: 4.7 MB, so that the memory is used again
_DRAIN_MAX: Final = 1 << 17  # records of one CPU in one drain: the caller's batch stays bounded
_LIFECYCLE_KINDS: Final = np.isin(np.arange(256), [BY_NAME[name].number for name in LIFECYCLE])
_STATE_WORDS: Final = 8  # struct cpu_state of bpf/common.h
_SEQUENCE, _DROPPED, _TEXT_DROPPED, _UNREADABLE, _FILTER_FULL = range(5)
_NOT_RUN: Final = 7

Columns = dict[str, npt.NDArray[Any]]
Row = dict[str, Any]


class _Closable(Protocol):
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Drained:
    """What happened since the last drain. `tasks` and `losses` are rows with the columns of events.records."""

    columns: Columns
    tasks: list[Row]
    losses: list[Row]
    watermark: Watermark
    payload: pa.RecordBatch | None = None  # of events.records.PAYLOAD, where payloads are recorded


class KernelSource:
    """Records the running kernel. `exclude` are processes to leave out, with their descendants: the local servers.

    `payload` switches the recording of payloads on (see `probe.payload`); `mask` sees their bytes before anything else does.
    `notes` are added to the session document.
    """

    def __init__(
        self, settings: ProbeSettings, watch: Sequence[Selector], *, exclude: Iterable[int] = (),
        payload: Sequence[PlannedCall] = (), mask: Mask | None = None, notes: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._watch = tuple(watch) or (Selector("all"),)
        self._exclude = frozenset(exclude)
        self._plan, self._mask, self._notes = tuple(payload), mask, dict(notes or {})
        self._payload: PayloadSource | None = None
        self._closed = False
        self._open_parts: list[_Closable] = []  # what `open` made, to be closed in the opposite order
        self._counts = np.zeros(256, np.int64)
        self._refused_total = 0
        self._shed_rows: list[Row] = []

    # --- life

    def open(self) -> None:
        """Load and attach everything, fill the watch set, take the snapshot. Nothing is left behind if it fails."""
        if os.geteuid() != 0:
            raise CapabilityError("recording the kernel needs root: run it as sudo kprobe ...")
        cpus = online_cpus()
        self._hierarchy = find_hierarchy()
        self._cgroups = CgroupTable(self._hierarchy)
        self._programs = ProgramSet(KernelTypes(), self._hierarchy, frozenset(self._settings.families_off))
        wanted = self._settings.ring_bytes_per_cpu or fitting_ring_bytes(cpus, self._settings.memory_max_bytes)
        self._maps = Maps(cpus, round_ring_bytes(wanted))
        self._open_parts.append(self._maps)
        try:
            self._map_rings(cpus)
            self._programs.load(self._maps)
            if self._plan:
                self._payload = self._payload_source(cpus)
            self._begin()
        except BaseException:
            self.close()
            raise

    def _payload_source(self, cpus: int) -> PayloadSource:
        size = round_ring_bytes(self._settings.payload_ring_bytes_per_cpu)
        source = PayloadSource(
            self._maps.fds["pids"], self._programs.types, self._plan, cpus=cpus, ring_bytes=size,
            fetch_add=self._programs.fetch_add, mask=self._mask,
        )  # fmt: skip
        self._open_parts.append(source)
        return source

    def _map_rings(self, cpus: int) -> None:
        self._table = WatchTable(self._maps.fds["pids"])
        self._rings = [EventRing(fd, self._maps.ring_bytes) for fd in self._maps.ring_fds]
        self._text = TextRing(self._maps.fds["text"], self._maps.text_bytes)
        self._state = np.frombuffer(self._maps.state, np.uint64).reshape(-1, _STATE_WORDS)
        self._ledgers = [CpuLedger(cpu) for cpu in range(cpus)]
        self._unseen = [UnseenSwitches(cpu) for cpu in range(cpus)]
        self._text_counts = np.zeros(3, np.int64)
        self._open_parts += [self._table, *self._rings, self._text, self._programs]

    def _begin(self) -> None:
        self._cgroups.scan()
        comms = [s.text for s in self._watch if s.kind == "comm"]
        ports = [s.number for s in self._watch if s.kind == "port"]
        groups = any(s.kind in ("cgroup", "container") for s in self._watch)
        if not self._maps.configure(hierarchy=self._hierarchy, comms=comms, ports=ports, cgroups=groups):
            self._programs.leave_out("cfs_period_timer", "the kernel hides its symbols (sysctl kernel.kptr_restrict)")
        self._table.fill(FLAG_WATCHED if self._watches_all else 0)
        for pid in (os.getpid(), *self._exclude):  # before the first event; their descendants follow below
            self._table.exclude(pid)
        self._watch_groups(self._cgroups.paths)
        self._programs.attach()
        if self._payload is not None:
            self._payload.attach()
        self.started_mono_ns = self._polled_mono_ns = self._drained_mono_ns = time.monotonic_ns()
        for ledger in self._ledgers:
            ledger.last_mono_ns = self.started_mono_ns
        self._fill_watch_set()
        tasks = np.frombuffer(self._programs.tasks(), TASK_ROW)
        self._tasks = TaskRows(self._cgroups, self._table)
        flags = bytes(self._table.flags(int(t)) for t in tasks["tgid"])
        self._snapshot = list(snapshot_rows(tasks, self._cgroups, flags))
        for row in self._snapshot:
            self._tasks.remember(row)

    @property
    def _watches_all(self) -> bool:
        return any(s.kind == "all" for s in self._watch)

    def _watch_groups(self, paths: Mapping[int, str]) -> None:
        for cgroup_id, path in paths.items():
            if any(s.matches_cgroup(path) for s in self._watch):
                self._maps.watch_cgroup(self._hierarchy.key(cgroup_id))

    def _fill_watch_set(self) -> None:
        """Mark processes until a pass finds no new one: children of marked processes are marked by the kernel."""
        excluded_before: set[int] = set()
        watched_before: set[int] = set()
        while True:
            tasks = np.frombuffer(self._programs.tasks(), TASK_ROW)
            parents = dict(zip(tasks["tgid"].tolist(), tasks["parent_tgid"].tolist(), strict=True))
            excluded = descendants(self._exclude, parents) | {os.getpid()}
            watched = descendants(self._roots(tasks), parents) - excluded
            for pid in excluded - excluded_before:
                self._table.exclude(pid)
            for pid in watched - watched_before:
                self._table.watch(pid)
            if watched <= watched_before and excluded <= excluded_before:
                return
            watched_before, excluded_before = watched_before | watched, excluded_before | excluded

    def _roots(self, tasks: npt.NDArray[Any]) -> set[int]:
        """Processes that a selector names."""
        roots = {s.number for s in self._watch if s.kind == "pid"}
        for port in (s.number for s in self._watch if s.kind == "port"):
            roots |= pids_of_port(port)
        if any(s.kind in ("comm", "cgroup", "container") for s in self._watch):
            for task in tasks:
                comm, path = task["comm"].decode(errors="replace"), self._cgroups.path(int(task["cgroup_id"])) or ""
                if any(s.matches_comm(comm) or s.matches_cgroup(path) for s in self._watch):
                    roots.add(int(task["tgid"]))
        return roots

    def watch_process(self, pid: int) -> None:
        """Watch one more process and all it will fork: a child held before its exec."""
        self._table.watch(pid)

    def exclude_process(self, pid: int) -> None:
        """Leave one more process out, and all it will fork."""
        self._table.exclude(pid)

    def shed(self, family: str) -> None:
        """Stop recording one family; the next drain has a loss row that says since when."""
        if family not in FAMILIES:
            raise KeyError(f"no family {family!r}: there are {', '.join(FAMILIES)}")
        self._programs.detach(family)
        self._shed_rows.append(_loss("shed", "probe", time.monotonic_ns(), family=family))

    def detach(self) -> None:
        """Stop recording. What was recorded can still be drained."""
        self._programs.detach()
        if self._payload is not None:
            self._payload.detach()

    def close(self) -> None:
        """Detach and free everything."""
        if self._closed:
            return
        self._closed = True
        self._state = np.empty((0, _STATE_WORDS), np.uint64)  # the memory below it is about to be unmapped
        while self._open_parts:
            self._open_parts.pop().close()

    # --- reading

    def drain(self) -> Drained:
        """All that happened since the last drain."""
        now = time.monotonic_ns()
        counters = self._state[: len(self._rings)].copy()  # before the rings' ends: what they count is there, or lost
        parts: list[npt.NDArray[Any]] = []
        seqs: list[npt.NDArray[np.uint64]] = []
        losses: list[Row] = []
        unseen: list[Unseen] = []
        marks = {}
        for cpu, ledger in enumerate(self._ledgers):
            events, seq, complete = self._read_cpu(cpu, ledger, now)
            if complete:
                ledger.note_produced(self._produced(ledger, counters), now)
            losses += [_hole_loss(cpu, hole) for hole in ledger.settle(last_switch(seq, events["kind"]), now)]
            unseen += self._unseen[cpu].find(events, seq)
            if complete and not ledger.pending:
                unseen += self._rest(cpu, int(counters[cpu, _NOT_RUN]), now)
            marks[cpu] = ledger.watermark(now if complete else ledger.last_mono_ns)
            parts.append(events)
            seqs.append(seq)
        payload, payload_losses = self._payload.drain() if self._payload is not None else (None, [])
        losses += payload_losses
        texts = list(self._text.read())
        losses += self._other_losses(now)
        columns = _columns(parts, seqs)
        tasks = self._snapshot + self._tasks.rows(self._lifecycle(columns), texts)
        self._snapshot = []
        losses += [self._unseen_loss(u) for u in unseen]
        self._watch_groups({i: p for i, p in self._tasks.new_groups() if p})
        self._match_names(tasks)
        self._counts += np.bincount(columns["kind"], minlength=256)
        self._drained_mono_ns = now
        return Drained(columns, tasks, losses, Watermark(min(marks.values()), marks), payload)

    def _read_cpu(self, cpu: int, ledger: CpuLedger, now: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint64], bool]:
        """(events sorted by (time, seq), their full sequence numbers, was the ring emptied)."""
        blocks, count, complete = [], 0, False
        while not complete and count < _DRAIN_MAX:
            block = self._rings[cpu].read(_READ_MAX)
            blocks.append(block.events)
            count, complete = count + len(block.events), block.complete
            if not complete and len(block.events) < _READ_MAX:
                break  # a record is still being written
        events = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        times = events["time_mono_ns"].astype(np.int64)
        seq = self._numbers(ledger, events["seq"])
        ledger.account(seq, times, now)
        places = _out_of_order(times)  # programs nested: reservation order is not time order
        if places.size:
            order = places[np.lexsort((seq[places], times[places]))]
            events[places], seq[places] = events[order], seq[order]
        return events, seq, complete

    def _rest(self, cpu: int, counted: int, now: int) -> list[Unseen]:
        """Switches not run that the program counted, and that no event delivered tells of: its event was lost in the ring."""
        rest = counted - self._unseen[cpu].told
        if rest <= 0:
            return []
        self._unseen[cpu].told = counted
        return [Unseen(cpu, self._drained_mono_ns, now, rest, None)]

    def _unseen_loss(self, unseen: Unseen) -> Row:
        """`hidden_task`: the kernel does not list the task that was let in to BPF either."""
        hidden = unseen.tid not in (None, 0) and not self._tasks.knows(unseen.tid or 0)
        row = _loss("hidden_task" if hidden else "not_run", "kernel", unseen.from_mono_ns, to=unseen.to_mono_ns)
        return row | {"cpu": unseen.cpu, "count": unseen.count}

    def _numbers(self, ledger: CpuLedger, raw: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
        if self._programs.fetch_add:
            return ledger.extend(np.ascontiguousarray(raw))
        # Before 5.12 a record carries the CPU's count of failed reservations instead: its place plus that is its number.
        drops = np.maximum.accumulate(np.concatenate(([ledger.next_seq - ledger.delivered], raw.astype(np.int64))))[1:]
        return (ledger.delivered + np.arange(len(raw)) + drops).astype(np.uint64)

    def _lifecycle(self, columns: Columns) -> Columns:
        """The few rows that say something about tasks, in the order of time over all CPUs."""
        rows = np.flatnonzero(_LIFECYCLE_KINDS[columns["kind"]])
        rows = rows[np.argsort(columns["time_mono_ns"][rows], kind="stable")]
        return {name: column[rows] for name, column in columns.items()}

    def _match_names(self, tasks: list[Row]) -> None:
        """Patterns too rich for the kernel side, matched as soon as the new name is read."""
        selectors = [s for s in self._watch if s.kind == "comm"]
        for row in tasks if selectors else []:
            if row["reason"] in ("exec", "rename") and any(s.matches_comm(row["comm"]) for s in selectors):
                if not self._table.flags(row["tgid"]) & FLAG_OBSERVER:
                    self._table.watch(row["tgid"])
                row["watched"] = True

    def _other_losses(self, now: int) -> list[Row]:
        """Losses that have no sequence number."""
        rows, self._shed_rows = self._shed_rows, []
        for refused in self._programs.refusals():
            self._refused_total += refused.count
            rows.append(_loss("recursion", "kernel", self._polled_mono_ns, to=now, family=refused.family, count=refused.count))
        counts = self._state[:, [_TEXT_DROPPED, _UNREADABLE, _FILTER_FULL]].sum(axis=0).astype(np.int64)
        for reason, count in zip(("ring_full", "unreadable", "filter_full"), counts - self._text_counts, strict=True):
            if count:
                rows.append(_loss(reason, "text", self._polled_mono_ns, to=now, count=int(count)))
        self._text_counts = counts
        self._polled_mono_ns = now
        return rows

    # --- saying what it is

    def session(self) -> dict[str, Any]:
        """The body of the session frame."""
        found = self._programs.capabilities()
        names = os.uname()
        return {
            **self._notes,
            "kernel": {"release": names.release, "version": names.version, "machine": names.machine, "build": build_id()},
            "cpus": len(self._rings),
            "families": {name: state.to_json() for name, state in found.families.items()},
            "capabilities": found.to_json(),
            "watch": [str(s) for s in self._watch],
            "started_mono_ns": self.started_mono_ns,
            "ring_bytes_per_cpu": self._maps.ring_bytes,
            "cgroup_version": 1 if self._hierarchy.version_1 else 2,
            "origin": "kernel",
            "payload": self._payload is not None,
        }

    def stats(self) -> dict[str, Any]:
        """Counters since the start: events per kind, the account of every CPU, refused runs, own memory in the kernel."""
        cpus = {
            ledger.cpu: {
                "produced": self._produced(ledger, self._state),
                "delivered": ledger.delivered,
                "lost": ledger.lost,
                "unsettled": self._produced(ledger, self._state) - ledger.delivered - ledger.lost,
                "switches_not_run": int(self._state[ledger.cpu, _NOT_RUN]),
                "backlog_bytes": self._rings[ledger.cpu].backlog_bytes(),
            }
            for ledger in self._ledgers
        }
        return {
            "cpus": cpus,
            "events": {BY_NUMBER[k].name: int(self._counts[k]) for k in np.flatnonzero(self._counts).tolist()},
            "refused": self._programs.missed(),
            **({"payload": self._payload.stats()} if self._payload is not None else {}),
            "kernel_bytes": self._maps.bytes(),
            "own_cpu_ns": time.process_time_ns(),
            "attached": [name for name, state in self._programs.capabilities().families.items() if state.attached],
        }

    def _produced(self, ledger: CpuLedger, counters: npt.NDArray[np.uint64]) -> int:
        if self._programs.fetch_add:
            return int(counters[ledger.cpu, _SEQUENCE])
        return ledger.delivered + int(counters[ledger.cpu, _DROPPED])


def _loss(
    reason: str, hop: str, since: int, *, to: int | None = None, family: str | None = None, count: int | None = None
) -> Row:
    return {
        "cpu": None,
        "reason": reason,
        "hop": hop,
        "family": family,
        "from_mono_ns": since,
        "to_mono_ns": to,
        "first_seq": None,
        "last_seq": None,
        "count": count,
    }


def _hole_loss(cpu: int, hole: Any) -> Row:
    row = _loss("ring_full", "ring", hole.from_mono_ns, to=hole.to_mono_ns, count=hole.count)
    return row | {"cpu": cpu, "first_seq": hole.first_seq, "last_seq": hole.last_seq}


def _out_of_order(times: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
    """Places whose rows must be permuted among themselves to bring `times` into order; ties count as out of order.

    A row stays if it is above all before it and below all after it. There are few others: sorting only them is much
    cheaper than sorting the block.
    """
    if len(times) < 2 or (np.diff(times) > 0).all():
        return np.empty(0, np.intp)
    before = np.maximum.accumulate(times)
    after = np.minimum.accumulate(times[::-1])[::-1]
    misplaced = (times != before) | (times != after)
    misplaced[1:] |= before[:-1] >= times[1:]
    misplaced[:-1] |= after[1:] <= times[:-1]
    return np.flatnonzero(misplaced)


def _columns(parts: list[npt.NDArray[Any]], seqs: list[npt.NDArray[np.uint64]]) -> Columns:
    """Columns of EVENTS from records of all CPUs."""
    out: Columns = {}
    total = sum(map(len, parts))
    for name in EVENT_COLUMNS:
        column = np.empty(total, EVENTS.field(name).type.to_pandas_dtype())
        at = 0
        for part, seq in zip(parts, seqs, strict=True):
            column[at : at + len(part)] = seq if name == "seq" else part[name]
            at += len(part)
        out[name] = column
    return out
