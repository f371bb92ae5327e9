"""The state of one shard: the engines of its nodes, and the operations that wait for their time.

A shard gets frames and operations in any order, and gives judgements and dead letters. An operation is judged when
everything that happened before its end has arrived; one whose node has not been seen yet waits for it. All of the inference
is `causality.engine.NodeEngine`; this only routes, remembers and counts.

Which engine. An engine is one boot of one node. An operation's times are of one boot without saying which: it belongs to
the newest boot of its node, as told by the wall clock of its frames. An operation may leave its node out where only one is
recorded; with several it is refused (dead letter), for a wrong node is worse than none.

When it is judged. A verdict can take as long as thousands of events do to fold. So a batch is folded first, then verdicts are
given, the earliest end first, for `_SLICE_S`; what is left goes on at once, but behind the messages and verdicts that are
under way. Each verdict and its edges leave before the next batch is folded. If verdicts fall behind by `_BEHIND_NS` of the
events' own time, nothing is folded until they have caught up: the lag then stands in Kafka and not in memory. None of this
changes a verdict, for it depends on the events up to its end alone. An operation on which the judgement itself fails becomes
a dead letter.

An operation that is still open gets provisional verdicts: as of 1, 2, 4, ... times `provisional_s` after its start.

What is kept. `snapshot` holds the operations not yet judged and, of each engine, what is small (tasks, session, losses).
The events themselves are rebuilt from the topic: the source reads the last `retention_s` again (`flows.kafka_source`). A
verdict that had been given already is then given again, in the same bytes.

At the end of the topics (`flow.stop_at_end`) the operations left are judged with what there is, and those of unknown nodes
become dead letters; the snapshot keeps all of them, so that a later run can complete them. A SIGTERM is not such an end.
"""

import heapq
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from bytewax.operators import StatefulBatchLogic

from causality.engine import EngineConfig, NodeEngine
from causality.graph import edges_of
from causality.operations import Operation
from events.frames import Frame
from events.settings import FlowSettings
from flows import shutdown
from flows.messages import DeadLetter, FrameMessage, Judgement, NodeSeen, Submission
from flows.metrics import FlowMetrics

__all__ = ["Item", "Output", "ShardLogic"]

Item = FrameMessage | Submission | NodeSeen
Output = Judgement | DeadLetter
_FLOATING_MAX: Final = 10_000  # operations without a node, kept by shards that have no node yet
_SLICE_S: Final = 0.05
_BEHIND_NS: Final = 20_000_000_000
_SILENT_RETENTIONS: Final = 10  # a boot that says nothing for so long while others do is over


@dataclass(slots=True)
class _Boot:
    """One engine, and the operations that it has not judged for good."""

    engine: NodeEngine
    newest_real_ns: int = 0
    pending: dict[str, Submission] = field(default_factory=dict)
    alarms: list[tuple[int, str]] = field(default_factory=list)  # heap: when to look at an operation that is still open
    fold_mono_s: float = field(default_factory=time.monotonic)

    def enter(self, submission: Submission, first_look_ns: int) -> None:
        """Take an operation."""
        operation = submission.operation
        self.pending[operation.operation_id] = submission
        self.engine.submit([operation])
        heapq.heappush(self.alarms, (operation.start_mono_ns + first_look_ns, operation.operation_id))

    def still_open(self) -> Iterable[Operation]:
        """Operations whose alarm has gone off and that have not ended."""
        now = self.engine.watermark_mono_ns
        while self.alarms and self.alarms[0][0] <= now:
            _, operation_id = heapq.heappop(self.alarms)
            if operation_id in self.pending and self.engine.waits_for(operation_id):
                operation = self.pending[operation_id].operation
                if operation.end_mono_ns is None or operation.end_mono_ns >= now:
                    yield operation


