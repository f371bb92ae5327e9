"""From a kernel event to its causal edge on the topic, at 100 000 events a second, with every store being written.

    python -m benchmarks.latency [--seconds 30] [--rate 100000] [--capture FILE.kcap] [--json FILE]

Slices of a real recording are sent as frames at the given rate, each moved on the time axis so that its last event happens
when the frame is sent (what the probe gathers before, up to `probe.batch_linger_ms`, comes on top). Ten times a second a
thread of the slice is announced as an operation. Measured: from the end of each causal edge, by its own kernel time, to its
arrival at a consumer of the edges topic. Printed beside it: where the time goes, hop by hop, from the flow's own metrics and
the time-stamps of its messages. The servers of `kprobe up` must run; topics and database are removed.
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from benchmarks.flow import Flow, Tiles, recorded, topics
from events.frames import Clocks, Watermark, events_frame
from events.settings import Settings, load
from sinks.topics import TopicWriter

TICK_S = 0.05
WARM_UP_S = 5.0
BAR_S = 1.0
HOPS = {
    "frame made to frame folded": "kprobe_flow_frame_age_seconds",
    "folding a batch": "kprobe_flow_fold_seconds",
    "judging an operation": "kprobe_flow_judge_seconds",
    "end of an epoch: topics": 'kprobe_flow_confirm_seconds{sink="topics"}',
    "end of an epoch: raw rows": 'kprobe_flow_confirm_seconds{sink="clickhouse-rows"}',
    "end of an epoch: ClickHouse documents": 'kprobe_flow_confirm_seconds{sink="clickhouse"}',
    "end of an epoch: Neo4j": 'kprobe_flow_confirm_seconds{sink="neo4j"}',
}


class Sender(threading.Thread):
    """Slices at a steady rate, with an operation in every second one."""

    def __init__(self, settings: Settings, names: dict[str, str], tiles: Tiles, rate: int, seconds: float) -> None:
        super().__init__(name="sender")
        self._writer = TopicWriter(settings.kafka, **{"linger.ms": 1})
        self._names, self._tiles = names, tiles
        self._rows, self._ticks = int(rate * TICK_S), int(seconds / TICK_S)
        self._number = 0
        self.sent = 0

    def run(self) -> None:
        """Send, one slice a tick; a late tick is sent at once."""
        begin_s = time.monotonic()
        for frame in self._tiles.others:
            self._send(self._tiles.frame("bench", self._take_number(), self._tiles.first_mono_ns, frame).encode())
        numbers = np.zeros(len(self._tiles.numbers), np.uint64)
        for tick in range(self._ticks):
            time.sleep(max(0.0, begin_s + tick * TICK_S - time.monotonic()))
            self._slice(tick, numbers)
        self._writer.flush()

    def _slice(self, tick: int, numbers: Any) -> None:
        columns = self._tiles.columns
        at = tick * self._rows % (len(columns["seq"]) - self._rows)
        part = {n: c[at : at + self._rows].copy() for n, c in columns.items()}
        now_ns = time.monotonic_ns()
        part["time_mono_ns"] += now_ns - 1 - part["time_mono_ns"][-1]
        for cpu in np.unique(part["cpu"]):
            rows = np.flatnonzero(part["cpu"] == cpu)
            part["seq"][rows] = numbers[cpu] + np.arange(len(rows), dtype=np.uint64)
            numbers[cpu] += np.uint64(len(rows))
        head = {"node": "bench", "boot_id": "b" * 32, "recording": "bench", "number": self._take_number()}
        marks = {"clocks": Clocks(now_ns, now_ns, time.time_ns()), "watermark": Watermark(now_ns)}
        self._send(events_frame(part, **head, **marks).encode())
        self.sent += self._rows
        if tick % 2:
            self._announce(tick, part)

    def _announce(self, tick: int, part: dict[str, Any]) -> None:
        """The whole slice as an operation of the thread that it has fewest events of, but ten."""
        tids, counts = np.unique(part["tid"][part["tid"] > 0], return_counts=True)
        first, last = int(part["time_mono_ns"][0]), int(part["time_mono_ns"][-1])
        row = {
            "operation_id": f"bench-{tick}",
            "type": "bench",
            "tid": int(tids[np.where(counts >= 10, counts, counts.max()).argmin()]),
            "node": "bench",
        }
        row |= {"start_mono_ns": first, "end_mono_ns": last, "deadline_ns": (last - first) // 2}
        self._writer.send(self._names["operations"], "bench", orjson.dumps(row))

    def _take_number(self) -> int:
        self._number += 1
        return self._number - 1

    def _send(self, data: bytes) -> None:
        self._writer.send(self._names["raw"], "bench", data)


def latencies(settings: Settings, topic: str, until: threading.Event) -> list[tuple[float, float]]:
    """Seconds from the end of each edge until the flow sent it, and to its arrival here."""
    from confluent_kafka import Consumer, TopicPartition

    options = {
        "bootstrap.servers": settings.kafka.bootstrap_servers,
        "group.id": "bench",
        "log_level": 0,
        "fetch.wait.max.ms": 5,
    }
    consumer = Consumer(options)
    consumer.assign([TopicPartition(topic, partition, 0) for partition in range(2)])
    found = []
    warm_s = time.monotonic() + WARM_UP_S
    while not until.is_set():
        for message in consumer.consume(100, timeout=0.005):
            now_ns = time.monotonic_ns()
            if message.error() is None and now_ns > warm_s * 1e9:
                total_s = (now_ns - orjson.loads(message.value())["end_mono_ns"]) / 1e9
                found.append((total_s - (time.time() - message.timestamp()[1] / 1e3), total_s))
    consumer.close()
    return found


def main() -> None:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rate", type=int, default=100_000)
    parser.add_argument("--capture", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    settings = load()
    with tempfile.TemporaryDirectory() as name, topics(settings) as names:
        tiles = Tiles(recorded(arguments.capture, Path(name)))
        flow = Flow(settings, names, 19580, Path(name), neo4j=True)
        try:
            sender = Sender(settings, names, tiles, arguments.rate, arguments.seconds + WARM_UP_S)
            found = measure(settings, names, flow, sender)
            spent = hops(flow)
        finally:
            flow.end()
    report(found, spent, sender.sent / (arguments.seconds + WARM_UP_S), arguments.json)


def measure(settings: Settings, names: dict[str, str], flow: Flow, sender: Sender) -> list[tuple[float, float]]:
    """Send and receive until the sender is done and two seconds have passed."""
    while not flow.serves():
        time.sleep(0.1)
    done = threading.Event()
    found: list[tuple[float, float]] = []
    receiver = threading.Thread(target=lambda: found.extend(latencies(settings, names["edges"], done)))
    receiver.start()
    sender.start()
    sender.join()
    done.wait(2.0)
    done.set()
    receiver.join()
    return found


def hops(flow: Flow) -> dict[str, dict[str, float]]:
    """Mean, 99th percentile (the bucket's upper limit) and sum of the flow's own times, in seconds."""
    found = {}
    for what, metric in HOPS.items():
        name, _, labels = metric.partition("{")
        counts = flow.buckets(name, labels.rstrip("}"))
        total = counts[-1][1] if counts else 0
        p99 = next((limit for limit, count in counts if count >= 0.99 * total), 0.0)
        spent_s = flow.value(f"{name}_sum", labels.rstrip("}"))
        found[what] = {"count": total, "mean": spent_s / total if total else 0.0, "p99_below": p99, "sum": spent_s}
    return found


def report(found: list[tuple[float, float]], spent: dict[str, dict[str, float]], rate: float, path: Path | None) -> None:
    """Print the tables; write JSON."""
    if not found:
        raise SystemExit("no edge arrived")
    cuts = {f"p{p}": float(np.percentile([total for _, total in found], p)) for p in (50, 90, 99, 100)}
    sent = {f"p{p}": float(np.percentile([until for until, _ in found], p)) for p in (50, 90, 99, 100)}
    print(f"{len(found)} edges at {rate / 1e3:.0f} k events/s, kernel event to edge on the topic, seconds:")
    print("   ".join(f"{name} {value:.3f}" for name, value in cuts.items()) + f"   bar p99 {BAR_S:.1f}")
    print("until the flow sends it: " + "   ".join(f"{name} {value:.3f}" for name, value in sent.items()))
    for what, hop in spent.items():
        print(f"{what:44} {hop['count']:7.0f} x {1e3 * hop['mean']:8.1f} ms, 99 % below {hop['p99_below']:6.3f} s, "
              f"{hop['sum']:6.2f} s in all")  # fmt: skip
    if path:
        document = {"edges": len(found), "events_per_s": rate, "latency_s": cuts, "sent_after_s": sent, "hops_s": spent}
        path.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
