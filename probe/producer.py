"""Frames to Kafka, in order, none lost unseen; to the spool while Kafka is away.

One message a frame on `kprobe.raw.v1`, key = node, so that a node's frames stay in one partition and in order. The producer is
idempotent (acks=all), and the delivery report of every message is looked at. In memory there are at most
`producer_queue_max_bytes` of frames not yet acknowledged; what does not fit goes to the spool behind them.

When nothing has been acknowledged for `_STALL_S` seconds Kafka counts as away: the frames in flight are put in front of the
spool (durable from then on), and a new producer asks with one frame at a time. With the first acknowledgement the spool is sent
from its front; new frames queue behind it, none overtakes. Frames that were in flight when Kafka went away may arrive twice;
events are known by (node, boot id, cpu, seq).

P1: accepted (sent to us, or found in the spool at the start) == delivered + pending (in flight, in the spool) + dropped by
reason: `spool_full`, `damaged` (spool bytes that failed their checksum), `producer` (a message that Kafka refuses for good).

Never raises for what a broker does; `health` says what is wrong. Fails with ProbeError if the spool folder cannot be used,
ConfigError for options that librdkafka does not know.
"""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from events.errors import ConfigError
from events.settings import KafkaSettings, ProbeSettings
from events.topics import RAW_TOPIC
from probe.accounts import Account
from probe.framing import Sealed
from probe.outputs import LossTally
from probe.spool import Spool

__all__ = ["KafkaOutput"]

_STALL_S: Final = 2.0
_POLL_S: Final = 0.02
# Everything that decides about loss, order, duplicates, memory and time is written out: the defaults of librdkafka (no
# idempotence, five minutes until a message fails) are not ours and may change.
_OPTIONS: Final[Mapping[str, Any]] = {
    "client.id": "kprobe-probe",
    "security.protocol": "plaintext",
    "enable.idempotence": True,
    "enable.gapless.guarantee": False,  # we keep order ourselves: on any failure everything goes back to the spool
    "acks": "all",
    "retries": 2147483647,
    "max.in.flight.requests.per.connection": 5,
    "message.timeout.ms": 0,  # never: when to give up on Kafka is decided here, and then the spool keeps the frame
    "request.timeout.ms": 10_000,
    "socket.timeout.ms": 15_000,
    "socket.keepalive.enable": True,
    "socket.connection.setup.timeout.ms": 5_000,
    "retry.backoff.ms": 100,
    "retry.backoff.max.ms": 1_000,
    "reconnect.backoff.ms": 100,
    "reconnect.backoff.max.ms": 1_000,
    "topic.metadata.propagation.max.ms": 10_000,
    "topic.metadata.refresh.interval.ms": 30_000,
    "topic.metadata.refresh.fast.interval.ms": 200,
    "allow.auto.create.topics": False,
    "linger.ms": 5,
    "batch.size": 1 << 20,
    "batch.num.messages": 1_000,
    "compression.type": "none",  # frames are compressed already
    "message.max.bytes": 16 << 20,
    "queue.buffering.max.messages": 100_000,
    "queue.buffering.backpressure.threshold": 1,
    "partitioner": "murmur2_random",  # as Java's: other producers put the same key into the same partition
    "statistics.interval.ms": 0,
    "log_level": 0,
}
# Errors of one message that will not go away by sending it again.
_REFUSED_FOR_GOOD: Final = ("MSG_SIZE_TOO_LARGE", "INVALID_MSG", "INVALID_MSG_SIZE", "INVALID_RECORD", "RECORD_LIST_TOO_LARGE")


@dataclass(slots=True)
class _Flight:
    """A frame handed to librdkafka. `verdict`: None while unknown, "" delivered, else the name of the error."""

    sealed: Sealed
    spooled: bool
    verdict: str | None = None


