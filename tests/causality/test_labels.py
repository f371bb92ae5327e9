"""Ledger labels of running time, and the rank of causes: hand-made traces with a known answer for every nanosecond."""

import pytest
from tape import BOOT_ID, NODE, Tape

from causality.engine import NodeEngine
from causality.operations import Operation
from events.kinds import BY_NAME

PAY, HOG, HOLDER = 10, 20, 30
START, END = 1_000_000, 2_000_000


def switch(time, cpu, prev, nxt, *, state=0, preempt=0, **more):
    values = {"prev_state": state, "preempt": preempt, "prev_prio": 120, "next_prio": 120}
    if prev:
        values["prev_start_boot_ns"] = prev
    if nxt:
        values |= {"next_tid": nxt, "next_tgid": nxt, "next_start_boot_ns": nxt}
    return time, cpu, "sched_switch", prev, values | more


def waking(time, cpu, by, target, to=0):
    values = {"tid": target, "tgid": target, "start_boot_ns": target, "target_cpu": to, "prio": 120}
    return time, cpu, "sched_waking", by, values


def verdict(*events, end=END, deadline=1, rows=(), outcome="", tid=PAY, start=START):
    """The verdict on PAY, which runs on CPU 0 from `START` - 1000 on unless the events say otherwise."""
    first = switch(START - 1000, 0, 0, PAY)
    last = (end + 5_000_000, 1, "sys_exit", 99, {})
    numbers, records = {}, []
    for time, cpu, name, current, values in sorted([first, *events, last], key=lambda e: e[0]):
        seq = numbers[cpu] = numbers.get(cpu, -1) + 1
        records.append((time, cpu, seq, BY_NAME[name].number, current, current, BY_NAME[name].encode(**values)))
    tasks = [
        {"time_mono_ns": 0, "reason": "snapshot", "tid": t, "tgid": t, "comm": c, "start_boot_ns": t, "observer": o}
        for t, c, o in ((PAY, "pay", False), (HOG, "hog", False), (HOLDER, "holder", False), *rows)
    ]
    tape = Tape(tuple(records), tuple(tasks), (), end + 6_000_000, 2)
    engine = NodeEngine(NODE, BOOT_ID)
    engine.submit([Operation("op", "payment", tid, start, end, deadline, outcome)])
    engine.fold(tape.frames())
    engine.finish()
    (found,) = engine.ready()
    assert sum(found["totals"].values()) == end - start
    return found


def pieces(found):
    return [(p["start_mono_ns"], p["end_mono_ns"], p["label"]) for p in found["ledger"]]


def test_a_fault_lasts_to_the_last_event_that_can_only_be_inside_it():
    found = verdict(
        (1_100_000, 0, "page_fault_user", PAY, {}),
        (1_150_000, 0, "rss_stat", PAY, {"curr": 1, "size_bytes": 4096}),
        (1_400_000, 0, "sys_enter", PAY, {"nr": 39}),
        (1_450_000, 0, "rss_stat", PAY, {"curr": 1, "size_bytes": 8192}),
        (1_500_000, 0, "sys_exit", PAY, {"nr": 39}),
    )
    assert pieces(found) == [
        (1_000_000, 1_100_000, "run.user"), (1_100_000, 1_150_000, "run.fault"), (1_150_000, 1_400_000, "run.user"),
        (1_400_000, 1_500_000, "run.kernel"), (1_500_000, 2_000_000, "run.user"),
    ]  # fmt: skip
    assert [c["kind"] for c in found["causes"]] == ["own_cpu"]


def test_a_fault_without_further_events_says_nothing_about_its_length():
    found = verdict((1_100_000, 0, "page_fault_user", PAY, {}))
    assert pieces(found) == [(1_000_000, 2_000_000, "run.user")]


def test_cpu_time_in_reclaim_is_the_reclaims():
    found = verdict(
        (1_200_000, 0, "mm_vmscan_memcg_reclaim_begin", PAY, {}),
        (1_900_000, 0, "mm_vmscan_memcg_reclaim_end", PAY, {}),
    )
    assert pieces(found)[1] == (1_200_000, 1_900_000, "run.reclaim")
    assert found["causes"][0]["kind"] == "memcg_reclaim"
    assert found["causes"][0]["culprit"] is None


def test_spinning_names_the_owner_of_the_lock():
    found = verdict(
        (1_100_000, 0, "contention_begin", PAY, {"lock": 7, "flags": 33, "owner_tid": HOLDER, "owner_start_boot_ns": HOLDER}),
        (1_800_000, 0, "contention_end", PAY, {"lock": 7}),
    )
    assert pieces(found)[1] == (1_100_000, 1_800_000, "run.spin")
    assert (found["causes"][0]["kind"], found["causes"][0]["culprit"]["comm"]) == ("lock_holder", "holder")


def test_a_non_maskable_interrupt_is_taken_out_of_what_it_interrupted():
    found = verdict(
        (1_300_000, 0, "irq_handler_entry", PAY, {"irq": 5}),
        (1_500_000, 0, "nmi_handler", PAY, {"delta_ns": 100_000}),
        (1_600_000, 0, "irq_handler_exit", PAY, {"irq": 5}),
        (1_550_000, 1, "nmi_handler", 99, {"delta_ns": 100_000}),
    )
    assert pieces(found)[1:4] == [
        (1_300_000, 1_400_000, "irq.hard"), (1_400_000, 1_500_000, "irq.nmi"), (1_500_000, 1_600_000, "irq.hard"),
    ]  # fmt: skip


def test_kprobes_own_work_is_told_as_such():
    row = (50, "kprobe", True)
    found = verdict(switch(START - 500, 0, PAY, 50), rows=(row,), tid=50)
    assert found["totals"] == {"run.observer": END - START}


PREEMPTED = (switch(1_300_000, 0, PAY, HOG, preempt=1), switch(1_700_000, 0, HOG, PAY, state=1))


@pytest.mark.parametrize(
    ("deadline", "first"),
    [
        (700_000, "cpu_preempted"),  # own work is 600 us: in time without the hog
        (600_000, "cpu_preempted"),
        (599_999, "own_cpu"),  # late whatever others do
        (None, "own_cpu"),
    ],
)
def test_own_work_does_not_hide_what_made_an_operation_late(deadline, first):
    found = verdict(*PREEMPTED, deadline=deadline)
    assert found["totals"]["runq"] == 400_000
    assert found["causes"][0]["kind"] == first
    if first == "cpu_preempted":
        assert found["causes"][0]["culprit"]["comm"] == "hog"
        assert "inside the deadline" in found["sentence"]
