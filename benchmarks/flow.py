"""How fast the flow folds: Kafka to edges, with ClickHouse rows, with two processes; beside a bare consumer and plain Bytewax.

    python -m benchmarks.flow [--events 6000000] [--rounds 3] [--capture FILE.kcap] [--json FILE]

Events are those of a real recording (recorded now if `--capture` gives none: pipes and switches between two processes),
tiled on the time axis into frames of 16384 events, one node a partition. Each round runs, one after the other on the same
topic: a plain `consume()` loop (the upper bound), the flow without stores, with raw rows, as two processes on two
partitions, and Bytewax's own KafkaSource with one item an event (a smaller sample: it is slow). The rate of the flow is
taken between its first and its last event, from its own `/metrics`; "a CPU second" is what is left of it when the
machine does other things too; the table has medians. The servers of `kprobe up` must
run; topics and database are removed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from events.frames import Clocks, Frame, Watermark, events_frame
from events.settings import Settings, load
from probe.capture import CaptureReader

FRAME_EVENTS = 16384
ITEM_EVENTS = 40 * FRAME_EVENTS  # of the item-wise peer
BARS = {"flow": 3e6, "flow + rows": 0.8e6, "two processes / one": 1.8}
LOAD = """
import os, sys, time
a, b = os.pipe(), os.pipe()
if os.fork() == 0:
    while os.read(a[0], 1): os.write(b[1], b"x")
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end: os.write(a[1], b"x"); os.read(b[0], 1)
os.kill(0, 15)
"""

Columns = dict[str, Any]


def recorded(capture: Path | None, folder: Path) -> list[Frame]:
    """The frames of a recording, made now if there is none."""
    if capture is None:
        capture = folder / "load.kcap"
        command = [sys.executable, "-m", "cli.main", "record", "-q", "-o", str(capture), "--", sys.executable, "-c", LOAD, "3"]
        subprocess.run(command, check=False, stdout=subprocess.DEVNULL, start_new_session=True)
    return list(CaptureReader(capture).frames())


class Tiles:
    """A recording repeated end to end: the events of copy k are k spans later, their numbers go on."""

    def __init__(self, frames: list[Frame]) -> None:
        parts = [f.events() for f in frames if f.kind == "events/1"]
        columns = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        order = np.lexsort((columns["seq"], columns["time_mono_ns"]))
        self.columns: Columns = {name: column[order] for name, column in columns.items()}
        time_ns = self.columns["time_mono_ns"]
        self.first_mono_ns, self.span_ns = int(time_ns[0]), int(time_ns[-1] - time_ns[0]) + 1000
        self.numbers = np.zeros(int(self.columns["cpu"].max()) + 1, np.uint64)
        np.maximum.at(self.numbers, self.columns["cpu"], self.columns["seq"] + np.uint64(1))
        self.others = [f for f in frames if f.kind in ("session/1", "tasks/1")]

    def frames(self, node: str, events: int) -> Iterator[bytes]:
        """Encoded frames of `node` with `events` events."""
        number = 0
        for frame in self.others:
            yield self.frame(node, number, self.first_mono_ns, frame).encode()
            number += 1
        sent = copy = 0
        while sent < events:
            shifted = self._copy(copy)
            for at in range(0, min(len(shifted["seq"]), events - sent), FRAME_EVENTS):
                part = {n: c[at : min(at + FRAME_EVENTS, at + events - sent)] for n, c in shifted.items()}
                head = {"node": node, "boot_id": "b" * 32, "recording": node, "number": number}
                yield events_frame(part, **head, **_marks(int(part["time_mono_ns"][-1]))).encode()
                number, sent = number + 1, sent + len(part["seq"])
            copy += 1

    def _copy(self, copy: int) -> Columns:
        shifted = dict(self.columns)
        shifted["time_mono_ns"] = self.columns["time_mono_ns"] + copy * self.span_ns
        shifted["seq"] = self.columns["seq"] + np.uint64(copy) * self.numbers[self.columns["cpu"]]
        return shifted

    def frame(self, node: str, number: int, now_ns: int, like: Frame) -> Frame:
        """A session or task frame as if `node` had sent it."""
        head = {"node": node, "boot_id": "b" * 32, "recording": node, "number": number}
        return Frame(kind=like.kind, batch=like.batch, body=like.body, **head, **_marks(now_ns))


def _marks(now_ns: int) -> dict[str, Any]:
    return {"clocks": Clocks(now_ns, now_ns, time.time_ns()), "watermark": Watermark(now_ns)}


@contextmanager
def topics(settings: Settings, partitions: int = 2) -> Iterator[dict[str, str]]:
    """Topics and database of this run's own, removed at its end."""
    from confluent_kafka.admin import AdminClient, NewTopic

    from sinks.clickhouse import ClickHouseStore

    tag = uuid.uuid4().hex[:8]
    names = {n: f"bench.{tag}.{n}" for n in ("raw", "operations", "edges", "verdicts", "deadletter")}
    admin = AdminClient({"bootstrap.servers": settings.kafka.bootstrap_servers, "log_level": 0})
    for future in admin.create_topics([NewTopic(t, partitions, 1) for t in names.values()]).values():
        future.result(30)
    try:
        yield names
    finally:
        for future in admin.delete_topics(list(names.values())).values():
            future.result(30)
        store = ClickHouseStore(settings.clickhouse)
        store.client.execute("DROP DATABASE IF EXISTS kprobe_bench", database="")
        store.close()


