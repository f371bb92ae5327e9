"""The engine of one node: frames in, closed edges and verdicts out. Pure; the flow and `kprobe analyze` call the same one.

    engine = NodeEngine(node, boot_id)
    engine.submit(operations)
    result = engine.fold(frames)      # any order, duplicates ignored; vectorised, no Python per event
    for verdict in engine.ready(): ...
    engine.finish()                   # the input has ended: nothing older will come

A frame's watermark counts once every frame with a lower number has arrived; frames that stay away are given up after
`frame_gap_max` later ones (counted in `missing_frames`; their events show up as holes in the sequence numbers, that is
as loss). An operation is ready when its end is before the watermark, or the input has ended.

A verdict is a function of the events, task rows and losses with times in [start - lookback, end]: not of arrival, batch
limits, number of workers or retention. Where retention had to forget part of that span, the verdict says so
(completeness).
"""

import heapq
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from causality import block, failures, journal, memory, network
from causality.causes import settle_convoys
from causality.edges import EdgeFold
from causality.log import EventLog, Segment
from causality.operations import Operation
from causality.tasks import TaskTable
from causality.timeline import RECORDING_ENDED, Key, Loss, Timeline
from causality.verdict import FailureCause, build, status_of, woken_by
from causality.walk import Resolver, Root, Walk
from causality.whatif import Path
from causality.window import Follow, Leaf, Wait, Who, Window
from events.frames import Frame

__all__ = ["EngineConfig", "FoldResult", "NodeEngine"]

_NEVER: Final = 2**63 - 1
_TIDIES: Final = 8  # a retention; each looks at every thread, loss and verdict held
_HOLE_SLACK_NS: Final = 1_000_000  # numbers are taken before the time is: near the rim of a view a hole may be none


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits. `lookback_ns`: how far before an operation events may bear on it; `retention_ns`: how long events are held for
    operations that are submitted late; `hold_ns`: how long, at most, for an operation that has not ended."""

    lookback_ns: int = 10_000_000_000
    retention_ns: int = 120_000_000_000
    frame_gap_max: int = 256
    max_depth: int = 64
    max_intervals: int = 50_000
    edges: bool = True  # derive closed wake edges in `fold`
    hold_ns: int = 900_000_000_000


@dataclass(slots=True)
class FoldResult:
    """What one fold closed: wake edges as columns (see `causality.edges`), and counters."""

    watermark_mono_ns: int
    edges: dict[str, npt.NDArray[Any]]
    events: int = 0
    sealed: int = 0
    late_events: int = 0
    duplicate_events: int = 0
    missing_frames: int = 0


@dataclass(slots=True)
class _Recording:
    """Arrival of one recording's frames. `expected` is None where its first frames were folded in an earlier life."""

    expected: int | None = 0
    watermark_mono_ns: int = -1
    waiting: dict[int, int] = field(default_factory=dict)

    def arrived(self, number: int, watermark_mono_ns: int, gap_max: int) -> int:
        """Take a frame; returns how many frames are given up."""
        given_up = 0
        if self.expected is None:
            self.expected = number
        if number >= self.expected:
            self.waiting[number] = watermark_mono_ns
        while self.waiting:
            if self.expected not in self.waiting:
                if len(self.waiting) <= gap_max:
                    break
                following = min(self.waiting)
                given_up += following - self.expected
                self.expected = following
            self.watermark_mono_ns = max(self.watermark_mono_ns, self.waiting.pop(self.expected))
            self.expected += 1
        return given_up


def _network(label: str, window: Window, wait: Wait) -> Sequence[Leaf | Follow]:
    return network.resolve_network(window, wait) if label in ("wait.net", "wait.other") else []


RESOLVERS: Final[tuple[Resolver, ...]] = (
    memory.resolve_reclaim,
    journal.resolve_journal,
    journal.resolve_dirty,
    memory.resolve_swap,
    block.resolve_block,
)


