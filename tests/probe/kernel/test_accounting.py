"""P1: for every CPU produced == delivered + lost, whatever happens to the reader, and the producer's own count agrees."""

import os

import numpy as np
import pytest

from events.kinds import BY_NAME, FAMILIES
from events.syscalls import NUMBERS

pytestmark = pytest.mark.kernel

ONLY_SYSCALLS = [f for f in FAMILIES if f not in ("syscalls", "sched")]
GETPPID = NUMBERS["getppid"]
CPUS = min(len(os.sched_getaffinity(0)), 2)


def getppid_events(columns):
    """(enter events, exit events) of the storm's call."""
    calls = (columns["a0"] & np.uint64(0xFFFFFFFF)) == GETPPID
    return [int((calls & (columns["kind"] == BY_NAME[k].number)).sum()) for k in ("sys_enter", "sys_exit")]


def accounts(recording):
    stats = recording.source.stats()["cpus"].values()
    return {name: [cpu[name] for cpu in stats] for name in ("produced", "delivered", "lost", "unsettled")}


def test_a_read_ring_loses_nothing_and_counts_what_the_storm_counts(record, helper, storm):
    calls = 20_011
    program = helper(storm, CPUS, calls)
    recording = record(f"pid:{program.pid}", families_off=ONLY_SYSCALLS)

    made = int(program.tell())
    recording.source.detach()
    recording.catch_up()

    assert made == CPUS * calls
    assert getppid_events(recording.columns) == [made, made]
    assert recording.lost == []
    totals = accounts(recording)
    assert totals["produced"] == totals["delivered"] and set(totals["unsettled"]) == {0}


def test_a_full_ring_loses_exactly_what_it_says(record, helper, storm):
    """64 KiB rings, and the reader stands still for the whole storm."""
    calls = 20_011
    program = helper(storm, CPUS, calls)
    recording = record(f"pid:{program.pid}", families_off=ONLY_SYSCALLS, ring_bytes_per_cpu=64 << 10)
    recording.catch_up()
    before = accounts(recording)

    made = int(program.tell())
    recording.source.detach()
    recording.catch_up()

    after = accounts(recording)
    delivered, columns = sum(after["delivered"]), recording.columns
    assert set(after["unsettled"]) == {0}
    assert [p for p, d, n in zip(after["produced"], after["delivered"], after["lost"], strict=True) if p != d + n] == []
    assert delivered == len(columns["seq"])
    assert sum(after["produced"]) - sum(before["produced"]) >= 2 * made, "every call of the storm has two numbers"
    assert sum(row["count"] for row in recording.lost) == sum(after["lost"]) > made
    for cpu in range(len(after["produced"])):
        seq = columns["seq"][columns["cpu"] == cpu]
        assert len(np.unique(seq)) == len(seq), "a sequence number was given twice"
        missing = set(range(after["produced"][cpu])) - set(seq.tolist())
        said = [n for r in recording.lost if r["cpu"] == cpu for n in range(r["first_seq"], r["last_seq"] + 1)]
        assert sorted(missing) == sorted(said), f"holes of CPU {cpu} are not the losses reported"


def test_losses_are_placed_between_their_neighbours(record, helper, storm):
    program = helper(storm, 1, 5_003)
    recording = record(f"pid:{program.pid}", families_off=ONLY_SYSCALLS, ring_bytes_per_cpu=4096)

    program.tell()
    recording.catch_up()
    program.tell()
    recording.source.detach()
    recording.catch_up()

    columns = recording.columns
    assert recording.lost
    for loss in recording.lost:
        mine = columns["cpu"] == loss["cpu"]
        seq, time = columns["seq"][mine].astype(np.int64), columns["time_mono_ns"][mine]
        earlier, later = time[seq < loss["first_seq"]], time[seq > loss["last_seq"]]
        assert len(earlier) == 0 or earlier.max() <= loss["to_mono_ns"]
        assert len(later) == 0 or later.min() >= loss["from_mono_ns"]
        assert loss["from_mono_ns"] <= loss["to_mono_ns"]


def test_each_cpus_events_come_in_order_of_time(record, helper, storm):
    program = helper(storm, CPUS, 10_007)
    recording = record("all")
    program.tell()

    columns = recording.drain().columns

    for cpu in np.unique(columns["cpu"]):
        assert (np.diff(columns["time_mono_ns"][columns["cpu"] == cpu]) >= 0).all()


def test_what_the_watermark_covers_never_comes_later(record, helper, storm):
    program = helper(storm, CPUS, 30_011)
    recording = record("all")
    marks, seen = dict.fromkeys(range(os.cpu_count()), 0), 0

    program.process.stdin.write("go\n")
    while seen < 60_000:
        drained = recording.drain()
        for cpu, mark in marks.items():
            times = drained.columns["time_mono_ns"][drained.columns["cpu"] == cpu]
            assert len(times) == 0 or times.min() >= mark, f"an event of CPU {cpu} came after its watermark"
        marks = dict(drained.watermark.cpu_mono_ns)
        seen += len(drained.columns["seq"])

    assert seen
    program.process.stdout.readline()