def fill(settings: Settings, topic: str, tiles: Tiles, events: int) -> int:
    """Send `events` events to each of two partitions; returns the bytes sent."""
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": settings.kafka.bootstrap_servers, "message.max.bytes": 16777216, "linger.ms": 5})
    sent = 0
    for partition in range(2):
        for data in tiles.frames(f"bench-{partition}", events):
            sent += len(data)
            while True:
                with suppress(BufferError):
                    producer.produce(topic, data, f"bench-{partition}", partition)
                    break
                producer.poll(0.05)
    if producer.flush(120):
        raise SystemExit("the broker did not take all messages")
    return sent


class Flow:
    """One flow process under measurement."""

    def __init__(self, settings: Settings, names: dict[str, str], port: int, folder: Path, **flow: Any) -> None:
        recovery = folder / uuid.uuid4().hex
        recovery.mkdir()
        subprocess.run([sys.executable, "-m", "bytewax.recovery", str(recovery), "1"], check=True)
        self.port = port
        values = {**{f"{n}_topic": t for n, t in names.items()}, "listen": f"127.0.0.1:{port}", "neo4j": False, **flow}
        environment = os.environ | {f"KPROBE_FLOW__{k.upper()}": str(v) for k, v in values.items()}
        environment |= {"KPROBE_KAFKA__BOOTSTRAP_SERVERS": settings.kafka.bootstrap_servers}
        environment |= {"KPROBE_CLICKHOUSE__URL": settings.clickhouse.url, "KPROBE_CLICKHOUSE__DATABASE": "kprobe_bench"}
        command = [sys.executable, "-m", "bytewax.run", "flows.causal", "-r", str(recovery), "-s", "1", "-b", "0"]
        self.process = subprocess.Popen(command, env=environment)

    def lines(self) -> list[str]:
        """The metrics that it publishes; none while it starts."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as answer:
                return list(answer.read().decode().splitlines())
        except OSError:
            if self.process.poll() is not None:
                raise SystemExit(f"the flow ended with status {self.process.returncode}") from None
            return []

    def value(self, metric: str, labels: str = "") -> float:
        """The sum of one metric over all labels that contain `labels`."""
        named = [line for line in self.lines() if line.startswith((f"{metric} ", f"{metric}{{")) and labels in line]
        return sum(float(line.rsplit(" ", 1)[1]) for line in named)

    def count(self, metric: str) -> int:
        """The sum of one counter over its labels; 0 while the process starts."""
        return int(self.value(metric))

    def buckets(self, metric: str, labels: str = "") -> list[tuple[float, float]]:
        """(upper limit, how many are below) of a histogram."""
        named = [line for line in self.lines() if line.startswith(f"{metric}_bucket{{") and labels in line]
        return [(float(line.split('le="')[1].split('"')[0]), float(line.rsplit(" ", 1)[1])) for line in named]

    def serves(self) -> bool:
        """Whether the process has begun to read."""
        return bool(self.lines())

    def cpu_s(self) -> float:
        """CPU time that the process has used."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def end(self) -> None:
        """Drain and stop."""
        self.process.terminate()
        self.process.wait(60)


def rate(flows: list[Flow], metric: str, wanted: int) -> tuple[float, float]:
    """Events a second, and a second of the flow's CPU time, from the first count to the last."""
    began: tuple[float, int, float] | None = None
    while True:
        count = sum(f.count(metric) for f in flows)
        now_s = time.monotonic()
        if began is None and count:
            began = (now_s, count, sum(f.cpu_s() for f in flows))
        if count >= wanted:
            break
        time.sleep(0.02)
    assert began is not None
    if began[1] >= wanted:
        raise SystemExit("too few events to measure: give more with --events")
    events = count - began[1]
    return events / (now_s - began[0]), events / (sum(f.cpu_s() for f in flows) - began[2])


def measure_flow(
    settings: Settings, names: dict[str, str], events: int, folder: Path, *, processes: int = 1, rows: bool = False
) -> tuple[float, float]:
    """Events a second of one process on one partition, or of two on two."""
    table = "kprobe_flow_rows_total" if rows else "kprobe_flow_events_total"
    with ExitStack() as stack:
        flows = []
        for index in range(processes):
            share = {"processes": 2, "process": index}
            flow = Flow(settings, names, 19570 + index, folder, stores=False, raw_rows=rows, **share)
            stack.callback(flow.end)
            flows.append(flow)
        return rate(flows, table, events * processes)


