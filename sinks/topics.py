"""Writing to Kafka without losing a message in silence.

The producer is idempotent (acks=all): the broker keeps a message once and in order however often it was retried. The delivery
report of every message is looked at; `flush` returns only when all are delivered and raises StoreError on the first that is
not. After such an error the writer is of no more use: its caller starts again from its last committed position, and readers
drop by identity what they see twice.

`extra` of the settings goes to librdkafka as it is and wins over everything here (SASL, TLS, sizes).
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from events.errors import StoreError
from events.settings import KafkaSettings

__all__ = ["TopicWriter"]

# Everything that decides about loss, order, duplicates, memory and time is written out: librdkafka's own defaults
# (no idempotence, five minutes until a message counts as undelivered) are not ours, and may change.
_OPTIONS: Final[Mapping[str, Any]] = {
    "client.id": "kprobe",
    "security.protocol": "plaintext",
    "enable.idempotence": True,
    "acks": "all",
    "retries": 2147483647,
    "max.in.flight.requests.per.connection": 5,
    "retry.backoff.ms": 100,
    "retry.backoff.max.ms": 1000,
    "message.timeout.ms": 30000,
    "request.timeout.ms": 10000,
    "socket.timeout.ms": 15000,
    "socket.keepalive.enable": True,
    "reconnect.backoff.ms": 100,
    "reconnect.backoff.max.ms": 2000,
    "linger.ms": 20,
    "batch.size": 1048576,
    "batch.num.messages": 10000,
    "compression.type": "zstd",
    "compression.level": 1,
    "message.max.bytes": 16777216,
    "queue.buffering.max.messages": 100000,
    "queue.buffering.max.kbytes": 131072,
    "partitioner": "murmur2_random",  # as Java's: other producers put the same key into the same partition
    "statistics.interval.ms": 0,
    "log_level": 0,
}
_POLL_S: Final = 0.1


class TopicWriter:
    """A producer whose failures are errors. An instance belongs to one thread."""

    def __init__(self, settings: KafkaSettings, flush_timeout_s: float = 60.0, **options: Any) -> None:
        from confluent_kafka import Producer

        self._address = settings.bootstrap_servers
        self._flush_timeout_s = flush_timeout_s
        self._error: str = ""
        self._producer: Any = Producer(
            {**_OPTIONS, **options, **settings.extra, "bootstrap.servers": settings.bootstrap_servers}
        )

    def send(self, topic: str, key: bytes | str, value: bytes, headers: Sequence[tuple[str, bytes]] = ()) -> None:
        """Queue a message; waits while the queue is full, up to the flush time-out. Raises StoreError after any failure."""
        self._raise_if_failed()
        deadline = time.monotonic() + self._flush_timeout_s
        while True:
            try:
                self._producer.produce(topic, value, key, headers=list(headers), on_delivery=self._delivered)
                break
            except BufferError as error:
                self._producer.poll(_POLL_S)
                self._raise_if_failed()
                if time.monotonic() > deadline:
                    raise self._failure(f"its queue stayed full for {self._flush_timeout_s:.0f} s") from error
            except Exception as error:  # KafkaException: too large, unknown partition, fatal producer error
                raise self._failure(f"message for {topic} was not accepted: {error}") from error
        self._producer.poll(0)

    def flush(self) -> None:
        """Return when every message is delivered; raise StoreError on the first that is not."""
        left = self._producer.flush(self._flush_timeout_s)
        self._raise_if_failed()
        if left:
            raise self._failure(f"{left} messages undelivered after {self._flush_timeout_s:.0f} s")

    def close(self) -> None:
        """Flush, then forget the producer."""
        self.flush()

    def _delivered(self, error: Any, message: Any) -> None:
        if error is not None and not self._error:
            self._error = f"message for {message.topic()} was not delivered: {error.str()}"
            if error.name() in ("UNKNOWN_TOPIC_OR_PART", "_UNKNOWN_TOPIC"):
                self._error += " (`kprobe migrate` creates the topics)"

    def _raise_if_failed(self) -> None:
        if self._error:
            raise self._failure(self._error)

    def _failure(self, what: str) -> StoreError:
        self._error = self._error or what
        remedy = "is it running? `kprobe up` starts a local one, kafka.bootstrap_servers says where it is"
        return StoreError(f"Kafka at {self._address}: {what}; {remedy}")
