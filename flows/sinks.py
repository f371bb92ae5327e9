"""Writing what a flow found: buffered, confirmed before the epoch closes, the same however often it is written.

Every sink is a set of partitions with one writer each. `write_batch` hands items over; `snapshot`, which Bytewax calls
before it records the epoch, returns only when all of them are stored, and raises StoreError if one is not. So a position is
recorded only behind stored effects, and a crash repeats at most the open epoch.

What is repeated changes nothing, because identity comes from the source and never from batches or epochs, which are cut
differently in a second run:
- raw rows: a partition's inserts are in order and atomic; a new run asks the table which of its first messages are there
  already and goes on behind them. The tables' keys (node, boot, cpu, seq) would make one of two in any case;
- operations, verdicts, edges: keyed by operation and edge id, values are set, never added;
- topics: a message is keyed by operation, and its document names it (`hash`, `edge_id`): readers drop what they have;
- dead letters: the headers topic, partition and offset name the message.

Raw rows go through a thread per partition, so that the server works while the flow folds; its queue is bounded.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, Protocol, TypeVar

import numpy as np
import orjson
import pyarrow as pa
from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition

from events.records import EVENT_COLUMNS, columns_to_arrow
from events.settings import FlowSettings, Settings
from events.topics import EDGE_SCHEMA, NODE_SCHEMA
from flows.messages import DeadLetter, FrameMessage, Judgement, NodeSeen, Submission
from flows.metrics import FlowMetrics

__all__ = ["DOCUMENTS", "Documents", "Graph", "RawRows", "Sink", "Topics", "Writer"]

DOCUMENTS: Final = "0"  # the key of everything that one writer takes
_QUEUED_MESSAGES: Final = 32
_BUFFERED_ITEMS: Final = 500

T = TypeVar("T")
In_contra = TypeVar("In_contra", contravariant=True)


class Writer(Protocol[In_contra]):
    """What a sink partition writes through."""

    def write(self, items: Sequence[In_contra]) -> None:
        """Take items; they may be stored later."""

    def confirm(self) -> None:
        """Return when all items taken are stored; raise StoreError if one is not."""

    def close(self) -> None:
        """Let go of the store."""


class Sink(FixedPartitionedSink[T, None], Generic[T]):
    """`parts` partitions; the key of an item is a number, its partition that number modulo `parts`.

    A writer is opened with the first item, so that a partition without items costs no connection.
    """

    def __init__(self, open_writer: Callable[[], Writer[T]], parts: int = 1, *, metrics: FlowMetrics) -> None:
        self._open_writer = open_writer
        self._parts = parts
        self._metrics = metrics

    def list_parts(self) -> list[str]:
        """The same on every worker."""
        return [f"{part:02d}" for part in range(self._parts)]

    def part_fn(self, item_key: str) -> int:
        """The partition of a key."""
        return int(item_key) % self._parts

    def build_part(self, step_id: str, _for_part: str, _resume_state: None) -> "_Part[T]":
        """One partition. It has no state: what is stored is stored."""
        return _Part(self._open_writer, self._metrics.confirm.labels(step_id.rpartition(".")[2]))


class _Part(StatefulSinkPartition[T, None], Generic[T]):
    def __init__(self, open_writer: Callable[[], Writer[T]], confirm: Any) -> None:
        self._open_writer, self._confirm = open_writer, confirm
        self._writer: Writer[T] | None = None

    def write_batch(self, values: list[T]) -> None:
        if self._writer is None:
            self._writer = self._open_writer()
        self._writer.write(values)

    def snapshot(self) -> None:
        if self._writer is not None:
            with self._confirm.time():
                self._writer.confirm()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.confirm()
            self._writer.close()


class RawRows:
    """Events, tasks and losses to ClickHouse, several messages an insert, in a thread of its own."""

    def __init__(self, settings: Settings, metrics: FlowMetrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._queue: queue.Queue[FrameMessage | None] = queue.Queue(_QUEUED_MESSAGES)
        self._error: Exception | None = None
        self._caught_up: set[int] = set()  # partitions whose messages are known to be new
        self._thread = threading.Thread(target=self._run, name="clickhouse-rows", daemon=True)
        self._thread.start()

    def write(self, items: Sequence[FrameMessage]) -> None:
        """Queue messages; waits while the queue is full."""
        for item in items:
            self._queue.put(item)
        self._raise()

    def confirm(self) -> None:
        """Wait for the thread."""
        self._queue.join()
        self._raise()

    def close(self) -> None:
        """End the thread."""
        self._queue.put(None)
        self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        """After an error the rest is taken and not written: the error is raised, and the epoch is not recorded."""
        from sinks.clickhouse import ClickHouseStore

        store: ClickHouseStore | None = None
        while items := self._take():
            try:
                if self._error is None:
                    store = store or ClickHouseStore(self._settings.clickhouse)
                    self._insert_all(store, items)
            except Exception as error:  # whatever it is, it belongs to the flow's thread
                self._error = error
            finally:
                for _ in items:
                    self._queue.task_done()
        if store is not None:
            store.close()

    def _take(self) -> list[FrameMessage]:
        """Wait for a message, and take what else is there: larger inserts are several times cheaper. Empty at the end."""
        items: list[FrameMessage] = []
        item = self._queue.get()
        while item is not None:
            items.append(item)
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return items
        if items:
            self._queue.put(None)  # the end is met again, behind these
        return items

    def _insert_all(self, store: Any, items: list[FrameMessage]) -> None:
        """Events of one partition, node and boot together; task and loss rows by message."""
        groups: dict[tuple[int, str, str], list[FrameMessage]] = {}
        for item in items:
            frame = item.frame
            if frame.batch.num_rows == 0 or self._is_stored(store, item):
                continue
            if frame.kind == "events/1":
                groups.setdefault((item.message.partition, frame.node, frame.boot_id), []).append(item)
            else:
                self._insert_few(store, item)
        for (_, node, boot_id), group in groups.items():
            token = f"{group[0].message.token}-{group[-1].message.offset}/kernel_events"
            batch = _in_key_order([item.frame.batch for item in group])
            store.insert_events(batch, node=node, boot_id=boot_id, token=token, clocks=group[-1].frame.clocks)
            self._metrics.rows.labels("kernel_events").inc(batch.num_rows)

    def _insert_few(self, store: Any, item: FrameMessage) -> None:
        frame = item.frame
        table, insert = ("tasks", store.insert_tasks) if frame.kind == "tasks/1" else ("losses", store.insert_losses)
        token = f"{item.message.token}/{table}"
        insert(frame.batch, node=frame.node, boot_id=frame.boot_id, token=token, clocks=frame.clocks)
        self._metrics.rows.labels(table).inc(frame.batch.num_rows)

    def _is_stored(self, store: Any, item: FrameMessage) -> bool:
        """Whether an earlier run wrote these events behind its last recorded position.

        Inserts of a partition are in order and each is whole or absent, so the first message that is not there ends the search.
        """
        frame, partition = item.frame, item.message.partition
        if frame.kind != "events/1" or partition in self._caught_up:
            return False
        first = {name: frame.batch.column(name)[0].as_py() for name in ("time_mono_ns", "kind", "cpu", "seq")}
        if store.holds_event(frame.node, frame.boot_id, **first):
            return True
        self._caught_up.add(partition)
        return False


def _in_key_order(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """One batch, sorted by second, kind, CPU and number, as the table is: the server need not sort it again."""
    columns = {name: np.concatenate([b.column(name).to_numpy() for b in batches]) for name in EVENT_COLUMNS}
    second = columns["time_mono_ns"] // 1_000_000_000
    order = np.lexsort((columns["seq"], columns["cpu"], columns["kind"], second))
    return columns_to_arrow({name: column[order] for name, column in columns.items()})


class Documents:
    """Operations, verdicts and edges to ClickHouse, gathered until the epoch closes or there are many."""

    def __init__(self, settings: Settings, metrics: FlowMetrics) -> None:
        from sinks.clickhouse import ClickHouseStore

        self._store = ClickHouseStore(settings.clickhouse)
        self._metrics = metrics
        self._items: list[Judgement | Submission] = []

    def write(self, items: Sequence[Judgement | Submission]) -> None:
        """Gather."""
        self._items.extend(items)
        if len(self._items) >= _BUFFERED_ITEMS:
            self.confirm()

    def confirm(self) -> None:
        """Insert what was gathered."""
        items, self._items = self._items, []
        # One verdict an operation: rows of one insert have one time, and the latest time is what counts.
        judged = list({i.key: i for i in items if isinstance(i, Judgement)}.values())
        edges = [e for j in judged for e in j.edges]
        operations = [i.operation.row() for i in items if isinstance(i, Submission)]
        for table, rows, insert in (
            ("operations", operations, self._store.insert_operations),
            ("causal_edges", edges, self._store.insert_edges),
            # The verdict comes last: whoever finds it finds its edges.
            ("verdicts", [j.verdict for j in judged], self._store.insert_verdicts),
        ):
            if rows:
                insert(rows)
                self._metrics.rows.labels(table).inc(len(rows))

    def close(self) -> None:
        """Close the connection."""
        self._store.close()


class Graph:
    """Verdicts and edges to Neo4j, gathered likewise."""

    def __init__(self, settings: Settings) -> None:
        from sinks.graph import GraphStore

        self._store = GraphStore(settings.neo4j)
        self._items: dict[str, Judgement] = {}

    def write(self, items: Sequence[Judgement]) -> None:
        """Gather; of one operation the last verdict counts."""
        self._items.update((item.key, item) for item in items)
        if len(self._items) >= _BUFFERED_ITEMS:
            self.confirm()

    def confirm(self) -> None:
        """Write what was gathered."""
        items, self._items = list(self._items.values()), {}
        if items:
            self._store.write([i.verdict for i in items], [e for i in items for e in i.edges])

    def close(self) -> None:
        """Close the connection."""
        self._store.close()


class Topics:
    """Verdicts, edges and dead letters to their topics: sent at once, confirmed when the epoch closes."""

    def __init__(self, settings: Settings) -> None:
        from sinks.topics import TopicWriter

        self._flow: FlowSettings = settings.flow
        self._writer = TopicWriter(settings.kafka, **{"linger.ms": 5})

    def write(self, items: Sequence[Judgement | DeadLetter | NodeSeen]) -> None:
        """Send; edges before their verdict."""
        for item in items:
            if isinstance(item, DeadLetter):
                self._send_dead_letter(item)
                continue
            if isinstance(item, NodeSeen):
                seen = orjson.dumps({"schema": NODE_SCHEMA, "node": item.node})
                self._writer.send(self._flow.operations_topic, item.node, seen)
                continue
            for edge in item.edges:
                self._writer.send(self._flow.edges_topic, item.key, orjson.dumps({"schema": EDGE_SCHEMA, **edge}))
            self._writer.send(self._flow.verdicts_topic, item.key, orjson.dumps(item.verdict))

    def _send_dead_letter(self, letter: DeadLetter) -> None:
        message = letter.message
        headers = [
            ("reason", letter.reason.encode()),
            ("topic", message.topic.encode()),
            ("partition", str(message.partition).encode()),
            ("offset", str(message.offset).encode()),
        ]
        self._writer.send(self._flow.deadletter_topic, message.key, message.value, headers)

    def confirm(self) -> None:
        """Wait for the broker's word on every message."""
        self._writer.flush()

    def close(self) -> None:
        """Flush."""
        self._writer.close()


def migrate(settings: Settings) -> None:
    """Bring the schemas that this flow writes to up to date. Raises StoreError."""
    from sinks.clickhouse import ClickHouseStore
    from sinks.graph import GraphStore

    if settings.flow.raw_rows or settings.flow.stores:
        store = ClickHouseStore(settings.clickhouse)
        try:
            store.migrate()
        finally:
            store.close()
    if settings.flow.neo4j and settings.flow.stores:
        graph = GraphStore(settings.neo4j)
        try:
            graph.migrate()
        finally:
            graph.close()