class NodeEngine:
    """State and folds of one node and boot."""

    def __init__(self, node: str, boot_id: str, config: EngineConfig | None = None) -> None:
        self.node, self.boot_id = node, boot_id
        self.config = config or EngineConfig()
        self._log = EventLog()
        self._tasks = TaskTable()
        self._losses: dict[tuple[Any, ...], Loss] = {}
        self._sessions: dict[str, dict[str, Any]] = {}
        self._recordings: dict[str, _Recording] = {}
        self._operations: dict[str, Operation] = {}
        self._judged: dict[str, tuple[Operation, str]] = {}
        self._again: set[str] = set()  # judged, then touched by late events
        self._due: list[tuple[int, str]] = []  # heap of (end, id); entries that an operation has outgrown are passed over
        self._starts: list[tuple[int, str]] = []  # heap of (start, id), likewise
        self._tidied_mono_ns = 0
        self._edges = EdgeFold()
        self._missing_frames = 0
        self._finished = False
        self._numbering: tuple[tuple[int, ...], list[tuple[int, int, int, int, int]]] | None = None

    # --- in

    def fold(self, frames: Iterable[Frame]) -> FoldResult:
        """Take frames, seal what the watermark allows, derive the closed edges."""
        late, duplicates = self._log.late_events, self._log.duplicate_events
        count = 0
        for frame in frames:
            count += self._take(frame)
        return self._seal(count, late, duplicates)

    def _take(self, frame: Frame) -> int:
        rows = 0
        if frame.kind == "events/1":
            columns = frame.events()
            rows = len(columns["time_mono_ns"])
            self._log.add(columns)
        elif frame.kind == "tasks/1":
            self._tasks.fold(frame.batch)
        elif frame.kind == "losses/1":
            self._take_losses(frame)
        elif frame.kind == "session/1":
            self._sessions.setdefault(frame.recording, {}).update(frame.body)
        recording = self._recordings.setdefault(frame.recording, _Recording())
        self._missing_frames += recording.arrived(frame.number, frame.watermark.node_mono_ns, self.config.frame_gap_max)
        return rows

    def _take_losses(self, frame: Frame) -> None:
        for row in frame.batch.to_pylist():
            if row["hop"] == "payload":
                continue  # bytes of a call, not an event: verdicts do not rest on them
            loss = Loss(
                int(row["from_mono_ns"]), int(row["to_mono_ns"]), row["cpu"], str(row["reason"] or ""),
                str(row["family"] or ""), int(row["count"] or 0),
            )  # fmt: skip
            self._losses[(loss.start_mono_ns, loss.end_mono_ns, str(loss.cpu), loss.reason, loss.family, loss.count)] = loss

    @property
    def watermark_mono_ns(self) -> int:
        """All events before this time have been folded."""
        return max((r.watermark_mono_ns for r in self._recordings.values()), default=-1)

    def _seal(self, count: int, late: int, duplicates: int) -> FoldResult:
        chunk = self._log.seal(_NEVER if self._finished else self.watermark_mono_ns)
        edges = self._edges.fold(chunk) if chunk is not None and self.config.edges else {}
        self._evict()
        return FoldResult(
            self.watermark_mono_ns, edges, events=count, sealed=len(chunk) if chunk is not None else 0,
            late_events=self._log.late_events - late, duplicate_events=self._log.duplicate_events - duplicates,
            missing_frames=self._missing_frames,
        )  # fmt: skip

    def _evict(self) -> None:
        now = self.watermark_mono_ns
        horizon = min(max(self._oldest_start(), now - self.config.hold_ns), now - self.config.retention_ns)
        horizon -= self.config.lookback_ns
        if horizon > 0 and not self._finished:
            self._log.evict(horizon)
            if horizon - self._tidied_mono_ns >= self.config.retention_ns // _TIDIES:
                self._tidy(horizon)

    def _oldest_start(self) -> int:
        """When the earliest operation that is not judged began."""
        while self._starts:
            start, operation_id = self._starts[0]
            operation = self._operations.get(operation_id)
            if operation is not None and operation.start_mono_ns == start:
                return start
            heapq.heappop(self._starts)
        return _NEVER

    def _tidy(self, horizon: int) -> None:
        """Forget what no verdict can ask for: a flow runs for weeks, and threads, losses and recordings come and go."""
        self._tidied_mono_ns = horizon
        self._losses = {k: x for k, x in self._losses.items() if x.end_mono_ns >= horizon}
        self._judged = {k: v for k, v in self._judged.items() if (v[0].end_mono_ns or 0) >= horizon}
        self._again &= self._judged.keys()
        self._tasks.forget(horizon)
        began = {name: int(s.get("started_mono_ns", 0)) for name, s in self._sessions.items()}
        latest = max((t for t in began.values() if t < horizon), default=0)
        over = {name for name, t in began.items() if t < latest}
        self._sessions = {name: s for name, s in self._sessions.items() if name not in over}
        self._recordings = {
            name: r for name, r in self._recordings.items() if name not in over or r.watermark_mono_ns >= horizon
        }

    def finish(self) -> FoldResult:
        """The input has ended: everything held is final."""
        self._finished = True
        result = self._seal(0, self._log.late_events, self._log.duplicate_events)
        self._log.settle()
        for segment in self._log.segments:
            segment.index()
        self._holes(0, 0)
        return result

    # --- out

    def submit(self, operations: Iterable[Operation]) -> None:
        """Operations to judge once the watermark has passed their end. The same id again replaces the earlier one."""
        for operation in operations:
            self._operations[operation.operation_id] = operation
            heapq.heappush(self._starts, (operation.start_mono_ns, operation.operation_id))
            if operation.end_mono_ns is not None:
                heapq.heappush(self._due, (operation.end_mono_ns, operation.operation_id))

    def ready(self) -> list[dict[str, Any]]:
        """Final verdicts of operations that ended before the watermark, by (end, id); and corrected ones after late events."""
        verdicts = []
        while (operation := self.next_due()) is not None:
            verdict = self.settle(operation)
            if verdict is not None:
                verdicts.append(verdict)
        return verdicts

    def next_due(self) -> Operation | None:
        """The operation whose turn it is to be settled, or None. Asking takes it off the list: settle it."""
        self._recall()
        limit = _NEVER + 1 if self._finished else self.watermark_mono_ns
        while self._due and self._due[0][0] < limit:
            end, operation_id = heapq.heappop(self._due)
            operation = self._operations.get(operation_id)
            if operation is None and operation_id in self._again:
                operation = self._judged[operation_id][0]
            if operation is not None and operation.end_mono_ns == end:
                return operation
        return None

    def settle(self, operation: Operation) -> dict[str, Any] | None:
        """The final verdict of an operation that is due; None if it was judged before and late events changed nothing."""
        self._operations.pop(operation.operation_id, None)
        self._again.discard(operation.operation_id)
        verdict = self.judge(operation)
        before = self._judged.get(operation.operation_id)
        self._judged[operation.operation_id] = (operation, verdict["hash"])
        unchanged = before is not None and before[1] == verdict["hash"] and before[0] == operation
        return None if unchanged else verdict

    def due_since_mono_ns(self) -> int | None:
        """The end of an operation that is due (the earliest); None if there is none."""
        self._recall()
        limit = _NEVER + 1 if self._finished else self.watermark_mono_ns
        return self._due[0][0] if self._due and self._due[0][0] < limit else None

    def waits_for(self, operation_id: str) -> bool:
        """Whether a submitted operation is not judged yet."""
        return operation_id in self._operations

    def give_up(self, operation_id: str) -> None:
        """Forget an operation that was submitted and not judged."""
        self._operations.pop(operation_id, None)

    def forget_events(self) -> None:
        """Forget all events before the watermark; a verdict that would need them says that they are gone."""
        self._log.evict(self.watermark_mono_ns)

    def _recall(self) -> None:
        """Late events: the verdicts that they can change are due again."""
        late, self._log.late_since_mono_ns = self._log.late_since_mono_ns, None
        if late is None:
            return
        for operation_id, (operation, _) in self._judged.items():
            if (operation.end_mono_ns or 0) >= late and operation_id not in self._again:
                self._again.add(operation_id)
                heapq.heappush(self._due, (operation.end_mono_ns or 0, operation_id))

    def provisional(self) -> list[dict[str, Any]]:
        """Verdicts, as of the watermark, of operations that began before it and have not ended by then."""
        now = self.watermark_mono_ns
        return [self.judge(o, until_mono_ns=now) for o in self.open_operations() if o.start_mono_ns < now]

    def open_operations(self) -> list[Operation]:
        """Operations that had not ended at the watermark, by (start, id)."""
        now = self.watermark_mono_ns
        still = [o for o in self._operations.values() if o.end_mono_ns is None or o.end_mono_ns >= now]
        return sorted(still, key=lambda o: (o.start_mono_ns, o.operation_id))

    def judge(self, operation: Operation, *, until_mono_ns: int | None = None) -> dict[str, Any]:
        """The verdict of an operation on the events held now."""
        walk = self._walk(operation, until_mono_ns)
        start, end = walk.lo, walk.hi
        failure = None
        if status_of(operation, end - start) == "failed":
            failure = _failure(walk.timeline, walk.window, walk.victim, start, end)
        return build(
            operation, walk.timeline, walk, walk.victim, start=start, end=end, failure=failure,
            retained=self._log.evicted_mono_ns < max(0, start - self.config.lookback_ns), provisional=until_mono_ns is not None,
        )  # fmt: skip

    def path(self, operation: Operation) -> Path:
        """The operation's time, explained, for questions of `whatif`."""
        walk = self._walk(operation, None)
        roots = settle_convoys(walk.explain(walk.victim, walk.lo, walk.hi))
        woken = woken_by(walk.timeline, walk.victim, walk.lo, walk.hi)
        timeline, names = walk.timeline, _neighbours(walk, roots)
        return Path(roots, walk.lo, walk.hi, operation.deadline_ns, lambda key: timeline.task(*key).comm, woken, names)

    def _walk(self, operation: Operation, until_mono_ns: int | None) -> Walk:
        start = operation.start_mono_ns
        end = until_mono_ns if until_mono_ns is not None else operation.end_mono_ns
        if end is None:
            end = self.watermark_mono_ns
        end = max(end, start + 1)
        timeline = self.timeline(start, end)
        victim = self._victim(timeline, operation.tid, start, end)
        window = Window(self._log.segments, timeline.lo_mono_ns, end)
        return Walk(
            timeline, window, lo=start, hi=end, victim=victim, resolvers=RESOLVERS, network=_network,
            max_depth=self.config.max_depth, max_intervals=self.config.max_intervals,
        )  # fmt: skip

    def timeline(self, start_mono_ns: int, end_mono_ns: int) -> Timeline:
        """The view that an operation [start, end) is judged on."""
        self._log.settle()
        lo = max(0, start_mono_ns - self.config.lookback_ns)
        session, proven = self._coverage(end_mono_ns)
        losses = [*self._losses.values(), *self._holes(lo, end_mono_ns), *self._after_the_end(end_mono_ns, proven)]
        losses.sort(key=lambda x: (x.start_mono_ns, x.end_mono_ns, -1 if x.cpu is None else x.cpu, x.reason, x.family))
        if self._log.evicted_mono_ns >= lo and proven is not None:
            proven = max(proven, self._log.evicted_mono_ns + 1)
        return Timeline(
            self._log.segments, self._tasks, losses, lo_mono_ns=lo, hi_mono_ns=end_mono_ns, node=self.node,
            boot_id=self.boot_id, session=session, proven_mono_ns=proven, focus_mono_ns=start_mono_ns,
        )  # fmt: skip

    def _after_the_end(self, end: int, proven: int | None) -> list[Loss]:
        """What of a view lies after the end of the recording: nothing of it was recorded."""
        over = self.watermark_mono_ns
        if not self._finished or proven is None or not proven < over < end:
            return []
        return [Loss(over, end, None, RECORDING_ENDED, "", 0)]

    def _coverage(self, end: int) -> tuple[Mapping[str, Any], int | None]:
        """The session that covers a time, and from when on it recorded everything."""
        sessions = [s for s in self._sessions.values() if int(s.get("started_mono_ns", 0)) <= end]
        if not sessions:
            return {}, None
        latest = max(sessions, key=lambda s: int(s.get("started_mono_ns", 0)))
        if "imported" in latest or not latest.get("started_mono_ns"):
            return latest, None
        return latest, int(latest["started_mono_ns"])

    def _holes(self, lo: int, hi: int) -> list[Loss]:
        """Holes in the sequence numbers within a view that no loss row explains."""
        lo, hi = lo + _HOLE_SLACK_NS, hi - _HOLE_SLACK_NS
        mark = tuple(map(id, self._log.segments))
        if self._numbering is None or self._numbering[0] != mark:
            self._numbering = mark, _numbering(self._log.segments)
        found = []
        for cpu, before, after, numbers, filled in self._numbering[1]:
            # A number that came with a later time than the view's end is missing from the view.
            if lo <= before and after < hi and filled > hi + _HOLE_SLACK_NS:
                known = any(
                    x.cpu in (None, cpu) and x.start_mono_ns <= after and x.end_mono_ns >= before for x in self._losses.values()
                )
                if not known:
                    found.append(Loss(before, after, cpu, "sequence_hole", "", numbers))
        return found

    def _victim(self, timeline: Timeline, tid: int, start: int, end: int) -> Key:
        """The life of the thread that the operation is about: the one of its events within the window."""
        return timeline.task_at(tid, min(end, start + 1))

    # --- carrying on elsewhere

    def snapshot(self, *, events: bool = True) -> bytes:
        """Everything held, for `restore`. Without `events` it is small, and complete once all frames of the last
        `retention_ns + lookback_ns` before the watermark have been folded again, in the order of their numbers."""
        if not events:
            return self._snapshot_without_events()
        state = {
            "node": self.node, "boot_id": self.boot_id, "config": self.config, "events": self._log.dump(),
            "sealed": self._log.sealed_mono_ns, "evicted": self._log.evicted_mono_ns, "tasks": self._tasks.dump(),
            "losses": self._losses, "sessions": self._sessions, "recordings": self._recordings,
            "operations": self._operations, "judged": self._judged, "again": self._again, "edges": self._edges,
            "counters": (self._log.late_events, self._log.duplicate_events, self._missing_frames),
        }  # fmt: skip
        return pickle.dumps(state)

    def _snapshot_without_events(self) -> bytes:
        horizon = self.watermark_mono_ns - self.config.retention_ns - self.config.lookback_ns
        state = {
            "node": self.node, "boot_id": self.boot_id, "config": self.config, "events": [],
            "sealed": -1, "evicted": max(self._log.evicted_mono_ns, horizon), "tasks": self._tasks.dump(),
            "losses": self._losses, "sessions": self._sessions,
            "recordings": {name: _Recording(expected=None) for name in self._recordings},
            "operations": self._operations, "judged": self._judged, "again": self._again, "edges": EdgeFold(),
            "counters": (self._log.late_events, self._log.duplicate_events, self._missing_frames),
        }  # fmt: skip
        return pickle.dumps(state)

    @classmethod
    def restore(cls, data: bytes, config: EngineConfig | None = None) -> "NodeEngine":
        """The engine that `snapshot` described, perhaps with other limits. The bytes must come from an own store: they are
        trusted."""
        state = pickle.loads(data)
        engine = cls(state["node"], state["boot_id"], config or state["config"])
        for columns in state["events"]:
            engine._log.add(columns)
        engine._log.seal(state["sealed"])
        engine._log.sealed_mono_ns, engine._log.evicted_mono_ns = state["sealed"], state["evicted"]
        for row in state["tasks"]:
            engine._tasks.add(row)
        engine._losses, engine._sessions = state["losses"], state["sessions"]
        engine._recordings, engine._edges = state["recordings"], state["edges"]
        engine._judged = state["judged"]
        engine.submit(state["operations"].values())
        for operation_id in state.get("again", ()):
            engine._again.add(operation_id)
            heapq.heappush(engine._due, (engine._judged[operation_id][0].end_mono_ns or 0, operation_id))
        engine._log.late_events, engine._log.duplicate_events, engine._missing_frames = state["counters"]
        return engine