def measure_consume(settings: Settings, topic: str, events: int) -> float:
    """Events a second of a loop that only receives the messages of one partition."""
    from confluent_kafka import Consumer, TopicPartition

    consumer = Consumer({"bootstrap.servers": settings.kafka.bootstrap_servers, "group.id": "bench", "log_level": 0})
    target = TopicPartition(topic, 0, 0)
    _, high = consumer.get_watermark_offsets(target, timeout=30)
    consumer.assign([target])
    start_s = time.monotonic()
    seen = 0
    while seen < high:
        seen += len(consumer.consume(32, timeout=0.1))
    took_s = time.monotonic() - start_s
    consumer.close()
    return events / took_s


PEER = """
import sys, time
import bytewax.operators as op
from bytewax.connectors.kafka import KafkaSource
from bytewax.connectors.stdio import StdOutSink
from bytewax.dataflow import Dataflow
from bytewax.testing import run_main
from bytewax.outputs import DynamicSink, StatelessSinkPartition
from events.frames import Frame

servers, topic, wanted = sys.argv[1], sys.argv[2], int(sys.argv[3])
times = []
class Part(StatelessSinkPartition):
    seen = 0
    def write_batch(self, items):
        self.seen += len(items)
        times.append((time.monotonic(), self.seen))
        if self.seen >= wanted:
            (t0, n0), (t1, n1) = times[0], times[-1]
            print((n1 - n0) / (t1 - t0), flush=True)
            import os; os._exit(0)
class Sink(DynamicSink):
    def build(self, *_): return Part()
flow = Dataflow("peer")
messages = op.input("in", flow, KafkaSource([servers], [topic], batch_size=1))
def split(message):
    frame = Frame.decode(message.value)
    return frame.batch.to_pylist() if frame.kind == "events/1" else []
events = op.flat_map("split", messages, split)
keyed = op.key_on("key", events, lambda e: str(e["tid"]))
def wait(last, event):
    now = event["time_mono_ns"]
    return now, now - (last or now)
op.output("out", op.stateful_map("wait", keyed, wait), Sink())
run_main(flow)
"""


def measure_peer(settings: Settings, topic: str) -> float:
    """Events a second of Bytewax's own source with one item an event: decode, key, state."""
    command = [sys.executable, "-c", PEER, settings.kafka.bootstrap_servers, topic, str(ITEM_EVENTS)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=6_000_000, help="a partition")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--capture", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    settings = load()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name, topics(settings) as names:
        folder = Path(name)
        tiles = Tiles(recorded(arguments.capture, folder))
        sent = fill(settings, names["raw"], tiles, arguments.events)
        for _ in range(arguments.rounds):
            for what, value in measure_round(settings, names, arguments.events, folder):
                found.setdefault(what, []).append(value)
                print(f"{what:26} {value / 1e6:8.2f} M events/s", file=sys.stderr, flush=True)
    report(found, sent / (2 * arguments.events), arguments.json)


def measure_round(settings: Settings, names: dict[str, str], events: int, folder: Path) -> Iterator[tuple[str, float]]:
    """One of each."""
    yield "consume() loop", measure_consume(settings, names["raw"], events)
    wall, cpu = measure_flow(settings, names, events, folder)
    yield "flow", wall
    yield "flow, a CPU second", cpu
    yield "flow, two processes", measure_flow(settings, names, events, folder, processes=2)[0]
    wall, cpu = measure_flow(settings, names, events, folder, rows=True)
    yield "flow + rows", wall
    yield "flow + rows, a CPU second", cpu
    yield "Bytewax item-wise", measure_peer(settings, names["raw"])


def report(found: dict[str, list[float]], bytes_an_event: float, path: Path | None) -> None:
    """Print the table; write JSON."""
    medians = {what: statistics.median(values) for what, values in found.items()}
    print(f"{'':26} {'median':>8} {'best':>8}   M events/s ({len(found['flow'])} rounds, {bytes_an_event:.1f} B an event)")
    for what, values in found.items():
        bar = f"   bar {BARS[what] / 1e6:.1f}" if what in BARS else ""
        print(f"{what:26} {medians[what] / 1e6:8.2f} {max(values) / 1e6:8.2f}{bar}")
    ratio = statistics.median(b / a for a, b in zip(found["flow"], found["flow, two processes"], strict=True))
    print(f"{'two processes / one':26} {ratio:8.2f}              bar {BARS['two processes / one']}")
    if path:
        path.write_text(json.dumps({"events_per_s": found, "medians": medians, "two_over_one": ratio}, indent=1))


if __name__ == "__main__":
    main()
