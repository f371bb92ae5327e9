"""Reading a topic into a flow: whole messages, the offset as state, never a silent gap.

One partition of the topic is one partition of the source. Its state is the next offset to read, and the *rewind* offset:
where the messages begin whose time lies within the retention before the newest. State that is large (kernel events of two
minutes) is not put into snapshots; after a restart the messages from the rewind offset on are read again, marked
`replayed`, and only rebuild it.

Guarantees
- Positions are those of the flow's own snapshots. Offsets are committed to the group only so that lag tools see them.
- A position that retention has removed ends the flow with an error that says how many messages are missing, or, with
  `on_gap: continue`, goes on behind the gap, counted in `kprobe_flow_gap_messages`; the hole in the events' own numbers
  then shows in every verdict it touches. librdkafka never chooses an offset by itself (`auto.offset.reset=error`).
- `Gate`: raw messages wait until the operations that were already announced are in, so that after a long pause (or in a
  rebuild) no operation arrives after its events have been forgotten.
- A SIGTERM (`flows.shutdown`) ends every partition at its position.

Errors are StoreError with the broker's address and the remedy. Broker outages are waited for: librdkafka reconnects.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from bytewax.inputs import FixedPartitionedSource, StatefulSourcePartition

from events.errors import StoreError
from events.settings import FlowSettings, KafkaSettings
from flows import shutdown
from flows.messages import Message
from flows.metrics import FlowMetrics

__all__ = ["Clock", "Gate", "Position", "TopicSource"]

# Everything that decides about loss, position, memory and time is written out.
_OPTIONS: Final[dict[str, Any]] = {
    "client.id": "kprobe-flow",
    "security.protocol": "plaintext",
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "auto.offset.reset": "error",
    "enable.partition.eof": True,
    "isolation.level": "read_committed",
    "check.crcs": True,
    "allow.auto.create.topics": False,
    "fetch.min.bytes": 1,
    "fetch.wait.max.ms": 50,
    "fetch.error.backoff.ms": 100,
    "fetch.max.bytes": 67108864,
    "max.partition.fetch.bytes": 16777216,
    "message.max.bytes": 16777216,
    "receive.message.max.bytes": 134217728,
    "queued.min.messages": 100,
    "queued.max.messages.kbytes": 65536,
    "socket.timeout.ms": 15000,
    "socket.keepalive.enable": True,
    "reconnect.backoff.ms": 100,
    "reconnect.backoff.max.ms": 2000,
    "statistics.interval.ms": 0,
    "log_level": 0,
}
_ADMIN_TIMEOUT_S: Final = 20.0
_RETRY_S: Final = 0.2
_SETTLE_S: Final = 1.5  # an epoch is usually shorter; nobody should wait for one of ten seconds
_IDLE: Final = timedelta(milliseconds=4)
_FATAL: Final = frozenset({"_AUTO_OFFSET_RESET", "OFFSET_OUT_OF_RANGE"})
_MARK_NS: Final = 500_000_000  # rewind offsets are remembered once in so much time

# The times of a message: whose clock, its time on that clock, and a time on one that all share; None if it tells none.
Clock = Callable[[Message], tuple[str, int, int] | None]


@dataclass(frozen=True, slots=True)
class Position:
    """The state of one partition."""

    next_offset: int
    rewind_offset: int


class Gate:
    """Holds back one source until another one has read what was there when the flow started.

    Without such a backlog it opens at once. With one it opens an epoch later (at most 1.5 s): by then every worker has it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reading: set[int] = set()
        self._expected: int | None = None
        self.had_backlog = False

    def expect(self, partitions: int) -> None:
        """How many partitions have a say (in a cluster some of them speak in other processes)."""
        with self._lock:
            self._expected = partitions

    def enter(self, partition: int, *, backlog: bool) -> None:
        """A partition starts reading."""
        with self._lock:
            self._expected = (self._expected or 1) - 1
            self.had_backlog |= backlog
            if backlog:
                self._reading.add(partition)

    def leave(self, partition: int) -> None:
        """A partition has read its backlog."""
        with self._lock:
            self._reading.discard(partition)

    def open(self, waited_s: float) -> bool:
        """Whether everybody is in. Partitions of other processes never report here: those are waited for a second."""
        with self._lock:
            return not self._reading and ((self._expected is not None and self._expected <= 0) or waited_s > 1.0)