class KafkaOutput:
    """The live way out of the probe."""

    def __init__(self, kafka: KafkaSettings, settings: ProbeSettings, node: str) -> None:
        self.account = Account("kafka")
        self.spool = Spool(
            settings.spool_dir, max_bytes=settings.spool_max_bytes, drop=settings.spool_drop, fsync=settings.spool_fsync
        )
        self.recovered_events = self.spool.pending_events
        self.account.accepted = self.recovered_events
        self.away_since: float | None = None
        self.in_flight_bytes = 0
        self._key = node.encode()
        self._queue_max_bytes = settings.producer_queue_max_bytes
        self._address = kafka.bootstrap_servers
        self._options = {
            **_OPTIONS,
            "queue.buffering.max.kbytes": max(settings.producer_queue_max_bytes // 1024 * 2, 4096),
            **kafka.extra,
            "bootstrap.servers": kafka.bootstrap_servers,
            "error_cb": self._on_error,
        }
        self._flights: deque[_Flight] = deque()
        self._tally = LossTally("kafka")
        self._progress_s = time.monotonic()
        self._error = ""
        self._producer: Any = self._new_producer()
        self._settle()

    # --- what the agent calls

    def send(self, sealed: Sealed) -> None:
        """Take one frame: to Kafka if nothing waits before it and there is room, else to the spool."""
        self.account.accepted += sealed.events
        if not (self.spool.empty and self.away_since is None and self._produce(sealed, spooled=False)):
            self.spool.append(sealed)
        self._settle()

    def poll(self) -> None:
        """Look at delivery reports, notice that Kafka is away, send from the spool."""
        self._turn(0)

    def take_losses(self) -> list[dict[str, Any]]:
        """What was dropped since the last call."""
        return [*self._tally.take(), *self.spool.tally.take()]

    def finish(self, timeout_s: float) -> None:
        """Send what is pending as long as Kafka takes it; the rest stays in the spool for the next start."""
        deadline = time.monotonic() + timeout_s
        while (self._flights or not self.spool.empty) and time.monotonic() < deadline:
            self._turn(_POLL_S)
            if self.away_since is not None:
                break
        self._retreat()
        self._producer = None
        self.spool.close()
        self._settle()

    def health(self) -> str | None:
        """Since when Kafka is away and how much waits for it, or None."""
        if self.away_since is None:
            return None
        waiting = f"{self.spool.pending_events} events ({self.spool.size_bytes} bytes) wait in the spool"
        seconds = time.monotonic() - self.away_since
        return f"Kafka at {self._address} has been away for {seconds:.0f} s; {waiting}; {self._error}"

    # --- inside

    def _turn(self, wait_s: float) -> None:
        self._producer.poll(wait_s)
        self._reap()
        stalled = bool(self._flights) and time.monotonic() - self._progress_s > _STALL_S
        if stalled and self.away_since is None and self.spool.max_bytes:
            self._go_away("no acknowledgement")
        self._pump()
        self.spool.sync()
        self._settle()

    def _reap(self) -> None:
        """Take finished frames off the front; a failure sends everything that is not delivered back to the spool."""
        while self._flights and self._flights[0].verdict is not None:
            flight = self._flights[0]
            if flight.verdict == "":
                self.account.delivered += flight.sealed.events
                self.away_since = None
            elif flight.verdict in _REFUSED_FOR_GOOD:
                self._refuse(flight.sealed)
            else:
                self._go_away(flight.verdict or "")
                return
            self._flights.popleft()
            self.in_flight_bytes -= len(flight.sealed.data)
            self._progress_s = time.monotonic()
            if flight.spooled:
                self.spool.acknowledge()

    def _refuse(self, sealed: Sealed) -> None:
        self.account.dropped["producer"] += sealed.events
        self._tally.frame(sealed, "producer")

    def _pump(self) -> None:
        """From the spool to Kafka: one frame while Kafka is away, as many as fit otherwise."""
        while not (self.away_since is not None and self._flights) and self._room():
            sealed = self.spool.next()
            if sealed is None:
                return
            if not self._produce(sealed, spooled=True):
                self.spool.put_back()
                return

    def _room(self) -> bool:
        return self.in_flight_bytes < self._queue_max_bytes

    def _produce(self, sealed: Sealed, *, spooled: bool) -> bool:
        """Hand a frame to librdkafka; False if it has no room for it."""
        from confluent_kafka import KafkaException

        if self._flights and self.in_flight_bytes + len(sealed.data) > self._queue_max_bytes:
            return False
        flight = _Flight(sealed, spooled)
        if not self._flights:
            self._progress_s = time.monotonic()  # the wait for an acknowledgement begins now
        try:
            self._producer.produce(RAW_TOPIC, sealed.data, self._key, on_delivery=self._reporter(flight))
        except BufferError:
            return False
        except KafkaException as error:  # known at once: too large, unknown topic, fatal
            flight.verdict = error.args[0].name()
        self._flights.append(flight)
        self.in_flight_bytes += len(sealed.data)
        return True

    def _reporter(self, flight: _Flight) -> Any:
        def report(error: Any, _message: Any) -> None:
            flight.verdict = "" if error is None else error.name()

        return report

    def _go_away(self, why: str) -> None:
        if self.away_since is None:
            self.away_since = time.monotonic()
        self._error = self._error or why
        self._retreat()
        self._producer = self._new_producer()
        self._progress_s = time.monotonic()

    def _retreat(self) -> None:
        """Everything in flight and not delivered goes back to the front of the spool, in order."""
        if not self._flights:
            return
        self._producer.purge(in_queue=True, in_flight=True, blocking=False)
        while self._flights and self._flights[0].verdict == "":
            flight = self._flights.popleft()
            self.account.delivered += flight.sealed.events
            if flight.spooled:
                self.spool.acknowledge()
        direct = [f.sealed for f in self._flights if not f.spooled]
        self._flights.clear()
        self.in_flight_bytes = 0
        self.spool.rewind()
        self.spool.put_front(direct)

    def _new_producer(self) -> Any:
        from confluent_kafka import KafkaException, Producer

        try:
            return Producer(self._options)
        except KafkaException as error:
            raise ConfigError(f"Kafka settings (kafka.bootstrap_servers, kafka.extra): {error.args[0].str()}") from error

    def _on_error(self, error: Any) -> None:
        self._error = str(error.str())

    def _settle(self) -> None:
        """Bring the account up to date: what waits, what the spool gave up."""
        direct = sum(f.sealed.events for f in self._flights if not f.spooled)
        self.account.pending = self.spool.pending_events + direct
        self.account.dropped["spool_full"] = self.spool.dropped
        self.account.dropped["damaged"] = self.spool.damaged
