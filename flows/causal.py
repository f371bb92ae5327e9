"""The dataflow from Kafka to causes: `python -m bytewax.run flows.causal` runs it, `kprobe flow` supervises it.

    raw topic ---- decode --+-- raw rows -------------------------> ClickHouse (events, tasks, losses)
                            |                    +-- verdicts ----> topics, ClickHouse, Neo4j
                            +-- shard of node -- judge -- edges --> topics, ClickHouse, Neo4j
    operations --- parse ---+                    +
         malformed messages +--------------------+----------------> dead letters

Items are whole messages (some 16 000 events each) and move by reference; only nodes decide where state lives, so a flow
scales with the partitions of the raw topic. Settings are those of `kprobe.yaml` and `KPROBE_*` (docs/flow.md).

Guarantees: same verdicts at any number of workers, in any order of arrival, after any crash; a malformed message never
stops its neighbours; positions are recorded behind stored effects only. Fails with the error of the store or broker as its
last line; nothing is lost by that, start it again.

The module-level `flow` is made when it is first asked for, so that importing this module touches neither settings nor
servers.
"""

import os
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final

import bytewax.operators as op
import orjson
import pyarrow as pa
from bytewax.dataflow import Dataflow

from causality.engine import EngineConfig
from causality.operations import from_row
from events.errors import FrameError, InputError
from events.settings import Settings, load
from events.topics import NODE_SCHEMA
from flows import shutdown
from flows.judge import Item, ShardLogic
from flows.kafka_source import Gate, TopicSource
from flows.messages import DeadLetter, FrameMessage, Judgement, Message, NodeSeen, Submission
from flows.metrics import FlowMetrics, serve
from flows.shards import SHARDS, Share, shard_of
from flows.sinks import DOCUMENTS, Documents, Graph, RawRows, Sink, Topics, migrate

__all__ = ["FLOW_ID", "build"]

# Recovery finds state by flow and step names: changing one drops its state.
FLOW_ID: Final = "kprobe-causal"
_API_SWITCH: Final = "BYTEWAX_DATAFLOW_API_ENABLED"
_ROW_PARTS: Final = 16
# A verdict looks back before its operation, and the watermark may lag behind the newest clock.
_REWIND_MARGIN_NS: Final = EngineConfig().lookback_ns + 10_000_000_000


def __getattr__(name: str) -> Dataflow:
    """`flow`, for `bytewax.run`: built from the site's settings, once."""
    if name != "flow":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    silence_api()
    shutdown.install()
    globals()["flow"] = flow = build(load())
    return flow


def silence_api() -> None:
    """Bytewax serves its API without authentication on all interfaces if a variable is set to anything, "0" too.

    Here it must be "1", "true", "yes" or "on" to mean it.
    """
    if os.environ.get(_API_SWITCH, "").lower() not in ("1", "true", "yes", "on"):
        os.environ.pop(_API_SWITCH, None)


def build(settings: Settings, metrics: FlowMetrics | None = None) -> Dataflow:
    """The dataflow for these settings. Nothing is opened until it runs."""
    metrics = metrics or FlowMetrics()
    flow, gate = Dataflow(FLOW_ID), Gate()
    share = Share(settings.flow.processes, settings.flow.process)
    source = partial(
        TopicSource, kafka=settings.kafka, flow=settings.flow, metrics=metrics, gate=gate, on_start=_starter(settings, metrics)
    )
    operations = op.input("operations", flow, source(settings.flow.operations_topic))
    raw = op.input(
        "raw",
        flow,
        source(
            settings.flow.raw_topic, clock=_clock, rewind_margin_ns=_REWIND_MARGIN_NS, waits=True, shared=True,
            on_partitions=partial(setattr, share, "partitions"),
        ),
    )  # fmt: skip

    parsed = op.flat_map_batch("parse", operations, partial(parse, metrics=metrics))
    decoded = op.flat_map_batch("decode", raw, partial(decode, metrics=metrics))
    submissions = op.flat_map_batch("route-operations", parsed, _route_operations)
    frames = op.flat_map_batch("route-frames", decoded, _FrameRouter())
    judged = op.stateful_batch("judge", op.merge("inputs", submissions, frames), _JudgeBuilder(settings, metrics, share))
    outputs = op.flat_map_batch("outputs", judged, _only_outputs)
    _write(settings, metrics, parsed=parsed, decoded=decoded, outputs=outputs)
    return flow


def _write(settings: Settings, metrics: FlowMetrics, *, parsed: Any, decoded: Any, outputs: Any) -> None:
    """The sinks."""
    dead_operations = op.flat_map_batch("dead-operations", parsed, _only_dead)
    dead_frames = op.flat_map_batch("dead-frames", decoded, _only_dead)
    messages = [dead_operations, dead_frames, outputs]
    if settings.flow.processes > 1:
        messages.append(op.flat_map_batch("announce", decoded, _Announcer()))
    op.output("topics", op.merge("messages", *messages), Sink(partial(Topics, settings), metrics=metrics))
    if settings.flow.raw_rows:
        rows = op.flat_map_batch("rows", decoded, _rows)
        op.output("clickhouse-rows", rows, Sink(partial(RawRows, settings, metrics), _ROW_PARTS, metrics=metrics))
    if settings.flow.stores:
        judgements = op.flat_map_batch("judgements", outputs, _only_judgements)
        announced = op.flat_map_batch("announced", parsed, _announced)
        documents = op.merge("documents", judgements, announced)
        op.output("clickhouse", documents, Sink(partial(Documents, settings, metrics), metrics=metrics))
        if settings.flow.neo4j:
            final = op.flat_map_batch("final", judgements, _only_final)
            op.output("neo4j", final, Sink(partial(Graph, settings), metrics=metrics))