class _Rewind:
    """Where the messages of the last `retention_ns` begin, over all clocks that speak in one partition."""

    def __init__(self, retention_ns: int) -> None:
        self._retention_ns = retention_ns
        self._marks: dict[str, deque[tuple[int, int]]] = {}
        self._newest: dict[str, tuple[int, int]] = {}
        self._latest_shared_ns = 0

    def saw(self, offset: int, clock: str, own_ns: int, shared_ns: int) -> None:
        """Message `offset` tells of times up to `own_ns` on `clock`."""
        marks = self._marks.setdefault(clock, deque())
        if not marks or own_ns - marks[-1][1] >= _MARK_NS:
            marks.append((offset, own_ns))
        newest = max(own_ns, self._newest.get(clock, (0, 0))[0])
        self._newest[clock] = (newest, shared_ns)
        self._latest_shared_ns = max(self._latest_shared_ns, shared_ns)
        while len(marks) > 1 and marks[1][1] < newest - self._retention_ns:
            marks.popleft()

    def offset(self, position: int) -> int:
        """The rewind offset; clocks that have been silent for ten retentions no longer count."""
        silent_ns = self._latest_shared_ns - 10 * self._retention_ns
        for clock in [c for c, (_, shared_ns) in self._newest.items() if shared_ns < silent_ns]:
            del self._marks[clock], self._newest[clock]
        return min((marks[0][0] for marks in self._marks.values()), default=position)


@dataclass(frozen=True)
class TopicSource(FixedPartitionedSource[Message, Position]):
    """All partitions of `topic`, or with `shared` those that belong to this process (`flow.processes`, `flow.process`)."""

    topic: str
    kafka: KafkaSettings
    flow: FlowSettings
    metrics: FlowMetrics
    gate: Gate
    clock: Clock | None = None  # None: nothing is ever read again
    rewind_margin_ns: int = 0  # beyond the retention
    waits: bool = False  # held back by the gate, instead of being what the gate waits for
    shared: bool = False
    on_start: Callable[[], None] = field(default=lambda: None)
    on_partitions: Callable[[int], None] = field(default=lambda _: None)

    def list_parts(self) -> list[str]:
        """The partitions there are now. Raises StoreError if the topic or the broker is missing."""
        consumer = _consumer(self.kafka, self.flow.group)
        try:
            partitions = _partitions_of(consumer, self.topic, self.kafka.bootstrap_servers)
        finally:
            consumer.close()
        self.on_partitions(len(partitions))
        if not self.waits:
            self.gate.expect(len(partitions))
        if self.shared:
            partitions = [p for p in partitions if p % self.flow.processes == self.flow.process]
        return [f"{p:05d}" for p in partitions]

    def build_part(self, _step_id: str, for_part: str, resume_state: Position | None) -> "_Partition":
        """Open one partition at its position."""
        self.on_start()
        return _Partition(self, int(for_part), resume_state)


