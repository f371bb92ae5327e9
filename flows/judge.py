"""The state of one shard: the engines of its nodes, and the operations that wait for their time.

A shard gets frames and operations in any order, and gives judgements and dead letters. An operation is judged when
everything that happened before its end has arrived; one whose node has not been seen yet waits for it. All of the inference
is `causality.engine.NodeEngine`; this only routes, remembers and counts.

Which engine. An engine is one boot of one node. An operation's times are of one boot without saying which: it belongs to
the newest boot of its node, as told by the wall clock of its frames. An operation may leave its node out where only one is
recorded; with several it is refused (dead letter), for a wrong node is worse than none.

What is kept. `snapshot` holds the operations not yet judged and, of each engine, what is small (tasks, session, losses).
The events themselves are rebuilt from the topic: the source reads the last `retention_s` again (`flows.kafka_source`). A
verdict that had been given already is then given again, in the same bytes.

At the end of the topics (`flow.stop_at_end`) the operations left are judged with what there is, and those of unknown nodes
become dead letters; the snapshot keeps all of them, so that a later run can complete them. A SIGTERM is not such an end.
"""

import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from bytewax.operators import StatefulBatchLogic

from causality.engine import EngineConfig, NodeEngine
from causality.graph import edges_of
from events.frames import Frame
from events.settings import FlowSettings
from flows import shutdown
from flows.messages import DeadLetter, FrameMessage, Judgement, NodeSeen, Submission
from flows.metrics import FlowMetrics

__all__ = ["Item", "Output", "ShardLogic"]

Item = FrameMessage | Submission | NodeSeen
Output = Judgement | DeadLetter
_FLOATING_MAX: Final = 10_000  # operations without a node, kept by shards that have no node yet


@dataclass(slots=True)
class _Boot:
    """One engine, and the operations that it has not judged for good."""

    engine: NodeEngine
    newest_real_ns: int = 0
    pending: dict[str, Submission] = field(default_factory=dict)

    def forget_judged(self) -> None:
        """Operations announced again without a change are not judged again."""
        now = self.engine.watermark_mono_ns
        done = [i for i, s in self.pending.items() if s.operation.end_mono_ns is not None and s.operation.end_mono_ns < now]
        for operation_id in done:
            del self.pending[operation_id]


class ShardLogic(StatefulBatchLogic[Item, Output, bytes]):
    """See the module. `resume` is what `snapshot` gave."""

    def __init__(self, shard: str, settings: FlowSettings, metrics: FlowMetrics, resume: bytes | None) -> None:
        self._shard, self._settings, self._metrics = shard, settings, metrics
        self._config = EngineConfig(retention_ns=int(settings.retention_s * 1e9))
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
        return [*self._ready(), *self._expired()], False

    def on_notify(self) -> tuple[Iterable[Output], bool]:
        """Time has passed: give up what waited for an unknown node."""
        return self._expired(), False

    def notify_at(self) -> datetime | None:
        """When the next wait for an unknown node ends."""
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
        result = boot.engine.fold(frames)
        node = key[0]
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
        boot.pending[submission.operation.operation_id] = submission
        boot.engine.submit([submission.operation])

    # --- results

    def _ready(self) -> list[Output]:
        found: list[Output] = []
        for (node, _), boot in sorted(self._boots.items()):
            found += self._judgements(node, boot, boot.engine.ready(), settle=True)
            boot.forget_judged()
        self._metrics.pending.labels(self._shard).set(sum(len(b.pending) for b in self._boots.values()))
        return found

    def _finish(self) -> list[Output]:
        """Judge what is left. The snapshot is taken before: a later run goes on as if this had not happened."""
        found: list[Output] = []
        self._kept = self.snapshot()
        for (node, _), boot in sorted(self._boots.items()):
            if boot.pending:
                boot.engine.finish()
                found += self._judgements(node, boot, boot.engine.ready(), settle=False)
        return found

    def _judgements(self, node: str, boot: _Boot, verdicts: list[dict[str, Any]], *, settle: bool) -> Iterable[Output]:
        for verdict in verdicts:
            operation_id = verdict["operation_id"]
            submission = boot.pending.pop(operation_id, None) if settle else boot.pending.get(operation_id)
            if submission is not None and not submission.operation.node and len(self._nodes | {node}) > 1:
                if node == min(self._nodes):
                    yield self._refusal(submission, f"names no node, and {len(self._nodes)} are recorded; give one")
                continue
            if submission is None:
                self._metrics.corrected.inc()
            edges = tuple(edges_of(verdict))
            self._metrics.verdicts.labels(verdict["status"]).inc()
            self._metrics.edges.inc(len(edges))
            yield Judgement(verdict, edges)

    def _expired(self) -> list[Output]:
        now = datetime.now(UTC)
        nodes = [node for node, at in self._expires.items() if at <= now]
        for node in nodes:
            del self._expires[node]
        return self._refuse({node: self._waiting.pop(node) for node in nodes})

    def _refuse(self, waiting: dict[str, dict[str, Submission]]) -> list[Output]:
        """Dead letters; of several processes only the first speaks for nodes that nobody here has seen (see docs/flow.md)."""
        if self._settings.processes > 1:
            return []
        return [
            self._refusal(submission, f"no frame of node {node!r} was recorded in {self._settings.retention_s:g} s")
            for node, submissions in sorted(waiting.items())
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
            boot = self._boots[key] = _Boot(NodeEngine.restore(engine), newest_real_ns)
            for submission in pending.values():
                self._enter(boot, submission)
        later = datetime.now(UTC) + timedelta(seconds=self._settings.retention_s)
        self._expires = dict.fromkeys(self._waiting, later)
