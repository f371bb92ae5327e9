"""Verdicts, edges and events made by hand, as the schemas say, for tests of what stores and shows them."""

import hashlib

import numpy as np
import orjson
import pyarrow as pa

from events.records import EVENTS, LOSSES, TASKS

BOOT = "0123456789abcdef0123456789abcdef"


def task(tid=4721, comm="batch-recon", tgid=None, **changes):
    """A TASK of interface section 3."""
    return {
        "tid": tid,
        "tgid": tgid or tid,
        "comm": comm,
        "start_boot_ns": 1_000_000_007 * tid,
        "cgroup": "/batch",
        "container": None,
        "class": "other_cgroup",
    } | changes


def verdict(number=4821, *, culprit=None, status="late", node="node-1", **changes):
    """A verdict whose ledger sums exactly; `hash` is that of the rest."""
    start = 10**12 + number * 10**9
    slices = [("run.user", 4_100_000, None), ("runq", 790_100_000, culprit or task()), ("wait.disk.device", 18_200_000, None)]
    ledger, at = [], start
    for label, ns, who in slices:
        evidence = [f"{node}/{BOOT}/3/{number * 100 + len(ledger)}"]
        row = {"start_mono_ns": at, "end_mono_ns": at + ns, "ns": ns, "label": label, "culprit": who, "via": []}
        ledger.append({**row, "evidence": evidence, "confidence": "exact"})
        at += ns
    victim = task(812, "ledgerd", cgroup="/ledger", **{"class": "own_process"})
    chain = [
        {"edge": "preempted", "from": culprit or task(), "to": victim, "ns": 790_100_000, "evidence": ledger[1]["evidence"]}
    ]
    cause = {"rank": 1, "kind": "cpu_preempted", "ns": 790_100_000, "culprit": culprit or task()}
    cause |= {"culprits": [{"task": culprit or task(), "ns": 790_100_000}], "chain": chain}
    cause |= {"confidence": "exact", "without_it_ns": [22_300_000, 22_300_000]}
    body = {
        "schema": "kprobe.verdict/1",
        "operation_id": str(number),
        "type": "ledger.write",
        "node": node,
        "boot_id": BOOT,
        "thread": {"tid": 812, "tgid": 812, "comm": "ledgerd", "start_boot_ns": victim["start_boot_ns"]},
        "start_mono_ns": start,
        "end_mono_ns": at,
        "duration_ns": at - start,
        "deadline_ns": 750_000_000,
        "status": status,
        "ledger": ledger,
        "totals": {label: ns for label, ns, _ in slices},
        "causes": [] if status == "ok" else [cause],
        "ruled_out": [{"kind": "disk_slow", "ns": 0, "why": "no such event"}],
        "completeness": {"lost_events": 0, "unknown_ns": 0, "lost_ns": 0, "missing": [], "complete": True},
        "sentence": f"settlement {number} ledger write took 812.4 ms (deadline 750 ms): 790.1 ms runnable behind batch-recon",
        "algorithm": "causal/1",
    } | changes
    body["hash"] = "sha256:" + hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).hexdigest()
    return body


def edges(of):
    """The causal edges of a verdict, schema kprobe.edge/1."""
    return [
        {
            "schema": "kprobe.edge/1",
            "edge_id": hashlib.sha256(f"{of['operation_id']}/{cause['rank']}/{i}".encode()).hexdigest(),
            "operation_id": of["operation_id"],
            "edge": step["edge"],
            "from": step["from"],
            "to": step["to"],
            "ns": step["ns"],
            "start_mono_ns": of["start_mono_ns"],
            "end_mono_ns": of["end_mono_ns"],
            "evidence": step["evidence"],
            "confidence": cause["confidence"],
            "completeness": of["completeness"],
            "algorithm": of["algorithm"],
            "node": of["node"],
            "boot_id": of["boot_id"],
        }
        for cause in of["causes"]
        for i, step in enumerate(cause["chain"])
    ]


def event_columns(count, *, seed, first_seq=0, cpus=2):
    """Random events on several CPUs in time order, about 1 us apart."""
    random = np.random.default_rng(seed)
    columns = {f.name: random.integers(0, 100, count).astype(f.type.to_pandas_dtype()) for f in EVENTS}
    columns["cpu"] = (np.arange(count) % cpus).astype(np.uint16)
    columns["seq"] = (np.arange(count) // cpus + first_seq).astype(np.uint64)
    columns["time_mono_ns"] = 10**12 + first_seq * 10_000 + np.cumsum(random.integers(1, 2000, count))
    columns["a0"] = random.integers(0, 2**64, count, dtype=np.uint64)  # the whole range: signs must survive
    return columns


def task_rows(*rows):
    """A batch of `TASKS`; absent columns are null."""
    return pa.RecordBatch.from_pylist([{f.name: row.get(f.name) for f in TASKS} for row in rows], schema=TASKS)


def loss_rows(*rows):
    """A batch of `LOSSES`; absent columns are null."""
    return pa.RecordBatch.from_pylist([{f.name: row.get(f.name) for f in LOSSES} for row in rows], schema=LOSSES)