class _Partition(StatefulSourcePartition[Message, Position]):
    def __init__(self, source: TopicSource, partition: int, resume: Position | None) -> None:
        self._source, self._partition = source, partition
        self._consumer = _consumer(source.kafka, source.flow.group)
        low, self._end = self._watermarks()
        self._position, self._stored = self._start(low, resume)
        self._first = self._position
        self._rewind = _Rewind(int(source.flow.retention_s * 1e9) + source.rewind_margin_ns)
        self._labels = (source.topic, str(partition))
        self._started_s = time.monotonic()
        self._held = source.waits
        self._open_s: float | None = None
        self._epochs = self._open_epoch = 0
        self._at_end = self._idle = False
        self._assign()
        if not source.waits:
            source.gate.enter(partition, backlog=self._position < self._end)
            self._in_backlog = self._position < self._end
        else:
            self._in_backlog = False

    # --- position

    def _watermarks(self) -> tuple[int, int]:
        from confluent_kafka import KafkaException, TopicPartition

        target = TopicPartition(self._source.topic, self._partition)
        deadline_s = time.monotonic() + _ADMIN_TIMEOUT_S
        while True:
            try:
                low, high = self._consumer.get_watermark_offsets(target, timeout=_ADMIN_TIMEOUT_S)
                return int(low), int(high)
            except KafkaException as error:  # a topic made a moment ago has no leader yet
                if time.monotonic() > deadline_s:
                    what = f"cannot ask for the offsets of {self._name}: {error.args[0].str()}"
                    raise _failure(self._source.kafka, what) from error
            time.sleep(_RETRY_S)

    def _start(self, low: int, resume: Position | None) -> tuple[int, int]:
        """Where to read from, and from where on messages are new."""
        if resume is None:
            first = low if self._source.flow.start == "earliest" else self._end
            return first, first
        if resume.next_offset > self._end:
            raise _failure(
                self._source.kafka,
                f"{self._name} ends at offset {self._end}, before the stored position {resume.next_offset}: the topic was "
                f"made anew; remove the recovery folder to start at its beginning (what is stored already stays single)",
            )
        stored = resume.next_offset
        if stored < low:
            stored = self._gap(stored, low)
        return max(low, min(resume.rewind_offset, stored)), stored

    def _gap(self, position: int, low: int) -> int:
        """Messages between `position` and `low` are gone. Raises StoreError unless told to go on."""
        count = low - position
        span = f"offsets {position} to {low - 1}"
        what = f"{count} messages of {self._name} ({span}) were removed by retention before they were read"
        if self._source.flow.on_gap == "stop":
            raise _failure(
                self._source.kafka,
                f"{what}; to go on behind the gap set flow.on_gap to continue (KPROBE_FLOW__ON_GAP=continue): verdicts that "
                "the gap touches will say that evidence is lost",
            )
        self._source.metrics.gap.labels(self._source.topic, str(self._partition)).inc(count)
        print(f"kprobe: flow: {what}; going on at offset {low}", flush=True)
        return low

    @property
    def _name(self) -> str:
        return f"{self._source.topic}/{self._partition}"

    def _assign(self) -> None:
        from confluent_kafka import TopicPartition

        self._consumer.assign([TopicPartition(self._source.topic, self._partition, self._position)])

    # --- reading

    def next_batch(self) -> Iterable[Message]:
        """What has arrived, up to `flow.max_batch_messages`; never waits."""
        self._source.metrics.alive()
        if shutdown.requested():
            raise StopIteration
        self._idle = not self._may_read()
        if self._idle:
            return []
        batch = self._take()
        self._idle = not batch
        self._leave_backlog()
        if not batch and self._source.flow.stop_at_end and (self._at_end or self._position >= self._end):
            raise StopIteration
        return batch

    def _may_read(self) -> bool:
        """Whether the gate lets this partition read; once it does, it always does."""
        if self._held:
            now_s = time.monotonic()
            if self._open_s is None and self._source.gate.open(now_s - self._started_s):
                self._open_s, self._open_epoch = now_s, self._epochs
            if self._open_s is not None:
                settled = self._epochs > self._open_epoch or now_s - self._open_s > _SETTLE_S
                self._held = self._source.gate.had_backlog and not settled
        return not self._held

    def _leave_backlog(self) -> None:
        if self._in_backlog and self._position >= self._end:
            self._in_backlog = False
            self._source.gate.leave(self._partition)

    def _take(self) -> list[Message]:
        batch: list[Message] = []
        for received in self._consumer.consume(self._source.flow.max_batch_messages, timeout=0):
            error = received.error()
            if error is not None:
                self._handle(error)
                continue
            batch.append(self._message(received))
        if batch:
            self._count(batch)
        return batch

    def _message(self, received: Any) -> Message:
        offset = int(received.offset())
        message = Message(
            self._source.topic,
            self._partition,
            offset,
            received.key() or b"",
            received.value() or b"",
            int(received.timestamp()[1]),
            replayed=offset < self._stored,
        )
        self._position = offset + 1
        if self._source.clock is not None and (told := self._source.clock(message)) is not None:
            self._rewind.saw(offset, *told)
        return message

    def _handle(self, error: Any) -> None:
        """An event of the consumer that is not a message. Temporary ones are librdkafka's to retry."""
        if error.name() == "_PARTITION_EOF":
            self._at_end = True
            self._position = max(self._position, min(self._end, self._position_of_consumer()))
        elif error.name() in _FATAL:
            low, self._end = self._watermarks()
            self._position = self._stored = self._gap(self._position, low)
            self._assign()
        elif error.fatal() or error.name() in ("TOPIC_AUTHORIZATION_FAILED", "UNKNOWN_TOPIC_OR_PART", "_AUTHENTICATION"):
            raise _failure(self._source.kafka, f"cannot read {self._name}: {error.str()}")

    def _position_of_consumer(self) -> int:
        """The consumer's position: also behind records that are no messages (transaction markers)."""
        from confluent_kafka import TopicPartition

        found = self._consumer.position([TopicPartition(self._source.topic, self._partition)])
        return int(found[0].offset)

    def _count(self, batch: list[Message]) -> None:
        from confluent_kafka import TopicPartition

        metrics = self._source.metrics
        self._at_end = False
        metrics.messages.labels(*self._labels).inc(len(batch))
        metrics.bytes.labels(*self._labels).inc(sum(len(m.value) for m in batch))
        metrics.replayed.inc(sum(m.replayed for m in batch))
        metrics.position.labels(*self._labels).set(self._position)
        _, high = self._consumer.get_watermark_offsets(TopicPartition(self._source.topic, self._partition), cached=True)
        metrics.lag.labels(*self._labels).set(max(0, high - self._position))

    def next_awake(self) -> datetime | None:
        """At once while messages come, a few milliseconds later while they do not."""
        return datetime.now(UTC) + _IDLE if self._idle else None

    # --- state

    def snapshot(self) -> Position:
        """The next offset, and where to rewind to."""
        self._epochs += 1
        self._commit()
        if self._position < self._stored:  # still reading again: what was to be rewound then is to be rewound now
            return Position(self._stored, self._first)
        return Position(self._position, self._rewind.offset(self._position))

    def _commit(self) -> None:
        """Tell the group where we are, for lag tools; nothing depends on it, so that an error is of no consequence."""
        from contextlib import suppress

        from confluent_kafka import KafkaException, TopicPartition

        if self._position > 0:
            target = TopicPartition(self._source.topic, self._partition, self._position)
            with suppress(KafkaException):
                self._consumer.commit(offsets=[target], asynchronous=True)

    def close(self) -> None:
        """Leave the broker."""
        self._consumer.close()


def _consumer(kafka: KafkaSettings, group: str) -> Any:
    from confluent_kafka import Consumer

    return Consumer({**_OPTIONS, **kafka.extra, "bootstrap.servers": kafka.bootstrap_servers, "group.id": group})


def _partitions_of(consumer: Any, topic: str, address: str) -> list[int]:
    from confluent_kafka import KafkaException

    try:
        found = consumer.list_topics(topic, timeout=_ADMIN_TIMEOUT_S).topics[topic]
    except KafkaException as error:
        raise StoreError(
            f"Kafka at {address}: no answer in {_ADMIN_TIMEOUT_S:.0f} s ({error.args[0].str()}); is it running? `kprobe up` "
            "starts a local one, kafka.bootstrap_servers says where it is"
        ) from error
    if found.error is not None or not found.partitions:
        raise StoreError(f"Kafka at {address}: topic {topic} does not exist; `kprobe up` or `kprobe migrate` creates it")
    return sorted(int(p) for p in found.partitions)


def _failure(kafka: KafkaSettings, what: str) -> StoreError:
    return StoreError(f"Kafka at {kafka.bootstrap_servers}: {what}")
