"""Real Kafka: nothing missing and order kept through an outage, a killed broker and a killed probe; drops are counted."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
from probe_synth import recording
from stack_fixture import stack_settings

from events.frames import Frame
from events.settings import KafkaSettings, ProbeSettings
from events.topics import RAW_TOPIC
from probe.producer import KafkaOutput

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.servers, pytest.mark.slow]
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    """A Kafka of our own, because it is stopped and killed here."""
    from stack.local import LocalStack

    settings = stack_settings(tmp_path_factory.mktemp("kafka"), partitions=2)
    servers = LocalStack(settings.stack, lambda line: print(line, file=sys.stderr))
    servers.servers = [s for s in servers.servers if s.name == "kafka"]
    servers.up()
    yield settings.kafka, servers
    servers.down()


def wait_until(condition, what, turn=lambda: None):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:.0f} s: {what}"
        turn()


def output_at(kafka, folder, node, **more):
    return KafkaOutput(kafka, ProbeSettings(spool_dir=folder, spool_fsync="never", **more), node)


def received(kafka, node, expected):
    """Frames of one node as a consumer sees them, until frame number `expected` has come."""
    from confluent_kafka import Consumer, TopicPartition

    consumer = Consumer(
        {
            "bootstrap.servers": kafka.bootstrap_servers,
            "group.id": uuid.uuid4().hex,
            "auto.offset.reset": "error",
            "enable.auto.commit": False,
            "check.crcs": True,
        }
    )
    consumer.assign([TopicPartition(RAW_TOPIC, p, 0) for p in (0, 1)])
    frames, partitions = [], set()
    deadline = time.monotonic() + DEADLINE_S
    while not any(f.number == expected for f in frames):
        assert time.monotonic() < deadline, f"frame {expected} did not come; got {[f.number for f in frames]}"
        message = consumer.poll(0.2)
        if message is not None and message.error() is None and message.key() == node.encode():
            frames.append(Frame.decode(message.value()))
            partitions.add(message.partition())
    consumer.close()
    assert len(partitions) == 1
    return frames


def in_order_and_whole(frames, numbers):
    """Each number once at least, first appearances in order (a frame in flight when Kafka went away may come twice)."""
    firsts = list(dict.fromkeys(f.number for f in frames))
    assert firsts == list(numbers)


def feed(output, frames):
    for sealed in frames:
        output.send(sealed)
        output.poll()
        assert output.account.violation() is None


def test_frames_arrive_once_and_in_order(broker, tmp_path):
    kafka, _ = broker
    sealed = list(recording(frames=60, rows=101))
    output = output_at(kafka, tmp_path, "plain")
    feed(output, sealed)
    output.finish(DEADLINE_S)

    frames = received(kafka, "plain", sealed[-1].number)

    assert [f.encode() for f in frames] == [s.data for s in sealed]
    assert (output.account.delivered, output.account.pending) == (60 * 101, 0)
    assert output.account.violation() is None


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_an_outage_in_mid_stream_loses_nothing(broker, tmp_path, how):
    kafka, servers = broker
    node = f"outage-{how}"
    source = iter(recording(frames=None, rows=101))
    output = output_at(kafka, tmp_path, node)
    feed(output, itertools.islice(source, 23))
    wait_until(lambda: output.account.pending == 0, "first frames are delivered", lambda: output.poll() or time.sleep(0.01))

    if how == "killed":
        os.kill(servers.pids()["kafka"], signal.SIGKILL)
    else:
        servers.down()
    feed(output, itertools.islice(source, 23))
    wait_until(lambda: output.away_since is not None, "the outage is noticed", lambda: output.poll() or time.sleep(0.01))
    assert "has been away" in output.health()
    feed(output, itertools.islice(source, 23))
    assert not output.spool.empty

    back = threading.Thread(target=servers.up)
    back.start()
    while back.is_alive():  # frames go on coming while Kafka starts
        feed(output, itertools.islice(source, 1))
        time.sleep(0.02)
    back.join()
    wait_until(lambda: output.spool.empty, "the spool is sent", lambda: output.poll() or time.sleep(0.01))
    assert output.health() is None
    feed(output, itertools.islice(source, 23))
    output.finish(DEADLINE_S)
    last = next(source).number - 1

    in_order_and_whole(received(kafka, node, last), range(last + 1))
    assert output.account.pending == 0
    assert output.account.dropped.total() == 0
    assert output.account.violation() is None


def nowhere():
    """An address at which nobody answers."""
    return KafkaSettings(bootstrap_servers="127.0.0.1:1")


def test_what_a_probe_leaves_behind_is_sent_by_the_next(broker, tmp_path):
    kafka, _ = broker
    sealed = list(recording(frames=30, rows=101))
    first = output_at(nowhere(), tmp_path, "restart")
    feed(first, sealed)
    first.finish(DEADLINE_S)
    assert (first.account.pending, first.account.delivered) == (30 * 101, 0)

    second = output_at(kafka, tmp_path, "restart")
    assert second.recovered_events == 30 * 101
    second.finish(DEADLINE_S)

    assert [f.number for f in received(kafka, "restart", sealed[-1].number)] == [s.number for s in sealed]
    assert second.account.violation() is None
    assert (second.account.delivered, second.account.pending) == (30 * 101, 0)


_PROBE = """
import sys
from pathlib import Path
from events.settings import KafkaSettings, ProbeSettings
from probe.producer import KafkaOutput
from probe_synth import recording
output = KafkaOutput(KafkaSettings(bootstrap_servers="127.0.0.1:1"), ProbeSettings(spool_dir=Path(sys.argv[1])), "killed-probe")
for frame in recording(frames=None, rows=101):
    output.send(frame)
    output.poll()
    if output.away_since is not None:
        print(frame.number, flush=True)
