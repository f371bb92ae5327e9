"""How long `kprobe why` takes with many events stored, and how many bytes an event takes on disk.

    python -m benchmarks.why [--events 50000000] [--operations 20000] [--rounds 300] [--capture FILE.kcap] [--json FILE]

Real recorded events (of `--capture`, else recorded now, which needs root) are inserted through the store and then repeated
inside the server, each copy later on the time axis and with sequence numbers that go on, until there are as many as asked
for. Beside them lie operations with verdicts. Then, warm: the read behind `kprobe why` for operations chosen at random (seed
printed), from connection to bytes; reads a question, counted; and whole `kprobe why` processes, for whose time Python's own
start is shown alongside. The servers of `kprobe up` must run; the database is the benchmark's own and is dropped.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.flow import recorded
from events.frames import Frame
from events.settings import ClickHouseSettings, load
from sinks.clickhouse import ClickHouseStore

DATABASE = "kprobe_bench_why"
BARS = {"why_p99_ms": 200.0, "why_reads": 4, "bytes_per_event": 9.0}
_GROW = """\
INSERT INTO kernel_events
SELECT e.day, e.node, e.boot_id, e.time_mono_ns + {span} * (c.number + {first}), e.seq + {step} * (c.number + {first}),
       e.cpu, e.kind, e.flags, e.tgid, e.tid, e.a0, e.a1, e.a2, e.a3, e.a4
