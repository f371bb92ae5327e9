"""P1 for switches: those recorded and those told to be missing are as many as the kernel's own counts say."""

import itertools
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest

from events.kinds import BY_NAME

from .conftest import wait_until

pytestmark = pytest.mark.kernel

SWITCH = BY_NAME["sched_switch"]
ROUNDS = 3_011

PING_PONG = """
import os, sys
os.sched_setaffinity(0, {CPU})
there, back = os.pipe(), os.pipe()
child = os.fork()
mine, other = (there, back) if child else (back, there)
if not child:
    while os.read(there[0], 1):
        os.write(back[1], b"x")
print(child, flush=True)
for line in sys.stdin:
    for _ in range(ROUNDS):
        os.write(there[1], b"x")
        os.read(back[0], 1)
    print("done", flush=True)
os.kill(child, 9)
os.wait()
"""


def switches_of(pid):
    """(times that a sleeping process left the CPU, times that it came) as the scheduler counted them."""
    wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "S", f"{pid} sleeps")
    left = sum(map(int, re.findall(r"ctxt_switches:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())))
    return left, int(Path(f"/proc/{pid}/schedstat").read_text().split()[2])


def per_cpu(recording):
    """(cpu, its switches in order of time) as decoded rows."""
    rows = recording.of("sched_switch")
    return [(cpu, [r for r in rows if r["cpu"] == cpu]) for cpu in sorted({r["cpu"] for r in rows})]


@pytest.fixture
def ping_pong(helper):
    """Two processes that pass a byte to and fro on one CPU: ROUNDS times for every line."""
    program = helper.python(PING_PONG.replace("CPU", str(max(os.sched_getaffinity(0)))).replace("ROUNDS", str(ROUNDS)))
    program.child = int(program.process.stdout.readline())
    return program


@pytest.mark.parametrize("watch", ["all", "pid"])
def test_a_threads_switches_are_those_that_the_kernel_counted_for_it(record, ping_pong, watch):
    pids = (ping_pong.pid, ping_pong.child)
    recording = record("all" if watch == "all" else f"pid:{ping_pong.pid}")
    before = [switches_of(p) for p in pids]
    recording.catch_up()
    known = {p: (left(recording, p), came(recording, p)) for p in pids}

    ping_pong.tell()
    after = [switches_of(p) for p in pids]
    recording.catch_up()

    assert recording.lost == []
    for pid, (left_before, came_before), (left_after, came_after) in zip(pids, before, after, strict=True):
        assert left_after - left_before >= ROUNDS
        assert left(recording, pid) - known[pid][0] == left_after - left_before
        assert came(recording, pid) - known[pid][1] == came_after - came_before


def left(recording, tid):
    return sum(r["by_tid"] == tid for r in recording.of("sched_switch"))


def came(recording, tid):
    """Switches to a thread: those recorded, and those that its leaving proves where the kernel says that one is missing."""
    count = 0
    for _, rows in per_cpu(recording):
        count += sum(r["next_tid"] == tid for r in rows)
        count += sum(b["by_tid"] == tid != a["next_tid"] and b["not_run"] > 0 for a, b in itertools.pairwise(rows))
    return count


def test_the_chain_of_switches_breaks_only_where_a_loss_is_told(record, ping_pong):
    recording = record("all")
    ping_pong.tell()
    recording.source.detach()
    recording.catch_up()

    assert recording.lost == []
    for cpu, rows in per_cpu(recording):
        told = [r for r in recording.losses if r["cpu"] == cpu]
        for a, b in itertools.pairwise(rows):
            if a["next_tid"] != b["by_tid"]:
                assert b["not_run"] > 0, f"CPU {cpu}: {a} and {b} do not fit, and the kernel counted nothing between them"
            within = [t for t in told if a["time_mono_ns"] <= t["from_mono_ns"] and t["to_mono_ns"] <= b["time_mono_ns"]]
            assert sum(t["count"] for t in within) == b["not_run"], f"CPU {cpu}: losses told between {a} and {b}"
        assert sum(t["count"] for t in told) == recording.source.stats()["cpus"][cpu]["switches_not_run"]


def test_all_switches_of_the_machine_are_recorded_or_told_to_be_missing(record, ping_pong):
    """Against `ctxt` of /proc/stat, read before and after; what happens during the readings is the tolerance."""

    def reading():
        begun = time.monotonic_ns()
        count = int(re.search(r"^ctxt (\d+)", Path("/proc/stat").read_text(), re.MULTILINE)[1])
        return begun, count, time.monotonic_ns()

    recording = record("all")
    first = reading()
    ping_pong.tell()
    last = reading()
    recording.catch_up()

    def recorded(since, until):
        columns = recording.columns
        switches = columns["kind"] == SWITCH.number
        return int((switches & (columns["time_mono_ns"] > since) & (columns["time_mono_ns"] < until)).sum())

    def missing(since, until, touching):
        spans = [(r["from_mono_ns"], r["to_mono_ns"], r["count"]) for r in recording.losses]
        if touching:
            return sum(n for a, b, n in spans if b > since and a < until)
        return sum(n for a, b, n in spans if a >= since and b <= until)

    low = recorded(first[2], last[0]) + missing(first[2], last[0], touching=False)
    high = recorded(first[0], last[2]) + missing(first[0], last[2], touching=True)
    assert low <= last[1] - first[1] <= high
    assert low > ROUNDS and high - low < 0.2 * high, "the readings took too long to say anything"


def test_nothing_is_recorded_by_tasks_that_are_told_to_be_hidden(record, ping_pong):
    """A loss of this kind names tasks of which no event exists; anything else is a loss of ours."""
    recording = record("all")
    ping_pong.tell()
    recording.catch_up()

    columns = recording.columns
    for row in (r for r in recording.losses if r["reason"] == "hidden_task"):
        before = [r for r in recording.of("sched_switch", cpu=row["cpu"]) if r["time_mono_ns"] <= row["from_mono_ns"]]
        assert not np.isin(columns["tid"], before[-1]["next_tid"]).any()