"""


def test_the_spool_of_a_killed_probe_is_sent_by_the_next(broker, tmp_path):
    """kill -9 while Kafka is away: every frame whose send had returned once the outage was noticed arrives."""
    kafka, _ = broker
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    child = subprocess.Popen([sys.executable, "-c", _PROBE, tmp_path], stdout=subprocess.PIPE, text=True, env=environment)
    numbers = [int(line) for line in itertools.islice(child.stdout, 97)]
    child.send_signal(signal.SIGKILL)
    numbers += [int(n) for n in child.stdout.read().split("\n")[:-1]]
    child.wait()
    child.stdout.close()

    output = output_at(kafka, tmp_path, "killed-probe")
    wait_until(lambda: output.spool.empty, "the spool is sent", lambda: output.poll() or time.sleep(0.01))
    output.finish(DEADLINE_S)

    frames = received(kafka, "killed-probe", numbers[-1])
    firsts = list(dict.fromkeys(f.number for f in frames))
    assert firsts == list(range(len(firsts)))
    assert firsts[-1] >= numbers[-1]


def test_a_frame_that_kafka_refuses_for_good_is_a_counted_loss(broker, tmp_path):
    kafka, _ = broker
    small = kafka.model_copy(update={"extra": {"message.max.bytes": "6000"}})
    sealed = list(recording(frames=3, rows=23))
    big = next(s for s in recording(frames=1, rows=2000) if s.kind == "events/1")
    output = output_at(small, tmp_path, "refused")
    feed(output, [*sealed[:3], big, *sealed[3:]])
    output.finish(DEADLINE_S)

    assert [f.number for f in received(kafka, "refused", sealed[-1].number)] == [s.number for s in sealed]
    assert output.account.dropped["producer"] == 2000
    assert output.account.violation() is None
    row = output.take_losses()[0]
    assert (row["reason"], row["hop"], row["count"]) == ("producer", "kafka", 2000)
    assert (row["from_mono_ns"], row["to_mono_ns"]) == (big.first_mono_ns, big.last_mono_ns)


def test_a_full_spool_is_counted_and_comes_back_as_a_loss_row(tmp_path):
    output = output_at(nowhere(), tmp_path, "full", spool_max_bytes=200_000)
    events = 0
    for sealed in recording(frames=300, rows=101):
        output.send(sealed)
        events += sealed.events
        if output.away_since is None:
            time.sleep(0.02)
        output.poll()
    wait_until(lambda: output.away_since is not None, "the outage is noticed", lambda: output.poll() or time.sleep(0.01))
    output.finish(0.0)

    dropped = output.account.dropped["spool_full"]
    assert dropped > 0
    assert output.account.accepted == events == output.account.pending + dropped
    assert sum(row["count"] for row in output.take_losses()) == dropped
    assert sum(p.stat().st_size for p in tmp_path.glob("*.spool")) <= 200_000


def test_memory_in_flight_is_bounded(tmp_path):
    """A producer queue of a megabyte holds a megabyte; the rest goes behind it into the spool, in order."""
    output = output_at(nowhere(), tmp_path, "bounded", producer_queue_max_bytes=1 << 20)
    for sealed in recording(frames=100, rows=2000):
        output.send(sealed)
        assert output.in_flight_bytes <= 1 << 20
    output.finish(0.0)
    again = output_at(nowhere(), tmp_path, "bounded")
    numbers = []
    while (sealed := again.spool.next()) is not None:
        numbers.append(sealed.number)
    assert numbers == list(range(102))
    again.finish(0.0)


def test_an_option_unknown_to_librdkafka_is_a_clear_error(tmp_path):
    from events.errors import ConfigError

    with pytest.raises(ConfigError, match=r"Kafka settings .*kafka\.extra.*No such configuration property"):
        output_at(KafkaSettings(extra={"sasl.mechansim": "PLAIN"}), tmp_path, "typo")