FROM (SELECT * FROM kernel_events WHERE time_mono_ns < {end}) AS e CROSS JOIN numbers({copies}) AS c"""


def insert(store: ClickHouseStore, frames: list[Frame], batch_events: int = 100_000) -> dict[str, float]:
    """Insert the events of a recording as the flow does; returns rows, seconds and events a second."""
    import pyarrow as pa

    events = [f for f in frames if f.kind == "events/1"]
    rows, began, waiting = 0, time.perf_counter(), 0
    pending: list[Any] = []
    for i, frame in enumerate(events):
        pending.append(frame.batch.replace_schema_metadata(None))
        waiting += frame.batch.num_rows
        if waiting >= batch_events or i == len(events) - 1:
            batch = pa.Table.from_batches(pending).combine_chunks().to_batches()[0]
            store.insert_events(batch, node=frame.node, boot_id=frame.boot_id, token=f"bench-{i}", clocks=frame.clocks)
            rows, waiting, pending = rows + batch.num_rows, 0, []
    seconds = time.perf_counter() - began
    return {"rows": rows, "seconds": seconds, "events_per_s": rows / seconds}


def grow(store: ClickHouseStore, wanted: int) -> int:
    """Repeat what is stored until there are `wanted` events; returns how many there are."""
    found = store.client.rows(
        "SELECT count() AS n, min(time_mono_ns) AS a, max(time_mono_ns) AS b, max(seq) AS s FROM kernel_events"
    )[0]
    count, span = int(found["n"]), int(found["b"]) - int(found["a"]) + 1
    copies = max(0, -(-wanted // count) - 1)
    done = 0
    while done < copies:  # some copies at a time, so that no statement sorts everything at once
        now = min(copies - done, max(1, 4_000_000 // count))
        step, end = int(found["s"]) + 1, int(found["b"]) + 1
        store.client.execute(_GROW.format(span=span, step=step, first=done + 1, copies=now, end=end))
        done += now
    return int(store.client.rows("SELECT count() AS n FROM kernel_events")[0]["n"])


def judged(number: int) -> dict[str, Any]:
    """A verdict of ordinary size: forty slices, one cause."""
    task = {"tid": 4721, "tgid": 4721, "comm": "batch-recon", "start_boot_ns": 1, "cgroup": "/batch", "container": None}
    task["class"] = "other_cgroup"
    start, piece = number * 10**9, 20_310_000
    ledger = [
        {
            "start_mono_ns": start + i * piece,
            "end_mono_ns": start + (i + 1) * piece,
            "ns": piece,
            "label": "runq",
            "culprit": task,
        }
        | {"via": [], "evidence": [f"bench/0/3/{number * 100 + i}"], "confidence": "exact"}
        for i in range(40)
    ]
    cause = {
        "rank": 1,
        "kind": "cpu_preempted",
        "ns": 40 * piece,
        "culprit": task,
        "culprits": [{"task": task, "ns": 40 * piece}],
    }
    cause |= {"chain": [], "confidence": "exact", "without_it_ns": [0, 0]}
    times = {"start_mono_ns": start, "end_mono_ns": start + 40 * piece, "duration_ns": 40 * piece, "deadline_ns": 750_000_000}
    return {
        "schema": "kprobe.verdict/1", "operation_id": str(number), "type": "ledger.write", "node": "bench", "boot_id": "0",
        "thread": {"tid": 812, "tgid": 812, "comm": "ledgerd", "start_boot_ns": 1}, **times, "status": "late", "ledger": ledger,
        "totals": {"runq": 40 * piece}, "causes": [cause], "ruled_out": [],
        "completeness": {"lost_events": 0, "unknown_ns": 0, "lost_ns": 0, "missing": [], "complete": True},
        "sentence": f"settlement {number} took 812.4 ms", "algorithm": "causal/1", "hash": "sha256:0",
    }  # fmt: skip


def ask(store: ClickHouseStore, rounds: int, operations: int, seed: int) -> dict[str, float]:
    """The read behind `kprobe why`, for operations at random."""
    chosen = random.Random(seed)
    for _ in range(20):
        store.verdict(str(chosen.randrange(operations)))
    before, times_ms = store.client.queries, []
    for _ in range(rounds):
        operation = str(chosen.randrange(operations))
        began = time.perf_counter()
        if store.verdict(operation) is None:
            raise SystemExit(f"operation {operation} is not there")
        times_ms.append((time.perf_counter() - began) * 1e3)
    times_ms.sort()
    reads = (store.client.queries - before) / rounds
    return {"p50_ms": statistics.median(times_ms), "p99_ms": times_ms[int(0.99 * (rounds - 1))], "reads": reads}


def processes(settings: ClickHouseSettings, rounds: int = 15) -> dict[str, float]:
    """Whole commands, beside a Python that does nothing."""
    environment = {**os.environ, "KPROBE_CLICKHOUSE__URL": settings.url, "KPROBE_CLICKHOUSE__DATABASE": settings.database}

    def timed(*arguments: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)
        return (time.perf_counter() - began) * 1e3

    why = [timed("-m", "cli.main", "why", "1") for _ in range(rounds)]
    empty = [timed("-c", "pass") for _ in range(rounds)]
    return {"process_p50_ms": statistics.median(why), "process_max_ms": max(why), "python_p50_ms": statistics.median(empty)}


def bytes_per_event(store: ClickHouseStore) -> float:
    """Bytes on disk, of active parts, an event."""
    query = "SELECT sum(bytes_on_disk) AS b, sum(rows) AS n FROM system.parts"
    found = store.client.rows(f"{query} WHERE database = currentDatabase() AND table = 'kernel_events' AND active")[0]
    return int(found["b"]) / int(found["n"])


@contextmanager
def own_database(name: str) -> Iterator[ClickHouseStore]:
    """A store in a database that is dropped before and after."""
    store = ClickHouseStore(load().clickhouse.model_copy(update={"database": name, "retention_days": 3650}))
    drop = f"DROP DATABASE IF EXISTS {name} SYNC"
    store.client.execute(drop, database="")
    store.migrate()
    try:
        yield store
    finally:
        store.client.execute(drop, database="")
        store.close()


def main() -> None:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=50_000_000)
    parser.add_argument("--operations", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=23)
    parser.add_argument("--capture", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, own_database(DATABASE) as store:
        inserted = insert(store, recorded(options.capture, Path(folder)))
        size = bytes_per_event(store)
        for begin in range(0, options.operations, 1000):
            store.insert_verdicts([judged(n) for n in range(begin, min(begin + 1000, options.operations))])
        count = grow(store, options.events)
        result = {"events": count, "seed": options.seed, "recorded_events": inserted["rows"], "bytes_per_event": size}
        result |= {f"why_{k}": v for k, v in ask(store, options.rounds, options.operations, options.seed).items()}
        result |= {f"why_{k}": v for k, v in processes(store.settings).items()}
    for name, value in result.items():
        bar = f"  (bar {BARS[name]:g})" if name in BARS else ""
        print(f"{name:<24}{value:>16,.2f}{bar}")
    document = json.dumps({"benchmark": "why", "bars": BARS, **result})
    print(document)
    if options.json:
        options.json.write_text(document + "\n")
    if any(result[name] > bar for name, bar in BARS.items()):
        raise SystemExit("a bar is missed")


if __name__ == "__main__":
    main()
