"""Fail the nth call, for every n: after the retry the stores hold the same, or an error was raised and a second try heals."""

import contextlib
import gc
import time
import uuid
import warnings
from urllib.parse import urlsplit

import pytest
import samples
from proxy import Proxy
from stack_fixture import free_ports

from events.errors import StoreError
from events.settings import KafkaSettings
from sinks.clickhouse import ClickHouseStore
from sinks.graph import GraphStore
from sinks.topics import TopicWriter

# A connection that breaks in mid-call leaves its socket to the garbage collector in Neo4j's driver (6.4): not our leak.
# One that breaks in its handshake is collected half made, and its `__del__` fails at what it lacks.
pytestmark = [
    pytest.mark.servers,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings(r"ignore:Exception ignored in. <function Bolt.__del__:pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings(r"ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning"),
]
WHERE = {"node": "node-1", "boot_id": samples.BOOT}
VERDICTS = [samples.verdict(n, culprit=samples.task(100 + n)) for n in range(3)]
EDGES = [e for v in VERDICTS for e in samples.edges(v)]


@pytest.fixture(autouse=True)
def _collect_what_the_driver_left():
    """Here, so that no later test is told of it."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        # A finaliser may revive what it finalises: twice, and the second finds what the first left.
        gc.collect()
        gc.collect()


@pytest.fixture
def proxied():
    """Make proxies to an address; closed at the end."""
    made = []

    def make(url):
        parts = urlsplit(url)
        made.append(Proxy(parts.hostname, parts.port))
        return made[-1]

    yield make
    for proxy in made:
        proxy.close()


def write_history(store):
    store.insert_events(samples.event_columns(1009, seed=5), **WHERE, token="raw-0-0-0")
    store.insert_tasks(
        samples.task_rows({"time_mono_ns": 1, "reason": "fork", "tid": 1, "start_boot_ns": 1}), **WHERE, token="t"
    )
    store.insert_verdicts(VERDICTS)
    store.insert_edges(EDGES)


def history_holds(store):
    events = store.events("node-1", samples.BOOT, 0, 2**62)
    ids = [v["operation_id"] for v in VERDICTS]
    return (
        events.num_rows,
        events.column("a0"),
        store.documents(),
        [store.edges(i) for i in ids],
        store.tasks("node-1", samples.BOOT, 9).num_rows,
    )


@pytest.mark.parametrize("when", ["request", "answer"])
def test_every_lost_call_to_clickhouse_is_made_good(own, history, proxied, when):
    write_history(history)
    expected, proxy = history_holds(history), proxied(own.clickhouse_url)
    calls = 4
    for number in range(1, calls + 2):
        database = f"{own.settings.clickhouse.database}_{when}_{number}"
        direct = ClickHouseStore(own.settings.clickhouse.model_copy(update={"database": database}))
        direct.migrate()
        broken = ClickHouseStore(direct.settings.model_copy(update={"url": f"http://127.0.0.1:{proxy.port}"}))
        proxy.break_at(number, when)

        write_history(broken)

        assert proxy.broken == (number <= calls), f"call {number} was to be broken"
        assert history_holds(direct) == expected, f"after call {number} was broken at its {when}"
        direct.client.execute(f"DROP DATABASE {database} SYNC", database="")
        direct.close()
        broken.close()


@pytest.mark.parametrize("when", ["request", "answer"])
def test_every_lost_call_to_neo4j_is_made_good_or_told(stack, graph, proxied, when):
    graph.write(VERDICTS, EDGES)
    expected, proxy, number, broken, told = graph.counts(), proxied(stack.bolt_uri), 0, True, 0
    while broken:
        number += 1
        graph.clear()
        settings = stack.settings.neo4j.model_copy(update={"uri": f"bolt://127.0.0.1:{proxy.port}"})
        with contextlib.closing(GraphStore(settings)) as store:
            proxy.break_at(number, when)
            try:
                store.write(VERDICTS, EDGES)
            except StoreError:  # an error is an honest outcome: the caller starts again
                told += 1
                store.write(VERDICTS, EDGES)
            broken = bool(proxy.broken)

        assert graph.counts() == expected, f"after message {number} was broken at its {when}"
    assert number > 5, "the sweep broke hardly anything"
    assert told < number


def test_messages_arrive_once_and_in_order(stack):
    from confluent_kafka import Consumer, TopicPartition

    key = uuid.uuid4().hex
    writer = TopicWriter(stack.settings.kafka)
    for n in range(1009):
        writer.send("kprobe.edges.v1", key, b"%d" % n, [("n", b"%d" % n)])
    writer.flush()

    consumer = Consumer({"bootstrap.servers": stack.kafka, "group.id": key, "log_level": 0})
    partitions = consumer.list_topics("kprobe.edges.v1", timeout=30).topics["kprobe.edges.v1"].partitions
    consumer.assign([TopicPartition("kprobe.edges.v1", p, 0) for p in partitions])
    values, deadline = [], time.monotonic() + 60
    while len(values) < 1009 and time.monotonic() < deadline:
        values += [m.value() for m in consumer.consume(500, 0.5) if m.key() == key.encode()]
    consumer.close()
    assert values == [b"%d" % n for n in range(1009)]


def test_an_undelivered_message_is_an_error_and_not_silence(stack):
    writer = TopicWriter(KafkaSettings(bootstrap_servers="127.0.0.1:9"), **{"message.timeout.ms": 1000, "linger.ms": 5})
    writer.send("kprobe.edges.v1", "k", b"v")
    with pytest.raises(
        StoreError, match=r"Kafka at 127\.0\.0\.1:9: message for kprobe\.edges\.v1 was not delivered.*kprobe up"
    ):
        writer.flush()
    with pytest.raises(StoreError):  # and it stays one
        writer.send("kprobe.edges.v1", "k", b"v")

    lost = TopicWriter(stack.settings.kafka, **{"message.timeout.ms": 1000, "linger.ms": 5})
    lost.send("kprobe.no.such.topic", "k", b"v")
    with pytest.raises(StoreError, match=r"kprobe\.no\.such\.topic was not delivered"):
        lost.flush()

    large = TopicWriter(stack.settings.kafka)
    with pytest.raises(StoreError, match="was not accepted"):
        large.send("kprobe.edges.v1", "k", b"x" * (17 << 20))


def test_a_full_queue_waits_and_then_tells():
    options = {"queue.buffering.max.messages": 2, "message.timeout.ms": 60000}
    writer = TopicWriter(KafkaSettings(bootstrap_servers="127.0.0.1:9"), flush_timeout_s=0.5, **options)
    with pytest.raises(StoreError, match="its queue stayed full"):
        for _ in range(3):
            writer.send("kprobe.edges.v1", "k", b"v")


def test_a_broker_that_comes_late_gets_everything(stack):
    """The first connection finds nobody; a second later there is somebody at that address who leads to the broker."""
    [port] = free_ports(1)
    writer = TopicWriter(KafkaSettings(bootstrap_servers=f"127.0.0.1:{port}"))
    for n in range(23):
        writer.send("kprobe.edges.v1", "late", b"%d" % n)
    host, kafka_port = stack.kafka.split(":")
    broker = Proxy(host, int(kafka_port), port)
    writer.flush()
    broker.close()