def _numbering(segments: Sequence[Segment]) -> list[tuple[int, int, int, int, int]]:
    """(cpu, time before, time after, numbers missing, when they came after all or never) of all breaks in the numbering."""
    found = []
    for cpu in sorted({c for s in segments for c in s.cpus()}):
        parts = [(s, s.rows_of_cpu(cpu)) for s in segments]
        seq = np.concatenate([s.columns["seq"][r] for s, r in parts]).astype(np.int64)
        time = np.concatenate([s.time[r] for s, r in parts])
        if (np.diff(seq) != 1).any():
            order = np.argsort(seq, kind="stable")
            seq, time = seq[order], time[order]
        for i in np.flatnonzero(np.diff(seq) > 1):
            a, b = sorted((int(time[i]), int(time[i + 1])))
            found.append((cpu, a, b, int(seq[i + 1] - seq[i] - 1), _NEVER))
        # Numbers are taken before the time is: one may come much later than its successor.
        earliest_after = np.minimum.accumulate(time[::-1])[::-1]
        for i in np.flatnonzero(time[:-1] > earliest_after[1:] + _HOLE_SLACK_NS):
            a, b = sorted((int(time[i - 1]) if i else 0, int(time[i + 1])))
            found.append((cpu, a, b, 1, int(time[i])))
    return found


