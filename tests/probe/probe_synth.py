"""Synthesised drains for tests of what lies behind the source: numbers that can be recognised, and a seed."""

import itertools

import numpy as np

from events.frames import Watermark
from events.kinds import BY_NAME
from events.records import EVENTS
from probe.framing import Framer

START_MONO_NS = 1_000_000_000_000
STEP_NS = 1_000


def columns_of(rows, *, first_seq=0, start_mono_ns=START_MONO_NS, cpus=2, kind="sched_switch", seed=23):
    """`rows` events of one kind, dealt out to the CPUs in blocks; sequence numbers run per CPU from `first_seq` (or a list)."""
    rng = np.random.default_rng(seed)
    columns = {f.name: np.zeros(rows, f.type.to_pandas_dtype()) for f in EVENTS}
    per_cpu = [len(part) for part in np.array_split(np.arange(rows), cpus)]
    columns["cpu"][:] = np.repeat(np.arange(cpus), per_cpu)
    columns["seq"][:] = np.concatenate([f + np.arange(n) for f, n in zip(_each(first_seq, cpus), per_cpu, strict=True)])
    columns["time_mono_ns"][:] = start_mono_ns + np.concatenate([np.arange(n) for n in per_cpu]) * STEP_NS
    columns["kind"][:] = BY_NAME[kind].number
    columns["tid"][:] = columns["tgid"][:] = rng.integers(100, 110, rows)
    for argument in ("a0", "a1", "a2", "a3", "a4"):
        columns[argument][:] = rng.integers(0, 1 << 20, rows)
    return columns


def _each(first_seq, cpus):
    return first_seq if isinstance(first_seq, list) else [first_seq] * cpus


def framer(**more):
    return Framer(**{"node": "node-23", "boot_id": "b" * 32, "recording": "r" * 32, **more})


def recording(frames=5, rows=23, **more):
    """A small recording: session, tasks, then `frames` events frames of `rows` events, watermarks moving on."""
    make = framer(**more)
    yield make.session({"kernel": "6.18", "families": {}})
    yield from make.tasks([{"time_mono_ns": START_MONO_NS, "reason": "snapshot", "tid": 100, "tgid": 100, "comm": "ledger"}])
    for n in itertools.count() if frames is None else range(frames):
        start = START_MONO_NS + n * rows * STEP_NS
        columns = columns_of(rows, first_seq=[n * (rows - rows // 2), n * (rows // 2)], start_mono_ns=start)
        mark = start + rows * STEP_NS
        yield from make.events(columns, Watermark(mark, {0: mark, 1: mark}), rows)