class ShardLogic(StatefulBatchLogic[Item, Output, bytes]):
    """See the module. `resume` is what `snapshot` gave."""

    def __init__(
        self,
        shard: str,
        settings: FlowSettings,
        metrics: FlowMetrics,
        resume: bytes | None,
        owns: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self._shard, self._settings, self._metrics = shard, settings, metrics
        self._config = EngineConfig(retention_ns=int(settings.retention_s * 1e9), hold_ns=int(settings.hold_s * 1e9))
        self._owns = owns
        self._every_ns = int(settings.provisional_s * 1e9)
        self._boots: dict[tuple[str, str], _Boot] = {}
        self._waiting: dict[str, dict[str, Submission]] = {}  # by node
        self._floating: dict[str, Submission] = {}
        self._nodes: set[str] = set()
        self._kept: bytes | None = None
        self._expires: dict[str, datetime] = {}  # by node: when those that wait for it are given up
        if resume is not None:
            self._restore(resume)

    # --- items

    def on_batch(self, values: list[Item]) -> tuple[Iterable[Output], bool]:
        """Take what arrived; give what is ready."""
        frames: dict[tuple[str, str], list[Frame]] = {}
        for value in values:
            if isinstance(value, Submission):
                self._submit(value)
            elif isinstance(value, FrameMessage):
                frames.setdefault((value.frame.node, value.frame.boot_id), []).append(value.frame)
            else:
                self._nodes.add(value.node)
        for key, batch in frames.items():
            self._fold(key, batch)
        return [*self._ready(), *self._expired(), *self._retire()], False

    def on_notify(self) -> tuple[Iterable[Output], bool]:
        """Go on judging; give up what waited for an unknown node."""
        return [*self._ready(), *self._expired()], False

    def notify_at(self) -> datetime | None:
        """At once while operations are due, else when the next wait for an unknown node ends."""
        if any(boot.engine.due_since_mono_ns() is not None for boot in self._boots.values()):
            return datetime.now(UTC)
        return min(self._expires.values(), default=None)

    def on_eof(self) -> tuple[Iterable[Output], bool]:
        """The end of the topics, or only of this run."""
        if shutdown.requested() or not self._settings.stop_at_end:
            return [], False
        return [*self._finish(), *self._refuse(self._waiting)], False

    # --- frames

    def _fold(self, key: tuple[str, str], frames: Sequence[Frame]) -> None:
        boot = self._boots.get(key) or self._open(key)
        boot.newest_real_ns = max(boot.newest_real_ns, *(f.clocks.real_ns for f in frames))
        node = key[0]
        boot.fold_mono_s = time.monotonic()
        self._metrics.age.observe(max(0.0, time.time() - frames[-1].clocks.real_ns / 1e9))
        with self._metrics.fold.time():
            result = boot.engine.fold(frames)
        self._metrics.events.labels(node).inc(result.events)
        self._metrics.duplicates.labels(node).inc(result.duplicate_events)
        self._metrics.late.labels(node).inc(result.late_events)
        self._metrics.wakes.labels(node).inc(len(result.edges.get("ns", ())))
        self._metrics.watermark.labels(node).set(result.watermark_mono_ns)

    def _open(self, key: tuple[str, str]) -> _Boot:
        """A new boot: it takes over the operations that waited for its node."""
        node, boot_id = key
        boot = self._boots[key] = _Boot(NodeEngine(node, boot_id, self._config))
        self._expires.pop(node, None)
        for submission in [*self._waiting.pop(node, {}).values(), *self._floating.values()]:
            self._enter(boot, submission)
        self._floating.clear()
        return boot

    # --- operations

    def _submit(self, submission: Submission) -> None:
        node = submission.operation.node
        mine = {n for n, _ in self._boots}
        self._metrics.operations.inc(bool(node))
        for each in [node] if node in mine else [] if node else sorted(mine):
            boots = [b for (n, _), b in sorted(self._boots.items()) if n == each]
            self._enter(max(boots, key=lambda b: b.newest_real_ns), submission)
        if node and node not in mine:
            self._waiting.setdefault(node, {})[submission.operation.operation_id] = submission
            self._expires.setdefault(node, datetime.now(UTC) + timedelta(seconds=self._settings.retention_s))
        elif not mine:
            self._floating[submission.operation.operation_id] = submission
            if len(self._floating) > _FLOATING_MAX:
                self._floating.pop(next(iter(self._floating)))

    def _enter(self, boot: _Boot, submission: Submission) -> None:
        boot.enter(submission, self._every_ns or self._config.hold_ns)

    # --- results

    def _ready(self) -> list[Output]:
        """Verdicts for a while, of all boots in turn; longer where they have fallen behind."""
        found: list[Output] = []
        began_s = time.monotonic()
        boots = [(node, boot) for (node, _), boot in sorted(self._boots.items())]
        for node, boot in boots:
            found += self._look_at_open(node, boot)
        while boots:
            for entry in list(boots):
                node, boot = entry
                hurry = time.monotonic() - began_s < _SLICE_S or self._is_behind(boot)
                operation = boot.engine.next_due() if hurry else None
                if operation is None:
                    boots.remove(entry)
                else:
                    found += self._settle(node, boot, operation)
        self._metrics.pending.labels(self._shard).set(sum(len(b.pending) for b in self._boots.values()))
        return found

    def _is_behind(self, boot: _Boot) -> bool:
        since = boot.engine.due_since_mono_ns()
        return since is not None and since < boot.engine.watermark_mono_ns - _BEHIND_NS

    def _finish(self) -> list[Output]:
        """Judge what is left. The snapshot is taken before: a later run goes on as if this had not happened."""
        found: list[Output] = []
        for (node, _), boot in sorted(self._boots.items()):
            while (operation := boot.engine.next_due()) is not None:
                found += self._settle(node, boot, operation)
        self._kept = self.snapshot()
        for (node, _), boot in sorted(self._boots.items()):
            if boot.pending:
                boot.engine.finish()
                while (operation := boot.engine.next_due()) is not None:
                    found += self._settle(node, boot, operation)
        return found

    def _settle(self, node: str, boot: _Boot, operation: Operation) -> Iterable[Output]:
        """Judge one operation for good."""
        submission = boot.pending.pop(operation.operation_id, None)
        if submission is not None and self._is_ambiguous(node, operation):
            boot.engine.give_up(operation.operation_id)
            if node == min(self._nodes):
                yield self._refusal(submission, f"names no node, and {len(self._nodes)} are recorded; give one")
            return
        verdict = None
        with self._metrics.judge.time():
            try:
                verdict = boot.engine.settle(operation)
            except Exception as error:  # a defect of the judgement must not stop its neighbours, nor come back at every start
                traceback.print_exc(file=sys.stderr)
                if submission is not None:
                    yield self._refusal(submission, f"cannot be judged: {type(error).__name__}: {error}")
        if verdict is not None:
            if submission is None:
                self._metrics.corrected.inc()
            yield self._judgement(verdict)

    def _is_ambiguous(self, node: str, operation: Operation) -> bool:
        return not operation.node and len(self._nodes | {node}) > 1

    def _judgement(self, verdict: dict[str, Any]) -> Judgement:
        """Edges are those of final verdicts: nobody takes an edge back."""
        edges = () if verdict["provisional"] else tuple(edges_of(verdict))
        self._metrics.verdicts.labels("provisional" if verdict["provisional"] else verdict["status"]).inc()
        self._metrics.edges.inc(len(edges))
        return Judgement(verdict, edges)

    def _look_at_open(self, node: str, boot: _Boot) -> Iterable[Output]:
        """Provisional verdicts on operations that go on; those that go on for too long are given up."""
        now = boot.engine.watermark_mono_ns
        for operation in boot.still_open():
            age_ns = now - operation.start_mono_ns
            if operation.end_mono_ns is None and age_ns >= self._config.hold_ns:
                boot.engine.give_up(operation.operation_id)
                submission = boot.pending.pop(operation.operation_id)
                yield self._refusal(submission, f"has not ended within {self._settings.hold_s:g} s of its start")
                continue
            next_ns = self._config.hold_ns
            if self._every_ns and age_ns < self._config.hold_ns:
                shown_ns = self._every_ns << ((age_ns // self._every_ns).bit_length() - 1)
                next_ns = min(next_ns, 2 * shown_ns)
                if not self._is_ambiguous(node, operation):
                    yield from self._show(boot, operation, operation.start_mono_ns + shown_ns)
            if next_ns > age_ns:
                heapq.heappush(boot.alarms, (operation.start_mono_ns + next_ns, operation.operation_id))

    def _show(self, boot: _Boot, operation: Operation, until_mono_ns: int) -> Iterable[Output]:
        """A provisional verdict. If there can be none now, the final one will tell."""
        with self._metrics.judge.time():
            try:
                verdict = boot.engine.judge(operation, until_mono_ns=until_mono_ns)
            except Exception:
                traceback.print_exc(file=sys.stderr)
                return
        yield self._judgement(verdict)

    def _retire(self) -> list[Output]:
        """Boots that are over, because their node has booted again, are judged to their end and forgotten. The events of a node
        that has been silent for long are forgotten, who is who is kept."""
        found: list[Output] = []
        now_s = time.monotonic()
        for (node, boot_id), boot in sorted(self._boots.items()):
            silent_s = now_s - boot.fold_mono_s
            newer = any(n == node and b.newest_real_ns > boot.newest_real_ns for (n, _), b in self._boots.items())
            if newer and silent_s > self._settings.retention_s:
                boot.engine.finish()
                while (operation := boot.engine.next_due()) is not None:
                    found += self._settle(node, boot, operation)
                found += [self._refusal(s, "has not ended when its node booted again") for s in boot.pending.values()]
                del self._boots[node, boot_id]
            elif silent_s > _SILENT_RETENTIONS * self._settings.retention_s:
                boot.engine.forget_events()
        return found

    def _expired(self) -> list[Output]:
        now = datetime.now(UTC)
        nodes = [node for node, at in self._expires.items() if at <= now]
        for node in nodes:
            del self._expires[node]
        return self._refuse({node: self._waiting.pop(node) for node in nodes})

    def _refuse(self, waiting: dict[str, dict[str, Submission]]) -> list[Output]:
        """Dead letters for operations of nodes that nobody has seen. Of several processes the one speaks that would read the
        node's frames; a node whose frames another one reads after all was announced by that one (see docs/flow.md)."""
        return [
            self._refusal(submission, f"no frame of node {node!r} was recorded in {self._settings.retention_s:g} s")
            for node, submissions in sorted(waiting.items())
            if node not in self._nodes and self._owns(node)
            for submission in submissions.values()
        ]

    def _refusal(self, submission: Submission, reason: str) -> DeadLetter:
        self._metrics.dead_letters.labels(submission.message.topic).inc()
        return DeadLetter(submission.message, f"operation {submission.operation.operation_id!r} {reason}")

    # --- state

    def snapshot(self) -> bytes:
        """What a restart needs besides the messages of the retention."""
        if self._kept is not None:
            return self._kept
        boots = {key: (b.engine.snapshot(events=False), b.newest_real_ns, b.pending) for key, b in sorted(self._boots.items())}
        data = pickle.dumps((boots, self._waiting, self._floating, self._nodes), protocol=5)
        self._metrics.snapshot_bytes.labels(self._shard).set(len(data))
        return data

    def _restore(self, data: bytes) -> None:
        boots, self._waiting, self._floating, self._nodes = pickle.loads(data)
        for key, (engine, newest_real_ns, pending) in boots.items():
            boot = self._boots[key] = _Boot(NodeEngine.restore(engine, self._config), newest_real_ns)
            for submission in pending.values():
                self._enter(boot, submission)
        later = datetime.now(UTC) + timedelta(seconds=self._settings.retention_s)
        self._expires = dict.fromkeys(self._waiting, later)
