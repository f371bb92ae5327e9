"""How fast the stores take what the flow writes: event rows, verdicts, graph edges, messages; and bytes an event.

    python -m benchmarks.stores [--rounds 3] [--batch 100000] [--capture FILE.kcap] [--json FILE]

Real recorded events (of `--capture`, else recorded now, which needs root) go into ClickHouse through `insert_events` in batches
of `--batch`, as the flow sends them; the CPU time of this process an event is shown beside the rate, because that is what the
flow pays. Then verdicts (ClickHouse), operations with their edges (Neo4j, new and again) and messages (Kafka). Medians over
rounds; every round begins with empty stores. The servers of `kprobe up` must run; the graph's test operations are removed.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from benchmarks.flow import recorded
from benchmarks.why import bytes_per_event, insert, judged, own_database
from causality.graph import edges_of
from events.frames import Frame
from events.settings import load
from events.topics import EDGES_TOPIC
from sinks.clickhouse import ClickHouseStore
from sinks.graph import GraphStore
from sinks.topics import TopicWriter

DATABASE = "kprobe_bench_stores"
BARS = {"events_per_s": 0.8e6, "bytes_per_event": 9.0}
DOCUMENTS = 5000


def documents(count: int) -> list[dict[str, Any]]:
    """Verdicts whose cause has a chain of one link, each with a culprit of its own."""
    made = []
    for number in range(count):
        verdict = judged(number)
        culprit = verdict["causes"][0]["culprit"] | {"tid": 10_000 + number, "tgid": 10_000 + number}
        victim = {**verdict["thread"], "cgroup": "/ledger", "container": None, "class": "own_process"}
        link = {"edge": "preempted", "from": culprit, "to": victim, "ns": 1, "evidence": [f"bench/0/3/{number}"]}
        verdict["causes"][0] |= {"culprit": culprit, "culprits": [{"task": culprit, "ns": 1}], "chain": [link]}
        made.append(verdict | {"node": "kprobe-bench", "boot_id": "kprobe-bench"})
    return made


def per_second(count: int, work: Callable[[], object]) -> float:
    """How many a second."""
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


def one_round(store: ClickHouseStore, graph: GraphStore, frames: list[Frame], batch: int) -> dict[str, float]:
    """Every store once, from empty."""
    store.client.execute("TRUNCATE TABLE kernel_events")
    before = resource.getrusage(resource.RUSAGE_SELF)
    inserted = insert(store, frames, batch)
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    result = {"events_per_s": inserted["events_per_s"], "client_ns_per_event": cpu_s / inserted["rows"] * 1e9}
    result["bytes_per_event"] = bytes_per_event(store)
    verdicts = documents(DOCUMENTS)
    edges = [edge for verdict in verdicts for edge in edges_of(verdict)]
    result["verdicts_per_s"] = per_second(DOCUMENTS, lambda: store.insert_verdicts(verdicts))
    forget(graph)
    result["graph_new_per_s"] = per_second(DOCUMENTS, lambda: graph.write(verdicts, edges))
    result["graph_again_per_s"] = per_second(DOCUMENTS, lambda: graph.write(verdicts, edges))
    forget(graph)
    result["messages_per_s"] = per_second(len(edges), lambda: send(edges))
    return result


def forget(graph: GraphStore) -> None:
    """Remove what this benchmark wrote, and nothing else."""
    graph.query("MATCH (n:Operation|Task {node: 'kprobe-bench'}) DETACH DELETE n")


def send(edges: list[dict[str, Any]]) -> None:
    """Edges to their topic, confirmed."""
    writer = TopicWriter(load().kafka)
    for edge in edges:
        writer.send(EDGES_TOPIC, edge["operation_id"], orjson.dumps(edge))
    writer.flush()


def main() -> None:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=100_000)
    parser.add_argument("--capture", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    graph = GraphStore(load().neo4j)
    graph.migrate()
    with tempfile.TemporaryDirectory() as folder, own_database(DATABASE) as store:
        frames = recorded(options.capture, Path(folder))
        rounds = [one_round(store, graph, frames, options.batch) for _ in range(options.rounds)]
    graph.close()
    result = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    for name, value in result.items():
        bar = f"  (bar {BARS[name]:,.0f})" if name in BARS else ""
        print(f"{name:<24}{value:>16,.2f}{bar}")
    document = json.dumps({"benchmark": "stores", "bars": BARS, "rounds": rounds, **result})
    print(document)
    if options.json:
        options.json.write_text(document + "\n")
    if result["events_per_s"] < BARS["events_per_s"] or result["bytes_per_event"] > BARS["bytes_per_event"]:
        raise SystemExit("a bar is missed")


if __name__ == "__main__":
    main()