def _neighbours(walk: Walk, roots: Sequence[Root]) -> list[str]:
    """Names of the tasks with which an operation shared a CPU, the disk or its process while it ran."""
    timeline, lo, hi = walk.timeline, walk.lo, walk.hi
    cpus = {i.cpu for i in timeline.states(walk.victim, lo, hi) if i.state_name == "running"}
    keys = {o.key for cpu in sorted(cpus) for o in timeline.occupants(cpu, lo, hi)}
    tids = set(timeline.kind("sys_enter_futex", lo, hi)["tid"].tolist())
    if any(r.label.startswith("wait.disk") for r in roots):
        tids |= set(timeline.kind("block_bio_queue", lo, hi)["tid"].tolist())
    keys |= {timeline.task_at(tid, hi) for tid in sorted(tids)}
    tgid = timeline.task(*walk.victim).tgid
    for cpu in timeline.cpus():
        keys |= {o.key for o in timeline.occupants(cpu, lo, hi) if timeline.task(*o.key).tgid == tgid}
    tasks = [timeline.task(*key) for key in keys if key != walk.victim and key[0] > 0]
    return sorted({task.comm or f"tid {task.tid}" for task in tasks})


def _failure(timeline: Timeline, window: Window, victim: Key, start: int, end: int) -> FailureCause | None:
    task = timeline.task(*victim)
    found = failures.failure_of(window, Who(victim[0], task.tgid), start, end)
    if found is None:
        return None
    culprit = None
    if found.culprit is not None and found.culprit.tid:
        culprit = timeline.task_at(found.culprit.tid, found.time_mono_ns)
    evidence = tuple(timeline.event_id(*ref) for ref in found.evidence)
    return FailureCause(found.kind, culprit, evidence, found.confidence)