def _starter(settings: Settings, metrics: FlowMetrics) -> Callable[[], None]:
    """What happens once a process, before its first message: migrations, and the metrics' address."""
    lock = threading.Lock()
    done: list[object] = []

    def start() -> None:
        with lock:
            if not done:
                migrate(settings)
                done.append(serve(metrics, settings.flow.listen))

    return start


# --- steps: plain functions over batches of messages


def decode(messages: list[Message], metrics: FlowMetrics) -> Iterable[FrameMessage | DeadLetter]:
    """Each message as a frame, or as a dead letter."""
    for message in messages:
        try:
            yield FrameMessage(message)
        except FrameError as error:
            if not message.replayed:
                yield _dead(message, str(error), metrics)


def parse(messages: list[Message], metrics: FlowMetrics) -> Iterable[Submission | NodeSeen | DeadLetter]:
    """Each message as an operation, as another flow process's word that it has seen a node, or as a dead letter."""
    for message in messages:
        try:
            row = orjson.loads(message.value)
            if isinstance(row, dict) and row.get("schema") == NODE_SCHEMA and isinstance(row.get("node"), str):
                yield NodeSeen(row["node"])
                continue
            yield Submission(from_row(row, "operation"), message)
        except (InputError, orjson.JSONDecodeError) as error:
            yield _dead(message, f"not an operation: {error}", metrics)


def _dead(message: Message, reason: str, metrics: FlowMetrics) -> DeadLetter:
    metrics.dead_letters.labels(message.topic).inc()
    return DeadLetter(message, reason)


def _clock(message: Message) -> tuple[str, int, int] | None:
    """The clocks of a raw message, from its schema alone."""
    try:
        found = pa.ipc.read_schema(pa.py_buffer(message.value)).metadata
        mono_ns, _, real_ns = orjson.loads(found[b"kprobe.clocks"])
        return f"{found[b'kprobe.node']!r}/{found[b'kprobe.boot_id']!r}", int(mono_ns), int(real_ns)
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError):
        return None  # `decode` says what is wrong with it


class _FrameRouter:
    """Frames to the shard of their node; a node's first frame tells all shards of the node."""

    def __init__(self) -> None:
        self._nodes: set[str] = set()

    def __call__(self, items: list[FrameMessage | DeadLetter]) -> Iterable[tuple[str, Item]]:
        for item in items:
            if isinstance(item, FrameMessage):
                node = item.frame.node
                if node not in self._nodes:
                    self._nodes.add(node)
                    yield from ((shard, NodeSeen(node)) for shard in SHARDS)
                yield shard_of(node), item


class _Announcer:
    """Tells the other processes of each node whose frames this one reads: an operation may leave its node out where there is
    only one, and one of a node that nobody knows is refused."""

    def __init__(self) -> None:
        self._nodes: set[str] = set()

    def __call__(self, items: list[FrameMessage | DeadLetter]) -> Iterable[tuple[str, NodeSeen]]:
        nodes = {item.frame.node for item in items if isinstance(item, FrameMessage)}
        for node in sorted(nodes - self._nodes):
            self._nodes.add(node)
            yield DOCUMENTS, NodeSeen(node)


def _route_operations(items: list[Submission | NodeSeen | DeadLetter]) -> Iterable[tuple[str, Item]]:
    """An operation to the shard of its node; one without a node to all, and so is a node."""
    for item in items:
        if isinstance(item, NodeSeen):
            yield from ((shard, item) for shard in SHARDS)
        elif isinstance(item, Submission):
            node = item.operation.node
            yield from ((shard, item) for shard in ([shard_of(node)] if node else SHARDS))


class _JudgeBuilder:
    """Bytewax asks for the logic of a shard with its state alone; the shard's name is only for metrics."""

    def __init__(self, settings: Settings, metrics: FlowMetrics, share: Share) -> None:
        self._settings, self._metrics, self._share = settings, metrics, share
        self._count = 0

    def __call__(self, resume: bytes | None) -> ShardLogic:
        self._count += 1
        return ShardLogic(str(self._count), self._settings.flow, self._metrics, resume, self._share.owns)


def _only_outputs(items: list[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
    return [(DOCUMENTS, item) for _, item in items]


def _only_dead(items: list[Any]) -> Iterable[tuple[str, Any]]:
    return [(DOCUMENTS, item) for item in items if isinstance(item, DeadLetter)]


def _only_judgements(items: list[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
    return [(DOCUMENTS, item) for _, item in items if isinstance(item, Judgement)]


def _only_final(items: list[tuple[str, Judgement]]) -> Iterable[tuple[str, Judgement]]:
    return [(key, item) for key, item in items if not item.verdict["provisional"]]


def _announced(items: list[Submission | NodeSeen | DeadLetter]) -> Iterable[tuple[str, Any]]:
    return [(DOCUMENTS, item) for item in items if isinstance(item, Submission)]


def _rows(items: list[FrameMessage | DeadLetter]) -> Iterable[tuple[str, FrameMessage]]:
    """Raw rows go to the writer of their partition; what is read again is stored already."""
    return [
        (str(item.message.partition), item) for item in items if isinstance(item, FrameMessage) and not item.message.replayed
    ]
